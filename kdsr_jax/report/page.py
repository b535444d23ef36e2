"""report.html: one file without scripts or network, under a policy that would allow neither."""

import contextlib
import logging

from kdsr_jax.config import needs_clusters
from kdsr_jax.labels import COLUMNS
from kdsr_jax.report import figures
from kdsr_jax.report.collect import collect
from kdsr_jax.report.markup import render_page

REPORT = "report.html"
_log = logging.getLogger("kdsr_jax")


def refresh_report(folder) -> None:
    """Write report.html of a run anew from what its folder holds; failing to do so is a warning.

    Args:
        folder: Workdir.
    """
    with optional(REPORT):
        folder.write_text(REPORT, render(collect(folder.path)))


@contextlib.contextmanager
def optional(what: str):
    """Turn any error inside into a warning that names what could not be written: a picture of a run must never end it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a full disk, a damaged file, or a fault of the report's own
        _log.warning("%s could not be written (%s: %s); the run goes on", what, type(error).__name__, error)


def render(data: dict) -> str:
    """Return the page for what ``collect`` read; the same data give the same text."""
    result, selection, overview = data["result"], data["selection"], data["overview"]
    chosen = selection and selection["best_epoch"]
    lines = data["lines"]
    return render_page(
        "report.html.j2",
        data=data,
        status=_status(data),
        model=describe_model(data["fields"]),
        table=_final_table(result, selection),
        paper_epochs=(result or {}).get("paper_epochs"),
        chosen=chosen,
        data_charts=figures.data_charts(overview) if overview else [],
        teacher=(overview or {}).get("teacher") or {},
        chunk_chart=figures.chunk_chart(overview["teacher"]) if overview and overview["teacher"] else None,
        loss_charts=figures.loss_charts(lines),
        rate_charts=figures.rate_charts(lines),
        gradient_charts=figures.gradient_charts(lines),
        forgetting_charts=figures.forgetting_charts(lines),
        validation_charts=figures.metric_charts(lines, "select", chosen),
        validation_lines=_evaluated(lines, "select"),
        test_charts=figures.metric_charts(lines, "refit", chosen) if _periodic(data) else [],
        test_lines=_evaluated(lines, "refit") if _periodic(data) else [],
        breakdown_charts=[figures.breakdown_charts(part) for part in (data["breakdowns"] or {}).get("parts", [])],
    )


def _status(data):
    """Say how far the run is; None when it is finished."""
    if data["result"]:
        return None
    if not data["lines"]:
        return "started; no epoch is finished yet"
    newest = data["lines"][-1]
    return f"unfinished: phase {newest['phase']}, {newest['epoch']} epochs done"


def describe_model(fields: dict) -> str:
    """Say in a few words what model a config describes.

    Args:
        fields: the config's, by dotted name.
    """
    tables = fields.get("model.tables", "none")
    parts = [str(fields.get("model.name", "model"))]
    clustered = needs_clusters(fields.get("model.name"), fields.get("model.cluster_weight", 0))
    parts += [f"{tables} modality tables"] if tables != "none" else [] if clustered else ["item ids only"]
    parts += ["clusters of features"] if clustered else []
    parts += ["distillation"] if fields.get("distill.enabled") else []
    return ", ".join(parts)


def _final_table(result, selection):
    """Return {"columns": headings, "rows": [(metric, [percent or None, ...])]}, or None while there is nothing."""
    source = result or selection or {}
    columns = {title: source[key] for key, title in COLUMNS.items() if source.get(key)}
    if not columns:
        return None
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
    return {"columns": list(columns), "rows": [(n, [m.get(n) for m in columns.values()]) for n in names]}


def _evaluated(lines, phase):
    return [line for line in lines if line.get("phase") == phase and line.get("metrics")]


def _periodic(data):
    """Tell whether the test part was looked at epoch by epoch, as the paper's protocol does."""
    return data["fields"].get("eval.protocol") in ("paper", "both")
