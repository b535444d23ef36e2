"""Pictures of items for a page: small local files, or the planted shop's own drawings."""

import base64
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from kdsr_jax.data.sources.folder import place
from kdsr_jax.data.sources.planted import icon

MOST_BYTES = 64 * 1024  # of one file; larger ones are left out, as a page should stay small
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_STARTS = {"jpeg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF.{4}WEBP", "gif": rb"GIF8[79]a"}
_KINDS = {kind: re.compile(start, re.DOTALL) for kind, start in _STARTS.items()}
_LONGEST_START = 12
_URI = re.compile(r"data:image/(?:jpeg|png|webp|gif|svg\+xml);base64,[A-Za-z0-9+/]+={0,2}")


class Picture(NamedTuple):
    """A picture that was found.

    Attributes:
        kind: "jpeg", "png", "webp", "gif" or "svg+xml".
        read: returns its content, b"" where it cannot be read any more.
    """

    kind: str
    read: Callable[[], bytes]


def find_picture(item_id: str, item: dict, dataset, root: str, most_bytes: int = MOST_BYTES) -> Picture | None:
    """Find an item's picture; None where there is none.

    The planted shop draws it; a folder data set may have ``<root>/<name>/images/<item_id>.jpg``, or with another of
    ``_ENDINGS``. What is not a small file of one of these kinds by its first bytes counts as no picture.

    Args:
        item_id: raw id.
        item: metadata, maybe empty.
        dataset: Dataset that the item belongs to.
        root: the config's ``data.root``.
        most_bytes: size of a file, above which it is left out.
    """
    if dataset.oracle is not None:
        return Picture("svg+xml", lambda: icon(item).encode()) if item else None
    folder = place(root, dataset.name) / "images"
    if not root or item_id in (".", "..") or pathlib.PurePath(item_id).name != item_id:
        return None  # an id is no path
    for ending in _ENDINGS:
        file = folder / (item_id + ending)
        first = _read_small(file, most_bytes, _LONGEST_START)
        kind = next((kind for kind, start in _KINDS.items() if start.match(first)), None)
        if kind:
            return Picture(kind, lambda: _read_small(file, most_bytes, most_bytes))  # noqa: B023 - returned at once
    return None


def item_picture(item_id: str, item: dict, dataset, root: str) -> str | None:
    """Return an item's picture as a data URI, or None where there is none; arguments as in ``find_picture``."""
    found = find_picture(item_id, item, dataset, root)
    content = found.read() if found else b""
    return f"data:image/{found.kind};base64,{base64.b64encode(content).decode()}" if content else None


def is_picture(uri: object) -> bool:
    """Tell whether a value is a data URI of the form that ``item_picture`` makes."""
    return isinstance(uri, str) and _URI.fullmatch(uri) is not None


def _read_small(file, most_bytes, count):
    """Return the first ``count`` bytes of a file; b"" where there is none or it is too large."""
    try:
        if not file.is_file() or file.stat().st_size > most_bytes:
            return b""
        with file.open("rb") as stream:
            return stream.read(count)
    except (OSError, ValueError):  # a name that is too long or holds a zero byte
        return b""
