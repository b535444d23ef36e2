"""The benchmark suite at a tiny size, and the tables of docs/performance.md as a function of what was measured."""

import json
import re
import sys

import pytest

from experiments import bench, performance
from experiments.processes import Worker, medians, take_turns
from kdsr_jax.errors import UserError
from kdsr_jax.report.files import read_json

TINY = (
    *("--config.data.planted.num_users=60", "--config.data.planted.num_items=40", "--config.data.k_core=1"),
    *("--config.model.dim=8", "--config.data.max_length=4", "--config.data.planted.feature_dim=8"),
    *("--config.train.batch_size=80", "--config.train.steps_per_call=2"),
)


def turn(scale):
    return {"step": {"16": 0.01 * scale}, "epoch": 2.0 * scale, "cpu": 3.0 * scale, "ranking": 0.001 * scale}


def model(scale, **changes):
    """What is kept of one model; its times are so many times SASRec's."""
    work = {"dataset": "planted", "tables": "none", "trained on": "positions", "compilation": 7.4, "steps": 100}
    work |= {"targets": 10_000, "inputs": 20_000, "squares": 400_000, "items": 1000, "dim": 64, "parameters": 123_456}
    work |= {"maps": 5000, "attention": 2, "distilled": 0, "table_width": 64, "codes": 0, "pair_budget": 0} | changes
    memory = {"process": 812.3, "programs": 45.6, "device": None}
    return bench.row(work, [turn(scale), turn(3 * scale), turn(2 * scale)], memory, {"gflops": 50.0, "gbytes": 8.0})


HARDWARE = {"device": "1 x cpu", "cores": 2, "processor": "EPYC", "python": "3.11", "versions": {"jax": "0.10.2"}}
FOUND = {
    "hardware": HARDWARE,
    "machine": {"gflops": 50.0, "gbytes": 8.0},
    "load": 1.25,
    "commit": "abc",
    "steps of a turn": 16,
    "rounds": 3,
    "against": "",
    "models": {"sasrec": model(1.0), "tuned-sasrm": model(1.1), "kdsr-sasrm": model(1.21, distilled=2)},
    "reach": {"sasrec": {"target": 6.0, "train": [1.0, 1.5], "evaluation": [0.5, 0.5], "mrr@20": [5.0, 6.5]}},
}
LATEST = {
    "datasets": {"planted": FOUND},
    "startup": {"help": 0.3, "cold": 21.0, "warm": 5.0, "load": 1.0, "hardware": HARDWARE},
}
QUALITY = {
    "theirs": [{"seconds": 100.0, "mrr@20": 3.0, "hr@20": 9.0}, {"seconds": 110.0, "mrr@20": 2.5, "hr@20": 8.0}],
    "checks": {"valid": {"own": {"hit@20": 9.01, "mrr@20": 3.0}, "ours": {"hr@20": 9.0, "mrr@20": 3.0}}},
    "target": 3.0,
    "ours": {"train": [4.0, 4.0], "evaluation": [1.0, 1.0], "mrr@20": [2.0, 3.2]},
}
SPEED = {"hardware": HARDWARE, "torch": "2.13.0", "threads": 2, "load": 1.0, "targets": 10_000, "steps of a turn": 8}
SPEED |= {
    "theirs": {"epoch": 80.0, "cpu": 150.0},
    "ours": {"epoch": 2.0, "cpu": 3.0},
    "ratio": {"epoch": 40.0, "cpu": 50.0},
}
SPEED |= {"rounds": {"theirs": [{"epoch": 80.0, "cpu": 150.0}], "ours": [{"epoch": 2.0, "cpu": 3.0}]}}
PEERS = {"planted": {"sasrec": SPEED | {"quality": QUALITY}}}
STEP = {
    "length": 4,
    "steps": 8,
    "ms": 61.23,
    "parts": {"encoder": 30.0, "rest": 90.0},
    "operations": [["fusion, rest", 44.44]] * 3,
}
COSTS = {"hardware": HARDWARE, "load": 1.0, "rows": {"configs/planted.py": STEP}}


def block(name, text="old"):
    return f"<!-- bench:{name} -->\n{text}\n<!-- /bench -->"


def filled(name, latest=LATEST, peers=PEERS):
    """The rows of a block's table, each a list of cells."""
    text = performance.updated(block(name), latest, peers, COSTS)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_block_is_filled_and_nothing_else_changes():
    docs = performance.DOCS.read_text()
    names = re.findall(r"<!-- bench:(.+?) -->", docs)
    assert len(names) == len(set(names)) == docs.count("<!-- /bench -->") > 5
    full = performance.updated(docs, LATEST, PEERS, COSTS)
    outside = re.compile(r"(<!-- bench:.+? -->\n).*?(<!-- /bench -->)", re.DOTALL)
    assert outside.sub(r"\1\2", full) == outside.sub(r"\1\2", docs)
    assert performance.NOTHING not in full
    assert performance.updated(full, LATEST, PEERS, COSTS) == full
    assert performance.updated(full, {}, {}, {}).count(performance.NOTHING) == len(names)


def test_docs_say_what_the_files_say():
    found = [read_json(path) or {} for path in (performance.LATEST, performance.PEERS, performance.COSTS)]
    docs = performance.DOCS.read_text()
    assert performance.updated(docs, *found) == docs


def test_a_block_of_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="speeed"):
        performance.updated(block("speeed"), LATEST, PEERS, COSTS)


def test_models_are_medians_and_shares_of_the_floor():
    row = filled("models")[2]
    assert row[:9] == ["`sasrec`", "none", "positions", "123,456", "7", "4.00", "2,500", "500", f"{row[8]}"]
    # A step: encoder 6 x 200 x 5000, attention 12 x 4000 x 64 x 2, softmax 6 x 100 x 1000 x 64 at 50 GFLOP/s, and Adam at 8 GB/s.
    least = 100 * ((6e6 + 6.144e6 + 38.4e6) / 50e9 + 32 * 123_456 / 8e9)
    assert row[8] == f"{least / 4:.1%}"


def test_the_parts_of_a_step_are_shares_of_all_time():
    rows = filled("costs")
    assert rows[2] == ["`configs/planted.py`", "4", "61.2", "25%", "75%"]
    assert rows[-1] == ["`configs/planted.py`", *["`fusion, rest`: 44.4"] * 3]


def test_distillation_is_compared_round_by_round():
    assert filled("cdl")[2] == ["planted", "`kdsr-sasrm`", "+10.0%", "+10.0%"]


def test_targets_are_marked_as_reached_or_not():
    assert [row[-1] for row in filled("startup")[2:]] == ["yes", "**no**", "yes"]
    assert filled("peers")[2][3:8] == ["80", "2.0", "40.0", "50.0", "yes"]
    slow = {"planted": {"sasrec": SPEED | {"ratio": {"epoch": 29.9, "cpu": 50.0}}}}
    assert filled("peers", peers=slow)[2][7] == "**no**"


def test_quality_is_compared_at_the_best_that_theirs_reached():
    row = filled("peers-quality")[2]
    assert row[2:] == ["1", "3.000", "9.000", "100.0", "8.0", "2", "12.5", "yes"]
    never = json.loads(json.dumps(PEERS))
    never["planted"]["sasrec"]["quality"]["ours"]["mrr@20"] = [2.0, 2.9]
    assert filled("peers-quality", peers=never)[2][6:] == ["–", "2", "–", "**no**"]
    assert filled("peers-checks")[2][3] == "9.01 / 9.00"


def test_time_to_a_quality_that_was_not_reached_is_left_out():
    assert filled("reach")[2][3:6] == ["2.5", "2", "6.50"]
    never = json.loads(json.dumps(LATEST))
    never["datasets"]["planted"]["reach"]["sasrec"]["target"] = 7.0
    assert filled("reach", latest=never)[2][3] == "–"


def test_a_comparison_is_with_the_same_model_of_the_other_version():
    models = {"sasrec": model(1.0), "sasrec@v1": model(2.0)}
    text = performance.report(FOUND | {"against": "v1", "models": models})
    assert "| `sasrec` | `sasrec@v1` | 0.500 | 0.500 |" in text
    assert "| `sasrec@v1` |" in text and "| `sasrec@v1` | `sasrec@v1` |" not in text


ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "fail":
        sys.exit("it went wrong")
    print(json.dumps({"error": "no"} if request["do"] == "refuse" else {"value": request.get("value", 0), "of": {"a": 1}}), flush=True)
"""


def test_workers_answer_and_say_why_they_do_not():
    worker = Worker("echo", [sys.executable, "-c", ECHO])
    assert worker.ask("turn", value=3) == {"value": 3, "of": {"a": 1}}
    assert take_turns({"echo": worker}, 2, {"echo": {"value": 5}})["echo"][1]["value"] == 5
    with pytest.raises(UserError, match="echo: no"):
        worker.ask("refuse")
    for _ in range(2):
        with pytest.raises(UserError, match="ended with 1: it went wrong"):
            worker.ask("fail")
    worker.close()


def test_medians_of_nested_numbers():
    assert medians([{"a": 3, "b": {"c": 1.0}}, {"a": 1, "b": {"c": 5.0}}, {"a": 2, "b": {"c": 2.0}}]) == {
        "a": 2,
        "b": {"c": 2.0},
    }


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--datasets=planned"], "planned"),
        (["--rounds=0"], "--rounds"),
        (["--against=no-such-commit"], "no-such-commit"),
        (["--models=sasrek", "--no-startup"], "did you mean sasrec"),
    ],
)
def test_mistakes_are_one_line(words, complaint, capsys):
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert complaint in error and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_suite_runs_to_the_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "latest.json"
    monkeypatch.setattr(bench, "REACH", {"planted": 0.01})
    words = ["--models=sasrec,sasrec+model.num_layers=1", "--steps=1", "--rounds=2", f"--out={out}", *TINY]
    assert bench.main(words) == 0, capsys.readouterr().err
    latest = json.loads(out.read_text())
    found = latest["datasets"]["planted"]
    two, one = found["models"].values()
    assert two["maps"] == 2 * one["maps"] > 0 and two["targets"] == one["targets"]
    for row in (one, two):
        assert row["compilation"] > 0 and row["memory"]["process"] > 50 and row["memory"]["programs"] > 0
        assert 0 < row["fraction"] < 1 and row["targets/s"] == pytest.approx(row["targets"] / row["seconds"]["epoch"])
    assert found["reach"]["sasrec"]["mrr@20"][-1] >= 0.01
    assert 0 < latest["startup"]["help"] < latest["startup"]["warm"]
    assert latest["startup"]["warm"] < latest["startup"]["cold"]
    assert "sasrec" in performance.updated(block("models"), latest, {}, {})
    assert "`sasrec+model.num_layers=1` | `sasrec`" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_versions_take_turns(capsys):
    words = ["--models=sasrec", "--against=HEAD", "--steps=1", "--rounds=1", "--no-startup", *TINY]
    before = performance.LATEST.read_bytes()
    assert bench.main(words) == 0, capsys.readouterr().err
    assert "| `sasrec` | `sasrec@HEAD` |" in capsys.readouterr().out
    assert performance.LATEST.read_bytes() == before
