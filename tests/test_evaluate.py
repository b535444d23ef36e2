"""Full ranking on the device against plain numpy that looks at one target at a time."""

import jax
import numpy as np
import pytest

from kdsr_jax import evaluate
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.sequences import evaluation_windows
from kdsr_jax.errors import UserError
from kdsr_jax.evaluate import Evaluator, summarise
from kdsr_jax.mesh import Placement
from kdsr_jax.models.student import Student, init_student

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_ITEMS, MAX_LENGTH = 40, 6


@pytest.fixture(scope="module")
def interactions():
    """Histories shorter and longer than max_length; the last two items of each are targets, some of them seen before."""
    rng = np.random.default_rng(3)
    lengths = np.array([3, 8, 9, 8, 14, 20, 3, 8, 9, 8])
    items = rng.integers(1, NUM_ITEMS + 1, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items[offsets[5] - 1] = items[offsets[4]]  # a target that its history holds
    users, names = np.array([f"u{u}" for u in range(len(lengths))]), np.array([str(i) for i in range(NUM_ITEMS + 1)])
    return Interactions(items, offsets, users, names)


@pytest.fixture(scope="module")
def student():
    return Student(num_items=NUM_ITEMS, backbone="sasrec", dim=8, max_length=MAX_LENGTH, num_layers=1)


@pytest.fixture(scope="module")
def params(student):
    # Ten times the usual scale: the position in the history and its items then matter for the order.
    return jax.tree.map(lambda a: 10 * a, init_student(student, jax.random.key(1), {})[0])


def make_evaluator(student, interactions, filter_seen=False):
    lengths = interactions.lengths
    windows = evaluation_windows(interactions.offsets, lengths - 2, lengths, MAX_LENGTH)
    return Evaluator(student, interactions, windows, Placement(), filter_seen=filter_seen)


@pytest.fixture(scope="module")
def evaluator(student, interactions):
    return make_evaluator(student, interactions)


def expected_scores(student, params, interactions):
    """Return (histories, targets, scores [T, N]), each prefix passed through the model alone and without padding."""
    apply = jax.jit(lambda history: student.apply({"params": params}, history))
    histories, targets, scores = [], [], []
    for begin, end in zip(interactions.offsets[:-1], interactions.offsets[1:], strict=True):
        for target in range(end - 2, end):
            histories.append(interactions.items[begin:target])
            targets.append(int(interactions.items[target]))
            scores.append(np.asarray(apply(histories[-1][None, -MAX_LENGTH:])[0, -1]))
    return histories, np.array(targets), np.stack(scores)


@pytest.fixture(scope="module")
def truth(student, params, interactions):
    return expected_scores(student, params, interactions)


def expected_ranks(targets, scores):
    return [int((row >= row[t - 1]).sum()) for row, t in zip(scores, targets, strict=True)]


def expected_coverage(scores, k=20):
    shown = {item for row in scores for item in np.argsort(-row)[:k]}
    return len(shown) / NUM_ITEMS


def test_ranks_and_coverage_equal_brute_force(evaluator, params, truth):
    histories, targets, scores = truth
    ranks, coverage = evaluator.rank(params, {})
    assert evaluator.target_items.tolist() == targets.tolist()
    assert evaluator.history_lengths.tolist() == [len(history) for history in histories]
    assert evaluator.users.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert ranks.tolist() == expected_ranks(targets, scores)
    assert len(set(ranks)) > 10  # or the model would be too dull to show a mistake
    assert coverage == pytest.approx(expected_coverage(scores))


def test_filter_seen_takes_the_whole_history_out_but_not_the_target(student, params, interactions, truth):
    histories, targets, scores = truth
    ranks, coverage = make_evaluator(student, interactions, filter_seen=True).rank(params, {})
    filtered = scores.copy()
    for row, history, target in zip(filtered, histories, targets, strict=True):
        row[history - 1] = np.where(history == target, row[target - 1], -np.inf)
    assert any(target in history for history, target in zip(histories, targets, strict=True))
    assert ranks.tolist() == expected_ranks(targets, filtered) != expected_ranks(targets, scores)
    assert coverage == pytest.approx(expected_coverage(filtered))


def test_ties_count_against_the_target(evaluator, params):
    flat = jax.tree.map(np.zeros_like, params)
    ranks, _ = evaluator.rank(flat, {})
    assert set(ranks) == {NUM_ITEMS}
    two = params | {"item_embedding": {"embedding": np.array(params["item_embedding"]["embedding"])}}
    plain, _ = evaluator.rank(params, {})
    best = int(evaluator.target_items[np.argmin(plain)])
    other = best % NUM_ITEMS + 1
    two["item_embedding"]["embedding"][other] = two["item_embedding"]["embedding"][best]
    tied, _ = evaluator.rank(two, {})
    mine = evaluator.target_items == best
    assert (tied[mine] >= 2).all()  # its twin stands before it


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error(evaluator, params, value):
    table = np.array(params["item_embedding"]["embedding"])
    table[7, 0] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluator.rank(params | {"item_embedding": {"embedding": table}}, {})


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_small_chunks_give_the_same_ranks(student, interactions, params, evaluator, monkeypatch, slots):
    monkeypatch.setattr(evaluate, "SCORE_BYTES", slots * 4 * NUM_ITEMS + 3)
    small = make_evaluator(student, interactions)
    assert small._num_slots == slots
    ranks, coverage = small.rank(params, {})
    plain, same = evaluator.rank(params, {})
    assert ranks.tolist() == plain.tolist() and coverage == same
    assert small.target_items.tolist() == evaluator.target_items.tolist()


def test_summary_is_in_percent():
    summary = summarise(np.array([1, 2, 7, 30]), (5, 10))
    assert list(summary) == ["hr@5", "hr@10", "mrr@5", "mrr@10", "ndcg@5", "ndcg@10"]
    assert summary["hr@5"] == 50 and summary["hr@10"] == 75
    assert summary["mrr@5"] == pytest.approx(100 * (1 + 1 / 2) / 4)
    assert summary["mrr@10"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 7) / 4)
    assert summary["ndcg@10"] == pytest.approx(100 * (1 + 1 / np.log2(3) + 1 / np.log2(8)) / 4)
