"""The one prepared form of every source: filtered and numbered once, kept in the cache folder, checked when read.

A cache only saves time: whatever is wrong with it costs one line of warning, and the source is read instead.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kdsr_jax.cache import cache_folder
from kdsr_jax.data import shards
from kdsr_jax.data.interactions import Interactions, build_interactions
from kdsr_jax.data.sources.base import Source
from kdsr_jax.data.spill import machine_memory

_logger = logging.getLogger("kdsr_jax")

FORMAT = 2  # goes up when the same source would be prepared differently
_TEMPORARY = ".tmp-"
_BLOCK = 2**22  # numbers that are compared together
_COPIES = 2  # of an array that is no mapped file, for a moment, when it is read back


def load_prepared(name: str, source: Source, k_core: int) -> tuple[Interactions, list[dict] | None]:
    """Return a source's interactions and item metadata, from the cache where they are in it.

    Args:
        name: name of the data set, a folder name.
        source: where it comes from.
        k_core: see ``build_interactions``.

    What the source itself warns of, such as items that it ignores, is said when it is read, not when the cache is.

    Returns:
        The interactions, and N + 1 objects by item index or None, the same whether they come from the cache or not.

    Raises:
        UserError: the source cannot be read, or breaks its format.
    """
    if not (find_spec("array_record") and find_spec("tensorflow_datasets")):
        _logger.warning(
            "array_record or tensorflow-datasets is not installed; %s is read from its source each time", name
        )
        return _prepare(source, k_core)
    root = cache_folder() / "prepared" / name
    words = json.dumps([FORMAT, source.kind, source.digest, k_core])
    place = root / hashlib.sha256(words.encode()).hexdigest()[:24]
    try:
        if os.path.lexists(place):
            return shards.read(place)
    except shards.Damaged as error:
        _logger.warning("%s: prepared data is damaged (%s); it is made anew", place, error)
    interactions, items = _prepare(source, k_core)
    try:
        _keep(place, f"{source.kind} {source.place} k_core={k_core}", interactions, items)
    except Exception as error:  # noqa: BLE001 - of three libraries, and none of them may stop a run
        _logger.warning("%s: prepared data cannot be kept (%s); the run goes on without", place, _one_line(error))
    return interactions, items


def _prepare(source: Source, k_core: int) -> tuple[Interactions, list[dict] | None]:
    """Read a source."""
    interactions = build_interactions(source.load_log(), k_core)
    return interactions, source.load_items(interactions.item_ids)


def _keep(place: Path, origin: str, interactions: Interactions, items: list[dict] | None) -> None:
    """Write prepared data beside its place, read it back, and move it there; leave it to another process that is at it."""
    from kdsr_jax.data import shard_writer

    arrays = interactions.user_ids, interactions.items, interactions.timestamps
    needed = sum(_COPIES * a.nbytes for a in arrays if a is not None and not isinstance(a, np.memmap))
    if needed > machine_memory():
        raise OSError(f"writing them and reading them back takes {needed:,} bytes, more than this machine has")
    root = place.parent
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for left_behind in root.glob(f"{_TEMPORARY}*"):  # by processes that were killed
            shutil.rmtree(left_behind, ignore_errors=True)
        temporary = root / f"{_TEMPORARY}{os.getpid()}"
        try:
            temporary.mkdir()
            shard_writer.write(temporary, interactions)
            shards.complete(temporary, interactions.item_ids, items, origin)
            if not _same(interactions, shards.read(temporary)[0]):
                raise OSError("it reads back differently")
            _discard(place)
            os.rename(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _discard_stale(place, origin)


def _same(first: Interactions, second: Interactions) -> bool:
    """Tell whether interactions agree to the last bit."""
    names = [field.name for field in dataclasses.fields(Interactions)]
    return all(_equal(getattr(first, name), getattr(second, name)) for name in names)


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    """Tell whether arrays agree, block by block, as they need not fit the memory."""
    if first is None or second is None:
        return first is second
    alike = first.dtype == second.dtype and first.shape == second.shape
    blocks = (slice(begin, begin + _BLOCK) for begin in range(0, len(first), _BLOCK))
    return alike and all(np.array_equal(first[rows], second[rows]) for rows in blocks)


def _discard_stale(place: Path, origin: str) -> None:
    """Remove what was prepared of the same origin when its contents, or the form, were others."""
    for other in place.parent.iterdir():
        if other != place and shards.origin_of(other) == origin:
            _logger.warning("%s: prepared data was stale, the source has changed; it was made anew", other)
            _discard(other)


def _discard(folder: Path) -> None:
    """Remove a folder, or what stands in its place; it disappears at once, so that no process finds half of it."""
    doomed = folder.with_name(f"{_TEMPORARY}{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
