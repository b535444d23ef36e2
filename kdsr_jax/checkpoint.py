"""Atomic checkpoints of one phase: the newest two and the best. The only module that imports orbax."""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from kdsr_jax.errors import UserError

log = logging.getLogger("kdsr_jax")
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # orbax reports a damaged file there too, at length
_policies = ocp.training.preservation_policies
_ASIDE = ".damaged"


class Checkpoints:
    """Checkpoints of a phase, numbered by epoch.

    A checkpoint holds the state (a tree of arrays) and a record (plain JSON data). Saving is asynchronous; a process killed
    at any moment leaves the finished ones as they were.
    """

    def __init__(self, folder):
        """Open or create the folder; leftovers of a killed save are removed."""
        self.folder = pathlib.Path(folder).absolute()
        _set_aside_unreadable(self.folder)
        best = _policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        keep = _policies.AnyPreservationPolicy([_policies.LatestN(2), best])
        self._orbax = ocp.training.Checkpointer(self.folder, preservation_policy=keep, cleanup_tmp_directories=True)

    def save(self, epoch, state, record, score):
        """Start writing a checkpoint; the caller may donate the state right after.

        Args:
          epoch: its number; larger than any before.
          state: tree of arrays.
          record: JSON data.
          score: the best score is kept besides the newest two, the first of equal ones.
        """
        state = jax.tree.map(jnp.copy, state)  # on CPU the writer would otherwise read buffers that are given away
        self._orbax.wait()  # a save that finds another in progress would be skipped
        metrics = {"score": float(score), "epoch": epoch}
        self._orbax.save_checkpointables_async(epoch, {"state": state}, metrics=metrics, custom_metadata=record)

    def epochs(self):
        """List the epochs of finished checkpoints, oldest first."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def load(self, epoch, abstract_state):
        """Load one checkpoint.

        Args:
          epoch: its number.
          abstract_state: tree of ShapeDtypeStruct with shardings; any number of devices.

        Returns:
          (state, record).

        Raises:
          Exception: whatever orbax says of a damaged checkpoint.
        """
        loaded = self._orbax.load_checkpointables(epoch, {"state": abstract_state})
        record = self._orbax.metadata(epoch).custom_metadata
        if not record:  # orbax takes a damaged metadata file for an empty one
            raise ValueError("the record is missing")
        return loaded["state"], record

    def load_newest(self, abstract_state):
        """Load the newest checkpoint that is whole; damaged newer ones are renamed, with a warning.

        Returns:
          (epoch, state, record), or None where no checkpoint was ever finished.

        Raises:
          UserError: there are checkpoints and all are damaged.
        """
        epochs = self.epochs()
        damaged = []
        for epoch in reversed(epochs):
            try:
                state, record = self.load(epoch, abstract_state)
            except Exception as error:  # noqa: BLE001 - orbax raises many kinds for missing, cut or swapped files
                log.warning("checkpoint %s is damaged (%s)", self.folder / str(epoch), type(error).__name__)
                damaged.append(epoch)
                continue
            for bad in damaged:
                log.warning("going on from epoch %d instead of %d, which is set aside as %d%s", epoch, bad, bad, _ASIDE)
                _set_aside(self.folder / str(bad))
            if damaged:
                self._orbax.reload()
            return epoch, state, record
        if epochs or any(self.folder.glob("*" + _ASIDE)):
            raise UserError(f"all checkpoints in {self.folder} are damaged; delete this folder to start the phase over")
        return None

    def load_best(self, abstract_state):
        """Load the state of the checkpoint with the highest score.

        Raises:
          UserError: there is none, or it is damaged.
        """
        scored = [(_rank(c.metrics), c.step) for c in self._orbax.checkpoints if c.metrics]
        if not scored:
            raise UserError(f"{self.folder} holds no checkpoint; train the run first")
        epoch = max(scored)[1]
        try:
            return self.load(epoch, abstract_state)[0]
        except Exception as error:
            raise UserError(f"checkpoint {self.folder / str(epoch)} is damaged ({type(error).__name__})") from error

    def close(self):
        """Finish saving and release the folder."""
        self._orbax.close()


def _rank(metrics):
    return metrics["score"], -metrics.get("epoch", 0)


def _set_aside_unreadable(folder):
    """Rename checkpoints whose score cannot be read, for which orbax would not even open the folder."""
    for file in folder.glob("[0-9]*/metrics/metrics"):
        checkpoint = file.parent.parent
        if checkpoint.name.isdigit() and not _is_json(file):
            log.warning(
                "checkpoint %s is damaged (its score); it is set aside as %s%s", checkpoint, checkpoint.name, _ASIDE
            )
            _set_aside(checkpoint)


def _set_aside(checkpoint):
    aside = checkpoint.with_name(checkpoint.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _is_json(file):
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True
