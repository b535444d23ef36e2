"""One model with everything compiled, timed turn by turn; as a process of its own it answers experiments.bench.

Run as a script, of another version's package too (PYTHONPATH says which), it takes requests on standard input, JSON objects,
one a line, with the operation as "do"; each gets one line of JSON. So nothing of ``experiments`` is imported here.
"""

import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax import cli, train
from kdsr_jax.config import validate
from kdsr_jax.errors import UserError
from kdsr_jax.models.student import count_parameters
from kdsr_jax.phase import PhaseRunner

EVALUATED = 4000  # windows of the evaluation that are ranked, at most
ATTENTION = ("sasrec", "sasrm", "mmsrec", "nova", "difsr", "trans2d")  # backbones that compare all positions
MATMUL, COPY = 2048, 2**25  # side of the square matrices, and numbers of the array, that measure the machine


class Contestant:
    """One model with everything compiled.

    Attributes:
      run: Run.
      runner: PhaseRunner.
      compilation: seconds, tracing included; those of the first turn without those of the second.
    """

    def __init__(self, config, dataset=None, phase="refit"):
        self.run = train.prepare(config, dataset)
        self.phase = train.refit_phase(self.run, 1) if phase == "refit" else train.select_phase(self.run)
        sampled = dataclasses.replace(self.phase, evaluation=some(self.phase.evaluation))
        self.runner = PhaseRunner(self.run, sampled, folder=None)
        self.state = self.runner.new_state()
        self.buckets = {bucket.length: bucket for bucket in self.runner.batches.buckets}
        first, second = (_seconds(self.turn) for _ in range(2))
        self.compilation = first - second

    def turn(self, steps=1):
        """Time at least so many training steps of every bucket, in its fullest chunk, and one evaluation.

        Returns:
          dict of "step", seconds a step by the bucket's length; "epoch", seconds of an epoch of such steps; "ranking",
          seconds to rank one target among all items; "cpu", an epoch's seconds of all cores together.
        """
        step, cpu = {}, 0.0
        for length, bucket in self.buckets.items():
            index, full = fullest_chunk(self.runner.batches, length)
            chunks, began = -(-steps // full), time.process_time()
            step[length] = _seconds(self._train, index, chunks) / (chunks * full)
            cpu += bucket.batches * (time.process_time() - began) / (chunks * full)
        epoch = sum(bucket.batches * step[length] for length, bucket in self.buckets.items())
        ranking = _seconds(self._rank) / self.runner.evaluator.num_targets
        return {"step": step, "epoch": epoch, "cpu": cpu, "ranking": ranking}

    def reach(self, target, epochs):
        """Train from the first step on until the evaluation's mrr@20 reaches a percentage, or for so many epochs.

        Returns:
          dict of "train" and "evaluation", seconds of each epoch, and "mrr@20" after each; all compiled before.
        """
        runner = PhaseRunner(self.run, self.phase, folder=None)
        runner.train_epoch(runner.new_state(), 1)
        runner.evaluate(runner.new_state())
        state, curve = runner.new_state(), {"train": [], "evaluation": [], "mrr@20": []}
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(runner.train_epoch(state, epoch))
            trained = time.perf_counter()
            metrics, _ = runner.evaluate(state)
            curve["train"].append(trained - started)
            curve["evaluation"].append(time.perf_counter() - trained)
            curve["mrr@20"].append(metrics["mrr@20"])
            if metrics["mrr@20"] >= target:
                break
        return curve

    def work(self):
        """Say what an epoch consists of, as ``experiments.floor.count`` reads it, and what was compiled."""
        config, windows = self.run.config, self.phase.train
        lengths, student = windows.length.astype(np.int64), self.run.student
        return {
            "dataset": self.run.dataset.name,
            "tables": config.model.tables,
            "trained on": student.trained_on,
            "compilation": self.compilation,
            "steps": self.runner.batches.steps_per_epoch,
            "targets": windows.num_targets,
            "inputs": int(lengths.sum()),
            "squares": int((lengths**2).sum()),
            "items": student.num_items,
            "dim": student.dim,
            "parameters": count_parameters(self.state.params),
            "maps": encoder_maps(self.state.params),
            "attention": student.num_layers if student.backbone in ATTENTION else 0,
            "distilled": len(self.run.teachers),
            "table_width": student.table_width,
            "codes": student.num_codes,
            "pair_budget": config.distill.pair_budget,
            "buckets": [bucket._asdict() for bucket in self.buckets.values()],
        }

    def _train(self, index, chunks):
        for _ in range(chunks):
            self.state, _ = self.runner.train_chunk(self.state, index)
        jax.block_until_ready(self.state)

    def _rank(self):
        self.runner.evaluate(self.state)


def fullest_chunk(batches, length):
    """Return (number, steps) of the first epoch's chunk of a length with most steps that are no no-ops."""
    chunks = [(index, *batches.chunk(index)) for index in range(batches.chunks_per_epoch)]
    steps = {index: int((ids >= 0).any(1).sum()) for index, padded, ids in chunks if padded == length}
    return max(steps.items(), key=lambda item: item[1])


def encoder_maps(params):
    """Count the numbers of the matrices that every input goes through: all but tables and the heads of the losses."""
    others = ("_embedding", "_head", "_clusters")
    parts = [leaf for name, part in params.items() if not name.endswith(others) for leaf in _matrices(part)]
    return sum(parts)


def _matrices(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [leaf.size for path, leaf in leaves if leaf.ndim == 2 and not str(path[-1].key).endswith("embedding")]


def some(windows):
    """Return an even sample of windows."""
    step = -(-len(windows) // EVALUATED)
    parts = {field.name: getattr(windows, field.name)[::step] for field in dataclasses.fields(windows)}
    return dataclasses.replace(windows, **parts)


def _seconds(work, *arguments):
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def _best(function, array, repeats):
    """Return the seconds of the fastest call of a function that gives its argument back, the first one left out."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        array = jax.block_until_ready(function(array))
        times.append(time.perf_counter() - started)
    return min(times[1:])


class Machine:
    """What the machine does at best, of what training does much: products of matrices, and reading and writing arrays."""

    def __init__(self):
        # Results are written over the arguments: fresh pages would be slower than the memory.
        self._product = jax.jit(lambda x: x @ x / MATMUL, donate_argnums=0)
        self._scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)

    def turn(self, repeats=5):
        """Return "gflops" of float32 products and "gbytes" a second that are read and written, each the best of some."""
        matrix, array = jnp.ones((MATMUL, MATMUL), jnp.float32), jnp.ones(COPY, jnp.float32)
        work = {"gflops": (self._product, matrix, 2 * MATMUL**3), "gbytes": (self._scale, array, 8 * COPY)}
        return {
            name: amount / _best(function, array, repeats) / 1e9 for name, (function, array, amount) in work.items()
        }


def memory():
    """Return the MiB that the process held at most, that compiled programs ask for beside their arguments, and a device's."""
    client, temporary = jax.devices()[0].client, 0
    for program in client.live_executables():
        temporary = max(temporary, program.get_compiled_memory_stats().temp_size_in_bytes)
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    kilo = 1024 if sys.platform != "darwin" else 1
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20,
        "programs": temporary / 2**20,
        "device": on_device and on_device / 2**20,
    }


def hardware():
    """Say what everything here runs on, and with which versions."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in train.VERSIONS},
    }


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


class Server:
    """The operations of the process; each takes what a request holds and returns what its answer holds."""

    def machine(self):
        """Prepare to measure the machine instead of a model."""
        self.contestant = Machine()
        return hardware()

    def start(self, config, settings, phase):
        """Load, lay out and compile a model."""
        config = cli.load_config(config)
        cli.apply_settings(config, settings)
        validate(config)
        self.contestant = Contestant(config, phase=phase)
        gc.collect()
        return self.contestant.work()

    def turn(self, **arguments):
        """Take a turn."""
        return self.contestant.turn(**arguments)

    def reach(self, target, epochs):
        """Train to a given quality."""
        return self.contestant.reach(target, epochs)

    def memory(self):
        """Say how much memory was taken."""
        return memory()


def first_step(words):
    """Do a run as the command line does, up to the end of its first chunk of steps, and leave without a word."""
    from kdsr_jax import main

    train_chunk = PhaseRunner.train_chunk

    def leave(*arguments):
        jax.block_until_ready(train_chunk(*arguments))
        os._exit(0)

    PhaseRunner.train_chunk = leave
    main.run(words)


def serve(server):
    """Answer requests by a server's methods until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(server, request.pop("do"))(**request)
        except UserError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), file=answers, flush=True)


def main():
    """Answer requests; or take one first step, where words are given."""
    if sys.argv[1:]:
        return first_step(sys.argv[1:])
    serve(Server())


if __name__ == "__main__":
    main()
