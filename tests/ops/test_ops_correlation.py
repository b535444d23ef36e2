"""Correlation vectors, distinct items, and the two ways of choosing pairs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

from kdsr_jax.ops import correlation, scoring

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = hypothesis.settings(max_examples=25)
# Rows with 5, 0, 1, 2 and 3 valid positions own 10, 0, 0, 1 and 3 of the union's 14 pairs.
VALID = np.array(
    [[1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1], [1, 0, 1, 0, 1, 0]], dtype=bool
)
DISTINCT = jax.jit(correlation.distinct_mask)
SAMPLE = jax.jit(correlation.sample_pairs, static_argnums=2)
UNION = [
    (row, i, j)
    for row in range(len(VALID))
    for i in range(VALID.shape[1])
    for j in range(i + 1, VALID.shape[1])
    if VALID[row, i] and VALID[row, j]
]


def test_split_scores_by_hand():
    # Chunks (1, 2).(3, 4) = 11 and (0, -1).(5, 6) = -6; distances |(2, 2)|_1 = 4 and |(5, 7)|_1 = 12.
    x, y = jnp.array([1.0, 2.0, 0.0, -1.0]), jnp.array([3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(correlation.split_scores(x, y, 2, scoring.dot), [11.0, -6.0])
    np.testing.assert_array_equal(correlation.split_scores(x, y, 2, scoring.manhattan), [4.0, 12.0])


def test_split_cosine_of_a_zero_chunk_is_zero_and_differentiable():
    x, y = jnp.array([0.0, 0.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(correlation.split_scores(x, y, 2, scoring.cosine), [0.0, 1.0])
    gradient = jax.grad(lambda x: correlation.split_scores(x, y, 2, scoring.cosine).sum())(x)
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_a_split_into_unequal_chunks_is_refused():
    for num_splits in (0, 3):
        with pytest.raises(ValueError, match="num_splits"):
            correlation.split_scores(jnp.ones(4), jnp.ones(4), num_splits, scoring.dot)


@SETTINGS
@hypothesis.given(st.integers(0, 2**20), st.sampled_from([1, 2, 4, 8]))
def test_splits_add_up_to_the_whole(seed, num_splits):
    x, y = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    splits = {name: correlation.split_scores(x, y, num_splits, fn) for name, fn in scoring.SCORE_FNS.items()}
    for name in ("dot", "manhattan"):
        np.testing.assert_allclose(splits[name].sum(), scoring.SCORE_FNS[name](x, y), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((splits["euclidean"] ** 2).sum(), scoring.euclidean(x, y) ** 2, rtol=1e-4)
    if num_splits == 1:
        np.testing.assert_allclose(splits["cosine"][0], scoring.cosine(x, y), rtol=1e-6)


def test_mean_of_split_cosines_is_not_the_holistic_cosine():
    # Chunks (1, 0)/(1, 0) -> 1 and (0, 9)/(9, 0) -> 0: the mean is 1/2, the whole 1/82.
    x, y = jnp.array([1.0, 0.0, 0.0, 9.0]), jnp.array([1.0, 0.0, 9.0, 0.0])
    np.testing.assert_allclose(correlation.split_scores(x, y, 2, scoring.cosine).mean(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(scoring.cosine(x, y), 1 / 82, rtol=1e-5)


@pytest.mark.parametrize("name", tuple(scoring.SCORE_FNS))
def test_split_scores_gradient_jit_and_vmap(name):
    x, y = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)

    def fn(x, y):
        return correlation.split_scores(x, y, 4, scoring.SCORE_FNS[name])

    check_grads(fn, (x[0], y[0]), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
    batched = jax.jit(jax.vmap(fn))(x, y)
    np.testing.assert_allclose(batched, np.stack([fn(a, b) for a, b in zip(x, y, strict=True)]), rtol=1e-5)


def test_distinct_mask_by_hand():
    mask = correlation.distinct_mask(jnp.array([7, 3, 7, 0, 3, 9, 0, 9]))
    np.testing.assert_array_equal(mask, [True, True, False, False, False, True, False, False])


@SETTINGS
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_distinct_mask_keeps_each_item_once(items):
    kept = np.array(items + [0] * (9 - len(items)))[np.asarray(DISTINCT(jnp.asarray(items + [0] * (9 - len(items)))))]
    assert list(kept) == [item for item in dict.fromkeys(items) if item]


def test_all_pairs_by_hand():
    i, j, mask = jax.jit(correlation.all_pairs)(jnp.array([[True, True, False], [False, True, True], [False] * 3]))
    np.testing.assert_array_equal(i, [0, 0, 1])
    np.testing.assert_array_equal(j, [1, 2, 2])
    np.testing.assert_array_equal(mask, [[True, False, False], [False, False, True], [False, False, False]])


def test_all_pairs_lists_the_union_and_works_for_one_position():
    i, j, mask = correlation.all_pairs(jnp.asarray(VALID))
    listed = [(row, int(i[pair]), int(j[pair])) for row, pair in np.argwhere(mask)]
    assert listed == UNION
    assert [part.shape for part in correlation.all_pairs(jnp.ones((4, 1), bool))] == [(0,), (0,), (4, 0)]


def test_sampled_pairs_are_uniform_over_the_union():
    draws = 70_000
    row, i, j, mask = SAMPLE(jax.random.key(0), VALID, draws)
    assert mask.all()
    counts = dict.fromkeys(UNION, 0)
    for drawn in zip(row.tolist(), i.tolist(), j.tolist(), strict=True):
        counts[drawn] += 1  # a KeyError here is a pair outside the union
    # 14 pairs, 5,000 expected of each; under uniformity p < 1e-3 for one key in a thousand. Choosing the row first
    # and a pair within it would put 70,000/3 draws on the only pair of row 3.
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_sampled_mean_is_an_unbiased_estimate_of_the_full_mean():
    valid = np.random.default_rng(0).random((40, 12)) < np.linspace(0.05, 0.95, 40)[:, None]
    values = np.random.default_rng(1).normal(size=(40, 12, 12)) + np.arange(40)[:, None, None]
    i, j, mask = correlation.all_pairs(jnp.asarray(valid))
    full = values[:, np.asarray(i), np.asarray(j)][np.asarray(mask)]
    row, i, j, mask = SAMPLE(jax.random.key(1), jnp.asarray(valid), 40_000)
    drawn = values[np.asarray(row), np.asarray(i), np.asarray(j)]
    standard_error = full.std() / np.sqrt(drawn.size)
    assert abs(drawn.mean() - full.mean()) < 4 * standard_error
    # The test has power: giving every row with a pair the same weight is off by many standard errors.
    per_row = np.mean(
        [values[r][np.triu(np.outer(valid[r], valid[r]), 1)].mean() for r in range(40) if valid[r].sum() > 1]
    )
    assert abs(per_row - full.mean()) > 8 * standard_error


@SETTINGS
@hypothesis.given(st.integers(0, 2**20), st.sampled_from([(1, 1), (4, 2), (3, 9)]), st.floats(0, 1))
def test_sampled_pairs_are_valid_or_all_masked(seed, shape, density):
    valid = np.random.default_rng(seed).random(shape) < density
    row, i, j, mask = map(np.asarray, SAMPLE(jax.random.key(seed), valid, 20))
    assert row.shape == i.shape == j.shape == mask.shape == (20,)
    assert row.dtype == i.dtype == j.dtype == np.int32
    if (valid.sum(axis=1) > 1).any():
        assert mask.all() and (i < j).all() and valid[row, i].all() and valid[row, j].all()
    else:
        assert not mask.any() and not row.any() and not i.any() and not j.any()


def test_sampling_covers_a_large_batch_and_depends_on_the_key_alone():
    valid = jnp.ones((512, 50), bool)  # 627,200 pairs, past the 2**16 where modulo tricks overflow
    row, i, j, _ = SAMPLE(jax.random.key(0), valid, 20_000)
    assert scipy.stats.chisquare(np.bincount(row, minlength=512)).pvalue > 1e-3
    # Over all pairs i < j of 0..49, the mean of i is 16 and that of j is 33, both with variance (50+1)(50-2)/18 = 136.
    assert abs(float(i.mean()) - 16) < 4 * np.sqrt(136 / 20_000)
    assert abs(float(j.mean()) - 33) < 4 * np.sqrt(136 / 20_000)
    np.testing.assert_array_equal(SAMPLE(jax.random.key(0), valid, 20_000)[0], row)
    assert (SAMPLE(jax.random.key(1), valid, 20_000)[0] != row).any()
    eager = correlation.sample_pairs(jax.random.key(0), valid, 20_000)
    np.testing.assert_array_equal(eager[1], i)


def test_drawing_below_a_bound_matches_64_bit_arithmetic():
    key = jax.random.key(3)
    words = np.asarray(jax.random.bits(key, (2, 50), jnp.uint32)).astype(object)
    digits = [sum(int((word >> (4 * k)) & 15) * 16 ** (7 - k) for k in range(8)) for word in words.ravel()]
    wide = [high * 2**32 + low for high, low in zip(digits[:50], digits[50:], strict=True)]
    for bound in (1, 7, 627_200, 2**28):
        drawn = correlation._uniform_below(key, jnp.int32(bound), 50)
        assert [int(value) for value in drawn] == [value % bound for value in wide]


def test_more_pairs_than_integers_can_number_are_refused():
    with pytest.raises(ValueError, match="2\\*\\*28"):
        jax.eval_shape(lambda key: correlation.sample_pairs(key, jnp.ones((300_000, 50), bool), 4), jax.random.key(0))
