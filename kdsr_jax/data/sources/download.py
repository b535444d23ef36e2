"""Archives of public data sets: from a folder where they were put by hand, or from their official address."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kdsr_jax.cache import cache_folder
from kdsr_jax.data.sources.archives import is_there
from kdsr_jax.data.sources.base import file_digest
from kdsr_jax.errors import UserError

_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 2**18  # bytes
_LARGEST = 8 * 2**30  # bytes


class Archive(NamedTuple):
    """A file to fetch.

    Attributes:
        url: its official address; its last part is the file's name.
        size: its size in bytes where that is registered, else None.
        sha256: its digest where one is registered, else None: then that of the first download counts.
    """

    url: str
    size: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


def from_folder(folder: str, archive: Archive) -> Path | None:
    """Return an archive that was put into a folder, or unpacked there, without `.gz`; None where it is not there.

    Raises:
        UserError: its sha256 is not the registered one.
    """
    for name in (archive.name, archive.name.removesuffix(".gz")):
        path = Path(folder) / name
        if is_there(path):
            _require_digest(path, archive.sha256, "is registered for it (delete it and fetch it again)")
            return path
    return None


def fetch(archive: Archive) -> Path:
    """Return an archive from the cache; download it there first where it is missing.

    The file appears whole or not at all. Its sha256 is compared with the registered one, or else with that of its first
    download, which a small file beside it records.

    Raises:
        UserError: it cannot be downloaded, there is no room for it, or it has another sha256.
    """
    folder = cache_folder() / "downloads"
    path = folder / archive.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A second process waits here, and then finds the file.
        with open(folder / f".{archive.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _download(archive, path)
            else:
                _require_digest(path, *_expected(archive, path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or name another cache folder in $KDSR_CACHE"
        ) from None
    return path


def _download(archive: Archive, path: Path) -> None:
    """Download an archive beside its place, check it, record its digest and move it there."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            size, digest = _receive(archive, file)
        if archive.size not in (None, size):
            raise UserError(
                f"{archive.url}: {size:,} bytes came, not the {archive.size:,} registered; {_by_hand(archive)}"
            )
        expected, why = _expected(archive, path)
        if expected not in (None, digest):
            raise UserError(f"{archive.url}: its sha256 is {digest}, not {expected}, which {why}; {_by_hand(archive)}")
        if expected is None:
            _record(path).write_text(f"{digest}  {path.name}\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _receive(archive: Archive, file: BinaryIO) -> tuple[int, str]:
    """Write what a url gives to a file; return its size and sha256."""
    digest, size = hashlib.sha256(), 0
    limit = archive.size or _LARGEST
    request = urllib.request.Request(archive.url, headers={"User-Agent": "kdsr-jax"})
    with _network(archive):
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    with answer, _progress(archive.name, total) as advance:
        while True:
            with _network(archive):
                block = answer.read(_BLOCK)
            if not block:
                break
            size += len(block)
            if size > limit:
                raise UserError(f"{archive.url}: more than {limit:,} bytes came; {_by_hand(archive)}")
            file.write(block)
            digest.update(block)
            advance(len(block))
    if total not in (None, size):
        raise UserError(
            f"{archive.url}: cut short, {size:,} of {total:,} bytes came; try again, or {_by_hand(archive)}"
        )
    return size, digest.hexdigest()


@contextlib.contextmanager
def _network(archive: Archive) -> Iterator[None]:
    """Turn an error of the network into one line; only calls that touch no disk belong inside."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{archive.url}: cannot be downloaded ({error}); {_by_hand(archive)}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{archive.url}: cannot be downloaded ({reason}); {_by_hand(archive)}") from None


@contextlib.contextmanager
def _progress(name: str, total: int | None) -> Iterator:
    """Show a progress bar on stderr; yield a function that advances it by a number of bytes."""
    from rich import console, markup, progress

    columns = (*progress.Progress.get_default_columns(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(markup.escape(name), total=total)
        yield lambda count: bar.advance(task, count)


def _record(path: Path) -> Path:
    """Return the file beside an archive that holds the sha256 of its first download."""
    return path.with_name(f"{path.name}.sha256")


def _expected(archive: Archive, path: Path) -> tuple[str | None, str]:
    """Return the sha256 that an archive must have, or None, and where it is from."""
    if archive.sha256:
        return archive.sha256, "is registered for it (delete it and try again)"
    record = _record(path)
    found = re.match(r"[0-9a-f]{64}\b", record.read_text(errors="replace")) if record.is_file() else None
    return found and found[0], f"{record} records of the first download (delete both files to accept another)"


def _require_digest(path: Path, expected: str | None, why: str) -> None:
    digest = expected and file_digest(path)
    if digest != expected:
        raise UserError(f"{path}: damaged or not the original: its sha256 is {digest}, not {expected}, which {why}")


def _by_hand(archive: Archive) -> str:
    return f"fetch {archive.name} by hand and give its folder with --config.data.manual_dir=FOLDER"
