"""Comparisons user by user, against what can be worked out by hand or enumerated."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats

from experiments import significance
from experiments.significance import average_gain, best_baseline, compare_runs, holm, paired_tests, welch
from kdsr_jax.errors import UserError


def write_run(folder, rank, user=None, **changes):
    folder.mkdir(parents=True)
    rank = np.asarray(rank)
    user = np.arange(len(rank)) if user is None else np.asarray(user)
    arrays = {"user": user, "position": np.arange(len(rank)), "target": np.ones(len(rank), int), "rank": rank} | changes
    np.savez(folder / "ranks.npz", **arrays)
    significance.keep_ranks(folder, folder / "kept" / "ranks.npz")
    return folder / "kept" / "ranks.npz"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_metrics_of_an_instance_by_hand():
    found = significance.instance_metrics(np.array([1, 4, 6, 21]))
    np.testing.assert_allclose(found, [[1, 1, 1, 1], [1, 0.25, 1, 0.25], [0, 0, 1, 1 / 6], [0, 0, 0, 0]])


def test_permutation_equals_the_enumeration_of_all_signs():
    sums = np.array([[0.5], [0.25], [1.0], [-0.25], [0.75], [0.5]])
    signs = np.array(list(itertools.product((-1, 1), repeat=6)))
    exact = (np.abs(signs @ sums[:, 0]) >= abs(sums.sum()) - 1e-9).mean()
    assert paired_tests(sums, np.ones(6))[2][0] == pytest.approx(exact, abs=0.01)


def test_p_is_never_0_and_1_where_nothing_differs():
    sums = np.stack([np.ones(40), np.zeros(40)], 1)
    np.testing.assert_allclose(paired_tests(sums, np.ones(40), draws=999)[2], [0.001, 1.0])


def test_without_a_difference_small_p_values_are_rare():
    rng = np.random.default_rng(1)
    sums = rng.normal(size=(60, 200))
    p = paired_tests(sums, np.ones(60), draws=1000)[2]
    assert 0.01 < (p < 0.05).mean() < 0.11 and 0.35 < (p < 0.5).mean() < 0.65


def test_interval_is_that_of_a_mean_where_all_users_have_as_many_instances():
    sums = np.random.default_rng(2).normal(0.3, 1, (500, 1))
    low, high, _ = paired_tests(2 * sums, np.full(500, 2))
    half = 1.96 * sums.std() / np.sqrt(500)
    assert (low[0], high[0]) == pytest.approx((sums.mean() - half, sums.mean() + half), abs=0.012)


def test_more_instances_of_the_same_users_say_no_more():
    sums = np.random.default_rng(3).normal(size=(200, 1))
    once, thrice = paired_tests(sums, np.ones(200)), paired_tests(3 * sums, np.full(200, 3))
    np.testing.assert_allclose(np.stack(once), np.stack(thrice))


def test_order_of_users_and_of_instances_makes_no_difference(tmp_path):
    rng = np.random.default_rng(4)
    sums, counts, users = rng.normal(size=(50, 2)), rng.integers(1, 4, 50), rng.permutation(50)
    np.testing.assert_allclose(paired_tests(sums[users], counts[users]), paired_tests(sums, counts))
    user, ours, theirs, order = rng.integers(0, 30, 90), *rng.integers(1, 40, (2, 90)), rng.permutation(90)
    straight = [write_run(tmp_path / n, rank, user) for n, rank in (("a", ours), ("b", theirs))]
    shuffled = [
        write_run(tmp_path / n, rank[order], user[order], position=order) for n, rank in (("c", ours), ("d", theirs))
    ]
    for one, other in zip(compare_runs([straight]), compare_runs([shuffled]), strict=True):
        assert one.pop("welch_p") is other.pop("welch_p") is None and one.pop("metric") == other.pop("metric")
        assert one["by_seed"] == pytest.approx([one["difference"]])
        assert one.pop("by_seed") == pytest.approx(other.pop("by_seed"))
        assert one == pytest.approx(other)


def test_differences_and_seeds_by_hand(tmp_path):
    pairs = [
        (write_run(tmp_path / "a0", [1, 1, 30, 2]), write_run(tmp_path / "b0", [1, 6, 30, 4])),
        (write_run(tmp_path / "a1", [1, 2, 5, 2]), write_run(tmp_path / "b1", [9, 6, 30, 4])),
    ]
    lines = {line["metric"]: line for line in compare_runs(pairs)}
    assert lines["hr@5"]["difference"] == pytest.approx(100 * (7 / 8 - 3 / 8))
    assert lines["mrr@5"]["difference"] == pytest.approx(100 * ((2.5 + 2.2) / 8 - (1.25 + 0.25) / 8))
    assert lines["hr@5"]["by_seed"] == pytest.approx([100 * (3 / 4 - 2 / 4), 100 * (4 / 4 - 1 / 4)])
    assert lines["hr@5"]["users"] == 4
    assert lines["hr@5"]["welch_p"] == pytest.approx(
        scipy.stats.ttest_ind([0.75, 1.0], [0.5, 0.25], equal_var=False).pvalue
    )
    assert all(line["low"] <= line["difference"] <= line["high"] for line in lines.values())
    assert json.loads(json.dumps(lines)) == lines


def test_welch_needs_two_seeds_and_something_that_varies():
    assert welch([1.0], [2.0]) is None and welch([1.0, 1.0], [2.0, 2.0]) is None
    assert 0 < welch([1.0, 1.1, 1.3], [1.2, 1.4]) < 1


def test_runs_that_rank_other_targets_are_refused(tmp_path):
    one, other = write_run(tmp_path / "a", [1, 2]), write_run(tmp_path / "b", [1, 2], target=np.array([1, 2]))
    with pytest.raises(UserError, match=r"/a/\S+ and .*/b/\S+ rank other targets"):
        compare_runs([(one, other)])


def test_settings_are_compared_over_the_seeds_that_both_have(tmp_path):
    def runs(name, *ranks):
        return {seed: write_run(tmp_path / f"{name}{seed}", rank) for seed, rank in ranks}

    files = {("beauty", "KDSR"): runs("KDSR", (0, [1, 1]), (1, [1, 9]))}
    files |= {
        ("beauty", "tuned"): runs("tuned", (1, [9, 9]), (2, [1, 1])),
        ("beauty", "late"): runs("late", (3, [1, 1])),
    }
    files |= {("sports", "tuned"): runs("sports", (0, [1, 1]))}
    found = significance.compare_all("KDSR", files)
    assert [line["metric"] for line in found] == list(significance.METRICS)
    shared = {"kind": "comparison", "dataset": "beauty", "label": "tuned", "reference": "KDSR", "seeds": [1]}
    assert all(shared.items() <= line.items() for line in found) and found[0]["difference"] == pytest.approx(50)
    assert significance.compare_all("", files) == []
    assert significance.compare_all("KDSR", files, {("beauty", "tuned", (1,))}) == []
    assert significance.compare_all("KDSR", files, {("beauty", "tuned", (1, 2))}) == found
    # Of the second target, at rank 9 in both, there is nothing to tell.
    groups = {"first": np.array([True, False]), "second": np.array([False, True])}
    grouped = significance.compare_all("KDSR", files, groups=lambda dataset: groups)
    assert grouped[: len(found)] == found and len(grouped) == 3 * len(found)
    hits = {line["group"]: line["difference"] for line in grouped if line["metric"] == "hr@5" and "group" in line}
    assert hits == {"first": pytest.approx(100), "second": 0}


def test_best_baseline_is_that_of_validation():
    def row(label, score, test, **more):
        values = {"validation": {"mrr@20": score}, "test": {"mrr@20": test}}
        return {"kind": "run", "dataset": "beauty", "label": label} | values | more

    rows = [row("a", 1.0, 9.0), row("a", 3.0, 9.0), row("b", 2.5, 1.0), row("KDSR", 9.0, 9.0)]
    rows += [row("c", 9.0, 9.0, dataset="sports"), row("d", 9.0, 9.0, validation=None)]
    assert best_baseline(rows, "beauty", "KDSR") == "b"
    assert best_baseline(rows, "toys", "KDSR") is None


def test_average_gain_of_the_paper_is_not_what_it_says(repository):
    assert average_gain([2.0, 3.0], [1.0, 2.0]) == pytest.approx(0.75)
    table = json.loads((repository / "experiments" / "paper.json").read_text())["table2"]
    ours, best = [], []
    for models in table.values():
        ours += models["KDSR"]
        best += [max(column) for column in zip(*(v for name, v in models.items() if name != "KDSR"), strict=True)]
    assert 100 * average_gain(ours, best) == pytest.approx(4.4, abs=0.05)
