"""Runs that are killed, damaged or diverge, and go on under the same command to the same bits."""

import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kdsr_jax import teacher, train
from kdsr_jax.errors import UserError
from kdsr_jax.phase import PhaseRunner

# When orbax meets a damaged file it leaves its other reads unawaited and their event loop to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"),
    pytest.mark.usefixtures("quick_compilation", "collect_garbage"),
]

PROTOCOL = "eval.protocol=both"
SECONDS = ("train_seconds", "eval_seconds", "targets_per_second")


@pytest.fixture(scope="module")
def collect_garbage():
    """Let complaints about what orbax leaves behind appear in this module, where they are ignored."""
    yield
    gc.collect()


@pytest.fixture
def config(tiny):
    return tiny(PROTOCOL)


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run whose last epoch of phase refit and result are missing."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "refit" / "3")
    return workdir


def untimed(content):
    return {name: value for name, value in content.items() if name not in SECONDS}


def read_log(workdir):
    return [untimed(json.loads(line)) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def assert_equals_finished(finished, config, newest_checkpoint):
    """Return a function that compares a workdir with the uninterrupted run's, to the last bit."""

    def check(workdir):
        whole = finished[0]
        for name in ("result.json", "selection.json", "overview.json", "examples.json"):
            contents = [untimed(json.loads((folder / name).read_text())) for folder in (workdir, whole)]
            assert contents[0] == contents[1]
        assert read_log(workdir) == read_log(whole)
        with np.load(workdir / "ranks.npz") as ranks, np.load(whole / "ranks.npz") as wanted:
            assert ranks.files == wanted.files
            for name in ranks.files:
                np.testing.assert_array_equal(ranks[name], wanted[name])
        for phase in ("select", "refit"):
            epoch, state, record = newest_checkpoint(workdir, config, phase)
            wanted_epoch, wanted_state, wanted_record = newest_checkpoint(whole, config, phase)
            assert epoch == wanted_epoch and untimed(record) == untimed(wanted_record)
            jax.tree.map(np.testing.assert_array_equal, state, wanted_state)

    return check


def lines(workdir):
    """Count the lines of trained epochs, which come after one of epoch 0 a phase."""
    file = workdir / "metrics.jsonl"
    return file.read_text().count('"losses"') if file.exists() else 0


def saving(workdir, phase):
    """Tell whether a checkpoint of the phase is being written."""
    folder = workdir / "checkpoints" / phase
    return folder.exists() and any("tmp" in entry.name for entry in folder.iterdir())


def kill_when(words, workdir, condition):
    """Run the command in a process of its own and kill it when the condition holds; return its exit status."""
    command = [sys.executable, "-m", "kdsr_jax.main", *words, f"--workdir={workdir}"]
    root = os.path.dirname(os.path.dirname(train.__file__))
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not condition():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        message = process.stderr.read().decode()
    assert process.returncode in (0, -signal.SIGKILL), message
    return process.returncode


def test_a_run_keeps_its_teacher(unfinished, config, tmp_path, monkeypatch, assert_equals_finished):
    with monkeypatch.context() as patch:
        patch.setenv("KDSR_CACHE", str(tmp_path / "of another machine"))
        patch.setattr(teacher, "fit_teacher", lambda *_: pytest.fail("a teacher is fitted"))
        train.train_and_evaluate(config, unfinished)
    assert_equals_finished(unfinished)


def test_a_teacher_that_is_damaged_is_fitted_again(unfinished, config, assert_equals_finished):
    (unfinished / "teacher-image.npz").write_bytes(b"PK")
    train.train_and_evaluate(config, unfinished)
    assert_equals_finished(unfinished)
    assert teacher.read_teachers(unfinished).keys() == {"image"}


@pytest.mark.slow
def test_killed_in_refit_ends_with_the_same_bits(finished, tiny_words, config, tmp_path, assert_equals_finished):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns("result.json", "ranks.npz", "refit"))
    (workdir / "metrics.jsonl").write_text(
        "\n".join((finished[0] / "metrics.jsonl").read_text().split("\n")[:4]) + "\n"
    )
    assert kill_when(tiny_words(PROTOCOL), workdir, lambda: lines(workdir) >= 4) < 0
    chosen = json.loads((workdir / "selection.json").read_text())["best_epoch"]  # on disk before the first test
    assert chosen and not (workdir / "result.json").exists()
    assert lines(workdir) < 6
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"phase": "refit", "epoch": 9, "los')  # as a kill in the middle of a line leaves it
    assert train.train_and_evaluate(config, workdir)["best_epoch"] == chosen
    assert_equals_finished(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["select", "refit"])
def test_killed_while_saving_ends_with_the_same_bits(tiny_words, config, tmp_path, assert_equals_finished, phase):
    before = 1 if phase == "select" else 4
    condition = lambda: lines(tmp_path) > before and saving(tmp_path, phase)
    assert kill_when(tiny_words(PROTOCOL), tmp_path, condition) < 0
    assert lines(tmp_path) < 6 and not (tmp_path / "result.json").exists()
    train.train_and_evaluate(config, tmp_path)
    assert_equals_finished(tmp_path)


@pytest.mark.slow
def test_20_kills_at_random_moments_end_with_the_same_bits(tiny_words, config, tmp_path, assert_equals_finished):
    rng, words, workdirs, in_refit = random.Random(0), tiny_words(PROTOCOL), [tmp_path / "0"], 0

    def strike(seen):
        """Kill a process up to 0.3 s after it made the log so many epochs long; seen = 0: soon after its start."""
        log, started, wait, since = workdirs[-1] / "metrics.jsonl", time.time(), rng.uniform(0, 0.3), None

        def moment():
            nonlocal since
            if seen and not (log.exists() and log.stat().st_mtime > started and lines(log.parent) >= seen):
                return False
            since = since or time.monotonic()
            return time.monotonic() - since > (wait if seen else 20 * wait)

        return kill_when(words, workdirs[-1], moment)

    for seen in [*[0] * 4, *[1] * 3, *[2] * 3, *[3] * 3, *[4] * 3, *[5] * 4]:
        while strike(seen) == 0:  # it was faster
            workdirs.append(tmp_path / str(len(workdirs)))
        in_refit += (workdirs[-1] / "selection.json").exists()
    assert in_refit >= 6
    for workdir in workdirs:
        train.train_and_evaluate(config, workdir)
        assert_equals_finished(workdir)


def test_selection_is_on_disk_before_refit_begins(finished, config, tmp_path, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    (workdir / "selection.json").unlink()
    seen = []

    def refit_phase(run, best_epoch):
        seen.append(json.loads((workdir / "selection.json").read_text())["best_epoch"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "refit_phase", refit_phase)
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, workdir)
    assert seen == [finished[1]["best_epoch"]]


def test_damaged_newest_checkpoint_ends_with_the_same_bits(finished, config, tmp_path, assert_equals_finished, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    newest = workdir / "checkpoints" / "refit" / "3"
    for file in (newest / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        train.train_and_evaluate(config, workdir)
    assert f"{newest} is damaged" in caplog.text and "going on from epoch 2" in caplog.text
    assert_equals_finished(workdir)


def test_no_good_checkpoint_is_an_error_and_starts_nothing_over(unfinished, config):
    refit = unfinished / "checkpoints" / "refit"
    for file in refit.glob("*/state/manifest.ocdbt"):
        file.unlink()
    before = sorted(unfinished.rglob("*"))
    with pytest.raises(UserError, match=f"all checkpoints in {refit} are damaged"):
        train.train_and_evaluate(config, unfinished)
    assert sorted(unfinished.rglob("*")) == before


def test_diverging_names_steps_and_loss_part_and_keeps_the_good_checkpoint(
    unfinished, config, monkeypatch, newest_checkpoint
):
    train_epoch = PhaseRunner.train_epoch

    def poisoned(self, state, epoch, last_metrics=()):
        state.params["image_head"]["code_out"]["bias"] *= np.nan
        return train_epoch(self, state, epoch)

    monkeypatch.setattr(PhaseRunner, "train_epoch", poisoned)
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(config, unfinished)
    # Two epochs of 5 steps are done; a chunk has 2 steps, or 1 and an idle one.
    assert str(error.value).startswith("refit, epoch 3: dissected/image")
    assert " in steps 11 to 1" in str(error.value) and "checkpoint of epoch 2 is kept" in str(error.value)
    epoch, state, _ = newest_checkpoint(unfinished, config, "refit")
    assert epoch == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert lines(unfinished) == 5 and not (unfinished / "result.json").exists()
