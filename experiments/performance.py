"""The tables of docs/performance.md, out of benchmarks/latest.json, peers.json and costs.json alone.

python -m experiments.performance
"""

import argparse
import pathlib
import re
import statistics
import sys

from experiments.tables import NONE, markdown
from kdsr_jax.files import replace_file
from kdsr_jax.report.files import read_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "performance.md"
LATEST, PEERS, COSTS = (ROOT / "benchmarks" / f"{name}.json" for name in ("latest", "peers", "costs"))
_BLOCK = re.compile(r"(<!-- bench:(.+?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOTHING = "Not measured yet."
TARGETS = {"help": 0.5, "cold": 20, "warm": 6}
START = {"help": "`--help`", "cold": "first steps, nothing cached", "warm": "first steps, programs and teacher cached"}
PER_EPOCH, TO_QUALITY = 30, 10  # what is hoped for: so many times faster than RecBole


def main():
    """Bring docs/performance.md up to date; returns 0."""
    text = updated(DOCS.read_text(), *(read_json(path) or {} for path in (LATEST, PEERS, COSTS)))
    replace_file(DOCS, lambda file: file.write(text.encode()), shared=True)
    return 0


def updated(text, latest, peers, costs):
    """Return a text with every block between "<!-- bench:NAME -->" and "<!-- /bench -->" filled.

    Args:
      text: in markdown; marks stand on lines of their own.
      latest: content of benchmarks/latest.json; {} where nothing is measured yet.
      peers, costs: likewise of benchmarks/peers.json and costs.json.

    Raises:
      KeyError: there is no block of that name.
    """
    datasets = latest.get("datasets", {})
    blocks = {
        "machine": lambda: machine(datasets),
        "models": lambda: "\n\n".join(f"**{name}**\n\n{models(found)}" for name, found in datasets.items()),
        "floor": lambda: floor(datasets),
        "cdl": lambda: cdl(datasets),
        "reach": lambda: reach(datasets),
        "startup": lambda: startup(latest.get("startup")),
        "costs": lambda: costs_of_a_step(costs) if costs else "",
        "peers": lambda: speed_of_peers(peers),
        "peers-quality": lambda: quality_of_peers(peers),
        "peers-checks": lambda: checks_of_peers(peers),
    }
    return _BLOCK.sub(lambda match: f"{match[1]}{(blocks[match[2]]() or NOTHING).strip()}\n{match[3]}", text)


def report(found):
    """Return what a finished measurement says, in markdown: a data set's table, and the ratios of its models."""
    names, text, other = list(found["models"]), models(found), found["against"]
    bases = {
        name: f"{name}@{other}" if other else names[0] for name in names if not other or not name.endswith(f"@{other}")
    }
    lines = [
        [f"`{name}`", f"`{base}`", f"{_ratio(found, name, base):.3f}", f"{_ratio(found, name, base, 'ranking'):.3f}"]
        for name, base in bases.items()
        if name != base
    ]
    header = ["of", "to", "seconds an epoch", "seconds a ranking"]
    return f"{text}\n\nMedian ratio of the rounds' times\n\n{markdown(header, lines)}" if lines else text


def machine(datasets):
    """Return on what each data set was measured."""
    lines = [
        [name, f"{where['device']}, {where['cores']} cores", where["processor"]]
        + [f"{found['machine']['gflops']:.0f}", f"{found['machine']['gbytes']:.1f}", f"{found['load']:.1f}"]
        + [f"{found['rounds']} x {found['steps of a turn']}", found["commit"], f"{where['versions']['jax']}"]
        for name, found in datasets.items()
        for where in [found["hardware"]]
    ]
    header = [
        "data",
        "device",
        "processor",
        "GFLOP/s of products",
        "GB/s of arrays",
        "load",
        "rounds x steps",
        "commit",
        "jax",
    ]
    return markdown(header, lines) if lines else ""


def models(found):
    """Return a data set's table of models."""
    lines = [
        [f"`{name}`", row["tables"], row["trained on"], f"{row['parameters']:,}", f"{row['compilation']:.0f}"]
        + [f"{row['seconds']['epoch']:.2f}", f"{row['targets/s']:,.0f}", f"{row['rankings/s']:,.0f}"]
        + [f"{row['fraction']:.1%}", f"{row['memory']['process']:,.0f}", f"{row['memory']['programs']:,.0f}"]
        for name, row in found["models"].items()
    ]
    header = ["model", "tables", "trained on", "parameters", "compilation s", "s an epoch", "targets/s", "rankings/s"]
    return markdown([*header, "floor / measured", "process MiB", "programs MiB"], lines)


def floor(datasets):
    """Return SASRec's count, part by part, with what it takes at the measured peaks, on the last data set that has it."""
    found = next((found for found in reversed(datasets.values()) if "sasrec" in found["models"]), None)
    if not found:
        return ""
    row, peak = found["models"]["sasrec"], found["machine"]
    steps, flops = row["steps"], row["floor"]["flops"]
    targets, inputs, squares = (row[name] / steps for name in ("targets", "inputs", "squares"))
    formulas = {
        "encoder": f"6 x {inputs:,.0f} inputs x {row['maps']:,} numbers of matrices",
        "attention": f"12 x {squares:,.0f} squares x {row['dim']} x {row['attention']} layers",
        "softmax": f"6 x {targets:,.0f} targets x {row['items']:,} items x {row['dim']}",
    }
    lines = [
        [name, text, f"{flops[name] / 1e9:.3f} GFLOP", f"{flops[name] / peak['gflops'] / 1e6:.2f}"]
        for name, text in formulas.items()
    ]
    size = row["floor"]["bytes"]
    lines.append(
        ["Adam", f"32 x {row['parameters']:,} parameters", f"{size / 1e9:.3f} GB", f"{size / peak['gbytes'] / 1e6:.2f}"]
    )
    least, measured = sum(float(line[-1]) for line in lines), 1000 * row["seconds"]["epoch"] / steps
    lines.append(["together", "", "", f"{least:.2f}"])
    lines.append(["measured", f"mean of an epoch's {steps:,} steps", "", f"{measured:.2f}"])
    return f"`sasrec`, {row['dataset']}:\n\n" + markdown(["part", "count of a mean step", "amount", "ms"], lines)


def cdl(datasets):
    """Return what distillation costs beside plain tuning of the same model."""
    plain, distilled = "tuned-sasrm", "kdsr-sasrm"
    lines = []
    for name, found in datasets.items():
        for label in found["models"]:
            if label.startswith(distilled) and plain in found["models"] and "@" not in label:
                ratios = [_ratio(found, label, plain, what) - 1 for what in ("epoch", "ranking")]
                lines.append([name, f"`{label}`", *(f"{ratio:+.1%}" for ratio in ratios)])
    header = ["data", "model", f"s an epoch, beside `{plain}`", "s a ranking"]
    return markdown(header, lines) if lines else ""


def reach(datasets):
    """Return how long training took to a given quality on validation."""
    lines = []
    for name, found in datasets.items():
        for label, curve in found["reach"].items():
            best, epochs = max(curve["mrr@20"]), len(curve["mrr@20"])
            done = f"{sum(curve['train']):.1f}" if best >= curve["target"] else NONE
            cells = [name, f"`{label}`", f"{curve['target']:.2f}", done, str(epochs), f"{best:.2f}"]
            lines.append([*cells, f"{sum(curve['evaluation']):.1f}"])
    header = ["data", "model", "validation mrr@20", "s of training", "epochs", "best mrr@20", "s of evaluation besides"]
    return markdown(header, lines) if lines else ""


def startup(found):
    """Return the start-up's seconds beside what they should be."""
    if not found:
        return ""
    lines = [
        [START[name], f"{found[name]:.2f}", f"under {limit}", _reached(found[name] < limit)]
        for name, limit in TARGETS.items()
    ]
    return f"{markdown(['', 's', 'target', 'reached'], lines)}\n\n{_on(found)}"


def costs_of_a_step(found):
    """Return what each part of a step costs, and the costliest operations."""
    rows = found["rows"]
    parts = list(next(iter(rows.values()))["parts"])
    shares = [
        [f"`{name}`", str(row["length"]), f"{row['ms']:.1f}"]
        + [f"{row['parts'][part] / sum(row['parts'].values()):.0%}" for part in parts]
        for name, row in rows.items()
    ]
    costliest = [
        [f"`{name}`", *(f"`{operation}`: {ms:.1f}" for operation, ms in row["operations"])]
        for name, row in rows.items()
    ]
    tables = (
        markdown(["config", "length", "ms a step", *parts], shares),
        markdown(["ms of", "1st", "2nd", "3rd"], costliest),
    )
    return "\n\n".join([*tables, _on(found)])


def speed_of_peers(peers):
    """Return seconds an epoch of RecBole's models and of ours."""
    lines = [
        [name, f"`{model}`", f"{row['targets']:,}", f"{row['theirs']['epoch']:,.0f}", f"{row['ours']['epoch']:,.1f}"]
        + [f"{row['ratio']['epoch']:.1f}", f"{row['ratio']['cpu']:.1f}", _reached(row["ratio"]["epoch"] >= PER_EPOCH)]
        + [f"{len(row['rounds']['ours'])} x {row['steps of a turn']}", f"{row['load']:.1f}", _where(row)]
        for name, models in peers.items()
        for model, row in models.items()
        if "ratio" in row
    ]
    header = ["data", "model", "targets", "RecBole, s an epoch", "ours, s an epoch", "ratio", "ratio of CPU seconds"]
    return markdown([*header, f">= {PER_EPOCH}", "rounds x steps", "load", "hardware"], lines) if lines else ""


def quality_of_peers(peers):
    """Return RecBole's quality by epoch and how long ours needs for it."""
    lines = []
    for name, model, quality in _qualities(peers):
        theirs, target = quality["theirs"], quality["target"]
        best = max(range(len(theirs)), key=lambda index, theirs=theirs: theirs[index]["mrr@20"])
        spent, ours = sum(epoch["seconds"] for epoch in theirs[: best + 1]), quality["ours"]
        cells = [name, f"`{model}`", str(best + 1), f"{target:.3f}", f"{theirs[best]['hr@20']:.3f}", f"{spent:,.1f}"]
        if max(ours["mrr@20"]) < target:
            lines.append([*cells, NONE, str(len(ours["train"])), NONE, _reached(False)])
            continue
        needed = sum(ours["train"])
        reached = _reached(spent / needed >= TO_QUALITY)
        lines.append([*cells, f"{needed:,.1f}", str(len(ours["train"])), f"{spent / needed:.1f}", reached])
    header = [
        "data",
        "model",
        "RecBole's epochs",
        "validation mrr@20",
        "hr@20",
        "RecBole, s",
        "ours to it, s",
        "our epochs",
    ]
    return markdown([*header, "ratio", f">= {TO_QUALITY}"], lines) if lines else ""


def checks_of_peers(peers):
    """Return RecBole's metrics by its own evaluator and by ours, on the same instances."""
    lines = []
    for name, model, quality in _qualities(peers):
        for part, check in quality["checks"].items():
            cells = [
                f"{check['own'][own]:.2f} / {check['ours'][ours]:.2f}"
                for own, ours in (("hit@20", "hr@20"), ("mrr@20", "mrr@20"))
            ]
            lines.append([name, f"`{model}`", part, *cells])
    header = ["data", "RecBole's", "part", "hr@20, its evaluator / ours", "mrr@20, its evaluator / ours"]
    return markdown(header, lines) if lines else ""


def _qualities(peers):
    """List (data set, model, record) of all finished comparisons of quality."""
    rows = [(name, model, row.get("quality", {})) for name, models in peers.items() for model, row in models.items()]
    return [row for row in rows if "ours" in row[2]]


def _reached(is_so):
    return "yes" if is_so else "**no**"


def _on(found):
    return f"{_machine(found)}; load when it began: {found['load']:.1f}."


def _where(row):
    return f"{_machine(row)}; torch {row['torch']}, {row['threads']} threads"


def _machine(found):
    where = found["hardware"]
    return f"{where['device']}, {where['cores']} cores, {where['processor']}"


def _ratio(found, name, base, what="epoch"):
    """Return the median over the rounds of one model's seconds by another's."""
    one, other = (found["models"][model]["seconds"]["rounds"] for model in (name, base))
    return statistics.median(a[what] / b[what] for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    sys.exit(main())
