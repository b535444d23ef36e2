"""What packing several histories into one row could save: padding and flops of the bucketed batches beside a perfect packing.

    python -m experiments.packing --config.data.root=PATH
    python -m experiments.packing --datasets=planted

A packed row holds max_length inputs of several histories; here every packed row is taken to be full, and neither segment ids
nor the mask between histories costs anything, so a real packing can only do worse. Flops are XLA's own count of a model's
gradient (encoder) and of a whole step without the optimizer (step), per target, over an epoch's batches; seconds are those of
the encoder's gradient, both forms in turn. Writes benchmarks/packing.json and prints a table.
"""

import argparse
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import DATASETS
from kdsr_jax import cli
from kdsr_jax.config import validate
from kdsr_jax.data import load_dataset
from kdsr_jax.data.batches import Batches
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.data.sequences import train_windows
from kdsr_jax.layout import make_student
from kdsr_jax.models.student import init_student
from kdsr_jax.ops import losses

OUT = pathlib.Path(__file__).parent.parent / "benchmarks" / "packing.json"
ROUNDS = 5
COLUMNS = {
    "dataset": "{}",
    "padding, buckets": "{:.1%}",
    "padding, packed": "{:.1%}",
    "encoder flops, packed / buckets": "{:.2f}",
    "step flops, packed / buckets": "{:.2f}",
    "encoder seconds, packed / buckets": "{:.2f}",
}


def main(words=None):
    """Measure, print one table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--datasets", default="beauty,sports,ml1m", help=f"of {', '.join(DATASETS)}")
    parser.add_argument("--variant", default="sasrec", help="what stands behind the colon of --config")
    parser.add_argument("--out", default=str(OUT), help="JSON file")
    arguments, settings = parser.parse_known_args(words)
    rows = [measure(f"configs/{name}.py:{arguments.variant}", settings) for name in arguments.datasets.split(",")]
    machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    content = {"machine": machine, "jax": jax.__version__, "variant": arguments.variant, "rows": rows}
    pathlib.Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    for row in rows:
        print("| " + " | ".join(form.format(row[name]) for name, form in COLUMNS.items()) + " |")


def measure(location, settings):
    """Compare both forms on one dataset; returns a dict with the keys of COLUMNS and what they come from."""
    config = cli.load_config(location)
    cli.apply_settings(config, settings)
    validate(config)
    dataset = load_dataset(config.data)
    offsets, lengths = dataset.interactions.offsets, train_lengths(dataset.interactions.lengths)
    windows = train_windows(offsets, lengths, config.data.max_length, config.data.window_stride)
    sizes = {"batch_size": config.train.batch_size, "steps_per_call": config.train.steps_per_call}
    buckets = Batches(windows, seed=0, **sizes).buckets
    inputs, batches = int(windows.length.sum()), sum(bucket.batches for bucket in buckets)
    # As many batches of as many targets, in full rows.
    full_rows = -(-inputs // (batches * config.data.max_length))
    shapes = {
        "buckets": [((bucket.rows, bucket.length), bucket.batches) for bucket in buckets],
        "packed": [((full_rows, config.data.max_length), batches)],
    }
    probe = Probe(make_student(config, dataset.interactions.num_items), config.train.batch_size)
    row = {"dataset": dataset.name, "inputs": inputs, "targets": windows.num_targets, "shapes": shapes}
    for form, kinds in shapes.items():
        read = sum(rows * length * times for (rows, length), times in kinds)
        row[f"padding, {form}"] = 1 - inputs / read
    for name, costs in probe.measure(shapes).items():
        row[name] = costs
        row[f"{name}, packed / buckets"] = costs["packed"] / costs["buckets"]
    return row


class Probe:
    """Gradients of a student's encoder, and of its loss with as many targets as a batch has at most."""

    def __init__(self, student, num_slots):
        self.student, self.num_slots = student, num_slots
        self.params, self.frozen = jax.jit(lambda: init_student(student, jax.random.key(0), {}))()
        self.gradients = {"encoder": jax.jit(jax.grad(self._encoder)), "step": jax.jit(jax.grad(self._step))}

    def _states(self, params, history):
        variables = {"params": params, "frozen": self.frozen}
        rngs = {"dropout": jax.random.key(1)}
        return self.student.apply(variables, history, False, method="encode", rngs=rngs)

    def _encoder(self, params, history):
        return self._states(params, history).sum()

    def _step(self, params, history):
        states = self._states(params, history)
        flat = jnp.resize(states.reshape(-1, states.shape[-1]), (self.num_slots, states.shape[-1]))
        vectors = self.student.apply({"params": params, "frozen": self.frozen}, method="candidate_vectors")
        targets = jnp.zeros(self.num_slots, jnp.int32)
        # One chunk: XLA counts the body of a loop once.
        return losses.next_item_loss(flat, vectors, targets, targets == 0, chunk_bytes=2**31)

    def measure(self, shapes):
        """Return dict "encoder flops", "step flops", "encoder seconds" -> form -> total of an epoch."""
        totals = {name: dict.fromkeys(shapes, 0.0) for name in ("encoder flops", "step flops", "encoder seconds")}
        runs = {}
        for form, kinds in shapes.items():
            for shape, times in kinds:
                history = jnp.ones(shape, jnp.int32)
                for name, gradient in self.gradients.items():
                    compiled = gradient.lower(self.params, history).compile()
                    totals[f"{name} flops"][form] += times * compiled.cost_analysis()["flops"]
                    if name == "encoder":
                        runs[form, times, shape] = (compiled, history, [])
        for _ in range(ROUNDS):
            for compiled, history, seconds in runs.values():
                started = time.perf_counter()
                jax.block_until_ready(compiled(self.params, history))
                seconds.append(time.perf_counter() - started)
        for (form, times, _), (_, _, seconds) in runs.items():
            totals["encoder seconds"][form] += times * float(np.median(seconds))
        return totals


if __name__ == "__main__":
    main()
