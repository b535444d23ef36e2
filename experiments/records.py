"""A finished run as one line of runs.jsonl.

A row is an object with
  kind           "run"
  dataset, label, seed, variant, words    what was run (experiments/study.py)
  config         every field that can change a result, by dotted name
  reference      name of the folder of the run whose item table it is measured against, "" without
  data_sha256    of the data, None where the study trains nothing
  validation, test, paper    metrics in percent, by name; see docs/protocols.md; None where not run
  best_epoch, epochs, paper_epochs, train_seconds, eval_seconds, parameters, teacher    as in result.json
  measures       what the study measured besides, by name
  workdir        name of the run's folder, and of the file in RESULTS/ranks/<dataset>/
  device, cores, versions, commit    where and with what it ran
A comparison of two settings, user by user, is an object of kind "comparison"; see experiments/significance.py.
"""

import json
import os
import pathlib
import subprocess

from kdsr_jax.config import NOT_FINGERPRINTED, flatten, to_dict
from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.files import replace_file
from kdsr_jax.report.files import read_json

RESULT = ("validation", "test", "paper", "paper_epochs", "best_epoch", "epochs", "train_seconds", "eval_seconds") + (
    *("parameters", "teacher", "device", "versions"),
)


def train_together(jobs):
    """Train jobs that differ in their seeds alone side by side, or go on with them."""
    import jax

    from kdsr_jax import train

    for job in jobs:
        _note_commit(job)
    try:
        train.train_together([job.config for job in jobs], [job.workdir for job in jobs])
    finally:
        jax.clear_caches()  # the next run compiles its own programs


def make_row(study, job, again=False):
    """Do a job, or go on with it, and return its row; again says that what is no training is not taken from its folder."""
    note = _note_commit(job)
    result = None if again and not study.trains else read_json(job.workdir / "result.json")
    if result is None:
        result = study.work(job.config, job.workdir)
    if not study.trains:
        job.workdir.mkdir(exist_ok=True)
        write_json(job.workdir / "result.json", result)
    saved = read_json(job.workdir / "config.json") or {}
    row = {"kind": "run", "dataset": job.dataset, "seed": job.seed, "config": relevant(job.config)} | own_words(job)
    row |= {"reference": job.reference, "data_sha256": saved.get("data_sha256")} | {
        name: result.get(name) for name in RESULT
    }
    row["measures"] = {name: _measured(name, measure, job, again) for name, measure in study.measures.items()}
    row["measures"] |= measure_ranks(study, job.config, job.workdir / "ranks.npz")
    row["measures"] |= {} if study.trains else {study.name: result}
    return row | {"workdir": job.workdir.name, "cores": os.cpu_count(), "commit": read_json(note)}


def _note_commit(job):
    """Write down the commit that begins a job, beside its folder, which only takes what it knows; returns the file."""
    note = job.workdir.with_suffix(".commit.json")
    if not (note.exists() and job.workdir.exists()):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, current_commit())
    return note


def own_words(job):
    """Return what a study calls a job, which another study with the same run may call otherwise."""
    return {"label": job.label, "variant": job.setting.variant, "words": list(job.setting.words)}


def relevant(config):
    """Return the fields of a config that can change a result, by dotted name."""
    return {name: value for name, value in flatten(to_dict(config)).items() if name not in NOT_FINGERPRINTED}


def write_json(path, content):
    """Write a JSON file by rename."""
    replace_file(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def current_commit():
    """Return the commit that runs, with "+" behind it where files but results differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        status = [
            *git,
            "status",
            "--porcelain",
            "-uno",
            "--",
            ":/",
            ":/!experiments/results",
            ":/!benchmarks/*.json",
            ":/!docs",
        ]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def measure_ranks(study, config, file):
    """Return what a study's ``rank_measures`` say of a file of ranks, by name."""
    if not study.rank_measures:
        return {}
    ranks = read_arrays(file, ("user", "rank"))
    return {name: measure(config, ranks) for name, measure in study.rank_measures.items()}


def _measured(name, measure, job, again):
    """Return what a measure says of a finished run, kept in its folder; again says that it is not taken from there."""
    file = job.workdir / f"measure-{name}.json"
    found = None if again else read_json(file)
    if found is None:
        found = measure(job.config, job.workdir)
        write_json(file, found)
    return found
