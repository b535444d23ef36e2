"""From a raw log to numbered users and items: iterative k-core, id maps, the 80/20 split and its statistics."""

import array
import dataclasses
import logging
from collections.abc import Iterable, Mapping

import numpy as np

from kdsr_jax.data.features import Features
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")

# A train part needs two items: one to read and one to predict.
_MIN_TRAIN_ITEMS = 2


@dataclasses.dataclass(frozen=True)
class RawLog:
    """Who touched what, in the order of the source.

    Attributes:
        user_codes: [n] int32, index into `user_names` of each row.
        item_codes: [n] int32, index into `item_names` of each row.
        user_names: [*] unicode, raw user ids, each once.
        item_names: [*] unicode, raw item ids, each once.
        timestamps: [n] int64 or float64, or None where the source has no times.
    """

    user_codes: np.ndarray
    item_codes: np.ndarray
    user_names: np.ndarray
    item_names: np.ndarray
    timestamps: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Every history in one flat array; user u owns `items[offsets[u] : offsets[u + 1]]`.

    Attributes:
        items: [n] int32, item indices 1..N, user after user, each user's oldest first (0 is kept for padding).
        offsets: [U + 1] int64, where each user's history begins and ends.
        user_ids: [U] unicode, raw user ids in lexicographic order.
        item_ids: [N + 1] unicode, raw item ids in lexicographic order; entry 0 is "".
        timestamps: [n] int64 or float64, when each of `items` was taken; None where the source has no times.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items N, padding not counted."""
        return len(self.item_ids) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each user's history, [U] int64."""
        return np.diff(self.offsets)


def log_from_rows(rows: Iterable[tuple[str, str, int]]) -> RawLog:
    """Collect rows of raw user id, raw item id and time, a whole number of 63 bits, into a log in their order."""
    users, items = {}, {}
    columns = array.array("i"), array.array("i"), array.array("q")
    for user, item, time in rows:
        columns[0].append(users.setdefault(user, len(users)))
        columns[1].append(items.setdefault(item, len(items)))
        columns[2].append(time)
    codes = [np.array(column, kind) for column, kind in zip(columns, (np.int32, np.int32, np.int64), strict=True)]
    return RawLog(codes[0], codes[1], np.array(list(users), dtype=str), np.array(list(items), dtype=str), codes[2])


def build_interactions(log: RawLog, k_core: int) -> Interactions:
    """Filter a log to its k-core, number users and items, and order each history in time.

    Paper §4 (data sets "after preprocessing", 5-core). Equal timestamps keep the order of the log. Interactions that
    occur twice are kept and counted in a warning.

    Args:
        log: the raw log.
        k_core: least number of interactions of every user and every item, 1 or more; 1 keeps everything.

    Returns:
        The interactions, users and items each numbered in lexicographic order of their raw ids.

    Raises:
        UserError: the log is empty, nothing is left of it, or a user is too short to leave one training pair.
    """
    if len(log.user_codes) == 0:
        raise UserError("the log is empty: it has no interactions")
    rows = _k_core_rows(log.user_codes, log.item_codes, k_core)
    if len(rows) == 0:
        raise UserError(
            f"the {k_core}-core of the log is empty (no users and items with {k_core} interactions each are left); "
            "lower --config.data.k_core"
        )
    users, user_ids = _number(log.user_codes[rows], log.user_names)
    items, item_ids = _number(log.item_codes[rows], log.item_names)
    timestamps = None if log.timestamps is None else log.timestamps[rows]
    _warn_of_duplicates(users, items, timestamps)
    order = np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=len(user_ids)))]).astype(np.int64)
    interactions = Interactions(
        items=(items[order] + 1).astype(np.int32),
        offsets=offsets,
        user_ids=user_ids,
        item_ids=np.concatenate([np.array([""], item_ids.dtype), item_ids]),
        timestamps=None if timestamps is None else timestamps[order],
    )
    _require_training_pairs(interactions)
    return interactions


def sample_users(interactions: Interactions, fraction: float) -> Interactions:
    """Keep a share of the users, at least one, with their whole histories; items keep their numbers, met or not.

    Args:
        interactions: the filtered log.
        fraction: share that is kept, above 0 and at most 1.

    Returns:
        The same interactions where all are kept; else those of users that depend on nothing but U and the fraction. A
        smaller share is part of a larger one.
    """
    if fraction == 1:
        return interactions
    most = max(1, round(fraction * interactions.num_users))
    kept = np.sort(np.random.default_rng(0).permutation(interactions.num_users)[:most])
    lengths = interactions.lengths[kept]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.arange(offsets[-1]) + np.repeat(interactions.offsets[kept] - offsets[:-1], lengths)
    times = interactions.timestamps
    return dataclasses.replace(
        interactions,
        items=interactions.items[rows],
        offsets=offsets,
        user_ids=interactions.user_ids[kept],
        timestamps=None if times is None else times[rows],
    )


def train_lengths(lengths: np.ndarray) -> np.ndarray:
    """Return how many of each user's first items are for training.

    Paper §4, "Evaluation Protocol": the last fifth, at least one item, is for testing.

    Args:
        lengths: [U] int64, items in each history.

    Returns:
        [U] int64, `lengths - max(1, lengths // 5)`.
    """
    return lengths - np.maximum(1, lengths // 5)


def statistics(interactions: Interactions, features: Mapping[str, Features]) -> dict:
    """Describe a data set in the terms of the paper's Table 1.

    Args:
        interactions: the filtered log.
        features: the modalities' features by name.

    Returns:
        `users`, `items`, `interactions`, `average_length`, `sparsity` (a fraction), `train_instances` and
        `test_instances` (one per target, so one per prefix of a history) and `modalities` (covered items by name).
    """
    lengths = interactions.lengths
    train = train_lengths(lengths)
    users, items, total = interactions.num_users, interactions.num_items, len(interactions.items)
    return {
        "users": users,
        "items": items,
        "interactions": total,
        "average_length": round(total / users, 4),
        "sparsity": round(1.0 - total / (users * items), 6),
        "train_instances": int((train - 1).sum()),
        "test_instances": int((lengths - train).sum()),
        "modalities": {name: int(part.has_feature.sum()) for name, part in features.items()},
    }


def _k_core_rows(user_codes: np.ndarray, item_codes: np.ndarray, k_core: int) -> np.ndarray:
    """Return the rows of the log's k-core, in the order of the log."""
    rows = np.arange(len(user_codes))
    while k_core > 1 and len(rows):
        users, items = user_codes[rows], item_codes[rows]
        keep = (np.bincount(users)[users] >= k_core) & (np.bincount(items)[items] >= k_core)
        if keep.all():
            break
        rows = rows[keep]
    return rows


def _number(codes: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber `codes` from 0 in lexicographic order of the names in use; return the numbers and those names."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(names)))
    used = used[np.argsort(names[used])]
    number_of = np.zeros(len(names), np.int64)
    number_of[used] = np.arange(len(used))
    return number_of[codes], np.array(names[used].tolist())  # no wider than the longest name that is left


def _warn_of_duplicates(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray | None) -> None:
    """Count the rows that repeat another row's user, item and, where there is one, timestamp."""
    columns = [users * (items.max() + 1) + items]
    if timestamps is not None:
        columns.append(timestamps)
    order = np.lexsort(columns) if len(columns) > 1 else np.argsort(columns[0])
    same = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in columns])
    if same.any():
        _logger.warning("%s of %s interactions are duplicates; they are kept", f"{same.sum():,}", f"{len(users):,}")


def _require_training_pairs(interactions: Interactions) -> None:
    """Raise where a user's train part is too short to hold one input and its target."""
    lengths = interactions.lengths
    short = np.flatnonzero(train_lengths(lengths) < _MIN_TRAIN_ITEMS)
    if len(short):
        user = short[0]
        raise UserError(
            f"user {str(interactions.user_ids[user])!r} has {lengths[user]} interaction(s), too few to leave one "
            f"training pair beside a test item ({len(short):,} such user(s)); set --config.data.k_core to 3 or more"
        )
