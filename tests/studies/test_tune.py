"""Fair tuning: which trials go on, what is kept of them, and that no test item is looked at."""

import json

import pytest

from experiments import tune
from kdsr_jax import train
from kdsr_jax.errors import UserError

TINY = (
    *("--dataset=planted", "--config.data.planted.num_users=300", "--config.data.planted.num_items=40"),
    *("--config.data.planted.mean_length=8", "--config.data.planted.feature_dim=16", "--config.model.dim=8"),
    "--config.model.num_layers=1",
)
SCORES = {0.0005: (1.0, 6.0), 0.001: (3.0, 4.0), 0.002: (2.0, 5.0)}  # rate -> score in the first round, and later


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command line; returns (exit code, stdout, stderr)."""

    def execute(*words, place="a"):
        folders = f"--folder={tmp_path / place / 'runs'}", f"--results={tmp_path / place / 'results'}"
        code = tune.main([*TINY, *folders, *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


@pytest.fixture
def content(tmp_path):
    """Return a function (name of the file, place) -> what the file of results holds."""

    def read(name="planted", place="a"):
        return json.loads((tmp_path / place / "results" / "tuning" / f"{name}.json").read_text())

    return read


@pytest.fixture
def rounds(monkeypatch):
    """Stand in for training by SCORES, less with dropout; the list of what was trained, and when to stop with what."""

    class Rounds(list):
        stop, error = None, KeyboardInterrupt

    rounds = Rounds()

    def train_rung(job, epochs):
        if len(rounds) == rounds.stop:
            raise rounds.error("diverged")
        model, rate = job.config.model, job.config.train.learning_rate
        rounds.append((job.setting.variant, rate, model.hidden_dropout, model.attention_dropout, epochs))
        score = SCORES[rate][epochs > 5] - model.hidden_dropout
        values = {"validation": {"mrr@20": score}, "seconds": 60.0, "best_epoch": epochs}
        return {"epochs": epochs, "trained": epochs} | values

    monkeypatch.setattr(tune, "train_rung", train_rung)
    return rounds


def test_better_half_goes_on_and_the_best_of_the_last_round_is_chosen(run, rounds, content):
    code, out, _ = run("--variants=kdsr-sasrm,sasrec")
    assert code == 0 and list(content()) == ["kdsr-sasrm", "sasrec"]
    for variant in ("kdsr-sasrm", "sasrec"):
        mine = [what[1:] for what in rounds if what[0] == variant]
        assert mine[:6] == [(rate, dropout, dropout, 5) for rate in SCORES for dropout in (0.2, 0.5)]
        assert mine[6:] == [(0.001, 0.2, 0.2, 15), (0.001, 0.5, 0.5, 15), (0.002, 0.2, 0.2, 15)]
        entry = content()[variant]
        assert [len(trial["rungs"]) for trial in entry["trials"]] == [1, 1, 2, 2, 2, 1]
        chosen = {"train.learning_rate": 0.002, "model.hidden_dropout": 0.2, "model.attention_dropout": 0.2}
        assert entry["trials"][entry["choice"]]["fields"] == chosen
        assert entry["config"]["data.user_fraction"] == 0.2 and entry["config"]["train.epochs"] == 15
    line = "| **learning_rate 0.002, hidden_dropout 0.2, attention_dropout 0.2** | 1.800 (5) | 4.800 (15) | 15 | 60 |"
    assert f"| kdsr-sasrm {line}" in out and f"| sasrec {line}" in out and out.count("**") == 4


def test_last_round_of_three_is_the_best_one_alone(run, rounds, content):
    assert run("--variants=sasrec", "--epochs=5,15,45")[0] == 0
    assert [what[1:] for what in rounds[9:]] == [(0.002, 0.2, 0.2, 45)] and content()["sasrec"]["choice"] == 4


@pytest.mark.parametrize("stop", [0, 1, 6, 8, 9, 17])
def test_killed_search_goes_on(run, rounds, content, stop):
    run("--variants=sasrm,sasrec", place="whole")
    whole = list(rounds)
    rounds.clear()
    rounds.stop = stop
    assert run("--variants=sasrm,sasrec")[0] == 130
    rounds.stop = None
    assert run("--variants=sasrm,sasrec")[0] == 0
    assert rounds == whole and content() == content(place="whole")
    assert run("--variants=sasrm,sasrec")[0] == 0 and rounds == whole


def test_variants_are_merged_and_a_failing_one_spoils_no_other(run, rounds, content):
    rounds.stop, rounds.error = 2, UserError
    code, _, err = run("--variants=sasrm")
    assert code == 1 and "failed: sasrm: diverged" in err and content()["sasrm"]["choice"] is None
    rounds.stop = None
    assert run("--variants=sasrec")[0] == 0
    assert content()["sasrec"]["choice"] == 4
    assert [len(trial["rungs"]) for trial in content()["sasrm"]["trials"]] == [1, 1, 0, 0, 0, 0]


def test_other_fields_can_be_tried_under_a_name(run, rounds, content):
    tries = "--try=distill.lambda_score=1,10", "--try=distill.sigma=sigmoid,identity"
    assert run("--variants=kdsr-sasrm", "--name=lambdas", *tries)[0] == 0
    entry = content("planted-lambdas")["kdsr-sasrm"]
    fields = [tuple(trial["fields"].values()) for trial in entry["trials"]]
    assert fields == [(1.0, "sigmoid"), (1.0, "identity"), (10.0, "sigmoid"), (10.0, "identity")]
    assert entry["choice"] == 0 and "distill.sigma" not in entry["config"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs=15,5"], "--epochs=15,5: write rising whole numbers"),
        (["--epochs=0,5"], "--epochs=0,5: write rising whole numbers"),
        (["--epochs=5,x"], "--epochs=5,x: write rising whole numbers"),
        (["--fraction=2"], "--config.data.user_fraction=2.0: must be"),
        (["--variants=sasrek"], "the variant must be one of"),
        (["--try=model.dim=8,16"], "--try needs a --name"),
        (["--try=model.dim", "--name=x"], "--try=model.dim: write --try=FIELD=V1,V2"),
        (["--try=data.root=a,b", "--name=x"], "data.root changes no result"),
        (["--name=../x"], "--name=../x: must be letters"),
        (["--config.train.learning_rate=1"], "model.hidden_dropout, model.attention_dropout: set by the search"),
        (["--config.train.epochs=3"], "data.user_fraction, train.epochs"),
        (["--config.train.patience=2"], "planted.json holds another search of sasrec; give this one a --name"),
        (["--epochs=5"], "planted.json holds another search of sasrec"),
    ],
)
def test_wrong_words_get_one_line_before_anything_is_trained(run, rounds, words, told):
    run("--variants=sasrec")
    rounds.clear()
    code, _, err = run("--variants=sasrec", *words)
    assert code == 2 and told in err and err.count("\n") == 1 and not rounds


def without_seconds(content):
    """Check what is kept of where and how long, and leave out what differs between two times."""
    for entry in content.values():
        for rung in (rung for trial in entry["trials"] for rung in trial["rungs"]):
            assert rung.pop("seconds") > 0 and rung.pop("commit") and rung["device"] and rung["data_sha256"]
    return content


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_true_search_is_the_same_after_an_interruption_and_tests_nothing(run, content, monkeypatch, tmp_path):
    def fail(*_):
        raise AssertionError("a test item was looked at")

    monkeypatch.setattr(train, "refit_phase", fail)
    rates = "--try=train.learning_rate=0.00001,0.03", "--name=x"
    words = "--variants=sasrec", *rates, "--epochs=1,2", "--fraction=0.5"
    assert run(*words)[0] == 0
    whole = without_seconds(content("planted-x"))
    slow, fast = whole["sasrec"]["trials"]
    first = [trial["rungs"][0]["validation"]["mrr@20"] for trial in (slow, fast)]
    assert first[0] < first[1] and whole["sasrec"]["choice"] == 1
    assert [[rung["trained"] for rung in trial["rungs"]] for trial in (slow, fast)] == [[1], [1, 2]]
    logs = [file.read_text() for file in tmp_path.rglob("metrics.jsonl")]
    assert sorted(log.count("\n") for log in logs) == [1, 2] and not any('"refit"' in log for log in logs)
    assert not list(tmp_path.rglob("ranks.npz")) and not list(tmp_path.rglob("refit"))

    trained, calls = tune.train_rung, []

    def interrupted(job, epochs):
        calls.append(epochs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(job, epochs)

    monkeypatch.setattr(tune, "train_rung", interrupted)
    assert run(*words, place="b")[0] == 130 and run(*words, place="b")[0] == 0
    assert calls == [1, 1, 1, 2] and without_seconds(content("planted-x", "b")) == whole

    # The folders are further on than the file that was lost; what it gets anew is the same.
    (tmp_path / "b" / "results" / "tuning" / "planted-x.json").unlink()
    assert run(*words, place="b")[0] == 0 and without_seconds(content("planted-x", "b")) == whole
