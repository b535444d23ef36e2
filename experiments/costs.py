"""Where the time of a training step goes, by jax's profiler: a table of the step's parts, and its costliest operations.

    python -m experiments.costs --configs=configs/beauty.py:sasrec,configs/beauty.py:kdsr-sasrm --config.data.root=PATH

One chunk of training steps of the length that most steps have is traced after one that warms up. The time of an operation is how
long it runs, on however many cores, without those that it calls; the parts are shares of the sum of these times.
Parts are jax.named_scope's of the objective and the trainer, forwards and backwards together; what the compiler fuses across two
counts as the one that the result belongs to. Writes benchmarks/costs.json, prints two tables, and brings docs/performance.md up to date.
"""

import argparse
import collections
import gzip
import json
import os
import pathlib
import re
import sys
import tempfile
import time

import jax

from experiments import performance
from experiments.contestant import fullest_chunk, hardware
from experiments.peers import read_config
from experiments.records import write_json
from kdsr_jax import train
from kdsr_jax.errors import answer
from kdsr_jax.phase import PhaseRunner

PARTS = ("encoder", "next_item", "distillation", "clusters", "optimizer")
REST = "rest"  # cutting batches, log and the loop itself
_SCOPE = re.compile(rf"\b({'|'.join(PARTS)})\b")
_OPERATION = re.compile(r'^\s*(?:ROOT )?%([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
TOP = 3


def main(words=None):
    """Trace, print and write; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--configs", default="configs/planted.py", help="FILE or FILE:VARIANT, separated by commas")
    parser.add_argument(
        "--out", type=pathlib.Path, default=performance.COSTS, help="JSON file; of the default one the docs, too"
    )
    arguments, settings = parser.parse_known_args(words)
    return answer(lambda: report(arguments.configs.split(","), settings, arguments.out))


def report(locations, settings, out):
    """Trace a step of each config, print the tables and write them."""
    kept, load = jax.config.jax_enable_compilation_cache, os.getloadavg()[0]
    try:  # a program from the cache may bear the names of the version that compiled it
        jax.config.update("jax_enable_compilation_cache", False)
        rows = {location: trace(read_config(location, settings)) for location in locations}
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    found = {"hardware": hardware(), "load": load, "rows": rows}
    write_json(out, found)
    print(performance.costs_of_a_step(found))
    if out.resolve() == performance.COSTS:
        performance.main()


def trace(config):
    """Trace a chunk of training steps of a config's first phase.

    Returns:
      dict of "length" of the histories, "steps" traced, "ms" a step, "parts", ms by name that add up to that or, where
      operations run at once, to more, and "operations", [what, ms] of the costliest.
    """
    run = train.prepare(config)
    runner = PhaseRunner(run, train.select_phase(run), folder=None)
    length = max(runner.batches.buckets, key=lambda bucket: bucket.batches).length
    index, steps = fullest_chunk(runner.batches, length)
    state, _ = runner.train_chunk(runner.new_state(), index)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            jax.block_until_ready(runner.train_chunk(state, index))
            seconds = time.perf_counter() - started
        file = next(pathlib.Path(folder).glob("**/*.trace.json.gz"))
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    spent = {name: ms / steps for name, ms in own_times(events).items()}
    scopes = _scopes(spent)
    parts = dict.fromkeys((*PARTS, REST), 0.0)
    for name, ms in spent.items():
        parts[part_of(scopes.get(name, ""))] += ms
    costliest = sorted(spent, key=spent.get, reverse=True)[:TOP]
    operations = [[f"{name}, {part_of(scopes.get(name, ''))}", spent[name]] for name in costliest]
    return {"length": length, "steps": steps, "ms": 1e3 * seconds / steps, "parts": parts, "operations": operations}


def own_times(events):
    """Return the ms of each of a trace's operations, less those of the operations that it calls.

    Args:
      events: of Chrome's trace format; operations are those with an "hlo_op".

    Returns:
      dict name -> ms.
    """
    threads, own = collections.defaultdict(list), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            threads[event["pid"], event["tid"]].append(event)
    for found in threads.values():
        around = []  # ends and names of the operations that are under way
        for event in sorted(found, key=lambda event: (event["ts"], -event["dur"])):
            name, end = event["args"]["hlo_op"], event["ts"] + event["dur"]
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                own[around[-1][1]] -= event["dur"]
            own[name] += event["dur"]
            around.append((end, name))
    return {name: microseconds / 1e3 for name, microseconds in own.items()}


def part_of(scope):
    """Return the part of the step that an operation belongs to, by the scope it stands in, "" if unknown."""
    found = _SCOPE.search(scope)
    return found[1] if found else REST


def _scopes(names):
    """Return the scopes of the operations of the program that has most of some names."""
    programs = [
        dict(_OPERATION.findall(module.to_string()))
        for program in jax.devices()[0].client.live_executables()
        for module in program.hlo_modules()
    ]
    return max(programs, key=lambda operations: len(operations.keys() & names))


if __name__ == "__main__":
    sys.exit(main())
