"""Compare runs: what differs in their settings, their metrics, time and size, and their curves laid over each other.

python -m kdsr_jax.compare RUN RUN [RUN ...] [--out=compare.html]
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from kdsr_jax.config import NOT_FINGERPRINTED, flatten
from kdsr_jax.errors import Parser, UserError, answer
from kdsr_jax.files import replace_file
from kdsr_jax.labels import COLUMNS, SELECT_METRIC, names_of_runs
from kdsr_jax.report.files import read_json, read_lines, saved_run
from kdsr_jax.report.text import clean

NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What the folder of a run, finished or not, says about it.

    Attributes:
        settings: the config's fields that can change a result, by dotted name.
        data: sha256 of the log; None where the run has not read it yet.
        result: result.json, or {}.
        lines: of metrics.jsonl.
        validation: metrics of the epoch that validation has chosen so far, or {}.
    """

    settings: dict[str, Any]
    data: str | None
    result: dict[str, Any]
    lines: list[dict]
    validation: dict[str, float]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one line about what the user can put right."""
    parser = Parser(prog="python -m kdsr_jax.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --workdir of a run, finished or not; two or more")
    parser.add_argument("--out", default="compare.html", help="the page of overlaid curves (compare.html)")

    def work():
        arguments = parser.parse_args(words)
        compare(arguments.runs, arguments.out)

    return answer(work, "interrupted")


def compare(folders: Sequence[str], out: str) -> None:
    """Print the table of some runs and write their page.

    Args:
        folders: of the runs.
        out: path of the page, written by rename.

    Raises:
        UserError: fewer than two runs, a folder twice, a folder that holds no run, or a page that cannot be written.
    """
    from kdsr_jax.report.comparison import render_comparison

    runs = {name: read_run(folder) for name, folder in _named(folders).items()}
    sections, notes = tabulate(runs), warnings(runs)
    page = render_comparison({name: run.lines for name, run in runs.items()}, sections, notes)
    try:
        replace_file(out, lambda file: file.write(page.encode()))
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out}: cannot be written ({getattr(error, 'strerror', error)})") from error
    _print(list(runs), sections)
    for note in notes:
        print(f"note: {clean(note)}")
    print(f"curves: {clean(out)}")


def read_run(folder: str) -> RunRecord:
    """Read what a run's folder holds so far.

    Raises:
        UserError: it holds no run.
    """
    path = pathlib.Path(folder)
    saved = saved_run(path)
    settings = {name: value for name, value in flatten(saved["config"]).items() if name not in NOT_FINGERPRINTED}
    result = _dict(read_json(path / "result.json"))
    lines = [line for line in map(_clean_line, read_lines(path / "metrics.jsonl")) if line]
    chosen = _numbers(result.get("validation")) or _numbers(_dict(read_json(path / "selection.json")).get("validation"))
    log = saved.get("log_sha256")
    return RunRecord(
        settings,
        log if isinstance(log, str) else None,
        result,
        lines,
        chosen or _best_so_far(lines),
    )


def tabulate(runs: dict[str, RunRecord]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Return the table as [(heading, [(label, [text a run, ...]), ...]), ...]; empty sections are left out."""
    records = list(runs.values())
    sections = [("run", [("state", [_state(run) for run in records])])]
    names = dict.fromkeys(name for run in records for name in run.settings)
    texts = [(name, [_setting(run, name) for run in records]) for name in names]
    sections.append(("settings that differ", [row for row in texts if len(set(row[1])) > 1]))
    for key, heading in COLUMNS.items():
        columns = [run.validation if key == "validation" else _numbers(run.result.get(key)) for run in records]
        metrics = dict.fromkeys(name for column in columns for name in column)
        rows = [(n, [f"{column[n]:.4f}" if n in column else NOTHING for column in columns]) for n in metrics]
        sections.append((f"{heading}, percent", rows))
    sections.append(("cost", [(label, [f(run) for run in records]) for label, f in _COSTS.items()]))
    return [(heading, rows) for heading, rows in sections if rows]


def warnings(runs: dict[str, RunRecord]) -> list[str]:
    """Say in plain sentences why numbers of these runs may not stand side by side."""
    notes = [f"{name} is not finished: its numbers are those so far" for name, run in runs.items() if not run.result]
    if len({run.data for run in runs.values() if run.data}) > 1:
        notes.append("the runs are on different data, so their metrics do not compare")
    if len({run.settings.get("eval.filter_seen") for run in runs.values()}) > 1:
        notes.append("some runs leave items of the history out of the ranking (eval.filter_seen) and some do not")
    return notes


def _named(folders):
    """Return short name -> folder: the last part of the path, or all of it where that is not enough."""
    if len(folders) < 2:
        raise UserError("give two runs or more to compare")
    places = [os.path.realpath(folder) for folder in folders if "\0" not in folder]
    twice = next((f for f, place in zip(folders, places, strict=False) if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"{twice}: is given twice; give each run once")
    return dict(zip(names_of_runs(folders), folders, strict=True))


def _clean_line(line):
    """Return a line of metrics.jsonl without what is no number; None for what is no line of an epoch."""
    if not (isinstance(line, dict) and isinstance(line.get("epoch"), int) and isinstance(line.get("phase"), str)):
        return None
    kept = {name: _numbers(line.get(name)) for name in ("metrics", "losses", "learning_rates")}
    kept["forgetting"] = {name: _numbers(values) for name, values in _dict(line.get("forgetting")).items()}
    return kept | {"phase": line["phase"], "epoch": line["epoch"]}


def _best_so_far(lines):
    evaluated = [line["metrics"] for line in lines if line["phase"] == "select" and SELECT_METRIC in line["metrics"]]
    return max(evaluated, key=lambda metrics: metrics[SELECT_METRIC], default={})


def _dict(value):
    return value if isinstance(value, dict) else {}


def _numbers(group):
    return {name: float(value) for name, value in _dict(group).items() if _is_number(value)}


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _state(run):
    if run.result:
        return "finished"
    return f"{run.lines[-1]['phase']}, epoch {run.lines[-1]['epoch']} done" if run.lines else "no epoch done yet"


def _setting(run, name):
    return json.dumps(run.settings[name], ensure_ascii=False) if name in run.settings else "absent"


def _count(key):
    return lambda run: f"{run.result[key]:,.0f}" if _is_number(run.result.get(key)) else NOTHING


def _epochs(run):
    return "; ".join(
        f"{phase} {max(epochs)}"
        for phase in dict.fromkeys(line["phase"] for line in run.lines)
        if (epochs := [line["epoch"] for line in run.lines if line["phase"] == phase])
    )


_COSTS = {
    "chosen epoch": _count("best_epoch"),
    "epochs trained": lambda run: _epochs(run) or NOTHING,
    "seconds of training": _count("train_seconds"),
    "seconds of evaluation": _count("eval_seconds"),
    "parameters": _count("parameters"),
    "device": lambda run: str(run.result.get("device", NOTHING)),
}


def _print(names, sections):
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    def plain(text):
        return rich.text.Text(clean(text), overflow="fold")  # nothing is read as markup

    table = rich.table.Table("", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(plain(name), justify="right")
    for heading, rows in sections:
        table.add_section()
        table.add_row(rich.text.Text(heading, style="bold"))
        for label, cells in rows:
            table.add_row(plain(label), *map(plain, cells))
    rich.console.Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
