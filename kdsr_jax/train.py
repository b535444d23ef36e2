"""From a config to a finished run: data, teacher, student, the phases of the protocol, and the result.

Protocols (``eval.protocol``):
  validation  phase *select* holds out the last item of each user's train part, stops early on its mrr and fixes the best
              epoch e*; phase *refit* trains from scratch on the whole train part for e* epochs and tests once.
  paper       phase *refit* alone: tests every ``eval.every`` epochs and reports each metric's best epoch on test, as the
              paper and its code do. It is labelled so everywhere.
  both        select, then one refit that serves both.
"""

import dataclasses
import importlib.metadata
from typing import Any

import jax
import numpy as np

from kdsr_jax import reporting
from kdsr_jax.data import Dataset, load_dataset
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.data.sequences import evaluation_windows, train_windows
from kdsr_jax.errors import UserError
from kdsr_jax.mesh import Placement
from kdsr_jax.models.student import Student, count_parameters, init_student
from kdsr_jax.phase import Phase, PhaseRunner
from kdsr_jax.teacher import cache_folder, fit_teachers
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
      tables: dict modality -> [N + 1, width] initial rows of the modality tables.
      teacher_report: dict modality -> numbers about its teacher.
      placement: Placement.
    """

    config: Any
    dataset: Dataset
    student: Student
    teachers: dict
    tables: dict
    teacher_report: dict
    placement: Placement


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
    with Workdir(workdir, config) as folder:
        result = folder.read_json("result.json")
        if result is None:
            result = _train(prepare(config), folder)
            folder.write_json("result.json", result)
        else:
            reporting.say("this run is finished; its result:")
        reporting.print_result(result, workdir)
        return result


def evaluate_workdir(config, workdir):
    """Test the checkpoint that a finished run chose once more and print its metrics.

    Under the paper's protocol, which chooses an epoch per metric, it is the epoch with the best mrr at the largest cut-off.

    Returns:
      dict of metrics in percent.

    Raises:
      UserError: the run is not finished, belongs to another config, or has lost the checkpoint.
    """
    with Workdir(workdir, config, create=False) as folder:
        result = folder.read_json("result.json")
        if result is None:
            raise UserError(f"--workdir={workdir}: the run is not finished; train it to the end first")
        run = prepare(config)
        runner = PhaseRunner(run, refit_phase(run, result["best_epoch"]), folder)
        metrics, _ = runner.evaluate(runner.load_best())
        epoch, metric = result["best_epoch"], _select_metric(config)
        chosen = f"epoch {epoch}" if epoch else f"paper's protocol (epoch of the best {metric} on test)"
        reporting.print_metrics({f"test, {chosen}": metrics}, f"metrics in percent, seed {config.seed}")
        return metrics


def prepare(config, dataset=None):
    """Load the data (unless a Dataset is given), fit or fetch the teacher and lay out the student; returns a Run."""
    dataset, placement = dataset or load_dataset(config.data), Placement()
    width = config.teacher.condensed_dim or config.model.dim
    features = {} if config.model.tables == "none" else dataset.features
    teachers, report = fit_teachers(features, config.teacher, width, cache_folder())
    scale = config.model.table_scale
    tables = {name: placement.put(teacher.condensed * scale) for name, teacher in teachers.items()}
    student = make_student(config, dataset.interactions.num_items, tuple(features), width)
    distilled = placement.put(teachers) if config.distill.enabled else {}
    return Run(config, dataset, student, distilled, tables, report, placement)


def make_student(config, num_items, modalities, width):
    """Lay a Student out from the config's model group; nothing is allocated."""
    model = config.model
    return Student(
        num_items=num_items,
        modalities=modalities,
        backbone=model.name,
        tuned=model.tables == "tuned",
        dim=model.dim,
        table_width=width,
        max_length=config.data.max_length,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        fusion=model.fusion,
        readout=model.readout,
        short_term=model.short_term,
        item_scores=model.item_scores,
        num_codes=config.teacher.num_codes if config.distill.enabled else 0,
    )


def select_phase(run):
    """Return the phase that chooses the number of epochs on the last item of each user's train part."""
    config, interactions = run.config, run.dataset.interactions
    lengths = train_lengths(interactions.lengths)
    metric = _select_metric(config)
    first = np.maximum(lengths - 1, 1)  # a train part of one item has nothing to predict from

    def scores(evaluations):
        return [e["metrics"][metric] for e in evaluations]

    def finished(evaluations):
        return bool(evaluations) and len(evaluations) - 1 - int(np.argmax(scores(evaluations))) >= config.train.patience

    return Phase(
        name="select",
        train=train_windows(interactions.offsets, lengths - 1, config.data.max_length, config.data.window_stride),
        evaluation=evaluation_windows(interactions.offsets, first, lengths, config.data.max_length),
        epochs=config.train.epochs,
        evaluates=lambda epoch: epoch % config.eval.every == 0 or epoch == config.train.epochs,
        finished=finished,
        score=lambda evaluations: scores(evaluations)[-1],
    )


def refit_phase(run, best_epoch):
    """Return the phase that trains on the whole train part and tests.

    Args:
      run: Run.
      best_epoch: e* of the select phase, or None under the paper's protocol.
    """
    config, interactions = run.config, run.dataset.interactions
    lengths, metric = train_lengths(interactions.lengths), _select_metric(config)
    periodic = config.eval.protocol != "validation"

    def evaluates(epoch):
        return epoch == best_epoch or periodic and (epoch % config.eval.every == 0 or epoch == config.train.epochs)

    def finished(evaluations):
        chosen_done = best_epoch is None or any(e["epoch"] == best_epoch for e in evaluations)
        return periodic and chosen_done and _no_new_best(evaluations) >= config.train.patience

    def score(evaluations):
        newest = evaluations[-1]
        return newest["metrics"][metric] if best_epoch is None else float(newest["epoch"] == best_epoch)

    return Phase(
        name="refit",
        train=train_windows(interactions.offsets, lengths, config.data.max_length, config.data.window_stride),
        evaluation=evaluation_windows(interactions.offsets, lengths, interactions.lengths, config.data.max_length),
        epochs=config.train.epochs if periodic else best_epoch,
        evaluates=evaluates,
        finished=finished,
        score=score,
    )


def _select_metric(config):
    return f"mrr@{config.eval.topk[-1]}"


def _no_new_best(evaluations):
    """Count the newest evaluations in a row without a new best in any metric."""
    best, idle = {}, 0
    for evaluation in evaluations:
        better = {k: v for k, v in _ranking(evaluation["metrics"]).items() if v > best.get(k, -1.0)}
        best |= better
        idle = 0 if better else idle + 1
    return idle


def _ranking(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("coverage")}


def _train(run, folder):
    """Carry out the phases and return the content of result.json."""
    ids = run.dataset.interactions
    folder.write_arrays("ids.npz", user_ids=ids.user_ids, item_ids=ids.item_ids)
    _announce(run)
    protocol = run.config.eval.protocol
    selection = folder.read_json("selection.json")
    if protocol != "paper" and selection is None:
        selection = _summarise_select(run, PhaseRunner(run, select_phase(run), folder).execute())
        folder.write_json("selection.json", selection)  # e* is on disk before any test item is looked at
        reporting.say(
            f"select: epoch {selection['best_epoch']} is best on validation; refit starts anew on the whole train part"
        )
    selection = selection or {"best_epoch": None, "validation": None, "train_seconds": 0.0, "eval_seconds": 0.0}
    refit = PhaseRunner(run, refit_phase(run, selection["best_epoch"]), folder).execute()
    return _result(run, selection, refit, folder)


def _summarise_select(run, record):
    metric = _select_metric(run.config)
    best = max(record["evaluations"], key=lambda e: e["metrics"][metric])
    seconds = {name: record[name] for name in ("train_seconds", "eval_seconds")}
    return {"best_epoch": best["epoch"], "epochs": record["epoch"], "validation": best["metrics"], **seconds}


def _result(run, selection, refit, folder):
    config, evaluations = run.config, refit["evaluations"]
    chosen = [e["metrics"] for e in evaluations if e["epoch"] == selection["best_epoch"]]
    paper = {}
    if config.eval.protocol != "validation":
        names = _ranking(evaluations[0]["metrics"])
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
        "parameters": _parameters(run),
        "teacher": run.teacher_report,
        "config_fingerprint": folder.fingerprint,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "seed": config.seed,
    }


def _parameters(run):
    shapes = jax.eval_shape(lambda key: init_student(run.student, key, run.tables)[0], jax.random.key(0))
    return count_parameters(shapes)


def _announce(run):
    data, config = run.dataset.interactions, run.config
    tables = f", {config.model.tables} tables of {', '.join(run.student.modalities)}" if run.student.modalities else ""
    distilled = ", distillation" if run.teachers else ""
    reporting.say(
        f"{run.dataset.name}: {data.num_users:,} users, {data.num_items:,} items, {len(data.items):,} interactions; "
        f"{config.model.name}{tables}{distilled}, {_parameters(run):,} parameters; protocol {config.eval.protocol}"
    )
    if run.student.tuned and run.student.modalities:
        ramp = f"ramped over {config.train.ramp_epochs} epochs" if config.train.ramp_epochs else "constant"
        tables = ", ".join(f"{name}_embedding/embedding" for name in run.student.modalities)
        reporting.say(f"learning rate {config.train.learning_rate:g}; of {tables} {ramp}")
    for name, report in run.teacher_report.items():
        reporting.say(
            f"teacher of {name}: {100 * report['reconstruction_error']:.1f} % of the variance lost in condensing, "
            f"{report['used_codes']} codes in use, perplexity {report['perplexity']:.1f}"
        )
    reporting.say("compiling; the first epoch of each phase includes it")
