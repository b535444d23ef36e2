"""One phase of a protocol: train epoch after epoch, evaluate, checkpoint, and go on from where a killed process stopped."""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax import processes, reporting
from kdsr_jax.checkpoint import Checkpoints
from kdsr_jax.data.batches import Batches
from kdsr_jax.data.interactions import train_counts
from kdsr_jax.data.sequences import limit_targets
from kdsr_jax.epoch import EpochLosses, in_time
from kdsr_jax.errors import UserError
from kdsr_jax.evaluate import Evaluator, summarise
from kdsr_jax.events import Events
from kdsr_jax.labels import SELECT_K
from kdsr_jax.layout import precision
from kdsr_jax.objective import Objective
from kdsr_jax.ops.correlation import MOST_PAIRS
from kdsr_jax.optim import make_optimizer
from kdsr_jax.report.page import refresh_report
from kdsr_jax.resident import place_histories
from kdsr_jax.train_step import Trainer


class PhaseRunner:
    """Carries a phase out; ``kdsr_jax.together`` does so for several seeds at once.

    Attributes:
      run: the Run it belongs to.
      phase: Phase.
      folder: Workdir.
      forgetting: Forgetting that is measured after every epoch, or None.
      batches: Batches of its training windows.
      histories: where they lie, DeviceHistories or HostHistories.
      trainer: Trainer.
      said_first: what stands before all that it says of an epoch: the seed, where several are trained at once.
    """

    def __init__(self, run, phase, folder, forgetting=None, like=None):
        """Lay a phase out.

        Args:
          run, phase, folder, forgetting: see the attributes.
          like: PhaseRunner of the same phase of a run that differs in the seed alone; what it has on the device, and its
            compiled functions, serve both. None is on its own.

        Raises:
          UserError: the batches do not fit.
        """
        self.run, self.phase, self.folder, self.forgetting = run, phase, folder, forgetting
        config = run.config
        windows = limit_targets(phase.train, config.train.batch_size)
        sizes = {"batch_size": config.train.batch_size, "steps_per_call": config.train.steps_per_call}
        self.batches = Batches(windows, seed=config.seed, **sizes)
        if config.distill.enabled and config.distill.pair_budget:
            self._check_pairs()
        self._windows, self._events, self.said_first = windows, None, ""
        if like:
            self.histories, self._schedules, self.trainer = like.histories, like._schedules, like.trainer
            self.evaluator = like.evaluator
            return
        given = config.data.histories, run.dataset.interactions, windows, run.placement
        self.histories = place_histories(*given)
        tuned = run.student.modalities if run.student.tuned else ()
        optimizer, self._schedules = make_optimizer(config.train, tuned, self.batches.steps_per_epoch)
        # On CPUs jax does not round factors by itself, and to do so pays in the largest products only.
        by_hand = config.train.matmul_precision == "bf16" and jax.default_backend() == "cpu"
        objective = Objective(
            run.student,
            config.distill,
            config.teacher.score_fn,
            config.teacher.num_splits,
            cluster_weight=config.model.cluster_weight,
            placement=run.placement,
            sampled_items=config.train.sampled_items,
            rows={bucket.length: bucket.rows for bucket in self.batches.buckets},
            rounded=jnp.bfloat16 if by_hand else jnp.float32,
        )
        of_trainer = config.train.batch_size, run.placement, config.train.sparse_tables
        self.trainer = Trainer(objective, optimizer, *of_trainer)

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
        with self.started() as (checkpoints, state, record):
            while not self.is_over(record):
                started = time.perf_counter()
                epoch, evaluations = record["epoch"] + 1, record["evaluations"]
                state, losses = self.train_epoch(state, epoch, evaluations[-1]["metrics"] if evaluations else {})
                record = self.close_epoch(checkpoints, state, record, losses, time.perf_counter() - started)
            return record

    @contextlib.contextmanager
    def started(self):
        """Begin, or go on from the newest checkpoint; gives (Checkpoints, TrainState, record of the phase so far)."""
        checkpoints = Checkpoints(self.folder.checkpoints(self.phase.name))
        try:
            yield checkpoints, *self._start(checkpoints)
        finally:
            if self._events:
                self._events.close()
            checkpoints.close()

    def is_over(self, record):
        """Say whether a phase of such a record has come to its end."""
        return record["epoch"] >= self.phase.epochs or self.phase.finished(record["evaluations"])

    def load_best(self):
        """Return the state of the phase's best checkpoint.

        Raises:
          UserError: it is damaged or missing.
        """
        checkpoints = Checkpoints(self.folder.checkpoints(self.phase.name))
        try:
            return self.trainer.from_store(checkpoints.load_best(self._abstract_state()))
        finally:
            checkpoints.close()

    @functools.cached_property
    def evaluator(self):
        """The Evaluator of the phase's targets."""
        arguments = self.run.student, self.run.dataset.interactions, self.phase.evaluation, self.run.placement
        settings = {"filter_seen": self.run.config.eval.filter_seen, "histories": self.run.config.data.histories}
        return Evaluator(*arguments, **settings)

    def evaluate(self, state):
        """Rank all targets; returns (metrics in percent with coverage@20, ranks)."""
        with precision(self.run.config):
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
            reporting.say(f"{self.said_first}{self.phase.name}: going on after epoch {epoch}")
            return self.trainer.from_store(state), record
        state = self.new_state()
        if self.forgetting:
            self._log({"phase": self.phase.name, "epoch": 0, "forgetting": self.forgetting.measure(state.params)})
        return state, {"epoch": 0, "evaluations": [], "train_seconds": 0.0, "eval_seconds": 0.0}

    def _log(self, line):
        """Write an object to metrics.jsonl and to what shows it."""
        self.folder.log(**line)
        if self._events:
            self._events.add(line)
        reporting.say(self.said_first + reporting.describe_epoch(line, self.phase.epochs))

    def _abstract_state(self):
        return self.trainer.stored_shapes(self.run.tables, self.run.facts)

    def close_epoch(self, checkpoints, state, record, losses, trained):
        """Evaluate an epoch if the phase says so, and log and keep it.

        Args:
          checkpoints: Checkpoints that take it in.
          state: TrainState after it.
          record: of the phase before it.
          losses: as ``train_epoch`` gives them.
          trained: seconds that it took to train.

        Returns:
          The record after it.
        """
        epoch = record["epoch"] + 1
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
        record = {"epoch": epoch, "evaluations": evaluations, **totals}
        score = self.phase.score(evaluations[-1]) if self.phase.evaluates(epoch) else -1.0
        checkpoints.save(epoch, self.trainer.to_store(state), record, score)
        if processes.is_first():
            refresh_report(self.folder)
        return record

    def new_state(self):
        """Return the state before the first step."""
        return self.trainer.init(self.run.config.seed, self.run.tables, self.run.facts)

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
        losses = EpochLosses(self, epoch, int(state.step))

        def logs():
            nonlocal state
            for index, warmup in self.chunks_of(epoch):
                state, log = self.train_chunk(state, index, warmup)
                yield log

        with self.progress(epoch, last_metrics) as progress:
            for log in in_time(logs()):
                progress.advance(*losses.add(log))
        return state, losses.means()

    def chunks_of(self, epoch):
        """List an epoch's chunks: (index, whether they belong to the warm-up)."""
        chunks, warmup = self.batches.chunks_per_epoch, epoch <= self.run.config.model.warmup_epochs
        return [(index, warmup) for index in range((epoch - 1) * chunks, epoch * chunks)]

    def progress(self, epoch, last_metrics=()):
        """Return the ``EpochProgress`` of an epoch; last_metrics are shown."""
        chunks = self.batches.chunks_per_epoch
        return reporting.EpochProgress(self.phase.name, epoch, self.phase.epochs, chunks, last_metrics)

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
        return self.run_steps(self.trainer.run_chunk, state, ids, length, warmup)

    def run_steps(self, run_chunk, states, ids, length, warmup):
        """Call ``Trainer.run_chunk``, or ``run_chunks`` with an axis of seeds, in the precision that the config asks for."""
        resident, ids = self.histories.of(ids, length)
        with precision(self.run.config):
            return run_chunk(states, resident, self.run.teachers, ids, length=length, warmup=warmup)

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
        resident, ids = self.histories.of(ids, longest)
        with precision(self.run.config):
            norms = self.trainer.part_gradient_norms(state, resident, self.run.teachers, ids[0], length=longest)
        return {name: float(value) for name, value in norms.items()}

    def _keep_ranks(self, evaluations, ranks):
        """Write ranks.npz of the refit's best evaluation so far."""
        if self.phase.name != "refit":
            return
        scores = [self.phase.score(evaluation) for evaluation in evaluations]
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
