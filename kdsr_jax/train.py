"""From a config to a finished run: data, teacher, student, the phases of the protocol, and the result.

Protocols (``eval.protocol``):
  validation  phase *select* holds out the last item of each user's train part, stops early on its mrr and fixes the best
              epoch e*; phase *refit* trains from scratch on the whole train part for e* epochs and tests once.
  paper       phase *refit* alone: tests every ``eval.every`` epochs and reports each metric's best epoch on test, as the
              paper and its code do. It is labelled so everywhere.
  both        select, then one refit that serves both.
"""

import dataclasses
import hashlib
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
from kdsr_jax.optim import BODY, TABLES, label_params, path_name, table_rules
from kdsr_jax.phase import SELECT_K, Phase, PhaseRunner
from kdsr_jax.teacher import cache_folder, fit_teachers
from kdsr_jax.workdir import Workdir

SELECT_METRIC = f"mrr@{SELECT_K}"
PAPER_LABEL = "paper's protocol (best epoch on test)"
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
            run = prepare(config)
            folder.claim_data(data_digest(run.dataset))
            result = _train(run, folder)
            folder.write_json("result.json", result)
        else:
            reporting.say("this run is finished; its result:")
        reporting.print_result(result, workdir)
        return result


def evaluate_workdir(config, workdir):
    """Test the checkpoint that a finished run chose once more and print its metrics.

    Under the paper's protocol, which chooses an epoch per metric, it is the epoch with the best mrr@20.

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
        folder.claim_data(data_digest(run.dataset))
        runner = PhaseRunner(run, refit_phase(run, result["best_epoch"]), folder)
        metrics, _ = runner.evaluate(runner.load_best())
        epoch = result["best_epoch"]
        chosen = f"epoch {epoch}" if epoch else f"paper's protocol (epoch of the best {SELECT_METRIC} on test)"
        reporting.print_metrics({f"test, {chosen}": metrics}, f"metrics in percent, seed {config.seed}")
        return metrics


def prepare(config, dataset=None):
    """Load the data (unless a Dataset is given), fit or fetch the teacher and lay out the student; returns a Run."""
    modalities = () if config.model.tables == "none" else config.data.modalities
    dataset, placement = dataset or load_dataset(config.data, modalities), Placement()
    width = config.teacher.condensed_dim or config.model.dim
    features = dataset.features if modalities else {}
    teachers, report = fit_teachers(features, config.teacher, width, cache_folder(), codes=config.distill.enabled)
    scale = config.model.table_scale
    tables = {name: placement.put(teacher.condensed * scale) for name, teacher in teachers.items()}
    student = make_student(config, dataset.interactions.num_items, tuple(features), width)
    distilled = placement.put(teachers) if config.distill.enabled else {}
    return Run(config, dataset, student, distilled, tables, report, placement)


def data_digest(dataset):
    """Return the sha256 of what training and evaluation read of a dataset: histories, raw ids and features."""
    data, digest = dataset.interactions, hashlib.sha256()
    for part in (data.items, data.offsets, "\n".join(data.user_ids), "\n".join(data.item_ids)):
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    for name, feature in dataset.features.items():
        digest.update(name.encode() + feature.values.tobytes() + feature.has_feature.tobytes())
    return digest.hexdigest()


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
    if lengths.max() < 3:
        raise UserError(
            "no user has the 3 train items that selecting an epoch needs (one is held out); raise --config.data.k_core "
            "or set --config.eval.protocol=paper"
        )

    def scores(evaluations):
        return [e["metrics"][SELECT_METRIC] for e in evaluations]

    def finished(evaluations):
        return bool(evaluations) and len(evaluations) - 1 - int(np.argmax(scores(evaluations))) >= config.train.patience

    return Phase(
        name="select",
        label="validation",
        train=train_windows(interactions.offsets, lengths - 1, config.data.max_length, config.data.window_stride),
        evaluation=evaluation_windows(interactions.offsets, lengths - 1, lengths, config.data.max_length),
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
    lengths = train_lengths(interactions.lengths)
    periodic = config.eval.protocol != "validation"

    def evaluates(epoch):
        return epoch == best_epoch or periodic and (epoch % config.eval.every == 0 or epoch == config.train.epochs)

    def finished(evaluations):
        chosen_done = best_epoch is None or any(e["epoch"] == best_epoch for e in evaluations)
        return periodic and chosen_done and _no_new_best(evaluations) >= config.train.patience

    def score(evaluations):
        newest = evaluations[-1]
        return newest["metrics"][SELECT_METRIC] if best_epoch is None else float(newest["epoch"] == best_epoch)

    return Phase(
        name="refit",
        label={"validation": "test", "paper": PAPER_LABEL, "both": f"test, and {PAPER_LABEL}"}[config.eval.protocol],
        train=train_windows(interactions.offsets, lengths, config.data.max_length, config.data.window_stride),
        evaluation=evaluation_windows(interactions.offsets, lengths, interactions.lengths, config.data.max_length),
        epochs=config.train.epochs if periodic else best_epoch,
        evaluates=evaluates,
        finished=finished,
        score=score,
    )


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
    best = max(record["evaluations"], key=lambda e: e["metrics"][SELECT_METRIC])
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
        "parameters": count_parameters(_abstract_params(run)),
        "teacher": run.teacher_report,
        "config_fingerprint": folder.fingerprint,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "seed": config.seed,
    }


def _abstract_params(run):
    return jax.eval_shape(lambda key: init_student(run.student, key, run.tables)[0], jax.random.key(0))


def _optimizer_groups(run):
    """Say which learning rate takes which parameters, as the rules sort them."""
    rules = table_rules(run.student.modalities if run.student.tuned else ())
    labels = jax.tree_util.tree_leaves_with_path(label_params(_abstract_params(run), rules))
    rate, epochs = run.config.train.learning_rate, run.config.train.ramp_epochs
    names = [path_name(path) for path, label in labels if label == TABLES]
    body = sum(label == BODY for _, label in labels)
    if names:
        ramp = f"{run.config.train.ramp_start * rate:g} rising over {epochs} epochs to " if epochs else ""
        yield f"learning rate {ramp}{rate:g}: {', '.join(names)}"
    yield f"learning rate {rate:g}: {body} other parameters"


def _announce(run):
    data, config = run.dataset.interactions, run.config
    tables = f", {config.model.tables} tables of {', '.join(run.student.modalities)}" if run.student.modalities else ""
    distilled = ", distillation" if run.teachers else ""
    reporting.say(
        f"{run.dataset.name}: {data.num_users:,} users, {data.num_items:,} items, {len(data.items):,} interactions; "
        f"{config.model.name}{tables}{distilled}, {count_parameters(_abstract_params(run)):,} parameters; protocol {config.eval.protocol}"
    )
    for line in _optimizer_groups(run):
        reporting.say(line)
    for name, report in run.teacher_report.items():
        reporting.say(
            f"teacher of {name}: {100 * report['reconstruction_error']:.1f} % of the variance lost in condensing"
            + (f", {report['used_codes']} codes in use, perplexity {report['perplexity']:.1f}" if run.teachers else "")
        )
    reporting.say("compiling; the first epoch of each phase includes it")
