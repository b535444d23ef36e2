"""Full ranking of all items for every target, on the device (paper Section 4, Evaluation Protocol)."""

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.data.batches import Batches
from kdsr_jax.data.sequences import limit_targets
from kdsr_jax.errors import Diverged
from kdsr_jax.models.student import candidates_of
from kdsr_jax.ops import metrics
from kdsr_jax.resident import at_slots, cut_batch, place_histories

SCORE_BYTES = 48 * 2**20  # of one batch's scores [S, N]; larger only costs memory
MOST_ROWS = 512  # of prefixes in a batch, as in training by default; more only cost memory
MOST_SLOTS = 4096  # of a batch, where the catalogue is small: each may need a whole row of states
COVERAGE_K = 20


class Evaluator:
    """Ranks the targets of a set of windows.

    Attributes:
      num_targets: number of targets.
      target_items: [num_targets] int32.
      history_lengths: [num_targets] int32, items before each target in its whole history.
      users: [num_targets] int32 user indices.
    """

    def __init__(self, student, interactions, windows, placement, *, filter_seen, histories="auto"):
        self._student, self._filter_seen, self._placement = student, filter_seen, placement
        num_slots = max(1, SCORE_BYTES * placement.data * placement.model // (4 * student.num_items))
        # Of prefixes, each slot is a whole row.
        most = MOST_ROWS if student.trained_on == "prefixes" else MOST_SLOTS
        num_slots = min(num_slots, most * placement.data)
        num_slots = min(num_slots, max(1, windows.num_targets))
        self._num_slots = num_slots + -num_slots % placement.data
        windows = limit_targets(windows, self._num_slots)
        self._batches = Batches(windows, batch_size=self._num_slots, steps_per_call=1, seed=0)
        self.num_targets = windows.num_targets
        _, _, index = windows.targets()
        self.target_items = interactions.items[index]
        self.users = (np.searchsorted(interactions.offsets, index, side="right") - 1).astype(np.int32)
        self.history_lengths = (index - interactions.offsets[self.users]).astype(np.int32)
        self._longest = int(self.history_lengths.max(initial=1))
        read = self._longest if filter_seen else 0
        self._histories = place_histories(histories, interactions, windows, placement, read)
        self._rank_batch = jax.jit(self._ranks, static_argnames="length")
        self._top_batch = jax.jit(self._tops, static_argnames=("length", "k"))
        self._candidates = jax.jit(self._candidate_vectors)

    def rank(self, params, frozen):
        """Rank every target among all items, ties against it.

        Args:
          params, frozen: the student's variables.

        Returns:
          (ranks [num_targets] int32 from 1, coverage@20: the share of the catalogue in any top 20).

        Raises:
          Diverged: a score is NaN or infinite.
        """
        variables = {"params": params, "frozen": frozen}
        candidates = self._candidates(variables)
        ranks = np.zeros(self.num_targets, np.int32)
        shown = np.zeros(self._student.num_items, bool)
        for index in range(self._batches.chunks_per_epoch):
            length, ids = self._batches.chunk(index)
            arrays = self._rank_batch(variables, candidates, *self._histories.of(ids, length), length=length)
            instance, rank, finite, batch_shown = jax.device_get(arrays)
            if not finite:
                raise Diverged("the model gives scores that are NaN or infinite; lower --config.train.learning_rate")
            real = instance >= 0
            ranks[instance[real]] = rank[real]
            shown |= batch_shown
        return ranks, float(shown.mean())

    def top_items(self, params, frozen, k):
        """List the k best items of every target's ranking.

        Args:
          params, frozen: the student's variables.
          k: length of a list.

        Returns:
          [num_targets, min(k, N)] int32 item ids, the best first; 0 at the end of a list that has no more items.
        """
        variables = {"params": params, "frozen": frozen}
        candidates = self._candidates(variables)
        lists = np.zeros((self.num_targets, min(k, self._student.num_items)), np.int32)
        for index in range(self._batches.chunks_per_epoch):
            length, ids = self._batches.chunk(index)
            arguments = variables, candidates, *self._histories.of(ids, length)
            arrays = self._top_batch(*arguments, length=length, k=lists.shape[1])
            instance, top = jax.device_get(arrays)
            real = instance >= 0
            lists[instance[real]] = top[real]
        return lists

    def _tops(self, variables, candidates, resident, window_ids, length, k):
        """List the best items of one batch; see ``top_items``."""
        batch, scores, _ = self._scores(variables, candidates, resident, window_ids, length)
        values, top = self._placement.top_k(scores, k)
        return self._shown(batch.instance, jnp.where(values > -jnp.inf, top + 1, 0))

    def _scores(self, variables, candidates, resident, window_ids, length):
        """Return (batch, scores [S, N] as they are ranked, whether all were finite) of window ids [1, R]."""
        spread, num_items = self._placement.spread, self._student.num_items
        batch = cut_batch(resident, window_ids[0], length, self._num_slots)
        states = self._student.apply(self._placement.unpack(variables, num_items), batch.history, method="encode")
        representations = spread(at_slots(states, batch), "data")
        scores = spread(representations @ self._placement.unpad(candidates, num_items).T, "data", "model")
        finite = jnp.all(jnp.isfinite(scores))
        if self._filter_seen:
            scores = spread(self._without_seen(scores, batch, resident), "data", "model")
        return batch, scores, finite

    def _candidate_vectors(self, variables):
        """Return the vectors [N, dim] that representations are compared with, as they rest."""
        variables = self._placement.unpack(variables, self._student.num_items)
        if self._placement.model > 1:  # every device makes those of its own items
            return self._placement.pad(self._student.apply(variables, method="candidate_vectors"))
        return self._placement.pad(candidates_of(self._student, variables))

    def _shown(self, *results):
        """Put results on every device, for the host to look at."""
        return tuple(map(self._placement.spread, results))

    def _ranks(self, variables, candidates, resident, window_ids, length):
        """Rank the targets of one batch, window ids [1, R]; see ``rank``."""
        batch, scores, finite = self._scores(variables, candidates, resident, window_ids, length)
        ranks = jax.vmap(metrics.rank_of_target)(scores, jnp.maximum(batch.targets - 1, 0))
        return self._shown(batch.instance, ranks, finite, _in_top(scores, batch.mask, COVERAGE_K, self._placement))

    def _without_seen(self, scores, batch, resident):
        """Take the items of each target's whole history out of the ranking, except the target itself."""
        index = batch.begin[:, None] + jnp.arange(self._longest)[None]
        seen = jnp.where(index < batch.end[:, None], resident.items.at[index].get(mode="clip"), 0)
        seen = jnp.where(seen == batch.targets[:, None], 0, seen)
        column = jnp.where(seen > 0, seen - 1, scores.shape[1])  # past the end: dropped
        return jax.vmap(lambda s, c: s.at[c].set(-jnp.inf, mode="drop"))(scores, column)


def _in_top(scores, mask, k, placement):
    """Say which items [N] are in the top k of any real row of scores [S, N]."""
    _, top = placement.top_k(scores, min(k, scores.shape[1]))
    column = jnp.where(mask[:, None], top, scores.shape[1])
    return jnp.zeros(scores.shape[1], bool).at[column.ravel()].set(True, mode="drop")


def summarise(ranks, topk):
    """Average the metrics over targets.

    Args:
      ranks: [T] int32 from 1.
      topk: cut-offs.

    Returns:
      dict "hr@k", "mrr@k", "ndcg@k" -> percent.
    """
    ranks = np.asarray(ranks)
    result = {}
    for name, metric in (("hr", metrics.hr_at_k), ("mrr", metrics.mrr_at_k), ("ndcg", metrics.ndcg_at_k)):
        for k in topk:
            result[f"{name}@{k}"] = 100 * float(np.mean(np.asarray(metric(ranks, k)), dtype=np.float64))
    return result
