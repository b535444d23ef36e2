"""Reading compressed files that may be hostile: nothing is ever unpacked to disk, and sizes are capped."""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kdsr_jax.errors import UserError

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
# Logs and texts compress to a third .. a twentieth; what claims far more than that is a bomb. Small ones do no harm.
_MOST_RATIO = 200
_HARMLESS = 64 * 2**20  # bytes
_MOST_ENTRIES = 1000
_LONGEST_LINE = 2**20  # bytes
_BUFFER = 2**16  # bytes


def is_there(path: Path, folder: bool = False) -> bool:
    """Say whether there is a file, or a folder.

    Raises:
        UserError: that cannot be said, as in a folder that may not be read.
    """
    try:
        return path.is_dir() if folder else path.is_file()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressing `.gz`.

    Raises:
        UserError: it cannot be opened; or later, while reading, it unpacks to far more than a log or text would.
    """
    try:
        if path.suffix != ".gz":
            return open(path, "rb")
        return io.BufferedReader(_Capped(gzip.open(path, "rb"), path), _BUFFER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and bytes of each line of a file that is not blank, decompressing `.gz`.

    Raises:
        UserError: the file cannot be read or unpacked, or a line is longer than a mebibyte.
    """
    number = 0
    try:
        with open_file(path) as file:
            for number, line in _lines(file, str(path)):
                yield number, line
    except GZIP_ERRORS as error:
        raise UserError(f"{path}: broken gzip file after line {number} ({error})") from None


def zip_lines(path: Path, member: str) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and bytes of each line of a member of a zip file that is not blank.

    Raises:
        UserError: the archive is damaged, has entries that point outside of it, or unpacks to far more than text would;
            the member is missing, or one of its lines is longer than a mebibyte.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = _checked(archive, path, member)
            # The buffer of a zip member is slow where a line has a longest length.
            with io.BufferedReader(archive.open(entry), _BUFFER) as file:
                yield from _lines(file, f"{path}: {member}")
    except _ZIP_ERRORS as error:
        raise UserError(f"{path}: not a readable zip file, cut short or damaged ({error})") from None


def _checked(archive: zipfile.ZipFile, path: Path, member: str) -> zipfile.ZipInfo:
    """Return a member of an archive in which everything is as it should be."""
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise UserError(
            f"{path}: it has {len(entries):,} entries, more than {_MOST_ENTRIES:,}; not the archive expected"
        )
    for entry in entries:
        # Nothing is unpacked, so such an entry could do no harm here; but whoever made it meant some.
        if re.match(r"[/\\]|[A-Za-z]:", entry.filename) or ".." in re.split(r"[/\\]", entry.filename):
            raise UserError(f"{path}: the entry {entry.filename!r} points outside of the archive; do not use this file")
    found = [entry for entry in entries if entry.filename == member]
    if len(found) != 1:
        have = ", ".join(entry.filename for entry in entries[:10]) or "nothing"
        raise UserError(f"{path}: {member} is missing or occurs twice; the archive has: {have}")
    if found[0].file_size > max(_HARMLESS, _MOST_RATIO * found[0].compress_size):
        raise UserError(
            f"{path}: {member} claims to unpack to {found[0].file_size:,} bytes; no text compresses so well"
        )
    return found[0]


def _lines(file: BinaryIO, where: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank."""
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{where}: line {number}: longer than {_LONGEST_LINE:,} bytes")
        if not line.isspace():
            yield number, line


class _Capped(io.RawIOBase):
    """A decompressed stream that refuses to grow out of proportion to its file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._size = file, path, 0
        self._most = max(_HARMLESS, _MOST_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """Say that the stream can be read."""
        return True

    def readinto(self, buffer) -> int:
        """Read bytes into a buffer and return how many."""
        count = self._file.readinto(buffer)
        self._size += count
        if self._size > self._most:
            raise UserError(
                f"{self._path}: it unpacks to more than {self._most:,} bytes; no log or text compresses so well"
            )
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
