"""From a config to a finished run: data, teacher, student, the phases of the protocol, and the result."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
from typing import Any

import jax

from kdsr_jax import processes, reporting, together
from kdsr_jax.announce import announce
from kdsr_jax.cache import cache_folder
from kdsr_jax.clusters import item_facts
from kdsr_jax.config import differing_keys, entries_read, flatten, to_dict
from kdsr_jax.data import Dataset, load_dataset
from kdsr_jax.data.digest import data_digests, feature_digests
from kdsr_jax.errors import UserError
from kdsr_jax.events import check_installed
from kdsr_jax.examples import make_examples, overview
from kdsr_jax.forgetting import make_forgetting
from kdsr_jax.labels import SELECT_METRIC
from kdsr_jax.layout import make_student, modality_names, table_width
from kdsr_jax.mesh import Placement
from kdsr_jax.models.student import Student, count_parameters, init_student
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.protocol import ranking_metrics, refit_phase, select_phase
from kdsr_jax.report.page import optional, refresh_report
from kdsr_jax.teacher import fit_teachers, keep_teachers, read_teachers
from kdsr_jax.workdir import Workdir

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Run:
    """What the phases share.

    Attributes:
      config: the whole config.
      dataset: Dataset.
      student: Student.
      teachers: dict modality -> Teacher on the devices; empty without distillation.
      tables: dict modality -> [N + 1, width] initial rows of the modality tables, as they rest (``Placement``).
      facts: dict modality -> Facts.
      teacher_report: dict modality -> numbers about its teacher.
      placement: Placement.
    """

    config: Any
    dataset: Dataset
    student: Student
    teachers: dict
    tables: dict
    facts: dict
    teacher_report: dict
    placement: Placement

    @functools.cached_property
    def abstract_params(self):
        """Shapes and types of the student's parameters; nothing is allocated."""

        def init(key, tables):
            tables = {name: self.placement.unpad(table, self.student.num_items + 1) for name, table in tables.items()}
            return init_student(self.student, key, tables, self.facts)[0]

        return jax.eval_shape(init, jax.random.key(0), self.tables)


def train_and_evaluate(config, workdir):
    """Train and test as the config says, going on from where an earlier process stopped, and print the result.

    Args:
      config: a validated config.
      workdir: folder of the run.

    Returns:
      The content of result.json.

    Raises:
      UserError: bad data, a foreign or busy workdir, settings that do not fit the data, or a loss that diverged.
    """
    _join(config)
    with Workdir(workdir, config) as folder:
        result = folder.read_json("result.json")
        if result is None:
            result = _train([config], [folder])[0]
        else:
            reporting.say("this run is finished; its result:")
            if not processes.first((folder.path / "examples.json").exists):
                with optional("examples.json"):
                    _write_examples(reopen(config, folder))
        if processes.is_first():
            refresh_report(folder)
        reporting.print_result(result, workdir)
        return result


def train_together(configs, workdirs):
    """Train and test runs that differ in their seeds alone, side by side (``kdsr_jax.together``), unless all are finished.

    Args:
      configs: validated configs that are equal but for ``seed``.
      workdirs: a folder for each.

    Raises:
      UserError: see ``train_and_evaluate``; or there are several devices.
      ValueError: the configs differ in more.
    """
    for config in configs:
        if [line for line in differing_keys(to_dict(configs[0]), to_dict(config)) if not line.startswith("seed: ")]:
            raise ValueError("runs that are trained together may differ in their seeds alone")
    _join(configs[0])
    with contextlib.ExitStack() as stack:
        pairs = zip(configs, workdirs, strict=True)
        folders = [stack.enter_context(Workdir(workdir, config)) for config, workdir in pairs]
        if any(folder.read_json("result.json") is None for folder in folders):
            _train(configs, folders)
            for folder in folders:
                refresh_report(folder)


def evaluate_workdir(config, workdir):
    """Test the checkpoint that a finished run chose once more and print its metrics.

    Under the paper's protocol, which chooses an epoch per metric, it is the epoch with the best mrr@20.

    Returns:
      dict of metrics in percent.

    Raises:
      UserError: the run is not finished, belongs to another config, or has lost the checkpoint.
    """
    _join(config)
    with Workdir(workdir, config, create=False) as folder:
        runner = reopen(config, folder)
        metrics, _ = runner.evaluate(runner.load_best())
        epoch = folder.read_json("result.json")["best_epoch"]
        chosen = f"epoch {epoch}" if epoch else f"paper's protocol (epoch of the best {SELECT_METRIC} on test)"
        reporting.print_metrics({f"test, {chosen}": metrics}, f"metrics in percent, seed {config.seed}")
        return metrics


def _join(config):
    """Join the other processes of the run, if there are any; their settings must be the same, places on a machine aside."""
    processes.start(config.mesh)
    own = ("data.root", "data.manual_dir", "mesh.process")
    fields = {name: value for name, value in flatten(to_dict(config)).items() if name not in own}
    processes.agree(json.dumps(fields), "settings that")


def load_data(config):
    """Return the Dataset of a config, with the features that its model reads."""
    return load_dataset(config.data, entries_read(config))


def prepare(config, dataset=None, folders=()):
    """Load the data (unless a Dataset is given), fit or fetch the teacher and lay out the student; returns a Run.

    The teacher is the one that the first of the folders, of runs, has, if any; then all of them keep it.
    """
    placement = Placement(config.mesh)
    dataset = dataset or processes.in_turn(lambda: load_data(config))
    teachers, facts, report = processes.in_turn(lambda: _fit(config, dataset, [folder.path for folder in folders]))
    teachers, facts = processes.as_first((teachers, facts))
    tabled, scale = bool(modality_names(config)[0]), config.model.table_scale
    tables = {n: placement.put_table(teacher.condensed * scale) for n, teacher in teachers.items()} if tabled else {}
    student = make_student(config, dataset.interactions.num_items)
    distilled = placement.put_tables(teachers) if config.distill.enabled else {}
    return Run(config, dataset, student, distilled, tables, placement.put(facts), report, placement)


def _fit(config, dataset, folders):
    """Return (teachers, facts, reports) of the modalities that the model reads."""
    tabled, clustered = modality_names(config)
    features = dataset.features if tabled or clustered else {}
    settings = config.teacher, table_width(config), cache_folder()
    own = read_teachers(folders[0]) if folders else None
    teachers, reports = fit_teachers(features, *settings, codes=config.distill.enabled, own=own)
    for folder in folders if config.distill.enabled else ():
        keep_teachers(folder, teachers, reports)
    return teachers, item_facts(teachers, bool(clustered), config.model, config.teacher.seed), reports


def _train(configs, folders):
    """Carry out the phases of runs that differ in their seeds alone; writes and returns the contents of result.json."""
    check_installed(configs[0].log)
    dataset = _claim(configs[0], folders)
    first = prepare(configs[0], dataset, folders)
    runs, ids = [dataclasses.replace(first, config=config) for config in configs], dataset.interactions
    for run, folder in zip(runs, folders, strict=True):
        folder.write_arrays("ids.npz", user_ids=ids.user_ids, item_ids=ids.item_ids)
        folder.write_json("overview.json", overview(run, count_parameters(run.abstract_params)))
    forgetting = [make_forgetting(first)] * len(runs)  # the same pairs for every seed
    announce(first)
    selections = [folder.read_json("selection.json") for folder in folders]
    undecided = [n for n, selection in enumerate(selections) if selection is None]
    if first.config.eval.protocol == "paper":
        selections = [{"best_epoch": None, "validation": None, "train_seconds": 0.0, "eval_seconds": 0.0}] * len(runs)
    elif undecided:
        runners = _runners([(runs[n], select_phase(runs[n]), folders[n], forgetting[n]) for n in undecided])
        for n, runner, record in zip(undecided, runners, _execute(runners, len(runs)), strict=True):
            selections[n] = _summarise_select(runs[n], record)
            folders[n].write_json("selection.json", selections[n])  # e* is on disk before any test item is looked at
            reporting.say(
                f"{runner.said_first}select: epoch {selections[n]['best_epoch']} is best on validation; "
                "refit starts anew on the whole train part"
            )
    phases = [refit_phase(run, selection["best_epoch"]) for run, selection in zip(runs, selections, strict=True)]
    runners, results = _runners(zip(runs, phases, folders, forgetting, strict=True)), []
    for runner, selection, refit in zip(runners, selections, _execute(runners, len(runs)), strict=True):
        with optional("examples.json"):
            _write_examples(runner)
        results.append(_result(runner.run, selection, refit, runner.folder))
    for folder, result in zip(folders, results, strict=True):
        folder.write_json("result.json", result)
    return results


def _runners(parts):
    """Return the PhaseRunner of each (run, phase, folder, forgetting), the later ones like the first."""
    runners = []
    for part in parts:
        runners.append(PhaseRunner(*part, like=runners[0] if runners else None))
    return runners


def _execute(runners, places):
    """Carry the phase out, of several seeds in a program with so many places."""
    return together.execute(runners, places) if places > 1 else [runners[0].execute()]


def reopen(config, folder):
    """Lay a finished run out again; its ``load_best`` gives the state of the chosen epoch.

    Args:
      config: of the run.
      folder: its Workdir.

    Returns:
      PhaseRunner of the refit.

    Raises:
      UserError: the run is not finished, or the data is not what it began with.
    """
    result = folder.read_json("result.json")
    if result is None:
        raise UserError(f"--workdir={folder.path}: the run is not finished; train it to the end first")
    run = prepare(config, _claim(config, [folder]), [folder])
    return PhaseRunner(run, refit_phase(run, result["best_epoch"]), folder)


def _claim(config, folders):
    """Load the data, tie the runs to them, which must be the same in all processes, and return the Dataset."""
    dataset = processes.in_turn(lambda: load_data(config))
    (digest, log), features = data_digests(dataset), feature_digests(dataset)
    processes.agree(digest, "data files that")
    for folder in folders:
        folder.claim_data(digest, log, features)
    return dataset


def _write_examples(runner):
    runner.folder.write_json("examples.json", make_examples(runner.run, runner.load_best()))


def _summarise_select(run, record):
    best = max(record["evaluations"], key=lambda e: e["metrics"][SELECT_METRIC])
    seconds = {name: record[name] for name in ("train_seconds", "eval_seconds")}
    return {"best_epoch": best["epoch"], "epochs": record["epoch"], "validation": best["metrics"], **seconds}


def _result(run, selection, refit, folder):
    config, evaluations = run.config, refit["evaluations"]
    chosen = [e["metrics"] for e in evaluations if e["epoch"] == selection["best_epoch"]]
    paper = {}
    if config.eval.protocol != "validation":
        names = ranking_metrics(evaluations[0]["metrics"])
        paper = {name: max(evaluations, key=lambda e: e["metrics"][name]) for name in names}
    return {
        "protocol": config.eval.protocol,
        "test": chosen[0] if chosen else None,
        "paper": {name: e["metrics"][name] for name, e in paper.items()} or None,
        "paper_epochs": {name: e["epoch"] for name, e in paper.items()} or None,
        "validation": selection["validation"],
        "best_epoch": selection["best_epoch"],
        "epochs": refit["epoch"],
        "train_seconds": selection["train_seconds"] + refit["train_seconds"],
        "eval_seconds": selection["eval_seconds"] + refit["eval_seconds"],
        "parameters": count_parameters(run.abstract_params),
        "teacher": run.teacher_report,
        "config_fingerprint": folder.fingerprint,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "seed": config.seed,
    }
