"""Columns of a log as numbers, gathered batch after batch: ids as codes, times; within bounded memory.

A row takes 4 bytes a column of ids and 8 of times (``spill.Numbers``). Besides, every different id is in memory, and one
batch of texts.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdsr_jax.data.spill import Numbers
from kdsr_jax.errors import UserError

ID_TYPE = pa.dictionary(pa.int32(), pa.string())
_MERGED_ROWS = 2**23  # rows whose dictionaries are merged at once: each time, all ids so far are hashed again
_CONVERTED = 2**20  # ids that are Python objects at once
_MOST_CHARACTERS = 2**29  # of all ids of one column, each as long as the longest; 2 GB


class BadValue(Exception):
    """A value that is no id or no time.

    Attributes:
        row: its row in the batch, from 0.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


class Ids:
    """A column of ids: codes that count the different ids in the order in which they are met."""

    def __init__(self, name: str) -> None:
        self._name, self._codes = name, Numbers()
        self._known, self._waiting, self._rows = pa.array([], pa.string()), [], 0

    def add(self, column: pa.Array) -> None:
        """Take a batch of texts, whole numbers, or dictionaries of them.

        Raises:
            BadValue: an id is missing, empty, holds a line break, or begins or ends in a zero, which numpy would lose.
        """
        encoded = _encoded(column)
        texts = encoded.dictionary
        bad = pc.or_(pc.equal(texts, ""), pc.match_substring(texts, "\n"))
        bad = pc.or_(bad, pc.or_(pc.starts_with(texts, "\0"), pc.ends_with(texts, "\0")))
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        # A missing id has code -1, which picks the True at the end; a quote that is never closed swallows whole rows.
        rows = np.flatnonzero(np.append(bad.to_numpy(zero_copy_only=False), True)[codes])
        if len(rows):
            raise BadValue(
                int(rows[0]),
                f"{self._name!r} is empty, missing, or holds a line break or zero byte (an unclosed quote?)",
            )
        self._waiting.append(encoded)
        self._rows += len(encoded)
        if self._rows >= _MERGED_ROWS:
            self._merge()

    def arrays(self, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes [n] int32 and the ids that they stand for; nothing can be added any more.

        Args:
            where: what an error names.

        Raises:
            UserError: an id is so long that all of them as text of numpy, which gives each the room of the longest, are
                too many characters.
        """
        self._merge()
        count, lengths = len(self._known), pc.utf8_length(self._known)
        longest = pc.max(lengths).as_py() or 1
        if longest * count > _MOST_CHARACTERS:
            text = self._known[pc.index(lengths, longest).as_py()].as_py()
            raise UserError(f"{where}: {self._name!r} {text[:20]!r}... has {longest:,} characters, too many for an id")
        names = np.empty(count, f"U{longest}")
        for begin in range(0, count, _CONVERTED):
            names[begin : begin + _CONVERTED] = self._known[begin : begin + _CONVERTED].to_numpy(zero_copy_only=False)
        self._known = None
        return self._codes.array(np.int32), names

    def _merge(self) -> None:
        """Turn the codes of waiting batches, each of a dictionary of its own, into codes of all ids so far."""
        known = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._known)
        merged = pa.chunked_array([known, *self._waiting]).unify_dictionaries()  # which only appends to the first
        self._known = merged.chunk(0).dictionary
        for chunk in merged.chunks[1:]:
            self._codes.append(chunk.indices.to_numpy())
        self._waiting, self._rows = [], 0


class Times:
    """A column of times: whole numbers, or fractions where one of them is not whole."""

    def __init__(self) -> None:
        self._numbers, self._fractions, self._sizes = Numbers(), [], []

    def add(self, column: pa.Array) -> None:
        """Take a batch of numbers or of texts that are numbers.

        Raises:
            BadValue: a time is missing or not a finite number.
        """
        for kind in (pa.int64(), pa.float64()):
            try:
                values = column.cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                continue
            numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
            rows = np.flatnonzero(~values.is_valid().to_numpy(zero_copy_only=False) | ~np.isfinite(numbers))
            if len(rows):
                raise _bad_time(column, int(rows[0]))
            self._numbers.append(numbers.view(np.int64))
            self._fractions.append(kind == pa.float64())
            self._sizes.append(len(numbers))
            return
        is_number = pc.match_substring_regex(column.cast(pa.string()), r"^-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        raise _bad_time(column, int(np.argmin(is_number.fill_null(False).to_numpy(zero_copy_only=False))))

    def array(self) -> np.ndarray:
        """Return the times [n], int64 or float64; nothing can be added any more."""
        numbers = self._numbers.array(np.int64)
        if not any(self._fractions):
            return numbers
        begin = 0
        for size, are_fractions in zip(self._sizes, self._fractions, strict=True):
            part = numbers[begin : begin + size]
            if not are_fractions:
                part.view(np.float64)[:] = part.astype(np.float64)
            begin += size
        return numbers.view(np.float64)


def _encoded(column: pa.Array) -> pa.DictionaryArray:
    """Return a column of ids as dictionary of texts with codes of 32 bits."""
    if not pa.types.is_dictionary(column.type):
        return pc.dictionary_encode(column.cast(pa.string()))
    if column.type == ID_TYPE:
        return column
    indices, values = column.indices.cast(pa.int32()), column.dictionary.cast(pa.string())
    return pa.DictionaryArray.from_arrays(indices, values)


def _bad_time(column: pa.Array, row: int) -> BadValue:
    return BadValue(row, f"timestamp {column[row].as_py()!r} is not a number")
