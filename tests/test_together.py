"""Seeds trained side by side: the numbers of runs alone but for rounding, and the same bits after a kill."""

import json

import jax
import numpy as np
import pytest

from kdsr_jax import together, train
from kdsr_jax.errors import UserError
from kdsr_jax.phase import PhaseRunner

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECONDS = ("train_seconds", "eval_seconds", "targets_per_second")
WORDS = ("eval.protocol=both", "train.patience=1")  # seeds 0 and 1 stop at different epochs


@pytest.fixture(scope="module")
def configs(tiny):
    return [tiny(*WORDS, f"seed={seed}") for seed in (0, 1)]


@pytest.fixture(scope="module")
def both(configs, tmp_path_factory):
    """Workdirs of seeds 0 and 1, trained side by side without a break."""
    workdirs = [tmp_path_factory.mktemp("together") / f"seed{config.seed}" for config in configs]
    train.train_together(configs, workdirs)
    return workdirs


def read_log(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SECONDS} for line in lines]


def read_result(workdir):
    result = json.loads((workdir / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in SECONDS}


def test_a_seed_learns_as_it_does_alone(both, configs, tmp_path):
    workdir, config, alone = both[1], configs[1], tmp_path / "alone"
    result, found = train.train_and_evaluate(config, alone), read_result(workdir)
    assert json.loads((workdir / "result.json").read_text())["train_seconds"] > 0
    for name in ("seed", "epochs", "best_epoch", "config_fingerprint"):
        assert found[name] == result[name]
    for line, other in zip(read_log(workdir), read_log(alone), strict=True):
        assert line["epoch"] == other["epoch"] and line["phase"] == other["phase"]
        for name in ("losses", "gradient_norms", "learning_rates"):
            assert line.get(name, {}) == pytest.approx(other.get(name, {}), rel=1e-3)
    with np.load(workdir / "ranks.npz") as ranks, np.load(alone / "ranks.npz") as others:
        assert (ranks["rank"] == others["rank"]).mean() > 0.9  # near ties may go the other way
        np.testing.assert_array_equal(ranks["target"], others["target"])
    assert {file.name for file in workdir.iterdir()} == {file.name for file in alone.iterdir()}


def test_seeds_differ_and_stop_for_themselves(both):
    logs = [read_log(workdir) for workdir in both]
    assert logs[0][1]["losses"] != logs[1][1]["losses"]
    epochs = [[line["epoch"] for line in log if line["phase"] == "select"] for log in logs]
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_a_kill_between_two_seeds_changes_no_bit(both, configs, tmp_path, monkeypatch):
    workdirs = [tmp_path / f"seed{config.seed}" for config in configs]
    close_epoch = PhaseRunner.close_epoch

    def killed(self, checkpoints, state, record, losses, trained):
        if (self.phase.name, self.run.config.seed, record["epoch"]) == ("refit", 1, 1):
            raise KeyboardInterrupt
        return close_epoch(self, checkpoints, state, record, losses, trained)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PhaseRunner, "close_epoch", killed)
        train.train_together(configs, workdirs)
    newest = [read_log(workdir)[-1] for workdir in workdirs]
    assert [(line["phase"], line["epoch"]) for line in newest] == [("refit", 2), ("refit", 1)]
    train.train_together(configs, workdirs)
    for workdir, whole in zip(workdirs, both, strict=True):
        assert read_result(workdir) == read_result(whole)
        assert read_log(workdir) == read_log(whole)
        with np.load(workdir / "ranks.npz") as ranks, np.load(whole / "ranks.npz") as wanted:
            np.testing.assert_array_equal(ranks["rank"], wanted["rank"])


def test_what_is_finished_is_left_alone(both, configs, monkeypatch):
    monkeypatch.setattr(together, "execute", lambda *_: pytest.fail("something is trained"))
    train.train_together(configs, both)


def test_a_seed_that_diverges_is_named(configs, tmp_path, monkeypatch):
    new_state = PhaseRunner.new_state

    def poisoned(self):
        state = new_state(self)
        if self.run.config.seed == 1:
            state = state._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
        return state

    monkeypatch.setattr(PhaseRunner, "new_state", poisoned)
    with pytest.raises(UserError, match="seed 1, select, epoch 1: .*next_item became NaN"):
        train.train_together(configs, [tmp_path / "0", tmp_path / "1"])


def test_configs_differ_in_their_seeds_alone(tiny, tmp_path):
    with pytest.raises(ValueError, match="differ in their seeds alone"):
        train.train_together(
            [tiny("seed=0"), tiny("seed=1", "train.learning_rate=0.1")], [tmp_path / "0", tmp_path / "1"]
        )
    assert not list(tmp_path.iterdir())


def test_it_needs_one_device(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match="need one device, and here are 2"):
        together.execute([], 2)


def test_another_seed_is_the_same_program(configs):
    runs = [train.prepare(config) for config in configs]
    runners = [PhaseRunner(run, train.refit_phase(run, 1), None) for run in runs]
    texts = []
    for runner in runners:
        length, ids = runner.batches.chunk(0)
        resident, ids = runner.histories.of(ids, length)
        arguments = runner.new_state(), resident, runner.run.teachers, ids
        texts.append(runner.trainer.run_chunk.lower(*arguments, length=length).as_text())
    assert texts[0] == texts[1]
