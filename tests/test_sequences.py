"""Windows: every target once, its inputs as the paper has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr_jax.data.sequences import Windows, evaluation_windows, limit_targets, train_windows
from kdsr_jax.errors import UserError


def rows(windows: Windows) -> list[tuple[int, int, int]]:
    """Return (start, length, first) of each window."""
    return list(zip(windows.start.tolist(), windows.length.tolist(), windows.first.tolist(), strict=True))


def offsets_of(lengths) -> np.ndarray:
    """Return where each history begins."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def targets_of(windows: Windows) -> list[int]:
    """List the targets by the definition of a window."""
    return [s + p + 1 for s, length, first in rows(windows) for p in range(first, length)]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=8)


def test_long_train_part_by_hand():
    # 12 train items have 11 inputs: windows of 4, stride 2; the last is moved back by one to end with the part.
    windows = train_windows(np.array([0, 15]), np.array([12]), 4, 2)
    assert rows(windows) == [(0, 4, 0), (2, 4, 2), (4, 4, 2), (6, 4, 2), (7, 4, 3)]
    assert windows.counts.tolist() == [4, 2, 2, 2, 1]
    assert windows.num_targets == 11


def test_short_train_parts_by_hand():
    # The second history starts at 5 and has 4 train items; the third has one, so nothing to predict.
    windows = train_windows(np.array([0, 5, 10, 12]), np.array([4, 5, 1]), 4, 0)
    assert rows(windows) == [(0, 3, 0), (5, 4, 0)]


def test_stride_zero_is_half_of_the_longest_window():
    arguments = np.array([0, 30]), np.array([24])
    assert rows(train_windows(*arguments, 8, 0)) == rows(train_windows(*arguments, 8, 4))
    assert rows(train_windows(*arguments, 1, 0)) == rows(train_windows(*arguments, 1, 1))


@pytest.mark.parametrize("stride", [-1, 5])
def test_a_stride_that_loses_targets_is_refused(stride):
    with pytest.raises(UserError, match=f"data.window_stride is {stride}"):
        train_windows(np.array([0, 30]), np.array([24]), 4, stride)


def test_evaluation_by_hand():
    # Targets 3..7 of a history that starts at 10: prefixes of 3, 4 and 5 items share a window, 6 and 7 are cut to 5.
    windows = evaluation_windows(np.array([10, 18]), np.array([3]), np.array([8]), 5)
    assert rows(windows) == [(10, 5, 2), (11, 5, 4), (12, 5, 4)]


def test_evaluation_of_one_target_a_prefix_by_hand():
    windows = evaluation_windows(np.array([10, 18]), np.array([3]), np.array([8]), 5, prefixes=True)
    assert rows(windows) == [(10, 3, 2), (10, 4, 3), (10, 5, 4), (11, 5, 4), (12, 5, 4)]


def test_evaluation_of_users_without_targets_and_with_long_prefixes_only():
    offsets, first, end = np.array([0, 4, 13, 16]), np.array([3, 7, 2]), np.array([3, 9, 3])
    assert rows(evaluation_windows(offsets, first, end, 5)) == [(4 + 2, 5, 4), (4 + 3, 5, 4), (13, 2, 1)]


@pytest.mark.parametrize("prefixes", [False, True])
@given(LENGTHS, st.integers(1, 12), st.data())
def test_train_windows_count_every_target_once(prefixes, lengths, max_length, data):
    stride = data.draw(st.integers(0, max_length))
    offsets, lengths = offsets_of([length + 2 for length in lengths]), np.array(lengths)
    windows = train_windows(offsets, lengths, max_length, stride, prefixes)
    expected = [o + t for o, length in zip(offsets, lengths, strict=False) for t in range(1, length)]
    assert targets_of(windows) == expected
    assert windows.targets()[2].tolist() == expected
    assert windows.length.max() <= max_length and windows.counts.min() >= 1
    if prefixes:
        assert (windows.counts == 1).all()


@given(LENGTHS, st.integers(2, 12), st.data())
def test_train_windows_of_long_histories_are_full_and_give_long_context(lengths, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    offsets, lengths = offsets_of(lengths), np.array(lengths)
    windows = train_windows(offsets, lengths, max_length, stride)
    user = np.searchsorted(offsets, windows.start, side="right") - 1
    assert (windows.length == np.minimum(lengths - 1, max_length)[user]).all()
    later = windows.start > offsets[user]
    assert (windows.first[later] >= max_length - stride).all()
    assert (windows.first[~later] == 0).all()


@pytest.mark.parametrize("prefixes", [False, True])
@given(LENGTHS, st.integers(1, 12), st.data())
def test_evaluation_windows_show_each_target_its_last_items(prefixes, lengths, max_length, data):
    first = np.array([data.draw(st.integers(1, length)) for length in lengths])
    end = np.array([data.draw(st.integers(low, length)) for low, length in zip(first, lengths, strict=True)])
    offsets = offsets_of(lengths)
    windows = evaluation_windows(offsets, first, end, max_length, prefixes)
    expected = [(o + t, min(t, max_length)) for o, a, b in zip(offsets, first, end, strict=False) for t in range(a, b)]
    window, position, index = windows.targets()
    assert list(zip(index.tolist(), (position + 1).tolist(), strict=True)) == expected
    assert (windows.start[window] + position + 1 == index).all()
    shared = windows.counts > 1
    assert not (prefixes and shared.any())
    # Without prefixes, no two windows begin at the beginning of one history.
    begins = windows.start[np.isin(windows.start, offsets)]
    assert prefixes or len(set(begins.tolist())) == len(begins)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 5))
def test_limit_targets_keeps_targets_and_inputs(lengths, max_length, most):
    windows = train_windows(offsets_of(lengths), np.array(lengths), max_length, 0)
    limited = limit_targets(windows, most)
    assert limited.counts.max() <= most
    window, position, index = windows.targets()
    split, split_position, split_index = limited.targets()
    assert split_index.tolist() == index.tolist() and split_position.tolist() == position.tolist()
    assert limited.start[split].tolist() == windows.start[window].tolist()


def test_limit_targets_leaves_small_windows_alone():
    windows = train_windows(np.array([0, 30]), np.array([24]), 8, 0)
    assert limit_targets(windows, 8) is windows
