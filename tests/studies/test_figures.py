"""The figures' studies: what they read of finished runs, their tables and pictures, and the configs that they ask for."""

import argparse
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from experiments import (
    cold_items,
    complexity,
    figure1,
    figure3,
    figure4,
    prefix_vs_positions,
    sensitivity,
    study,
)
from experiments.records import relevant
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.data.sequences import train_windows

STUDIES = (figure1, figure3, figure4, complexity, sensitivity, cold_items, prefix_vs_positions)


def make_row(label, score=None, dataset="beauty", seed=0, **changed):
    """Return a run whose test metrics all are ``score`` and whose validation metrics are one more."""
    scores = {name: score for name in ("hr@5", "mrr@5", "hr@20", "mrr@20")}
    row = {
        "kind": "run",
        "dataset": dataset,
        "label": label,
        "seed": seed,
        "config": {},
        "measures": {},
        "commit": "abc",
    }
    row |= {"test": scores, "validation": {name: value + 1 for name, value in scores.items()}} if score else {}
    missing = dict.fromkeys(("test", "validation", "paper", "best_epoch", "versions", "cores", "eval_seconds"))
    return missing | {"epochs": 3, "train_seconds": 60.0, "device": "1 x cpu"} | row | changed


def cells(markdown):
    """Return the cells of all lines of all tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def chart_titles(svg):
    return [title.text for title in xml.etree.ElementTree.fromstring(svg).findall("svg/title")]


def tooltips(svg):
    return set(re.findall("<title>([^<]*: [^<]*)</title></(?:circle|rect)>", svg))


def write_log(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config_of(job):
    return relevant(job.config)


# Configs.


def jobs_of(module, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "_lacking", lambda config: "")
    arguments = argparse.Namespace(datasets=dataset, seeds="0", only="", folder=str(tmp_path))
    return study.plan(module.STUDY, arguments, ["--config.data.root=somewhere"])


@pytest.mark.parametrize("dataset", study.DATASETS)
@pytest.mark.parametrize("module", STUDIES, ids=lambda module: module.STUDY.name)
def test_all_settings_of_a_study_are_valid_and_of_folders_of_their_own(module, dataset, monkeypatch, tmp_path):
    jobs = jobs_of(module, dataset, monkeypatch, tmp_path)
    settings = {n: s for n, s in module.STUDY.settings.items() if s.datasets is None or dataset in s.datasets}
    assert [job.label for job in jobs] == list(settings) and jobs
    repeated = len(jobs) - len({job.workdir for job in jobs})
    defaults = len(sensitivity.PARAMETERS) - 1  # each has a value that the config has already; all of these are one run
    assert repeated == (0 if module is not sensitivity else defaults if dataset != "ml1m" else defaults - 1)
    assert module.STUDY.name == module.__name__.rpartition(".")[2] and set(module.STUDY.datasets) <= set(study.DATASETS)


def test_the_curves_are_equally_long_and_refer_to_the_run_of_ids(monkeypatch, tmp_path):
    jobs = {job.label: job for job in jobs_of(figure1, "planted", monkeypatch, tmp_path)}
    ids = jobs.pop("ids")
    assert ids.config.model.tables == "none" and len(jobs) == 4
    for label, job in jobs.items():
        assert job.config.forgetting.reference_workdir == str(ids.workdir)
        assert job.config.eval.every == job.config.train.epochs and job.config.eval.protocol == "paper"
        assert job.config.distill.enabled == label.startswith("distilled")
        assert (job.config.model.table_scale, job.config.train.ramp_epochs) == (
            (0.02, 0) if label.endswith(figure1.SMALL) else (0.2, 10)
        )


def test_backbones_are_run_with_frozen_tuned_and_distilled_tables(monkeypatch, tmp_path):
    found = [config_of(job) for job in jobs_of(figure3, "beauty", monkeypatch, tmp_path)]
    fields = [(c["model.name"], c["model.tables"], c["distill.enabled"], c["train.ramp_epochs"]) for c in found]
    kinds = [("frozen", False, 0), ("tuned", False, 10), ("tuned", True, 10)]
    assert fields == [(name, *kind) for name in ("gru4rec", "sasrm", "mmsr_nodes") for kind in kinds]


def test_prefixes_and_positions_differ_in_nothing_else(monkeypatch, tmp_path):
    positions, prefixes = (config_of(job) for job in jobs_of(prefix_vs_positions, "beauty", monkeypatch, tmp_path))
    assert {name for name in positions if positions[name] != prefixes[name]} == {"train.prefixes"}


def test_widths_and_encoders_are_looked_for_by_the_names_of_features_files(monkeypatch, tmp_path):
    jobs = {job.label: job.config for job in jobs_of(figure4, "ml1m", monkeypatch, tmp_path)}
    config = jobs["image efficientnet-lite2, d=256"]
    assert list(config.data.modalities) == ["image-efficientnet-lite2"] and config.model.dim == 256
    assert len(jobs) == 3 * 14 and config.distill.lambda_score == 0.5  # as the dataset's config has it


# Without rows.


@pytest.mark.parametrize("module", STUDIES, ids=lambda module: module.STUDY.name)
def test_nothing_yet_is_a_table_and_no_picture(module):
    assert module.STUDY.figure([]) == "" and module.STUDY.table([])


# Figure 1.


def curves(features, ids=None):
    spaces = {"features": features} | ({"ids": ids} if ids else {})
    return {"forgetting": {"text": spaces}}


def test_curves_are_those_of_the_refit(tmp_path):
    values = {"image": {"features": 0.5, "ids": 0.1}, "text": {"features": 0.7, "ids": 0.2}}
    later = {"image": {"features": 0.25, "ids": 0.3}, "text": {"features": 0.6, "ids": 0.4}}
    lines = [("select", 0, {"text": {"features": 1.0}}), ("refit", 0, values), ("refit", 1, later)]
    write_log(
        tmp_path, [{"phase": p, "epoch": e, "forgetting": v} for p, e, v in lines] + [{"phase": "refit", "epoch": 2}]
    )
    assert figure1.read_curves(None, tmp_path) == {
        "image": {"features": [[0, 0.5], [1, 0.25]], "ids": [[0, 0.1], [1, 0.3]]},
        "text": {"features": [[0, 0.7], [1, 0.6]], "ids": [[0, 0.2], [1, 0.4]]},
    }
    write_log(tmp_path, [{"phase": "refit", "epoch": 1}])  # of ids alone
    assert figure1.read_curves(None, tmp_path) == {}


FORGETTING = [
    make_row("ids", measures={"forgetting": {}}),
    make_row("plain", measures=curves([[0, 0.9], [1, 0.5], [3, -0.1]], [[0, 0.0], [1, 0.2], [3, 0.4]])),
    make_row("plain", seed=1, measures=curves([[0, 0.9], [1, 0.3], [3, 0.1]], [[0, 0.0], [1, 0.2], [3, 0.6]])),
    make_row("distilled", measures=curves([[0, 0.9], [1, 0.8], [3, 0.75]])),
    make_row("distilled" + figure1.SMALL, dataset="planted", measures=curves([[0, 0.5], [3, 0.25]])),
]


def test_the_table_of_curves_holds_means_over_seeds_at_some_epochs_and_the_last():
    lines = cells(figure1.table(FORGETTING))
    assert lines[0] == ["dataset", "table", "like", "0", "1", "2", "last (epoch)"]
    assert lines[2:6] == [
        ["beauty", "text", "features, plain", "0.90", "0.40", "", "0.00 (3)"],
        ["beauty", "text", "features, distilled", "0.90", "0.80", "", "0.75 (3)"],
        ["beauty", "text", "ids, plain", "0.00", "0.20", "", "0.50 (3)"],
        ["planted, small tables", "text", "features, distilled", "0.50", "", "", "0.25 (3)"],
    ]


def test_the_picture_has_a_panel_a_dataset_and_its_curves():
    drawn = figure1.figure(FORGETTING)
    assert chart_titles(drawn) == ["text: beauty", "text: planted, small tables"]
    assert "features, distilled, epoch 3: 0.75" in tooltips(drawn) and "ids, plain, epoch 3: 0.5" in tooltips(drawn)


# Figures 3 and 4, sensitivity.


def test_bars_are_means_of_the_test_scores_and_gaps_where_nothing_ran():
    rows = [
        make_row("GRU4Rec, tuned", 4.0),
        make_row("GRU4Rec, tuned", 5.0, seed=1),
        make_row("MMSR, tuned + CDL", 7.0),
    ]
    drawn = figure3.figure(rows)
    assert chart_titles(drawn) == ["beauty: hr@20 on test", "beauty: mrr@20 on test"]
    assert tooltips(drawn) == {"tuned, GRU4Rec: 4.5", "tuned + CDL, MMSR: 7"}


def test_encoders_stand_by_size_with_a_line_for_each_width():
    rows = [make_row(f"text {name}, d={d}", d / 10 + len(name)) for name in ("mpnet", "wordllama") for d in (64, 128)]
    rows.append(make_row("text facets, d=16", 3.0, dataset="planted"))
    drawn = figure4.figure(rows)
    assert chart_titles(drawn)[::2] == ["beauty, text", "planted, text"]
    key = "numbers encoders, smallest first: beauty, text: 1 wordllama, 2 mpnet; planted, text: 1 facets."
    assert key in figure4.table(rows) and "numbers" not in figure4.table([])
    axis = "encoder, by its number in the table"
    first = {f"d=64, {axis} 1: 15.4", f"d=128, {axis} 2: 17.8"}
    assert first < tooltips(drawn) and len(tooltips(drawn)) == 5


def test_validation_comes_first_in_the_table_of_sensitivity():
    rows = [
        make_row("D=4", 2.0, best_epoch=7),
        make_row("D=4", 4.0, seed=1, best_epoch=9),
        make_row("D=1", 1.0, best_epoch=5),
    ]
    lines = cells(sensitivity.table(rows))
    assert lines[0] == [
        "dataset",
        "setting",
        *("validation hr@20", "validation mrr@20"),
        "test hr@20",
        "test mrr@20",
        "best epoch",
    ]
    assert lines[2:4] == [
        ["beauty", "D=1", "2.00", "2.00", "1.00", "1.00", "5"],
        ["beauty", "D=4", "4.00", "4.00", "3.00", "3.00", "7, 9"],
    ]


def test_values_are_drawn_evenly_spaced_and_words_as_bars():
    rows = [make_row("lambda1=0.0", 2.0), make_row("lambda1=100.0", 4.0), make_row("sigma=softmax", 1.0)]
    drawn = sensitivity.figure(rows)
    titles = [f"beauty: {metric} by {name}" for name in ("lambda1", "sigma") for metric in ("hr@20", "mrr@20")]
    axis = "lambda1 = 0.0, 1.0, 10.0, 100.0, in this order"
    assert chart_titles(drawn) == titles
    assert {f"test, {axis} 4: 4", f"validation, {axis} 1: 3", "validation, softmax: 2"} < tooltips(drawn)


# Complexity.


def timing(blocks, length, without, all_pairs, drawn):
    step = {"without": without, "all pairs": all_pairs, "drawn pairs": drawn}
    times = {"step": step, "ranking": {"without": 1e-5, "all pairs": 1e-5, "drawn pairs": 2e-5}, "pairs": 2048}
    config = {"model.num_layers": blocks, "data.max_length": length}
    return make_row(f"H={blocks}, L={length}", dataset="planted", config=config, measures={"complexity": times})


TIMES = [timing(1, 10, 0.03, 0.04, 0.05), timing(1, 20, 0.06, 0.12, 0.08), timing(4, 10, 0.09, 0.1, 0.1)]


def test_the_table_of_costs_holds_shares_of_a_step_and_the_bound():
    lines = cells(complexity.table(TIMES))[2:]
    assert lines[0][:10] == ["1", "10", "30.0", "40.0", "50.0", "25.0%", "40.0%", "50.0%", "10", "20"]
    assert [line[5:8] for line in lines[1:]] == [["50.0%", "25.0%", "50.0%"], ["10.0%", "10.0%", "20.0%"]]


def test_the_picture_of_costs_has_the_bound_and_the_mean_over_lengths():
    drawn = complexity.figure(TIMES)
    assert len(chart_titles(drawn)) == 4
    assert {"bound, H 4: 20", "all pairs, H 1: 37.5", "H=1, L 20: 50", "H=4, L 10: 2"} < tooltips(drawn)


@pytest.mark.parametrize("length", [10, 20, 50, 100, 200])
def test_random_histories_fill_one_chunk_of_full_steps(length, monkeypatch, tmp_path):
    jobs = {job.label: job.config for job in jobs_of(complexity, "planted", monkeypatch, tmp_path)}
    config = jobs[f"H=2, L={length}"]
    log = complexity.equal_histories(config).interactions
    windows = train_windows(log.offsets, train_lengths(log.lengths), length, 0)
    assert set(windows.length) == set(windows.counts) == {length}
    rows, spare = divmod(windows.num_targets // length, config.train.steps_per_call)
    assert spare == 0 and config.train.batch_size - length < rows * length <= config.train.batch_size
    assert log.num_items == 12_101 and log.items.min() >= 1


# Prefixes and positions.


def test_learning_is_read_with_the_seconds_so_far(tmp_path):
    def line(phase, epoch, seconds, mrr=None):
        line = {"phase": phase, "epoch": epoch, "train_seconds": seconds, "targets_per_second": 600 / seconds}
        return line | ({"metrics": {"mrr@20": mrr}} if mrr else {})

    lines = [
        {"phase": "select", "epoch": 0},
        line("select", 1, 3.0, 1.5),
        line("select", 2, 2.0),
        line("select", 3, 1.0, 2.5),
    ]
    write_log(tmp_path, [*lines, line("refit", 1, 9.0, 5.0)])
    found = prefix_vs_positions.read_learning(None, tmp_path)
    assert found == {"targets_per_second": 300, "targets": 600, "curve": [[1, 3.0, 1.5], [3, 6.0, 2.5]]}
    write_log(tmp_path, [line("refit", 1, 9.0, 5.0)])  # of the paper's protocol
    assert prefix_vs_positions.read_learning(None, tmp_path) == {"targets_per_second": None, "targets": 0, "curve": []}


def test_pace_and_targets_stand_in_the_table_and_learning_in_the_picture():
    learning = {"targets_per_second": 1234.5, "targets": 142_197, "curve": [[1, 30.0, 1.5], [2, 60.0, 2.5]]}
    rows = [make_row("positions", 4.0, measures={"learning": learning})]
    line = dict(zip(*cells(prefix_vs_positions.table(rows))[::2], strict=True))
    assert (line["targets an epoch (select)"], line["targets a second"]) == ("142,197", "1,234")
    assert {"positions, seed 0, epoch 2: 2.5", "positions, seed 0, seconds of training 60: 2.5"} < tooltips(
        prefix_vs_positions.figure(rows)
    )


def test_scores_are_no_numbers_of_other_datasets():
    rows = [make_row("SASRec, tuned", 4.0), make_row("SASRec, tuned", 8.0, dataset="sports")]
    assert tooltips(figure3.figure(rows)) == {"tuned, SASRec: 4", "tuned, SASRec: 8"}
    assert np.isclose(figure3.mean_score(rows[1:], "test", "hr@20"), 8.0)
