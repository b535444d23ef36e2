"""MovieLens-1M from its official archive: every rating is an interaction (paper §4), movies.dat becomes the items.

The data may not be redistributed; its README in the archive says how it is cited.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kdsr_jax.data.interactions import log_from_rows
from kdsr_jax.data.sources import download
from kdsr_jax.data.sources.archives import zip_lines
from kdsr_jax.data.sources.base import Source, digest_of_files, items_by_index
from kdsr_jax.errors import UserError

# Size and sha256 as tensorflow-datasets registers them (url_checksums/movielens.txt).
ARCHIVE = download.Archive(
    "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    5_917_549,
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
)
_RATING = re.compile(r"([0-9]{1,18})::([0-9]{1,18})::[0-9]::([0-9]{1,18})\s*")
_RATINGS, _MOVIES = "ml-1m/ratings.dat", "ml-1m/movies.dat"


def find(name: str, manual_dir: str) -> Source:
    """Find or download the archive.

    Args:
        name: name of the data set; there is one.
        manual_dir: folder that holds ml-1m.zip; "" downloads it.

    Returns:
        The source.

    Raises:
        UserError: the archive is not there, cannot be downloaded, or is not the official one.
    """
    path = download.from_folder(manual_dir, ARCHIVE) if manual_dir else download.fetch(ARCHIVE)
    if path is None:
        raise UserError(f"--config.data.manual_dir={manual_dir}: {ARCHIVE.name} is missing; it is at {ARCHIVE.url}")
    return Source(
        "movielens",
        os.path.abspath(path),
        digest_of_files([path]),
        lambda: log_from_rows(_ratings(path)),
        lambda item_ids: items_by_index(dict(_movies(path)), item_ids),
    )


def _ratings(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield user, movie and time of each rating, `user::movie::rating::seconds`."""
    for number, line in zip_lines(path, _RATINGS):
        found = _RATING.fullmatch(line.decode("latin-1"))
        if not found:
            raise UserError(f"{path}: {_RATINGS}: line {number}: not four whole numbers, user::movie::rating::seconds")
        yield found[1], found[2], int(found[3])


def _movies(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield raw id and metadata of each movie, `movie::Title (year)::Genre|Genre`."""
    for number, line in zip_lines(path, _MOVIES):
        found = re.fullmatch(r"([0-9]+)::(.+)::([^:]*)", line.decode("latin-1").strip())
        if not found:
            raise UserError(f"{path}: {_MOVIES}: line {number}: not movie::title::genres")
        item_id, title, genres = found.groups()
        item = {"item_id": item_id, "title": title, "genres": genres.split("|")}
        year = re.search(r"\((\d{4})\)$", title)
        yield item_id, item | ({"year": int(year[1])} if year else {})
