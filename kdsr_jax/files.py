"""Writing files by rename, so that each is there whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: str | Path, write: Callable[[BinaryIO], object], shared: bool = False) -> None:
    """Write a file beside its place and move it there once it is on the disk; a failure leaves what was there.

    Args:
        path: of the file; its folder exists.
        write: takes the open file.
        shared: whether several processes may write this file at once.

    Raises:
        OSError: it cannot be written.
        ValueError: the path is none that a file can have.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()  # what it has of a full disk
        raise
