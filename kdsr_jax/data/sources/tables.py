"""Tables of csv and parquet files that anyone may have written, batch after batch; a mistake is one line that names it."""

import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kdsr_jax.cache import cache_folder
from kdsr_jax.data.sources.archives import GZIP_ERRORS, open_file
from kdsr_jax.data.sources.codes import ID_TYPE
from kdsr_jax.data.spill import machine_memory
from kdsr_jax.errors import UserError

ID_COLUMNS = ("user_id", "item_id")
TIME_COLUMN = "timestamp"
_MOST_ROWS = 2**31 - 1
_BATCH_ROWS = 2**20  # of a parquet file
_BLOCK_BYTES = 2**24  # of a csv file
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)


def batches(paths: Sequence[Path], called: Mapping[str, str]) -> Iterator[tuple[Path, int, pa.RecordBatch]]:
    """Read the columns in use of a csv file, or of parquet files of which each goes on where the one before it ends.

    Args:
        paths: one csv file, or any number of parquet files.
        called: what the columns are called: theirs -> ours, of ids and of time.

    Yields:
        The file, the number of rows of it that came before, and the rows, under our names; ids are texts, whole numbers or
        dictionaries of them.

    Raises:
        UserError: a file is broken or claims more than can be read, a column is missing, occurs twice or is of a wrong
            type, or only some files have times.
    """
    read = _csv_batches if paths[0].suffix != ".parquet" else _parquet_batches
    if read is _parquet_batches:
        _check_parquet(paths, called)
    for path in paths:
        begin = 0
        for batch in read(path, called):
            yield path, begin, batch.rename_columns([called[name] for name in batch.schema.names])
            begin += batch.num_rows


def rows(path: Path) -> Iterator[dict]:
    """Yield every row of a csv or parquet file, by the names of its columns; of a csv file all are texts.

    Raises:
        UserError: the file is broken.
    """
    if path.suffix == ".parquet":
        try:
            table = pa.parquet.read_table(path)
            table.validate(full=True)
        except _ARROW_ERRORS as error:
            raise _unreadable_parquet(path, error) from None
        parts = table.to_batches()
    else:
        parts = _csv_batches(path, None)
    for batch in parts:
        yield from batch.to_pylist()


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a csv or parquet file.

    Raises:
        UserError: the file is broken.
    """
    if path.suffix == ".parquet":
        try:
            return pa.parquet.read_schema(path).names
        except _ARROW_ERRORS as error:
            raise _unreadable_parquet(path, error) from None
    try:
        with open_file(path) as file:
            return _header(file, path)
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: broken gzip file, cut short or damaged ({error})") from None


def name_row(path: Path, row: int) -> str:
    """Name a data row, counted from 1, and in a csv file its line."""
    if path.suffix == ".parquet":
        return f"{path}: row {row}"
    return f"{path}: row {row} (line {next(line for number, line, _ in _csv_rows(path) if number == row)})"


def _csv_batches(path: Path, called: Mapping[str, str] | None) -> Iterator[pa.RecordBatch]:
    """Read a csv file: the columns in use (``called``), or all, as texts (None)."""
    try:
        header = column_names(path)
        columns = header if called is None else _columns_in_use(header, path, called)
        types = {name: ID_TYPE if (called or {}).get(name) in ID_COLUMNS else pa.string() for name in columns}
        with open_file(path) as file:
            quotes = _Quotes(file)
            yield from pa.csv.open_csv(
                quotes,
                read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES),
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(include_columns=columns, column_types=types),
            )
            if quotes.count % 2:  # one that is never closed has swallowed all rows after it
                _raise_unclosed_quote(path)
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: broken gzip file, cut short or damaged ({error})") from None
    except pa.ArrowInvalid as error:
        # Arrow names no row when it reads in blocks; the slow reader finds it.
        _raise_first_bad_row(path)
        raise UserError(f"{path}: not readable as csv ({str(error).splitlines()[0]})") from None


class _Quotes(io.RawIOBase):
    """A file whose quotation marks are counted while it is read.

    Attributes:
        count: of those that were read.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self.count = file, 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to so many bytes."""
        found = self._file.read(size)
        self.count += found.count(b'"')
        return found


def _raise_unclosed_quote(path: Path) -> None:
    """Raise a line that names the row in which a quote is opened that nothing closes, where there is one."""
    with open_file(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, "latin-1", newline=""), strict=True)
        rows, line = 0, 0
        try:
            for _ in reader:
                rows, line = rows + 1, reader.line_num
        except csv.Error as error:
            if "unexpected end" in str(error) or "larger than field limit" in str(error):
                raise UserError(
                    f"{path}: row {rows} (line {line + 1}): a quote is opened that is never closed"
                ) from None


def _header(file: BinaryIO, path: Path) -> list[str]:
    """Return the column names of a csv file."""
    try:
        names = next(csv.reader([file.readline().decode("utf-8-sig")]), None)
    except UnicodeDecodeError:
        raise UserError(f"{path}: row 0 (line 1, the header): not UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: row 0 (line 1, the header): not readable as csv ({error})") from None
    if not names:
        raise UserError(f"{path}: its first line must name the columns, and is blank")
    return names


def _columns_in_use(names: list[str], path: Path, called: Mapping[str, str]) -> list[str]:
    """Check the column names; return those that are read."""
    for column, ours in called.items():
        if column not in names and (ours in ID_COLUMNS or column != ours):  # a time that is named must be there
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


def _parquet_batches(path: Path, called: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Read the columns in use of a parquet file that ``_check_parquet`` has looked at."""
    try:
        wanted = [name for name in called if name in pa.parquet.read_schema(path).names]
        ids = [name for name in wanted if called[name] in ID_COLUMNS]
        with pa.parquet.ParquetFile(path, read_dictionary=ids) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                batch.validate(full=True)  # a damaged file may hold codes beyond its dictionary
                yield batch
    except _ARROW_ERRORS as error:
        raise _unreadable_parquet(path, error) from None


def _check_parquet(paths: Sequence[Path], called: Mapping[str, str]) -> None:
    """Raise where files lack columns, or claim more than can be read, before anything is read of them."""
    columns_of, total = {}, 0
    for path in paths:
        try:
            metadata, schema = pa.parquet.read_metadata(path), pa.parquet.read_schema(path)
        except _ARROW_ERRORS as error:
            raise _unreadable_parquet(path, error) from None
        columns_of[path] = _columns_in_use(schema.names, path, called)
        _check_types(schema, columns_of[path], path, called)
        # Nothing is asked of single columns: over damaged ones pyarrow ends the process.
        groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        total += max(metadata.num_rows, sum(groups))
        _check_claims(total, len(columns_of[path]), path)
    with_most = max(paths, key=lambda path: len(columns_of[path]))
    for path, columns in columns_of.items():
        if len(columns) < len(columns_of[with_most]):
            time = (set(columns_of[with_most]) - set(columns)).pop()
            raise UserError(f"{path}: column {time!r} is missing; {with_most.name} has it")


def _check_types(schema: pa.Schema, columns: list[str], path: Path, called: Mapping[str, str]) -> None:
    """Raise where a column is neither of ids nor of times; what is left takes a few bytes a row."""
    for name in columns:
        kind = schema.field(name).type
        if called[name] == TIME_COLUMN:
            if not (pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
                raise UserError(f"{path}: column {name!r} is of type {kind}; times must be numbers")
            continue
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise UserError(f"{path}: column {name!r} is of type {kind}; ids must be strings or whole numbers")


def _check_claims(rows: int, columns: int, path: Path) -> None:
    """Raise where parquet files up to this one claim too many rows; run lengths make a billion equal rows a few bytes."""
    if rows > _MOST_ROWS:
        raise UserError(f"{path}: it claims {rows:,} rows, more than {_MOST_ROWS:,}")
    needed = rows * columns * 8  # a code is half of that, until the columns of a batch are put together
    if needed > _room():
        raise UserError(f"{path}: it claims {rows:,} rows, which need {needed:,} bytes, more than this machine has")


def _room() -> int:
    """Return the bytes of memory, and of disk for what does not fit it."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return machine_memory() + shutil.disk_usage(folder).free


def _unreadable_parquet(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: not a readable parquet file ({error})")
