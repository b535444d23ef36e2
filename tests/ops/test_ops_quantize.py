"""Vector quantization: codes, straight-through, VQ losses and upkeep, k-means."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdsr_jax.ops import quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = hypothesis.settings(max_examples=20)
CODEBOOK = jnp.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
LOSSES = (quantize.codebook_loss, quantize.commitment_loss)


def distortion(points, codebook):
    return float(jnp.mean(jax.vmap(quantize.codebook_loss, (0, None))(points, codebook)))


def clusters(seed, spread=0.05, size=60):
    """Points around the corners of a square of side 10, shuffled."""
    rng = np.random.default_rng(seed)
    corners = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0]])
    points = np.repeat(corners, size, axis=0) + spread * rng.normal(size=(4 * size, 2))
    return jnp.asarray(rng.permutation(points), jnp.float32), corners


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "code"),
    [
        ([0.9, 0.0], 0),
        ([1.1, 0.0], 1),
        ([0.0, 3.0], 2),
        ([1.0, 0.0], 0),  # halfway between 0 and 1: the lowest index
        ([1.0, 2.0], 0),  # |(1, 2)|^2 = |(-1, 2)|^2 = |(1, -2)|^2 = 5: all three tie
    ],
)
def test_nearest_code_by_hand(vector, code):
    for nearest_code in (quantize.nearest_code, jax.jit(quantize.nearest_code)):
        found = nearest_code(jnp.array(vector), CODEBOOK)
        assert found == code
        assert found.dtype == jnp.int32 and found.shape == ()


def test_nearest_code_of_equal_codewords_is_the_first():
    assert quantize.nearest_code(jnp.ones(2), jnp.array([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]])) == 1


@pytest.mark.parametrize("num_points", (1, 7, quantize._CHUNK, 2 * quantize._CHUNK + 3))
def test_nearest_codes_equal_nearest_code_in_every_chunk(num_points):
    rng = np.random.default_rng(0)
    # Far from the origin, where |c|^2 - 2 p.c would cancel without centring.
    points = jnp.asarray(1000.0 + rng.normal(size=(num_points, 3)), jnp.float32)
    codebook = jnp.asarray(1000.0 + rng.normal(size=(10, 3)), jnp.float32)
    codes = jax.jit(quantize.nearest_codes)(points, codebook)
    assert codes.shape == (num_points,) and codes.dtype == jnp.int32
    expected = jax.vmap(quantize.nearest_code, (0, None))(points, codebook)
    different = np.flatnonzero(codes != expected)
    # Only ties up to rounding may differ: coordinates of 1,000 are known to 6e-5.
    squared = np.sum((np.asarray(points)[:, None] - np.asarray(codebook)[None]) ** 2, axis=2)
    gaps = np.abs(squared[different, codes[different]] - squared[different, expected[different]])
    assert (gaps < 1e-3).all() and len(different) < 1e-3 * num_points + 1


def test_nearest_codes_break_exact_ties_by_the_lowest_index():
    np.testing.assert_array_equal(
        quantize.nearest_codes(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0], [2.0, 0.0]])), [0]
    )


# --- straight-through and the losses ---------------------------------------------------------------------------------


def test_straight_through_value_is_exactly_the_codeword():
    codebook = jnp.array([[0.1, 1e-7], [1e4, 1e4]])
    value = quantize.straight_through(jnp.array([0.3, 123.456]), codebook)
    np.testing.assert_array_equal(value, codebook[0])


def test_straight_through_gradient_is_identity_and_zero():
    vector = jnp.array([0.3, 0.2])
    to_vector, to_codebook = jax.jacrev(quantize.straight_through, argnums=(0, 1))(vector, CODEBOOK)
    np.testing.assert_array_equal(to_vector, np.eye(2))
    np.testing.assert_array_equal(to_codebook, np.zeros((2, 3, 2)))


def test_gradient_through_straight_through_is_that_at_the_codeword():
    # d sum(q^2)/dv = 2 q with q the codeword (2, 0), not 2 v.
    gradient = jax.grad(lambda v: jnp.sum(quantize.straight_through(v, CODEBOOK) ** 2))(jnp.array([1.5, 0.5]))
    np.testing.assert_array_equal(gradient, [4.0, 0.0])


def test_straight_through_under_jit_and_vmap():
    vectors = jnp.array([[0.3, 0.2], [1.5, 0.5], [0.0, 9.0]])
    np.testing.assert_array_equal(jax.jit(jax.vmap(quantize.straight_through, (0, None)))(vectors, CODEBOOK), CODEBOOK)


def test_vq_losses_by_hand():
    # The nearest codeword of (1.5, 0.5) is (2, 0): |(-.5, .5)|^2 = .5. Codeword gradient 2 (c - v) = (1, -1).
    vector = jnp.array([1.5, 0.5])
    value, (to_vector, to_codebook) = jax.value_and_grad(quantize.codebook_loss, argnums=(0, 1))(vector, CODEBOOK)
    assert value == 0.5
    np.testing.assert_array_equal(to_vector, [0.0, 0.0])
    np.testing.assert_array_equal(to_codebook, [[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
    value, (to_vector, to_codebook) = jax.value_and_grad(quantize.commitment_loss, argnums=(0, 1))(vector, CODEBOOK)
    assert value == 0.5
    np.testing.assert_array_equal(to_vector, [-1.0, 1.0])
    np.testing.assert_array_equal(to_codebook, np.zeros((3, 2)))


def test_vq_loss_gradients_match_finite_differences():
    vector = jnp.array([1.5, 0.5])
    check_grads(
        lambda v: quantize.commitment_loss(v, CODEBOOK), (vector,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )
    check_grads(lambda c: quantize.codebook_loss(vector, c), (CODEBOOK,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@SETTINGS
@hypothesis.given(st.integers(0, 2**20))
def test_a_vector_is_no_nearer_to_any_other_codeword(seed):
    rng = np.random.default_rng(seed)
    vector, codebook = rng.normal(size=3).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    squared = np.sum((codebook - vector) ** 2, axis=1)
    for loss in LOSSES:
        np.testing.assert_allclose(loss(vector, codebook), squared.min(), rtol=1e-5)
    code = int(quantize.nearest_code(vector, codebook))
    assert code == squared.argmin()
    assert quantize.nearest_code(codebook[code], codebook) == code
    np.testing.assert_array_equal(quantize.straight_through(vector, codebook), codebook[code])


# --- upkeep of a codebook --------------------------------------------------------------------------------------------


def test_ema_update_by_hand():
    # Codewords 0 and 10, decay 3/4. Points 2, 4 go to the first: count .75*1 + .25*2 = 1.25, sum .75*0 + .25*6 = 1.5,
    # codeword 1.2. No point goes to the second: count .75, sum 7.5, codeword still 10.
    state = quantize.ema_start(jnp.array([[0.0], [10.0]]))
    state = jax.jit(quantize.ema_update)(state, jnp.array([[2.0], [4.0]]), decay=0.75)
    np.testing.assert_allclose(state.counts, [1.25, 0.75])
    np.testing.assert_allclose(state.sums, [[1.5], [7.5]])
    np.testing.assert_allclose(state.codebook, [[1.2], [10.0]], rtol=1e-6)


def test_ema_without_memory_is_a_lloyd_step_and_unused_codewords_stay_for_ever():
    state = quantize.ema_start(jnp.array([[0.0], [10.0]]))
    for _ in range(3):
        state = quantize.ema_update(state, jnp.array([[2.0], [4.0]]), decay=0.0)
    np.testing.assert_array_equal(state.codebook, [[3.0], [10.0]])
    for _ in range(200):
        state = quantize.ema_update(state, jnp.array([[2.0], [4.0]]), decay=0.5)
    np.testing.assert_array_equal(state.codebook, [[3.0], [10.0]])


def test_ema_update_has_no_gradient():
    def total(points):
        return sum(jnp.sum(part) for part in quantize.ema_update(quantize.ema_start(CODEBOOK), points, decay=0.5))

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones((4, 2))), np.zeros((4, 2)))


def test_dead_codewords_move_to_different_points_and_start_anew():
    codebook, points = jnp.arange(8.0).reshape(4, 2), 100.0 + jnp.arange(10.0).reshape(5, 2)
    counts = jnp.array([5.0, 0.2, 1.0, 0.0])
    revived, dead = jax.jit(quantize.revive_dead)(jax.random.key(0), codebook, counts, points, min_count=1.0)
    np.testing.assert_array_equal(dead, [False, True, False, True])
    np.testing.assert_array_equal(revived[jnp.array([0, 2])], codebook[jnp.array([0, 2])])
    moved = {tuple(row) for row in np.asarray(revived)[[1, 3]].tolist()}
    assert len(moved) == 2 and moved <= {tuple(row) for row in points.tolist()}

    state = quantize.EmaCodebook(codebook, counts, 2.0 * codebook)
    state = quantize.ema_restart(state, revived, dead)
    np.testing.assert_array_equal(state.counts, [5.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(state.codebook, revived)
    np.testing.assert_array_equal(state.sums, jnp.where(dead[:, None], revived, 2.0 * codebook))


def test_reviving_works_with_fewer_points_than_codewords():
    revived, dead = quantize.revive_dead(jax.random.key(0), CODEBOOK, jnp.zeros(3), jnp.ones((1, 2)), min_count=1.0)
    assert dead.all()
    np.testing.assert_array_equal(revived, np.ones((3, 2)))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 3, 3, 3], 4.0),
        ([0, 7, 0], 1.0),
        ([0, 0, 0], 0.0),
        # Shares 1/2, 1/4, 1/4: entropy log 2 (1/2 + 1/2 + 1/2) = 1.5 log 2, so 2 sqrt 2.
        ([4, 2, 0, 2], 2.0 * math.sqrt(2.0)),
    ],
)
def test_perplexity_by_hand(counts, expected):
    for perplexity in (quantize.perplexity, jax.jit(quantize.perplexity)):
        np.testing.assert_allclose(perplexity(jnp.array(counts)), expected, rtol=1e-5)
        np.testing.assert_allclose(perplexity(jnp.array(counts, jnp.float32) / 10), expected, rtol=1e-5)


@SETTINGS
@hypothesis.given(st.lists(st.integers(0, 1000), min_size=6, max_size=6).filter(any))
def test_perplexity_lies_between_one_and_the_codes_in_use(counts):
    value = float(quantize.perplexity(jnp.array(counts)))
    assert 1.0 - 1e-5 <= value <= np.count_nonzero(counts) * (1 + 1e-5)


# --- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separated_clusters(seed):
    points, corners = clusters(seed)
    codebook = quantize.kmeans(jax.random.key(seed), points, 4, 5)
    order = np.lexsort(np.round(np.asarray(codebook)).T[::-1])
    # Means of 60 points with deviation .05: 6 standard errors are .04.
    np.testing.assert_allclose(np.asarray(codebook)[order], corners, atol=0.04)


def test_seeds_are_points_and_spread_out():
    points, _ = clusters(0)
    seeds = np.asarray(quantize.kmeans(jax.random.key(0), points, 4, 0))
    rows = {tuple(row) for row in np.asarray(points).tolist()}
    assert {tuple(row) for row in seeds.tolist()} <= rows
    # Uniform seeding puts two of four seeds into one cluster 9 times in 10; k-means++ practically never does here.
    for key in range(10):
        seeds = np.asarray(quantize.kmeans(jax.random.key(key), points, 4, 0))
        assert len({tuple(row) for row in np.round(seeds).tolist()}) == 4


def test_every_step_lowers_the_distortion_until_it_stays():
    points = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3)), jnp.float32)
    path = [distortion(points, quantize.kmeans(jax.random.key(0), points, 12, steps)) for steps in range(0, 40, 3)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(path))
    assert path[-1] < 0.9 * path[0]
    assert path[-1] < 0.4 * float(points.var(axis=0).sum())


def test_one_step_is_the_mean_of_each_cluster():
    points = jnp.asarray(np.random.default_rng(1).normal(size=(200, 2)), jnp.float32)
    seeds = quantize.kmeans(jax.random.key(0), points, 5, 0)
    codes = np.asarray(quantize.nearest_codes(points, seeds))
    means = np.stack([np.asarray(points)[codes == code].mean(axis=0) for code in range(5)])
    np.testing.assert_allclose(quantize.kmeans(jax.random.key(0), points, 5, 1), means, rtol=1e-4, atol=1e-5)


def test_kmeans_is_a_function_of_its_key():
    points = jnp.asarray(np.random.default_rng(2).normal(size=(300, 2)), jnp.float32)
    first = quantize.kmeans(jax.random.key(0), points, 8, 3)
    np.testing.assert_array_equal(first, quantize.kmeans(jax.random.key(0), points, 8, 3))
    assert (first != quantize.kmeans(jax.random.key(1), points, 8, 3)).any()


def test_fewer_distinct_points_than_codes_give_a_finite_and_exact_codebook():
    points = jnp.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    codebook = quantize.kmeans(jax.random.key(0), points, 4, 3)
    assert {tuple(row) for row in codebook.tolist()} == {(1.0, 2.0), (3.0, 4.0)}
    assert distortion(points, codebook) == 0.0
    lone = quantize.kmeans(jax.random.key(0), points[:1], 3, 2)
    np.testing.assert_array_equal(lone, np.tile([1.0, 2.0], (3, 1)))


def test_seeding_from_a_sample_still_uses_every_point_in_its_steps():
    # 1,000 points more than seeding looks at; the mean of one cluster is the mean of all points.
    points = jnp.asarray(np.random.default_rng(3).random((quantize._SEEDING_POINTS + 1000, 2)), jnp.float32)
    codebook = quantize.kmeans(jax.random.key(0), points, 1, 1)
    np.testing.assert_allclose(codebook[0], np.asarray(points, np.float64).mean(axis=0), rtol=1e-5)
