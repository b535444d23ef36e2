"""JSON files of a run's folder, read without complaint: they may be missing, damaged, or just being written."""

import json
import pathlib
from typing import Any

from kdsr_jax.errors import UserError


def read_json(file: pathlib.Path) -> Any:
    """Return a JSON file's content, or None where there is none that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def saved_run(folder: pathlib.Path, finished: bool = False) -> dict[str, Any]:
    """Return the content of a run's config.json, a dict with the dict "config".

    Raises:
        UserError: there is no run in the folder or, where that is asked for, none that is finished.
    """
    saved = read_json(folder / "config.json")
    if not (isinstance(saved, dict) and isinstance(saved.get("config"), dict)):
        raise UserError(f"{folder}: holds no run of kdsr_jax; give the --workdir of a run")
    if finished and read_json(folder / "result.json") is None:
        raise UserError(f"{folder}: the run is not finished; train it to the end first")
    return saved


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
