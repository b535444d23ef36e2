"""A features file that grows: what a killed encoding has done is not done again, nor what an earlier one did."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file

PART_SECONDS = 20.0  # what a killed encoding loses at most, about
NAMES = ("item_id", "features", "input")


class FeatureStore:
    """The file features/<entry>.npz, its sidecar <entry>.json, and the parts that it is put together from.

    Arrays "item_id" [n] and "features" [n, d], as every features file has them, and "input" [n], hashes of what was encoded.

    Attributes:
        file: the features file.
    """

    def __init__(self, folder, entry, recipe):
        """Read what is there.

        Args:
            folder: features/ of a data set; it exists.
            entry: <modality>-<encoder>.
            recipe: plain data, encoder and settings; vectors by another recipe are not mixed in.

        Raises:
            UserError: there is a file by another recipe, or one that nothing is known of.
        """
        self.file = folder / f"{entry}.npz"
        self._sidecar, self._parts = folder / f"{entry}.json", folder / f".{entry}.parts"
        self._recipe = json.loads(json.dumps(recipe))
        self._done: dict[str, tuple[str, np.ndarray]] = {}
        self._fresh: dict[str, tuple[str, np.ndarray]] = {}
        self._written = time.monotonic()
        if self.file.exists():
            self._check_recipe()
            self._take(self.file)
        try:
            self._take_parts()
        except OSError as error:
            raise UserError(f"{self._parts}: cannot be written ({error.strerror})") from error

    def knows(self, item_id: str, digest: str) -> bool:
        """Say whether an item's vector is there, made of this input."""
        return self._done.get(item_id, ("", None))[0] == digest

    def add(self, item_ids: Sequence[str], digests: Sequence[str], vectors: np.ndarray) -> None:
        """Take vectors [n, d]; they are on the disk after PART_SECONDS at most.

        Raises:
            UserError: a vector holds NaN or Inf, or the disk is full.
        """
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise UserError(f"{self.file}: the encoder gives NaN or Inf for item {item_ids[bad[0]]!r}")
        self._fresh |= {raw: (one, row) for raw, one, row in zip(item_ids, digests, vectors, strict=True)}
        if time.monotonic() - self._written > PART_SECONDS:
            self._flush()

    def finish(self, wanted: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Write file and sidecar, then remove the parts.

        Args:
            wanted: raw item id -> hash of its input, of the items in the file.
            facts: plain data for the sidecar besides the recipe.
        """
        self._flush()
        kept = [raw for raw, digest in wanted.items() if self.knows(raw, digest)]
        rows = np.stack([self._done[raw][1] for raw in kept]).astype(np.float32)
        narrow = np.abs(rows).max(initial=0) < 6e4  # float16 ends at 65,504
        arrays = {"item_id": np.array(kept), "features": rows.astype(np.float16 if narrow else np.float32)}
        arrays["input"] = np.array([wanted[raw] for raw in kept])
        try:
            replace_file(self.file, lambda file: np.savez(file, **arrays))
            digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
            content = self._recipe | dict(facts) | {"items": len(kept), "sha256": digest}
            replace_file(self._sidecar, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
            shutil.rmtree(self._parts)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written ({error.strerror})") from error

    def _check_recipe(self):
        try:
            saved = json.loads(self._sidecar.read_text())
        except (OSError, ValueError):
            if self._parts_are_ours():  # killed between the file and its sidecar
                return
            raise UserError(
                f"{self.file}: exists, but not {self._sidecar.name}, which would say how it was made; rename or delete it"
            ) from None
        differing = [
            f"{name}: {saved.get(name)} -> {value}" for name, value in self._recipe.items() if saved.get(name) != value
        ]
        if differing:
            raise UserError(f"{self.file}: was made otherwise; rename or delete it. {'; '.join(differing)}")

    def _parts_are_ours(self):
        job = self._parts / "recipe.json"
        return job.is_file() and job.read_text() == json.dumps(self._recipe)

    def _take_parts(self):
        if not self._parts_are_ours():
            shutil.rmtree(self._parts, ignore_errors=True)
            self._parts.mkdir()
            said = json.dumps(self._recipe).encode()
            replace_file(self._parts / "recipe.json", lambda file: file.write(said))
        for part in sorted(self._parts.glob("*.npz")):
            self._take(part)

    def _take(self, file):
        arrays = read_arrays(file, NAMES)
        rows = zip(arrays["item_id"], arrays["input"], arrays["features"], strict=True)
        self._done |= {str(raw): (str(digest), row) for raw, digest, row in rows}

    def _flush(self):
        if self._fresh:
            columns = zip(*((raw, row, digest) for raw, (digest, row) in self._fresh.items()), strict=True)
            arrays = dict(zip(NAMES, map(np.array, columns), strict=True))
            part = self._parts / f"{len(list(self._parts.glob('*.npz'))):06}.npz"
            try:
                replace_file(part, lambda file: np.savez(file, **arrays))
            except OSError as error:
                raise UserError(f"{part}: cannot be written ({error.strerror})") from error
            self._done |= self._fresh
            self._fresh = {}
        self._written = time.monotonic()


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Make a folder where there is none, and hold it; one process encodes into it at a time.

    Raises:
        UserError: it cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder}: another process is encoding into this folder") from None
    finally:
        os.close(handle)


def digest(content: bytes) -> str:
    """Return a short hash, 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]
