"""The trials of a search, in WORKDIR/study.db, where processes of one machine share them. Only it and ``tune`` import optuna.

A trial belongs to the process that holds the lock of its folder, WORKDIR/trials/NUMBER. The system gives the lock back when
that process ends, however it ends, so a trial that runs by the database but whose lock is free was left behind: the next
process takes it over, settings and checkpoints as they are.
"""

import contextlib
import fcntl
import pathlib
import shutil
import sqlite3
from collections.abc import Callable

import numpy as np
import optuna
import sqlalchemy.exc
from optuna.trial import TrialState

from kdsr_jax.axes import settings_of, with_settings
from kdsr_jax.config import differing_keys
from kdsr_jax.errors import UserError
from kdsr_jax.workdir import Workdir

STARTUP_TRIALS = 4  # trials that must have ended before one is pruned
DATABASE = "study.db"
OVER = (TrialState.COMPLETE, TrialState.PRUNED)  # states that count; a trial that failed is made up for by another
_IDENTITY = "search"
_OWN = {DATABASE, f"{DATABASE}-journal", ".lock", "trials", "best.py"}


class Search:
    """The trials of one search. A context manager.

    Proposals are TPE's, seeded by the config's seed and the trial's number: processes that share a search propose different
    settings, and one alone proposes the same ones again, also when it is stopped and goes on.

    Attributes:
      path: the workdir.
      config: that trials start from; the first trial is the config itself where it lies on all axes.
      axes: of the settings.
    """

    def __init__(self, path, config, axes, identity, prune_after):
        """Open the search of a workdir, or begin it.

        Args:
          path: of the workdir.
          config: a valid config.
          axes: list of Axis.
          identity: dict with "config" (as ``to_dict`` gives it), "tries", "metric" and "data_sha256"; what makes it this search.
          prune_after: epochs that every trial is given.

        Raises:
          UserError: the workdir holds another search or something else, or cannot be read or written.
        """
        self.path, self.config, self.axes = pathlib.Path(path), config, axes
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, prune_after)
        self._storage = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until __exit__
        except OSError as error:
            raise UserError(f"--workdir={path}: cannot be written ({error.strerror})") from error
        try:
            with self._alone():
                self._open(identity)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
        self._lock.close()

    def claim(self, total):
        """Take over a trial that was left behind, or begin the next one.

        Args:
          total: trials that the search shall have in the end.

        Returns:
          (trial, its config, its Workdir), or None where enough trials are over or in the hands of other processes.

        Raises:
          UserError: its settings do not go together; the trial is given up.
        """
        with self._alone():
            trials = self._study.get_trials(deepcopy=False)
            self._sweep(trials)
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            left = [trial for trial in running if not self._held(trial.number)]
            if sum(trial.state in OVER for trial in trials) + len(running) - len(left) >= total:
                return None
            self._seed(left[0].number if left else sum(trial.state != TrialState.WAITING for trial in trials))
            trial = optuna.Trial(self._study, left[0]._trial_id) if left else self._study.ask()
            settings = {axis.name: axis.suggest(trial) for axis in self.axes}
            try:
                config = with_settings(self.config, settings)
            except UserError as error:
                self._study.tell(trial, state=TrialState.FAIL)
                raise UserError(f"trial {trial.number} is given up: {error}; the same command tries others") from error
            return trial, config, Workdir(self._folder(trial.number), config)

    def finish(self, trial, state, facts, write_best):
        """End a trial.

        Args:
          trial: as ``claim`` gave it.
          state: TrialState: COMPLETE, PRUNED, or FAIL for one that does not count.
          facts: dict that is kept as the trial's user attributes; "value" is what a complete trial is judged by.
          write_best: called with the complete trials, the best first, and the number of those that are over, if there are
            any; by one process at a time.
        """
        with self._alone():
            for name, fact in facts.items():
                trial.set_user_attr(name, fact)
            self._study.tell(trial, facts["value"] if state == TrialState.COMPLETE else None, state)
            self._write(write_best)

    def refresh(self, write_best):
        """Call ``write_best`` as ``finish`` does; a process may have been killed before it came to that."""
        with self._alone():
            self._write(write_best)

    def counts(self):
        """Return (trials that are over, trials that run)."""
        states = [trial.state for trial in self._study.get_trials(deepcopy=False)]
        return sum(state in OVER for state in states), states.count(TrialState.RUNNING)

    def ranking(self):
        """Return the complete trials, the best first and of equal ones the earlier."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted(trials, key=lambda trial: (-trial.value, trial.number))

    @contextlib.contextmanager
    def _alone(self):
        """Keep other processes out, and answer for the database in one line."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            with readable(self.path):
                yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _open(self, identity):
        foreign = {entry.name for entry in self.path.iterdir()} - _OWN
        if foreign and not (self.path / DATABASE).exists():
            raise UserError(f"--workdir={self.path}: holds files but no search; give an empty or new folder")
        file = str(self.path.absolute() / DATABASE)
        # Not by its address, in which ? and % of a path would mean something else.
        connect = {"creator": lambda: sqlite3.connect(file, timeout=60, check_same_thread=False)}
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{DATABASE}", engine_kwargs=connect)
        self._study = optuna.create_study(
            storage=self._storage, study_name="kdsr", direction="maximize", pruner=self._pruner, load_if_exists=True
        )
        saved = self._study.user_attrs.get(_IDENTITY)
        if saved is None:
            start = settings_of(self.config, self.axes)
            if start and not self._study.get_trials(deepcopy=False):
                self._study.enqueue_trial(start)
            self._study.set_user_attr(_IDENTITY, identity)  # last, so that a start that was killed is made again
        elif differing := _differing(saved, identity):
            raise UserError(f"--workdir={self.path}: holds another search; {'; '.join(differing)}")

    def _seed(self, number):
        """Let the settings of a trial be drawn by its number, also where another process left off between two of them."""
        seed = np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0]
        self._study.sampler = optuna.samplers.TPESampler(seed=int(seed))

    def _write(self, write_best):
        if ranking := self.ranking():
            write_best(ranking, self.counts()[0])

    def _folder(self, number):
        return self.path / "trials" / str(number)

    def _held(self, number):
        """Say whether a process, this one included, works in a trial's folder."""
        try:
            with open(self._folder(number) / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _sweep(self, trials):
        """Remove the folders of trials that are over; what is worth keeping of them is in the database."""
        for trial in trials:
            folder = self._folder(trial.number)
            if trial.state.is_finished() and folder.exists() and not self._held(trial.number):
                shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """Reports a trial's evaluations and stops it where it is worse than the median of the others: a Phase's ``finished``.

    Attributes:
      pruned: whether it was stopped for that.
    """

    def __init__(self, trial, metric: str, finished: Callable[[list], bool]):
        """Take an optuna trial, the metric that is reported, and the phase's own rule for stopping, which goes first."""
        self._trial, self._metric, self._finished = trial, metric, finished
        self._reported = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        self.pruned = False

    def __call__(self, evaluations):
        self.report(evaluations)
        if self._finished(evaluations):
            return True
        self.pruned = self._trial.should_prune()
        return self.pruned

    def report(self, evaluations):
        """Report those evaluations that the database does not have yet; a trial that goes on comes with its earlier ones."""
        for evaluation in evaluations:
            if evaluation["epoch"] not in self._reported:
                self._trial.report(evaluation["metrics"][self._metric], evaluation["epoch"])
                self._reported.add(evaluation["epoch"])


@contextlib.contextmanager
def readable(path):
    """Turn what a database answers that is damaged, full or of another version of optuna into one line."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{pathlib.Path(path) / DATABASE}: cannot be used ({reason})") from error


def _differing(saved, identity):
    """List in what two searches differ, a line each."""
    lines = differing_keys(saved["config"], identity["config"])
    before, after = saved["tries"], identity["tries"]
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    lines += [f"--try {name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}" for name in names]
    if saved["metric"] != identity["metric"]:
        lines.append(f"--metric: {saved['metric']} -> {identity['metric']}")
    if not lines and saved["data_sha256"] != identity["data_sha256"]:
        lines.append("the data is not what it began with (file contents or --config.data.root have changed)")
    return lines
