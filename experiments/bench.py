"""Speed, memory and start-up of every model, as medians over turns taken in one run: make bench.

    python -m experiments.bench                                                       # planted, all models; then the docs
    python -m experiments.bench --datasets=beauty --config.data.root=PATH --models=sasrec,kdsr-sasrm
    python -m experiments.bench --models=kdsr-sasrm,kdsr-sasrm+distill.pair_budget=0  # two settings
    python -m experiments.bench --models=sasrec --against=HEAD~3                      # two versions

Every model is a process of its own, with everything compiled before the first turn; all take turns, some steps of each bucket and one
evaluation, and so does a process that measures the machine's peaks. The medians stand in benchmarks/latest.json, from
which ``experiments.performance`` draws the tables of docs/performance.md; what --models or --against ask for is printed only
(--out=FILE keeps it). Other data sets' numbers stay as they are. Machines differ and are shared: read the ratios.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from experiments import floor, performance
from experiments.processes import SCRIPT, contestant, medians, read_entry, take_turns
from experiments.records import current_commit, write_json
from experiments.study import DATASETS
from kdsr_jax.config import BACKBONES
from kdsr_jax.errors import UserError, answer
from kdsr_jax.report.files import read_json

TREE = SCRIPT.parent.parent
KDSR = "kdsr-sasrm"
MODELS = (*BACKBONES, "tuned-sasrm", KDSR, f"{KDSR}+distill.pair_budget=0", f"{KDSR}+train.steps_per_call=1")
REACH_MODELS = ("sasrec", KDSR)
REACH = {"planted": 6.0, "beauty": 3.5}  # validation mrr@20 in percent, of which the time to it is measured
REACH_EPOCHS = 40
HELP_RUNS = 5
OFF = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # programs of an earlier run would make compilation look free


def main(words=None):
    """Measure, print and write; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--datasets", default="planted", help=f"of {', '.join(DATASETS)}, separated by commas")
    parser.add_argument("--models", default="", help="VARIANT or VARIANT+FIELD=VALUE..., separated by commas")
    parser.add_argument("--steps", type=int, default=16, help="of a turn in each bucket, at least")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--against", default="", help="commit whose models take turns with those of this tree")
    parser.add_argument("--no-startup", action="store_true", help="leave the start-up as it was")
    parser.add_argument("--no-reach", action="store_true", help="do not measure the time to a quality")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; of all models benchmarks/latest.json and the docs")
    arguments, settings = parser.parse_known_args(words)
    return answer(lambda: bench(arguments, settings))


def bench(arguments, settings):
    """Do what the command line asks for.

    Raises:
      UserError: an unknown data set or commit, or a process that could not do its work.
    """
    if unknown := [name for name in arguments.datasets.split(",") if name not in DATASETS]:
        raise UserError(f"--datasets: there is no {unknown[0]!r}; there are {', '.join(DATASETS)}")
    if min(arguments.steps, arguments.rounds) < 1:
        raise UserError("--steps and --rounds must be 1 or more")
    out = arguments.out or (None if arguments.against or arguments.models else performance.LATEST)
    saved = (read_json(out) if out else None) or {"datasets": {}}
    for dataset in arguments.datasets.split(","):
        with version(arguments.against) as tree:
            found = measure(dataset, arguments, settings, tree)
        print(performance.report(found))
        saved["datasets"][dataset] = found
        if out:
            write_json(out, saved)
    if out and not (arguments.no_startup or arguments.against):
        saved["startup"] = startup() | {"hardware": found["hardware"]}
        write_json(out, saved)
    if out and out.resolve() == performance.LATEST:
        performance.main()


@contextlib.contextmanager
def version(name):
    """Check a commit out into a temporary worktree and give its folder; None for no name."""
    if not name:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        _git("worktree", "add", "--quiet", "--detach", folder, name)
        try:
            yield folder
        finally:
            _git("worktree", "remove", "--force", folder)


def _git(*words):
    done = subprocess.run(["git", *words], cwd=TREE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {words[0]}: {done.stderr.strip() or 'failed'}")


def measure(dataset, arguments, settings, other=None):
    """Let all models of one data set take turns.

    Args:
      dataset: name of a file of configs/.
      arguments: what the flags say.
      settings: --config.FIELD=VALUE of all models.
      other: folder of another version, whose models take turns as well.

    Returns:
      dict of "hardware", "machine" (its peaks, the best of all rounds), "load" (mean number of runnable processes at the start and at
      the end), "commit", "models" (dict by name) and "reach" (likewise).
    """
    names = arguments.models.split(",") if arguments.models else MODELS
    entries = {name: (name, None) for name in names}
    if other:
        entries |= {f"{name}@{arguments.against}": (name, other) for name in names}
    load, ours = [os.getloadavg()[0]], current_commit()  # which may be another one in the end
    with contextlib.ExitStack() as stack:

        def start(name, tree=None):
            worker = contestant(name, tree, **OFF)
            stack.callback(worker.close)
            return worker

        workers, work = {"machine": start("machine")}, {}
        hardware = workers["machine"].ask("machine")
        for name, (entry, tree) in entries.items():
            workers[name] = start(name, tree)
            variant, words = read_entry(entry, settings)
            work[name] = workers[name].ask(
                "start", config=f"configs/{dataset}.py:{variant}", settings=words, phase="select"
            )
            print(f"{dataset}, {name}: compiled in {work[name]['compilation']:.1f} s", file=sys.stderr)
        turns = take_turns(workers, arguments.rounds, {name: {"steps": arguments.steps} for name in entries})
        peaks = turns.pop("machine")
        machine = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        models = {name: row(work[name], turns[name], workers[name].ask("memory"), machine) for name in entries}
        reached = {}
        target = 0 if arguments.no_reach or other else REACH.get(dataset, 0)
        for name in [name for name in REACH_MODELS if target and name in workers]:
            reached[name] = {"target": target, **workers[name].ask("reach", target=target, epochs=REACH_EPOCHS)}
    load.append(os.getloadavg()[0])
    found = {"hardware": hardware, "machine": machine, "load": statistics.fmean(load), "commit": ours}
    counts = {"steps of a turn": arguments.steps, "rounds": arguments.rounds}
    return found | counts | {"against": arguments.against, "models": models, "reach": reached}


def row(work, turns, memory, machine):
    """Return what is kept of one model: its work, the medians of its turns and what follows from them."""
    middle = medians(turns)
    counted = floor.count(work)
    least = floor.seconds(counted, machine) * work["steps"]
    times = middle | {"rounds": [{name: turn[name] for name in ("epoch", "ranking")} for turn in turns]}
    rates = {"targets/s": work["targets"] / middle["epoch"], "rankings/s": 1 / middle["ranking"]}
    return work | {"seconds": times, "memory": memory, "floor": counted, "fraction": least / middle["epoch"]} | rates


def startup():
    """Time ``--help`` and the first steps of the planted run, with nothing cached before ("cold") and again ("warm").

    Returns:
      dict of "help", the median of some runs, "cold" and "warm", all in seconds from the start of the process to its end;
      the latter two end with the first chunk of steps.
    """
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    command = [sys.executable, "-P", "-m", "kdsr_jax.main", "--help"]
    load, seconds = os.getloadavg()[0], {}
    seconds["help"] = statistics.median(_run(command, environment) for _ in range(HELP_RUNS))
    with tempfile.TemporaryDirectory() as folder:
        caches = {"KDSR_CACHE": f"{folder}/kdsr", "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax"}
        for name in ("cold", "warm"):
            words = [f"--config={TREE / 'configs' / 'planted.py'}", f"--workdir={folder}/{name}"]
            seconds[name] = _run([sys.executable, "-P", str(SCRIPT), *words], environment | caches)
    return seconds | {"load": load}


def _run(command, environment):
    started = time.perf_counter()
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[2:])}: ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
