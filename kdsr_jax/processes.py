"""The processes of a run: one, or several hosts that train together by ``jax.distributed``.

Every process makes the same plan and feeds its own share of each batch. The first one alone writes the files of the workdir,
except that all write checkpoints, and prints. What it alone can see, such as what the workdir holds, it tells the others, and a
UserError of one is raised by all, so that none waits for another that is gone. With one process nothing here does anything.
"""

import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from kdsr_jax.errors import Told, UserError

_place = {"index": 0, "count": 1}  # known without asking jax, which would take hold of the devices


def start(settings: Any) -> None:
    """Join the other processes if the config says that there are some; before anything else that asks jax for devices.

    Args:
        settings: the config's mesh group.

    Raises:
        UserError: no cluster is found, or the coordinator does not answer.
    """
    if not (settings.distributed or settings.coordinator):
        return
    import jax

    if not jax.distributed.is_initialized():
        given = {"coordinator_address": settings.coordinator, "process_id": settings.process}
        given |= {"num_processes": settings.num_processes}
        try:
            jax.distributed.initialize(**(given if settings.coordinator else {}))
        except ValueError as error:
            advice = "start it under Slurm, MPI, Kubernetes or on a TPU pod, or set --config.mesh.coordinator=HOST:PORT"
            raise UserError(f"--config.mesh.distributed=true: no cluster is found ({error}); {advice}") from error
        except RuntimeError as error:
            where = settings.coordinator or "the coordinator that the cluster names"
            reason = str(error).splitlines()[0]
            raise UserError(f"--config.mesh.coordinator: {where} does not answer or refuses ({reason})") from error
    _place.update(index=jax.process_index(), count=jax.process_count())
    if not is_first():
        logging.getLogger("kdsr_jax").setLevel(logging.CRITICAL)  # the first says the same


def count() -> int:
    """Return how many processes there are."""
    return _place["count"]


def is_first() -> bool:
    """Say whether this is the process that writes and prints."""
    return _place["index"] == 0


def first(work: Callable[[], Any]) -> Any:
    """Let the first process do something and return what came of it, plain JSON data, in all.

    Raises:
        UserError: what it raised in the first process.
    """
    if count() == 1:
        return work()
    said: dict[str, Any] = {}
    with _heard(said):
        said["result"] = work() if is_first() else None
    said = json.loads(_exchange(json.dumps(said))[0])
    _raise_told([said.get("error")])
    return said["result"]


def together(work: Callable[[], Any]) -> Any:
    """Do something in all processes and return each one's own result.

    Raises:
        UserError: that of any process.
    """
    if count() == 1:
        return work()
    said: dict[str, Any] = {}
    result = None
    with _heard(said):
        result = work()
    _raise_told([json.loads(text) for text in _exchange(json.dumps(said.get("error")))])
    return result


def in_turn(work: Callable[[], Any]) -> Any:
    """Do something in the first process and then in the others, which may find in a shared cache what the first left there.

    Raises:
        UserError: that of any process.
    """
    if count() == 1:
        return work()
    result = together(lambda: work() if is_first() else None)
    return together(lambda: result if is_first() else work())


def agree(value: str, what: str) -> None:
    """Compare a text between the processes.

    Args:
        value: the text, such as a digest.
        what: it stands for, such as "data files that"; the error goes on with "differ from those of process 0".

    Raises:
        UserError: they differ.
    """
    values = _exchange(value) if count() > 1 else [value]
    other = [number for number, text in enumerate(values) if text != values[0]]
    if other:
        _raise_told([f"process {other[0]} has {what} differ from those of process 0; give all processes the same"])


def as_first(tree: Any) -> Any:
    """Return a tree of arrays, of the same shapes in all processes, with the values of the first process.

    What is fitted on different machines may differ in the last bit.
    """
    if count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


@contextlib.contextmanager
def _heard(said):
    """Keep a UserError as the text "error" in a dictionary."""
    try:
        yield
    except UserError as error:
        said["error"] = str(error)


def _raise_told(errors):
    """Raise the first error there is, as one that is printed by the first process alone."""
    told = [error for error in errors if error]
    if told:
        raise (UserError if is_first() else Told)(told[0])


def _exchange(text):
    """Return the texts of all processes, in their order."""
    from jax.experimental import multihost_utils

    words = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(words)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(words)] = words
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
