"""Seconds and memory against the size of the log and of the catalogue, with fitted exponents: docs/scale.md.

    python -m experiments.scale                                  # all; some minutes
    python -m experiments.scale --interactions=100000000 --items=  # a larger log alone, what was measured before is kept
    python -m experiments.scale --draw                           # the page and the picture again, out of the file

Every size is a process of its own. What is measured stands in benchmarks/scale.json, of which page and picture are drawn.
"""

import argparse
import math
import os
import pathlib
import sys
import tempfile

import numpy as np

from experiments.panels import arrange
from experiments.performance import ROOT
from experiments.processes import Worker, medians, take_turns
from experiments.records import current_commit, write_json
from experiments.tables import NONE, markdown
from kdsr_jax.errors import UserError, answer
from kdsr_jax.files import replace_file
from kdsr_jax.report.charts import line_chart, write_svg
from kdsr_jax.report.files import read_json

SAVED, DOCS, PICTURE = ROOT / "benchmarks" / "scale.json", ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.svg"
INTERACTIONS, ITEMS = "100000,1000000,10000000", "10000,100000,1000000"
SAMPLED = 1024  # items drawn for a step's softmax
MODELS = {  # name -> whether it has features, and its settings beside COMMON
    "SASRec, all items": (False, ()),
    "SASRec, sampled": (False, (f"train.sampled_items={SAMPLED}",)),
    "KDSR, all items": (True, ()),
    "KDSR, sampled": (True, (f"train.sampled_items={SAMPLED}",)),
}
COMMON = (
    *("model.dim=32", "model.num_layers=1", "data.max_length=20", "train.batch_size=128", "train.steps_per_call=2"),
    *("teacher.num_splits=4", "teacher.num_codes=16", "teacher.num_pairs=10000"),
)


def main(words=None):
    """Measure, write and draw; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--interactions", default=INTERACTIONS, help="sizes of logs; now %(default)s")
    parser.add_argument("--items", default=ITEMS, help="sizes of catalogues; now %(default)s")
    parser.add_argument("--models", default=";".join(MODELS), help="separated by semicolons; now %(default)s")
    parser.add_argument("--users", type=int, default=150, help="of a catalogue: what is ranked in a turn")
    parser.add_argument("--rounds", type=int, default=1, help="turns of a model, after two that warm it up")
    parser.add_argument("--folder", help="where logs are written, twice the size of a log; a temporary one by default")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; benchmarks/scale.json, and the docs, by default")
    return answer(lambda: scale(parser.parse_args(words)))


def scale(arguments):
    """Do what the command line asks for; rows of other sizes and models stay as they are.

    Raises:
      UserError: a size is no number from 1, a model is unknown, or a process could not do its work.
    """
    logs, catalogues = _sizes("--interactions", arguments.interactions), _sizes("--items", arguments.items)
    models = [name.strip() for name in arguments.models.split(";")]
    if unknown := [name for name in models if name not in MODELS]:
        raise UserError(f"--models: there is no {unknown[0]!r}; there are {'; '.join(MODELS)}")
    if arguments.users < 1 or arguments.rounds < 1:
        raise UserError("--users and --rounds must be 1 or more")
    out = arguments.out or SAVED
    found = read_json(out) or {"logs": [], "catalogues": []}
    if not arguments.draw:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for size in logs:
                _keep(out, found, "logs", measure_log(size, folder), ("size",))
            for size in catalogues:
                for model in models:
                    row = measure_catalogue(model, size, arguments.users, arguments.rounds, folder)
                    _keep(out, found, "catalogues", row, ("model", "size"))
    if arguments.out is None:
        replace_file(DOCS, lambda file: file.write(page(found).encode()), shared=True)
        write_svg(PICTURE, picture(found))
    else:
        print(page(found))


def _sizes(flag, words):
    sizes = [word.strip() for word in words.split(",") if word.strip()]
    if wrong := [word for word in sizes if not word.isdecimal() or int(word) < 1]:
        raise UserError(f"{flag}={words}: {wrong[0]!r} is no whole number from 1")
    return [int(word) for word in sizes]


def _keep(out, found, kind, row, keys):
    """Put a row in the place of that of the same keys, in order of size, and write the file."""
    row |= {"load": os.getloadavg()[0], "commit": current_commit()}
    print(f"{kind}: {row.get('model', '')} {row['size']:,} done", file=sys.stderr)
    others = [old for old in found[kind] if any(old[key] != row[key] for key in keys)]
    found[kind] = sorted([*others, row], key=lambda old: old["size"])
    write_json(out, found)


def worker(folder):
    """Start experiments/scale_worker.py as a Worker whose caches, but that of compiled programs, are in a folder."""
    settings = {"PYTHONPATH": str(ROOT), "KDSR_CACHE": f"{folder}/cache", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-P", "-m", "experiments.scale_worker"]
    return Worker("scale", command, cwd=str(ROOT), env=os.environ | settings)


def _ask(folder, do, /, **arguments):
    """Return what a process of its own answers to one request."""
    process = worker(folder)
    try:
        return process.ask(do, **arguments)
    finally:
        process.close()


def measure_log(size, folder):
    """Return the row of a log of so many interactions, prepared from shards; written by another process than it is read."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        written = _ask(root, "write", folder=f"{root}/log/interactions", interactions=size)
        return {"size": size, "shards": written} | _ask(root, "prepare", root=root, name="log")


def measure_catalogue(model, size, users, rounds, folder):
    """Return the row of a model's training steps and rankings with so many items."""
    features, settings = MODELS[model]
    process = worker(folder)
    try:
        words = [f"--config.{word}" for word in (*COMMON, *settings)]
        work = process.ask("catalogue", items=size, users=users, features=features, settings=words)
        turn = medians(take_turns({model: process}, rounds, {model: {"steps": 2}})[model])
        (step,) = turn["step"].values()
        counts = {"parameters": work["parameters"], "targets": work["targets"] / work["steps"]}
        return {
            "model": model,
            "size": size,
            "step": step,
            "ranking": turn["ranking"],
            "memory": process.ask("memory"),
            **counts,
        }
    finally:
        process.close()


def exponent(points):
    """Fit y = a * x ** b by least squares of the logarithms; return b, or None of fewer than two different x.

    Args:
      points: pairs (x, y), all above zero.
    """
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, np.float64)).T
    x = x - x.mean()
    return float(x @ y / (x @ x))


def _exponent_text(points):
    value = exponent([point for point in points if point[1] > 0])
    return NONE if value is None else f"{value:.2f}"


def page(found):
    """Return docs/scale.md, of what was measured and nothing else.

    Args:
      found: content of benchmarks/scale.json.
    """
    parts = [INTRO, "## The log", LOG_PROSE, _log_table(found["logs"])]
    parts += ["## The catalogue", CATALOGUE_PROSE.format(settings=" ".join(COMMON), sampled=SAMPLED)]
    return "\n\n".join([*parts, _catalogue_table(found["catalogues"]), LIMITS]) + "\n"


def _log_table(rows):
    if not rows:
        return "Not measured yet."
    header = ["interactions", "of the core", "users", "items", "MB of shards", "s to prepare", "interactions/s"]
    header += ["s from the cache", "MiB at the start", "MiB at the peak", "bytes more an interaction", "load"]
    lines = [
        [f"{row['size']:,}", *(f"{row[name]:,}" for name in ("interactions", "users", "items"))]
        + [f"{row['shards']['bytes'] / 1e6:,.1f}", f"{row['seconds']['prepare']:,.2f}"]
        + [f"{row['size'] / row['seconds']['prepare']:,.0f}", f"{row['seconds']['again']:,.2f}"]
        + [f"{row['memory']['before']:,.0f}", f"{row['memory']['peak']:,.0f}"]
        + [f"{_grown(row) * 2**20 / row['size']:,.0f}", f"{row['load']:.1f}"]
        for row in rows
    ]
    fits = _log_points(rows)
    exponents = ", ".join(f"{name} {_exponent_text(points)}" for name, points in fits.items())
    return f"{markdown(header, lines)}\n\nFitted exponents of the number of interactions: {exponents}."


def _grown(row):
    return row["memory"]["peak"] - row["memory"]["before"]


def _log_points(rows):
    return {
        "seconds to prepare": [(row["size"], row["seconds"]["prepare"]) for row in rows],
        "memory beyond the start": [(row["size"], _grown(row)) for row in rows],
    }


def _catalogue_table(rows):
    if not rows:
        return "Not measured yet."
    header = ["model", "items N", "parameters", "targets a step", "s a step", "ms a ranking"]
    header += ["MiB of the process", "MiB of programs", "load"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [
        [model, f"{row['size']:,}", f"{row['parameters']:,}", f"{row['targets']:.0f}", f"{row['step']:.4f}"]
        + [f"{1000 * row['ranking']:.2f}", f"{row['memory']['process']:,.0f}", f"{row['memory']['programs']:,.0f}"]
        + [f"{row['load']:.1f}"]
        for model in models
        for row in rows
        if row["model"] == model
    ]
    kinds = {"seconds a step": "step", "seconds a ranking": "ranking", "memory of the process": "process"}
    fits = [
        [model, *(_exponent_text(_catalogue_points(rows, kind).get(model, [])) for kind in kinds.values())]
        for model in models
    ]
    fitted = "Fitted exponents of N; those of the process' memory count python, jax and the compiler as well:"
    missing = "; ".join(name for name in MODELS if name not in models)
    note = f"\n\nNot measured yet: {missing}." if missing else ""
    return f"{markdown(header, lines)}\n\n{fitted}\n\n{markdown(['model', *kinds], fits)}{note}"


def _catalogue_points(rows, kind):
    points = {}
    for row in rows:
        y = row["memory"]["process"] if kind == "process" else row[kind]
        points.setdefault(row["model"], []).append((row["size"], y))
    return points


def picture(found):
    """Return one ``<svg>``: seconds and memory by interactions, and a step, its memory and a ranking by N, both axes log."""

    def chart(title, series, x_label, y_label):
        lines = {name: [(math.log10(x), y) for x, y in points] for name, points in series.items()}
        return line_chart(title, lines, f"log10 of {x_label}", y_label, log_y=True)

    logs = _log_points(found["logs"])
    steps = {kind: _catalogue_points(found["catalogues"], kind) for kind in ("step", "process", "ranking")}
    rows = [
        [
            chart("Preparation: time", {"prepare": logs["seconds to prepare"]}, "interactions", "seconds"),
            chart("Preparation: memory", {"peak": logs["memory beyond the start"]}, "interactions", "MiB more"),
            chart("Ranking one target", steps["ranking"], "items", "seconds"),
        ],
        [
            chart("Training step: time", steps["step"], "items", "seconds"),
            chart("Training process: memory", steps["process"], "items", "MiB at the peak"),
        ],
    ]
    return arrange(rows, "seconds and memory by the size of the log and of the catalogue")


INTRO = """# Scale

How time and memory grow with the log and with the catalogue, measured by `python -m experiments.scale` (10⁸ interactions:
`--interactions=100000000 --items=`), which writes `benchmarks/scale.json`; this page and its picture are drawn from that file alone
(`--draw`). Every size is a process of its own; memory is its peak resident memory. The exponent b of a power law a·xᵇ is fitted by least
squares of the logarithms: 1 is proportional. Fixed costs weigh more at small sizes, so the fitted exponents are lower than they would be
for large sizes alone. The load is the number of runnable processes on two shared virtual cores, which the measurement itself can keep
busy: **other work ran beside it** where the load is well above 2, and seconds may be too long.

![Seconds and memory by size, both logarithmic](scale.svg)"""
LOG_PROSE = """Users take random items at random times, 20 interactions a user and 50 an item on average, in parquet shards of at most
2²⁰ rows that the folder source reads; 5-core, numbering, sorting, and keeping it all in the cache (checked by reading it back) are counted.

Counted by hand, an interaction takes 16 bytes while the log is read (codes of user and item, 4 each, and the time, 8; in a mapped file
where memory is short), 12 as a history (item 4, time 8), and 4 on the device. The peak is several times that: raw ids are
texts, records are Python objects for a while, and what is kept in the cache is read back and compared."""
CATALOGUE_PROSE = """Random histories of 20 items over N items, most of which are in none when N is large; {settings}. "Sampled" draws
{sampled:,} items for each step's softmax (`train.sampled_items`). `mesh` and `train.sparse_tables` have their defaults: `mesh.model` is 1,
and every row of every table is updated, so nothing here measures sparse tables. KDSR has one modality, with 32 random numbers per item.
Rankings are those of the evaluation, over all N items, top 20 included.

Counted by hand, with d numbers a row: a row of a table that is trained is 4d bytes, and Adam's two moments 8d more; its gradient is another 4d
within a step. At d = 32 that is 512 bytes an item for ids and 512 more for each modality's table, so 0.5 GB and 1 GB at 10⁶ items. The scores of
a batch of T targets would be 4TN bytes, but they are made in chunks of 16 MiB, or of 64 targets where these take more: 0.26 GB at
N = 10⁶; sampling replaces N by the number drawn. Adam touches every row of every table, so a step with sampling grows with N, too, unless
`train.sparse_tables` leaves out the rows that a step does not need.
A ranking multiplies d·N numbers, and an evaluation holds 48 MiB of scores at a time, whatever N is. An item also has its raw id, 4 bytes
a character, and the features as they were read."""
LIMITS = """## Limits

- **Histories need not fit the memory.** Items and times, 12 bytes an interaction, lie in memory or, where one of the two takes more than a sixteenth of
  it (`KDSR_MEMORY`, in bytes, says another size), in a mapped temporary file in `$KDSR_CACHE`; they are numbered, sorted, counted, kept as
  array_record shards and read back block by block. On a device they take 4 bytes an interaction; where that is more than an eighth of its memory
  (`data.histories=auto`), a chunk of steps brings the histories of its own windows along, to the same bits. They are not read through grain: a
  history in a mapped file needs no decoding and no other process, and windows begin anywhere in it. What must fit are the different ids and some
  dozens of bytes a window and a test target. 2³¹ − 1 interactions are the most that numbers of 32 bits reach; more than 10⁸ have not been tried.
- **Tables are whole**: parameters and moments of all items are on the devices, spread over `mesh.model` of them. Item vectors that layers make
  (`model.item_scores=fused`, MMSRec) are made for 65,536 items at a time, or by every device for its own; the N vectors themselves are whole.
- **`--mode=stats` of a planted shop** ranks every test target by its true law over all N items, which takes N times the targets: leave it out
  for large shops.
- **The teacher** holds the features of one modality, N·d_m·4 bytes, and is fitted once."""


if __name__ == "__main__":
    sys.exit(main())
