"""The batches of every epoch as a pure function of (seed, index): the whole iterator state is one number."""

from typing import NamedTuple

import numpy as np

from kdsr_jax.data.sequences import Windows
from kdsr_jax.errors import UserError

_SHORTEST_BUCKET = 4
_FEWEST_BATCHES = 12


class Bucket(NamedTuple):
    """Windows that are padded to one length.

    Attributes:
        length: inputs of a row, padding included.
        rows: windows of a batch, padding included.
        batches: batches an epoch.
        chunks: chunks an epoch; their steps are `batches` and the no-ops that fill the last one.
    """

    length: int
    rows: int
    batches: int
    chunks: int


class Batches:
    """Batches of at most `batch_size` targets, in chunks of `steps_per_call` batches of one shape.

    Every window is in exactly one batch of an epoch. Each window goes to the smallest bucket that holds it; a bucket's
    windows, sorted by targets (ties in random order), are cut into groups of as many windows as there are batches, and
    each group is dealt out, one window to a batch. So all batches of a bucket have the same number of rows and nearly
    the same number of targets, and that number of batches is the smallest for which this holds.

    Attributes:
        batch_size: most targets of a batch (the paper's 512, §4).
        steps_per_call: batches of a chunk, K.
        buckets: tuple of `Bucket`, shortest first.
        steps_per_epoch: batches an epoch, no-ops not counted.
        chunks_per_epoch: chunks an epoch.
    """

    def __init__(self, windows: Windows, *, batch_size: int, steps_per_call: int, seed: int):
        """Plan the buckets; every epoch has the same shapes.

        Rows are padded to 4, 8, 16, ... and the longest window; a bucket of less than 12 batches joins the next longer one,
        because each costs a compilation.

        Args:
            windows: what to batch, at least one window.
            batch_size: most targets of a batch.
            steps_per_call: batches of a chunk.
            seed: non-negative; with the epoch it decides every order.

        Raises:
            UserError: there are no windows, or one has more than `batch_size` targets (see `limit_targets`).
        """
        if len(windows) == 0:
            raise UserError("there are no training targets: every train part is shorter than 2 items")
        most = int(windows.counts.max())
        if most > batch_size:
            raise UserError(
                f"--config.train.batch_size is {batch_size} targets, but one window has {most}; raise it to {most}"
            )
        self.batch_size, self.steps_per_call = batch_size, steps_per_call
        self._seed = seed
        self._members = _join_small(_bucket_members(windows), windows.counts, _FEWEST_BATCHES * batch_size)
        # Keys of 8 or 16 bits let numpy sort by radix: ten times faster on a million windows.
        self._counts = windows.counts.astype(np.min_scalar_type(most))
        self.buckets = tuple(self._bucket(length, members) for length, members in self._members)
        self.steps_per_epoch = sum(bucket.batches for bucket in self.buckets)
        self.chunks_per_epoch = sum(bucket.chunks for bucket in self.buckets)
        self._planned: tuple[int, list[tuple[int, np.ndarray]]] | None = None

    def chunk(self, index: int) -> tuple[int, np.ndarray]:
        """Return chunk `index`, a pure function of the seed and `index`; its shape is one of `index` alone.

        Args:
            index: chunk number from 0 since the start of training; `index // chunks_per_epoch` is its epoch.

        Returns:
            bucket_length: inputs of a row, padding included.
            window_ids: [K, R] int32, the windows of each batch; -1 is no row, a row of -1 only is a no-op step.
        """
        epoch, place = divmod(index, self.chunks_per_epoch)
        planned = self._planned
        if planned is None or planned[0] != epoch:
            planned = self._planned = (epoch, self._plan(epoch))
        return planned[1][place]

    def _bucket(self, length: int, members: np.ndarray) -> Bucket:
        """Size one bucket."""
        batches = _fewest_batches(np.sort(self._counts[members])[::-1].astype(np.int64), self.batch_size)
        return Bucket(length, -(-len(members) // batches), batches, -(-batches // self.steps_per_call))

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return the chunks of one epoch in their order."""
        rng = np.random.default_rng([self._seed, epoch])
        chunks = []
        for bucket, (_, members) in zip(self.buckets, self._members, strict=True):
            chunks.extend((bucket.length, chunk) for chunk in self._deal(rng, bucket, members))
        # Their order is the same for all seeds, which so can be trained side by side (`kdsr_jax.together`).
        return [chunks[place] for place in np.random.default_rng(epoch).permutation(len(chunks))]

    def _deal(self, rng: np.random.Generator, bucket: Bucket, members: np.ndarray) -> np.ndarray:
        """Deal one bucket's windows to its batches, [chunks, K, R] int32."""
        shuffled = rng.permutation(members)
        ordered = shuffled[np.argsort(self._counts[shuffled], kind="stable")[::-1]]
        groups = np.full(bucket.rows * bucket.batches, -1, np.int32)
        groups[: len(ordered)] = ordered
        dealt = rng.permuted(groups.reshape(bucket.rows, bucket.batches), axis=1).T
        steps = np.full((bucket.chunks * self.steps_per_call, bucket.rows), -1, np.int32)
        steps[: bucket.batches] = dealt
        steps.setflags(write=False)  # the plan is kept: a caller must not change what the next call returns
        return steps.reshape(bucket.chunks, self.steps_per_call, bucket.rows)


def _bucket_members(windows: Windows) -> list[tuple[int, np.ndarray]]:
    """Return each non-empty bucket's length and its windows, [n] int32, shortest bucket first."""
    longest = int(windows.length.max())
    ladder = [_SHORTEST_BUCKET << doublings for doublings in range(longest.bit_length())]
    edges = [*(length for length in ladder if length < longest), longest]
    bucket_of = np.searchsorted(edges, windows.length)
    members = [np.flatnonzero(bucket_of == bucket).astype(np.int32) for bucket in range(len(edges))]
    return [(edge, ids) for edge, ids in zip(edges, members, strict=True) if len(ids)]


def _join_small(buckets: list[tuple[int, np.ndarray]], counts: np.ndarray, least: int) -> list[tuple[int, np.ndarray]]:
    """Let every bucket with fewer than `least` targets join the next longer one; the longest stays as it is."""
    joined, waiting = [], []
    for length, members in buckets:
        waiting.append(members)
        if length == buckets[-1][0] or sum(int(counts[ids].sum()) for ids in waiting) >= least:
            joined.append((length, np.sort(np.concatenate(waiting))))
            waiting = []
    return joined


def _fewest_batches(counts: np.ndarray, batch_size: int) -> int:
    """Return the smallest B for which the largest counts of consecutive groups of B sum to at most `batch_size`.

    Args:
        counts: [n] int64, targets of each window, descending.
        batch_size: most targets of a batch, at least `counts[0]`.
    """
    # The sum never grows with B: larger groups are fewer and begin at smaller counts. So bisection is exact.
    low, high = 1, len(counts)
    while low < high:
        middle = (low + high) // 2
        if counts[::middle].sum() <= batch_size:
            high = middle
        else:
            low = middle + 1
    return low
