"""Modality features aligned with the items of a log: a matrix with a zero row where an item has none, and a mask."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")


@dataclasses.dataclass(frozen=True)
class Features:
    """One modality's features (the paper's m, §3.1).

    Attributes:
        values: [N + 1, d_m] float32; zero rows where an item has no feature and in row 0 (padding).
        has_feature: [N + 1] bool; False in row 0.
        recipe: how the file was made, plain data: "encoder" and, of texts, "text"; None where nothing is known of it.
    """

    values: np.ndarray
    has_feature: np.ndarray
    recipe: dict[str, Any] | None = None


def load_features(path: str | Path, item_ids: np.ndarray) -> Features:
    """Load a features file `<modality>-<encoder>.npz` for the items of a log.

    Args:
        path: file with `item_id` [n] unicode and `features` [n, d_m] floating point.
        item_ids: [N + 1] unicode, raw item ids by item index; entry 0 is padding.

    Returns:
        The features by item index.

    Raises:
        UserError: the file is missing or broken, or breaks the format; the line names the file.
    """
    path = Path(path)
    if not path.is_file():
        have = ", ".join(sorted(entry.stem for entry in path.parent.glob("*.npz"))) or "none"
        raise UserError(f"{path}: no such features file; available in that folder: {have}")
    arrays = read_arrays(path, ("item_id", "features"))
    features = align_features(arrays["item_id"], arrays["features"], item_ids, str(path))
    return dataclasses.replace(features, recipe=_read_recipe(path))


def align_features(file_ids: np.ndarray, values: np.ndarray, item_ids: np.ndarray, where: str) -> Features:
    """Check a modality's raw features and bring them into the order of the items.

    Items without a feature are counted in a warning; so are features of items outside the log, which are ignored.

    Args:
        file_ids: [n] unicode (integers are taken by their decimal digits), raw ids in any order.
        values: [n, d_m] floating point, the feature of each raw id.
        item_ids: [N + 1] unicode, raw item ids by item index; entry 0 is padding.
        where: what the errors name, such as the file.

    Returns:
        The features by item index.

    Raises:
        UserError: wrong rank or type, unequal lengths, NaN or Inf, duplicate ids, or features for none of the items.
    """
    file_ids = _checked(file_ids, values, where)
    values = np.asarray(values, np.float32)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise UserError(f"{where}: the features of item {str(file_ids[bad[0]])!r} (row {bad[0] + 1}) hold NaN or Inf")
    order = np.argsort(file_ids, kind="stable")
    ordered = file_ids[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise UserError(f"{where}: item {str(ordered[repeated[0]])!r} has more than one row in 'item_id'")
    place = np.minimum(np.searchsorted(ordered, item_ids), len(ordered) - 1)
    has_feature = ordered[place] == item_ids
    has_feature[0] = False
    covered = int(has_feature.sum())
    if covered == 0:
        raise UserError(f"{where}: it has features for none of the {len(item_ids) - 1:,} items of the log")
    aligned = np.zeros((len(item_ids), values.shape[1]), np.float32)
    aligned[has_feature] = values[order[place[has_feature]]]
    _report_coverage(covered, len(item_ids) - 1, len(file_ids), where)
    return Features(aligned, has_feature)


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """Return what the sidecar that kdsr_jax.encode writes says of a file; None without one, or with that of another file."""
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text())
        if sidecar["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return {name: sidecar[name] for name in ("encoder", "text") if name in sidecar}


def _checked(file_ids: np.ndarray, values: np.ndarray, where: str) -> np.ndarray:
    """Check ranks, types and lengths; return the ids as unicode."""
    if file_ids.ndim != 1 or file_ids.dtype.kind not in "Uiu":
        raise UserError(f"{where}: 'item_id' must be [n] unicode, it is {list(file_ids.shape)} {file_ids.dtype}")
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind != "f":
        raise UserError(f"{where}: 'features' must be [n, d] floating point, it is {list(values.shape)} {values.dtype}")
    if len(file_ids) != len(values):
        raise UserError(f"{where}: 'item_id' has {len(file_ids)} rows and 'features' {len(values)}; they must agree")
    if len(file_ids) == 0:
        raise UserError(f"{where}: it has no rows")
    return file_ids.astype(str)


def _report_coverage(covered: int, num_items: int, num_rows: int, where: str) -> None:
    """Say how many items have no feature and how many rows belong to no item."""
    if covered < num_items:
        missing = num_items - covered
        _logger.warning("%s: %s of %s items have no features; theirs are zero", where, f"{missing:,}", f"{num_items:,}")
    if covered < num_rows:
        _logger.warning("%s: ignored the features of %s items outside the log", where, f"{num_rows - covered:,}")
