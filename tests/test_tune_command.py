"""The search over settings: what it tries, that it goes on, is shared and looks at no test item, and what it leaves."""

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest

from kdsr_jax import axes, cli, search, tune
from kdsr_jax.config import to_dict
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.errors import Diverged, UserError
from kdsr_jax.evaluate import Evaluator
from kdsr_jax.phase import PhaseRunner

pytestmark = pytest.mark.usefixtures("quick_compilation")

AXES = ("train.learning_rate=1e-4..1e-2", "model.hidden_dropout=0.1,0.2,0.5", "train.patience=2..9")
SHORT = "train.epochs=2"
VARIANT = ":sasrec"  # compiles fastest


@pytest.fixture(scope="module")
def line(tiny_words):
    """Return a function (workdir, *tries, trials, settings, extra) -> words of a search."""

    def words(workdir, *tries, trials=4, settings=(), extra=()):
        config, *fields = tiny_words(SHORT, *settings, variant=VARIANT)
        flags = (f"--workdir={workdir}", f"--trials={trials}", *(f"--try={word}" for word in tries or AXES))
        return [config, *flags, *extra, *fields]

    return words


@pytest.fixture
def tuned(capsys):
    """Run a search in this process; return exit code, stdout and stderr."""

    def execute(words):
        code = tune.main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


@pytest.fixture(scope="module")
def whole(line, tmp_path_factory):
    """The workdir of a search of 4 trials; every target that was ranked for it was held against the train part."""
    workdir, rank, ranked = tmp_path_factory.mktemp("search") / "whole", Evaluator.rank, []

    def spy(evaluator, *arguments):
        ranked.append((evaluator.users, evaluator.history_lengths))
        return rank(evaluator, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "rank", spy)
        assert tune.main(line(workdir)) == 0
    assert len(ranked) == 8  # trials x epochs
    return workdir, ranked


def trials_of(workdir):
    """The trials in a database, as (number, state, settings, value, values by epoch, user attributes)."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{workdir}/study.db")
    trials = optuna.load_study(study_name="kdsr", storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    return trials


def outcome(trials):
    return [(trial.number, trial.state.name, trial.params, trial.value, trial.intermediate_values) for trial in trials]


def forbid_training(patch):
    patch.setattr(PhaseRunner, "train_epoch", lambda *_: pytest.fail("an epoch is trained"))


def test_a_search_ends_with_its_trials_and_the_first_is_the_config_itself(whole, tiny):
    workdir, _ = whole
    trials = trials_of(workdir)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert trials[0].params == axes.settings_of(
        tiny(SHORT, variant=VARIANT), axes.read_axes(tiny(SHORT, variant=VARIANT), AXES)
    )
    assert len({str(trial.params) for trial in trials}) == 4
    for trial in trials:
        assert trial.value == max(trial.intermediate_values.values())
        assert trial.user_attrs["metrics"]["mrr@20"] == trial.value
        assert trial.intermediate_values[trial.user_attrs["epoch"]] == trial.value
    assert not list((workdir / "trials").iterdir())


def test_no_test_item_is_ranked(whole, tiny):
    from kdsr_jax import train

    lengths = train_lengths(train.load_data(tiny(SHORT, variant=VARIANT)).interactions.lengths)
    for users, positions in whole[1]:
        assert len(users) == len(lengths)
        np.testing.assert_array_equal(positions, lengths[users] - 1)  # the last item of the train part


def test_the_table_names_the_best_and_a_finished_search_trains_nothing(whole, line, tuned, monkeypatch):
    forbid_training(monkeypatch)
    code, out, _ = tuned(line(whole[0]))
    assert code == 0
    best = max(trials_of(whole[0]), key=lambda trial: trial.value)
    assert f"{best.value:.4f}" in out and f"trial {best.number}" in out
    assert "the best of 4 trials, 4 of them to the end" in out
    assert f"--config={whole[0]}/best.py --workdir={whole[0]}-best" in out
    assert tuned(line(whole[0], trials=2))[0] == 0


def test_the_best_file_gives_the_best_trials_config_from_anywhere(whole, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = max(trials_of(whole[0]), key=lambda trial: trial.value)
    config = cli.load_config(str(whole[0] / "best.py"))
    assert to_dict(config) == to_dict(axes.with_settings(tiny(SHORT, variant=VARIANT), best.params))
    assert config.train.learning_rate == best.params["train.learning_rate"]
    text = (whole[0] / "best.py").read_text()
    assert f"The best of 4 trials by mrr@20 on validation: {best.value:.4f} percent, trial {best.number}" in text


@pytest.mark.slow
def test_a_stopped_search_ends_as_if_it_had_not_been_stopped(whole, line, tuned, tmp_path, monkeypatch):
    workdir, epochs, train_epoch = tmp_path / "stopped", itertools.count(1), PhaseRunner.train_epoch

    def interrupted(*arguments):
        if next(epochs) == 4:  # the second of trial 1, whose first is in a checkpoint
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PhaseRunner, "train_epoch", interrupted)
        code, out, err = tuned(line(workdir))
    assert code == 130 and err.endswith("interrupted; the same command goes on from the last checkpoint\n")
    assert out.count("trial ") == 1
    assert [trial.state.name for trial in trials_of(workdir)] == ["COMPLETE", "RUNNING"]
    code, out, err = tuned(line(workdir))
    assert code == 0 and "select: going on after epoch 1" in err
    assert outcome(trials_of(workdir)) == outcome(trials_of(whole[0]))
    assert not list((workdir / "trials").iterdir())


@pytest.mark.slow
def test_trials_below_the_median_are_stopped_and_diverged_ones_do_not_end_the_search(
    line, tuned, tmp_path, monkeypatch
):
    evaluate, train_epoch, trained = PhaseRunner.evaluate, PhaseRunner.train_epoch, []

    def by_rate(runner, state):
        metrics, ranks = evaluate(runner, state)
        return metrics | {"mrr@20": 100 * runner.run.config.train.learning_rate}, ranks

    def counted(runner, state, epoch, last):
        trained.append((runner.folder.path.name, epoch))
        if trained[-1] == ("2", 1):
            raise Diverged("select, epoch 1: loss became NaN")
        return train_epoch(runner, state, epoch, last)

    monkeypatch.setattr(search, "STARTUP_TRIALS", 1)
    monkeypatch.setattr(PhaseRunner, "evaluate", by_rate)
    monkeypatch.setattr(PhaseRunner, "train_epoch", counted)
    words = line(tmp_path, "train.learning_rate=1e-5..1e-3", settings=("train.epochs=3",), extra=["--prune-after=2"])
    code, out, _ = tuned(words)
    assert code == 0
    # The first is the config itself, at the upper end of the range, so all others are worse.
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert [sum(name == number for name, _ in trained) for number in "0123"] == [3, 2, 1, 2]
    assert "of 2, pruned" in out and "trial 2: diverged" in out and "the best of 4 trials, 1 of them" in out
    assert not list((tmp_path / "trials").iterdir())


def test_a_search_in_which_nothing_comes_to_its_end_says_so(line, tuned, tmp_path, monkeypatch):
    def diverge(*_):
        raise Diverged("select, epoch 1: loss became NaN")

    monkeypatch.setattr(PhaseRunner, "train_epoch", diverge)
    code, _, err = tuned(line(tmp_path, trials=1))
    assert code == 2 and "none of 1 trials came to its end" in err and not (tmp_path / "best.py").exists()


@pytest.fixture
def opened(tiny):
    """Return a function workdir -> Search of it, as a process of its own would open it."""
    config = tiny()
    tries = axes.read_axes(config, AXES)
    identity = {"config": to_dict(config), "tries": {axis.name: axis.text() for axis in tries}}
    return lambda workdir: search.Search(workdir, config, tries, identity | {"metric": "mrr@20", "data_sha256": ""}, 1)


def test_processes_share_trials_and_take_over_what_is_left_behind(opened, tmp_path):
    with opened(tmp_path) as one, opened(tmp_path) as other:
        first, config, folder = one.claim(2)
        second, _, held = other.claim(2)
        assert (first.number, second.number) == (0, 1) and first.params != second.params
        assert one.claim(2) is None and other.claim(2) is None
        assert other.counts() == (0, 2)
        folder.__exit__(None)  # what the system does for a process that is killed
        again, same, taken = other.claim(2)
        assert again.number == 0 and again.params == first.params and to_dict(same) == to_dict(config)
        assert one.claim(2) is None
        other.finish(again, optuna.trial.TrialState.FAIL, {}, pytest.fail)
        taken.__exit__(None)
        third, _, new = one.claim(2)
        assert third.number == 2  # one that failed does not count
        assert not (tmp_path / "trials" / "0").exists() and (tmp_path / "trials" / "1").exists()
        held.__exit__(None)
        new.__exit__(None)


def test_settings_that_do_not_fit_the_data_are_given_up(line, tuned, tmp_path, monkeypatch):
    from kdsr_jax import train

    def refuse(run):
        raise UserError("no user has the 3 train items")

    with monkeypatch.context() as patch:
        patch.setattr(train, "select_phase", refuse)
        code, _, err = tuned(line(tmp_path, trials=1))
    assert code == 2 and "is given up: no user has the 3 train items; the same command tries others" in err
    assert tuned(line(tmp_path, trials=1))[0] == 0
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "out of memory"), (UserError("lower the batch size"), "lower the batch size")]
)
def test_settings_too_large_for_the_machine_are_given_up(line, tuned, tmp_path, monkeypatch, error, said):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        large = "train_epoch" if isinstance(error, MemoryError) else "_check_pairs"
        patch.setattr(PhaseRunner, large, fail)
        settings = ("distill.enabled=true", "model.tables=tuned") if large == "_check_pairs" else ()
        code, _, err = tuned(line(tmp_path, trials=1, settings=settings))
    assert code == 2 and f"is given up: {said}" in err and "the same command tries others" in err
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["FAIL"]


def test_a_trial_left_before_its_settings_were_drawn_gets_those_of_its_number(opened, tmp_path, monkeypatch):
    def killed(axis, trial):
        raise KeyboardInterrupt

    with opened(tmp_path / "whole") as whole:
        (_, _, zero), (expected, _, one) = whole.claim(3), whole.claim(3)
    with opened(tmp_path / "killed") as first:
        _, _, other = first.claim(3)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(axes.Axis, "suggest", killed)
            first.claim(3)
        again, _, taken = first.claim(3)
    for folder in (zero, one, other, taken):
        folder.__exit__(None)
    assert (again.number, again.params) == (1, expected.params)


@pytest.mark.parametrize(
    ("tries", "changes", "complaint"),
    [
        (AXES, {"settings": ("model.dim=16",)}, "model.dim: 8 -> 16"),
        (AXES[:2], {}, "--try train.patience: 2..9 -> absent"),
        (("train.learning_rate=1e-4..1e-1", *AXES[1:]), {}, "--try train.learning_rate: 0.0001..0.01 -> 0.0001..0.1"),
        (AXES, {"extra": ["--metric=hr@5"]}, "--metric: mrr@20 -> hr@5"),
    ],
)
def test_another_search_is_refused(whole, line, tuned, tries, changes, complaint):
    code, out, err = tuned(line(whole[0], *tries, **changes))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"holds another search; {complaint}\n" in err


def test_other_data_a_folder_of_something_else_and_a_damaged_database_are_refused(
    whole, line, tuned, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.db").write_bytes(b"no database" * 1000)
    for workdir, complaint in (("run", "holds files but no search"), ("damaged", "cannot be used (")):
        code, _, err = tuned(line(tmp_path / workdir))
        assert code == 2 and complaint in err and err.count("\n") == 1
    monkeypatch.setattr("kdsr_jax.data.digest.data_digests", lambda dataset: ("other", "log"))
    code, _, err = tuned(line(whole[0]))
    assert code == 2 and "the data is not what it began with" in err


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("train.learning_rate", "write --try=FIELD=LOW..HIGH or --try=FIELD=V1,V2"),
        ("train.learning_rate=", "write --try=FIELD=LOW..HIGH or --try=FIELD=V1,V2"),
        ("train.lerning_rate=1..2", "train.lerning_rate: unknown config field; did you mean train.learning_rate?"),
        ("train=1..2", "train: is a group of fields; set one of them, such as train.epochs"),
        ("train.learning_rate=1e-2..1e-4", "a range goes up, LOW..HIGH"),
        ("train.learning_rate=1e-4..", "a value is missing"),
        ("train.learning_rate=1e-4..fast", "fast: must be a number"),
        ("train.learning_rate=0..1", "0.0: must be a finite number greater than 0"),
        ("model.num_layers=1..2.5", "2.5: must be a whole number"),
        ("model.hidden_dropout=0.1,,0.2", "a value is missing"),
        ("model.hidden_dropout=0.1,0.1", "names 0.1 twice"),
        ("model.hidden_dropout=0.5..1.5", "1.5: must be a finite number at least 0 and less than 1"),
        ("model.fusion=gate,sun", "sun: must be one of gate, concat, sum; did you mean sum?"),
        ("model.num_heads=1..3", "--config.model.num_heads=3: must divide --config.model.dim=8"),
        ("data.user_fraction=0.1..0.5", "data.user_fraction decides what trials are measured on"),
        ("eval.filter_seen=true,false", "eval.filter_seen decides what trials are measured on"),
        ("data.modalities=text-random", "data.modalities decides what trials are measured on"),
        ("log.tensorboard=true,false", "log.tensorboard changes no result"),
        ("seed=0..9", "seed is no setting"),
    ],
)
def test_a_wrong_axis_is_one_line_before_anything_is_written(line, tuned, tmp_path, word, complaint):
    code, out, err = tuned(line(tmp_path / "new", word))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: --try={word}: {complaint}")
    assert not (tmp_path / "new").exists()


def test_axes_that_do_not_go_together_are_named(line, tuned, tmp_path):
    code, _, err = tuned(line(tmp_path / "new", "model.dim=8,16", "model.num_heads=2,16", "train.batch_size=64,128"))
    assert code == 2 and err.startswith("error: --try=model.dim=8,16 --try=model.num_heads=2,16: --config.model.num")
    code, _, err = tuned(line(tmp_path / "new", "model.dim=8", "model.dim=16"))
    assert code == 2 and "model.dim has --try=model.dim=8 already" in err
    # 3 does not go with the config's own width, but with all that are tried
    assert tune.axes.read_axes(cli.load_config("configs/default.py"), ["model.num_heads=2,3", "model.dim=48,96"])


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--trials=0"], "--trials=0: must be 1 or more"),
        (["--trials=few"], "invalid int value"),
        (["--prune-after=0"], "--prune-after=0: must be 1 or more"),
        (["--metric=mrr@7"], "--metric=mrr@7: must be one of"),
        (["--trails=3"], "--trails=3: unknown flag; did you mean --trials?"),
        (["--config.train.epochs=none"], "--config.train.epochs=none: must be a whole number"),
        (["--workdir=a:b"], "--workdir=a:b: has a colon"),
    ],
)
def test_a_wrong_command_line_is_one_line(line, tuned, tmp_path, extra, complaint):
    code, out, err = tuned(line(tmp_path / "new", extra=extra))
    assert (code, out) == (2, "") and err.count("\n") == 1 and complaint in err
    assert not (tmp_path / "new").exists()


def test_without_the_extra_one_line_says_how_to_get_it(line, tuned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = tuned(line(tmp_path / "new"))
    assert code == 2 and err.count("\n") == 1 and 'pip install "kdsr-jax[tune]"' in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("", "model.attention_dropout distill.lambda_code distill.lambda_score model.table_scale"),
        (":tuned-gru4rec", "model.table_scale"),
        (":sasrec", "model.attention_dropout"),
    ],
)
def test_axes_follow_the_config_where_none_are_given(repository, variant, names):
    config = cli.load_config(f"{repository}/configs/planted.py{variant}")
    found = axes.read_axes(config, [])
    assert [axis.name for axis in found] == ["train.learning_rate", "model.hidden_dropout", *names.split()]
    assert axes.settings_of(config, found) is not None or variant == ":tuned-gru4rec"


def test_ranges_are_logarithmic_where_the_ends_are_far_apart(repository):
    config = cli.load_config(f"{repository}/configs/planted.py")
    words = [
        "train.learning_rate=1e-4..1e-2",
        "model.hidden_dropout=0..0.5",
        "train.batch_size=64..640",
        "model.dim=64",
    ]
    rate, dropout, batch, dim = axes.read_axes(config, words)
    assert (rate.log, dropout.log, batch.log, dim.ranged) == (True, False, True, False)
    trial = optuna.trial.FixedTrial(
        {"train.learning_rate": 1e-3, "model.hidden_dropout": 0.0, "train.batch_size": 100, "model.dim": 64}
    )
    assert [axis.suggest(trial) for axis in (rate, dropout, batch, dim)] == [1e-3, 0.0, 100, 64]
    assert not rate.holds(0.1) and rate.holds(1e-2) and dim.holds(64) and not dim.holds(32)


def test_what_is_written_survives_odd_names(repository, tmp_path):
    config = cli.load_config(f"{repository}/configs/planted.py")
    with config.unlocked():
        config.data.root = str(tmp_path / 'a "b" \\c')
    (tmp_path / "best.py").write_text(tune.config_file(config, ['the """ config of \\x', "C:\\new"]))
    assert to_dict(cli.load_config(str(tmp_path / "best.py"))) == to_dict(config)


def start(words, **options):
    command = [sys.executable, "-m", "kdsr_jax.tune", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_two_processes_share_a_search_and_a_killed_one_is_made_up_for(line, repository, tmp_path):
    workdir, options = tmp_path / "shared", {"cwd": repository, "env": os.environ | {"PYTHONPATH": str(repository)}}
    words = line(workdir, trials=8, settings=("train.epochs=6",))
    killed = start(words, **options)
    deadline = time.monotonic() + 120
    while not list(workdir.glob("trials/*/checkpoints/select/2")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = [start(words, **options) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "best config:" in out
    trials = trials_of(workdir)
    assert [trial.number for trial in trials] == list(range(8))
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert not list((workdir / "trials").iterdir())
    best = max((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value)
    assert f"trial {best.number}," in (workdir / "best.py").read_text()
