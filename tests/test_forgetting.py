"""Modality forgetting: the pairs and spaces that are compared, its lines in the log, and the reference run."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from kdsr_jax import forgetting, reporting, train
from kdsr_jax.errors import UserError
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROTOCOL = "eval.protocol=both"
TWO = "data.modalities=image-random,text-random"


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curve(workdir):
    return [(line["phase"], line["epoch"], line["forgetting"]) for line in read_log(workdir)]


@pytest.fixture(scope="module")
def run(tiny):
    return train.prepare(tiny())


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """Workdir of a finished run of item ids alone."""
    workdir = tmp_path_factory.mktemp("reference") / "ids"
    train.train_and_evaluate(tiny(variant=":sasrec"), workdir)
    return workdir


def params_of(**tables):
    return {f"{name}_embedding": {"embedding": table} for name, table in tables.items()}


def cosines_of(table, pairs):
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)
    return (unit[pairs[0]] * unit[pairs[1]]).sum(1)


def test_values_are_those_of_plain_numpy_over_all_pairs_of_covered_items(run):
    feature = run.dataset.features["image"]
    covered = np.flatnonzero(feature.has_feature)
    assert len(covered) == 35 and len(feature.values) == 37  # a padding row and an item without the feature
    pairs = [covered[index] for index in np.triu_indices(35, 1)]
    raw = feature.values.astype(np.float64) - feature.values[covered].mean(0)
    table = np.random.default_rng(0).normal(size=(37, 8)).astype(np.float32)
    measured = forgetting.make_forgetting(run).measure(params_of(image=table))
    expected = np.corrcoef(cosines_of(table, pairs), cosines_of(raw, pairs))[0, 1]
    assert measured == {"image": {"features": pytest.approx(expected, abs=1e-5)}}


def test_the_features_themselves_turned_and_scaled_are_retained_whole(run):
    raw = forgetting.centred(run.dataset.features["image"])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    measured = forgetting.make_forgetting(run).measure(params_of(image=(3 * raw @ turn).astype(np.float32)))
    assert measured["image"]["features"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 5)])
def test_zero_vectors_are_left_out(run, rows):
    measured = forgetting.make_forgetting(run)
    raw = forgetting.centred(run.dataset.features["image"])
    emptied = raw.copy()
    emptied[rows] = 0
    value = measured.measure(params_of(image=emptied))["image"]["features"]
    assert value == pytest.approx(0 if rows == slice(None) else 1, abs=1e-5)


def test_pairs_are_a_sample_of_the_asked_size_and_the_same_for_every_seed(tiny):
    runs = [train.prepare(tiny(f"seed={seed}", "forgetting.num_pairs=100")) for seed in (0, 7)]
    pairs = [[np.asarray(p) for p in forgetting.make_forgetting(r).spaces["image"][:2]] for r in runs]
    np.testing.assert_array_equal(*pairs)
    first, second = pairs[0]
    assert first.shape == (100,) and (first < second).all() and (first > 0).all()
    assert runs[0].dataset.features["image"].has_feature[[first, second]].all()


@pytest.mark.parametrize(("settings", "variant"), [(["forgetting.num_pairs=0"], ""), ([], ":sasrm"), ([], ":sasrec")])
def test_nothing_is_measured_where_it_is_off_or_nothing_is_tuned(tiny, settings, variant):
    missing = "forgetting.reference_workdir=missing"  # which is then of no use
    assert forgetting.make_forgetting(train.prepare(tiny(missing, *settings, variant=variant))) is None


def test_every_phase_logs_epoch_0_and_every_epoch(finished):
    lines = curve(finished[0])
    assert [line[:2] for line in lines] == [(phase, epoch) for phase in ("select", "refit") for epoch in range(4)]
    assert all(line[2].keys() == {"image"} and line[2]["image"].keys() == {"features"} for line in lines)
    assert all(-1 <= line[2]["image"]["features"] <= 1 for line in lines)
    assert lines[0][2] == lines[4][2] and lines[0][2] != lines[1][2]  # both phases begin as the features were condensed
    assert read_log(finished[0])[0].keys() == {"phase", "epoch", "forgetting"}


@pytest.mark.slow
def test_a_run_that_measures_nothing_trains_the_same(finished, tiny, tmp_path, newest_checkpoint):
    config = tiny(PROTOCOL, "forgetting.num_pairs=0")
    train.train_and_evaluate(config, tmp_path)
    assert not any("forgetting" in line for line in read_log(tmp_path))
    got, wanted = (newest_checkpoint(folder, config, "refit")[1] for folder in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.slow
def test_going_on_repeats_no_line(finished, tiny, tmp_path, monkeypatch):
    """Stopped before the first checkpoint of a phase, whose line of epoch 0 is then there already, and later."""
    train_epoch = PhaseRunner.train_epoch
    for phase, epoch in (("select", 1), ("select", 2), ("refit", 1), ("refit", 3)):

        def stopped(self, state, number, last_metrics=(), stop=(phase, epoch)):
            if (self.phase.name, number) == stop:
                raise KeyboardInterrupt
            return train_epoch(self, state, number, last_metrics)

        monkeypatch.setattr(PhaseRunner, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(PROTOCOL), tmp_path)
        assert curve(tmp_path)[-1][:2] == (phase, epoch - 1)
    monkeypatch.setattr(PhaseRunner, "train_epoch", train_epoch)
    train.train_and_evaluate(tiny(PROTOCOL), tmp_path)
    assert curve(tmp_path) == curve(finished[0])


def test_log_is_cut_before_epoch_0_of_a_phase(tmp_path, tiny):
    with Workdir(tmp_path, tiny()) as folder:
        for phase, epoch in [("select", 0), ("select", 1), ("refit", 0)]:
            folder.log(phase=phase, epoch=epoch)
        folder.truncate_log("refit", -1)
        assert [line["phase"] for line in read_log(tmp_path)] == ["select", "select"]
        folder.truncate_log("select", -1)
        assert read_log(tmp_path) == []


def test_the_terminal_line_is_brief():
    values = {"image": {"features": 0.981, "ids": 0.1}, "text": {"features": -0.5, "ids": 0.25}}
    line = {"phase": "select", "epoch": 0, "forgetting": values}
    wanted = "select epoch 0/9  like features: image 0.98 text -0.50; ids: image 0.10 text 0.25"
    assert reporting.describe_epoch(line, 9) == wanted
    assert "like" not in reporting.describe_epoch({"phase": "select", "epoch": 0, "forgetting": {}}, 9)


# The reference run.


def test_ids_of_the_reference_run_are_compared_with(reference, tiny, tmp_path):
    config = tiny(TWO, f"forgetting.reference_workdir={reference}", "train.epochs=1")
    train.train_and_evaluate(config, tmp_path)
    values = [line[2] for line in curve(tmp_path)]
    assert len(values) == 4 and all(v.keys() == {"image", "text"} for v in values)
    assert all(v["text"].keys() == {"features", "ids"} and np.isfinite(v["text"]["ids"]) for v in values)


def test_items_of_the_reference_run_are_aligned_by_raw_id(reference, run, tmp_path, newest_checkpoint, tiny):
    table = newest_checkpoint(reference, tiny(variant=":sasrec"), "refit")[1].params["item_embedding"]["embedding"]
    ours = forgetting.reference_table(reference, run.config, run.dataset.interactions)
    np.testing.assert_array_equal(ours, table)
    turned = shutil.copytree(reference, tmp_path / "turned")
    with np.load(turned / "ids.npz") as file:
        ids = dict(file)
    ids["item_ids"] = np.concatenate([ids["item_ids"][:1], ids["item_ids"][:0:-1]])
    np.savez(turned / "ids.npz", **ids)
    turned_table = forgetting.reference_table(turned, run.config, run.dataset.interactions)
    np.testing.assert_array_equal(turned_table[1:], table[:0:-1])
    assert not turned_table[0].any()


def test_measuring_against_the_reference_run_finds_its_own_table_again(reference, tiny):
    run = train.prepare(tiny(f"forgetting.reference_workdir={reference}"))
    table = forgetting.reference_table(reference, run.config, run.dataset.interactions)
    measured = forgetting.make_forgetting(run).measure(params_of(image=table))
    assert measured["image"]["ids"] == pytest.approx(1, abs=1e-5)
    assert abs(measured["image"]["features"]) < 0.5


@pytest.fixture
def complaint(reference, tiny, tmp_path):
    """Return a function (change, *settings) -> the error of a run whose reference, a copy, was changed by a function."""

    def make(change, *settings):
        folder = shutil.copytree(reference, tmp_path / "reference")
        change(folder)
        with pytest.raises(UserError) as caught:
            train.train_and_evaluate(tiny(f"forgetting.reference_workdir={folder}", *settings), tmp_path / "run")
        assert not (tmp_path / "run").exists()  # so that a corrected command can start
        message = str(caught.value)
        assert message.startswith(f"--config.forgetting.reference_workdir={folder}: ") and "\n" not in message
        return message

    return make


def rewrite(folder, group, **fields):
    saved = json.loads((folder / "config.json").read_text())
    saved["config"][group].update(fields)
    (folder / "config.json").write_text(json.dumps(saved))


def resave_ids(folder, **changed):
    with np.load(folder / "ids.npz") as file:
        ids = dict(file)
    np.savez(folder / "ids.npz", **ids | changed)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shutil.rmtree, "holds no run"),
        (lambda folder: os.remove(folder / "ids.npz"), "holds no run"),
        (lambda folder: (folder / "ids.npz").write_bytes(b"PK"), "holds no run"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no run"),
        (lambda folder: (folder / "config.json").write_text('{"config": {}}'), "holds no run"),
        (lambda folder: os.remove(folder / "result.json"), "is not finished"),
        (lambda folder: rewrite(folder, "model", tables="frozen"), "no run of item ids alone"),
        (lambda folder: rewrite(folder, "model", name="mmsr"), "no run of item ids alone"),
        (lambda folder: rewrite(folder, "data", k_core=3), "other data (data.k_core: 3 -> 1)"),
        (lambda folder: resave_ids(folder, item_ids=np.array(["", "x"])), "other data (other users or items)"),
        (lambda folder: resave_ids(folder, user_ids=np.array(["x"])), "other data (other users or items)"),
    ],
)  # fmt: skip
def test_a_reference_that_is_none_is_one_line(complaint, change, expected):
    assert expected in complaint(change)
