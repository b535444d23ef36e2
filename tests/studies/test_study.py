"""The runner of studies: what is planned, skipped, resumed, kept, and drawn."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments import significance
from experiments import study as module
from experiments.results import Store, same_config
from experiments.study import Setting, Study, main

TINY = [
    *("--datasets=planted", "--config.data.planted.num_users=60", "--config.data.planted.num_items=40"),
    *("--config.data.planted.mean_length=8", "--config.data.planted.feature_dim=16", "--config.model.dim=8"),
    *("--config.teacher.num_codes=8", "--config.teacher.num_splits=4", "--config.teacher.num_pairs=500"),
    "--epochs=1",
]


def table(rows):
    return "".join(f"{row['kind']} {row['label']} {row.get('seed', row.get('metric'))}\n" for row in rows)


@pytest.fixture
def work(monkeypatch):
    """Stand in for training; ``calls`` are the folders it was given."""

    class Work:
        __name__ = "train"

        def __init__(self):
            self.calls = []

        def __call__(self, config, workdir):
            self.calls.append(workdir)
            workdir.mkdir()
            np.savez(workdir / "ranks.npz", user=[0, 1], position=[1, 1], target=[3, 4], rank=[1, 2])
            result = {"test": {"hr@20": 1.0}, "train_seconds": 60.0, "eval_seconds": 3.0}
            (workdir / "result.json").write_text(json.dumps(result))
            return result

    work = Work()
    monkeypatch.setattr(module, "train", work)
    return work


@pytest.fixture
def run(work, tmp_path, capsys):
    """Run a study of stand-ins; returns (exit code, stdout, stderr)."""

    def execute(*words, study=None):
        study = study or make_study(work)
        code = main(study, [*TINY, f"--folder={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


def make_study(work, **changes):
    settings = {
        "ids": Setting("sasrec"),
        "tuned": Setting("tuned-sasrm"),
        "KDSR": Setting("", ("distill.lambda_code=0.1",)),
    }
    values = {"name": "some", "title": "Some", "settings": settings, "table": table, "work": work} | changes
    return Study(**values)


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "results" / "some" / "runs.jsonl").read_text().splitlines()]


def test_every_setting_and_seed_runs_once_and_stands_in_the_table(run, work, tmp_path):
    code, out, _ = run("--seeds=0,1")
    assert code == 0 and len(work.calls) == 6 and len(set(work.calls)) == 6
    rows = rows_of(tmp_path)
    assert [(row["label"], row["seed"]) for row in rows] == [(n, s) for n in ("ids", "tuned", "KDSR") for s in (0, 1)]
    assert rows[4]["config"]["distill.lambda_code"] == 0.1 and rows[4]["config"]["seed"] == 0
    assert rows[4]["words"] == ["distill.lambda_code=0.1"] and rows[4]["test"] == {"hr@20": 1.0}
    assert (tmp_path / "results" / "some" / "table.md").read_text() == "# Some\n\n" + table(rows)
    assert "[6/6] some: planted, KDSR, seed 1" in out
    code, out, _ = run("--seeds=0,1")
    assert code == 0 and len(work.calls) == 6 and "6 of 6 runs stand in" in out


def test_a_run_of_another_study_is_taken_over_when_its_folder_is_gone(run, work, tmp_path):
    run()
    shutil.rmtree(tmp_path / "runs")
    called = len(work.calls)
    other = make_study(work, name="other", settings={"plain tuning": Setting("tuned-sasrm"), "new": Setting("gru4rec")})
    assert run(study=other)[0] == 0
    assert len(work.calls) == called + 1  # what is new
    text = (tmp_path / "results" / "other" / "runs.jsonl").read_text()
    row = next(row for row in map(json.loads, text.splitlines()) if row.get("label") == "plain tuning")
    assert row["test"] == {"hr@20": 1.0} and row["variant"] == "tuned-sasrm"
    # What has more to measure goes to the folder, and so is trained again.
    measured = make_study(work, name="third", settings=other.settings, measures={"size": lambda *_: {"n": 1}})
    shutil.rmtree(tmp_path / "runs")
    assert run(study=measured)[0] == 0
    assert len(work.calls) == called + 3
    # What is measured of ranks is measured of those that are kept.
    shutil.rmtree(tmp_path / "runs")
    ranked = {"best": lambda config, ranks: {"rank": int(ranks["rank"].min())}}
    assert run(study=make_study(work, name="fourth", settings=other.settings, rank_measures=ranked))[0] == 0
    assert len(work.calls) == called + 3
    text = (tmp_path / "results" / "fourth" / "runs.jsonl").read_text()
    assert [json.loads(line)["measures"] for line in text.splitlines()] == [{"best": {"rank": 1}}] * 2


def test_ranks_that_are_damaged_end_in_one_line_at_the_end(run, work, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write_bytes(b"no arrays"))
    code, _, errors = run(study=make_study(work, rank_measures={"best": lambda config, ranks: {}}))
    assert code == 1 and errors.count("ranks.npz") == 3 and "Traceback" not in errors


def test_a_new_field_of_the_config_leaves_the_folders_of_runs_as_they_are(work, tmp_path, monkeypatch):
    def folders():
        return [job.workdir for job in module.plan(make_study(work), _arguments(tmp_path), TINY[1:-1])]

    now, relevant = folders(), module.records.relevant
    monkeypatch.setattr(
        module.records, "relevant", lambda c: {k: v for k, v in relevant(c).items() if k != "train.prefixes"}
    )
    assert folders() == now and len(set(now)) == 3


def test_what_changed_is_run_again_and_takes_the_place_of_the_old(run, work, tmp_path):
    run()
    run("--config.model.num_layers=1")
    assert len(work.calls) == 6 and [row["config"]["model.num_layers"] for row in rows_of(tmp_path)] == [1, 1, 1]
    run("--config.model.num_layers=1", "--again")
    assert len(work.calls) == 6  # their folders hold the results


def test_a_run_that_fails_is_listed_and_done_at_the_next_call(run, work, tmp_path, monkeypatch):
    monkeypatch.setattr(work.__class__, "__call__", fail_once(work.__class__.__call__, "sasrec"))
    code, _, err = run()
    assert code == 1 and err == "failed: planted, ids, seed 0: MemoryError: no room\n"
    assert [row["label"] for row in rows_of(tmp_path)] == ["tuned", "KDSR"]
    code, _, err = run()
    assert (code, err) == (0, "")
    assert [row["label"] for row in rows_of(tmp_path)] == ["ids", "tuned", "KDSR"]


def fail_once(call, start):
    failed = []

    def work(self, config, workdir):
        if workdir.name.startswith(start) and not failed:
            failed.append(workdir)
            raise MemoryError("no room\nfor this")
        return call(self, config, workdir)

    return work


def test_runs_of_several_days_are_compared_when_their_folders_are_gone(work, run, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(significance, "compare_runs", lambda pairs: compared.append(len(pairs)) or [{"metric": "hr@5"}])
    study = make_study(work, reference="KDSR")
    for words, expected in (
        (["--only=ids; KDSR"], [1]),  # one seed of one pair
        (["--only=tuned"], [1, 1]),  # KDSR's ranks are kept
        ([], [1, 1]),  # nothing new
        (["--seeds=1", "--only=KDSR; ids"], [1, 1, 2]),  # with seed 0, which is not asked for
        (["--seeds=0"], [1, 1, 2]),
    ):
        assert run(*words, study=study)[0] == 0 and compared == expected
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    kept = [row for row in rows_of(tmp_path) if row["kind"] == "comparison"]
    assert [(row["label"], row["seeds"]) for row in kept] == [("ids", [0, 1]), ("tuned", [0])]


def test_a_killed_study_has_compared_what_it_could(work, run, tmp_path, monkeypatch):
    def killed(self, config, workdir):
        if workdir.name.startswith("tuned"):
            raise KeyboardInterrupt
        return call(self, config, workdir)

    call = work.__class__.__call__
    study = make_study(
        work, reference="ids", settings={n: make_study(work).settings[n] for n in ("ids", "KDSR", "tuned")}
    )
    monkeypatch.setattr(significance, "compare_runs", lambda pairs: [{"metric": "hr@5"}])
    monkeypatch.setattr(work.__class__, "__call__", killed)
    assert run(study=study)[0] == 130
    assert [row["label"] for row in rows_of(tmp_path) if row["kind"] == "comparison"] == ["KDSR"]


def test_comparisons_with_another_reference_or_without_groups_are_made_anew(work, run, tmp_path, monkeypatch):
    def found():
        rows = [row for row in rows_of(tmp_path) if row["kind"] == "comparison"]
        return [(row["reference"], row["label"], row.get("group")) for row in rows]

    monkeypatch.setattr(significance, "compare_runs", lambda pairs, inside=None: [{"metric": "hr@5"}])
    settings = {name: make_study(work).settings[name] for name in ("ids", "KDSR")}
    run(study=make_study(work, settings=settings, reference="KDSR"))
    assert found() == [("KDSR", "ids", None)]
    run(study=make_study(work, settings=settings, reference="ids"))
    assert found() == [("ids", "KDSR", None)]
    run(study=make_study(work, settings=settings, reference="ids", groups=lambda config: {"rare": None}))
    assert found() == [("ids", "KDSR", None), ("ids", "KDSR", "rare")]


def test_shards_part_the_runs(run, work, tmp_path):
    for part in (1, 2):
        assert run(f"--shard={part}/2", "--seeds=0,1,2", f"--results={tmp_path / str(part)}")[0] == 0
    assert len(work.calls) == len(set(work.calls)) == 9


def test_dry_run_estimates_by_what_ran_and_runs_nothing(run, work, tmp_path):
    _, out, _ = run("--dry-run")
    assert out.count("no idea how long") == 3 and out.endswith("in all 0:00:00 and 3 runs of unknown length\n")
    assert not work.calls and not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()
    run("--only=ids")
    _, out, _ = run("--dry-run", "--seeds=0,1")
    assert re.search(r"planted, ids, seed 1: 0:01:03, \S*/planted/sasrec-\w{10}-seed1\n", out)
    assert "ids, seed 0" not in out and out.endswith("in all 0:01:03 and 4 runs of unknown length\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--datasets=books"], "error: --datasets: there is no 'books'; there are planted, beauty"),
        (["--only=KDRS"], "error: --only: there is no 'KDRS'; there are ids, tuned, KDSR"),
        (["--seeds=0,x"], "error: --seeds: 'x' is not a whole number"),
        (["--shard=3/2"], "error: --shard=3/2: write i/n with i from 1 to n"),
        (["--config.model.dmi=8"], "error: --config.model.dmi: unknown config field"),
        (["--epochs=0"], "error: --config.train.epochs=0"),
        (["--config.eval.topk=10,20"], "error: --config.eval.topk: studies show cut-offs 5 and 20"),
    ],
)
def test_a_mistake_is_one_line(run, work, words, line):
    code, _, err = run(*words)
    assert code == 2 and err.startswith(line) and err.count("\n") == 1 and not work.calls


def test_absent_data_is_left_out_with_a_word(run, work, tmp_path):
    code, out, _ = run("--datasets=beauty,planted", f"--config.data.root={tmp_path}")
    assert code == 0 and f"beauty: left out, there is no folder {tmp_path / 'beauty'}" in out
    assert len(work.calls) == 3
    code, out, _ = run("--datasets=beauty,planted")
    assert code == 0 and "beauty: left out, there is no folder beauty; give --config.data.root=PATH" in out


def test_a_model_that_clusters_features_is_left_out_without_them(run, work, tmp_path):
    (tmp_path / "beauty").mkdir()
    study = make_study(work, settings={"ids": Setting("sasrec"), "clusters": Setting("mmsr")})
    code, out, _ = run("--datasets=beauty", f"--config.data.root={tmp_path}", study=study)
    assert code == 0 and "beauty: left out, there is no" in out and "text-minilm.npz" in out
    assert [folder.name.split("-")[0] for folder in work.calls] == ["sasrec"]


def test_a_setting_may_name_the_folder_of_one_before_it(work, run, tmp_path):
    settings = {"ids": Setting("sasrec"), "KDSR": Setting("", ("forgetting.reference_workdir={ids}",))}
    assert run(study=make_study(work, settings=settings))[0] == 0
    plain, pointed = work.calls
    assert pointed != plain
    seen = module.plan(
        make_study(work, settings=settings), _arguments(tmp_path), [*TINY[1:-1], "--config.train.epochs=1"]
    )
    assert seen[1].config.forgetting.reference_workdir == str(plain) and seen[1].workdir == pointed


def test_a_run_against_another_reference_is_not_done(work, run, tmp_path):
    def study(rate):
        settings = {"ids": Setting("sasrec", (f"train.learning_rate={rate}",))}
        return make_study(work, settings=settings | {"KDSR": Setting("", ("forgetting.reference_workdir={ids}",))})

    assert run(study=study(0.1))[0] == 0 and len(work.calls) == 2
    assert run(study=study(0.1))[0] == 0 and len(work.calls) == 2
    assert run(study=study(0.2))[0] == 0 and len(work.calls) == 4
    assert rows_of(tmp_path)[1]["reference"] == work.calls[2].name


def test_seeds_of_a_setting_on_other_data_are_refused(work, run, tmp_path, monkeypatch):
    assert run("--only=ids")[0] == 0
    row = rows_of(tmp_path)[0] | {"data_sha256": "1"}
    (tmp_path / "results" / "some" / "runs.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = run("--only=ids", "--seeds=0,1")
    assert code == 1 and "runs.jsonl: seed 0 of ids is of other data named 'planted'; give another folder" in err
    assert rows_of(tmp_path) == [row]


def test_what_is_no_training_is_done_anew_when_it_is_asked_for_again(run, tmp_path):
    found = iter(range(9))
    study = make_study(lambda config, workdir: {"n": next(found)}, settings={"ids": Setting("sasrec")})
    for words, n in (((), 0), ((), 0), (("--again",), 1)):
        assert run(*words, study=study)[0] == 0
        assert rows_of(tmp_path)[0]["measures"]["some"] == {"n": n}


def test_measures_are_done_anew_when_they_are_asked_for_again(run, work, tmp_path):
    found = iter(range(9))
    study = make_study(work, settings={"ids": Setting("sasrec")}, measures={"size": lambda *_: {"n": next(found)}})
    for words, n in (((), 0), ((), 0), (("--again",), 1)):
        assert run(*words, study=study)[0] == 0
        assert rows_of(tmp_path)[0]["measures"]["size"] == {"n": n}


def _arguments(tmp_path):
    import argparse

    return argparse.Namespace(datasets="planted", seeds="0", only="", folder=str(tmp_path / "runs"))


def test_a_field_newer_than_a_row_must_have_its_default():
    from configs.default import get_config
    from experiments.records import relevant

    now = relevant(get_config())
    old = {name: value for name, value in now.items() if name != "train.prefixes"}
    assert same_config(old, now) and same_config(now, now)
    assert not same_config(old, now | {"train.prefixes": True})
    assert not same_config(old | {"seed": 1}, now)


def test_rows_of_settings_that_are_no_more_are_dropped(run, work, tmp_path):
    run()
    study = make_study(work, settings={"ids": Setting("sasrec")})
    store = Store(tmp_path / "results", study)
    assert [row["label"] for row in store.rows()] == ["ids"]


def test_together_trains_the_seeds_of_a_setting_at_once_and_alone_where_that_fails(run, work, tmp_path, monkeypatch):
    groups = []

    def train_together(jobs):
        groups.append([(job.label, job.seed) for job in jobs])
        if jobs[0].label == "ids":
            raise MemoryError("no room")
        for job in jobs:
            job.workdir.parent.mkdir(parents=True, exist_ok=True)
            work(job.config, job.workdir)

    monkeypatch.setattr(module.records, "train_together", train_together)
    code, out, _ = run("--seeds=0,1", "--together", "--only=ids;tuned")
    assert code == 0 and groups == [[(label, 0), (label, 1)] for label in ("ids", "tuned")]
    assert (
        "together: planted, tuned, seed 0, planted, tuned, seed 1" in out
        and "not together: MemoryError: no room" in out
    )
    assert len(rows_of(tmp_path)) == 4 and len(work.calls) == 4
    code, out, _ = run("--seeds=0,1,2", "--together", "--only=ids;tuned")  # one seed of each is left
    assert code == 0 and len(groups) == 2 and len(rows_of(tmp_path)) == 6


def test_together_is_for_studies_that_train(run):
    code, _, err = run("--together", study=make_study(lambda config, workdir: {}))
    assert code == 2 and err.count("\n") == 1 and "--together: some trains nothing" in err
