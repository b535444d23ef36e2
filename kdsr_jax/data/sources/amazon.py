"""Amazon product data of 2014: reviews of the 5-core, or all ratings, and the metadata of the products.

No checksums are published for these files; the sha256 of the first download is recorded and later ones must match it.
"""

import ast
import html
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdsr_jax.data.interactions import log_from_rows
from kdsr_jax.data.sources import download
from kdsr_jax.data.sources.archives import numbered_lines
from kdsr_jax.data.sources.base import Source, digest_of_files, items_by_index
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")

CATEGORIES = {
    "beauty": "Beauty",
    "clothing": "Clothing_Shoes_and_Jewelry",
    "sports": "Sports_and_Outdoors",
    "toys": "Toys_and_Games",
}
ADDRESS = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_TEXTS = ("title", "brand", "description")
_FIELDS = (*_TEXTS, "categories", "price")
_FIRST_KEY = re.compile(rb"""\{['"]asin['"]: ?['"]([^'"\\]*)['"]""")
_NOT_A_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def find(name: str, manual_dir: str) -> Source:
    """Find or download the files of a category.

    Args:
        name: "beauty", "clothing", "sports" or "toys".
        manual_dir: folder that holds `reviews_X_5.json.gz` or, where that is not there, `ratings_X.csv`; and, optionally,
            `meta_X.json.gz`; each with or without `.gz`. "" downloads the reviews and the metadata.

    Returns:
        The source.

    Raises:
        UserError: there is no such category, or its files are not there or cannot be downloaded.
    """
    category = CATEGORIES[name]
    reviews = download.Archive(f"{ADDRESS}reviews_{category}_5.json.gz")
    ratings = download.Archive(f"{ADDRESS}ratings_{category}.csv")
    metadata = download.Archive(f"{ADDRESS}meta_{category}.json.gz")
    if not manual_dir:
        return _source(download.fetch(reviews), download.fetch(metadata))
    log = download.from_folder(manual_dir, reviews) or download.from_folder(manual_dir, ratings)
    log = log or download.from_folder(manual_dir, ratings._replace(url=f"{ratings.url}.gz"))
    if log is None:
        advice = f"neither {reviews.name} nor {ratings.name} is there; they are at {ADDRESS}"
        raise UserError(f"--config.data.manual_dir={manual_dir}: {advice}")
    items = download.from_folder(manual_dir, metadata)
    if items is None:
        _logger.warning("%s: %s is not there, so items have no titles", manual_dir, metadata.name)
    return _source(log, items)


def _source(log: Path, items: Path | None) -> Source:
    rows = _ratings if log.name.startswith("ratings_") else _reviews
    return Source(
        "amazon",
        os.path.abspath(log),
        digest_of_files([log] if items is None else [log, items]),
        lambda: log_from_rows(rows(log)),
        lambda item_ids: None if items is None else _load_items(items, item_ids),
    )


def _reviews(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield user, item and time of each line of JSON."""
    for number, line in numbered_lines(path):
        try:
            review = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not JSON ({error})") from None
        if not isinstance(review, dict):
            raise UserError(f"{path}: line {number}: not a JSON object")
        time = review.get("unixReviewTime")
        if isinstance(time, bool) or not isinstance(time, int) or abs(time) >= 2**63:
            raise UserError(f"{path}: line {number}: 'unixReviewTime' is missing or not a whole number")
        yield _id(review, "reviewerID", path, number), _id(review, "asin", path, number), time


def _ratings(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield user, item and time of each line `user,item,rating,seconds`; there is no header."""
    for number, line in numbered_lines(path):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UserError(f"{path}: line {number}: not UTF-8") from None
        found = re.fullmatch(r"([^,\s\0]{1,100}),([^,\s\0]{1,100}),[0-9.]+,([0-9]{1,18})", text)
        if not found:
            raise UserError(f"{path}: line {number}: not user,item,rating,seconds")
        yield found[1], found[2], int(found[3])


def _load_items(path: Path, item_ids: np.ndarray) -> list[dict]:
    """Read the metadata of the items in use; the lines of other items, most of them, are not looked at."""
    wanted, found = set(item_ids[1:].tolist()), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in texts that Python would not write so
        for number, line in numbered_lines(path):
            key = _FIRST_KEY.match(line)
            if key and key[1].decode("utf-8", "replace") not in wanted:
                continue
            product = _parse_product(line, path, number)
            item_id = _id(product, "asin", path, number)
            if item_id in wanted:
                found[item_id] = _metadata(product, item_id, path, number)
    if len(found) < len(wanted):
        _logger.warning("%s: %s of %s items have no metadata", path, len(wanted) - len(found), len(wanted))
    return items_by_index(found, item_ids)


def _parse_product(line: bytes, path: Path, number: int) -> dict:
    """Read a line, strict JSON or, as in the published files, a Python literal, of which no code can run."""
    try:
        text = line.decode("utf-8").strip()
        product = json.loads(text) if text.startswith('{"') else ast.literal_eval(text)
    except _NOT_A_LITERAL as error:
        raise UserError(f"{path}: line {number}: neither JSON nor a Python literal ({type(error).__name__})") from None
    if not isinstance(product, dict):
        raise UserError(f"{path}: line {number}: not an object")
    return product


def _metadata(product: dict, item_id: str, path: Path, number: int) -> dict:
    """Return what is kept of a product, in the types of JSON, its texts without HTML entities."""
    kept = {name: product[name] for name in _FIELDS if product.get(name) not in (None, "")}
    kept |= {name: html.unescape(kept[name]) for name in _TEXTS if isinstance(kept.get(name), str)}
    try:
        return {"item_id": item_id} | json.loads(json.dumps(kept))
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: line {number}: holds values that JSON has no words for") from None


def _id(fields: dict, name: str, path: Path, number: int) -> str:
    """Return a raw id."""
    value = fields.get(name)
    # Lone surrogates and zeros can be written in JSON; files and arrays of texts cannot hold them.
    if not isinstance(value, str) or not re.fullmatch("[^\0\ud800-\udfff]{1,100}", value):
        raise UserError(f"{path}: line {number}: {name!r} is missing or not a text of at most 100 characters")
    return value
