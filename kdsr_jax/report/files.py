"""JSON files of a run's folder, read without complaint: they may be missing, damaged, or just being written."""

import json
import pathlib
from typing import Any


def read_json(file: pathlib.Path) -> Any:
    """Return a JSON file's content, or None where there is none that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(file: pathlib.Path) -> list:
    """Return the objects of a file of JSON lines without those that cannot be read, such as one torn by a kill."""
    lines = []
    try:
        content = file.read_bytes()
    except (OSError, ValueError):
        return lines
    for line in content.splitlines():
        try:
            lines.append(json.loads(line.decode()))
        except (ValueError, RecursionError):
            continue
    return lines
