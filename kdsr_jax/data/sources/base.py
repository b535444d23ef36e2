"""What every source says of a data set before it is read."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdsr_jax.data.interactions import RawLog
from kdsr_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """A data set that can be read, and how to tell whether it is still the same.

    Attributes:
        kind: "folder", "planted", "movielens" or "amazon".
        place: what stays the same when the contents change, such as the path of the folder.
        digest: sha256 of all that `load_log` and `load_items` read.
        load_log: reads the interactions.
        load_items: reads the metadata, N + 1 objects by item index, of raw ids [N + 1]; None where there are none.
    """

    kind: str
    place: str
    digest: str
    load_log: Callable[[], RawLog]
    load_items: Callable[[np.ndarray], list[dict] | None]


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return the sha256 of the names and contents of files, in the order given.

    Raises:
        UserError: one cannot be read.
    """
    lines = [f"{file_digest(path)}  {path.name}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def items_by_index(metadata: dict[str, dict], item_ids: np.ndarray) -> list[dict]:
    """Return the metadata of raw ids [N + 1], N + 1 objects; empty for padding and for ids without any."""
    return [{}, *(metadata.get(item_id, {}) for item_id in item_ids[1:].tolist())]
