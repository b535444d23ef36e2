"""Several charts in one picture, and what they mostly show: a setting's mean score over its seeds."""

import re
import statistics

from kdsr_jax.report.charts import WIDTH

GAP = 20  # between panels, in units of the view box


def arrange(rows, label):
    """Lay charts out in rows.

    Args:
      rows: lists of ``<svg class="chart">`` elements, left to right; empty ones are left out.
      label: what the whole picture shows, read out.

    Returns:
      One ``<svg>``, or "" where there is no chart.
    """
    inner, top, columns = [], 0, max(map(len, rows), default=0)
    for row in filter(None, rows):
        heights = [int(re.search(r'viewBox="0 0 \d+ (\d+)"', panel)[1]) for panel in row]
        for column, (panel, height) in enumerate(zip(row, heights, strict=True)):
            place = f'<svg x="{column * (WIDTH + GAP)}" y="{top}" width="{WIDTH}" height="{height}" overflow="visible" '
            inner.append(panel.replace('<svg class="chart" ', place, 1))
        top += max(heights) + GAP
    frame = f"{-GAP // 2} {-GAP // 2} {columns * (WIDTH + GAP)} {top}"
    svg = f'<svg class="chart" role="img" aria-label="{label}" viewBox="{frame}">{"".join(inner)}</svg>'
    return svg if inner else ""


def runs_of(rows, dataset, label=None):
    """Return the runs of a dataset, or of a setting on it."""
    runs = [row for row in rows if row["kind"] == "run" and row["dataset"] == dataset]
    return [row for row in runs if label in (None, row["label"])]


def datasets_of(rows):
    """Return the names of the datasets that have runs, in the order of the rows."""
    return list(dict.fromkeys(row["dataset"] for row in rows if row["kind"] == "run"))


def mean_score(rows, column, metric):
    """Return the mean over runs of a metric in percent, None where no run has it.

    Args:
      rows: runs.
      column: "validation", "test" or "paper".
      metric: such as "mrr@20".
    """
    values = [row[column][metric] for row in rows if row.get(column)]
    return statistics.fmean(values) if values else None
