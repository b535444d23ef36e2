"""Every study from end to end on a tiny planted shop, and what a kill leaves of one."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import pytest

from experiments.study import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

# Some settings of each study: every model's own planted run is in tests/models, every setting's config in test_figures.py.
STUDIES = {
    "table1": "statistics",
    "table2": "SASRec; KDSR",
    "table3": "KDSR; w/o L_C",
    "table4": "vq, cosine; kmeans, dot",
    "figure1": "ids; plain; distilled",
    "figure3": "SASRec, frozen; SASRec, tuned + CDL",
    "figure4": "text facets, d=16; text facets, d=32",
    "complexity": "H=1, L=10",
    "sensitivity": "D=8; D=4",
    "cold_items": "SASRec; KDSR",
    "prefix_vs_positions": "positions; prefixes",
}
TINY = [
    *("--datasets=planted", "--config.data.planted.num_users=200", "--config.data.planted.num_items=150"),
    *("--config.forgetting.num_pairs=200", "--config.teacher.num_pairs=2000", "--config.model.num_layers=1"),
]


@pytest.mark.parametrize("name", STUDIES)
def test_study_runs_to_the_end(name, tmp_path, capsys):
    study, some = importlib.import_module(f"experiments.{name}").STUDY, STUDIES[name]
    words = [
        *TINY,
        "--epochs=1",
        f"--only={some}",
        f"--folder={tmp_path / 'runs'}",
        f"--results={tmp_path / 'results'}",
    ]
    assert main(study, words) == 0, capsys.readouterr().err
    folder = tmp_path / "results" / name
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    ran = {row["label"] for row in rows if row["kind"] == "run"}
    assert ran == set(some.split("; "))
    table = (folder / "table.md").read_text()
    assert table == f"# {study.title}\n\n{study.table(rows)}"
    if study.figure:
        assert xml.etree.ElementTree.parse(folder / "figure.svg").getroot().tag.endswith("svg")
    if study.reference:
        assert {row["label"] for row in rows if row["kind"] == "comparison"} == ran - {study.reference}
    assert study.title in (tmp_path / "results" / "index.html").read_text()
    capsys.readouterr()
    assert main(study, words) == 0
    assert "runs stand in" in capsys.readouterr().out


def test_a_study_that_is_killed_gives_the_same_table(tmp_path, repository):
    def start(place):
        words = [
            *TINY,
            "--epochs=3",
            "--only=KDSR; w/o L_C",
            f"--folder={place / 'runs'}",
            f"--results={place / 'results'}",
        ]
        command = [sys.executable, "-m", "experiments.table3", *words]
        return subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL)

    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took = time.monotonic() - started
    for share in (0.3, 0.5, 0.4):
        process = start(tmp_path / "killed")
        time.sleep(share * took)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = (_without_seconds(tmp_path / place / "results" / "table3") for place in ("whole", "killed"))
    assert whole == killed


def _without_seconds(folder):
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not re.search("seconds", name)} for row in rows]
