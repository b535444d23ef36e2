"""Section 3.4 of the paper: what distillation (CDL) costs, against the bound 1 / (1 + H).

    python -m experiments.complexity
    python -m experiments.complexity --only="H=2, L=50" --config.data.planted.num_items=1000

Times training steps and rankings of KDSR on SASRM, with all pairs of items of every sequence, with as many drawn pairs as the
config asks for, and without distillation. All three take turns in one process, and the fastest time of each counts. H is the
number of attention blocks: heads share the width d, so their number changes no cost. The log is random, with histories of
equal length L and ``data.planted.num_items`` items; nothing else of the planted shop is used.
"""

import copy
import importlib.metadata
import os
import statistics
import sys

import numpy as np

from experiments import tables
from experiments.panels import arrange
from experiments.processes import in_turns
from experiments.study import Setting, Study, main
from kdsr_jax.data import Dataset
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import Interactions, train_lengths
from kdsr_jax.report.charts import line_chart

BLOCKS = (1, 2, 4, 8)
LENGTHS = (10, 20, 50, 100, 200)
ROUNDS = 5
FEATURE_DIM = 384
RIVALS = {
    "without": {"enabled": False},
    "all pairs": {"enabled": True, "pair_budget": 0},
    "drawn pairs": {"enabled": True},
}


def measure(config, workdir):
    """Time one number of blocks and one length.

    Args:
      config: of KDSR; ``model.num_layers`` is H and ``data.max_length`` is L.
      workdir: not used.

    Returns:
      dict of "step" (seconds a training step) and "ranking" (seconds to rank one target), each a dict with the keys of
      ``RIVALS``; "pairs" (drawn pairs a step), "device" and "versions".
    """
    import jax

    from experiments.contestant import Contestant
    from kdsr_jax.train import VERSIONS

    dataset, contestants = equal_histories(config), {}
    turns = {name: [] for name in RIVALS}
    try:
        for name, fields in RIVALS.items():
            rival = copy.deepcopy(config)
            rival.distill.update(fields)
            contestants[name] = Contestant(rival, dataset)
        for name in in_turns(RIVALS, ROUNDS):
            turns[name].append(contestants[name].turn())
    finally:
        jax.clear_caches()  # the next setting compiles its own programs
    return {
        "step": {name: min(max(turn["step"].items())[1] for turn in own) for name, own in turns.items()},
        "ranking": {name: min(turn["ranking"] for turn in own) for name, own in turns.items()},
        "pairs": config.distill.pair_budget,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def equal_histories(config):
    """Return a random Dataset whose users all have ``data.max_length`` training targets, enough for one chunk of full steps."""
    length = config.data.max_length
    total = next(n for n in range(2 * length + 5) if train_lengths(np.array([n]))[0] == length + 1)
    users = config.train.steps_per_call * max(1, config.train.batch_size // length)
    num_items = config.data.planted.num_items
    rng = np.random.default_rng(0)
    items = rng.integers(1, num_items + 1, users * total).astype(np.int32)
    ids = np.arange(num_items + 1).astype(str)
    interactions = Interactions(items, np.arange(users + 1) * total, np.arange(users).astype(str), ids)
    has_feature = np.arange(num_items + 1) > 0
    values = rng.normal(size=(num_items + 1, FEATURE_DIM)).astype(np.float32) * has_feature[:, None]
    features = {entry.partition("-")[0]: Features(values, has_feature) for entry in config.data.modalities}
    return Dataset("random", interactions, features, None, None)


def table(rows):
    """Return the markdown of the seconds, of the share of a step that distillation takes, and of the bound."""
    lines = []
    for row in rows:
        times = _times(row)
        cells = [f"{1000 * times['step'][name]:.1f}" for name in RIVALS]
        cells += [f"{_share(times, name):.1%}" for name in ("all pairs", "drawn pairs")]
        cells += [f"{1 / (1 + _blocks(row)):.1%}"]
        cells += [f"{1e6 * times['ranking'][name]:.0f}" for name in ("without", "drawn pairs")]
        lines.append([str(_blocks(row)), str(_length(row)), *cells, row["device"]])
    header = ["H", "L", "step without, ms", "with all pairs, ms", "with drawn pairs, ms", "share of all pairs"]
    header += ["share of drawn pairs", "1 / (1 + H)", "ranking a target without, µs", "with, µs", "device"]
    pairs = sorted({_times(row)["pairs"] for row in rows})
    text = "The paper counts L²d for the pairs of a sequence and L²dH for the backbone, by which distillation takes at most "
    text += "1 / (1 + H) of a step. It counts neither the scores of all items nor the classifier of codes, d² a pair. "
    text += f"Drawn pairs: {', '.join(f'{number:,}' for number in pairs)} a step, of all modalities together. Fastest of {ROUNDS} turns.\n\n"
    return text + tables.markdown(header, lines) + "\n"


def figure(rows):
    """Return one ``<svg>``: the share of a step over L and over H with the bound, and rankings with and without."""
    if not rows:
        return ""
    charts, by_blocks = [], {}
    for name in ("all pairs", "drawn pairs"):
        series = {}
        for row in rows:
            share = 100 * _share(_times(row), name)
            series.setdefault(f"H={_blocks(row)}", []).append((_length(row), share))
            by_blocks.setdefault(name, {}).setdefault(_blocks(row), []).append(share)
        charts.append(line_chart(f"Cost of {name}", series, "L", "share of a training step, percent", from_zero=True))
    series = {name: [(h, statistics.fmean(y)) for h, y in shares.items()] for name, shares in by_blocks.items()}
    series["bound"] = [(h, 100 / (1 + h)) for h in by_blocks["all pairs"]]
    heading = "Mean over L, against the bound 1 / (1 + H)"
    charts.append(line_chart(heading, series, "H", "share of a training step, percent", from_zero=True))
    series = {}
    for row in rows:
        ranking = _times(row)["ranking"]
        series.setdefault(f"H={_blocks(row)}", []).append((_length(row), ranking["drawn pairs"] / ranking["without"]))
    charts.append(line_chart("Inference", series, "L", "time of a ranking, with / without", from_zero=True))
    return arrange([charts[:2], charts[2:]], "Cost of distillation")


def _times(row):
    return row["measures"]["complexity"]


def _blocks(row):
    return row["config"]["model.num_layers"]


def _length(row):
    return row["config"]["data.max_length"]


def _share(times, name):
    """Return how much of a step distillation takes."""
    return 1 - times["step"]["without"] / times["step"][name]


STUDY = Study(
    name="complexity",
    title="Section 3.4: the cost of distillation",
    settings={
        f"H={blocks}, L={length}": Setting("kdsr-sasrm", (f"model.num_layers={blocks}", f"data.max_length={length}"))
        for blocks in BLOCKS
        for length in LENGTHS
    },
    datasets=("planted",),
    words=(
        *("model.dim=128", "data.modalities=text-facets", "data.planted.num_items=12101"),  # Beauty's
        *("teacher.autoencoder=pca", "teacher.num_pairs=20000", "train.steps_per_call=4"),
    ),
    work=measure,
    table=table,
    figure=figure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
