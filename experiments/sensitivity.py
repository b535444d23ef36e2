"""What KDSR's own settings do: one at a time, the others as the dataset's config has them, for 15 epochs.

python -m experiments.sensitivity --config.data.root=PATH

Settings are chosen on validation, so its scores come first. The values of configs/beauty.py are among those that are tried;
runs that are equal are done once.
"""

import sys

from experiments import tables
from experiments.panels import arrange, datasets_of, mean_score, runs_of
from experiments.study import Setting, Study, main
from kdsr_jax.report.charts import bar_chart, line_chart

# Name -> (field, values).
PARAMETERS = {
    "D": ("teacher.num_splits", (1, 4, 8, 16)),
    "x": ("teacher.num_codes", (20, 50, 100, 200)),
    "tau": ("distill.temperature", (0.5, 1.0, 1.5, 3.0)),
    "lambda1": ("distill.lambda_score", (0.0, 1.0, 10.0, 100.0)),
    "lambda2": ("distill.lambda_code", (0.0, 0.1, 0.5, 2.0)),
    "eta": ("train.ramp_epochs", (0, 5, 10, 20)),
    "scale": ("model.table_scale", (0.05, 0.2, 1.0)),
    "sigma": ("distill.sigma", ("sigmoid", "softmax", "identity")),
}
METRICS = ("hr@20", "mrr@20")
COLUMNS = ("validation", "test")


def label(name, value):
    """Return the label of a setting, such as "D=8"."""
    return f"{name}={value}"


def table(rows):
    """Return the markdown of validation and test by value, means over seeds, and of all runs."""
    header = ["dataset", "setting", *(f"{column} {metric}" for column in COLUMNS for metric in METRICS), "best epoch"]
    lines = []
    for dataset in datasets_of(rows):
        for name, (_, values) in PARAMETERS.items():
            for value in values:
                runs = runs_of(rows, dataset, label(name, value))
                scores = [mean_score(runs, column, metric) for column in COLUMNS for metric in METRICS]
                cells = ["" if score is None else f"{score:.2f}" for score in scores]
                epochs = ", ".join(str(run["best_epoch"]) for run in runs)
                lines += [[dataset, label(name, value), *cells, epochs]] if runs else []
    text = "Percent, means over seeds; a setting is to be chosen by its validation scores.\n\n"
    return text + tables.markdown(header, lines) + "\n\nThe runs:\n\n" + tables.metrics_table(rows)


def figure(rows):
    """Return one ``<svg>`` with a row of charts for each dataset and parameter, validation and test by value."""
    drawn = []
    for dataset in datasets_of(rows):
        for name, (_, values) in PARAMETERS.items():
            if any(runs_of(rows, dataset, label(name, value)) for value in values):
                drawn.append([_chart(rows, dataset, name, values, metric) for metric in METRICS])
    return arrange(drawn, "Metrics by the settings of KDSR")


def _chart(rows, dataset, name, values, metric):
    runs = [runs_of(rows, dataset, label(name, value)) for value in values]
    series = {column: [mean_score(found, column, metric) for found in runs] for column in COLUMNS}
    title, y_label = f"{dataset}: {metric} by {name}", "percent"
    if isinstance(values[0], str):
        return bar_chart(title, values, series, name, y_label)
    # The values of lambda1 lie powers of ten apart, so all are drawn evenly spaced.
    places = {column: [(n, y) for n, y in enumerate(scores, 1) if y is not None] for column, scores in series.items()}
    return line_chart(title, places, f"{name} = {', '.join(map(str, values))}, in this order", y_label)


STUDY = Study(
    name="sensitivity",
    title="Sensitivity to the settings of KDSR",
    settings={
        label(name, value): Setting("kdsr-sasrm", (f"{field}={value}",))
        for name, (field, values) in PARAMETERS.items()
        for value in values
    },
    words=(
        "train.epochs=15",
        "train.patience=15",
    ),
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
