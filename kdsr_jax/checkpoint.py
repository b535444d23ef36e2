"""Atomic checkpoints of one phase: the newest two and the best. The only module that imports orbax.

Orbax does not look at content: a flipped bit loads as wrong weights. So a checkpoint, once finished, gets a file of sha256
sums, ``SHA256SUMS`` (``sha256sum -c 5/SHA256SUMS`` reads it from the folder above), and is never loaded unless they hold.
A process killed in the moment between the two leaves a newest checkpoint without sums: it counts as unfinished, and its
epoch is trained again.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from kdsr_jax import processes
from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file

log = logging.getLogger("kdsr_jax")
_SUMS = "SHA256SUMS"
_DAMAGED, _UNFINISHED, _DISCARDED = ".damaged", ".unfinished", ".discarded"


class Checkpoints:
    """Checkpoints of a phase, numbered by epoch.

    A checkpoint holds the state (a tree of arrays) and a record (plain JSON data). Saving is asynchronous; a process killed
    at any moment leaves the finished ones as they were. Several processes write one checkpoint together, each its own part of
    the arrays, into a folder that all share; the first alone does the rest.
    """

    def __init__(self, folder):
        """Open or create the folder; leftovers of a killed process are removed, damaged checkpoints renamed with a warning.

        Raises:
          UserError: there are checkpoints and all are damaged.
        """
        self.folder = pathlib.Path(folder).absolute()
        processes.first(self._tidy)
        self._orbax = ocp.training.Checkpointer(self.folder, cleanup_tmp_directories=True)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._saving = None

    def _tidy(self):
        _set_damaged_aside(self.folder)
        for discarded in self.folder.glob("*" + _DISCARDED):
            shutil.rmtree(discarded, ignore_errors=True)

    def save(self, epoch, state, record, score):
        """Start writing a checkpoint; the caller may donate the state right after.

        Args:
          epoch: its number; larger than any before.
          state: tree of arrays.
          record: JSON data.
          score: the best score is kept besides the newest two, the first of equal ones.

        Raises:
          UserError: the checkpoint before this one could not be written.
        """
        self._finish()  # a save that finds another in progress would be skipped
        for aside in (_DAMAGED, _UNFINISHED) if processes.is_first() else ():  # this one takes its place
            shutil.rmtree(self.folder / f"{epoch}{aside}", ignore_errors=True)
        state = jax.tree.map(jnp.copy, state)  # on CPU the writer would otherwise read buffers that are given away
        score = {"score": float(score)}
        try:
            self._orbax.save_checkpointables_async(epoch, {"state": state}, metrics=score, custom_metadata=record)
        except OSError as error:
            raise self._unwritten(error) from error
        self._saving = self._thread.submit(self._seal, epoch)

    def epochs(self):
        """List the epochs of finished checkpoints, oldest first."""
        return processes.first(lambda: _epochs(self.folder))

    def load(self, epoch, abstract_state):
        """Load one checkpoint.

        Args:
          epoch: its number.
          abstract_state: tree of ShapeDtypeStruct with shardings; any number of devices.

        Returns:
          (state, record).

        Raises:
          UserError: it holds other arrays.
        """
        try:
            state = self._orbax.load_checkpointables(epoch, {"state": abstract_state})["state"]
            return state, self._orbax.metadata(epoch).custom_metadata
        except Exception as error:  # orbax raises many kinds
            raise _unloadable(self.folder / str(epoch), error) from error

    def load_newest(self, abstract_state):
        """Load the newest checkpoint.

        Returns:
          (epoch, state, record), or None where no checkpoint was ever finished.

        Raises:
          UserError: it holds other arrays.
        """
        epochs = self.epochs()
        return (epochs[-1], *self.load(epochs[-1], abstract_state)) if epochs else None

    def load_best(self, abstract_state):
        """Load the state of the checkpoint with the highest score.

        Raises:
          UserError: there is none, or it may have been a damaged one.
        """
        return self.load(processes.first(lambda: _best_epoch(self.folder)), abstract_state)[0]

    def close(self):
        """Finish saving and release the folder.

        Raises:
          UserError: the last checkpoint could not be written.
        """
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):  # it repeats what _finish has said
                self._orbax.close()

    def _seal(self, epoch):
        """Write the sums of a checkpoint as soon as orbax has finished it; then discard those that are kept no longer."""
        self._orbax.wait()
        if not processes.is_first():
            return
        checkpoint = self.folder / str(epoch)
        sums = _sums(checkpoint)
        replace_file(checkpoint / _SUMS, lambda file: file.write(sums))
        epochs = _epochs(self.folder)
        for old in set(epochs) - {*epochs[-2:], _best_of(self.folder, epochs)}:
            # Orbax would delete it file by file, and half of one, left by a kill, looks like a damaged one.
            discarded = self.folder / f"{old}{_DISCARDED}"
            (self.folder / str(old)).rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)

    def _finish(self):
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except Exception as error:  # orbax raises many kinds
                raise self._unwritten(error) from error

    def _unwritten(self, error):
        return UserError(
            f"{self.folder}: a checkpoint cannot be written ({_first_line(error)}); earlier ones are kept, make room and "
            "give the same command again"
        )


def load_best_variables(folder):
    """Load the student's variables of a finished phase's best checkpoint without its model; nothing in the folder is changed.

    Args:
      folder: ``Workdir.checkpoints(phase)`` of any run.

    Returns:
      (params, frozen), nested dicts of numpy arrays, such as {"item_embedding": {"embedding": [N + 1, dim] float32}, ...}.

    Raises:
      UserError: there is no checkpoint, or one is damaged.
    """
    folder = pathlib.Path(folder).absolute()
    for epoch, reason in _damages(folder).items():
        if reason:
            raise UserError(f"checkpoint {folder / str(epoch)} is damaged ({reason}); train that run again")
    checkpoint = folder / str(_best_epoch(folder))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        metadata = ocp.metadata(checkpoint).metadata
        stored = {name: metadata[name] for name in ("params", "frozen") if metadata.get(name)}
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), stored)
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        with context:
            variables = ocp.load(checkpoint, shapes)
    except Exception as error:
        raise _unloadable(checkpoint, error) from error
    variables = jax.tree.map(np.asarray, variables)
    return variables["params"], variables.get("frozen", {})


def _epochs(folder):
    return sorted(int(entry.name) for entry in folder.glob("[0-9]*") if entry.name.isdecimal())


def _best_epoch(folder):
    """Return the epoch with the best score; the checkpoints in the folder are whole."""
    for aside in (*folder.glob("*" + _DAMAGED), *folder.glob("*" + _UNFINISHED)):
        if not aside.with_suffix("").exists():  # a copy put in its place, or the epoch trained again, makes up for it
            raise UserError(f"checkpoint {aside} is damaged and may have been the best one; train the run again")
    epochs = _epochs(folder)
    if not epochs:
        raise UserError(f"{folder} holds no checkpoint; train the run first")
    return _best_of(folder, epochs)


def _best_of(folder, epochs):
    """Return which of some epochs, in rising order, has the best score, the first of equal ones."""
    files = {epoch: folder / str(epoch) / "metrics" / "metrics" for epoch in epochs}
    return max(epochs, key=lambda epoch: json.loads(files[epoch].read_bytes())["score"])


def _sums(checkpoint):
    """Return what SHA256SUMS has to say; the checkpoint's own name is in it, so none passes for another."""
    lines = []
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name not in (_SUMS, f".{_SUMS}.tmp"):
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            lines.append(f"{digest}  {file.relative_to(checkpoint.parent)}\n")
    return "".join(lines).encode()


def _damages(folder):
    """Hold every checkpoint against its sums; returns dict epoch -> what is wrong with it, or None."""

    def damage(checkpoint):
        try:
            if (checkpoint / _SUMS).read_bytes() != _sums(checkpoint):
                return f"its files are not those of its {_SUMS}"
        except FileNotFoundError:
            return f"it has no {_SUMS}"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return None

    return {epoch: damage(folder / str(epoch)) for epoch in _epochs(folder)}


def _set_damaged_aside(folder):
    """Rename damaged checkpoints, so that the newest whole one is what a phase goes on from."""
    damages = _damages(folder)
    whole = [epoch for epoch, reason in damages.items() if not reason]
    newest = max(damages, default=None)
    unfinished = newest is not None and not (folder / str(newest) / _SUMS).exists()
    if not whole and (len(damages) > unfinished or any(folder.glob("*" + _DAMAGED))):
        reason = f" ({damages[newest]})" if damages else ""
        raise UserError(f"all checkpoints in {folder} are damaged{reason}; delete this folder to start the phase over")
    then = f"going on from epoch {whole[-1]}" if whole else "the phase starts over"
    for epoch, reason in damages.items():
        if reason:
            checkpoint = folder / str(epoch)
            aside = f"{epoch}{_UNFINISHED if unfinished and epoch == newest else _DAMAGED}"
            what = "was not finished" if aside.endswith(_UNFINISHED) else "is damaged"
            log.warning("checkpoint %s %s (%s); it is set aside as %s, %s", checkpoint, what, reason, aside, then)
            shutil.rmtree(folder / aside, ignore_errors=True)
            checkpoint.rename(folder / aside)


def _unloadable(checkpoint, error):
    return UserError(
        f"checkpoint {checkpoint} is whole but cannot be loaded ({_first_line(error)}); it was written by another version "
        "or model"
    )


def _first_line(error):
    full = os.strerror(errno.ENOSPC)  # which tensorstore buries in a long line
    return full if full in str(error) else f"{type(error).__name__}: {error}".splitlines()[0][:200]
