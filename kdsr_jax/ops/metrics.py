"""Ranking metrics of one test instance as functions of its target's rank (section 4.1), in fractions, not percent."""

import chex
import jax
import jax.numpy as jnp


def rank_of_target(scores: jax.Array, target_index: jax.Array) -> jax.Array:
    """Return the target's rank among all scores by comparison, ties counted against the target.

    A score counts against the target unless it is strictly smaller, so a model that gives equal scores gets the last
    rank. So does a NaN: a NaN target ranks last and any other NaN stands before the target. Evaluation treats
    non-finite scores as an error all the same; here they merely cannot flatter.

    Args:
      scores: [N] float, one score per item; -inf takes an item out of the ranking.
      target_index: scalar int, the target's 0-based column; one past the end gives the last rank.

    Returns:
      Scalar int32 in 1..N.
    """
    chex.assert_rank([scores, target_index], [1, 0])
    target_score = scores.at[target_index].get(mode="fill", fill_value=jnp.nan)
    # The target is never smaller than itself, so it contributes the 1 from which ranks start.
    return jnp.sum(~(scores < target_score), dtype=jnp.int32)


def _counted(rank: jax.Array, k: int, gain: jax.Array) -> jax.Array:
    return jnp.where((rank >= 1) & (rank <= k), gain, 0.0)


def hr_at_k(rank: jax.Array, k: int) -> jax.Array:
    """Return the hit rate at k of one test instance: 1 if the target is among the first k.

    Args:
      rank: int from 1, any shape; 0 is padding.
      k: >= 1, the length of the list.

    Returns:
      float32 of rank's shape, 0 or 1; 0 for padding.
    """
    return _counted(rank, k, jnp.ones(jnp.shape(rank)))


def mrr_at_k(rank: jax.Array, k: int) -> jax.Array:
    """Return the reciprocal rank of the target, 0 beyond k.

    Args:
      rank: int from 1, any shape; 0 is padding.
      k: >= 1, the length of the list.

    Returns:
      float32 of rank's shape in [0, 1]; 0 for padding.
    """
    return _counted(rank, k, 1.0 / jnp.maximum(rank, 1))


def ndcg_at_k(rank: jax.Array, k: int) -> jax.Array:
    """Return the normalised discounted gain 1 / log2(rank + 1) of the single target, 0 beyond k.

    Args:
      rank: int from 1, any shape; 0 is padding.
      k: >= 1, the length of the list.

    Returns:
      float32 of rank's shape in [0, 1]; 0 for padding.
    """
    return _counted(rank, k, 1.0 / jnp.log2(jnp.maximum(rank, 1) + 1.0))
