"""Tables of runs in markdown: what was measured, beside what the paper reports, with marks of significance.

Everything here is a pure function of the rows of runs.jsonl (experiments/records.py).
"""

import json
import pathlib
import statistics

from experiments.panels import datasets_of, mean_score, runs_of
from experiments.significance import DRAWS, LEVEL, average_gain, best_baseline, differs, holm
from kdsr_jax.labels import PAPER as PAPERS_PROTOCOL

# What the paper prints, in percent: dataset -> label -> values, in the order of its "metrics".
PAPER = json.loads((pathlib.Path(__file__).parent / "paper.json").read_text())
METRICS = tuple(PAPER["metrics"])
SELECTED_BY = "mrr@20"
NONE = "–"
INTRO = (
    "In percent of the test targets, all items ranked, ties against the target. The columns of a metric are at the "
    "epoch chosen on validation (e*), tested once; their best values are bold. With several seeds they are mean ± "
    "standard deviation over the seeds, which share the teacher's seed; all else is the mean. Several metrics in one "
    "column are "
    f'{{metrics}}. "{PAPERS_PROTOCOL}" takes each metric\'s best epoch on the test part: compare that with published '
    "tables only."
)


def metrics_table(rows, metrics=METRICS, paper=None, extra=None):
    """Set runs out in one table a dataset: honest metrics, the paper's protocol, the paper's numbers, epochs, seconds.

    Args:
      rows: of runs.jsonl, runs and comparisons; the table keeps the order of datasets and settings.
      metrics: names of what is shown.
      paper: dict dataset -> label -> what the paper reports, in the order of ``metrics``, None where it has nothing.
      extra: dict heading -> (run -> number, of which the mean over seeds is shown, or text, or None), further columns.

    Returns:
      Markdown; columns without content are left out, and without runs there is a sentence.
    """
    parts = [INTRO.format(metrics=" / ".join(metrics))]
    for dataset in datasets_of(rows):
        runs = runs_of(rows, dataset)
        comparisons = compared_in(rows, dataset)
        adjusted = holm([row["p"] for row in comparisons])
        compared = {(row["label"], row["metric"]): (row, p) for row, p in zip(comparisons, adjusted, strict=True)}
        marked = {key for key, (row, p) in compared.items() if differs(row, p)}
        parts.append(f"## {dataset}")
        parts.append(_results(runs, metrics, (paper or {}).get(dataset, {}), extra or {}, marked))
        parts.append(_unlike(runs))
        if compared:
            parts += [_comparisons(compared, metrics), _gain(runs, metrics, comparisons[0]["reference"])]
        parts.append(_provenance(runs))
    return "\n\n".join(filter(None, parts)) + "\n" if len(parts) > 1 else "No run is finished yet.\n"


def markdown(header, lines):
    """Return the text of one table.

    Args:
      header: headings.
      lines: lists of cells, as long as the header; anything that can be text.
    """
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (header, ruler, *lines))


def per_modality(rows, name, values):
    """Return extra columns, one a modality.

    Args:
      rows: of runs.jsonl.
      name: of what is shown.
      values: run -> dict modality -> number, or None.

    Returns:
      dict heading -> (run -> number or None), for ``metrics_table``.
    """
    modalities = sorted({modality for row in rows if row["kind"] == "run" for modality in values(row) or {}})
    return {f"{name}, {m}": lambda row, modality=m: (values(row) or {}).get(modality) for m in modalities}


def _cell(value):
    return " ".join(str(value).split()).replace("|", "\\|")


def _results(runs, metrics, paper, extra, marked):
    """Return the table of a dataset's runs."""
    settings = {}
    for run in runs:
        settings.setdefault(run["label"], []).append(run)

    def column(cell):
        return [cell(group) for group in settings.values()]

    columns = {"setting": list(settings)} | {metric: _honest(settings, metric, marked) for metric in metrics}
    columns["seeds"] = column(len)
    columns[PAPERS_PROTOCOL] = column(lambda group: _joined(mean_score(group, "paper", metric) for metric in metrics))
    columns["the paper reports"] = [_joined(paper.get(label, ())) for label in settings]
    for heading, value in extra.items():
        columns[heading] = column(lambda group, value=value: _summary([value(run) for run in group]))
    columns[f"validation {SELECTED_BY}"] = column(lambda group: _percent(mean_score(group, "validation", SELECTED_BY)))
    columns["e*"] = column(lambda group: _each([run["best_epoch"] for run in group]))
    columns["refit epochs"] = column(lambda group: _each([run["epochs"] for run in group]))
    seconds = column(lambda group: f"{statistics.fmean(run['train_seconds'] or 0 for run in group):,.0f}")
    columns["s training, both phases"] = seconds
    columns = {heading: cells for heading, cells in columns.items() if set(cells) != {NONE}}
    return markdown(list(columns), list(zip(*columns.values(), strict=True)))


def _unlike(runs):
    """Name the fields, the seed apart, in which runs of one setting differ, which are averaged all the same; "" for none."""
    fields, settings = {}, {}
    for run in runs:
        settings.setdefault(run["label"], []).append(run["config"])
    for label, configs in settings.items():
        for name in sorted(set().union(*configs) - {"seed"}):
            values = dict.fromkeys(str(config[name]) for config in configs if name in config)
            if len(values) > 1:
                fields.setdefault(label, []).append(f"{name} ({', '.join(values)})")
    said = (f"{label} in {', '.join(names)}" for label, names in fields.items())
    return f"**Runs of one setting differ** besides their seeds: {'; '.join(said)}." if fields else ""


def _honest(settings, metric, marked):
    """Return a metric's cells: mean ± sd over seeds, the best one bold, those that differ from the reference marked."""
    values = {label: [run["test"][metric] for run in group if run["test"]] for label, group in settings.items()}
    means = [statistics.fmean(found) for found in values.values() if found]
    cells = []
    for label, found in values.items():
        text = _percent(statistics.fmean(found) if found else None)
        text += f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        best = len(means) > 1 and found and statistics.fmean(found) == max(means)
        cells.append((f"**{text}**" if best else text) + ("†" if (label, metric) in marked else ""))
    return cells


def compared_in(rows, dataset, grouped=False):
    """Return the comparisons of a dataset that are of all its test targets, or of groups of them."""
    return [
        row for row in rows if row["kind"] == "comparison" and row["dataset"] == dataset and ("group" in row) == grouped
    ]


def _comparisons(compared, metrics):
    """Return what was found user by user, one line a setting."""
    first = next(iter(compared.values()))[0]
    labels = dict.fromkeys(label for label, _ in compared)
    shown = [metric for metric in metrics if any((label, metric) in compared for label in labels)]
    welch = any(row["welch_p"] is not None for row, _ in compared.values())
    header = [f"{first['reference']} minus", "seeds", *shown]
    header += ["Welch's p (underpowered below 5 seeds)"] if welch else []
    lines = []
    for label in labels:
        found = [compared.get((label, metric)) for metric in shown]
        seeds = _listed(next(pair[0]["seeds"] for pair in found if pair))
        lines.append([label, seeds, *(difference(*pair) if pair else NONE for pair in found)])
        if welch:
            p = (pair[0]["welch_p"] if pair else None for pair in found)
            lines[-1].append(" / ".join(NONE if value is None else f"{value:.2g}" for value in p))
    counts = sorted(row["users"] for row, _ in compared.values())
    users = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    text = (
        f"Differences in percentage points on the seeds that both have, paired over {users} users (metrics averaged over "
        f"seeds): [95 % interval, not adjusted], p (by Holm's method for the {len(compared)} comparisons of this data set) and "
        f"(each seed's difference).{' Welch compares the means of the seeds, users unpaired.' if welch else ''} Intervals and "
        "p are about these trained models; they do not say how much another seed would change, so with one seed they say "
        f"nothing about the setting. † differs from {first['reference']}: p < {LEVEL}, and the same sign in every seed, of at "
        "least two."
    )
    return f"{text}\n\n{markdown(header, lines)}"


def difference(row, p):
    """Set a comparison out with its interval, its adjusted p and, of several, the differences of the seeds."""
    least = "≤ " if row["p"] * (1 + DRAWS) < 1.5 else ""  # no flip of signs was as far from zero
    text = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] p {least}{p:.2g}"
    by_seed = ", ".join(f"{value:+.2f}" for value in row["by_seed"])
    return (text + (f" ({by_seed})" if len(row["by_seed"]) > 1 else "")).replace("-", "−")


def _gain(runs, metrics, reference):
    """Say what the reference gains over the best setting without distillation; "" where it cannot be said."""
    others = [run for run in runs if run["label"] != reference]
    plain = [run for run in others if run["validation"] and not run["config"].get("distill.enabled")]
    if not plain or not all(run["config"].get("distill.enabled") for run in runs if run["label"] == reference):
        return ""
    best = best_baseline(plain, plain[0]["dataset"], reference)
    by_seed = [{run["seed"]: run for run in runs if run["label"] == label} for label in (reference, best)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    ours, theirs = ([mean_score([own[s] for s in seeds], "test", metric) for metric in metrics] for own in by_seed)
    if None in ours or not all(theirs):
        return ""
    gain = f"{100 * average_gain(ours, theirs):+.1f}".replace("-", "−")
    return (
        f"Best baseline, a setting without distillation, by validation {SELECTED_BY}: {best}. Average relative gain of "
        f"{reference}: {gain} %, the mean over {', '.join(metrics)} of "
        f"{reference} / {best} − 1, on the seeds that both have ({_listed(seeds)})."
    )


def _provenance(runs):
    """Say where, with what and for how long a dataset's runs ran; a run of several labels counts once."""
    runs = list({run.get("workdir", id(run)): run for run in runs}.values())
    versions = {f"{name} {version}" for run in runs for name, version in (run["versions"] or {}).items()}
    commits = _listed(sorted({run["commit"] for run in runs}))
    seconds = sum((run["train_seconds"] or 0) + (run["eval_seconds"] or 0) for run in runs)
    changed = ' ("+": with changes since)' if "+" in commits else ""
    return (
        f"Hardware: {'; '.join(sorted({_machine(run) for run in runs}))}. Versions: {_listed(sorted(versions))}. "
        f"Commits: {commits}{changed}. Seeds: {_listed(sorted({run['seed'] for run in runs}))}. {len(runs)} "
        f"run{'s'[: len(runs) > 1]}, {seconds:,.0f} s of training and evaluation."
    )


def _machine(run):
    return f"{run['device'] or 'unknown device'}, {run['cores']} cores"


def _summary(values):
    """Return the mean of numbers by three digits, or texts one after the other."""
    found = [value for value in values if value is not None]
    if not found or any(isinstance(value, str) for value in found):
        return _listed(found)
    return f"{statistics.fmean(found):.3g}"


def _percent(value):
    return NONE if value is None else f"{value:.2f}"


def _joined(values):
    """Return percentages as "a / b"; a dash where there are none."""
    cells = [_percent(value) for value in values]
    return " / ".join(cells) if set(cells) - {NONE} else NONE


def _listed(values):
    """Return distinct values, in their order, as "a, b"; a dash where there are none."""
    return ", ".join(str(value) for value in dict.fromkeys(values) if value is not None) or NONE


def _each(values):
    """Return the seeds' values as "a, b", once where all are the same."""
    return _listed(values) if len(set(values)) == 1 else ", ".join(NONE if v is None else str(v) for v in values)
