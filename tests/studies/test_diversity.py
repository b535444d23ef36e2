"""Coverage, exposure and distances of the recommended lists against plain loops."""

import itertools
import shutil

import jax
import numpy as np
import pytest

from experiments import diversity
from experiments.diversity import gini, mean_distance, measure
from kdsr_jax import train
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.errors import UserError
from kdsr_jax.evaluate import Evaluator
from kdsr_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")


def loop_distance(feature, lists):
    """Return the mean of 1 - cosine over pairs and then over lists, one pair at a time."""
    centre = feature.values[feature.has_feature].mean(0)
    means = []
    for row in lists:
        vectors = [feature.values[item] - centre for item in row if feature.has_feature[item]]
        pairs = list(itertools.combinations(vectors, 2))
        if pairs:
            means.append(np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))
    return np.mean(means)


@pytest.fixture(scope="module")
def reopened(finished, tiny):
    """Return (runner, state, histories before each test target, scores [T, N] of each, one at a time)."""
    workdir, _ = finished
    config = tiny("eval.protocol=both")
    with Workdir(workdir, config, create=False) as folder:
        runner = train.reopen(config, folder)
        state = runner.load_best()
    data = runner.run.dataset.interactions
    variables = {"params": state.params, "frozen": state.frozen}
    score = jax.jit(lambda history: runner.run.student.apply(variables, history)[0, -1])
    histories = [
        data.items[data.offsets[user] : data.offsets[user] + end]
        for user in range(data.num_users)
        for end in range(train_lengths(data.lengths)[user], data.lengths[user])
    ]
    scores = np.stack([score(history[None, -config.data.max_length :]) for history in histories])
    return runner, state, histories, scores


def test_a_finished_run_equals_loops_over_all_its_lists(finished, tiny, reopened):
    workdir, result = finished
    measured = measure(tiny("eval.protocol=both"), workdir)
    runner, _, _, scores = reopened
    lists = np.argsort(-scores, axis=1)[:, :20] + 1
    shown = np.bincount(lists.ravel(), minlength=scores.shape[1] + 1)[1:]
    assert measured["lists"] == len(lists) and set(measured["distance"]) == {"image"}
    assert measured["coverage@20"] == pytest.approx(100 * (shown > 0).mean())
    assert measured["coverage@20"] == pytest.approx(result["test"]["coverage@20"])
    differences = sum(abs(a - b) for a in shown.tolist() for b in shown.tolist())
    assert measured["gini"] == pytest.approx(differences / (2 * len(shown) * shown.sum()))
    expected = loop_distance(runner.run.dataset.features["image"], lists)
    assert measured["distance"]["image"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("filter_seen", [False, True])
def test_lists_are_the_rankings_best_first(reopened, filter_seen):
    runner, state, histories, scores = reopened
    run = runner.run
    arguments = run.student, run.dataset.interactions, runner.phase.evaluation, run.placement
    evaluator = Evaluator(*arguments, filter_seen=filter_seen)
    lists = evaluator.top_items(state.params, state.frozen, 99)
    for row, history, target, single in zip(lists, histories, evaluator.target_items, scores, strict=True):
        seen = set(history.tolist()) - {int(target)} if filter_seen else set()
        expected = [item for item in np.argsort(-single) + 1 if item not in seen]
        assert row.tolist() == expected + [0] * len(seen)
    assert np.array_equal(evaluator.top_items(state.params, state.frozen, 3), lists[:, :3])


def test_distances_leave_out_items_without_the_feature(monkeypatch):
    rng = np.random.default_rng(0)
    has_feature = np.array([False, *(rng.random(30) < 0.6)])
    feature = Features(np.where(has_feature[:, None], rng.normal(3, 1, (31, 5)), 0).astype(np.float32), has_feature)
    lists = rng.permuted(np.tile(np.arange(31), (70, 1)), axis=1)[:, :4]  # 0: a list that is shorter
    few = (has_feature[lists].sum(1) < 2).sum()
    assert 0 < few < 70
    monkeypatch.setattr(diversity, "_LISTS", 16)
    assert mean_distance(feature, lists) == pytest.approx(loop_distance(feature, lists), rel=1e-5)
    assert mean_distance(feature, np.zeros((3, 4), int)) is None


def test_alike_items_are_no_distance_apart_and_opposite_ones_two():
    values = np.array([[0, 0], [1, 2], [1, 2], [-1, -2], [-1, -2]], np.float32)
    feature = Features(values, np.array([False, True, True, True, True]))
    assert mean_distance(feature, np.array([[1, 2]])) == pytest.approx(0, abs=1e-6)
    assert mean_distance(feature, np.array([[1, 3]])) == pytest.approx(2)
    assert mean_distance(feature, np.array([[1, 2, 3]])) == pytest.approx(4 / 3)


def test_gini_of_known_exposures():
    assert gini([5, 5, 5, 5]) == pytest.approx(0)
    assert gini([0, 0, 0, 8]) == pytest.approx(3 / 4)
    assert gini([3, 1]) == gini([1, 3]) == pytest.approx(1 / 4)


def test_an_unfinished_run_is_one_line(finished, tiny, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="the run is not finished"):
        measure(tiny("eval.protocol=both"), tmp_path / "run")
