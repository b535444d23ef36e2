"""Pictures of items for a page: small local files, or the planted shop's own drawings, as data URIs."""

import base64
import pathlib
import re

from kdsr_jax.data.sources.folder import place
from kdsr_jax.data.sources.planted import icon

MOST_BYTES = 64 * 1024  # of one file; larger ones are left out, as a page should stay small
_KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}
_URI = re.compile(r"data:image/(?:jpeg|png|svg\+xml);base64,[A-Za-z0-9+/]+={0,2}")


def item_picture(item_id: str, item: dict, dataset, root: str) -> str | None:
    """Return an item's picture as a data URI, or None where there is none.

    The planted shop draws it; a folder data set may have ``<root>/<name>/images/<item_id>.jpg`` or ``.png``. What is not
    a small JPEG or PNG file by its first bytes counts as no picture.

    Args:
        item_id: raw id.
        item: metadata, maybe empty.
        dataset: Dataset that the item belongs to.
        root: the config's ``data.root``.
    """
    if dataset.oracle is not None:
        return _uri("svg+xml", icon(item).encode()) if item else None
    folder = place(root, dataset.name) / "images"
    if not root or item_id in (".", "..") or pathlib.PurePath(item_id).name != item_id:
        return None  # an id is no path
    for ending in (".jpg", ".png"):
        content = _read_small(folder / (item_id + ending))
        kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
        if kind:
            return _uri(kind, content)
    return None


def is_picture(uri: object) -> bool:
    """Tell whether a value is a data URI of the form that ``item_picture`` makes."""
    return isinstance(uri, str) and _URI.fullmatch(uri) is not None


def _read_small(file):
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            return b""
        return file.read_bytes()
    except (OSError, ValueError):  # a name that is too long or holds a zero byte
        return b""


def _uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
