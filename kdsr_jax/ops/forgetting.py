"""How alike two spaces of item vectors still are: cosines of item pairs, and their correlation (paper Figure 1)."""

import chex
import jax
import jax.numpy as jnp

from kdsr_jax.ops.scoring import cosine

_PAIRS_AT_ONCE = 4096  # keeps the gathered rows of 10**5 pairs out of memory


def pair_cosines(table: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cosine of pairs of rows of a table.

    Args:
      table: [N, d] float, a vector an item.
      first: [P] int32, rows from 0 to N - 1.
      second: [P] int32, likewise.

    Returns:
      (cosines, valid): [P] float in [-1, 1] up to rounding, and [P] bool, False where a row is zero (padding), whose
      cosine is 0.
    """
    chex.assert_rank([table, first, second], [2, 1, 1])
    chex.assert_equal_shape([first, second])
    cosines = jax.lax.map(
        lambda pair: cosine(table[pair[0]], table[pair[1]]), (first, second), batch_size=_PAIRS_AT_ONCE
    )
    nonzero = jnp.any(table != 0, axis=1)
    return cosines, nonzero[first] & nonzero[second]


def pearson(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Return Pearson's correlation of two variables, the paper's measure of what a table still shares with another.

    Args:
      x: [P] float.
      y: [P] float.
      mask: [P] bool, the places that count; the others may hold anything, NaN too.

    Returns:
      Scalar in [-1, 1] up to rounding; 0 where either variable is constant or fewer than two places count.
    """
    chex.assert_rank([x, y, mask], 1)
    chex.assert_equal_shape([x, y, mask])
    return cosine(_centred(x, mask), _centred(y, mask))


def _centred(x: jax.Array, mask: jax.Array) -> jax.Array:
    # Subtracting one of the values first makes a constant exactly zero, which the mean alone does only up to rounding.
    shifted = jnp.where(mask, x - x[jnp.argmax(mask)], 0)
    return jnp.where(mask, shifted - shifted.sum() / jnp.maximum(mask.sum(), 1), 0)
