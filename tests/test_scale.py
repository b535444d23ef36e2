"""What experiments.scale measures, at a tiny size, and docs/scale.md as a function of it."""

import json

import pytest

from experiments import scale
from kdsr_jax.report.files import read_json


def log(size, seconds, more):
    memory = {"before": 200.0, "peak": 200.0 + more}
    counts = {"interactions": size, "users": size // 20, "items": size // 50, "shards": {"bytes": 10 * size}}
    return {"size": size, "seconds": {"prepare": seconds, "again": 0.5}, "memory": memory, "load": 3.0} | counts


def step(size, seconds, model="SASRec, all items"):
    memory = {"process": 500.0 + size / 1000, "programs": 5.0, "device": None}
    counts = {"parameters": 32 * size, "targets": 120.0, "load": 3.0}
    return {"model": model, "size": size, "step": seconds, "ranking": seconds / 100, "memory": memory} | counts


FOUND = {
    "logs": [log(1000, 1.0, 1.0), log(100_000, 10.0, 100.0)],
    "catalogues": [step(1000, 0.001), step(100_000, 0.1), step(1000, 0.002, "KDSR, all items")],
}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponents_of_power_laws_are_found(power):
    assert scale.exponent([(x, 3 * x**power) for x in (1e2, 1e4, 1e5)]) == pytest.approx(power)


def test_the_fit_is_of_least_squares():
    # Of the logarithms 0, 0 and 3 at 0, 1 and 2 the best line rises by 1.5.
    assert scale.exponent([(1, 1), (10, 1), (100, 1000)]) == pytest.approx(1.5)
    assert scale.exponent([(10, 1), (10, 2)]) is None and scale.exponent([]) is None


def test_the_page_says_what_was_measured():
    text = scale.page(FOUND)
    assert "seconds to prepare 0.50, memory beyond the start 1.00." in text
    assert "| 100,000 | 100,000 | 5,000 | 2,000 | 1.0 | 10.00 | 10,000 | 0.50 | 200 | 300 | 1,049 | 3.0 |" in text
    assert "| SASRec, all items | 100,000 | 3,200,000 | 120 | 0.1000 | 1.00 | 600 | 5 | 3.0 |" in text
    assert "| SASRec, all items | 1.00 | 1.00 |" in text and "| KDSR, all items | – | – | – |" in text
    assert "Not measured yet: SASRec, sampled; KDSR, sampled." in text
    assert scale.page({"logs": [], "catalogues": []}).count("Not measured yet.") == 2
    picture = scale.picture(FOUND)
    assert picture.startswith("<svg") and all(name in picture for name in ("Preparation: time", "Ranking one target"))


def test_the_page_is_that_of_the_file():
    assert scale.DOCS.read_text() == scale.page(read_json(scale.SAVED))


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--interactions=many", "'many' is no whole number"),
        ("--items=0", "'0' is no whole number"),
        ("--models=Nothing", "there is no 'Nothing'"),
        ("--rounds=0", "must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(word, line, capsys):
    assert scale.main([word]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_everything_is_measured(tmp_path, capsys):
    out = tmp_path / "scale.json"
    words = ["--interactions=2000,8000", "--items=60,300", "--users=30", f"--folder={tmp_path}", f"--out={out}"]
    assert scale.main([*words, "--models=KDSR, all items"]) == 0
    found = json.loads(out.read_text())
    assert [row["size"] for row in found["logs"]] == [2000, 8000]
    assert all(0 < row["interactions"] <= row["size"] and row["seconds"]["prepare"] > 0 for row in found["logs"])
    small, large = found["catalogues"]
    assert large["parameters"] - small["parameters"] == 240 * (32 + 32)
    assert small["step"] > 0 and small["ranking"] > 0 and small["memory"]["process"] > 50
    assert scale.page(found) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
