"""Ranks and the metrics made of them."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax.ops import metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = hypothesis.settings(max_examples=40)
METRICS = (metrics.hr_at_k, metrics.mrr_at_k, metrics.ndcg_at_k)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([0.3, 0.9, 0.5], 1, 1),
        ([0.3, 0.9, 0.5], 2, 2),
        ([0.3, 0.9, 0.5], 0, 3),
        ([0.5, 0.5, 0.1, 0.5], 1, 3),  # two others tie: both stand before the target
        ([0.0, 0.0, 0.0, 0.0], 0, 4),  # a constant model is last, not first
        ([NAN, 0.9, 0.1], 1, 2),  # a NaN elsewhere counts against the target
        ([NAN, 0.9, 0.1], 0, 3),  # a NaN target is last
        ([NAN, NAN, NAN], 1, 3),
        ([-INF, 0.9, -INF], 1, 1),  # -inf takes items out of the ranking
        ([-INF, 0.9, 0.1], 0, 3),
        ([INF, 0.9, INF], 0, 2),
        ([0.3, 0.9, 0.5], 3, 3),  # past the end: last
        ([7.0], 0, 1),
    ],
)
def test_rank_by_hand(scores, target, rank):
    for rank_of_target in (metrics.rank_of_target, jax.jit(metrics.rank_of_target)):
        found = rank_of_target(jnp.array(scores), jnp.int32(target))
        assert found == rank
        assert found.dtype == jnp.int32 and found.shape == ()


# rank: 1, 2, 3, 4; k = 3. 1/log2(1+1) = 1, 1/log2(3) = 0.63093, 1/log2(4) = 0.5.
def test_metrics_by_hand():
    rank = jnp.array([1, 2, 3, 4], jnp.int32)
    np.testing.assert_array_equal(metrics.hr_at_k(rank, 3), [1, 1, 1, 0])
    np.testing.assert_allclose(metrics.mrr_at_k(rank, 3), [1, 1 / 2, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.ndcg_at_k(rank, 3), [1, 1 / math.log2(3), 0.5, 0], rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_padding_ranks_count_nothing_and_scalars_stay_scalars(metric):
    assert metric(jnp.int32(0), 5) == 0.0
    value = metric(jnp.int32(1), 5)
    assert value == 1.0 and value.shape == () and value.dtype == jnp.float32


@SETTINGS
@hypothesis.given(st.integers(1, 200), st.integers(1, 50))
def test_metrics_are_ordered_bounded_and_monotone(rank, k):
    hr, mrr, ndcg = (float(metric(rank, k)) for metric in METRICS)
    assert 0.0 <= mrr <= ndcg + 1e-6 <= hr + 2e-6 <= 1.0 + 2e-6
    for metric in METRICS:
        assert metric(rank + 1, k) <= metric(rank, k) <= metric(rank, k + 1)
    assert (hr > 0) == (mrr > 0) == (ndcg > 0) == (rank <= k)


@SETTINGS
@hypothesis.given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
def test_rank_agrees_with_a_pessimistic_sort(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    expected = 1 + sum(score >= scores[target] for index, score in enumerate(scores) if index != target)
    assert metrics.rank_of_target(jnp.array(scores, jnp.float32), jnp.int32(target)) == expected


def test_rank_is_vmapped_over_instances():
    scores = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32)
    targets = np.arange(20, dtype=np.int32) % 7
    ranks = jax.vmap(metrics.rank_of_target)(scores, targets)
    np.testing.assert_array_equal(ranks, 1 + np.argsort(np.argsort(-scores))[np.arange(20), targets])
