"""What encoders read of items: one text each by a recipe, and the files of pictures."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_NO_TEXT = ("item_id", "image")


def text_fields(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that hold text in at least one item, the title first, then in the order of their appearance."""
    found = dict.fromkeys(
        name for item in items for name, value in item.items() if name not in _NO_TEXT and _texts(value)
    )
    return sorted(found, key=lambda name: name != "title")


def render(item: Mapping[str, Any], fields: Sequence[str], characters: int, template: str = "") -> str:
    """Return an item's text, in one line; "" where it has none.

    Args:
        item: metadata.
        fields: columns to take, in this order; lists are joined by commas.
        characters: most of each.
        template: instead: a text with fields in braces; "" where an item has nothing for any of them.
    """
    if template:
        used = {name: _as_text(item.get(name)) for name in template_fields(template)}
        return " ".join(template.format(**used).split()) if any(used.values()) else ""
    parts = [_as_text(item.get(name))[:characters].strip() for name in fields]
    return ". ".join(part for part in parts if part)


def template_fields(template: str) -> list[str]:
    """Return the names in a template's braces."""
    import string

    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def picture_files(folder: pathlib.Path, item_ids: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the file <item id>.<ending> of each item that has a readable one in a folder; of several, the first of ENDINGS."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if os.access(entry.path, os.R_OK) and entry.is_file()}
    lower = {name.lower(): name for name in sorted(names)}
    files = {}
    for raw in item_ids:
        found = [raw + end for end in ENDINGS if raw + end in names] or [
            lower[name] for end in ENDINGS if (name := raw.lower() + end) in lower and lower[name].startswith(raw)
        ]
        if found:
            files[raw] = folder / found[0]
    return files


def _texts(value):
    listed = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
    return listed or (isinstance(value, str) and value.strip())


def _as_text(value):
    if value is None or isinstance(value, dict):
        return ""
    joined = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(joined.encode(errors="replace").decode().split())  # half an emoji is no UTF-8
