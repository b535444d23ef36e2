"""The charts of a report, from the lines of metrics.jsonl and the other plain data that ``collect`` reads."""

from collections.abc import Callable

from kdsr_jax.report.charts import bar_chart, line_chart

PHASES = {"select": "select (validation)", "refit": "refit (whole train part)"}
_LOSSES = {
    "loss": "Total loss",
    "next_item": "Next item (L_RS)",
    "holistic": "Holistic distillation (L_S)",
    "dissected": "Dissected distillation (L_C)",
}
_RATES = {"body": "all other parameters", "modality_tables": "modality tables"}
_FAMILIES = {"hr": "Hit rate", "mrr": "Mean reciprocal rank", "ndcg": "NDCG", "coverage": "Coverage of the catalogue"}


def loss_charts(lines: list[dict]) -> list[str]:
    """Draw every loss part over the epochs of both phases, the total first."""
    parts = dict.fromkeys(name for line in lines for name in line.get("losses", {}) if name != "gradient_norm")
    order = sorted(parts, key=lambda name: (name != "loss", name != "next_item", name))
    return [
        line_chart(_loss_title(name), _by_phase(lines, lambda line, n=name: line["losses"].get(n)), "epoch", "loss")
        for name in order
    ]


def rate_charts(lines: list[dict]) -> list[str]:
    """Draw the learning rates, which follow the same schedule in both phases, and the speed."""
    longest = max(PHASES, key=lambda phase: len(_of_phase(lines, phase)))
    series = {}
    for line in _of_phase(lines, longest):
        for name, rate in line.get("learning_rates", {}).items():
            series.setdefault(_RATES.get(name, name), []).append((line["epoch"], rate))
    speed = _by_phase(lines, lambda line: line["targets_per_second"])
    return [
        line_chart("Learning rates", series, "epoch", "rate at the end of the epoch", from_zero=True),
        line_chart("Speed", speed, "epoch", "targets a second", from_zero=True),
    ]


def gradient_charts(lines: list[dict]) -> list[str]:
    """Draw the norm of each weighted loss part's gradient on each modality table, and of the whole gradient."""
    whole = _by_phase(lines, lambda line: line["losses"].get("gradient_norm"))
    charts = [line_chart("Gradient of all parameters", whole, "epoch", "norm, mean over steps", log_y=True)]
    for phase in PHASES:
        tables = {}
        for line in _of_phase(lines, phase):
            for name, norm in line.get("gradient_norms", {}).items():
                part, _, table = name.rpartition(" on ")
                tables.setdefault(table, {}).setdefault(part.partition("/")[0], []).append((line["epoch"], norm))
        charts += [
            line_chart(f"Gradient on the {table} table, {phase}", series, "epoch", "norm, one batch", log_y=True)
            for table, series in tables.items()
        ]
    return charts


def forgetting_charts(lines: list[dict]) -> list[str]:
    """Draw how like the raw features, and an ID-only run's items, each tuned table is; empty where it was not measured."""
    modalities = {}
    for line in lines:
        for modality, values in line.get("forgetting", {}).items():
            for space, r in values.items():
                name = f"{'features' if space == 'features' else 'item ids'}, {line['phase']}"
                modalities.setdefault(modality, {}).setdefault(name, []).append((line["epoch"], r))
    return [
        line_chart(f"Likeness of the {modality} table", series, "epoch", "Pearson's r of pair cosines")
        for modality, series in modalities.items()
    ]


def metric_charts(lines: list[dict], phase: str, chosen: int | None) -> list[str]:
    """Draw the metrics of a phase's evaluations, one chart a family.

    Args:
        lines: of metrics.jsonl.
        phase: "select" or "refit".
        chosen: an epoch to mark, or None.
    """
    families = {}
    for line in _of_phase(lines, phase):
        for name, value in (line.get("metrics") or {}).items():
            families.setdefault(name.partition("@")[0], {}).setdefault(name, []).append((line["epoch"], value))
    mark = None if chosen is None else (chosen, f"epoch {chosen}")
    return [
        line_chart(_FAMILIES.get(family, family), series, "epoch", "percent", mark=mark)
        for family, series in families.items()
    ]


def data_charts(overview: dict) -> list[str]:
    """Draw how long histories are and how often items were taken."""
    lengths, counts = overview["history_lengths"], overview["item_counts"]
    return [
        bar_chart("Lengths of the histories", lengths["names"], {"users": lengths["counts"]}, "interactions", "users"),
        bar_chart("Popularity of the items", counts["names"], {"items": counts["counts"]}, "times taken", "items"),
    ]


def chunk_chart(teacher: dict) -> str:
    """Draw the variance that each chunk of the condensed features holds, by modality."""
    series = {name: report["chunk_variance"] for name, report in teacher.items()}
    chunks = [str(number + 1) for number in range(max(map(len, series.values())))]
    return bar_chart("Variance of each chunk", chunks, series, "chunk of the product split", "variance")


def breakdown_charts(part: dict) -> list[str]:
    """Draw hr@20 and mrr@20 over one kind of bins; the counts stand below."""
    counts = [f"n={count:,}" for count in part["counts"]]
    return [
        bar_chart(
            f"{name}@20 {part['title']}", part["names"], {name: part[name]}, part["unit"], "percent", notes=counts
        )
        for name in ("hr", "mrr")
    ]


def _by_phase(lines: list[dict], value: Callable[[dict], float | None]) -> dict[str, list]:
    """Return phase -> points (epoch, value) of the lines of trained epochs where there is a value."""
    series = {}
    for phase, name in PHASES.items():
        points = [(line["epoch"], value(line)) for line in _of_phase(lines, phase) if line.get("losses")]
        points = [(epoch, v) for epoch, v in points if v is not None]
        if points:
            series[name] = points
    return series


def _of_phase(lines, phase):
    return [line for line in lines if line.get("phase") == phase]


def _loss_title(name):
    part, _, modality = name.partition("/")
    return _LOSSES.get(part, part) + (f", {modality}" if modality else "")
