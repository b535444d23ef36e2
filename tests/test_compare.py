"""Runs side by side: the table, the page, what is said of runs that hardly compare, and mistakes in one line."""

import html
import json
import re
import subprocess
import sys

import pytest

from kdsr_jax import compare

METRICS = {"hr@5": 1.25, "hr@20": 4.5, "mrr@20": 0.5}
HOSTILE = "<script>alert(1)</script>[/][bold]&\"'\x07"


def write_run(folder, *, epochs=3, finished=True, log="1", settings=None, forgetting=True):
    """Write the small files of a run, as Workdir and train do."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "data": {"name": "shop", "root": "/x", "k_core": 5}, "model": {"dim": 8}} | (settings or {})
    (folder / "config.json").write_text(json.dumps({"fingerprint": "ab", "config": config, "log_sha256": log}))
    lines = []
    for phase in ("select", "refit") if finished else ("select",):
        if forgetting:
            lines.append({"phase": phase, "epoch": 0, "forgetting": {"text": {"features": 0.9}}})
        for epoch in range(1, epochs + 1):
            line = {"phase": phase, "epoch": epoch, "losses": {"loss": 5.0 / epoch, "next_item": 4.0}}
            line |= {"learning_rates": {"body": 0.001}, "metrics": METRICS | {"mrr@20": 0.1 * epoch}}
            lines.append(line | ({"forgetting": {"text": {"features": 0.9 - 0.1 * epoch}}} if forgetting else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {"test": METRICS, "paper": None, "validation": METRICS, "best_epoch": 2, "train_seconds": 1234.5}
        result |= {"eval_seconds": 7.0, "parameters": 225545, "device": "1 x cpu"}
        (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Return a function (*words) -> (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def execute(*words):
        code = compare.main(list(map(str, words)))
        return code, *capsys.readouterr()

    return execute


def cells(out):
    """The printed rows as label -> cells."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {row[0]: row[1:] for row in rows if row[0]}


def test_one_table_of_settings_metrics_and_cost(command, tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", settings={"model": {"dim": 16, "new": "x"}, "seed": 0})
    code, out, err = command(a, b)
    assert (code, err) == (0, "")
    rows = cells(out)
    assert rows["model.dim"] == ["8", "16"] and rows["model.new"] == ["absent", '"x"']
    assert "seed" not in rows and "data.root" not in rows
    assert rows["hr@20"] == ["4.5000", "4.5000"] and rows["state"] == ["finished", "finished"]
    assert rows["seconds of training"] == ["1,234", "1,234"] and rows["parameters"] == ["225,545", "225,545"]
    assert rows["chosen epoch"] == ["2", "2"] and rows["epochs trained"] == ["select 3; refit 3"] * 2
    assert "note:" not in out
    assert "paper's protocol" not in out  # no run has such numbers
    assert out.endswith("curves: compare.html\n")


def test_the_page_lays_the_curves_of_a_phase_over_each_other(command, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", forgetting=False)
    assert command(a, b, "--out=page.html")[0] == 0
    page = (tmp_path / "cwd" / "page.html").read_text()
    titles = re.findall(r"<svg[^>]*><title>([^<]*)</title>", page)
    names = ["hr@5", "hr@20", "mrr@20", "loss", "next_item", "body", "text, features"]
    assert titles == names * 2  # both phases
    assert "a from 5 to 1.667; b from 5 to 1.667" in page
    assert "a from 0.9 to 0.6; b: no data" in page
    assert re.findall(r"<h3>(Metrics[^<]*)</h3>", html.unescape(page)) == [
        "Metrics",
        "Metrics on the test part, epoch by epoch: paper's protocol",
    ]
    assert "default-src 'none'" in html.unescape(page) and "<script" not in page and "://" not in page


def test_a_curve_needs_two_epochs(command, tmp_path):
    a, b = (write_run(tmp_path / name, epochs=1, forgetting=False) for name in "ab")
    assert command(a, b)[0] == 0
    page = (tmp_path / "cwd" / "compare.html").read_text()
    assert "<svg" not in page and "No run has two epochs yet" in page


def test_unfinished_runs_show_what_there_is_so_far(command, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", finished=False)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "select", "epo')  # just being written
    c = tmp_path / "c"
    c.mkdir()
    (c / "config.json").write_text((tmp_path / "b" / "config.json").read_text())
    code, out, _ = command(a, b, c)
    rows = cells(out)
    assert code == 0 and rows["state"] == ["finished", "select, epoch 3 done", "no epoch done yet"]
    assert "note: b is not finished" in out and "note: c is not finished" in out
    validation = next(row for row in out.splitlines() if row.strip().startswith("mrr@20"))
    assert validation.split()[1:] == ["0.5000", "0.3000", "–"]  # of b, the best epoch on validation
    assert rows["seconds of training"] == ["1,234", "–", "–"]
    assert "different data" not in out  # c has not read its data yet


def test_runs_on_different_data_are_told_apart(command, tmp_path):
    a, b, c = write_run(tmp_path / "a"), write_run(tmp_path / "b", log="2"), write_run(tmp_path / "c")
    assert "note: the runs are on different data" in command(a, b)[1]
    assert "note:" not in command(a, c)[1]


def test_names_are_the_last_part_of_the_path_or_all_of_it(command, tmp_path):
    a, b = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    c = write_run(tmp_path / "y" / "other")
    assert "Comparison" not in command(a, c)[1]
    page = (tmp_path / "cwd" / "compare.html").read_text()
    assert "run, other" in page and a not in page
    command(a, b)
    assert f"{a}, {b}" in (tmp_path / "cwd" / "compare.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "the following arguments are required: RUN"),
        (["{a}"], "give two runs or more"),
        (["{a}", "{a}/../a"], "is given twice"),
        (["{a}", "missing"], "missing: holds no run of kdsr_jax"),
        (["{a}", "{empty}"], "holds no run of kdsr_jax"),
        (["{a}", "{foreign}"], "holds no run of kdsr_jax"),
        (["{a}", "x\0y"], "holds no run of kdsr_jax"),
        (["{a}", "{b}", "--uot=x"], "unrecognized arguments: --uot=x"),
        (["{a}", "{b}", "--out=no/such/folder.html"], "--out=no/such/folder.html: cannot be written"),
        (["{a}", "{b}", "--out={empty}"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(command, tmp_path, words, expected):
    places = {"a": write_run(tmp_path / "a"), "b": write_run(tmp_path / "b")}
    for name in ("empty", "foreign"):
        (tmp_path / name).mkdir()
        places[name] = tmp_path / name
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": []}')
    code, out, err = command(*(word.format(**places) for word in words))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err
    assert not any((tmp_path / "cwd").iterdir())


def test_hostile_text_is_shown_as_it_is(command, tmp_path):
    a = write_run(tmp_path / "a", settings={"model": {"name": HOSTILE, HOSTILE: 1}})
    b = write_run(tmp_path / "b [bold]")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        odd = {"losses": {HOSTILE: 1.0}, "metrics": {HOSTILE: float("nan"), "x": "y"}}
        file.write(json.dumps({"phase": "select", "epoch": 4} | odd) + "\n")
        file.write(json.dumps({"phase": "select", "epoch": 6, "losses": {HOSTILE: 2.0}}) + "\n")
        file.write(
            '[1]\n{"phase": 3, "epoch": "x"}\n{"phase": "select", "epoch": 9, "losses": [1], "forgetting": {"t": 3}}\n'
        )
    code, out, _ = command(a, b)
    page = (tmp_path / "cwd" / "compare.html").read_text()
    assert code == 0 and "<script" not in page and "&lt;script&gt;" in page
    assert "[/][bold]" in out and "b [bold]" in out and "\x07" not in out + page


def test_it_is_quick_and_imports_nothing_heavy(tmp_path, repository):
    runs = [write_run(tmp_path / name) for name in "ab"]
    code = "import sys, time, resource\nfrom kdsr_jax import compare\n"
    code += f"assert compare.main({[*runs, f'--out={tmp_path}/c.html']!r}) == 0\n"
    code += "assert not {'jax', 'jaxlib', 'flax', 'orbax', 'numpy', 'pyarrow'} & set(sys.modules)\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.splitlines()[-1]) < 2.0  # of the processor; 0.3 s here


def test_runs_as_they_are_written(finished, tiny, tmp_path, command):
    """The files that training writes are the ones that are read."""
    import shutil

    other = shutil.copytree(finished[0], tmp_path / "other")
    (other / "result.json").unlink()
    code, out, _ = command(finished[0], other)
    result = finished[1]
    rows = cells(out)
    assert code == 0 and rows["state"] == ["finished", "refit, epoch 3 done"] and "different data" not in out
    assert rows["parameters"] == [f"{result['parameters']:,}", "–"]
    assert f"{result['validation']['mrr@20']:.4f}" in out and f"{result['paper']['hr@5']:.4f}" in out
    assert "image, features" in (tmp_path / "cwd" / "compare.html").read_text()
