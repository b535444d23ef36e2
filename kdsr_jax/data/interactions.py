"""From a raw log to numbered users and items: iterative k-core, id maps, the 80/20 split and its statistics."""

import array
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from kdsr_jax.data.features import Features
from kdsr_jax.data.spill import empty
from kdsr_jax.errors import UserError

_logger = logging.getLogger("kdsr_jax")

# A train part needs two items: one to read and one to predict.
_MIN_TRAIN_ITEMS = 2
_BLOCK = 2**22  # interactions that are looked at together
_MOST = 2**31 - 1  # interactions: windows number them in 32 bits


@dataclasses.dataclass(frozen=True)
class RawLog:
    """Who touched what, in the order of the source; columns may be mapped files.

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

    `items` and `timestamps` are mapped files where memory is short, so what reads all of them does so block by block.

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

    @property
    def positions(self) -> np.ndarray:
        """Place of each of `items` in its history, [n] int64 from 0."""
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)


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
    occur twice are kept and counted in a warning. The log is passed over in blocks and never copied: besides it there are
    12 bytes an interaction of the core (4 without times), in mapped files where memory is short, counters of users and
    items, and what one block needs.

    Args:
        log: the raw log.
        k_core: least number of interactions of every user and every item, 1 or more; 1 keeps everything.

    Returns:
        The interactions, users and items each numbered in lexicographic order of their raw ids.

    Raises:
        UserError: the log is empty, nothing is left of it, too much is, a user is too short to leave one training pair, or
            there is room for it neither in memory nor on the disk.
    """
    if len(log.user_codes) == 0:
        raise UserError("the log is empty: it has no interactions")
    user_counts, item_counts = _core_counts(log, k_core)
    if not user_counts.any():
        raise UserError(
            f"the {k_core}-core of the log is empty (no users and items with {k_core} interactions each are left); "
            "lower --config.data.k_core"
        )
    user_numbers, user_ids = _number(user_counts, log.user_names)
    item_numbers, item_ids = _number(item_counts, log.item_names)
    lengths = np.zeros(len(user_ids), np.int64)
    lengths[user_numbers[user_numbers >= 0]] = user_counts[user_numbers >= 0]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > _MOST:
        raise UserError(f"the {k_core}-core of the log has {offsets[-1]:,} interactions, more than {_MOST:,}")
    items, timestamps = _group_by_user(log, user_numbers, item_numbers, offsets)
    repeated = _sort_in_time(items, timestamps, offsets)
    if repeated:
        _logger.warning("%s of %s interactions are duplicates; they are kept", f"{repeated:,}", f"{len(items):,}")
    interactions = Interactions(
        items=items,
        offsets=offsets,
        user_ids=user_ids,
        item_ids=np.concatenate([np.array([""], item_ids.dtype), item_ids]),
        timestamps=timestamps,
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


def in_train_part(interactions: Interactions) -> np.ndarray:
    """Say which of `items` are for training, [n] bool."""
    return interactions.positions < np.repeat(train_lengths(interactions.lengths), interactions.lengths)


def train_counts(interactions: Interactions) -> np.ndarray:
    """Return how often each item stands in a train part, [N + 1] int64."""
    return item_counts(interactions, train_lengths(interactions.lengths))


def item_counts(interactions: Interactions, most: np.ndarray | None = None) -> np.ndarray:
    """Return how often each item stands among the first `most` [U] items of each history, or in all, [N + 1] int64."""
    lengths, counts = interactions.lengths, np.zeros(interactions.num_items + 1, np.int64)
    for users, rows in _users_and_rows(interactions.offsets):
        items = interactions.items[rows]
        if most is not None:
            ends = interactions.offsets[users] - rows.start + most[users]
            items = items[np.arange(len(items)) < np.repeat(ends, lengths[users])]
        counts += np.bincount(items, minlength=len(counts))
    return counts


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


def _blocks(log: RawLog) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yield users' and items' codes and times, a block of rows after the other."""
    for begin in range(0, len(log.user_codes), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        yield log.user_codes[rows], log.item_codes[rows], None if log.timestamps is None else log.timestamps[rows]


def _core_counts(log: RawLog, k_core: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the interactions of each user and each item in the k-core; 0 for those that are not in it.

    A row is in it where its user and its item both are, so passes over the rows need nothing but counters between them.
    """
    users, items = (np.ones(len(names), bool) for names in (log.user_names, log.item_names))
    while True:
        user_counts, item_counts = np.zeros(len(users), np.int64), np.zeros(len(items), np.int64)
        for user_codes, item_codes, _ in _blocks(log):
            kept = users[user_codes] & items[item_codes]
            user_counts += np.bincount(user_codes[kept], minlength=len(users))
            item_counts += np.bincount(item_codes[kept], minlength=len(items))
        users, items = user_counts >= k_core, item_counts >= k_core
        if not user_counts[~users].any() and not item_counts[~items].any():
            return user_counts, item_counts


def _number(counts: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the names in use from 0 in lexicographic order; return each name's number [*] int32, else -1, and those names."""
    used = np.flatnonzero(counts)
    used = used[np.argsort(names[used])]
    numbers = np.full(len(names), -1, np.int32)
    numbers[used] = np.arange(len(used))
    ids = names[used]
    return numbers, ids.astype(f"U{np.strings.str_len(ids).max()}")  # no wider than the longest name that is left


def _group_by_user(
    log: RawLog, user_numbers: np.ndarray, item_numbers: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return items (from 1) and times of the rows that are kept, user after user, each in the order of the log."""
    items, place = empty(offsets[-1], np.int32), offsets[:-1].copy()
    times = None if log.timestamps is None else empty(offsets[-1], log.timestamps.dtype)
    for user_codes, item_codes, stamps in _blocks(log):
        users, taken = user_numbers[user_codes], item_numbers[item_codes]
        order = np.flatnonzero((users >= 0) & (taken >= 0))
        order = order[np.argsort(users[order], kind="stable")]
        users = users[order]
        first = np.flatnonzero(np.diff(users, prepend=-1))
        sizes = np.diff(first, append=len(users))
        target = np.arange(len(users)) + np.repeat(place[users[first]] - first, sizes)
        place[users[first]] += sizes
        items[target] = taken[order] + 1
        if times is not None:
            times[target] = stamps[order]
    return items, times


def _sort_in_time(items: np.ndarray, times: np.ndarray | None, offsets: np.ndarray) -> int:
    """Sort each user's items by time, in place, equal times as they are; return how many repeat item and time of another."""
    repeated = 0
    for users, rows in _users_and_rows(offsets):
        owners = np.repeat(np.arange(users.stop - users.start), np.diff(offsets[users.start : users.stop + 1]))
        differ = np.diff(owners) > 0
        if times is not None:
            stamps = times[rows]
            if np.any((stamps[1:] < stamps[:-1]) & ~differ):  # a difference might overflow
                order = np.lexsort((stamps, owners))
                items[rows], times[rows] = items[rows][order], stamps[order]
            differ |= np.diff(times[rows]) != 0
        moment = np.concatenate([[0], np.cumsum(differ)])  # one number a user and time
        keys = np.sort(moment * (2**31) + items[rows])
        repeated += int((keys[1:] == keys[:-1]).sum())
    return repeated


def _users_and_rows(offsets: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Yield users and their interactions, of as many users as a block holds, at least one, after the other."""
    begin, num_users = 0, len(offsets) - 1
    while begin < num_users:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + _BLOCK, side="right")) - 1)
        yield slice(begin, end), slice(int(offsets[begin]), int(offsets[end]))
        begin = end


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
