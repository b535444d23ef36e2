"""Runs a study: named settings x datasets x seeds, one training run each, then its table, figure and statistics.

    python -m experiments.table2 --config.data.root=PATH --datasets=beauty --seeds=0,1,2
    python -m experiments.table2 --dry-run                  # what would run, and about how long it would take

Every run has a folder of its own below --folder, named by its config, so that studies share runs, and a study that was killed
goes on where it was when the same command is given again. Finished runs become lines of RESULTS/<study>/runs.jsonl, from which
table.md and figure.svg are drawn; what stands there already with the same config is not done again (--again goes to its folder once more: a finished run is
read again, one whose folder is gone is trained anew, and what is no training is done anew). --together trains the seeds of a setting side by side, for which a GPU often has room
(``kdsr_jax.together``). A run that fails is listed at the end and spoils no other. Several processes or machines share a study by --shard=1/4, 2/4, ...
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

from configs.default import get_config
from experiments import records, results
from kdsr_jax import cli
from kdsr_jax.config import entries_read, validate
from kdsr_jax.errors import UserError, answer

DATASETS = ("planted", "beauty", "clothing", "sports", "toys", "ml1m")  # those of configs/


def train(config, workdir):
    """Do a run in full; returns what result.json holds."""
    import jax

    from kdsr_jax.train import train_and_evaluate

    try:
        return train_and_evaluate(config, str(workdir))
    finally:
        jax.clear_caches()  # the next run compiles its own programs


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a study.

    Attributes:
      variant: what stands behind the colon of --config; "" is KDSR.
      words: FIELD=VALUE of the config. "{LABEL}" in a value stands for the folder of that setting's run with the same dataset
        and seed; that setting must come before.
      datasets: where it makes sense; None is everywhere.
    """

    variant: str = ""
    words: tuple = ()
    datasets: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes:
      name: of its module and of its folder of results.
      title: heading.
      settings: dict label -> Setting, in the order of the table.
      datasets: names of configs/, in the order of rank.
      words: FIELD=VALUE of every run.
      dataset_words: dict name -> FIELD=VALUE of every run on that dataset.
      reference: label of the setting that all others are compared with, user by user; "" compares nothing.
      groups: config -> dict name -> [T] bool, groups of the test targets, which are compared each by itself as well; or None.
      work: (config, workdir) -> dict of results; ``train`` unless the study measures something else, which then stands in
        its rows as one of the measures, by the study's name.
      measures: dict name -> (config, workdir) -> dict, what is measured besides on every finished run.
      rank_measures: likewise (config, ranks) -> dict, of what RESULTS/ranks keeps when the folder is gone: "user" and "rank" of every test
        target in order.
      table: rows -> markdown. Rows are the objects of runs.jsonl (experiments/records.py).
      figure: rows -> SVG element or "" where there is nothing to draw yet; None for a study without figure.
    """

    name: str
    title: str
    settings: Mapping[str, Setting]
    table: Callable
    datasets: tuple = ("beauty",)
    words: tuple = ()
    dataset_words: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    reference: str = ""
    groups: Callable | None = None
    work: Callable = train
    measures: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    rank_measures: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    figure: Callable | None = None

    @property
    def trains(self):
        """Whether its work is training."""
        return self.work is train


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a study: a setting on a dataset with a seed, its config and the folder it is done in."""

    dataset: str
    label: str
    seed: int
    setting: Setting
    config: object
    workdir: pathlib.Path

    @property
    def reference(self):
        """Name of the folder of the run whose item table this one is measured against, "" without."""
        return pathlib.Path(self.config.forgetting.reference_workdir).name

    def __str__(self):
        return f"{self.dataset}, {self.label}, seed {self.seed}"


def main(study, words=None):
    """Run a study's command line; returns 0, 1 where runs failed, or 2 after one line about what the user can put right."""
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{study.name}", description=study.title, allow_abbrev=False
    )
    parser.add_argument(
        "--datasets", default=",".join(study.datasets), help=f"of {', '.join(DATASETS)}; now %(default)s"
    )
    parser.add_argument("--seeds", default="0", help="numbers, separated by commas")
    parser.add_argument("--only", default="", help="labels of the table, separated by semicolons")
    parser.add_argument("--epochs", type=int, help="train.epochs of every run")
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n equal parts of the runs")
    parser.add_argument("--again", action="store_true", help="also go to the folders of what runs.jsonl holds")
    parser.add_argument("--together", action="store_true", help="train all seeds of a setting side by side")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--folder", default="runs/studies", help="of the runs")
    parser.add_argument("--results", default=str(results.FOLDER), help="folder of tables and figures")
    arguments, settings = parser.parse_known_args(words)
    if arguments.epochs is not None:
        settings = [f"--config.train.epochs={arguments.epochs}", *settings]
    do = _dry_run if arguments.dry_run else run
    return answer(lambda: do(study, plan(study, arguments, settings), arguments))


def plan(study, arguments, settings):
    """List the jobs of the datasets and seeds that the command line asks for, those on absent data left out with a word.

    Args:
      study: Study.
      arguments: what the flags say.
      settings: further words of the command line, --config.FIELD=VALUE.

    Returns:
      List of Job: for each dataset and seed the settings in their order.

    Raises:
      UserError: an unknown dataset, label, seed or field.
    """
    names, seeds = arguments.datasets.split(","), [_number("--seeds", seed) for seed in arguments.seeds.split(",")]
    for flag, given, known in (("--datasets", names, DATASETS), ("--only", _only(arguments), study.settings)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"{flag}: there is no {unknown[0]!r}; there are {', '.join(known)}")
    jobs, said = [], set()
    for name in names:
        for seed in seeds:
            places = {}
            for label, setting in study.settings.items():
                if setting.datasets is not None and name not in setting.datasets:
                    continue
                job = make_job(study, name, label, seed, settings, pathlib.Path(arguments.folder), places)
                places[label] = job.workdir
                lacking = _lacking(job.config)
                if lacking and lacking not in said:
                    print(f"{name}: left out, {lacking}")
                    said.add(lacking)
                if not lacking:
                    _check(job.config)
                    jobs.append(job)
    return jobs


def make_job(study, dataset, label, seed, settings, folder, places):
    """Return the Job of one run, not checked yet; ``places`` are the folders of the settings before it, by label."""
    setting = study.settings[label]
    own = (word.format_map(places) for word in setting.words)
    words = [f"--config.{word}" for word in (*study.words, *study.dataset_words.get(dataset, ()), *own)]
    config = cli.load_config(f"{_config_file(dataset)}:{setting.variant}".removesuffix(":"))
    cli.apply_settings(config, [*words, f"--config.seed={seed}", *settings])
    # Fields at their defaults are left out, so that a new field of the config leaves the names of older runs as they are.
    default = records.relevant(get_config())
    changed = {name: value for name, value in records.relevant(config).items() if default[name] != value}
    key = json.dumps([changed, study.work.__name__, str(config.forgetting.reference_workdir)], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    workdir = folder / dataset / f"{setting.variant or 'kdsr'}-{digest}-seed{seed}"
    return Job(dataset, label, seed, setting, config, workdir)


def run(study, jobs, arguments):
    """Do the jobs that are asked for and not done yet, then draw table, figure and index; returns 0, or 1 if any failed."""
    store = results.Store(arguments.results, study)
    todo, done = _todo(store, jobs, arguments)
    if done:
        print(f"{done} of {len(todo) + done} runs stand in {store.file} already")
    failed, started = {}, time.monotonic()
    expected = [store.expected_seconds(job) for job in todo]
    if arguments.together:
        _train_together(study, store, todo, arguments)
    for number, job in enumerate(todo):
        left = _left(time.monotonic() - started, expected[:number], expected[number:])
        print(f"[{number + 1}/{len(todo)}] {study.name}: {job}, in {job.workdir}{left}", flush=True)
        try:
            known = None if arguments.again else store.found_elsewhere(job)
            store.add(job, store.as_own(known, job) if known else records.make_row(study, job, arguments.again))
        except Exception as error:  # noqa: BLE001 - told at the end, and the other runs go on
            failed[str(job)] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"failed: {failed[str(job)]}", flush=True)
    store.compare(jobs)
    store.draw()
    print(f"table: {store.folder / 'table.md'}")
    for job, reason in failed.items():
        print(f"failed: {job}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _train_together(study, store, todo, arguments):
    """Train the jobs that differ in their seeds alone, so that the runs to come are finished; one that fails here fails there.

    Raises:
      UserError: the study does not train.
    """
    if not study.trains:
        raise UserError(f"--together: {study.name} trains nothing")
    groups = {}
    for job in todo:
        if arguments.again or not store.found_elsewhere(job):
            groups.setdefault((job.dataset, job.label), []).append(job)
    for jobs in groups.values():
        if len(jobs) == 1:
            continue
        print(f"together: {', '.join(map(str, jobs))}", flush=True)
        try:
            records.train_together(jobs)
        except Exception as error:  # noqa: BLE001 - each seed by itself is next
            print(f"not together: {type(error).__name__}: {error}".splitlines()[0], flush=True)


def _only(arguments):
    return [label.strip() for label in arguments.only.split(";") if label.strip()]


def _todo(store, jobs, arguments):
    """Return the jobs of --only and --shard that are not done yet, or all of them (--again), and how many are done."""
    part, parts = _shard(arguments.shard)
    asked = [job for job in jobs if not _only(arguments) or job.label in _only(arguments)][part - 1 :: parts]
    todo = [job for job in asked if arguments.again or not store.holds(job)]
    return todo, len(asked) - len(todo)


def _dry_run(study, jobs, arguments):
    store, total, unknown = results.Store(arguments.results, study), 0.0, 0
    for job in _todo(store, jobs, arguments)[0]:
        if not arguments.again and store.found_elsewhere(job):
            print(f"{job}: stands in another study")
            continue
        seconds = store.expected_seconds(job)
        total, unknown = total + (seconds or 0), unknown + (seconds is None)
        state = "half done, " if job.workdir.exists() else ""
        print(f"{job}: {state}{_time(seconds) if seconds else 'no idea how long'}, {job.workdir}")
    print(f"in all {_time(total)}" + (f" and {unknown} runs of unknown length" if unknown else ""))
    return 0


def _left(passed, done, open_):
    """Say how long the rest takes, by what the runs were expected to take and took; "" where that is not known."""
    if None in (*done, *open_):
        return ""
    pace = passed / sum(done) if done and sum(done) else 1.0
    return f"; about {_time(pace * sum(open_))} left"


def _time(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


def _config_file(dataset):
    return os.path.relpath(pathlib.Path(__file__).parent.parent / "configs" / f"{dataset}.py")


def _number(flag, text):
    if not text.strip().isdecimal():
        raise UserError(f"{flag}: {text!r} is not a whole number")
    return int(text)


def _shard(text):
    part, _, parts = text.partition("/")
    part, parts = _number("--shard", part), _number("--shard", parts)
    if not 1 <= part <= parts:
        raise UserError(f"--shard={text}: write i/n with i from 1 to n")
    return part, parts


def _check(config):
    """Raise UserError for a config that cannot be run, or whose run would lack what tables show."""
    validate(config)
    if not {5, 20} <= set(config.eval.topk):
        raise UserError("--config.eval.topk: studies show cut-offs 5 and 20; leave them in")


def _lacking(config):
    """Say what of a job's data is not there, or ""."""
    data = config.data
    place = pathlib.Path(data.root) / data.name
    if (data.source, data.name) == ("auto", "planted") or data.source == "planted" or data.manual_dir:
        return ""
    if not data.root or not place.is_dir():
        return f"there is no folder {place}; give --config.data.root=PATH"
    missing = [place / "features" / f"{entry}.npz" for entry in entries_read(config)]
    missing = [file for file in missing if not file.is_file()]
    return f"there is no {missing[0]}" if missing else ""
