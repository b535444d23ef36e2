"""Your own data: a folder with `interactions.csv`, `.csv.gz` or `.parquet`, or a folder `interactions/` of parquet files.

Optionally, there is `items.*` of the same or `.jsonl`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from kdsr_jax.data.interactions import RawLog
from kdsr_jax.data.sources import tables
from kdsr_jax.data.sources.archives import is_there, numbered_lines
from kdsr_jax.data.sources.base import Source, digest_of_files, items_by_index
from kdsr_jax.data.sources.codes import BadValue, Ids, Times
from kdsr_jax.data.sources.tables import ID_COLUMNS, TIME_COLUMN
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")

_LOG_FOLDER = "interactions"
LOG_NAMES = ("interactions.csv", "interactions.csv.gz", "interactions.parquet", f"{_LOG_FOLDER}/*.parquet")
ITEM_NAMES = ("items.jsonl", "items.jsonl.gz", "items.csv", "items.csv.gz", "items.parquet")


def find_log(folder: str | Path) -> Path | None:
    """Return the interactions file of a folder, or the folder of such files in it, or None where there is none.

    Args:
        folder: folder of one data set.

    Raises:
        UserError: there is more than one.
    """
    return _find_one(Path(folder), LOG_NAMES)


def place(root: str | Path, name: str) -> Path:
    """Return the folder of a data set: `<root>/<name>`, or the root itself where only that holds an interactions file."""
    below = Path(root) / name
    return Path(root) if str(root) and not is_there(below, folder=True) and find_log(root) else below


def find(folder: str | Path, columns: Mapping[str, str] | None = None) -> Source:
    """Find the files of a folder.

    Args:
        folder: folder of one data set.
        columns: what the columns are called in its files, by `user_id`, `item_id`, `timestamp` and `title`; each has its
            own name where it is not named.

    Returns:
        The source; the files are read later.

    Raises:
        UserError: there is no interactions file, more than one of a kind, or a file cannot be read.
    """
    items = _find_one(Path(folder), ITEM_NAMES)
    digest = digest_of_files([*_log_files(folder), *([items] if items else [])])
    place = os.path.abspath(folder)
    if renamed := {ours: theirs for ours, theirs in (columns or {}).items() if ours != theirs}:
        digest = hashlib.sha256(f"{digest} {sorted(renamed.items())}".encode()).hexdigest()
        place = f"{place} {sorted(renamed.items())}"  # read by other columns, the same files are another source
    return Source(
        "folder",
        place,
        digest,
        lambda: load_log(folder, columns),
        lambda item_ids: load_items(folder, item_ids, columns),
    )


def load_log(folder: str | Path, columns: Mapping[str, str] | None = None) -> RawLog:
    """Read the interactions of a folder.

    Columns: `user_id`, `item_id` (always strings: "007" stays "007"), `timestamp` (optional, a number). Others, such as
    `rating`, are ignored: every row is an interaction (paper §4). Files of a folder `interactions/` are read in the order
    of their names.

    Args:
        folder: folder of one data set.
        columns: see ``find``.

    Returns:
        The log in the order of the file or files.

    Raises:
        UserError: no file or more than one, a column is missing, no rows, a broken file or row, an empty id, or a
            timestamp that is not a number; the line names the file and, where one is at fault, the row.
    """
    called = {(columns or {}).get(name, name): name for name in (*ID_COLUMNS, TIME_COLUMN)}
    gathered = {name: Ids(name) for name in ID_COLUMNS} | {TIME_COLUMN: Times()}
    has_times, count = False, 0
    for path, begin, batch in tables.batches(_log_files(folder), called):
        has_times, count = TIME_COLUMN in batch.schema.names, count + batch.num_rows
        for name in batch.schema.names:
            try:
                gathered[name].add(batch.column(name))
            except BadValue as bad:
                raise UserError(f"{tables.name_row(path, begin + bad.row + 1)}: {bad}") from None
    where = str(find_log(folder))
    if count == 0:
        raise UserError(f"{where}: the log is empty: it has no interactions")
    (users, user_names), (items, item_names) = (gathered[name].arrays(where) for name in ID_COLUMNS)
    return RawLog(users, items, user_names, item_names, gathered[TIME_COLUMN].array() if has_times else None)


def load_items(folder: str | Path, item_ids: np.ndarray, columns: Mapping[str, str] | None = None) -> list[dict] | None:
    """Read item metadata, objects with an `item_id`: lines of JSON, or rows of a csv or parquet file.

    Items outside the log are ignored; a warning counts them.

    Args:
        folder: folder of one data set.
        item_ids: [N + 1] unicode, raw item ids by item index; entry 0 is padding.
        columns: see ``find``.

    Returns:
        N + 1 objects by item index, empty for padding and for items without metadata, `item_id` always a string; None
        where the folder has no such file.

    Raises:
        UserError: more than one file, a broken one, or a line or row without a new `item_id`; it is named by number.
    """
    path = _find_one(Path(folder), ITEM_NAMES)
    if path is None:
        return None
    called = {"item_id": "item_id", "title": "title"} | dict(columns or {})
    metadata: dict[str, dict] = {}
    for where, item in _item_lines(path) if ".jsonl" in path.name else _item_rows(path, called["item_id"]):
        item_id = item.get(called["item_id"])
        if isinstance(item_id, bool) or not isinstance(item_id, str | int) or item_id == "":
            raise UserError(f"{where}: {called['item_id']!r} is missing, or neither a string nor a whole number")
        if str(item_id) in metadata:
            raise UserError(f"{where}: item {str(item_id)!r} occurs a second time")
        title = {"title": item[called["title"]]} if called["title"] in item else {}
        metadata[str(item_id)] = item | title | {"item_id": str(item_id)}
    if called["title"] != "title" and metadata and not any("title" in item for item in metadata.values()):
        raise UserError(f"{path}: no item has {called['title']!r}, which --config.data.columns.title names")
    ignored = len(metadata.keys() - set(item_ids.tolist()))
    if ignored:
        _logger.warning("%s: ignored %s items outside the log", path, f"{ignored:,}")
    return items_by_index(metadata, item_ids)


def _log_files(folder: str | Path) -> list[Path]:
    """Return the interactions files of a folder that must have one, in the order in which they are read."""
    path = find_log(folder)
    if path is None:
        raise UserError(f"{folder}: no interactions file; looked for {', '.join(LOG_NAMES)}")
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _find_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the one file of `folder` with one of the `names`, of which a pattern stands for the folder of such files."""
    try:
        found = [folder / name for name in names if (folder / name).is_file()]
        found += [(folder / name).parent for name in names if "*" in name and any(folder.glob(name))]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    if len(found) > 1:
        raise UserError(f"{folder}: {' and '.join(path.name for path in found)} both exist; keep one")
    return found[0] if found else None


def _item_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield place and object of every line of item metadata."""
    for number, line in numbered_lines(path):
        where = f"{path}: line {number}"
        try:
            item = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(item, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, item


def _item_rows(path: Path, id_column: str) -> Iterator[tuple[str, dict]]:
    """Yield place and object of every row of a table of item metadata, of what JSON can hold; empty cells are left out."""
    if id_column not in (names := tables.column_names(path)):
        raise UserError(f"{path}: column {id_column!r} is missing; the file has: {', '.join(names)}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} occurs more than once")
    for row, values in enumerate(tables.rows(path), 1):
        item = {name: value for name, value in values.items() if value not in (None, "")}
        yield f"{path}: row {row}", json.loads(json.dumps(item, default=str))
