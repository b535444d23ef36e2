"""Batches cut on the device: a worked example, empty rows, and every window of a small log against plain loops.

Histories that stay on the host give the same batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax import resident as module
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.sequences import Windows, evaluation_windows, train_windows
from kdsr_jax.mesh import Placement
from kdsr_jax.resident import (
    DeviceHistories,
    HostHistories,
    at_slots,
    cut_batch,
    make_resident,
    place_histories,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

cut = jax.jit(cut_batch, static_argnames=("length", "num_slots"))


def interactions(lengths, seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = rng.integers(1, 40, size=offsets[-1]).astype(np.int32)
    return Interactions(items, offsets, np.array(["u"] * len(lengths)), np.array(["i"] * 40))


@pytest.fixture
def worked():
    """Two users, 11..14 and 21..25; three windows: 11 12 13 (all count), 21 22 (the last counts), 23 24 (both)."""
    log = interactions([4, 5])
    items = np.array([11, 12, 13, 14, 21, 22, 23, 24, 25], np.int32)
    log = Interactions(items, log.offsets, log.user_ids, log.item_ids)
    windows = Windows(*(np.array(a, np.int32) for a in ([0, 4, 6], [3, 2, 2], [0, 1, 0])))
    return make_resident(log, windows)


def test_instances_count_targets_window_after_window(worked):
    np.testing.assert_array_equal(worked.instance, [0, 3, 4])
    np.testing.assert_array_equal(worked.user_start, [0, 4, 4])


def test_worked_example(worked):
    batch = cut(worked, jnp.array([2, -1, 0, 1]), length=4, num_slots=8)
    np.testing.assert_array_equal(batch.history, [[23, 24, 0, 0], [0] * 4, [11, 12, 13, 0], [21, 22, 0, 0]])
    np.testing.assert_array_equal(batch.slots, [0, 1, 8, 9, 10, 13, 16, 16])  # row * 4 + position; 16 is padding
    np.testing.assert_array_equal(batch.targets, [24, 25, 12, 13, 14, 23, 0, 0])
    np.testing.assert_array_equal(batch.mask, [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.instance, [4, 5, 0, 1, 2, 3, -1, -1])
    np.testing.assert_array_equal(batch.end[:6], [7, 8, 1, 2, 3, 6])
    np.testing.assert_array_equal(batch.begin[:6], [4, 4, 0, 0, 0, 4])


def test_a_batch_that_fills_every_slot_and_the_whole_length(worked):
    batch = cut(worked, jnp.array([0]), length=3, num_slots=3)
    np.testing.assert_array_equal(batch.history, [[11, 12, 13]])
    np.testing.assert_array_equal(batch.slots, [0, 1, 2])
    np.testing.assert_array_equal(batch.targets, [12, 13, 14])
    assert batch.mask.all()


def test_a_batch_without_rows(worked):
    batch = cut(worked, jnp.array([-1, -1]), length=4, num_slots=3)
    assert not batch.history.any() and not batch.mask.any() and not batch.targets.any()
    np.testing.assert_array_equal(batch.slots, [8, 8, 8])
    np.testing.assert_array_equal(batch.instance, [-1, -1, -1])
    assert (batch.end >= 0).all() and (batch.begin >= 0).all()


def test_states_at_slots_with_zeros_at_padding(worked):
    batch = cut(worked, jnp.array([1, -1, 2]), length=3, num_slots=5)
    states = jnp.arange(1.0, 19.0).reshape(3, 3, 2)
    got = jax.jit(at_slots)(states, batch)
    np.testing.assert_array_equal(got, [[3, 4], [13, 14], [15, 16], [0, 0], [0, 0]])
    np.testing.assert_array_equal(at_slots(states, batch), got)


def test_gradient_reaches_the_slots_and_nothing_else(worked):
    batch = cut(worked, jnp.array([1, -1, 2]), length=3, num_slots=5)
    gradient = jax.grad(lambda states: at_slots(states, batch).sum())(jnp.ones((3, 3, 1)))
    np.testing.assert_array_equal(gradient[..., 0], [[0, 1, 0], [0, 0, 0], [1, 1, 0]])


def windows_of(kind):
    log = interactions([2, 9, 3, 14, 1, 6])
    if kind == "evaluation":
        windows = evaluation_windows(log.offsets, np.maximum(log.lengths // 2, 1), log.lengths, max_length=5)
    else:
        windows = train_windows(log.offsets, log.lengths, 5, stride=2, prefixes=kind == "prefixes")
    return log, windows


@pytest.mark.parametrize("kind", ["train", "evaluation", "prefixes"])
def test_every_target_of_a_log_with_its_history(kind):
    log, windows = windows_of(kind)
    resident = make_resident(log, windows)
    window, position, index = windows.targets()
    rows = np.random.default_rng(1).permutation(len(windows))
    seen = []
    for at in range(0, len(rows), 4):
        ids = np.pad(rows[at : at + 4], (0, max(0, at + 4 - len(rows))), constant_values=-1)
        batch = jax.tree.map(np.asarray, cut(resident, jnp.asarray(ids), length=5, num_slots=20))
        for slot in np.flatnonzero(batch.mask):
            row, place = divmod(int(batch.slots[slot]), 5)
            instance = batch.instance[slot]
            assert (ids[row], place) == (window[instance], position[instance])
            assert batch.end[slot] == index[instance] and batch.targets[slot] == log.items[index[instance]]
            start = windows.start[ids[row]]
            np.testing.assert_array_equal(batch.history[row, : place + 1], log.items[start : batch.end[slot]])
            user = np.searchsorted(log.offsets, batch.end[slot], side="right") - 1
            assert batch.begin[slot] == log.offsets[user] <= start
            seen.append(int(instance))
    assert sorted(seen) == list(range(windows.num_targets))


@pytest.mark.parametrize("kind", ["train", "evaluation", "prefixes"])
def test_histories_on_the_host_give_the_same_batches(kind):
    log, windows = windows_of(kind)
    given, longest = (log, windows, Placement()), int(log.lengths.max()) - 1
    whole = DeviceHistories(*given)
    ids = np.random.default_rng(1).permutation(np.append(np.arange(len(windows)), [-1] * (-len(windows) % 4)))
    for few in np.split(ids.astype(np.int32), len(ids) // 4):
        expected = cut(*_first(whole.of(few[None], 5)), length=5, num_slots=20)
        for most_before in (0, longest):
            resident, own_ids = HostHistories(*given, most_before).of(few[None], 5)
            assert resident.items.shape == (4 * (max(5, most_before) + 1),)
            batch = cut(resident, own_ids[0], length=5, num_slots=20)
            for name in ("history", "slots", "targets", "mask", "instance"):
                np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name), name)
        for slot in np.flatnonzero(expected.mask):  # with whole histories, all that comes before a target
            own = resident.items[batch.begin[slot] : batch.end[slot]]
            np.testing.assert_array_equal(own, log.items[expected.begin[slot] : expected.end[slot]])


def _first(given):
    return given[0], given[1][0]


def test_ids_of_several_steps_and_seeds_keep_their_shape(worked):
    log = interactions([4, 5])
    windows = Windows(*(np.array(a, np.int32) for a in ([0, 4, 6], [3, 2, 2], [0, 1, 0])))
    ids = np.array([[[0, -1], [2, 1]], [[1, 1], [-1, -1]]], np.int32)
    resident, own = HostHistories(log, windows, Placement(), 0).of(ids, 4)
    np.testing.assert_array_equal(own, [[[0, -1], [2, 3]], [[4, 5], [-1, -1]]])
    assert resident.items.shape == (8 * 5,) and not resident.items[5:10].any()


def test_histories_are_on_the_device_where_they_take_no_large_share_of_its_memory(monkeypatch):
    log = interactions([2, 9, 3])
    windows = train_windows(log.offsets, log.lengths, 5, stride=2)
    for memory, kind in ((8 * log.items.nbytes, DeviceHistories), (8 * log.items.nbytes - 1, HostHistories)):
        monkeypatch.setattr(module, "machine_memory", lambda memory=memory: memory)
        assert type(place_histories("auto", log, windows, Placement())) is kind
    assert type(place_histories("device", log, windows, Placement())) is DeviceHistories
