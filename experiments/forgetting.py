"""Modality forgetting (Figure 1 of the paper): what tuned tables share with the features, with and without distillation.

    python -m experiments.forgetting                                        # trains and draws the planted shop
    python -m experiments.forgetting RUN_WITHOUT RUN_WITH --out=docs/forgetting-beauty.svg

Draws Pearson's r between the cosines of item pairs in a tuned table E and in the raw features M ("features"), and in the item
table V of a run of item ids alone ("ids"), over the epochs, one panel a modality, and prints the ends of the curves. Runs must
have been trained with ``--config.forgetting.reference_workdir=RUN_OF_IDS`` for the latter. Several pairs of runs make several
rows of panels. Phase select is drawn where both runs of a pair have it, else refit.
"""

import argparse
import pathlib
import re
import subprocess
import sys

import rich.console
import rich.table
import rich.text

from kdsr_jax.report.charts import WIDTH, line_chart, write_svg
from kdsr_jax.report.files import read_lines

KINDS = ("distilled", "plain")  # runs with distillation and without
SHOWN = (0, 1, 5, 10, 20, 30, 40)  # epochs of the printed table, and the last one
# On the planted shop tables with the default settings hardly forget; small ones that learn at full rate at once do.
SETTINGS = {
    "default settings": [],
    "table_scale=0.02, no ramp": ["--config.model.table_scale=0.02", "--config.train.ramp_epochs=0"],
}
LENGTH = ["--config.eval.protocol=paper", "--config.train.epochs=30", "--config.eval.every=30"]


def main():
    """Draw one picture and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="finished runs in pairs: without, with distillation; none: train them")
    parser.add_argument("--title", action="append", default=[], help="of a pair of runs, in their order")
    parser.add_argument("--folder", default="runs/forgetting-planted", help="of the runs that are trained")
    parser.add_argument("--out", default="docs/forgetting-planted.svg", help="the picture")
    arguments = parser.parse_args()
    if len(arguments.runs) % 2:
        parser.error("runs come in pairs: one without and one with distillation")
    pairs = list(zip(arguments.runs[::2], arguments.runs[1::2], strict=True))
    titles = arguments.title
    if not pairs:
        titles, pairs = list(SETTINGS), train_planted(pathlib.Path(arguments.folder))
    rows = {}
    for number, (plain, distilled) in enumerate(pairs):
        title = titles[number] if number < len(titles) else f"{plain} and {distilled}"
        rows[title] = curves({"plain": plain, "distilled": distilled}) or parser.error(
            f"{plain} and {distilled}: both must hold what was measured of tuned tables in one phase (metrics.jsonl)"
        )
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_svg(out, picture(rows))
    print_table(rows)
    print(f"picture: {out}")


def train_planted(folder):
    """Train what is not finished yet on the planted shop; returns [(run without, run with distillation), ...]."""
    start = [sys.executable, "-m", "kdsr_jax.main"]
    ids = folder / "ids"
    commands = [[*start, "--config=configs/planted.py:sasrec", f"--workdir={ids}"]]
    pairs = []
    for number, settings in enumerate(SETTINGS.values()):
        pair = folder / f"tuned-{number}", folder / f"kdsr-{number}"
        for run, variant in zip(pair, ("tuned-sasrm", "kdsr-sasrm"), strict=True):
            words = [f"--config=configs/planted.py:{variant}", f"--workdir={run}", *LENGTH, *settings]
            commands.append([*start, *words, f"--config.forgetting.reference_workdir={ids}"])
        pairs.append(pair)
    for command in commands:
        print(" ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, check=True)
    return pairs


def curves(runs):
    """Read what was measured.

    Args:
      runs: dict kind -> workdir.

    Returns:
      dict modality -> dict "space, kind" -> [(epoch, r), ...], of one phase; empty where the runs have none in common.
    """
    lines = {kind: read_lines(pathlib.Path(run) / "metrics.jsonl") for kind, run in runs.items()}
    lines = {kind: [line for line in log if line.get("forgetting")] for kind, log in lines.items()}
    for phase in ("select", "refit"):
        chosen = {kind: [line for line in log if line["phase"] == phase] for kind, log in lines.items()}
        if all(chosen.values()):
            break
    else:
        return {}
    found = {}
    for space in ("features", "ids"):
        for kind in KINDS:
            for line in chosen[kind]:
                for modality, values in line["forgetting"].items():
                    if space in values:
                        series = found.setdefault(modality, {})
                        series.setdefault(f"{space}, {kind}", []).append((line["epoch"], values[space]))
    return found


def picture(rows):
    """Return one ``<svg>`` with a row of panels for each title and a panel for each modality."""
    inner, top, columns = [], 0, max(map(len, rows.values()))
    for title, modalities in rows.items():
        heights = []
        for column, (modality, series) in enumerate(modalities.items()):
            heading = f"{modality}: {title}"
            positive = min(r for points in series.values() for _, r in points) >= 0
            panel = line_chart(heading, series, "epoch", "Pearson's r of pair cosines with", from_zero=positive)
            height = int(re.search(r'viewBox="0 0 \d+ (\d+)"', panel)[1])
            place = f'<svg x="{column * (WIDTH + 20)}" y="{top}" width="{WIDTH}" height="{height}" '
            inner.append(panel.replace('<svg class="chart" ', place, 1))
            heights.append(height)
        top += max(heights) + 15
    label = "Likeness of tuned tables to features and to ids, over epochs"
    frame = f"{-10} {-5} {columns * (WIDTH + 20)} {top}"
    return f'<svg class="chart" role="img" aria-label="{label}" viewBox="{frame}">{"".join(inner)}</svg>'


def print_table(rows):
    """Print r at some epochs, one row a curve."""
    last = max(points[-1][0] for found in rows.values() for series in found.values() for points in series.values())
    epochs = sorted({epoch for epoch in SHOWN if epoch < last} | {last})
    table = rich.table.Table("table", "like", *map(str, epochs), title="Pearson's r after epoch ...")
    for title, modalities in rows.items():
        table.add_section()
        table.add_row(rich.text.Text(title, style="bold"))
        for modality, series in modalities.items():
            for name, points in series.items():
                values = dict(points)
                cells = (f"{values[epoch]:.2f}" if epoch in values else "" for epoch in epochs)
                table.add_row(modality, name, *cells)
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
