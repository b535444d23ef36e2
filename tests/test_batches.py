"""Batches: a pure function of (seed, index) that uses every target once an epoch and pads little."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr_jax.data import batches as data_batches
from kdsr_jax.data.batches import Batches
from kdsr_jax.data.sequences import Windows, train_windows
from kdsr_jax.errors import UserError


def make_windows(lengths, max_length=50, prefixes=False) -> Windows:
    """Cut train parts of the given lengths into windows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return train_windows(offsets, np.asarray(lengths), max_length, 0, prefixes)


def skewed_lengths(num_users: int, mean: float) -> np.ndarray:
    """Draw lengths with a long tail, as real logs have."""
    return 4 + np.random.default_rng(0).geometric(1 / (mean - 3), num_users)


def epoch_of(batches: Batches, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Return the chunks of an epoch."""
    first = epoch * batches.chunks_per_epoch
    return [batches.chunk(first + place) for place in range(batches.chunks_per_epoch)]


def chunk_bytes(index: int) -> tuple[int, bytes]:
    """Return a chunk in another process."""
    length, ids = Batches(make_windows(skewed_lengths(300, 12)), batch_size=64, steps_per_call=4, seed=7).chunk(index)
    return length, ids.tobytes()


@settings(max_examples=40)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_every_target_once_an_epoch_within_the_batch_size(lengths, max_length, extra, steps_per_call, seed, prefixes):
    windows = make_windows(lengths, max_length, prefixes)
    batch_size = int(windows.counts.max()) + extra
    batches = Batches(windows, batch_size=batch_size, steps_per_call=steps_per_call, seed=seed)
    for epoch in range(3):
        used, steps = [], 0
        for length, ids in epoch_of(batches, epoch):
            assert ids.dtype == np.int32 and len(ids) == steps_per_call
            for row in ids:
                members = row[row >= 0]
                assert windows.counts[members].sum() <= batch_size
                assert (windows.length[members] <= length).all()
                used.extend(members.tolist())
                steps += len(members) > 0
        assert sorted(used) == list(range(len(windows)))
        assert steps == batches.steps_per_epoch


def test_a_bucket_of_less_than_12_batches_joins_the_next_longer_one():
    # Up to 4, 8, 16 and 20 inputs there are 22, 10, 9 and 4 prefixes, each a batch: the 10 join the 9.
    windows = make_windows([4, 4, 6, 6, 10, 21], prefixes=True)
    batches = Batches(windows, batch_size=1, steps_per_call=2, seed=0)
    assert [bucket.length for bucket in batches.buckets] == [4, 16, 20]
    assert sum(len(ids[ids >= 0]) for _, ids in epoch_of(batches, 0)) == 45


def test_buckets_by_hand(monkeypatch):
    monkeypatch.setattr(data_batches, "_FEWEST_BATCHES", 0)
    # Windows of 3, 4, 5 and 7 inputs: two buckets. In the first 7 targets need two batches of 4; in the second,
    # 12 targets fit neither in one batch of 7 nor, by 5 + 7, in less than two.
    windows = make_windows([4, 5, 6, 8])
    batches = Batches(windows, batch_size=7, steps_per_call=3, seed=0)
    assert [tuple(bucket) for bucket in batches.buckets] == [(4, 2, 1, 1), (7, 1, 2, 1)]
    assert (batches.steps_per_epoch, batches.chunks_per_epoch) == (3, 2)
    by_length = dict(epoch_of(batches, 0))
    assert sorted(by_length[4][0].tolist()) == [0, 1] and (by_length[4][1:] == -1).all()
    assert sorted(by_length[7][:2, 0].tolist()) == [2, 3] and (by_length[7][2] == -1).all()


def test_fewest_batches_by_hand():
    # Sorted counts 4 4 3 2 1 with batches of 7: B = 2 gives groups led by 4, 3, 1 (sum 8), B = 3 by 4 and 2.
    batches = Batches(make_windows([5, 2, 4, 5, 3]), batch_size=7, steps_per_call=1, seed=0)
    assert [tuple(bucket) for bucket in batches.buckets] == [(4, 2, 3, 3)]


def test_any_order_of_calls_gives_the_same_chunks():
    windows = make_windows(skewed_lengths(300, 12))
    forward = Batches(windows, batch_size=64, steps_per_call=4, seed=7)
    indices = list(range(3 * forward.chunks_per_epoch))
    expected = [(length, ids.tobytes()) for length, ids in map(forward.chunk, indices)]
    backward = Batches(windows, batch_size=64, steps_per_call=4, seed=7)
    for index in np.random.default_rng(0).permutation(indices).tolist():
        length, ids = backward.chunk(index)
        assert (length, ids.tobytes()) == expected[index]


def test_another_process_gives_the_same_chunks():
    indices = [0, 5, 23]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(chunk_bytes, indices) == [chunk_bytes(index) for index in indices]


def test_a_caller_cannot_change_the_plan():
    batches = Batches(make_windows([5, 6, 7]), batch_size=10, steps_per_call=1, seed=0)
    with pytest.raises(ValueError, match="read-only"):
        batches.chunk(0)[1][:] = 0


def test_epochs_and_seeds_differ():
    windows = make_windows(skewed_lengths(300, 12))
    batches, other = (Batches(windows, batch_size=64, steps_per_call=4, seed=seed) for seed in (7, 8))
    assert batches.chunks_per_epoch > 8
    first, second, third = epoch_of(batches, 0), epoch_of(batches, 1), epoch_of(other, 0)
    for other_epoch in (second, third):
        assert not any(np.array_equal(a, b) for _, a in first for _, b in other_epoch)
    lengths, of_second, of_third = ([length for length, _ in epoch] for epoch in (first, second, third))
    assert of_second != lengths and of_third == lengths  # seeds can be trained side by side


def test_companions_change_between_epochs():
    batches = Batches(make_windows([11] * 200), batch_size=100, steps_per_call=1, seed=0)
    companions = [{frozenset(row.tolist()) for _, ids in epoch_of(batches, epoch) for row in ids} for epoch in (0, 1)]
    assert len(companions[0]) == 20 and not companions[0] & companions[1]


def test_any_two_windows_of_one_size_can_meet():
    batches = Batches(make_windows([11] * 40), batch_size=100, steps_per_call=1, seed=0)
    met = np.zeros((40, 40), bool)
    for epoch in range(80):
        for _, ids in epoch_of(batches, epoch):
            met[np.ix_(ids[0], ids[0])] = True
    assert met.all()


@pytest.mark.parametrize(("mean", "most_padding"), [(9, 1.45), (165, 1.1)])
def test_batches_are_full_and_padding_is_low(mean, most_padding):
    windows = make_windows(skewed_lengths(6000, mean))
    batches = Batches(windows, batch_size=512, steps_per_call=32, seed=0)
    slots = sum(bucket.length * bucket.rows * bucket.batches for bucket in batches.buckets)
    assert slots < most_padding * windows.length.sum()
    assert windows.num_targets > 0.94 * 512 * batches.steps_per_epoch
    assert sum(bucket.rows * bucket.batches for bucket in batches.buckets) < 1.06 * len(windows)


def test_a_window_with_more_targets_than_a_batch_is_refused():
    with pytest.raises(UserError, match="train.batch_size is 9 targets, but one window has 10; raise it to 10"):
        Batches(make_windows([11]), batch_size=9, steps_per_call=1, seed=0)


def test_no_targets_are_refused():
    with pytest.raises(UserError, match="no training targets"):
        Batches(make_windows([1, 1]), batch_size=9, steps_per_call=1, seed=0)
