"""Which targets are found: metrics with intervals by popularity of the target, down to unseen ones, and by history length.

    python -m experiments.cold_items --config.data.root=PATH
    python -m experiments.cold_items --datasets=planted

An item's popularity is how often it stands in a train part; 0 is unseen in training. Item vectors are compared as ids alone
("ids") or fused with the modality tables ("fused"), which alone can say something of an unseen item. On the planted shop a
fifth of the items is cold. Intervals are bootstrapped over users, who may have several targets.
"""

import statistics
import sys

import numpy as np

from experiments import tables
from experiments.panels import arrange, datasets_of, runs_of
from experiments.significance import holm
from experiments.study import Setting, Study, main
from kdsr_jax.data.interactions import in_train_part, train_counts
from kdsr_jax.errors import UserError
from kdsr_jax.report.charts import bar_chart

FLOORS = (0, 1, 5, 10, 20, 50)  # of the bins
BINS = ("0", "1–4", "5–9", "10–19", "20–49", "50+")
GROUPINGS = {"popularity": "times the target stands in train parts", "history": "items of the history that are read"}
METRICS = {"hr@20": lambda rank: 100.0 * (rank <= 20), "mrr@20": lambda rank: np.where(rank <= 20, 100.0 / rank, 0.0)}
DRAWS = 1000
FUSED = ("model.item_scores=fused",)
SETTINGS = {
    "SASRec": Setting("sasrec"),
    "SASRM": Setting("sasrm"),
    "SASRM, fused": Setting("sasrm", FUSED),
    "tuned": Setting("tuned-sasrm"),
    "tuned, fused": Setting("tuned-sasrm", FUSED),
    "KDSR": Setting("kdsr-sasrm"),
    "KDSR, fused": Setting("kdsr-sasrm", FUSED),
}
REFERENCE = "KDSR"


def measure(config, ranks):
    """Sort the targets of a finished run into bins.

    Args:
      config: of the run; says where its data are.
      ranks: dict of "user" and "rank" [T] of its test targets, user after user, oldest first.

    Returns:
      dict "popularity" and "history" -> bin -> what ``by_bin`` says.

    Raises:
      UserError: the data have other test targets.
    """
    user, values = targets(config)
    if not np.array_equal(user, ranks["user"]):
        raise UserError(f"cold_items: the ranks are of other test targets than {config.data.name} has now")
    return {name: by_bin(value, ranks["rank"], user) for name, value in values.items()}


def targets(config):
    """Return (user [T], dict of "popularity" and "history", [T] each) of the test targets, user after user, oldest first."""
    from kdsr_jax.train import load_data  # which imports jax

    interactions = load_data(config).interactions
    tested = ~in_train_part(interactions)
    user = np.repeat(np.arange(interactions.num_users), interactions.lengths)[tested]
    popularity = train_counts(interactions)[interactions.items[tested]]
    history = np.minimum(interactions.positions[tested], config.data.max_length)
    return user, {"popularity": popularity, "history": history}


def by_popularity(config):
    """Return dict bin -> [T] bool, which test targets are in it; bins without any are left out."""
    which = _bins(targets(config)[1]["popularity"])
    return {name: which == number for number, name in enumerate(BINS) if (which == number).any()}


def _bins(values):
    return np.searchsorted(FLOORS, values, side="right") - 1


def by_bin(values, ranks, users):
    """Compute the metrics of the targets in each bin.

    Args:
      values: [T] int, not negative, what is binned.
      ranks: [T] int from 1.
      users: [T] int, whose target each is.

    Returns:
      dict bin -> {"targets": number, "users": number, metric: [mean, low, high] in percent}; bins without targets are left out.
    """
    which, found = _bins(values), {}
    for number, name in enumerate(BINS):
        inside = which == number
        if inside.any():
            found[name] = {"targets": int(inside.sum()), "users": len(np.unique(users[inside]))}
            found[name] |= intervals({m: f(ranks[inside]) for m, f in METRICS.items()}, users[inside])
    return found


def intervals(values, users):
    """Average over targets, with 95 % percentile intervals from drawing users with replacement.

    Args:
      values: dict name -> [T] float.
      users: [T] int, whose value each is.

    Returns:
      dict name -> [mean, low, high].
    """
    _, user, counts = np.unique(users, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(user, value) for value in values.values()], 1)
    rng, number, means = np.random.default_rng(0), len(counts), []
    for _ in range(DRAWS):
        drawn = np.bincount(rng.integers(number, size=number), minlength=number)
        means.append(drawn @ sums / (drawn @ counts))
    centres, (low, high) = sums.sum(0) / counts.sum(), np.percentile(means, (2.5, 97.5), axis=0)
    return {name: [float(part[index]) for part in (centres, low, high)] for index, name in enumerate(values)}


def table(rows):
    """Return the markdown of every dataset, grouping and metric, and of all runs."""
    text = (
        "Percent on test with 95 % intervals from a bootstrap over users, [low, high]; means over seeds of all three. "
    )
    text += f"The number of targets stands in brackets. {DRAWS} draws.\n\n"
    for dataset in datasets_of(rows):
        for grouping, meaning in GROUPINGS.items():
            for metric in METRICS:
                runs = runs_of(rows, dataset)
                counts = _counts(runs, grouping)
                lines = [
                    [label, *(_cell(runs_of(runs, dataset, label), grouping, name, metric) for name in counts)]
                    for label in dict.fromkeys(run["label"] for run in runs)
                ]
                header = ["setting", *(f"{name} ({number:,})" for name, number in counts.items())]
                text += f"**{dataset}: {metric} by {grouping}**, {meaning}\n\n{tables.markdown(header, lines)}\n\n"
        text += _differences(rows, dataset)
    return text + "The runs:\n\n" + tables.metrics_table(rows)


def _differences(rows, dataset):
    """Return the markdown of the comparisons of one dataset by popularity, or nothing where there are none."""
    comparisons = [row for row in tables.compared_in(rows, dataset, grouped=True) if row["metric"] in METRICS]
    comparisons = [
        row for row in comparisons if (row["low"], row["high"]) != (0, 0)
    ]  # nobody finds an unseen item by its id
    found = {}
    for row, p in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        found.setdefault(row["metric"], {}).setdefault(row["label"], {})[row["group"]] = tables.difference(row, p)
    text = ""
    for metric, settings in found.items():
        names = [name for name in BINS if any(name in cells for cells in settings.values())]
        lines = [[label, *(cells.get(name, "") for name in names)] for label, cells in settings.items()]
        text += f"**{dataset}: {metric} of {REFERENCE} minus that of others**, by popularity; percentage points, paired by user, with 95 % "
        text += f"intervals, not adjusted, p by Holm's method for these {len(comparisons)} comparisons, and each seed's difference in brackets\n\n"
        text += tables.markdown([f"{REFERENCE} minus", *names], lines) + "\n\n"
    return text


def figure(rows):
    """Return one ``<svg>`` with a row of bar charts for each dataset and grouping."""
    drawn = []
    for dataset in datasets_of(rows):
        runs = runs_of(rows, dataset)
        for grouping, meaning in GROUPINGS.items():
            charts, counts = [], _counts(runs, grouping)
            for metric in METRICS:
                labels = dict.fromkeys(run["label"] for run in runs)
                means = {label: _means(runs_of(runs, dataset, label), grouping, metric) for label in labels}
                series = {label: [found.get(name) for name in counts] for label, found in means.items()}
                notes = [f"{number:,}" for number in counts.values()]
                title = f"{dataset}: {metric} on test by {grouping}"
                charts.append(bar_chart(title, list(counts), series, meaning, "percent", notes=notes))
            drawn.append(charts)
    return arrange(drawn, "Metrics by popularity of the target and by history length")


def _counts(runs, grouping):
    """Return dict bin -> targets, of the first run that has any there: all runs of a dataset have the same targets."""
    found = {}
    for run in runs:
        found = {name: bin_["targets"] for name, bin_ in run["measures"]["cold_items"][grouping].items()} | found
    return {name: found[name] for name in BINS if name in found}


def _means(runs, grouping, metric):
    """Return dict bin -> mean over runs."""
    bins = [run["measures"]["cold_items"][grouping] for run in runs]
    return {name: statistics.fmean(b[name][metric][0] for b in bins) for name in BINS if all(name in b for b in bins)}


def _cell(runs, grouping, name, metric):
    bins = [run["measures"]["cold_items"][grouping].get(name) for run in runs]
    if None in bins:
        return ""
    mean, low, high = (statistics.fmean(part) for part in zip(*(bin_[metric] for bin_ in bins), strict=True))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


STUDY = Study(
    name="cold_items",
    title="Cold items and short histories",
    settings=SETTINGS,
    datasets=("beauty", "sports", "planted"),
    words=("eval.protocol=both",),  # as Table 2's runs, which stand for these
    dataset_words={"planted": ("data.planted.cold_rate=0.2",)},
    reference=REFERENCE,
    groups=by_popularity,
    rank_measures={"cold_items": measure},
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
