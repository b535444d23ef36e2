"""One pass for every target ("prefixes") against all positions of a history in one pass, SASRec, at equal targets.

python -m experiments.prefix_vs_positions --config.data.root=PATH

Both train on every target exactly once an epoch, 512 a step, with the same dropout, learning rate and longest history. What
differs: whether the targets of a step come from as many users or from few, and what a target of a history that is longer than
``data.max_length`` still sees.
"""

import statistics
import sys

from experiments import tables
from experiments.panels import arrange, datasets_of, runs_of
from experiments.study import Setting, Study, main
from kdsr_jax.report.charts import line_chart
from kdsr_jax.report.files import read_lines

METRIC = "mrr@20"  # which chooses the epoch
PHASE = "select"
AXES = {"epoch": "epoch", "seconds": "seconds of training"}


def read_learning(config, workdir):
    """Read how a finished run learned while the epoch was chosen.

    Args:
      config: of the run; not read.
      workdir: its folder.

    Returns:
      {"targets_per_second": median over epochs, None without any, "targets": trained an epoch,
      "curve": [[epoch, seconds of training so far, mrr@20 on validation], ...]}.
    """
    lines = [
        line for line in read_lines(workdir / "metrics.jsonl") if line["phase"] == PHASE and "train_seconds" in line
    ]
    curve, seconds = [], 0.0
    for line in lines:
        seconds += line["train_seconds"]
        if "metrics" in line:
            curve.append([line["epoch"], seconds, line["metrics"][METRIC]])
    paces = [line["targets_per_second"] for line in lines]
    targets = round(paces[0] * lines[0]["train_seconds"]) if lines else 0
    return {"targets_per_second": statistics.median(paces) if paces else None, "targets": targets, "curve": curve}


def table(rows):
    """Return the markdown of the runs, with their targets an epoch and their pace."""

    def learning(name):
        return lambda row: f"{row['measures']['learning'][name] or 0:,.0f}"

    extra = {"targets an epoch (select)": learning("targets"), "targets a second": learning("targets_per_second")}
    return tables.metrics_table(rows, extra=extra)


def figure(rows):
    """Return one ``<svg>`` with a row of charts for each dataset: validation over epochs and over seconds, of each seed."""
    drawn = []
    for dataset in datasets_of(rows):
        charts = []
        for column, label in enumerate(AXES.values()):
            series = {
                f"{run['label']}, seed {run['seed']}": [
                    (point[column], point[2]) for point in run["measures"]["learning"]["curve"]
                ]
                for run in runs_of(rows, dataset)
            }
            charts.append(line_chart(f"{dataset}: validation by {label}", series, label, f"{METRIC}, percent"))
        drawn.append(charts)
    return arrange(drawn, "Validation over epochs and seconds")


STUDY = Study(
    name="prefix_vs_positions",
    title="One target a pass against all positions",
    settings={"positions": Setting("sasrec"), "prefixes": Setting("sasrec", ("train.prefixes=true",))},
    reference="positions",
    measures={"learning": read_learning},
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
