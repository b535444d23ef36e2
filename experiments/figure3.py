"""Figure 3 of the paper: frozen tables, tuned tables, and tuned tables with distillation (CDL) on three backbones.

python -m experiments.figure3 --config.data.root=PATH
"""

import sys

from experiments import tables
from experiments.panels import arrange, datasets_of, mean_score, runs_of
from experiments.study import Setting, Study, main
from kdsr_jax.report.charts import bar_chart

BACKBONES = {"GRU4Rec": "gru4rec", "SASRec": "sasrm", "MMSR": "mmsr_nodes"}  # sasrm: SASRec with tables
KINDS = {  # what stands before the backbone's name, and what else is set
    "frozen": ("", ("model.tables=frozen",)),
    "tuned": ("tuned-", ()),
    "tuned + CDL": ("kdsr-", ()),
}
METRICS = ("hr@20", "mrr@20")
NOTES = (
    '"SASRec" with tables is SASRM, so its frozen row is not Table 2\'s SASRec; "MMSR" is mmsr_nodes, the form with a node '
    "for each item's modality vectors. CDL is distillation."
)


def table(rows):
    """Return the tables in markdown."""
    return f"{NOTES}\n\n{tables.metrics_table(rows)}"


def figure(rows):
    """Return one ``<svg>`` with a row of bar charts for each dataset, the honest protocol's test in percent."""
    drawn = []
    for dataset in datasets_of(rows):
        charts = []
        run = [name for name in BACKBONES if any(runs_of(rows, dataset, f"{name}, {kind}") for kind in KINDS)]
        for metric in METRICS:
            series = {
                kind: [mean_score(runs_of(rows, dataset, f"{name}, {kind}"), "test", metric) for name in run]
                for kind in KINDS
            }
            charts.append(bar_chart(f"{dataset}: {metric} on test", run, series, "backbone", "percent"))
        drawn.append(charts)
    return arrange(drawn, "Frozen, tuned and distilled tables on three backbones")


STUDY = Study(
    name="figure3",
    title="Figure 3: distillation on different backbones",
    settings={
        f"{name}, {kind}": Setting(prefix + backbone, words)
        for name, backbone in BACKBONES.items()
        for kind, (prefix, words) in KINDS.items()
    },
    datasets=("beauty", "sports", "ml1m"),
    words=("eval.protocol=both",),  # as Table 2's runs, of which some stand for these
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
