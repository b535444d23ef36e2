"""What a run prints: a progress bar on a terminal, plain lines elsewhere, and the table at the end.

Of several processes, the first prints.
"""

import pathlib
import sys
import time

import rich.console
import rich.table
import rich.text
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdsr_jax import processes
from kdsr_jax.labels import COLUMNS


class EpochProgress:
    """Shows the chunks of one epoch on a terminal; silent elsewhere. A context manager."""

    def __init__(self, phase, epoch, epochs, chunks, metrics=()):
        """Lay the bar out; metrics is the last evaluation's dict, shown beside the losses, or empty."""
        self._done, self._start = 0, time.perf_counter()
        self._metrics = main_metrics(metrics) if metrics else ""
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[rate]}")]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}", markup=False)]
        silent = not (sys.stderr.isatty() and processes.is_first())
        self._bar = Progress(*columns, transient=True, disable=silent, console=_console())
        self._task = self._bar.add_task(f"{phase} epoch {epoch} of at most {epochs}", total=chunks, rate="", loss="")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def advance(self, targets, losses):
        """Report one finished chunk: its targets and its mean loss parts."""
        self._done += targets
        rate = f"{self._done / (time.perf_counter() - self._start):,.0f} targets/s"
        self._bar.update(self._task, advance=1, rate=rate, loss=f"{_losses(losses)}  {self._metrics}")


def say(text):
    """Print one plain line to stderr; nothing in it is read as markup."""
    if processes.is_first():
        _console().print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def describe_epoch(line, epochs):
    """Return the line that sums an epoch up, from its object in metrics.jsonl; epoch 0 has only what tables retain."""
    text = f"{line['phase']} epoch {line['epoch']}/{epochs}"
    if line.get("losses"):
        parts = {name: value for name, value in line["losses"].items() if name not in ("loss", "gradient_norm")}
        text += f"  loss {line['losses']['loss']:.4f} ({_losses(parts)})  {line['targets_per_second']:,.0f} targets/s"
    if line.get("forgetting"):
        text += f"  like {_likeness(line['forgetting'])}"
    if line.get("metrics"):
        text += f"  {line['evaluated_on']}: {main_metrics(line['metrics'])}"
    return text


def main_metrics(metrics):
    """Return hr and mrr at the smallest and the largest cut-off as text."""
    names = [name for name in metrics if name.startswith(("hr", "mrr"))]
    half = len(names) // 2
    shown = dict.fromkeys([names[0], names[half], names[half - 1], names[-1]])
    return " ".join(f"{name} {metrics[name]:.2f}" for name in shown)


def print_result(result, workdir):
    """Print the final table of metrics, in percent, to stdout, and where the run and its report are."""
    if not processes.is_first():
        return
    print_metrics(
        {title: result[key] for key, title in COLUMNS.items() if result[key]},
        f"metrics in percent, seed {result['seed']}",
    )
    best = f"epoch {result['best_epoch']} chosen on validation, " if result["best_epoch"] else ""
    seconds = f"{result['train_seconds']:.0f} s training, {result['eval_seconds']:.0f} s evaluation"
    print(f"{best}{result['parameters']:,} parameters, {seconds} on {result['device']}\nrun: {workdir}")
    print(f"report: {pathlib.Path(workdir) / 'report.html'}")


def print_metrics(columns, title):
    """Print a table of metrics to stdout.

    Args:
      columns: dict heading -> dict metric -> percent; a metric that a column lacks stays empty there.
      title: of the table; nothing in it is read as markup.
    """
    if not processes.is_first():
        return
    shown = {heading: {name: f"{value:.4f}" for name, value in metrics.items()} for heading, metrics in columns.items()}
    print_columns(shown, title, "metric")


def print_columns(columns, title, heading):
    """Print a table to stdout.

    Args:
      columns: dict heading -> dict row -> text; the rows are those of the first, and one that another lacks stays empty.
      title: of the table, or ""; nothing in it or in the texts is read as markup.
      heading: of the rows' names.
    """
    table = rich.table.Table(title=rich.text.Text(title))
    table.add_column(rich.text.Text(heading))
    for name in columns:
        table.add_column(rich.text.Text(name), justify="right")
    for row in next(iter(columns.values())):
        table.add_row(*(rich.text.Text(text) for text in (row, *(texts.get(row, "") for texts in columns.values()))))
    rich.console.Console().print(table)


def _likeness(forgetting):
    """Return how like the features, and the ids where they are measured, each modality's table is."""
    names = dict.fromkeys(name for values in forgetting.values() for name in values)
    return "; ".join(
        f"{name}: " + " ".join(f"{modality} {values[name]:.2f}" for modality, values in forgetting.items())
        for name in names
    )


def _losses(parts):
    return " ".join(f"{name} {value:.4g}" for name, value in parts.items())


def _console():
    return rich.console.Console(stderr=True)
