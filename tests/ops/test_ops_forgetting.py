"""Cosines of item pairs and Pearson's correlation, by hand, against numpy and at the edges."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax.ops.forgetting import pair_cosines, pearson

pytestmark = pytest.mark.usefixtures("quick_compilation")

TABLE = jnp.array([[0.0, 0.0], [3.0, 4.0], [-4.0, 3.0], [6.0, 8.0], [1.0, 0.0]])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_cosines_by_hand(wrap):
    cosines, valid = wrap(pair_cosines)(TABLE, jnp.array([1, 1, 1, 2, 0]), jnp.array([2, 3, 4, 4, 1]))
    np.testing.assert_allclose(cosines, [0.0, 1.0, 0.6, -0.8, 0.0], atol=1e-6)
    assert valid.tolist() == [True, True, True, True, False]


def test_cosines_of_more_pairs_than_are_taken_at_once():
    rng = np.random.default_rng(0)
    table, first, second = rng.normal(size=(50, 8)), rng.integers(0, 50, 9000), rng.integers(0, 50, 9000)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines, valid = jax.jit(pair_cosines)(jnp.asarray(table, jnp.float32), jnp.asarray(first), jnp.asarray(second))
    np.testing.assert_allclose(cosines, (unit[first] * unit[second]).sum(1), atol=1e-6)
    assert valid.all()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 1.0),
        ([1.0, 2.0, 3.0], [0.3, 0.2, 0.1], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),  # deviations -1.5 -.5 .5 1.5 and -1.5 .5 -.5 1.5: 4 / 5
        ([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], 0.0),
    ],
)
def test_pearson_by_hand(wrap, x, y, expected):
    assert wrap(pearson)(jnp.array(x), jnp.array(y), jnp.ones(len(x), bool)) == pytest.approx(expected, abs=1e-6)


def test_masked_places_do_not_count_whatever_they_hold():
    x, y = jnp.array([1.0, jnp.nan, 2.0, 3.0, 9.0]), jnp.array([1.0, 5.0, 3.0, 2.0, jnp.inf])
    mask = jnp.array([True, False, True, True, False])
    assert pearson(x, y, mask) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
def test_a_constant_has_no_correlation(value):
    constant, varied, mask = jnp.full(7, value), jnp.arange(7.0), jnp.ones(7, bool)
    assert pearson(constant, constant, mask) == 0
    assert pearson(constant, varied, mask) == 0


@pytest.mark.parametrize("counted", [0, 1])
def test_fewer_than_two_places_have_no_correlation(counted):
    assert pearson(jnp.arange(4.0), jnp.arange(4.0), jnp.arange(4) < counted) == 0


@hypothesis.given(
    values=hypothesis.extra.numpy.arrays(np.float32, (2, 12), elements=st.floats(-100, 100, width=16)),
    mask=hypothesis.extra.numpy.arrays(bool, 12),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_pearson_agrees_with_numpy_and_knows_no_scale(values, mask, scale):
    got = float(pearson(jnp.asarray(values[0]) * scale, jnp.asarray(values[1]), jnp.asarray(mask)))
    kept = values[:, mask].astype(np.float64)
    if mask.sum() < 2 or min(np.ptp(kept, axis=1)) < 1e-2:
        assert np.isfinite(got) and abs(got) <= 1 + 1e-5
    else:
        assert got == pytest.approx(np.corrcoef(kept)[0, 1], abs=1e-3)
