"""Table 2 of the paper: all models, and KDSR on two backbones.

    python -m experiments.table2 --config.data.root=PATH --datasets=beauty --seeds=0,1,2

Models are as published (docs/models.md); "tuned" trains their modality tables with the learning-rate ramp, KDSR
distills into them besides.
"""

import html
import statistics
import sys

from experiments.panels import arrange, datasets_of, mean_score, runs_of
from experiments.study import Setting, Study, main
from experiments.tables import METRICS, PAPER, metrics_table
from kdsr_jax.report.charts import WIDTH

SETTINGS = {
    "GRU4Rec": Setting("gru4rec"),
    "SASRec": Setting("sasrec"),
    "SRGNN": Setting("srgnn"),
    "MMSRec": Setting("mmsrec"),
    "SASRM": Setting("sasrm"),
    "NOVA": Setting("nova"),
    "DIFSR": Setting("difsr"),
    "Trans2D": Setting("trans2d"),
    "MMSR": Setting("mmsr"),
    "SASRM tuned": Setting("tuned-sasrm"),
    "KDSR": Setting("kdsr-sasrm"),
    "KDSR, λ2 0.02": Setting("kdsr-sasrm", ("distill.lambda_code=0.02",)),
    "MMSR nodes tuned": Setting("tuned-mmsr_nodes"),
    "KDSR (MMSR)": Setting("kdsr-mmsr_nodes"),
    "KDSR-lite tuned": Setting("tuned-kdsr_lite"),
    "KDSR-lite": Setting("kdsr-kdsr_lite"),
}
# The paper's KDSR is on its best baseline, SASRM on ML-1M and MMSR elsewhere: its numbers stand beside both of ours.
REPORTED = {name: {"KDSR (MMSR)": models["KDSR"]} | models for name, models in PAPER["table2"].items()}
REPORTED["ml1m"] = PAPER["table2"]["ml1m"]
SHOWN = ("hr@20", "mrr@20")
BAR, LABELS, VALUES = 15, 118, 40  # height of a row, room for labels and for numbers, in units of the view box


def table(rows):
    """Return the tables in markdown, after notes on the paper's numbers."""
    gains = [
        model["KDSR"][place] / max(values[place] for name, values in model.items() if name != "KDSR") - 1
        for model in PAPER["table2"].values()
        for place in range(len(METRICS))
    ]
    notes = (
        "KDSR is on SASRM, KDSR (MMSR) on the MMSR form with a node for each item's modality vectors (mmsr_nodes), "
        "KDSR-lite on what KDSR's official code runs. The paper's KDSR is on MMSR on the Amazon data sets, so its "
        "numbers there belong to KDSR (MMSR) and stand beside KDSR to compare with; on ML-1M it is on SASRM. The "
        "paper used other encoders (T5, "
        "ResNet): only rows of ids alone compare models rather than features. λ2 is the paper's, 0.5 on the Amazon data; of the "
        "weights above 0 that were tried, Beauty's validation part prefers 0.02 (search beauty-lambda-code).\n\n"
        "The paper's average gain of 6.8 % is the mean of HR +10.2 % and MRR +3.4 %, which it states; by its own "
        f"table KDSR gains {100 * statistics.fmean(gains):+.1f} % over the best other cell of each row of its table "
        "(the mean over data sets and metrics of KDSR / best − 1)."
    )
    return f"{notes}\n\n{metrics_table(rows, paper=REPORTED)}"


def figure(rows):
    """Return one picture, a row a dataset with a panel for each metric, at the epoch chosen on validation."""
    panels = []
    for dataset in datasets_of(rows):
        groups = {row["label"]: runs_of(rows, dataset, row["label"]) for row in runs_of(rows, dataset)}
        distilled = {label for label, runs in groups.items() if runs[0]["config"]["distill.enabled"]}
        for metric in SHOWN:
            scores = {label: mean_score(runs, "test", metric) for label, runs in groups.items()}
            panels.append(_bars(f"{dataset}: {metric}, percent of test", scores, distilled))
    lines = [panels[place : place + len(SHOWN)] for place in range(0, len(panels), len(SHOWN))]
    return arrange(lines, "hr@20 and mrr@20 of all models at the epoch chosen on validation")


def _bars(title, values, distilled):
    """Draw one horizontal bar a model, as there are too many for names below bars.

    Args:
      title: heading.
      values: name -> number, or None for a model that is left out.
      distilled: names in another colour.
    """
    known = {name: value for name, value in values.items() if value is not None}
    unit = (WIDTH - LABELS - VALUES) / (max(known.values(), default=0) or 1)
    parts = [f'<text class="head" x="2" y="13">{html.escape(title)}</text>']
    for place, (name, value) in enumerate(known.items()):
        y, length = 22 + place * BAR, value * unit
        parts.append(f'<text class="end" x="{LABELS - 6}" y="{y + 11}">{html.escape(name)}</text>')
        size = f'width="{length:.1f}" height="{BAR - 4}"'
        bar = f'<rect class="fill s{int(name in distilled)}" x="{LABELS}" y="{y + 2}" {size}>'
        parts.append(f"{bar}<title>{html.escape(name)}: {value:.2f}</title></rect>")
        parts.append(f'<text x="{LABELS + length + 4:.1f}" y="{y + 11}">{value:.2f}</text>')
    y = 36 + len(known) * BAR
    for colour, (name, x) in enumerate((("without distillation", LABELS), ("with", LABELS + 125))):
        parts.append(
            f'<circle class="fill s{colour}" cx="{x + 5}" cy="{y}" r="5"/><text x="{x + 15}" y="{y + 4}">{name}</text>'
        )
    return f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {y + 10}">{"".join(parts)}</svg>'


STUDY = Study(
    name="table2",
    title="Table 2: all models",
    settings=SETTINGS,
    datasets=("beauty", "sports", "clothing", "toys", "ml1m", "planted"),
    words=("eval.protocol=both",),
    reference="KDSR",
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
