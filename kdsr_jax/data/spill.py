"""Arrays that lie in memory or, where they would be a large share of it, in unnamed temporary files that are mapped."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from kdsr_jax.cache import cache_folder
from kdsr_jax.errors import UserError

_MEMORY_SHARE = 16  # an array lies in memory up to a sixteenth of it


def machine_memory() -> int:
    """Return the machine's memory in bytes, or what the environment's KDSR_MEMORY says instead.

    Raises:
        UserError: KDSR_MEMORY is no number.
    """
    given = os.environ.get("KDSR_MEMORY", "")
    if given and not (given.isascii() and given.isdecimal()):
        raise UserError(f"KDSR_MEMORY={given}: give a number of bytes")
    return int(given) if given else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_large(size: int) -> bool:
    """Say whether so many bytes are too large a share of the memory for one array."""
    return size > machine_memory() // _MEMORY_SHARE


def empty(count: int, kind: np.dtype) -> np.ndarray:
    """Return an array [count] of any content, which may be a mapped file.

    Raises:
        UserError: there is no room on the disk.
    """
    size = count * np.dtype(kind).itemsize
    if not is_large(size):
        return np.empty(count, kind)
    with _temporary() as file, file:
        os.posix_fallocate(file.fileno(), 0, size)  # without it, a full disk would end the process at some later write
        return np.memmap(file, kind, "r+")


class Numbers:
    """Numbers of one width, appended piece after piece."""

    def __init__(self) -> None:
        self._pieces, self._bytes, self._file = [], 0, None

    def append(self, piece: np.ndarray) -> None:
        """Append an array.

        Raises:
            UserError: the temporary file cannot be written.
        """
        if self._file is None and not is_large(self._bytes + piece.nbytes):
            self._pieces.append(piece)
        else:
            with _temporary(self._file) as self._file:
                for earlier in self._pieces:
                    self._file.write(np.ascontiguousarray(earlier))
                self._pieces = []
                self._file.write(np.ascontiguousarray(piece))
        self._bytes += piece.nbytes

    def array(self, kind: type) -> np.ndarray:
        """Return all of them as one array, which may be a mapped file; nothing can be appended any more.

        Raises:
            UserError: the temporary file cannot be written.
        """
        if self._file is not None:
            with _temporary(self._file) as file, file:
                file.flush()
                return np.memmap(file, kind, "r+")
        pieces, self._pieces = self._pieces, []
        return np.concatenate(pieces).view(kind) if pieces else np.zeros(0, kind)


@contextlib.contextmanager
def _temporary(file: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Give a temporary file, a new one for None, which goes with the last map of it; a failure closes it and is one line."""
    try:
        if file is None:
            cache_folder().mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115
        yield file
    except OSError as error:
        with contextlib.suppress(OSError, AttributeError):
            file.close()
        raise UserError(
            f"{cache_folder()}: the log is larger than the memory for it, and cannot be kept there ({error.strerror}); "
            "KDSR_CACHE names a folder with room"
        ) from None
