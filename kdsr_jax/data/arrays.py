"""Reading .npz files that anyone may have written: nothing is unpickled, and no claim of a header is believed unseen."""

import os
import zipfile
from pathlib import Path

import numpy as np

from kdsr_jax.data.spill import machine_memory
from kdsr_jax.errors import UserError

# A stored entry is as long as what it holds; deflate makes nothing longer than 1032 times what it reads.
_MOST_EXPANSION = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
_KINDS = "bifuSU"
_MOST_CHARACTER = 0x10FFFF
_SURROGATES = 0xD800, 0xDFFF


def read_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read named arrays of an .npz file; what else it holds is not looked at.

    Before memory is set aside for an array, its claimed shape must agree with the size of its zip entry, that with the
    compressed size and the file, and all with the memory of the machine.

    Args:
        path: an existing file.
        names: of the arrays, each once.

    Returns:
        The arrays, in native byte order, of numbers, bools or strings.

    Raises:
        UserError: the file or an array is missing, damaged, pickled, or claims more than is there; one line.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = {name: _entry(archive, name, path) for name in names}
            return {name: _read(archive, entry, name, path) for name, entry in entries.items()}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - zip files and headers raise a dozen kinds over broken bytes
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a readable .npz file ({what})") from None


def _entry(archive: zipfile.ZipFile, name: str, path: str | Path) -> zipfile.ZipInfo:
    """Return the one zip entry of an array, its sizes possible."""
    entries = [info for info in archive.infolist() if info.filename == f"{name}.npy"]
    if not entries:
        have = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        shown = ", ".join(repr(other)[1:-1] for other in sorted(have)[:20]) or "none"
        raise UserError(f"{path}: array {name!r} is missing; the file has: {shown}")
    entry = entries[0]
    if len(entries) > 1:
        raise UserError(f"{path}: it has more than one array {name!r}")
    if entry.flag_bits & 1 or entry.compress_type not in _MOST_EXPANSION:
        raise UserError(f"{path}: array {name!r} is encrypted or compressed in another way than numpy does")
    there = min(entry.compress_size, os.path.getsize(path))
    if entry.file_size > there * _MOST_EXPANSION[entry.compress_type]:
        raise UserError(f"{path}: array {name!r} claims {entry.file_size:,} bytes, which {there:,} cannot hold")
    return entry


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, path: str | Path) -> np.ndarray:
    """Read one array, once its header agrees with the entry."""
    with archive.open(entry) as stream:
        shape, fortran_order, dtype = _header(stream)
        where = f"{path}: array {name!r}"
        if dtype.hasobject:
            raise UserError(f"{path}: it holds pickled (object) arrays, which are not read; save plain ones")
        if dtype.kind not in _KINDS or dtype.itemsize == 0:
            raise UserError(f"{where} holds values of type {dtype}; save numbers or strings")
        count = 1
        for size in shape:
            count *= size
        if min(shape, default=0) < 0 or stream.tell() + count * dtype.itemsize != entry.file_size:
            raise UserError(f"{where} claims the shape {list(shape)} of {dtype}, which is not what the file holds")
        if count * dtype.itemsize > machine_memory():
            raise UserError(f"{where} needs {count * dtype.itemsize:,} bytes, more than this machine has")
        flat = np.empty(count, dtype)
        content = memoryview(flat.view(np.uint8)) if count else memoryview(b"")
        while len(content):
            read = stream.readinto(content)
            if not read:
                raise EOFError("it is cut short")
            content = content[read:]
        stream.read(1)  # at its end the stream compares checksums
    flat = flat.astype(dtype.newbyteorder("="), copy=False)
    if dtype.kind == "U":
        _check_characters(flat, where)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def _header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an .npy stream; version 3 is for records, which are not read."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"version {version} of .npy is not read")
    return readers[version](stream)


def _check_characters(flat: np.ndarray, where: str) -> None:
    """Raise where strings hold what is no character, over which every later use would stumble."""
    codes = flat.view(np.uint32)
    first, last = _SURROGATES
    if ((codes > _MOST_CHARACTER) | ((codes >= first) & (codes <= last))).any():
        raise UserError(f"{where} holds broken characters")
