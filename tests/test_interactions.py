"""k-core, numbering, order, split and statistics of a log."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr_jax.data import interactions as module
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import (
    RawLog,
    build_interactions,
    in_train_part,
    item_counts,
    sample_users,
    statistics,
    train_counts,
    train_lengths,
)
from kdsr_jax.errors import UserError


def make_log(pairs, timestamps=None) -> RawLog:
    """Encode (user, item) pairs in order of appearance, as a reader does."""
    users, items = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [])
    user_names, item_names = list(dict.fromkeys(users)), list(dict.fromkeys(items))
    return RawLog(
        np.array([user_names.index(user) for user in users], np.int32),
        np.array([item_names.index(item) for item in items], np.int32),
        np.array(user_names, dtype=str),
        np.array(item_names, dtype=str),
        None if timestamps is None else np.array(timestamps),
    )


def histories(interactions) -> dict[str, list[str]]:
    """Return raw items by raw user."""
    parts = np.split(interactions.items, interactions.offsets[1:-1])
    return {
        str(user): interactions.item_ids[part].tolist() for user, part in zip(interactions.user_ids, parts, strict=True)
    }


def test_numbers_are_lexicographic_and_the_order_is_of_the_file():
    log = make_log([("b", "9"), ("a", "10"), ("b", "10"), ("a", "9"), ("b", "007"), ("a", "007")])
    interactions = build_interactions(log, 1)
    assert interactions.user_ids.tolist() == ["a", "b"]
    assert interactions.item_ids.tolist() == ["", "007", "10", "9"]
    assert interactions.items.tolist() == [2, 3, 1, 3, 2, 1]
    assert interactions.items.dtype == np.int32 and interactions.offsets.dtype == np.int64
    assert interactions.offsets.tolist() == [0, 3, 6]
    assert (interactions.num_users, interactions.num_items) == (2, 3)
    assert interactions.lengths.tolist() == [3, 3]


def test_times_sort_each_history_and_ties_keep_the_order_of_the_file():
    pairs = [("u", "late"), ("u", "tie1"), ("v", "x"), ("u", "tie2"), ("u", "early"), ("v", "y"), ("v", "z")]
    interactions = build_interactions(make_log(pairs, [9, 5, 3.5, 5, 1, 3.25, 3.75]), 1)
    assert histories(interactions) == {"u": ["early", "tie1", "tie2", "late"], "v": ["y", "x", "z"]}


def test_k_core_iterates_until_nothing_changes():
    # Item r goes first (one user), then user w (2 left of 3), then item s (2 left of 3); p, q, t survive.
    pairs = [(user, item) for user in "uvx" for item in "pqt"]
    pairs += [("w", "r"), ("w", "s"), ("w", "p"), ("u", "s"), ("v", "s")]
    interactions = build_interactions(make_log(pairs), 3)
    assert histories(interactions) == {user: ["p", "q", "t"] for user in "uvx"}


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=120),
    st.integers(3, 5),
)
def test_k_core_is_the_largest_fixpoint(pairs, k_core):
    kept = list(pairs)
    while True:
        users, items = [user for user, _ in kept], [item for _, item in kept]
        rest = [(u, i) for u, i in kept if users.count(u) >= k_core and items.count(i) >= k_core]
        if len(rest) == len(kept):
            break
        kept = rest
    log = make_log([(f"u{user}", f"i{item}") for user, item in pairs])
    if not kept:
        with pytest.raises(UserError, match=f"{k_core}-core of the log is empty"):
            build_interactions(log, k_core)
        return
    expected: dict[str, list[str]] = {}
    for user, item in sorted(kept, key=lambda pair: pair[0]):
        expected.setdefault(f"u{user}", []).append(f"i{item}")
    assert histories(build_interactions(log, k_core)) == expected


@pytest.mark.parametrize("times", ["none", "few", "fractions"])
@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_blocks_of_any_size_give_what_sorting_the_whole_log_gives(monkeypatch, caplog, block, times):
    rng = np.random.default_rng(block)
    pairs = [(f"u{u}", f"i{i}") for u, i in zip(rng.zipf(1.3, 900) % 60, rng.zipf(1.3, 900) % 50, strict=True)]
    stamps = {"none": None, "few": rng.integers(0, 20, 900), "fractions": rng.integers(0, 2000, 900) / 8}[times]
    kept = list(range(900))
    while True:
        users, items = ([pairs[n][part] for n in kept] for part in (0, 1))
        rest = [n for n in kept if users.count(pairs[n][0]) >= 4 and items.count(pairs[n][1]) >= 4]
        if rest == kept:
            break
        kept = rest
    kept.sort(key=lambda n: (pairs[n][0], 0 if stamps is None else stamps[n], n))
    expected: dict[str, list[str]] = {}
    for n in kept:
        expected.setdefault(pairs[n][0], []).append(pairs[n][1])
    monkeypatch.setattr(module, "_BLOCK", block)
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        interactions = build_interactions(make_log(pairs, stamps), 4)
    assert histories(interactions) == expected and len(kept) > 200
    rows = [(pairs[n], None if stamps is None else stamps[n]) for n in kept]
    if stamps is not None:
        assert interactions.timestamps.tolist() == [time for _, time in rows]
    repeated = len(rows) - len(set(rows))
    assert caplog.messages == (
        [f"{repeated} of {len(rows)} interactions are duplicates; they are kept"] if repeated else []
    )


def test_times_whose_difference_overflows_are_sorted():
    times = [1_700_000_000_000_000_000 + n for n in range(3)] + [-(2**63)]
    log = make_log([("u", item) for item in "abcd"], times)
    interactions = build_interactions(log, 1)
    assert interactions.timestamps.tolist() == sorted(times)
    assert interactions.item_ids[interactions.items].tolist() == ["d", "a", "b", "c"]


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_where_memory_is_short_histories_lie_in_mapped_files_and_are_the_same(block, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [
        (f"u{user}", f"i{item}") for user, item in zip(rng.integers(0, 30, 400), rng.zipf(1.4, 400) % 25, strict=True)
    ]
    log = make_log(pairs, rng.integers(0, 90, 400).tolist())
    expected = build_interactions(log, 3)
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KDSR_MEMORY", "1000")
    monkeypatch.setattr(module, "_BLOCK", block)
    found = build_interactions(log, 3)
    assert isinstance(found.items, np.memmap) and isinstance(found.timestamps, np.memmap)
    for name in ("items", "offsets", "user_ids", "item_ids", "timestamps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(item_counts(found), np.bincount(expected.items, minlength=len(expected.item_ids)))
    trained = expected.items[in_train_part(expected)]
    np.testing.assert_array_equal(train_counts(found), np.bincount(trained, minlength=len(expected.item_ids)))
    assert list((tmp_path / "cache").iterdir()) == []  # the files have no names


def test_histories_that_fit_neither_memory_nor_disk_are_one_line(disk, fill_up, monkeypatch):
    log = make_log([(f"u{n % 50}", f"i{n % 1999}") for n in range(100_000)])
    monkeypatch.setenv("KDSR_CACHE", str(disk / "cache"))
    monkeypatch.setenv("KDSR_MEMORY", "1000")
    fill_up(100_000)
    with pytest.raises(UserError, match="cache: the log is larger .* \\(No space left on device\\); KDSR_CACHE names"):
        build_interactions(log, 1)


def test_more_interactions_than_32_bits_number_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 8)
    log = make_log([(user, item) for user in "uvx" for item in "pqt"])
    with pytest.raises(UserError, match="^the 3-core of the log has 9 interactions, more than 8$"):
        build_interactions(log, 3)


def test_memory_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv("KDSR_MEMORY", "24G")
    with pytest.raises(UserError, match="^KDSR_MEMORY=24G: give a number of bytes$"):
        build_interactions(make_log([("u", item) for item in "pqt"]), 1)


@pytest.mark.parametrize(("length", "train"), [(3, 2), (4, 3), (5, 4), (9, 8), (10, 8), (14, 12), (15, 12), (100, 80)])
def test_the_last_fifth_and_at_least_one_item_is_for_testing(length, train):
    assert train_lengths(np.array([length])).tolist() == [train]


def test_a_share_of_the_users_keeps_their_histories_and_all_item_numbers():
    lengths = np.random.default_rng(0).integers(3, 9, 40)
    pairs = [
        (f"u{user:02}", f"i{(user * 7 + n) % 30:02}") for user, length in enumerate(lengths) for n in range(length)
    ]
    whole = build_interactions(make_log(pairs, np.arange(len(pairs))), 1)
    assert sample_users(whole, 1.0) is whole
    quarter, half, least = (sample_users(whole, fraction) for fraction in (0.25, 0.5, 1e-9))
    assert [part.num_users for part in (quarter, half, least)] == [10, 20, 1]
    assert set(least.user_ids) < set(quarter.user_ids) < set(half.user_ids) < set(whole.user_ids)
    assert histories(half) == {user: histories(whole)[user] for user in half.user_ids}
    assert half.item_ids.tolist() == whole.item_ids.tolist()
    assert half.items.dtype == np.int32 and half.offsets.dtype == np.int64
    for begin, end in zip(half.offsets, half.offsets[1:], strict=False):
        assert (np.diff(half.timestamps[begin:end]) == 1).all()  # times went along


def test_duplicates_are_kept_and_counted(caplog):
    pairs = [("u", "a"), ("u", "b"), ("u", "a"), ("u", "a"), ("u", "c")]
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        interactions = build_interactions(make_log(pairs), 1)
    assert histories(interactions) == {"u": ["a", "b", "a", "a", "c"]}
    assert "2 of 5 interactions are duplicates" in caplog.text


def test_the_same_item_at_another_time_is_no_duplicate(caplog):
    pairs = [("u", "a"), ("u", "b"), ("u", "a"), ("v", "a"), ("v", "b"), ("v", "c"), ("v", "c")]
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        build_interactions(make_log(pairs, [1, 2, 3, 1, 2, 3, 3]), 1)
    assert [record.getMessage() for record in caplog.records] == ["1 of 7 interactions are duplicates; they are kept"]


def test_statistics():
    pairs = [("u", item) for item in "abcdefghij"] + [("v", item) for item in "abcd"]
    mask = np.array([False, True, True, True] + [False] * 7)
    features = {"image": Features(np.zeros((11, 2), np.float32), mask)}
    assert statistics(build_interactions(make_log(pairs), 1), features) == {
        "users": 2,
        "items": 10,
        "interactions": 14,
        "average_length": 7.0,
        "sparsity": 0.3,
        "train_instances": 7 + 2,
        "test_instances": 2 + 1,
        "modalities": {"image": 3},
    }


@pytest.mark.parametrize(
    ("pairs", "k_core", "message"),
    [
        ([], 1, "the log is empty"),
        ([("u", "a"), ("u", "b"), ("v", "a")], 2, "the 2-core of the log is empty .* lower --config.data.k_core"),
        (
            [("u", "a"), ("u", "b"), ("u", "c"), ("v", "a"), ("v", "b")],
            1,
            r"user 'v' has 2 .* --config.data.k_core to 3",
        ),
    ],
)
def test_bad_logs(pairs, k_core, message):
    with pytest.raises(UserError, match=message):
        build_interactions(make_log(pairs), k_core)
