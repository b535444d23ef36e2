"""Figure 1 of the paper: modality forgetting, what tuned tables share with the features, with and without distillation.

    python -m experiments.figure1 --config.data.root=PATH
    python -m experiments.figure1 --datasets=planted --epochs=30

Pearson's r between the cosines of item pairs in a tuned table (E) and in the raw features (M, "features"), and in the item
table of a run of item ids alone (V, "ids"), after every epoch. GRU4Rec and Beauty are the paper's setting. Nothing stops early,
so that all curves are equally long. On the planted shop tables with the default settings hardly forget; small ones that learn
at full rate at once do, so there they are drawn as well.
"""

import dataclasses
import statistics
import sys

from experiments import tables
from experiments.panels import arrange, datasets_of, runs_of
from experiments.study import Setting, Study, main
from kdsr_jax.report.charts import line_chart
from kdsr_jax.report.files import read_lines

KINDS = ("plain", "distilled")
SPACES = ("features", "ids")
SMALL = ", small tables"
SHOWN = (0, 1, 2, 5, 10, 20)  # epochs of the table, besides the last one
LENGTH = ("eval.protocol=paper", "train.epochs=16", "eval.every=16", "forgetting.reference_workdir={ids}")
TUNED = {"plain": Setting("tuned-gru4rec", LENGTH), "distilled": Setting("kdsr-gru4rec", LENGTH)}
SETTINGS = {"ids": Setting("gru4rec"), **TUNED} | {
    label + SMALL: dataclasses.replace(
        setting, words=(*LENGTH, "model.table_scale=0.02", "train.ramp_epochs=0"), datasets=("planted",)
    )
    for label, setting in TUNED.items()
}


def read_curves(config, workdir):
    """Read what was measured of the tuned tables while a finished run was trained on the whole train part.

    Args:
      config: of the run; not read.
      workdir: its folder.

    Returns:
      dict modality -> space ("features", "ids") -> [[epoch, r], ...] in order; empty for a run without tuned tables.
    """
    curves = {}
    for line in read_lines(workdir / "metrics.jsonl"):
        if line["phase"] == "refit":
            for modality, spaces in line.get("forgetting", {}).items():
                for space, r in spaces.items():
                    curves.setdefault(modality, {}).setdefault(space, []).append([line["epoch"], r])
    return curves


def panels(rows):
    """Collect the curves that are drawn together, means over the seeds.

    Args:
      rows: objects of runs.jsonl.

    Returns:
      dict (dataset, "" or ``SMALL``, modality) -> dict "space, kind" -> [(epoch, r), ...].
    """
    found = {}
    for dataset in datasets_of(rows):
        for suffix in ("", SMALL):
            for space in SPACES:
                for kind in KINDS:
                    for modality, points in _mean_curves(runs_of(rows, dataset, kind + suffix), space).items():
                        found.setdefault((dataset, suffix, modality), {})[f"{space}, {kind}"] = points
    return found


def table(rows):
    """Return the markdown of the curves at some epochs, and of the runs."""
    found = panels(rows)
    longest = max((points[-1][0] for series in found.values() for points in series.values()), default=0)
    epochs = [epoch for epoch in SHOWN if epoch < longest]
    lines = []
    for (dataset, suffix, modality), series in found.items():
        for name, points in series.items():
            r, (last, r_last) = dict(points), points[-1]
            cells = [f"{r[epoch]:.2f}" if epoch in r else "" for epoch in epochs]
            lines.append([dataset + suffix, modality, name, *cells, f"{r_last:.2f} ({last})"])
    text = "Pearson's r of pair cosines in the tuned table with those in the raw features or in the item table of a run of "
    text += "item ids alone, after so many epochs of training; means over seeds.\n\n"
    header = ["dataset", "table", "like", *map(str, epochs), "last (epoch)"]
    return text + tables.markdown(header, lines) + "\n\nThe runs:\n\n" + tables.metrics_table(rows)


def figure(rows):
    """Return one ``<svg>`` with a row of panels for each dataset and size of tables, and a panel for each modality."""
    drawn = {}
    for (dataset, suffix, modality), series in panels(rows).items():
        positive = min(r for points in series.values() for _, r in points) >= 0
        labels = "epoch", "Pearson's r of pair cosines with"
        chart = line_chart(f"{modality}: {dataset}{suffix}", series, *labels, from_zero=positive)
        drawn.setdefault((dataset, suffix), []).append(chart)
    return arrange(list(drawn.values()), "Likeness of tuned tables to features and to ids, over epochs")


def _mean_curves(runs, space):
    """Return dict modality -> [(epoch, mean r over runs), ...]."""
    values = {}
    for run in runs:
        for modality, spaces in run["measures"]["forgetting"].items():
            for epoch, r in spaces.get(space, []):
                values.setdefault(modality, {}).setdefault(epoch, []).append(r)
    return {
        name: [(epoch, statistics.fmean(r)) for epoch, r in sorted(curve.items())] for name, curve in values.items()
    }


STUDY = Study(
    name="figure1",
    title="Figure 1: modality forgetting",
    settings=SETTINGS,
    datasets=("beauty", "ml1m"),
    dataset_words={"planted": ("train.patience=30",)},  # ids alone learn nothing in the first epochs
    measures={"forgetting": read_curves},
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
