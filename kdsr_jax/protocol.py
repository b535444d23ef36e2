"""The phases of the protocols: what each trains on and evaluates, when it stops, and which epoch is its best.

Protocols (``eval.protocol``):
  validation  phase *select* holds out the last item of each user's train part, stops early on its mrr and fixes the best
              epoch e*; phase *refit* trains from scratch on the whole train part for e* epochs and tests once.
  paper       phase *refit* alone: tests every ``eval.every`` epochs and reports each metric's best epoch on test, as the
              paper and its code do. It is labelled so everywhere.
  both        select, then one refit that serves both.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.data.sequences import Windows, evaluation_windows, train_windows
from kdsr_jax.errors import UserError
from kdsr_jax.labels import PAPER, SELECT_METRIC


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a phase trains and evaluates on, and when it stops.

    Attributes:
      name: "select" or "refit".
      label: what its metrics are: "validation", "test", labels.PAPER or both of the latter; said wherever they stand.
      train: Windows of the training targets.
      evaluation: Windows of the evaluated targets.
      epochs: at most so many.
      evaluates: epoch -> whether it is evaluated after that epoch.
      finished: list of evaluations so far ({"epoch", "metrics"}) -> whether to stop early.
      score: an evaluation -> its checkpoint's score; the best checkpoint is kept, and its ranks.
    """

    name: str
    label: str
    train: Windows
    evaluation: Windows
    epochs: int
    evaluates: Callable[[int], bool]
    finished: Callable[[list], bool]
    score: Callable[[dict], float]


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
        **_windows(run, lengths - 1, lengths),
        epochs=config.train.epochs,
        evaluates=lambda epoch: _is_due(config, epoch),
        finished=finished,
        score=lambda newest: newest["metrics"][SELECT_METRIC],
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

    def finished(evaluations):
        chosen_done = best_epoch is None or any(e["epoch"] == best_epoch for e in evaluations)
        return periodic and chosen_done and _no_new_best(evaluations) >= config.train.patience

    def score(newest):
        return newest["metrics"][SELECT_METRIC] if best_epoch is None else float(newest["epoch"] == best_epoch)

    return Phase(
        name="refit",
        label={"validation": "test", "paper": PAPER, "both": f"test, and {PAPER}"}[config.eval.protocol],
        **_windows(run, lengths, interactions.lengths),
        epochs=config.train.epochs if periodic else best_epoch,
        evaluates=lambda epoch: epoch == best_epoch or periodic and _is_due(config, epoch),
        finished=finished,
        score=score,
    )


def _is_due(config, epoch):
    """Say whether an epoch is evaluated: every so many and the last, but none of a warm-up, which would use up patience."""
    return epoch > config.model.warmup_epochs and (epoch % config.eval.every == 0 or epoch == config.train.epochs)


def _windows(run, trained, end):
    """Return the windows of a phase that trains on the first ``trained`` items a user and evaluates those up to ``end``."""
    data, offsets = run.config.data, run.dataset.interactions.offsets
    prefixes = run.student.trained_on == "prefixes"
    alone = prefixes or run.config.train.prefixes
    return {
        "train": train_windows(offsets, trained, data.max_length, data.window_stride, alone),
        "evaluation": evaluation_windows(offsets, trained, end, data.max_length, prefixes),
    }


def _no_new_best(evaluations):
    """Count the newest evaluations in a row without a new best in any metric."""
    best, idle = {}, 0
    for evaluation in evaluations:
        better = {k: v for k, v in ranking_metrics(evaluation["metrics"]).items() if v > best.get(k, -1.0)}
        best |= better
        idle = 0 if better else idle + 1
    return idle


def ranking_metrics(metrics):
    """Return those of an evaluation's metrics that say how high the targets stand, by name."""
    return {name: value for name, value in metrics.items() if not name.startswith("coverage")}
