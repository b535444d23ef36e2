"""Histories as windows over one flat array: which inputs are read and which targets count, without any copy."""

import dataclasses

import numpy as np

from kdsr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows over the flat array of all histories.

    Window w reads the inputs `items[start : start + length]`. Its position p is the p-th oldest input; where
    `first <= p < length` the position counts, and its target is `items[start + p + 1]`.

    Attributes:
        start: [W] int32, index of the oldest input in the flat array.
        length: [W] int32, number of inputs, 1..max_length.
        first: [W] int32, first position that counts, 0..length-1.
    """

    start: np.ndarray
    length: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def counts(self) -> np.ndarray:
        """Number of targets of each window, [W] int32, at least 1."""
        return self.length - self.first

    @property
    def num_targets(self) -> int:
        """Number of targets of all windows together."""
        return int(self.counts.sum(dtype=np.int64))

    def targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """List every target, window after window, oldest first.

        Returns:
            window: [T] int32, the window that counts the target.
            position: [T] int32, the position in that window that predicts it.
            index: [T] int64, the target's place in the flat array.
        """
        window, rank = _enumerate(self.counts)
        position = self.first[window] + rank
        return window.astype(np.int32), position.astype(np.int32), self.start[window].astype(np.int64) + position + 1


def train_windows(
    offsets: np.ndarray, lengths: np.ndarray, max_length: int, stride: int, prefixes: bool = False
) -> Windows:
    """Cut train parts into windows that count every train target exactly once.

    Paper §4 trains on every prefix. A part with more than `max_length` inputs becomes overlapping windows: the first
    counts all its positions, a later one only the targets that no earlier window had, each thus with at least
    `max_length - stride` inputs before its own; the last window is moved back to end with the part, so it is full.

    Args:
        offsets: [U + 1] int64, where each history begins in the flat array.
        lengths: [U] int64, items of each history that are for training; below 2 a history gives no window.
        max_length: most inputs of a window.
        stride: inputs between the starts of two windows, 1..max_length; 0 is half of `max_length`.
        prefixes: give each target a window of its own, for models that predict once per sequence.

    Returns:
        The windows, user after user, oldest first.

    Raises:
        UserError: `stride` is negative or larger than `max_length` (targets would be lost between windows).
    """
    if not 0 <= stride <= max_length:
        bounds = f"between 0 and --config.data.max_length={max_length}"
        raise UserError(f"--config.data.window_stride is {stride}; it must be {bounds}")
    if prefixes:
        return evaluation_windows(offsets, np.ones_like(lengths), lengths, max_length, prefixes=True)
    stride = stride or max(1, max_length // 2)
    inputs = np.maximum(lengths - 1, 0)
    windows_per_user = 1 + -(-np.maximum(inputs - max_length, 0) // stride)
    user, rank = _enumerate(np.where(inputs > 0, windows_per_user, 0))
    length = np.minimum(inputs[user], max_length)
    last_start = inputs[user] - length
    start = np.minimum(rank * stride, last_start)
    counted = np.where(rank > 0, (rank - 1) * stride + length, 0)
    return _windows(offsets[user] + start, length, counted - np.where(rank > 0, start, 0))


def evaluation_windows(
    offsets: np.ndarray, first_target: np.ndarray, end: np.ndarray, max_length: int, prefixes: bool = False
) -> Windows:
    """Cut histories into windows in which each target sees all items before it, the last `max_length` kept.

    Paper §4, "Evaluation Protocol". Targets whose whole prefix fits share one window (a causal model scores them in
    one pass); every other target has a full window of its own with one position that counts.

    Args:
        offsets: [U + 1] int64, where each history begins in the flat array.
        first_target: [U] int64, index within the history of its first target, at least 1.
        end: [U] int64, index within the history one past its last target; no targets where it is <= `first_target`.
        max_length: most inputs of a window.
        prefixes: give each target a window of its own, for models that predict once per sequence.

    Returns:
        The windows, user after user, in the order of their targets.
    """
    # A user's windows are one per target from `lowest` on; its first also counts the targets before `lowest`.
    lowest = first_target if prefixes else np.maximum(first_target, np.minimum(max_length, end - 1))
    user, rank = _enumerate(np.where(end > first_target, end - lowest, 0))
    target = lowest[user] + rank
    length = np.minimum(target, max_length)
    shared = np.where(rank == 0, (lowest - first_target)[user], 0)
    return _windows(offsets[user] + target - length, length, length - 1 - shared)


def limit_targets(windows: Windows, most: int) -> Windows:
    """Split windows that count more than `most` targets into several that read the same oldest input.

    Needed only where a batch is to hold fewer targets than one window has.

    Args:
        windows: the windows.
        most: most targets of a window, at least 1.

    Returns:
        Windows with the same targets in the same order; the argument itself where nothing is split.
    """
    if len(windows) == 0 or windows.counts.max() <= most:
        return windows
    window, rank = _enumerate(-(-windows.counts // most))
    first = windows.first[window] + rank * most
    return _windows(windows.start[window], np.minimum(windows.length[window], first + most), first)


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `counts.sum()` members its owner and its rank 0, 1, ... within the owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    begins = np.cumsum(counts, dtype=np.int64) - counts
    return owner, np.arange(len(owner)) - begins[owner]


def _windows(start: np.ndarray, length: np.ndarray, first: np.ndarray) -> Windows:
    """Build int32 windows from arrays of any integer type."""
    return Windows(start.astype(np.int32), length.astype(np.int32), first.astype(np.int32))
