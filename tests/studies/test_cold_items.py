"""Cold items: bins, means and intervals held against what was worked by hand, and their table and picture."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import cold_items
from experiments.cold_items import by_bin, intervals, measure
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.errors import UserError


@pytest.fixture
def shop(monkeypatch):
    """Three users with 1, 2 and 1 test targets: item 3, which no train part has, 1 (11 times there), 4 (4 times), and 1 again."""
    items = np.array([1, 2, 1, 2, 3] + [1] * 9 + [1, 4] + [4, 4, 4, 4, 1], np.int32)
    log = Interactions(items, np.array([0, 5, 16, 21]), np.arange(3).astype(str), np.arange(5).astype(str))
    monkeypatch.setattr("kdsr_jax.train.load_data", lambda config: SimpleNamespace(interactions=log))
    return SimpleNamespace(data=SimpleNamespace(name="shop", max_length=8))


def test_targets_of_a_run_go_to_their_bins(shop):
    found = measure(shop, {"user": np.array([0, 1, 1, 2]), "rank": np.array([1, 4, 40, 2])})
    sizes = {grouping: {name: bin_["targets"] for name, bin_ in bins.items()} for grouping, bins in found.items()}
    assert sizes == {"popularity": {"0": 1, "1–4": 1, "10–19": 2}, "history": {"1–4": 2, "5–9": 2}}
    popular = found["popularity"]
    assert popular["0"] == {"targets": 1, "users": 1, "hr@20": [100, 100, 100], "mrr@20": [100, 100, 100]}
    assert popular["1–4"] == {"targets": 1, "users": 1, "hr@20": [0, 0, 0], "mrr@20": [0, 0, 0]}
    assert popular["10–19"]["users"] == 2 and popular["10–19"]["mrr@20"][0] == 37.5  # ranks 4 and 2
    assert found["history"]["5–9"]["users"] == 1 and found["history"]["5–9"]["hr@20"] == [50, 50, 50]


def test_groups_are_the_bins_of_popularity(shop):
    groups = cold_items.by_popularity(shop)
    assert {name: inside.tolist() for name, inside in groups.items()} == {
        "0": [True, False, False, False],
        "1–4": [False, False, True, False],
        "10–19": [False, True, False, True],
    }


def test_ranks_of_other_targets_are_refused(shop):
    with pytest.raises(UserError, match="other test targets than shop has"):
        measure(shop, {"user": np.array([0, 1, 2, 2]), "rank": np.array([1, 4, 40, 2])})


@pytest.mark.parametrize("value", range(60))
def test_bins_hold_what_their_names_say(value):
    (name,) = by_bin(np.array([value]), np.array([1]), np.array([0]))
    low, high = re.fullmatch(r"(\d+)(?:–(\d+)|\+)?", name).groups()
    assert int(low) <= value and (value <= int(high or low) or name.endswith("+"))


def test_two_users_give_the_interval_of_their_four_draws():
    # Draws of two users: AA, AB, BA and BB, so that 2.5 and 97.5 percent lie in those of BB and AA.
    assert intervals({"m": np.array([100.0, 0.0])}, np.array([7, 3])) == {"m": [50, 0, 100]}


def test_users_weigh_by_their_targets():
    values, users = np.array([8.0, 8.0, 8.0, 0.0]), np.array([1, 1, 1, 2])
    assert intervals({"m": values}, users)["m"] == [6, 0, 8]


def test_intervals_are_those_of_the_normal_law_where_there_are_many_users():
    rng = np.random.default_rng(1)
    values = rng.normal(10, 5, 2500)
    mean, low, high = intervals({"m": values}, np.arange(2500))["m"]
    error = values.std() / 50
    assert mean == pytest.approx(values.mean()) and [low, high] == pytest.approx(
        [mean - 1.96 * error, mean + 1.96 * error], abs=0.15 * error
    )


def test_users_with_several_alike_targets_widen_the_interval():
    values = np.random.default_rng(1).normal(10, 5, 400)
    alone = intervals({"m": np.repeat(values, 4)}, np.arange(1600))["m"]
    together = intervals({"m": np.repeat(values, 4)}, np.repeat(np.arange(400), 4))["m"]
    assert together[0] == pytest.approx(alone[0])
    assert (together[2] - together[1]) / (alone[2] - alone[1]) == pytest.approx(2, rel=0.1)


def make_row(label, seed, popularity):
    row = {"kind": "run", "dataset": "beauty", "label": label, "seed": seed, "config": {}, "commit": "abc", "cores": 2}
    row |= dict.fromkeys(("test", "validation", "paper", "best_epoch", "versions", "eval_seconds"))
    bins = {
        name: {"targets": 1234, "users": 5, "hr@20": values, "mrr@20": values} for name, values in popularity.items()
    }
    measures = {"cold_items": {"popularity": bins, "history": {}}}
    return row | {"epochs": 1, "train_seconds": 1.0, "device": "1 x cpu", "measures": measures}


ROWS = [
    make_row("SASRec", 0, {"0": [1.0, 0.5, 2.0], "5–9": [10.0, 9.0, 11.0]}),
    make_row("SASRec", 1, {"0": [2.0, 1.5, 3.0], "5–9": [10.0, 9.0, 11.0]}),
    make_row("KDSR", 0, {"0": [3.0, 2.0, 4.0]}),
]


def test_differences_by_popularity_are_adjusted_together_and_stand_in_a_table_of_their_own():
    def compared(metric, p, **group):
        values = {
            "difference": -0.5,
            "low": -1.0,
            "high": 0.25,
            "p": p,
            "users": 9,
            "seeds": [0],
            "by_seed": [-0.5],
            "welch_p": None,
        }
        return (
            {"kind": "comparison", "dataset": "beauty", "label": "SASRec", "reference": "KDSR", "metric": metric}
            | values
            | group
        )

    rows = [*ROWS, compared("hr@20", 0.5), compared("hr@20", 0.01, group="5–9"), compared("mrr@20", 0.03, group="0")]
    rows.append(
        compared("hr@20", 1.0, group="0", difference=0.0, low=0.0, high=0.0)
    )  # nothing was found, nothing compared
    lines = cold_items.table(rows).splitlines()
    heading = next(line for line in lines if line.startswith("**beauty: hr@20 of KDSR minus that of others**"))
    assert "these 2 comparisons" in heading
    assert "| SASRec | −0.50 [−1.00, +0.25] p 0.02 |" in lines and "| SASRec | −0.50 [−1.00, +0.25] p 0.03 |" in lines


def test_the_table_holds_means_over_seeds_with_intervals_and_empty_cells_where_a_bin_is_empty():
    lines = cold_items.table(ROWS).splitlines()
    start = lines.index("**beauty: mrr@20 by popularity**, times the target stands in train parts")
    assert lines[start + 2] == "| setting | 0 (1,234) | 5–9 (1,234) |"
    assert lines[start + 4] == "| SASRec | 1.50 [1.00, 2.50] | 10.00 [9.00, 11.00] |"
    assert lines[start + 5] == "| KDSR | 3.00 [2.00, 4.00] |  |"


def test_the_picture_has_bars_for_every_bin_that_is_filled():
    drawn = cold_items.figure(ROWS)
    assert "<title>SASRec, 0: 1.5</title>" in drawn and "<title>KDSR, 0: 3</title>" in drawn
    assert "KDSR, 5–9" not in drawn and "hr@20 on test by history" in drawn
