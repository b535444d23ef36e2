"""Correlation scoring functions: the paper's xi (section 3.2), each for one pair of vectors.

``cosine`` and ``dot`` grow with likeness, ``euclidean`` and ``manhattan`` are plain distances (no sign flip).
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def _check_pair(x: jax.Array, y: jax.Array) -> None:
    chex.assert_rank([x, y], 1)
    chex.assert_equal_shape([x, y])


def unit(vector: jax.Array) -> jax.Array:
    """Scale a vector [d] of any scale to length 1; a zero vector stays zero, and so does its gradient."""
    # A direction does not depend on scale, so dividing by the (constant) largest entry first changes neither value
    # nor gradient, and keeps the squares of very large and very small entries in range.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(vector), initial=0.0))
    nonzero = scale >= jnp.finfo(scale.dtype).tiny
    scaled = jnp.where(nonzero, vector, 1.0) / jnp.where(nonzero, scale, 1.0)
    return jnp.where(nonzero, scaled / jnp.sqrt(jnp.sum(scaled**2)), 0.0)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cosine of the angle between two vectors, the paper's default xi (section 3.2).

    Args:
      x: [d] float, one vector, any scale.
      y: [d] float, the other vector.

    Returns:
      Scalar in [-1, 1] up to rounding; exact, without an epsilon in the denominator; 0 if either vector is zero.

    Raises:
      AssertionError: if x and y are not vectors of one shape.

    Gradient: 0 with respect to both vectors if either is zero (a padding row is a zero vector).
    """
    _check_pair(x, y)
    return jnp.sum(unit(x) * unit(y))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the inner product of two vectors (xi = "dot", section 3.2).

    Args:
      x: [d] float, one vector.
      y: [d] float, the other vector.

    Returns:
      Scalar, unbounded; 0 if either vector is zero (padding).

    Raises:
      AssertionError: if x and y are not vectors of one shape.
    """
    _check_pair(x, y)
    return jnp.sum(x * y)


def euclidean(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the Euclidean distance between two vectors (xi = "euclidean", section 3.2).

    Args:
      x: [d] float, one vector.
      y: [d] float, the other vector.

    Returns:
      Scalar >= 0. A zero (padding) vector is treated like any other: the caller masks it.

    Raises:
      AssertionError: if x and y are not vectors of one shape.

    Gradient: 0 where x equals y, where the distance has no derivative.
    """
    _check_pair(x, y)
    squared = jnp.sum((x - y) ** 2)
    apart = squared > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)


def manhattan(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the sum of absolute differences of two vectors (xi = "manhattan", section 3.2).

    Args:
      x: [d] float, one vector.
      y: [d] float, the other vector.

    Returns:
      Scalar >= 0. A zero (padding) vector is treated like any other: the caller masks it.

    Raises:
      AssertionError: if x and y are not vectors of one shape.

    Gradient: 0 in the coordinates where x equals y.
    """
    _check_pair(x, y)
    difference = x - y
    # The where is for the gradient: that of jnp.abs at 0 is 1.
    return jnp.sum(jnp.where(difference == 0, 0.0, jnp.abs(difference)))


SCORE_FNS = {"cosine": cosine, "dot": dot, "euclidean": euclidean, "manhattan": manhattan}
_FACTORED = {"cosine": (unit, dot)}
DISTANCES = ("euclidean", "manhattan")  # those that are smallest for the most alike


def factored(name: str) -> tuple[Callable, Callable]:
    """Split a score into what is done to each vector alone and what is done to a pair of the results.

    Vectors that many pairs share are so prepared once: score(x, y) == of_pair(of_one(x), of_one(y)), to the bit.

    Args:
      name: of SCORE_FNS.

    Returns:
      (of_one, of_pair): functions of one vector [d] to a vector [d], and of two of these to a scalar.
    """
    return _FACTORED.get(name, (lambda vector: vector, SCORE_FNS[name]))
