"""What the chunks of an epoch log, brought to the host and added up."""

import itertools

import jax
import numpy as np

from kdsr_jax import processes
from kdsr_jax.errors import Diverged


class EpochLosses:
    """Adds the logs of an epoch's chunks up, and stops a run that diverged."""

    def __init__(self, runner, epoch, done):
        """Begin: epoch is its number, ``done`` the steps before it."""
        self._runner, self._epoch, self._done = runner, epoch, done
        self._sums, self._targets = {}, 0.0

    def add(self, log):
        """Take a chunk's log in, arrays [K] of the host by name.

        Returns:
          (its targets, dict loss part -> mean over them).

        Raises:
          Diverged: a number of it is NaN or infinite.
        """
        log = {name: np.asarray(values, np.float64) for name, values in log.items()}
        if not all(np.isfinite(values).all() for values in log.values()):
            processes.together(lambda: self._stop(log))
        targets = log.pop("targets")
        self._done += np.count_nonzero(targets)
        self._targets += targets.sum()
        sums = {name: float(values @ targets) for name, values in log.items()}
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}
        return targets.sum(), {name: value / targets.sum() for name, value in sums.items()}

    def means(self):
        """Return the mean of each loss part over the targets so far."""
        return {name: value / self._targets for name, value in self._sums.items()}

    def _stop(self, log):
        phase, epoch = self._runner.phase.name, self._epoch
        bad = [name for name, values in log.items() if not np.isfinite(values).all()]
        parts = [name for name in bad if name not in ("loss", "gradient_norm")] or bad
        steps = f"{self._done + 1} to {self._done + int((log['targets'] > 0).sum())}"
        kept = f"the good checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "there is no checkpoint yet"
        raise Diverged(
            f"{self._runner.said_first}{phase}, epoch {epoch}: {', '.join(parts)} became NaN or infinite in steps {steps}; {kept}; "
            f"try a smaller --config.train.learning_rate in a new --workdir"
        )


def in_time(logs):
    """Bring chunks' logs to the host, each when the next chunk is under way, so that the device never waits for the host."""
    for log, _ in itertools.pairwise(itertools.chain(logs, [None])):
        yield jax.device_get(log)
