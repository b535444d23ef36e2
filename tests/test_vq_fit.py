"""Fitting codebooks: moving averages on fixed vectors, and the joint loss with its straight-through gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax.ops import quantize
from kdsr_jax.ops.correlation import split_scores
from kdsr_jax.ops.scoring import cosine
from kdsr_jax.vq_fit import fit_ema, joint_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

ITEMS, DIM, WIDTH, SPLITS, CODES, HIDDEN, PAIRS = 20, 10, 6, 3, 5, 7, 16


def distortion(vectors, codebook):
    return ((np.asarray(vectors)[:, None] - np.asarray(codebook)[None]) ** 2).sum(-1).min(1).mean()


@pytest.fixture(scope="module")
def points():
    """Six places, half of all vectors at the first: codes that start there together are dead but for one."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(6, 4))
    return jnp.asarray(places[rng.choice(6, size=703, p=[0.5] + [0.1] * 5)], jnp.float32)


@pytest.fixture(scope="module")
def fitted(points):
    return fit_ema(jax.random.key(0), points, 12)


def test_moving_averages_find_what_a_random_start_misses(points, fitted):
    rng = np.random.default_rng(1)
    starts = [distortion(points, points[rng.choice(703, 12, replace=False)]) for _ in range(50)]
    ends = [distortion(points, codebook) for codebook in (fitted, fit_ema(jax.random.key(1), points, 12))]
    assert max(ends) < 0.1 * np.mean(starts)


def test_moving_averages_follow_the_key(points, fitted):
    np.testing.assert_array_equal(fit_ema(jax.random.key(0), points, 12), fitted)
    assert np.any(fit_ema(jax.random.key(1), points, 12) != fitted)


# --- the joint loss --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.normal(size=(PAIRS, DIM)), jnp.float32) for _ in range(2))
    return x, y, jnp.asarray(rng.uniform(-1, 1, size=PAIRS), jnp.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    sizes = {"encoder": (DIM, WIDTH), "decoder": (WIDTH, DIM), "codebook": (CODES, SPLITS), "hidden": (SPLITS, HIDDEN)}
    sizes |= {"hidden_bias": (HIDDEN,), "out": (HIDDEN,), "out_bias": ()}
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}


def vectors_of(encoder, x, y):
    score = jax.vmap(functools.partial(split_scores, num_splits=SPLITS, score_fn=cosine))
    return score(x @ encoder, y @ encoder)


def predict(params, quantized):
    hidden = jax.nn.relu(quantized @ params["hidden"] + params["hidden_bias"][None])
    return hidden @ params["out"] + params["out_bias"]


def encoder_gradient(params, pairs, through=quantize.straight_through):
    def loss(encoder):
        return joint_loss(params | {"encoder": encoder}, *pairs, "cosine", SPLITS, through)[0]

    return np.asarray(jax.jit(jax.grad(loss))(params["encoder"]))


def test_the_loss_is_the_sum_of_its_parts(params, pairs):
    x, y, target = map(np.asarray, pairs)
    run = jax.jit(joint_loss, static_argnums=(4, 5))
    loss, vectors = run(params, *pairs, "cosine", SPLITS)
    np.testing.assert_allclose(vectors, vectors_of(params["encoder"], *pairs[:2]), rtol=1e-5)
    back = np.asarray(params["encoder"]) @ np.asarray(params["decoder"])
    lost = (((x - x @ back) ** 2).mean() + ((y - y @ back) ** 2).mean()) / ((x**2).mean() + (y**2).mean())
    gap = np.asarray(vectors)[:, None] - np.asarray(params["codebook"])[None]
    codes = (gap**2).sum(-1).argmin(1)
    to_code = distortion(vectors, params["codebook"])
    error = ((np.asarray(predict(params, params["codebook"][codes])) - target) ** 2).mean()
    np.testing.assert_allclose(loss, lost + 1.25 * to_code + error, rtol=1e-5)


def test_the_score_decoder_reaches_the_encoder_straight_through(params, pairs):
    x, y, target = pairs
    through_decoder = encoder_gradient(params, pairs) - encoder_gradient(
        params, pairs, lambda v, c: jax.lax.stop_gradient(c[quantize.nearest_code(v, c)])
    )

    @jax.jit
    def by_hand(encoder):
        """The error's slope at the codewords, passed on as if these were the vectors themselves."""
        vectors, pull_back = jax.vjp(lambda e: vectors_of(e, x, y), encoder)
        codewords = params["codebook"][quantize.nearest_codes(vectors, params["codebook"])]
        slope = jax.grad(lambda q: jnp.mean((predict(params, q) - target) ** 2))(codewords)
        return pull_back(slope)[0]

    expected = np.asarray(by_hand(params["encoder"]))
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(through_decoder, expected, rtol=1e-3, atol=1e-5)


def test_where_codewords_are_the_vectors_the_gradient_is_that_of_no_quantization(params, pairs):
    exact = params | {"codebook": vectors_of(params["encoder"], *pairs[:2])}
    quantized = encoder_gradient(exact, pairs)
    np.testing.assert_allclose(quantized, encoder_gradient(exact, pairs, lambda v, _: v), rtol=1e-4, atol=1e-5)
    blocked = encoder_gradient(exact, pairs, lambda v, _: jax.lax.stop_gradient(v))
    assert np.abs(quantized - blocked).max() > 1e-2


def test_the_codebook_moves_by_its_own_loss_only(params, pairs):
    def gradient(**changes):
        changed = params | changes
        return jax.grad(lambda c: joint_loss(changed | {"codebook": c}, *pairs, "cosine", SPLITS)[0])(
            changed["codebook"]
        )

    np.testing.assert_array_equal(gradient(), gradient(out=7 * params["out"], decoder=-params["decoder"]))
    assert np.any(gradient())


def test_equal_and_zero_features_have_finite_gradients(params, pairs):
    x, _, target = pairs
    gradient_at = jax.jit(jax.grad(lambda p, y: joint_loss(p, x, y, target, "cosine", SPLITS)[0]))
    for y in (x, jnp.zeros_like(x)):
        gradient = gradient_at(params, y)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
