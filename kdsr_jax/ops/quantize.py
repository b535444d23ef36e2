"""Vector quantization of correlation vectors: codes, VQ losses and upkeep, k-means (paper, section 3.2, second step).

Codes count from 0 here; the paper counts them from 1. D is the size of a vector, x the number of codewords.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_CHUNK = 8192
_SEEDING_POINTS = 20_000


def nearest_code(vector: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return the index of the codeword nearest to one vector in Euclidean distance (c_ij, section 3.2).

    Args:
      vector: [D] float.
      codebook: [x, D] float.

    Returns:
      Scalar int32 in 0..x-1; of equally near codewords the lowest index.

    Gradient: none; an index has no derivative. See ``straight_through``.
    """
    chex.assert_rank([vector, codebook], [1, 2])
    return jnp.argmin(jnp.sum((codebook - vector[None]) ** 2, axis=1)).astype(jnp.int32)


def _first_smallest(values: jax.Array) -> jax.Array:
    """``jnp.argmin`` of a vector as two plain reductions, which XLA vectorises on CPU: more than twice as fast."""
    last = values.shape[0] - 1
    return jnp.min(jnp.where(values == jnp.min(values), jnp.arange(last + 1, dtype=jnp.int32), last))


def nearest_codes(points: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return ``nearest_code`` of every point, by matrix products in chunks of bounded memory, for millions of points.

    Uses |c|^2 - 2 p.c, which orders codewords as the distance does, so two codewords that are equally near up to
    rounding may come out in either order.

    Args:
      points: [n, D] float.
      codebook: [x, D] float.

    Returns:
      [n] int32 in 0..x-1.

    Gradient: none.
    """
    chex.assert_rank([points, codebook], 2)
    # Distances do not change when both sides move; near the origin the two terms cancel least.
    centre = jnp.mean(codebook, axis=0)
    norms = jnp.sum((codebook - centre[None]) ** 2, axis=1)
    doubled = -2.0 * (codebook - centre[None]).T

    def code(point):
        # The highest precision: accelerators would round the product's inputs to fewer bits.
        return _first_smallest(norms + jnp.matmul(point - centre, doubled, precision=jax.lax.Precision.HIGHEST))

    return jax.lax.map(code, points, batch_size=_CHUNK)


def straight_through(vector: jax.Array, codebook: jax.Array) -> jax.Array:
    """Replace a vector by its nearest codeword, but pass gradients as if it were still there (van den Oord 2017).

    Args:
      vector: [D] float.
      codebook: [x, D] float.

    Returns:
      [D] float, exactly the nearest codeword.

    Gradient: the identity to vector, exactly zero to codebook (``codebook_loss`` or an EMA moves that).
    """
    codeword = jax.lax.stop_gradient(codebook[nearest_code(vector, codebook)])
    # In this order the value is the codeword to the last bit; vector + (codeword - vector) would round.
    return codeword + (vector - jax.lax.stop_gradient(vector))


def codebook_loss(vector: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return the squared distance of a constant vector to its codeword, which pulls the codeword to the vector.

    Args:
      vector: [D] float.
      codebook: [x, D] float.

    Returns:
      Scalar >= 0; its mean over points is the distortion of the codebook.

    Gradient: to the nearest codeword only; vector is a constant.
    """
    vector = jax.lax.stop_gradient(vector)
    return jnp.sum((codebook[nearest_code(vector, codebook)] - vector) ** 2)


def commitment_loss(vector: jax.Array, codebook: jax.Array) -> jax.Array:
    """Return the squared distance of a vector to its constant codeword, which keeps the vector near it.

    Args:
      vector: [D] float.
      codebook: [x, D] float.

    Returns:
      Scalar >= 0, the value of ``codebook_loss``.

    Gradient: to vector only; codebook is a constant.
    """
    codebook = jax.lax.stop_gradient(codebook)
    return jnp.sum((vector - codebook[nearest_code(vector, codebook)]) ** 2)


class EmaCodebook(NamedTuple):
    """A codebook kept as exponential moving averages of the points assigned to it.

    Attributes:
      codebook: [x, D] float, the codewords.
      counts: [x] float >= 0, moving average of the points per codeword and step.
      sums: [x, D] float, moving average of the sum of those points.
    """

    codebook: jax.Array
    counts: jax.Array
    sums: jax.Array


def ema_start(codebook: jax.Array) -> EmaCodebook:
    """Start moving averages at a codebook, [x, D] float, as if each codeword had been given itself once."""
    chex.assert_rank(codebook, 2)
    return EmaCodebook(codebook, jnp.ones(codebook.shape[0], codebook.dtype), codebook)


def ema_update(state: EmaCodebook, points: jax.Array, *, decay: float) -> EmaCodebook:
    """Move each codeword towards the mean of the points nearest to it (van den Oord 2017, appendix A.1).

    Args:
      state: the averages so far.
      points: [n, D] float, the points of this step.
      decay: in [0, 1), the weight of the past; 0 makes this a step of Lloyd's algorithm.

    Returns:
      The averages after this step; a codeword whose count has faded to nothing stays where it is.

    Gradient: none; points and state are constants.
    """
    state, points = jax.lax.stop_gradient((state, points))
    codes = nearest_codes(points, state.codebook)
    new_counts, new_sums = _cluster_totals(points, codes, state.counts.shape[0])
    counts = decay * state.counts + (1.0 - decay) * new_counts
    sums = decay * state.sums + (1.0 - decay) * new_sums
    return EmaCodebook(_means(counts, sums, state.codebook), counts, sums)


def revive_dead(
    key: jax.Array, codebook: jax.Array, counts: jax.Array, points: jax.Array, *, min_count: float
) -> tuple[jax.Array, jax.Array]:
    """Move codewords that are hardly used to points drawn at random, different points as far as they go.

    Args:
      key: a PRNG key.
      codebook: [x, D] float.
      counts: [x] float or int, how much each codeword was used, such as ``EmaCodebook.counts``.
      points: [n, D] float, n >= 1, where dead codewords may go.
      min_count: a codeword with a smaller count is dead.

    Returns:
      codebook: [x, D] float, dead codewords replaced.
      dead: [x] bool, which ones; with an EMA pass both to ``ema_restart``.
    """
    chex.assert_rank([codebook, counts, points], [2, 1, 2])
    order = jax.random.permutation(key, points.shape[0])
    chosen = points[order[jnp.arange(codebook.shape[0]) % points.shape[0]]]
    dead = counts < min_count
    return jnp.where(dead[:, None], chosen, codebook), dead


def ema_restart(state: EmaCodebook, codebook: jax.Array, dead: jax.Array) -> EmaCodebook:
    """Start the averages of revived codewords anew, so that their past does not pull them back.

    Args:
      state: the averages before ``revive_dead``.
      codebook: [x, D] float, the codebook that it returned.
      dead: [x] bool, the codewords that it replaced.

    Returns:
      The averages with those of dead codewords as ``ema_start`` makes them, the others unchanged.
    """
    fresh = ema_start(codebook)
    counts = jnp.where(dead, fresh.counts, state.counts)
    return EmaCodebook(codebook, counts, jnp.where(dead[:, None], fresh.sums, state.sums))


def perplexity(counts: jax.Array) -> jax.Array:
    """Return the effective number of codes in use, exp of the entropy of their shares.

    Args:
      counts: [x] float or int >= 0, uses of each code, such as ``jnp.bincount(codes, length=x)``.

    Returns:
      Scalar float in [1, x]: x if all are used alike, 1 if one is used; 0 if none is.
    """
    chex.assert_rank(counts, 1)
    total = jnp.sum(counts)
    shares = counts / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    used = shares > 0
    entropy = -jnp.sum(jnp.where(used, shares * jnp.log(jnp.where(used, shares, 1.0)), 0.0))
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


def _cluster_totals(points: jax.Array, codes: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones(points.shape[0], points.dtype)
    return jax.ops.segment_sum(ones, codes, num_codes), jax.ops.segment_sum(points, codes, num_codes)


def _means(counts: jax.Array, sums: jax.Array, fallback: jax.Array) -> jax.Array:
    """Divide sums by counts; keep the fallback where there is (next to) nothing to average."""
    enough = counts[:, None] > 1e-6
    return jnp.where(enough, sums / jnp.where(enough, counts[:, None], 1.0), fallback)


def _plus_plus(key: jax.Array, points: jax.Array, num_codes: int) -> jax.Array:
    """Seed a codebook with points, each drawn in proportion to its squared distance to those drawn before."""
    first_key, key = jax.random.split(key)
    first = points[jax.random.randint(first_key, (), 0, points.shape[0])]

    def add(code, carry):
        codebook, squared = carry
        drawn = points[jax.random.categorical(jax.random.fold_in(key, code), jnp.log(squared))]
        return codebook.at[code].set(drawn), jnp.minimum(squared, jnp.sum((points - drawn[None]) ** 2, axis=1))

    codebook = jnp.zeros((num_codes, points.shape[1]), points.dtype).at[0].set(first)
    return jax.lax.fori_loop(1, num_codes, add, (codebook, jnp.sum((points - first[None]) ** 2, axis=1)))[0]


@functools.partial(jax.jit, static_argnames="num_codes")
def kmeans(key: jax.Array, points: jax.Array, num_codes: int, iterations: int) -> jax.Array:
    """Fit a codebook by k-means++ seeding and Lloyd's algorithm (quantizer "kmeans"; the paper's section 4.2 variant).

    Seeding looks at 20,000 random points at most; Lloyd's steps use all. A step never raises the distortion but for
    rounding. A codeword without points stays where it is; with fewer distinct points than codes, codewords coincide.

    Args:
      key: a PRNG key; equal keys give equal codebooks.
      points: [n, D] float, n >= 1, no padding.
      num_codes: x >= 1; static.
      iterations: number of Lloyd's steps >= 0; 0 returns the seeds.

    Returns:
      [x, D] float, the codebook.

    Gradient: none is meant to be taken.
    """
    chex.assert_rank(points, 2)
    sample_key, seed_key = jax.random.split(key)
    seeds = points
    if points.shape[0] > _SEEDING_POINTS:
        seeds = points[jax.random.randint(sample_key, (_SEEDING_POINTS,), 0, points.shape[0])]

    def step(_, codebook):
        return _means(*_cluster_totals(points, nearest_codes(points, codebook), num_codes), codebook)

    return jax.lax.fori_loop(0, iterations, step, _plus_plus(seed_key, seeds, num_codes))
