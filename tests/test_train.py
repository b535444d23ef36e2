"""Whole runs on a tiny planted shop: what a workdir holds in the end, per protocol, and when phases stop."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from kdsr_jax import train
from kdsr_jax.config import fingerprint
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.errors import UserError
from kdsr_jax.evaluate import Evaluator
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.teacher import fit_teacher
from kdsr_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

RESULT_KEYS = [
    "protocol",
    "test",
    "paper",
    "validation",
    "best_epoch",
    "epochs",
    "train_seconds",
    "eval_seconds",
    "parameters",
    "config_fingerprint",
    "device",
    "versions",
    "seed",
]
NAMES = [f"{name}@{k}" for name in ("hr", "mrr", "ndcg") for k in (5, 10, 20)]


def read_log(workdir):
    """The lines of the trained epochs; that of epoch 0 is for test_forgetting."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["epoch"]]


def read_ranks(workdir):
    with np.load(workdir / "ranks.npz") as file:
        return dict(file)


def metrics_of(ranks):
    """Compute the nine metrics in percent in plain numpy, after their formulas."""
    result = {}
    for k in (5, 10, 20):
        hit = ranks <= k
        result[f"hr@{k}"] = 100 * hit.mean()
        result[f"mrr@{k}"] = 100 * (hit / ranks).mean()
        result[f"ndcg@{k}"] = 100 * (hit / np.log2(ranks + 1)).mean()
    return result


def saved_config(workdir):
    return json.loads((workdir / "config.json").read_text())["config"]


def check_files(workdir, result, selects):
    names, distilled = {entry.name for entry in workdir.iterdir()}, saved_config(workdir)["distill"]["enabled"]
    wanted = {".lock", "config.json", "checkpoints", "metrics.jsonl", "ranks.npz", "ids.npz", "result.json"}
    wanted |= {"overview.json", "examples.json", "report.html"}
    wanted |= {f"teacher-{name}.npz" for name in result["teacher"]} if distilled else set()
    assert names == wanted | ({"selection.json"} if selects else set())
    assert json.loads((workdir / "result.json").read_text()) == result
    phases = {"select", "refit"} if selects else {"refit"}
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} == phases
    assert {line["phase"] for line in read_log(workdir)} == phases
    assert set(RESULT_KEYS) <= result.keys()
    assert result["train_seconds"] > 0 and result["eval_seconds"] > 0
    assert set(result["versions"]) >= {"jax", "flax", "optax", "numpy"}


def test_run_of_both_protocols(finished, tiny):
    workdir, result = finished
    check_files(workdir, result, selects=True)
    log = read_log(workdir)
    assert [(line["phase"], line["epoch"]) for line in log] == [(p, e) for p in ("select", "refit") for e in (1, 2, 3)]
    refit = [line["metrics"] for line in log if line["phase"] == "refit"]
    selected = [line["metrics"]["mrr@20"] for line in log if line["phase"] == "select"]
    assert result["best_epoch"] == 1 + int(np.argmax(selected)) and result["epochs"] == 3
    assert result["validation"] == log[result["best_epoch"] - 1]["metrics"]
    assert result["test"] == refit[result["best_epoch"] - 1]
    assert result["paper"] == {name: max(m[name] for m in refit) for name in NAMES}
    assert result["paper_epochs"] == {name: 1 + int(np.argmax([m[name] for m in refit])) for name in NAMES}
    selection = json.loads((workdir / "selection.json").read_text())
    assert selection["best_epoch"] == result["best_epoch"] and selection["validation"] == result["validation"]
    assert result["config_fingerprint"] == fingerprint(tiny("eval.protocol=both"))
    assert result["device"] == "1 x cpu" and result["seed"] == 0


def test_log_shows_every_loss_part_rate_and_pull(finished):
    line = read_log(finished[0])[0]
    parts = {"next_item", "holistic/image", "dissected/image"}
    assert line["losses"].keys() == parts | {"loss", "gradient_norm"}
    assert line["gradient_norms"].keys() == {f"{part} on image" for part in parts}
    assert all(value > 0 for value in line["gradient_norms"].values())
    assert line["losses"]["loss"] == pytest.approx(
        line["losses"]["next_item"] + line["losses"]["holistic/image"] + 0.5 * line["losses"]["dissected/image"], 1e-5
    )
    assert line["learning_rates"]["body"] == pytest.approx(1e-3)
    assert line["learning_rates"]["modality_tables"] == pytest.approx(
        1e-3 * (0.1 + 0.9 * 1 / 10)
    )  # after 1 of 10 epochs
    assert line["targets_per_second"] > 0


def test_ranks_explain_the_metrics(finished, tiny):
    workdir, result = finished
    ranks = read_ranks(workdir)
    columns = {"user", "position", "target", "rank", "history_length", "target_train_count"}
    assert ranks.keys() == columns | {"epoch", "evaluated_on"}
    assert ranks["epoch"] == result["best_epoch"]
    expected = metrics_of(ranks["rank"])
    assert {name: result["test"][name] for name in NAMES} == pytest.approx(expected, rel=1e-6)
    interactions = train.load_dataset(tiny().data).interactions
    lengths, parts = interactions.lengths, train_lengths(interactions.lengths)
    instances = [(u, p) for u in range(len(lengths)) for p in range(parts[u], lengths[u])]
    assert sorted(zip(ranks["user"], ranks["position"], strict=True)) == instances
    histories = np.split(interactions.items, interactions.offsets[1:-1])
    assert ranks["target"].tolist() == [histories[u][p] for u, p in zip(ranks["user"], ranks["position"], strict=True)]
    assert ranks["history_length"].tolist() == np.minimum(ranks["position"], 4).tolist()
    trained = np.concatenate([history[:part] for history, part in zip(histories, parts, strict=True)])
    counts = np.bincount(trained, minlength=len(interactions.item_ids))
    assert ranks["target_train_count"].tolist() == counts[ranks["target"]].tolist()
    with np.load(workdir / "ids.npz") as ids:
        assert ids["user_ids"].tolist() == interactions.user_ids.tolist()
        assert ids["item_ids"].tolist() == interactions.item_ids.tolist()


def test_same_command_again_prints_the_result_and_trains_nothing(finished, tiny, capsys, monkeypatch):
    workdir, result = finished
    monkeypatch.setattr(train, "prepare", lambda config: pytest.fail("it prepared a run"))
    renewed = (".lock", "report.html")
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.name not in renewed}
    assert train.train_and_evaluate(tiny("eval.protocol=both"), workdir) == result
    out = capsys.readouterr().out
    assert f"{result['test']['hr@5']:.4f}" in out and f"run: {workdir}" in out
    assert before == {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.name not in renewed}


def test_other_config_in_the_same_workdir_is_refused(finished, tiny):
    with pytest.raises(UserError, match=r"another config; eval\.protocol: \"both\" -> \"paper\""):
        train.train_and_evaluate(tiny("eval.protocol=paper"), finished[0])


def test_evaluate_finds_the_saved_metrics_again(finished, tiny, capsys):
    workdir, result = finished
    assert train.evaluate_workdir(tiny("eval.protocol=both"), workdir) == pytest.approx(result["test"], rel=1e-6)
    assert f"test, epoch {result['best_epoch']}" in capsys.readouterr().out.replace("\n", " ")


@pytest.fixture(scope="module")
def validation_run(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("validation")
    return workdir, train.train_and_evaluate(tiny(variant=":sasrec"), workdir)


@pytest.fixture(scope="module")
def paper_run(tiny, tmp_path_factory):
    """Item ids alone."""
    workdir = tmp_path_factory.mktemp("paper")
    settings = ("eval.protocol=paper", "eval.every=2")
    return workdir, train.train_and_evaluate(tiny(*settings, variant=":sasrec"), workdir)


def test_validation_protocol_tests_once_and_has_no_paper_numbers(validation_run):
    workdir, result = validation_run
    check_files(workdir, result, selects=True)
    assert result["protocol"] == "validation" and result["paper"] is None and result["paper_epochs"] is None
    refit = [line for line in read_log(workdir) if line["phase"] == "refit"]
    assert [line["epoch"] for line in refit if "metrics" in line] == [result["best_epoch"]] == [result["epochs"]]
    assert {name: result["test"][name] for name in NAMES} == pytest.approx(
        metrics_of(read_ranks(workdir)["rank"]), 1e-6
    )


def test_papers_protocol_has_no_test_nor_validation_numbers(paper_run):
    workdir, result = paper_run
    check_files(workdir, result, selects=False)
    assert result["teacher"] == {} and read_log(workdir)[0]["losses"].keys() == {"next_item", "loss", "gradient_norm"}
    assert (result["protocol"], result["test"], result["validation"], result["best_epoch"]) == (
        "paper",
        None,
        None,
        None,
    )
    metrics = {line["epoch"]: line["metrics"] for line in read_log(workdir) if "metrics" in line}
    assert list(metrics) == [2, 3]  # every second epoch, and the last one
    assert result["paper"] == {name: max(m[name] for m in metrics.values()) for name in NAMES}
    ranks = read_ranks(workdir)
    assert ranks["epoch"] == result["paper_epochs"]["mrr@20"]
    assert metrics_of(ranks["rank"])["mrr@20"] == pytest.approx(result["paper"]["mrr@20"], rel=1e-6)


def test_evaluate_labels_the_papers_protocol(paper_run, tiny, capsys):
    workdir, result = paper_run
    config = tiny("eval.protocol=paper", "eval.every=2", variant=":sasrec")
    assert train.evaluate_workdir(config, workdir)["mrr@20"] == pytest.approx(result["paper"]["mrr@20"], rel=1e-6)
    assert "paper's protocol" in " ".join(capsys.readouterr().out.split())


def test_evaluate_refuses_an_unfinished_run(tiny, tmp_path):
    with Workdir(tmp_path, tiny()):
        pass
    with pytest.raises(UserError, match="not finished"):
        train.evaluate_workdir(tiny(), tmp_path)
    assert (tmp_path / "config.json").exists()


def with_other_test_items(dataset):
    """Permute the items among all test instances, so that the item set and all train parts stay."""
    interactions = dataset.interactions
    items = interactions.items.copy()
    parts = train_lengths(interactions.lengths)
    test = np.concatenate(
        [
            np.arange(start + part, end)
            for start, part, end in zip(interactions.offsets, parts, interactions.offsets[1:], strict=False)
        ]
    )
    items[test] = np.random.default_rng(0).permutation(items[test])
    assert (items != interactions.items).sum() > len(test) / 2
    return dataclasses.replace(dataset, interactions=dataclasses.replace(interactions, items=items))


def stop(*_):
    raise KeyboardInterrupt


def test_select_never_sees_a_test_item(finished, tiny, tmp_path, monkeypatch, newest_checkpoint):
    workdir, _ = finished
    config, load = tiny("eval.protocol=both"), train.load_dataset
    wanted = newest_checkpoint(workdir, config, "select")
    monkeypatch.setattr(train, "load_dataset", lambda data, modalities: with_other_test_items(load(data, modalities)))
    monkeypatch.setattr(train, "refit_phase", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, tmp_path)
    chosen = [json.loads((folder / "selection.json").read_text()) for folder in (workdir, tmp_path)]
    kept = [{name: value for name, value in c.items() if not name.endswith("seconds")} for c in chosen]
    assert kept[0] == kept[1]
    timed = ("train_seconds", "eval_seconds", "targets_per_second")
    lines = [[line for line in read_log(folder) if line["phase"] == "select"] for folder in (workdir, tmp_path)]
    lines = [[{k: v for k, v in line.items() if k not in timed} for line in log] for log in lines]
    assert lines[0] == lines[1]
    got = newest_checkpoint(tmp_path, config, "select")
    assert got[0] == wanted[0] == 3
    jax.tree.map(np.testing.assert_array_equal, got[1], wanted[1])


@pytest.mark.slow
def test_frozen_tables_of_two_modalities_stay_as_they_are(tiny, tmp_path, newest_checkpoint):
    config = tiny("data.modalities=image-random,text-random", "train.clip_norm=1", variant=":sasrm")
    result = train.train_and_evaluate(config, tmp_path)
    state = newest_checkpoint(tmp_path, config, "refit")[1]
    tables = train.prepare(config).tables
    held = {f"{name}_{what}" for name in ("image", "text") for what in ("embedding", "has_feature")}
    assert state.frozen.keys() == held and result["teacher"].keys() == tables.keys()
    for name, table in tables.items():
        np.testing.assert_array_equal(state.frozen[f"{name}_embedding"]["embedding"], table)
        assert f"{name}_embedding" not in state.params and np.abs(table).max() > 0
    assert read_log(tmp_path)[0]["learning_rates"].keys() == {"body"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gru4rec", "tuned-sasrec", "kdsr-srgnn"])  # tests/models runs every model
def test_variants_run_through_both_phases(tiny, tmp_path, variant):
    shop = ("num_users=48", "num_items=36", "mean_length=9", "feature_dim=16")  # histories of many lengths
    settings = ("data.name=planted", "data.modalities=image-facets,text-facets", "data.k_core=2", "train.epochs=2")
    config = tiny(*settings, *(f"data.planted.{setting}" for setting in shop), variant=f":{variant}")
    result = train.train_and_evaluate(config, tmp_path)
    check_files(tmp_path, result, selects=True)
    assert all(0 <= result["test"][name] <= 100 for name in NAMES)
    losses = read_log(tmp_path)[0]["losses"].keys()
    assert ("holistic/text" in losses) == variant.startswith("kdsr")


def test_bad_settings_for_the_data_leave_no_workdir(tiny, tmp_path):
    with pytest.raises(UserError, match="condensed_dim=32"):
        train.train_and_evaluate(tiny("model.dim=32"), tmp_path / "runs" / "a")
    with pytest.raises(UserError, match="num_codes=5000"):
        train.train_and_evaluate(tiny("teacher.num_codes=5000"), tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []


# When phases stop: the phases' rules on evaluations made by hand.


def evaluations_of(*values, metric="mrr@20", every=1):
    return [{"epoch": every * (i + 1), "metrics": {metric: value}} for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def phases(tiny):
    """Return a function (*settings) -> (select phase, function e* -> refit phase); nothing is compiled."""

    def make(*settings, variant=":sasrec"):
        config = tiny(*settings, variant=variant)
        student = types.SimpleNamespace(trained_on="positions")
        run = train.Run(config, train.load_dataset(config.data), student, {}, {}, {}, {}, None)
        return train.select_phase(run), lambda best_epoch: train.refit_phase(run, best_epoch)

    return make


def test_select_stops_after_patience_evaluations_without_a_new_best(phases):
    select, _ = phases("train.patience=2")
    assert not select.finished([])
    assert not select.finished(evaluations_of(3.0))
    assert not select.finished(evaluations_of(3.0, 2.0))
    assert select.finished(evaluations_of(3.0, 2.0, 1.0))
    assert select.finished(evaluations_of(3.0, 3.0, 3.0))  # an equal value is no new best
    assert not select.finished(evaluations_of(3.0, 2.0, 4.0, 3.5))
    assert select.finished(evaluations_of(3.0, 2.0, 4.0, 3.5, 3.9))


def test_select_evaluates_every_so_many_epochs_and_after_the_last(phases):
    select, _ = phases("train.epochs=7", "eval.every=3")
    assert [epoch for epoch in range(1, 8) if select.evaluates(epoch)] == [3, 6, 7]
    assert select.epochs == 7


def test_a_warm_up_is_not_evaluated(phases):
    # Else it would use up the patience before anything is trained to recommend.
    settings = ("train.epochs=7", "eval.every=2", "model.warmup_epochs=4", "eval.protocol=paper")
    select, refit = phases(*settings, variant=":mmsrec")
    for phase in (select, refit(None)):
        assert [epoch for epoch in range(1, 8) if phase.evaluates(epoch)] == [6, 7]


def test_select_watches_mrr_at_20_whatever_the_cutoffs(phases):
    select, _ = phases("train.patience=1", "eval.topk=5,10")
    assert select.finished(evaluations_of(2.0, 1.0, metric="mrr@20"))
    assert [select.score(evaluation) for evaluation in evaluations_of(2.0, 1.5, metric="mrr@20")] == [2.0, 1.5]


def test_first_of_equal_epochs_is_chosen(tiny):
    run = train.Run(tiny(), None, None, {}, {}, {}, {}, None)
    record = {"evaluations": evaluations_of(1.0, 4.0, 4.0), "epoch": 3, "train_seconds": 1.0, "eval_seconds": 2.0}
    assert train._summarise_select(run, record)["best_epoch"] == 2


def test_validation_refit_tests_at_the_chosen_epoch_only(phases):
    refit = phases("eval.protocol=validation", "train.epochs=9", "train.patience=1")[1](4)
    assert refit.epochs == 4
    assert [epoch for epoch in range(1, 5) if refit.evaluates(epoch)] == [4]
    assert not refit.finished([]) and not refit.finished(evaluations_of(3.0, 2.0, 1.0))


def test_paper_refit_stops_when_no_metric_has_a_new_best(phases):
    refit = phases("eval.protocol=paper", "train.patience=2")[1](None)

    def history(*pairs):
        return [
            {"epoch": i + 1, "metrics": {"hr@5": hit, "mrr@20": reciprocal, "coverage@20": 10.0 * i}}
            for i, (hit, reciprocal) in enumerate(pairs)
        ]

    assert not refit.finished([])
    assert not refit.finished(history((1, 1), (0, 0)))
    assert refit.finished(history((1, 1), (0, 0), (1, 1)))  # rising coverage is no reason to go on
    assert not refit.finished(history((1, 1), (0, 2), (2, 0)))
    assert not refit.finished(history((1, 1), (0, 0), (0, 2), (0, 0)))
    assert refit.finished(history((1, 1), (0, 0), (0, 2), (0, 0), (1, 2)))
    assert refit.score(history((1, 1), (2, 3))[-1]) == 3


def test_refit_of_both_waits_for_the_chosen_epoch(phases):
    refit = phases("eval.protocol=both", "train.patience=1", "train.epochs=9", "eval.every=2")[1](5)
    assert refit.epochs == 9
    assert [epoch for epoch in range(1, 10) if refit.evaluates(epoch)] == [2, 4, 5, 6, 8, 9]
    falling = [{"epoch": epoch, "metrics": {"mrr@20": 10.0 - epoch}} for epoch in (2, 4, 5)]
    assert not refit.finished(falling[:2])
    assert refit.finished(falling)
    # The checkpoint of e* is the one to keep, whatever its metrics.
    assert [refit.score(evaluation) for evaluation in falling] == [0.0, 0.0, 1.0]


def test_select_trains_on_all_but_the_held_out_item(phases):
    select, refit = phases()
    held_out, train_targets = select.evaluation.targets()[2], select.train.targets()[2]
    tested, refit_targets = refit(1).evaluation.targets()[2], refit(1).train.targets()[2]
    assert len(np.intersect1d(held_out, train_targets)) == 0
    assert sorted(np.concatenate([held_out, train_targets])) == sorted(refit_targets)
    assert len(np.intersect1d(tested, refit_targets)) == 0


def test_one_target_a_prefix_trains_on_the_same_targets_and_changes_no_evaluation(phases):
    together, alone = phases()[0], phases("train.prefixes=true")[0]
    assert sorted(alone.train.targets()[2]) == sorted(together.train.targets()[2])
    assert (alone.train.counts == 1).all() and together.train.counts.max() > 1
    for one, other in zip(alone.evaluation.targets(), together.evaluation.targets(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("precision", "written"), [("default", "DEFAULT"), ("float32", "HIGHEST"), ("tf32", "HIGH,"), ("bf16", "bf16")]
)
def test_matrix_products_have_the_precision_asked_for(tiny, precision, written, monkeypatch):
    run = train.prepare(tiny(f"train.matmul_precision={precision}", variant=":sasrec"))
    runner = PhaseRunner(run, train.refit_phase(run, 1), folder=None)
    run_chunk = runner.trainer.run_chunk
    monkeypatch.setattr(
        runner.trainer, "run_chunk", lambda *given, **static: run_chunk.lower(*given, **static).as_text()
    )
    text = runner.train_chunk(runner._abstract_state(), 0)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and [line for line in products if written not in line] == []
    rounded = [line for line in products if "bf16>" in line]  # by hand: the softmax over all items
    assert len(rounded) == (3 * len(runner.batches.buckets) if precision == "bf16" else 0)


def test_rankings_have_the_precision_of_training_and_teachers_that_of_float32(finished, tiny, monkeypatch, tmp_path):
    seen = []

    def looking(name, function):
        def look(*arguments, **options):
            seen.append((name, jax.config.jax_default_matmul_precision))
            return function(*arguments, **options)

        return look

    monkeypatch.setenv("KDSR_CACHE", str(tmp_path))  # which holds no teacher yet
    monkeypatch.setattr("kdsr_jax.teacher.fit_teacher", looking("teacher", fit_teacher))
    monkeypatch.setattr("kdsr_jax.evaluate.Evaluator.rank", looking("rank", Evaluator.rank))
    run = train.prepare(tiny("train.matmul_precision=tf32"))
    runner = PhaseRunner(run, train.refit_phase(run, 1), folder=None)
    runner.evaluate(runner.new_state())
    assert seen == [("teacher", "float32"), ("rank", "tensorfloat32")]


def test_a_compiled_chunk_needs_nothing_from_the_host(tiny):
    run = train.prepare(tiny())
    runner = PhaseRunner(run, train.refit_phase(run, 1), folder=None)
    state, _ = runner.train_chunk(runner.new_state(), 0)
    same = next(i for i in range(1, 99) if runner.batches.chunk(i)[0] == runner.batches.chunk(0)[0])
    with jax.transfer_guard("disallow"):  # compiling, the first call brings constants to the device
        jax.block_until_ready(runner.train_chunk(state, same))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("eval.filter_seen=true", "model.name=srgnn", "distill.enabled=false"),
    ],
)
def test_histories_that_stay_on_the_host_train_and_rank_to_the_same_bits(tiny, words):
    states, ranks = [], []
    for where in ("device", "host"):
        run = train.prepare(tiny(f"data.histories={where}", *words))
        runner = PhaseRunner(run, train.refit_phase(run, 1), folder=None)
        state, chunks = runner.new_state(), range(runner.batches.chunks_per_epoch)
        for index in chunks:
            state, _ = runner.train_chunk(state, index)
        states.append(jax.device_get(state))
        ranks.append(runner.evaluate(state)[1])
        assert runner._gradient_norms(state).keys() or not run.student.modalities
    jax.tree.map(np.testing.assert_array_equal, *states)
    np.testing.assert_array_equal(*ranks)


def test_more_pairs_than_can_be_drawn_from_are_one_line(tiny, monkeypatch):
    monkeypatch.setattr("kdsr_jax.phase.MOST_PAIRS", 8)
    run = train.prepare(tiny())
    with pytest.raises(
        UserError, match=r"--config.train.batch_size: a batch has .* rows of 4 positions, .* more than 8;"
    ):
        PhaseRunner(run, train.refit_phase(run, 1), folder=None)
