"""How fast a training step is, as ratios measured side by side in one run: make bench.

Times a fixed number of training targets of a random log with the shape of Beauty (12,101 items, histories of 5 to 50) for
each variant, twice and alternating, and keeps the faster time of each; compilation is not counted. Machines differ and are
shared, so read the ratios, not the seconds.
"""

import argparse
import os
import platform
import time

import jax
import numpy as np
import rich.console
import rich.table

from kdsr_jax import cli, train
from kdsr_jax.config import validate
from kdsr_jax.data import Dataset
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.phase import PhaseRunner

DEFAULT = "kdsr-sasrm"
# name -> (variant behind the colon, further settings)
VARIANTS = {
    "sasrec, ids only": ("sasrec", []),
    "sasrm, frozen tables": ("sasrm", []),
    "sasrm, tuned tables": ("tuned-sasrm", []),
    "KDSR": (DEFAULT, []),
    "KDSR, all pairs (pair_budget=0)": (DEFAULT, ["--config.distill.pair_budget=0"]),
    "KDSR, a host call a step (steps_per_call=1)": (DEFAULT, ["--config.train.steps_per_call=1"]),
}


def main():
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=3000, help="users of the random log")
    parser.add_argument("--items", type=int, default=12_101, help="items of the random log")
    arguments = parser.parse_args()
    dataset = random_dataset(arguments.users, arguments.items)
    epochs = {name: prepare_epoch(dataset, *variant) for name, variant in VARIANTS.items()}
    seconds = {name: [] for name in VARIANTS}
    for _ in range(2):
        for name, epoch in epochs.items():
            started = time.perf_counter()
            targets = epoch()
            seconds[name].append((time.perf_counter() - started) / targets)
    print_table({name: min(times) for name, times in seconds.items()})


def random_dataset(num_users, num_items, seed=0):
    """Return a Dataset of random histories (mean length 8.9, as Beauty's) and 384 random features an item."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(5 + rng.geometric(1 / 4.9, num_users) - 1, 50)
    items = rng.integers(1, num_items + 1, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    names = np.arange(num_items + 1).astype(str)
    interactions = Interactions(items, offsets, np.arange(num_users).astype(str), names)
    values = rng.normal(size=(num_items + 1, 384)).astype(np.float32)
    has_feature = np.arange(num_items + 1) > 0
    features = {"text": Features(values * has_feature[:, None], has_feature)}
    return Dataset("random", interactions, features, None, None)


def prepare_epoch(dataset, variant, settings):
    """Return a function that trains one epoch and returns its number of targets; everything is compiled already."""
    config = cli.load_config(f"configs/beauty.py:{variant}")
    cli.apply_settings(config, ["--config.data.root=.", "--config.teacher.autoencoder=pca", *settings])
    cli.apply_settings(config, ["--config.teacher.num_pairs=20000"])
    validate(config)
    run = train.prepare(config, dataset)
    runner = PhaseRunner(run, train.refit_phase(run, 1), folder=None)
    state = runner.new_state()

    def epoch():
        nonlocal state
        state, _ = runner.train_epoch(state, 1)
        jax.block_until_ready(state)
        return runner.phase.train.num_targets

    epoch()
    return epoch


def print_table(seconds):
    """Print targets a second and each variant's time relative to KDSR's."""
    device = jax.devices()[0]
    title = f"{len(jax.devices())} x {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}"
    table = rich.table.Table("variant", "targets/s", "time relative to KDSR", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{1 / value:,.0f}", f"{value / seconds['KDSR']:.2f}")
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
