"""The page of ``kdsr_jax.compare``: one table, and curves of several runs laid over each other."""

from kdsr_jax.report.charts import line_chart
from kdsr_jax.report.figures import PHASES
from kdsr_jax.report.markup import render_page

# Group of a line of metrics.jsonl -> (heading, label of the y axis), in the order of the page.
GROUPS = {
    "metrics": ("Metrics", "percent"),
    "losses": ("Losses", "loss"),
    "learning_rates": ("Learning rates", "rate at the end of the epoch"),
    "forgetting": ("Forgetting: likeness of tuned tables to features and to item ids", "Pearson's r of pair cosines"),
}
# Of phase refit, in place of the first heading: the paper's protocol is labelled wherever it appears.
TEST_METRICS = "Metrics on the test part, epoch by epoch: paper's protocol"


def render_comparison(runs: dict[str, list[dict]], sections: list, notes: list[str]) -> str:
    """Return the page.

    Args:
        runs: name -> lines of its metrics.jsonl.
        sections: of the table: (heading, [(label, [text a run, ...]), ...]).
        notes: warnings to be shown above it.
    """
    phases = [(title, found) for phase, title in PHASES.items() if (found := _charts(runs, phase))]
    return render_page("compare.html.j2", names=list(runs), sections=sections, notes=notes, phases=phases)


def _charts(runs, phase):
    """Return [(heading, charts), ...] of the groups of a phase that have a curve: two epochs or more in any run."""
    found = []
    for group, (heading, unit) in GROUPS.items():
        curves = {}
        for run, lines in runs.items():
            for line in lines:
                for name, value in _flat(line.get(group)) if line.get("phase") == phase else ():
                    curves.setdefault(name, {}).setdefault(run, []).append((line["epoch"], value))
        curves = {name: series for name, series in curves.items() if max(map(len, series.values())) > 1}
        # Every run keeps its colour, also where it has no such curve.
        charts = [line_chart(n, {run: s.get(run, []) for run in runs}, "epoch", unit) for n, s in curves.items()]
        if charts:
            found.append((TEST_METRICS if (phase, group) == ("refit", "metrics") else heading, charts))
    return found


def _flat(group):
    """Yield (name, number) of a group, whose values are numbers or groups of numbers."""
    for name, value in (group or {}).items():
        if isinstance(value, dict):
            yield from ((f"{name}, {inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float):
            yield name, value
