"""Correlation vectors of item pairs, and the choice of pairs within sequences (paper, section 3.2 and Eqs. 3, 5)."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

_DIGIT_BITS = 4
MOST_PAIRS = 2 ** (32 - _DIGIT_BITS)


def split_scores(x: jax.Array, y: jax.Array, num_splits: int, score_fn: Callable) -> jax.Array:
    """Return the correlation vector of one pair: a score for each of D consecutive chunks (section 3.2, first step).

    Args:
      x: [d] float, condensed features of one item.
      y: [d] float, condensed features of the other item.
      num_splits: D >= 1, the number of chunks; divides d.
      score_fn: a function of two vectors to a scalar, such as those of ``ops.scoring``.

    Returns:
      [D] float, the scores in the order of the chunks.

    Raises:
      ValueError: if num_splits does not divide d.

    Gradient: that of score_fn, chunk by chunk.
    """
    chex.assert_rank([x, y], 1)
    chex.assert_equal_shape([x, y])
    if num_splits < 1 or x.shape[0] % num_splits:
        raise ValueError(f"num_splits={num_splits} does not divide vectors of size {x.shape[0]}")
    return jax.vmap(score_fn)(x.reshape(num_splits, -1), y.reshape(num_splits, -1))


def distinct_mask(items: jax.Array) -> jax.Array:
    """Mark the first occurrence of every item of one sequence, so that pairs are pairs of distinct items.

    Args:
      items: [L] int, item indices; 0 is padding.

    Returns:
      [L] bool, True at first occurrences; False at repetitions and at padding.
    """
    chex.assert_rank(items, 1)
    repeats = jnp.tril(items[:, None] == items[None, :], k=-1).any(axis=1)
    return (items != 0) & ~repeats


def all_pairs(valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """List every pair i < j of positions, with a mask of those that are valid in each row.

    Args:
      valid: [B, L] bool, the positions that may enter a pair.

    Returns:
      i: [L(L-1)/2] int32, first positions; the same for every row.
      j: [L(L-1)/2] int32, second positions.
      mask: [B, L(L-1)/2] bool, True where both positions are valid; padding positions make no valid pair.
    """
    chex.assert_rank(valid, 2)
    with jax.ensure_compile_time_eval():  # constants even under jit: they depend on the shape alone
        i, j = (index.astype(jnp.int32) for index in jnp.triu_indices(valid.shape[1], k=1))
    return i, j, valid[:, i] & valid[:, j]


def _uniform_below(key: jax.Array, bound: jax.Array, num: int) -> jax.Array:
    """Draw [num] uint32 uniformly from 0..bound-1 as 64 random bits modulo bound <= 2**28, all in integers.

    ``jax.random.randint`` overflows for bounds above 2**16 and is then uniform only to bound / 2**32. This is uniform
    to bound / 2**64: a remainder times 16 plus a digit still fits 32 bits.
    """
    words = jax.random.bits(key, (2, num), jnp.uint32)
    remainder = jnp.zeros(num, jnp.uint32)
    for word in words:
        for shift in range(0, 32, _DIGIT_BITS):
            digit = (word >> shift) & (2**_DIGIT_BITS - 1)
            remainder = ((remainder << _DIGIT_BITS) + digit) % bound.astype(jnp.uint32)
    return remainder


def sample_pairs(key: jax.Array, valid: jax.Array, num_pairs: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draw pairs uniformly, with replacement, from the union of the rows' pairs i < j of valid positions.

    A row with n valid positions owns n(n-1)/2 pairs of the union, so the mean of any function of the drawn pairs is an
    unbiased estimate of its mean over ``all_pairs``. The draw numbers the union's pairs and unranks the number with
    integers only; no shape depends on the data.

    Args:
      key: a PRNG key.
      valid: [B, L] bool, the positions that may enter a pair; B * L(L-1)/2 <= 2**28.
      num_pairs: P >= 0, the number of draws; static.

    Returns:
      row: [P] int32, the row of each drawn pair.
      i: [P] int32, its first position.
      j: [P] int32, its second position, i < j.
      mask: [P] bool, all True, or all False where no row has two valid positions (row, i and j are then 0).

    Raises:
      ValueError: if the union might hold more than 2**28 pairs.
    """
    chex.assert_rank(valid, 2)
    num_rows, length = valid.shape
    if num_rows * length * (length - 1) // 2 > MOST_PAIRS:
        raise ValueError(f"sample_pairs takes at most 2**28 pairs, got {num_rows} rows of {length} positions")
    counted = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    owned = counted[:, -1] * (counted[:, -1] - 1) // 2
    ends = jnp.cumsum(owned)
    number = _uniform_below(key, jnp.maximum(ends[-1], 1), num_pairs).astype(jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, number, side="right"), num_rows - 1)
    within = number - (ends - owned)[row]
    # Pair number t of a row joins its valid items a < b with t = b(b-1)/2 + a.
    triangle = jnp.arange(length + 1, dtype=jnp.int32)
    triangle = triangle * (triangle - 1) // 2
    second = jnp.searchsorted(triangle, within, side="right") - 1
    first = within - triangle[second]
    mask = jnp.broadcast_to(ends[-1] > 0, (num_pairs,))
    i, j = (jnp.sum(counted[row] <= nth[:, None], axis=1, dtype=jnp.int32) for nth in (first, second))
    return *(jnp.where(mask, index, 0).astype(jnp.int32) for index in (row, i, j)), mask
