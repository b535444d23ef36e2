"""Your own data: a folder with `interactions.csv`, `.csv.gz` or `.parquet` and, optionally, `items.*` of the same or `.jsonl`."""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from kdsr_jax.data.arrays import machine_memory
from kdsr_jax.data.interactions import RawLog
from kdsr_jax.data.sources.archives import GZIP_ERRORS, numbered_lines, open_file
from kdsr_jax.data.sources.base import Source, digest_of_files, items_by_index
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")

LOG_NAMES = ("interactions.csv", "interactions.csv.gz", "interactions.parquet")
ITEM_NAMES = ("items.jsonl", "items.jsonl.gz", "items.csv", "items.csv.gz", "items.parquet")
_ID_COLUMNS = ("user_id", "item_id")
_TIME_COLUMN = "timestamp"
_MOST_ROWS = 2**31 - 1
_MOST_CHARACTERS = 2**29  # of all ids of one column, each as long as the longest; 2 GB
_ID_TYPE = pa.dictionary(pa.int32(), pa.string())


def find_log(folder: str | Path) -> Path | None:
    """Return the interactions file of a folder, or None where there is none.

    Args:
        folder: folder of one data set.

    Raises:
        UserError: there is more than one.
    """
    return _find_one(Path(folder), LOG_NAMES)


def place(root: str | Path, name: str) -> Path:
    """Return the folder of a data set: `<root>/<name>`, or the root itself where only that holds an interactions file."""
    below = Path(root) / name
    return Path(root) if str(root) and not below.is_dir() and find_log(root) else below


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
    files = [_require_log(folder), _find_one(Path(folder), ITEM_NAMES)]
    digest = digest_of_files(file for file in files if file)
    if renamed := {ours: theirs for ours, theirs in (columns or {}).items() if ours != theirs}:
        digest = hashlib.sha256(f"{digest} {sorted(renamed.items())}".encode()).hexdigest()
    return Source(
        "folder",
        os.path.abspath(folder),
        digest,
        lambda: load_log(folder, columns),
        lambda item_ids: load_items(folder, item_ids, columns),
    )


def load_log(folder: str | Path, columns: Mapping[str, str] | None = None) -> RawLog:
    """Read the interactions of a folder.

    Columns: `user_id`, `item_id` (always strings: "007" stays "007"), `timestamp` (optional, a number). Others, such as
    `rating`, are ignored: every row is an interaction (paper §4).

    Args:
        folder: folder of one data set.
        columns: see ``find``.

    Returns:
        The log in the order of the file.

    Raises:
        UserError: no file or more than one, a column is missing, no rows, a broken file or row, an empty id, or a
            timestamp that is not a number; the line names the file and, where one is at fault, the row.
    """
    path = _require_log(folder)
    own = (*_ID_COLUMNS, _TIME_COLUMN)
    called = {(columns or {}).get(name, name): name for name in own}
    table = _read_parquet(path, called) if path.suffix == ".parquet" else _read_csv(path, called)
    if table.num_rows == 0:
        raise UserError(f"{path}: the log is empty: it has no interactions")
    user_codes, user_names = _encode(table["user_id"], path, "user_id")
    item_codes, item_names = _encode(table["item_id"], path, "item_id")
    timestamps = _timestamps(table[_TIME_COLUMN], path) if _TIME_COLUMN in table.column_names else None
    return RawLog(user_codes, item_codes, user_names, item_names, timestamps)


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
    ignored = len(metadata.keys() - set(item_ids.tolist()))
    if ignored:
        _logger.warning("%s: ignored %s items outside the log", path, f"{ignored:,}")
    return items_by_index(metadata, item_ids)


def _require_log(folder: str | Path) -> Path:
    """Return the interactions file of a folder that must have one."""
    path = find_log(folder)
    if path is None:
        raise UserError(f"{folder}: no interactions file; looked for {', '.join(LOG_NAMES)}")
    return path


def _find_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the one file of `folder` with one of the `names`."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: {' and '.join(path.name for path in found)} both exist; keep one")
    return found[0] if found else None


def _item_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield place and object of every line of item metadata."""
    for number, line in numbered_lines(path):
        where = f"{path}: line {number}"
        try:
            item = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(item, dict):
            raise UserError(f"{where}: not a JSON object")
        yield where, item


def _item_rows(path: Path, id_column: str) -> Iterator[tuple[str, dict]]:
    """Yield place and object of every row of a table of item metadata; empty cells are left out."""
    if path.suffix == ".parquet":
        try:
            table = pa.parquet.read_table(path)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
    else:
        table = _read_csv(path, None)
    if id_column not in table.column_names:
        raise UserError(f"{path}: column {id_column!r} is missing; the file has: {', '.join(table.column_names)}")
    rows = (values for batch in table.to_batches() for values in batch.to_pylist())
    for row, values in enumerate(rows, 1):
        yield f"{path}: row {row}", {name: value for name, value in values.items() if value not in (None, "")}


def _read_csv(path: Path, called: Mapping[str, str] | None) -> pa.Table:
    """Read a csv file: the columns in use, under our names (``called``: theirs -> ours), or all, as text (None)."""
    try:
        with open_file(path) as file:
            header = _header(file, path)
        columns = header if called is None else _columns_in_use(header, path, called)
        types = {name: _ID_TYPE if (called or {}).get(name) in _ID_COLUMNS else pa.string() for name in columns}
        with open_file(path) as file:
            table = pa.csv.read_csv(
                file,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(include_columns=columns, column_types=types),
            )
            return table if called is None else table.rename_columns([called[name] for name in columns])
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: broken gzip file, cut short or damaged ({error})") from None
    except pa.ArrowInvalid as error:
        # Arrow names no row when it reads in blocks; the slow reader finds it.
        _raise_first_bad_row(path)
        raise UserError(f"{path}: not readable as csv ({str(error).splitlines()[0]})") from None


def _header(file: BinaryIO, path: Path) -> list[str]:
    """Return the column names of a csv file."""
    try:
        names = next(csv.reader([file.readline().decode("utf-8-sig")]), None)
    except UnicodeDecodeError:
        raise UserError(f"{path}: row 0 (line 1, the header): not UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: row 0 (line 1, the header): not readable as csv ({error})") from None
    if not names:
        raise UserError(f"{path}: the log is empty: it has not even a header")
    return names


def _columns_in_use(names: list[str], path: Path, called: Mapping[str, str]) -> list[str]:
    """Check the column names; return those that are read."""
    for column, ours in called.items():
        if column not in names and (ours in _ID_COLUMNS or column != ours):  # a time that is named must be there
            hint = "" if column != ours else f"; --config.data.columns.{ours}=NAME says what it is called"
            raise UserError(f"{path}: column {column!r} is missing; the file has: {', '.join(names)}{hint}")
    wanted = [column for column in called if column in names]
    for column in wanted:
        if names.count(column) > 1:
            raise UserError(f"{path}: column {column!r} occurs more than once")
    return wanted


def _raise_first_bad_row(path: Path) -> None:
    """Raise a line that names the first ragged or non-UTF-8 row, where there is one."""
    rows = _csv_rows(path)
    width = len(next(rows)[2])
    for row, line, fields in rows:
        if len(fields) != width:
            raise UserError(f"{path}: row {row} (line {line}): {len(fields)} fields where the header has {width}")
        try:
            "".join(fields).encode("latin-1").decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: row {row} (line {line}): not UTF-8") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """Yield number (the header is 0), last line and fields of every row that is not blank; for error messages only."""
    with open_file(path) as file:
        # Latin-1 takes every byte, so a broken character does not stop the parser before its row is known.
        reader = csv.reader(line.decode("latin-1") for line in file)
        try:
            yield from ((row, reader.line_num, fields) for row, fields in enumerate(filter(None, reader)))
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: not readable as csv ({error})") from None


def _name_row(path: Path, row: int) -> str:
    """Name a data row, counted from 1, and in a csv file its line."""
    if path.suffix == ".parquet":
        return f"{path}: row {row}"
    return f"{path}: row {row} (line {next(line for number, line, _ in _csv_rows(path) if number == row)})"


def _read_parquet(path: Path, called: Mapping[str, str]) -> pa.Table:
    """Read the columns in use of a parquet file, under our names (``called``: theirs -> ours)."""
    try:
        metadata, schema = pa.parquet.read_metadata(path), pa.parquet.read_schema(path)
        columns = _columns_in_use(schema.names, path, called)
        _check_types(schema, columns, path, called)
        _check_claims(metadata, columns, path)
        ids = [name for name in columns if called[name] in _ID_COLUMNS]
        table = pa.parquet.read_table(path, columns=columns, read_dictionary=ids)
        table.validate(full=True)  # a damaged file may hold codes beyond its dictionary
        return table.rename_columns([called[name] for name in table.column_names])
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _check_types(schema: pa.Schema, columns: list[str], path: Path, called: Mapping[str, str]) -> None:
    """Raise where a column is neither of ids nor of times; what is left takes a few bytes a row."""
    for name in columns:
        kind = schema.field(name).type
        if called[name] == _TIME_COLUMN:
            if not (pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
                raise UserError(f"{path}: column {name!r} is of type {kind}; times must be numbers")
            continue
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise UserError(f"{path}: column {name!r} is of type {kind}; ids must be strings or whole numbers")


def _check_claims(metadata: pa.parquet.FileMetaData, columns: list[str], path: Path) -> None:
    """Raise where a parquet file claims more than can be read; run lengths make a billion equal rows a few bytes."""
    # Nothing is asked of single columns: over damaged ones pyarrow ends the process.
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(groups))
    if rows > _MOST_ROWS:
        raise UserError(f"{path}: it claims {rows:,} rows, more than {_MOST_ROWS:,}")
    needed = rows * len(columns) * 16  # a number or code for arrow, and the same for numpy
    if needed > machine_memory():
        raise UserError(f"{path}: it claims {rows:,} rows, which need {needed:,} bytes, more than this machine has")


def _encode(column: pa.ChunkedArray, path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes [n] int32 of a column of ids and the ids that they stand for."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column.cast(pa.string()))
    encoded = column.unify_dictionaries().combine_chunks()
    texts = encoded.dictionary.cast(pa.string()).to_pylist()
    longest = max(texts, key=len, default="")
    if len(longest) * len(texts) > _MOST_CHARACTERS:  # numpy gives every id the room of the longest
        raise UserError(f"{path}: {name!r} {longest[:20]!r}... has {len(longest):,} characters, too many for an id")
    names = np.array(texts, dtype=str)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    # A missing id has code -1, which picks the True at the end; a quote that is never closed swallows whole rows.
    bad = np.flatnonzero(
        np.array([*("\n" in text or text.strip("\0") != text or not text for text in texts), True])[codes]
    )
    if len(bad):
        raise UserError(f"{_name_row(path, bad[0] + 1)}: {name!r} is empty or holds a line break (an unclosed quote?)")
    return codes, names


def _timestamps(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """Return a column of times as [n] int64, or float64 where some are not whole."""
    for kind in (pa.int64(), pa.float64()):
        try:
            values = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
        bad = np.flatnonzero(~values.is_valid().to_numpy() | ~np.isfinite(values.fill_null(0).to_numpy()))
        if len(bad):
            raise _bad_timestamp(column, int(bad[0]), path)
        return values.to_numpy()
    is_number = pc.match_substring_regex(column.cast(pa.string()), r"^-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    raise _bad_timestamp(column, int(np.argmin(is_number.fill_null(False).to_numpy())), path)


def _bad_timestamp(column: pa.ChunkedArray, row: int, path: Path) -> UserError:
    """Build the error that names a row without a usable time."""
    return UserError(f"{_name_row(path, row + 1)}: timestamp {column[row].as_py()!r} is not a number")
