"""One phase of a protocol: train epoch after epoch, evaluate, checkpoint, and go on from where a killed process stopped."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np

from kdsr_jax import processes, reporting
from kdsr_jax.checkpoint import Checkpoints
from kdsr_jax.data.batches import Batches
from kdsr_jax.data.interactions import train_counts
from kdsr_jax.data.sequences import Windows, limit_targets
from kdsr_jax.errors import Diverged, UserError
from kdsr_jax.evaluate import Evaluator, summarise
from kdsr_jax.events import Events
from kdsr_jax.labels import SELECT_K
from kdsr_jax.objective import Objective
from kdsr_jax.ops.correlation import MOST_PAIRS
from kdsr_jax.optim import make_optimizer
from kdsr_jax.report.page import refresh_report
from kdsr_jax.resident import make_resident
from kdsr_jax.train_step import Trainer

# train.matmul_precision -> what jax calls it.
PRECISIONS = {"default": None, "float32": "float32", "tf32": "tensorfloat32", "bf16": "BF16_BF16_F32"}


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
      score: evaluations so far, the newest last -> the newest checkpoint's score; the best is kept, and its ranks.
    """

    name: str
    label: str
    train: Windows
    evaluation: Windows
    epochs: int
    evaluates: Callable[[int], bool]
    finished: Callable[[list], bool]
    score: Callable[[list], float]


class PhaseRunner:
    """Carries a phase out.

    Attributes:
      run: the Run it belongs to.
      phase: Phase.
      folder: Workdir.
      forgetting: Forgetting that is measured after every epoch, or None.
      batches: Batches of its training windows.
    """

    def __init__(self, run, phase, folder, forgetting=None):
        self.run, self.phase, self.folder, self.forgetting = run, phase, folder, forgetting
        config = run.config
        windows = limit_targets(phase.train, config.train.batch_size)
        sizes = {"batch_size": config.train.batch_size, "steps_per_call": config.train.steps_per_call}
        self.batches = Batches(windows, seed=config.seed, **sizes)
        if config.distill.enabled and config.distill.pair_budget:
            self._check_pairs()
        self._resident = run.placement.put(make_resident(run.dataset.interactions, windows))
        self._windows = windows
        tuned = run.student.modalities if run.student.tuned else ()
        optimizer, self._schedules = make_optimizer(config.train, tuned, self.batches.steps_per_epoch)
        scoring = config.teacher.score_fn, config.teacher.num_splits
        weights = config.model.cluster_weight, run.placement, config.train.sampled_items
        objective = Objective(run.student, config.distill, *scoring, *weights)
        of_trainer = config.train.batch_size, config.seed, run.placement, config.train.sparse_tables
        self._trainer = Trainer(objective, optimizer, *of_trainer)
        self._events = None

    def _check_pairs(self):
        """Raise where a batch may hold more pairs than can be drawn from."""
        for bucket in self.batches.buckets:
            pairs = bucket.rows * bucket.length * (bucket.length - 1) // 2
            if pairs > MOST_PAIRS:
                sizes = f"{bucket.rows:,} rows of {bucket.length:,} positions"
                raise UserError(
                    f"--config.train.batch_size: a batch has {sizes}, which are {pairs:,} pairs to draw from, more than "
                    f"{MOST_PAIRS:,}; lower it, or --config.data.max_length"
                )

    def execute(self):
        """Run the phase to its end.

        Returns:
          The record of the phase: dict with "epoch", "evaluations", "train_seconds", "eval_seconds".
        """
        checkpoints = Checkpoints(self.folder.checkpoints(self.phase.name))
        try:
            state, record = self._start(checkpoints)
            while record["epoch"] < self.phase.epochs and not self.phase.finished(record["evaluations"]):
                state, record = self._epoch(state, record)
                scored = record["evaluations"] and record["evaluations"][-1]["epoch"] == record["epoch"]
                score = self.phase.score(record["evaluations"]) if scored else -1.0
                checkpoints.save(record["epoch"], self._trainer.to_store(state), record, score)
                if processes.is_first():
                    refresh_report(self.folder)
            return record
        finally:
            if self._events:
                self._events.close()
            checkpoints.close()

    def load_best(self):
        """Return the state of the phase's best checkpoint.

        Raises:
          UserError: it is damaged or missing.
        """
        checkpoints = Checkpoints(self.folder.checkpoints(self.phase.name))
        try:
            return self._trainer.from_store(checkpoints.load_best(self._abstract_state()))
        finally:
            checkpoints.close()

    @functools.cached_property
    def evaluator(self):
        """The Evaluator of the phase's targets."""
        arguments = self.run.student, self.run.dataset.interactions, self.phase.evaluation, self.run.placement
        return Evaluator(*arguments, filter_seen=self.run.config.eval.filter_seen)

    def evaluate(self, state):
        """Rank all targets; returns (metrics in percent with coverage@20, ranks)."""
        ranks, coverage = self.evaluator.rank(state.params, state.frozen)
        topk = sorted({*self.run.config.eval.topk, SELECT_K})
        return summarise(ranks, topk) | {"coverage@20": 100 * coverage}, ranks

    def _start(self, checkpoints):
        restored = checkpoints.load_newest(self._abstract_state())
        self.folder.truncate_log(self.phase.name, restored[0] if restored else -1)  # a line of epoch 0 comes anew, too
        if self.run.config.log.tensorboard and processes.is_first():
            self._events = Events(self.folder.path, self.phase.name)
        if restored:
            epoch, state, record = restored
            reporting.say(f"{self.phase.name}: going on after epoch {epoch}")
            return self._trainer.from_store(state), record
        state = self.new_state()
        if self.forgetting:
            self._log({"phase": self.phase.name, "epoch": 0, "forgetting": self.forgetting.measure(state.params)})
        return state, {"epoch": 0, "evaluations": [], "train_seconds": 0.0, "eval_seconds": 0.0}

    def _log(self, line):
        """Write an object to metrics.jsonl and to what shows it."""
        self.folder.log(**line)
        if self._events:
            self._events.add(line)
        reporting.say(reporting.describe_epoch(line, self.phase.epochs))

    def _abstract_state(self):
        return self._trainer.stored_shapes(self.run.tables, self.run.facts)

    def _epoch(self, state, record):
        """Train one epoch and evaluate it if the phase says so; returns (state, new record)."""
        epoch = record["epoch"] + 1
        started = time.perf_counter()
        last = record["evaluations"][-1]["metrics"] if record["evaluations"] else {}
        state, losses = self.train_epoch(state, epoch, last)
        trained = time.perf_counter() - started
        line = {"phase": self.phase.name, "epoch": epoch, "step": int(state.step), "losses": losses}
        line["learning_rates"] = {name: float(rate(state.step)) for name, rate in self._schedules.items()}
        line["targets_per_second"] = self._windows.num_targets / trained
        line["gradient_norms"] = self._gradient_norms(state)
        if self.forgetting:
            line["forgetting"] = self.forgetting.measure(state.params)
        started = time.perf_counter()
        evaluations = record["evaluations"]
        if self.phase.evaluates(epoch):
            line["evaluated_on"] = self.phase.label
            line["metrics"], ranks = self.evaluate(state)
            evaluations = [*evaluations, {"epoch": epoch, "metrics": line["metrics"]}]
            self._keep_ranks(evaluations, ranks)
        seconds = {"train_seconds": trained, "eval_seconds": time.perf_counter() - started}
        self._log(line | seconds)
        totals = {name: record[name] + value for name, value in seconds.items()}
        return state, {"epoch": epoch, "evaluations": evaluations, **totals}

    def new_state(self):
        """Return the state before the first step."""
        return self._trainer.init(self.run.tables, self.run.facts)

    def train_epoch(self, state, epoch, last_metrics=()):
        """Train one epoch, showing its progress.

        Args:
          state: TrainState, donated.
          epoch: its number, from 1; with the seed it decides the batches.
          last_metrics: dict of the last evaluation, to be shown.

        Returns:
          (state, dict loss part -> mean over the epoch's targets).

        Raises:
          Diverged: a loss part or the gradient became NaN or infinite.
        """
        chunks, warmup = self.batches.chunks_per_epoch, epoch <= self.run.config.model.warmup_epochs
        done, sums, total = int(state.step), {}, 0.0

        def logs():
            nonlocal state
            for index in range((epoch - 1) * chunks, epoch * chunks):
                state, log = self.train_chunk(state, index, warmup)
                yield log

        with reporting.EpochProgress(self.phase.name, epoch, self.phase.epochs, chunks, last_metrics) as progress:
            # A chunk's log is read when the next chunk is under way, so that the device never waits for the host.
            for log, _ in itertools.pairwise(itertools.chain(logs(), [None])):
                log = {name: np.asarray(values, np.float64) for name, values in jax.device_get(log).items()}
                if not all(np.isfinite(values).all() for values in log.values()):
                    processes.together(lambda: self._stop(log, epoch, done))  # noqa: B023 - called at once
                targets = log.pop("targets")
                done += np.count_nonzero(targets)
                total += targets.sum()
                for name, values in log.items():
                    sums[name] = sums.get(name, 0.0) + float(values @ targets)
                progress.advance(
                    targets.sum(), {name: values @ targets / targets.sum() for name, values in log.items()}
                )
        return state, {name: value / total for name, value in sums.items()}

    def train_chunk(self, state, index, warmup=False):
        """Train chunk ``index`` of ``batches``.

        Args:
          state: TrainState, donated.
          index: number of the chunk since the start of training.
          warmup: whether it belongs to the warm-up.

        Returns:
          (state, log), both still on the device; see ``Trainer``.
        """
        length, ids = self.batches.chunk(index)
        arguments = state, self._resident, self.run.teachers, self.run.placement.put_rows(ids)
        with jax.default_matmul_precision(PRECISIONS[self.run.config.train.matmul_precision]):
            return self._trainer.run_chunk(*arguments, length=length, warmup=warmup)

    def _stop(self, log, epoch, before):
        bad = [name for name, values in log.items() if not np.isfinite(values).all()]
        parts = [name for name in bad if name not in ("loss", "gradient_norm")] or bad
        steps = f"{before + 1} to {before + int((log['targets'] > 0).sum())}"
        kept = f"the good checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "there is no checkpoint yet"
        raise Diverged(
            f"{self.phase.name}, epoch {epoch}: {', '.join(parts)} became NaN or infinite in steps {steps}; {kept}; "
            f"try a smaller --config.train.learning_rate in a new --workdir"
        )

    def _gradient_norms(self, state):
        """Measure each loss part's pull on the modality tables on one batch: the phase's first of the longest bucket.

        Its rows are filled up to a power of two, mostly the same one in both phases, which so share the compiled program.
        """
        if not (self.run.student.tuned and self.run.student.modalities):
            return {}
        longest = self.batches.buckets[-1].length
        chunks = (self.batches.chunk(index) for index in range(self.batches.chunks_per_epoch))
        ids = next(ids for length, ids in chunks if length == longest)
        rows = 1 << (ids.shape[1] - 1).bit_length()
        ids = np.pad(ids[:1], ((0, 0), (0, rows - ids.shape[1])), constant_values=-1)
        ids = self.run.placement.put_rows(ids)[0]
        norms = self._trainer.part_gradient_norms(state, self._resident, self.run.teachers, ids, length=longest)
        return {name: float(value) for name, value in norms.items()}

    def _keep_ranks(self, evaluations, ranks):
        """Write ranks.npz of the refit's best evaluation so far."""
        if self.phase.name != "refit":
            return
        scores = [self.phase.score(evaluations[: n + 1]) for n in range(len(evaluations))]
        if max(scores[:-1], default=-1.0) >= scores[-1]:
            return  # the first of equal ones stays, as among the checkpoints
        e = self.evaluator
        counts = train_counts(self.run.dataset.interactions)
        self.folder.write_arrays(
            "ranks.npz",
            user=e.users,
            position=e.history_lengths,
            target=e.target_items,
            rank=ranks,
            history_length=np.minimum(e.history_lengths, self.run.config.data.max_length),
            target_train_count=counts[e.target_items],
            epoch=evaluations[-1]["epoch"],
            evaluated_on=self.phase.label,
        )
