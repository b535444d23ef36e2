"""How large and how fast every model is: parameters, compilation, seconds an epoch, targets and rankings a second.

    python -m experiments.models --config=configs/beauty.py --config.data.root=PATH
    python -m experiments.models --config=configs/beauty.py --config.data.root=PATH sasrec kdsr-sasrec

Without names it measures every backbone as published. All models take turns on the same chunks of the same data, twice, and
the faster time of each counts. An epoch's seconds are those of a step in each bucket, times the bucket's steps: few steps have
to be run. Prints a table and writes experiments/results/models/DATASET.json. Machines differ and are shared: read the ratios.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import time

import jax
import numpy as np

from kdsr_jax import cli, train
from kdsr_jax.config import BACKBONES, validate
from kdsr_jax.errors import UserError
from kdsr_jax.models.student import count_parameters
from kdsr_jax.phase import PhaseRunner

RESULTS = pathlib.Path(__file__).parent / "results" / "models"
ROUNDS = 2
EVALUATED = 4000  # windows of the evaluation that are ranked, at most
COLUMNS = {
    "model": "{}",
    "tables": "{}",
    "trained on": "{}",
    "parameters": "{:,}",
    "compilation s": "{:.0f}",
    "s an epoch": "{:.1f}",
    "targets/s": "{:,.0f}",
    "rankings/s": "{:,.0f}",
}


def main(words=None):
    """Measure, print one table and write it; ``words`` are those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("variants", nargs="*", default=list(BACKBONES), help="what stands behind the colon of --config")
    parser.add_argument("--config", default="configs/beauty.py", help="config file; --config.FIELD=VALUE sets a field")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON file")
    arguments, settings = parser.parse_known_args(words)
    # Programs of an earlier run would make compilation look free.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        rows = measure_all(arguments.config, arguments.variants, settings)
    except UserError as error:
        parser.error(str(error))
    machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    out = pathlib.Path(arguments.out) / f"{rows[0]['dataset']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "jax": jax.__version__, "models": rows}, indent=1) + "\n")
    print(f"{rows[0]['dataset']}: {machine}, jax {jax.__version__}\n")
    print("\n".join(table(rows)))


def measure_all(file, variants, settings):
    """Let the variants of a config file take turns; returns a row a variant, a dict with the keys of COLUMNS and more."""
    configs = {name: read_config(f"{file}:{name}", settings) for name in variants}
    dataset = train.load_dataset(configs[variants[0]].data)
    contests = {name: Contestant(config, dataset) for name, config in configs.items()}
    for _ in range(ROUNDS):
        for contestant in contests.values():
            contestant.take_turn()
    return [{"model": name, "dataset": dataset.name} | contestant.row() for name, contestant in contests.items()]


def read_config(location, settings):
    """Return the validated config of FILE:VARIANT with further words of the command line."""
    config = cli.load_config(location)
    cli.apply_settings(config, settings)
    validate(config)
    return config


class Contestant:
    """One model with everything compiled, and its fastest times so far."""

    def __init__(self, config, dataset):
        self.run = train.prepare(config, dataset)
        phase = train.refit_phase(self.run, 1)
        self.targets = phase.train.num_targets
        self.runner = PhaseRunner(self.run, dataclasses.replace(phase, evaluation=some(phase.evaluation)), folder=None)
        self.state = self.runner.new_state()
        self.parameters = count_parameters(self.state.params)
        self.buckets = {bucket.length: bucket for bucket in self.runner.batches.buckets}
        self.step_seconds, self.ranking_seconds = dict.fromkeys(self.buckets, np.inf), np.inf
        started = time.perf_counter()
        self.take_turn()
        first = time.perf_counter() - started
        self.step_seconds, self.ranking_seconds = dict.fromkeys(self.buckets, np.inf), np.inf
        started = time.perf_counter()
        self.take_turn()
        self.compilation = first - (time.perf_counter() - started)

    def take_turn(self):
        """Time one chunk of every bucket, the fullest, and one evaluation."""
        for length in self.buckets:
            index, steps = self._fullest_chunk(length)
            started = time.perf_counter()
            self.state, _ = jax.block_until_ready(self.runner.train_chunk(self.state, index))
            seconds = (time.perf_counter() - started) / steps
            self.step_seconds[length] = min(self.step_seconds[length], seconds)
        started = time.perf_counter()
        _, ranks = self.runner.evaluate(self.state)
        self.ranking_seconds = min(self.ranking_seconds, (time.perf_counter() - started) / len(ranks))

    def _fullest_chunk(self, length):
        """Return the number and the steps of the first epoch's chunk with most steps that are no no-ops."""
        batches = self.runner.batches
        chunks = [(index, *batches.chunk(index)) for index in range(batches.chunks_per_epoch)]
        steps = {index: int((ids >= 0).any(1).sum()) for index, padded, ids in chunks if padded == length}
        return max(steps.items(), key=lambda item: item[1])

    def row(self):
        """Return what was measured."""
        epoch = sum(bucket.batches * self.step_seconds[length] for length, bucket in self.buckets.items())
        return {
            "tables": self.run.config.model.tables,
            "trained on": self.run.student.trained_on,
            "parameters": self.parameters,
            "compilation s": self.compilation,
            "s an epoch": epoch,
            "targets/s": self.targets / epoch,
            "rankings/s": 1 / self.ranking_seconds,
            "targets": self.targets,
            "buckets": [bucket._asdict() for bucket in self.buckets.values()],
            "s a step": list(self.step_seconds.values()),
        }


def some(windows):
    """Return an even sample of windows."""
    step = -(-len(windows) // EVALUATED)
    parts = {field.name: getattr(windows, field.name)[::step] for field in dataclasses.fields(windows)}
    return dataclasses.replace(windows, **parts)


def table(rows):
    """Return the lines of a markdown table."""
    lines = [list(COLUMNS), ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [[form.format(row[name]) for name, form in COLUMNS.items()] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
