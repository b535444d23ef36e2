"""The whole command line over odd data, odd places and full disks: a result, or one clear line and exit code 2."""

import csv
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLAIN = ("model.tables=none", "distill.enabled=false", "eval.protocol=paper", "train.epochs=1")
# fmt: off
ODD_IDS = [
    "007", "7", "__proto__", "constructor", "NA", "nan", "None", "null", "1e5", "true", "-0", "0x10", "inf", " a", "a ",
    "a", "A", 'say "hi"', "it's", "a,b", "a;b", "a\tb", "..", "../../etc/passwd", "C:\\x", "<script>alert(1)", "[/]",
    "[bold]", "{{7*7}}", "%s", "\u202egnp", "\U0001f600", "\u00e9", "e\u0301", "\u4e2d\u6587", "x" * 10_000,
]
# fmt: on


@pytest.fixture
def command(command):
    """Run a command line, a list of its words, a workdir and more words, in this process; return what ``command`` returns."""
    return lambda words, workdir, *more: command(*words, f"--workdir={workdir}", *more)


@pytest.fixture
def words_of(tiny_words, tmp_path):
    """Return a function (histories, *settings) -> words of the command line for a log of these histories.

    Histories are a dict user id -> list of item ids; every item but the last has features.
    """

    def make(histories, *settings):
        shop = tmp_path / "data" / "shop"
        (shop / "features").mkdir(parents=True, exist_ok=True)
        with open(shop / "interactions.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(["user_id", "item_id"])
            writer.writerows((user, item) for user, items in histories.items() for item in items)
        items = sorted({item for items in histories.values() for item in items})
        covered = items[:-1] or items
        features = np.random.default_rng(0).normal(size=(len(covered), 16)).astype(np.float32)
        np.savez(shop / "features" / "image-random.npz", item_id=np.array(covered), features=features)
        words = [word for word in tiny_words(*settings) if not word.startswith("--config.data.root=")]
        return [*words, f"--config.data.root={tmp_path / 'data'}"]

    return make


def random_histories(items, users=48, length=11):
    rng = np.random.default_rng(0)
    return {f"u{user:02}": rng.choice(items, length).tolist() for user in range(users)}


def result_of(workdir):
    """Return result.json, its numbers finite."""
    result = json.loads((workdir / "result.json").read_text())
    metrics = result["test"] or result["paper"]
    assert metrics and all(math.isfinite(value) for value in metrics.values())
    return result


def assert_one_line(outcome):
    """Check that a command ended with exit code 2 and one error; returns it."""
    code, out, err = outcome
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1) and "Traceback" not in err, err
    return errors[0]


# --- ids ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd_histories():
    """As many users and items as the tiny shop has, so that the compiled programs are shared."""
    users = [*ODD_IDS, *(f"user {n}" for n in range(48 - len(ODD_IDS)))]
    return dict(zip(users, random_histories(ODD_IDS).values(), strict=True))


def test_odd_ids_are_kept_as_they_are(words_of, command, odd_histories, tmp_path):
    from kdsr_jax.data.sources.folder import load_log

    words = words_of(odd_histories)
    log = load_log(tmp_path / "data" / "shop")
    assert set(log.user_names.tolist()) == odd_histories.keys() and set(log.item_names.tolist()) == set(ODD_IDS)
    rows = [(user, item) for user, items in odd_histories.items() for item in items]
    assert [*zip(log.user_names[log.user_codes], log.item_names[log.item_codes], strict=True)] == rows
    code, out, err = command([*words, "--mode=stats"], tmp_path / "unused")
    assert code == 0 and json.loads(out)["items"] == json.loads(out)["modalities"]["image"] + 1 == 36, err


@pytest.mark.slow
def test_a_run_over_odd_ids(words_of, command, odd_histories, tmp_path):
    code, _, err = command(words_of(odd_histories, "eval.protocol=both"), tmp_path / "run")
    assert code == 0, err
    result_of(tmp_path / "run")
    with np.load(tmp_path / "run" / "ids.npz") as ids:
        assert ids["user_ids"].tolist() == sorted(odd_histories)
        assert ids["item_ids"].tolist() == ["", *sorted(ODD_IDS)] and len(ODD_IDS) == 36


# --- degenerate data ------------------------------------------------------------------------------------------------

FEW = {"u": ["a", "b", "c", "a", "b", "c", "d"]}
ONE_ITEM = {f"u{n}": ["same"] * 8 for n in range(5)}
SAME_TARGET = {
    user: [*items[:-2], "i00", "i00"] for user, items in random_histories([f"i{n:02}" for n in range(36)]).items()
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("histories", "protocol"),
    [(ONE_ITEM, "paper"), (ONE_ITEM, "validation"), (FEW, "paper"), (FEW, "validation"), (SAME_TARGET, "both")],
    ids=["one item", "one item, validation", "one user", "one user, validation", "same target"],
)
def test_degenerate_data_give_a_result(words_of, command, tmp_path, histories, protocol):
    words = words_of(histories, *PLAIN[:2], f"eval.protocol={protocol}", "train.epochs=2")
    code, _, err = command(words, tmp_path / "run")
    assert code == 0, err
    result = result_of(tmp_path / "run")
    assert result["epochs"] >= 1
    if histories is ONE_ITEM:  # the only item is first, whatever the model
        assert (result["test"] or result["paper"])["mrr@20"] == 100


@pytest.mark.parametrize(
    ("histories", "settings", "message"),
    [
        ({f"u{n}": ["a"] for n in range(4)}, (), "has 1 interaction(s), too few to leave one training pair"),
        ({f"u{n}": ["a", "b"] for n in range(4)}, (), "has 2 interaction(s), too few to leave one training pair"),
        (
            {f"u{n}": ["a", "b", "c"] for n in range(4)},
            (*PLAIN[:2], "eval.protocol=both"),
            "no user has the 3 train items",
        ),
        (FEW, ("data.k_core=5",), "the 5-core of the log is empty"),
        (ONE_ITEM, (), "--config."),
        (FEW, (), "--config."),
    ],
    ids=["length 1", "length 2", "length 3", "core", "one item", "few items"],
)
def test_data_that_cannot_be_trained_on_are_one_line(words_of, command, tmp_path, histories, settings, message):
    outcome = command(words_of(histories, *settings), tmp_path / "run")
    assert message in assert_one_line(outcome)
    assert not (tmp_path / "run").exists()


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run of protocol both without the last epoch of phase refit and the result."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "refit" / "3")
    return workdir


SECONDS = {"train_seconds", "eval_seconds"}


def assert_same_result(workdir, finished):
    got, wanted = (json.loads((folder / "result.json").read_text()) for folder in (workdir, finished[0]))
    assert {k: v for k, v in got.items() if k not in SECONDS} == {k: v for k, v in wanted.items() if k not in SECONDS}
    with np.load(workdir / "ranks.npz") as ranks, np.load(finished[0] / "ranks.npz") as others:
        np.testing.assert_array_equal(ranks["rank"], others["rank"])


def test_a_moved_workdir_goes_on_from_linked_data(finished, unfinished, tiny_words, command, tmp_path):
    words = tiny_words("eval.protocol=both")
    root = next(word for word in words if word.startswith("--config.data.root=")).partition("=")[2]
    (tmp_path / "data link").symlink_to(root)
    moved = tmp_path / "an other folder \u00e9" / "run"
    moved.parent.mkdir()
    unfinished.rename(moved)
    (tmp_path / "link").symlink_to(moved.parent)
    words = [word for word in words if not word.startswith("--config.data.root=")]
    code, _, err = command([*words, f"--config.data.root={tmp_path / 'data link'}"], tmp_path / "link" / "run")
    assert code == 0 and "refit: going on after epoch 2" in err
    assert_same_result(moved, finished)


def test_a_workdir_that_links_to_nothing_and_impossible_names_are_one_line(tiny_words, command, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "absent" / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for workdir in (tmp_path / "dangling", tmp_path / "loop", tmp_path / ("x" * 300)):
        assert "--workdir=" in assert_one_line(command(tiny_words(), workdir))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dangling", "loop"]


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_read_only_workdir_is_one_line(finished, unfinished, tiny_words, command, disk):
    shutil.copytree(unfinished, disk / "run")
    shutil.copytree(finished[0], disk / "whole")
    remount(disk, "ro")
    words = tiny_words("eval.protocol=both")
    for workdir in (disk / "new", disk / "run", disk / "whole"):
        assert "error: --workdir=" in assert_one_line(command(words, workdir))
    assert "error: --workdir=" in assert_one_line(command(words, disk / "whole", "--mode=evaluate"))
    remount(disk, "rw")
    assert command(words, disk / "run")[0] == 0
    assert_same_result(disk / "run", finished)


@pytest.mark.slow
def test_a_file_system_that_becomes_read_only_loses_nothing(
    finished, unfinished, tiny_words, command, disk, monkeypatch
):
    from kdsr_jax.phase import PhaseRunner

    shutil.copytree(unfinished, disk / "run")
    words = tiny_words("eval.protocol=both")
    train_epoch = PhaseRunner.train_epoch

    def fail(self, *arguments):
        result = train_epoch(self, *arguments)
        self.folder._lock.close()  # nothing may be open for writing, and this process makes no other mistake
        remount(disk, "ro")
        return result

    monkeypatch.setattr(PhaseRunner, "train_epoch", fail)
    assert "cannot be written (Read-only file system)" in assert_one_line(command(words, disk / "run"))
    monkeypatch.undo()
    remount(disk, "rw")
    assert command(words, disk / "run")[0] == 0
    assert_same_result(disk / "run", finished)


# --- full disks -----------------------------------------------------------------------------------------------------


def run_on_a_disk_that_is_full(words, command, disk, fill_up, free):
    """Run until a disk with so many free bytes is full, then with room; returns the error's line, or None.

    The first is a process of its own: in this one, what orbax still writes at its failure would meet the second.
    """
    workdir = disk / "run"
    fill_up(free)
    process = [sys.executable, "-m", "kdsr_jax.main", *words, f"--workdir={workdir}"]
    done = subprocess.run(process, capture_output=True, text=True, check=False)
    outcome = done.returncode, "", done.stderr
    (disk / "filler").unlink()
    line = assert_one_line(outcome) if outcome[0] else None
    assert line is None or "No space left on device" in line
    code, _, err = command(words, workdir)
    assert code == 0, err
    assert not [entry for entry in workdir.iterdir() if entry.name.endswith(".tmp")]
    return line


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tiny_words, command, disk, fill_up):
    line = run_on_a_disk_that_is_full(tiny_words("eval.protocol=both"), command, disk, fill_up, 150_000)
    assert "a checkpoint cannot be written (No space left on device); earlier ones are kept" in line
    assert_same_result(disk / "run", finished)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_time_loses_nothing(finished, tiny_words, command, disk, fill_up):
    lines = []
    for free in range(0, 600_000, 120_000):
        lines.append(run_on_a_disk_that_is_full(tiny_words("eval.protocol=both"), command, disk, fill_up, free))
        assert_same_result(disk / "run", finished)
        shutil.rmtree(disk / "run")
    failed = [line for line in lines if line]
    assert len(failed) > 2
    assert {"checkpoints" in line for line in failed} == {True, False}, failed


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_done_without(tiny_words, command, disk, fill_up, monkeypatch):
    monkeypatch.setenv("KDSR_CACHE", str(disk / "cache"))
    fill_up(0)
    code, _, err = command(tiny_words(*PLAIN[2:]), disk.parent / "run")
    assert code == 0, err
    assert not list(disk.rglob("*.npz"))


# --- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_commands_at_once_one_runs_and_one_is_refused(finished, tiny_words, tmp_path, repository):
    command = [
        sys.executable,
        "-m",
        "kdsr_jax.main",
        *tiny_words("eval.protocol=both"),
        f"--workdir={tmp_path / 'run'}",
    ]
    started = [subprocess.Popen(command, cwd=repository, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    ended = [(process.communicate(timeout=300), process.returncode) for process in started]
    assert sorted(code for _, code in ended) == [0, 2]
    (_, err), _ = max(ended, key=lambda end: end[1])
    assert err.startswith("error: --workdir=") and "another process is working in this folder" in err
    assert_same_result(tmp_path / "run", finished)
