"""Several seeds of a run trained side by side: their steps are one program with an axis of seeds (``jax.vmap``).

It pays where a step of one seed leaves the device idle, as small models do on accelerators, and asks for the memory of all. On a
CPU it is no faster than one seed after another.

All else is done for each seed by itself, in a workdir of its own, as ``train.train_and_evaluate`` would: it stops early, is
evaluated and is kept in checkpoints, and its numbers are those of a run alone but for rounding. A seed that is over while
others go on keeps its place in the program, idle, so that a group that is killed and goes on ends with the same bits.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.epoch import EpochLosses, in_time
from kdsr_jax.errors import UserError


def execute(runners, places):
    """Carry a phase of runs that differ in their seeds alone to its end.

    Those that are behind in epochs train first, so that in the end all that go on are at the same epoch.

    Args:
      runners: PhaseRunners, the later ones ``like`` the first.
      places: number of seeds that the program has, at least one for each runner.

    Returns:
      List of their records, see ``PhaseRunner.execute``.

    Raises:
      UserError: they are spread over several devices; or see ``PhaseRunner.execute``.
    """
    if jax.device_count() > 1:
        raise UserError(
            f"several seeds at once need one device, and here are {jax.device_count()}; take one after another"
        )
    for runner in runners:
        runner.said_first = f"seed {runner.run.config.seed}, "
    with contextlib.ExitStack() as stack:
        begun = [stack.enter_context(runner.started()) for runner in runners]
        checkpoints, states, records = (list(parts) for parts in zip(*begun, strict=True))
        while behind := [n for n, runner in enumerate(runners) if not runner.is_over(records[n])]:
            before = min(records[n]["epoch"] for n in behind)
            group = [n for n in behind if records[n]["epoch"] == before]
            started = time.perf_counter()
            chosen = [runners[n] for n in group]
            trained, losses = train_epoch(chosen, [states[n] for n in group], before + 1, places)
            seconds = (time.perf_counter() - started) / len(group)
            for n, state, means in zip(group, trained, losses, strict=True):
                states[n] = state
                records[n] = runners[n].close_epoch(checkpoints[n], state, records[n], means, seconds)
        return records


def train_epoch(runners, states, epoch, places):
    """Train one epoch of each runner.

    Args:
      runners: PhaseRunners at the same epoch.
      states: their TrainStates.
      epoch: its number, from 1.
      places: see ``execute``; those without a runner idle.

    Returns:
      (list of states, list of dicts loss part -> mean over the epoch's targets).

    Raises:
      Diverged: a loss part or a gradient of one became NaN or infinite.
    """
    first, idle = runners[0], places - len(runners)
    losses = [EpochLosses(runner, epoch, int(state.step)) for runner, state in zip(runners, states, strict=True)]
    stacked = _stack([*states, *states[:1] * idle])

    def logs():
        nonlocal stacked
        for index, warmup in first.chunks_of(epoch):
            length, ids = first.batches.chunk(index)
            others = [runner.batches.chunk(index)[1] for runner in runners[1:]]
            ids = np.stack([ids, *others, *[np.full_like(ids, -1)] * idle])
            stacked, log = first.run_steps(first.trainer.run_chunks, stacked, ids, length, warmup)
            yield log

    with first.progress(epoch) as progress:
        for log in in_time(logs()):
            parts = [{name: values[n] for name, values in log.items()} for n in range(len(runners))]
            shown = [loss.add(part) for loss, part in zip(losses, parts, strict=True)]
            progress.advance(*shown[0])
    return _unstack(stacked)[: len(runners)], [loss.means() for loss in losses]


@jax.jit
def _stack(states):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)


@jax.jit
def _unstack(stacked):
    return [jax.tree.map(lambda array, n=n: array[n], stacked) for n in range(stacked.step.shape[0])]
