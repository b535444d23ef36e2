"""Scoring functions: hand-worked values, zero vectors, gradients, invariances."""

import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdsr_jax.ops import scoring

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = hypothesis.settings(max_examples=30)
NAMES = ("cosine", "dot", "euclidean", "manhattan")


def pair(seed, size=6):
    return np.random.default_rng(seed).normal(size=(2, size)).astype(np.float32)


def test_table_of_functions_has_the_four_names():
    assert tuple(scoring.SCORE_FNS)[: len(NAMES)] == NAMES
    assert all(fn is getattr(scoring, name) for name, fn in scoring.SCORE_FNS.items())


# x = (3, 4), y = (4, 3): x.y = 24, |x| = |y| = 5, so the cosine is 24/25; x - y = (-1, 1).
@pytest.mark.parametrize(
    ("name", "expected"), [("cosine", 0.96), ("dot", 24.0), ("euclidean", math.sqrt(2.0)), ("manhattan", 2.0)]
)
def test_hand_worked_values(name, expected):
    score = scoring.SCORE_FNS[name](jnp.array([3.0, 4.0]), jnp.array([4.0, 3.0]))
    chex.assert_shape(score, ())
    np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_to_a_vector_alone_can_be_done_first(name):
    of_one, of_pair = scoring.factored(name)
    for x, y in (pair(3), np.zeros((2, 6), np.float32)):
        np.testing.assert_array_equal(of_pair(of_one(x), of_one(y)), scoring.SCORE_FNS[name](x, y))


def test_cosine_gradient_by_hand():
    # d cos / dx = (y/|y| - cos x/|x|) / |x| = ((.8, .6) - .96 (.6, .8)) / 5 = (.224, -.168) / 5.
    gradient = jax.grad(scoring.cosine)(jnp.array([3.0, 4.0]), jnp.array([4.0, 3.0]))
    np.testing.assert_allclose(gradient, [0.0448, -0.0336], rtol=1e-5)


@pytest.mark.parametrize("x", ([0.0, 0.0], [1.0, 2.0]))
def test_cosine_with_a_zero_vector_has_value_and_gradients_zero(x):
    for args in ((jnp.array(x), jnp.zeros(2)), (jnp.zeros(2), jnp.array(x))):
        value, gradients = jax.value_and_grad(scoring.cosine, argnums=(0, 1))(*args)
        assert value == 0.0
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, np.zeros(2))


def test_second_derivative_of_cosine_is_finite_at_zero():
    assert np.isfinite(jax.hessian(scoring.cosine)(jnp.zeros(3), jnp.ones(3))).all()


@pytest.mark.parametrize("scale", (1e-30, 1e-12, 1e12, 1e30))
def test_cosine_is_exact_for_tiny_and_huge_vectors(scale):
    x, y = pair(0)
    np.testing.assert_allclose(scoring.cosine(x * np.float32(scale), y), scoring.cosine(x, y), rtol=1e-5)
    gradient = jax.grad(scoring.cosine)(x * np.float32(scale), y)
    np.testing.assert_allclose(gradient * scale, jax.grad(scoring.cosine)(x, y), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ("euclidean", "manhattan"))
def test_distance_gradient_is_zero_at_equal_vectors(name):
    x = jnp.array([1.0, -2.0, 0.0])
    value, gradients = jax.value_and_grad(scoring.SCORE_FNS[name], argnums=(0, 1))(x, x)
    assert value == 0.0
    np.testing.assert_array_equal(gradients, np.zeros((2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name):
    check_grads(scoring.SCORE_FNS[name], tuple(pair(3)), order=1, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_jit_and_vmap_agree_with_eager(name):
    fn = scoring.SCORE_FNS[name]
    x, y = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    x[2] = 0.0
    eager = np.stack([fn(a, b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(fn))(x, y), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_shapes_and_batches_are_refused(name):
    with pytest.raises(AssertionError):
        scoring.SCORE_FNS[name](jnp.ones(3), jnp.ones(1))
    with pytest.raises(AssertionError):
        scoring.SCORE_FNS[name](jnp.ones((2, 3)), jnp.ones((2, 3)))


@SETTINGS
@hypothesis.given(st.integers(0, 2**20), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scores_are_symmetric_and_scale_as_they_should(seed, a, b):
    x, y = pair(seed)
    scores = {name: float(fn(x, y)) for name, fn in scoring.SCORE_FNS.items()}
    for name, fn in scoring.SCORE_FNS.items():
        np.testing.assert_allclose(fn(y, x), scores[name], rtol=1e-5, atol=1e-6)
    a, b = np.float32(a), np.float32(b)
    assert abs(scores["cosine"]) <= 1.0 + 1e-6
    np.testing.assert_allclose(scoring.cosine(a * x, b * y), scores["cosine"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scoring.dot(a * x, b * y), a * b * scores["dot"], rtol=1e-3, atol=1e-5 * a * b)
    for name in ("euclidean", "manhattan"):
        np.testing.assert_allclose(scoring.SCORE_FNS[name](a * x, a * y), a * scores[name], rtol=1e-4)
    assert scores["euclidean"] <= scores["manhattan"] * (1 + 1e-6)
