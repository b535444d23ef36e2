"""The prepared form: the same data from the cache as from the source, and a cache that can break without harm."""

import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from configs import default
from kdsr_jax.data import load_dataset, prepared, shards
from kdsr_jax.data.interactions import Interactions, RawLog, build_interactions
from kdsr_jax.data.sources.base import Source
from kdsr_jax.errors import UserError

# Enough users that a length of the file format takes two bytes, and ids and texts that a careless format would lose.
USERS = ["007", "7", " u", "ü", 'q"u,o', "u\n", "日本", "x" * 300, *(f"u{n}" for n in range(140))]
ITEMS = ["é", "a b", "</script>", "0", "00", "y" * 300]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_log(times=np.int64, seed=0) -> RawLog:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(len(USERS)), 3 + np.arange(len(USERS)) % 200).astype(np.int32)
    items = rng.integers(0, len(ITEMS), len(users)).astype(np.int32)
    stamps = (
        None
        if times is None
        else rng.integers(-(2**50), 2**50, len(users)).astype(times) / (1 if times == np.int64 else 7)
    )
    stamps = stamps if times is None else stamps.astype(times)
    return RawLog(users, items, np.array(USERS), np.array(ITEMS), stamps)


METADATA = [
    {},
    {"title": "[/] \ud800 \u2028 </script>", "n": [1, 2.5, None, True]},
    {},
    {"d": {"k": "v" * 5000}},
    {},
    {"item_id": "é"},
    {},
]


class Shop:
    """A source that counts how often it is read."""

    def __init__(self, log=None, items=METADATA, digest="a", place="here"):
        self.log, self.items, self.reads = log or make_log(), items, 0
        self.source = Source("test", place, digest, self._read, lambda item_ids: self.items)

    def _read(self):
        self.reads += 1
        return self.log

    def load(self, k_core=1):
        return prepared.load_prepared("shop", self.source, k_core)


def assert_same(first: Interactions, second: Interactions) -> None:
    for field in dataclasses.fields(Interactions):
        left, right = getattr(first, field.name), getattr(second, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            assert left.dtype == right.dtype and np.array_equal(left, right), field.name


def folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "prepared" / "shop").iterdir() if path.is_dir()]


@pytest.mark.parametrize("times", [np.int64, np.float64, None])
@pytest.mark.parametrize("items", [METADATA, None], ids=["items", "no-items"])
def test_a_second_start_gives_the_same_without_the_source(cache, caplog, times, items):
    log = make_log(times)
    shop = Shop(dataclasses.replace(log, user_names=np.array([*USERS[:-1], "z" * 10_000])), items)
    first, second = shop.load(), shop.load()
    assert shop.reads == 1
    assert_same(first[0], build_interactions(shop.log, 1))
    assert_same(first[0], second[0])
    assert first[1] == second[1] == items
    assert (first[0].timestamps is None) == (times is None)
    assert second[0].items.flags.writeable
    assert not [record for record in caplog.records if "duplicates" not in record.getMessage()]


def test_times_follow_their_items(cache):
    codes = [np.array(codes, np.int32) for codes in ([0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2])]
    log = RawLog(*codes, np.array(["u", "v"]), np.array(["a", "b", "c"]), np.array([5, 1, 3, 0, 4, 9]))
    interactions = Shop(log, None).load()[0]
    assert interactions.items.tolist() == [3, 2, 1, 1, 2, 3]
    assert interactions.timestamps.tolist() == [3, 4, 5, 0, 1, 9]


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    st.dictionaries(st.text(min_size=1, max_size=20), st.binary(max_size=300), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_examples_are_decoded_in_any_order_of_their_features(fields, rng):
    def message(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size >= 128:
            size, length = size >> 7, length + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    entries = [message(1, message(1, k.encode()) + message(2, message(1, message(1, v)))) for k, v in fields.items()]
    rng.shuffle(entries)
    assert shards.decode_example(message(1, b"".join(entries))) == fields


@pytest.mark.parametrize("users", [250_000, 7])
def test_tfds_reads_the_shards_too(cache, users, monkeypatch):
    import tensorflow_datasets as tfds

    from kdsr_jax.data import shard_writer

    monkeypatch.setattr(shard_writer, "USERS_PER_SHARD", users)
    interactions, _ = Shop().load()
    assert_same(interactions, Shop().load()[0])
    [folder] = folders(cache)
    shard_files = list((folder / shards.NAME / shards.VERSION).glob("*.array_record-*"))
    assert len(shard_files) == -(-interactions.num_users // users)
    source = tfds.builder_from_directory(folder / shards.NAME / shards.VERSION).as_data_source(split="train")
    assert "tensorflow" not in sys.modules
    assert len(source) == interactions.num_users
    for user in (0, 5, interactions.num_users - 1):
        rows = slice(*interactions.offsets[user : user + 2])
        assert source[user]["user_id"].decode() == interactions.user_ids[user]
        assert np.array_equal(source[user]["items"], interactions.items[rows])
        assert np.array_equal(source[user]["timestamps"], interactions.timestamps[rows])


def test_settings_that_change_the_result_have_their_own_place(cache, caplog):
    shop = Shop()
    assert shop.load(1)[0].num_users > shop.load(4)[0].num_users
    shop.load(1), shop.load(4)
    assert shop.reads == 2 and len(folders(cache)) == 2
    other = Shop(make_log(seed=1), place="elsewhere", digest="b")
    assert not np.array_equal(other.load()[0].items, shop.load()[0].items)
    assert shop.reads == 2 and len(folders(cache)) == 3


def test_a_source_that_has_changed_is_prepared_anew(cache, caplog):
    Shop(digest="a").load()
    caplog.clear()
    changed = Shop(make_log(seed=1), digest="b")
    assert_same(changed.load()[0], build_interactions(changed.log, 1))
    assert [r.getMessage() for r in caplog.records if "stale" in r.getMessage()] and changed.reads == 1
    assert len(folders(cache)) == 1
    changed.load()
    assert changed.reads == 1


def test_planted_shops_of_other_settings_live_side_by_side(cache, caplog):
    settings = default.get_config().data.planted.to_dict() | {"num_users": 60, "num_items": 40}
    first = {}
    for seed in (0, 1, 0, 1):
        planted = settings | {"seed": seed}
        data = types.SimpleNamespace(
            name="shop", source="planted", root="", k_core=1, user_fraction=1.0, modalities=(), planted=planted
        )
        dataset = load_dataset(data)
        assert_same(dataset.interactions, first.setdefault(seed, dataset.interactions))
        assert dataset.items[1]["item_id"] == dataset.interactions.item_ids[1]
        assert_same(dataset.interactions, build_interactions(dataset.oracle.log, 1))
    assert len(folders(cache)) == 2 and not caplog.records


def test_what_is_read_back_is_compared_to_its_end(monkeypatch):
    monkeypatch.setattr(prepared, "_BLOCK", 2)
    users, items = np.array(["u", "v", "w"]), np.array(["", *"abcde"])
    first = Interactions(np.arange(1, 6, dtype=np.int32), np.array([0, 2, 3, 5]), users, items, np.arange(5.0))
    names = [field.name for field in dataclasses.fields(first) if getattr(first, field.name) is not None]
    for name in names:
        other = getattr(first, name).copy()
        assert prepared._same(first, dataclasses.replace(first, **{name: other}))
        other[-1] = other[-2]
        assert not prepared._same(first, dataclasses.replace(first, **{name: other}))
        assert not prepared._same(first, dataclasses.replace(first, **{name: other[:-1]}))
        assert not prepared._same(first, dataclasses.replace(first, **{name: None}))


def test_an_older_form_is_prepared_anew(cache, caplog, monkeypatch):
    shop = Shop()
    monkeypatch.setattr(prepared, "FORMAT", prepared.FORMAT - 1)
    shop.load()
    monkeypatch.undo()
    monkeypatch.setenv("KDSR_CACHE", str(cache))
    shop.load()
    assert shop.reads == 2 and len(folders(cache)) == 1
    assert sum("stale" in record.getMessage() for record in caplog.records) == 1


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit, cut, empty or remove a file."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "empty", "remove"))
    if kind == "remove":
        path.unlink()
        return
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content if kind == "flip" else content[: rng.randrange(len(content)) if kind == "cut" else 0])


def test_every_damage_is_noticed(cache, tmp_path):
    shop, rng = Shop(), random.Random(0)
    expected, items = shop.load()
    [folder] = folders(cache)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    noticed = 0
    for _ in range(150):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / rng.choice(files), rng)
        try:
            found = shards.read(copy)
        except shards.Damaged:
            noticed += 1
        else:  # a bit of the manifest that says nothing about the data, such as where it is from
            assert_same(found[0], expected)
            assert found[1] == items
        shutil.rmtree(copy)
    assert noticed > 100


@pytest.mark.parametrize("name", ["manifest.json", "items.json", "features.json", "array_record", "everything"])
def test_damaged_data_is_made_anew_with_one_warning(cache, caplog, name):
    shop = Shop()
    shop.load()
    [folder] = folders(cache)
    if name == "everything":
        shutil.rmtree(folder)
        folder.write_text("not a folder")
    else:
        [path] = [path for path in folder.rglob("*") if name in path.name]
        path.write_bytes(path.read_bytes()[:-40])
    caplog.clear()
    assert_same(shop.load()[0], build_interactions(shop.log, 1))
    messages = [record.getMessage() for record in caplog.records if "duplicates" not in record.getMessage()]
    assert len(messages) == 1 and "damaged" in messages[0] and "made anew" in messages[0] and "\n" not in messages[0]
    shop.load()
    assert shop.reads == 2 and len(folders(cache)) == 1


def test_other_files_with_right_digests_are_no_data(cache):
    shop = Shop()
    shop.load()
    [folder] = folders(cache)
    (folder / "manifest.json").write_text(json.dumps({"origin": "x", "files": {}}))
    shutil.rmtree(folder / shards.NAME)
    shop.load()
    assert shop.reads == 2


@pytest.mark.parametrize("where", ["below-a-file", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, monkeypatch, caplog, where):
    (tmp_path / "below-a-file").write_text("")
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / where / "cache"))
    shop = Shop()
    for reads in (1, 2):
        caplog.clear()
        assert_same(shop.load()[0], build_interactions(shop.log, 1))
        messages = [record.getMessage() for record in caplog.records if "cannot be kept" in record.getMessage()]
        assert len(messages) == 1 and "\n" not in messages[0]
        assert shop.reads == reads


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, "tests")
import numpy as np
from test_prepared import Shop, assert_same, build_interactions
import kdsr_jax.data.shard_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
shop = Shop()
assert_same(shop.load()[0], build_interactions(shop.log, 1))
"""


@pytest.mark.parametrize("most", [3_000, *(pytest.param(most, marks=pytest.mark.slow) for most in (0, 100, 66_000))])
def test_a_full_disk_does_not_stop_a_run_and_leaves_nothing_behind(cache, repository, most):
    done = run_python(repository, FULL_DISK, str(most))
    assert done.returncode == 0, done.stderr
    assert "cannot be kept" in done.stderr, done.stderr
    assert not folders(cache) if (cache / "prepared" / "shop").exists() else True


def run_python(repository, program, *words):
    return subprocess.run(
        [sys.executable, "-c", program, *words], check=False, cwd=repository, capture_output=True, text=True, timeout=60
    )


def test_what_reads_back_differently_is_not_kept(cache, caplog, monkeypatch):
    shop, read = Shop(), shards.read
    monkeypatch.setattr(shards, "read", lambda place: (dataclasses.replace(read(place)[0], timestamps=None), None))
    shop.load()
    assert "cannot be kept" in caplog.records[-1].getMessage() and not folders(cache)


def test_where_memory_is_short_it_is_read_back_into_mapped_files(cache, monkeypatch):
    shop = Shop()
    expected = shop.load()[0]
    shutil.rmtree(cache)
    monkeypatch.setenv("KDSR_MEMORY", "400000")
    assert_same(shop.load()[0], expected)
    found = shop.load()[0]
    assert_same(found, expected)
    assert isinstance(found.items, np.memmap) and shop.reads == 2


def test_what_would_not_fit_the_memory_is_not_kept(cache, caplog, monkeypatch):
    shop = Shop()
    monkeypatch.setattr(prepared, "machine_memory", lambda: 1000)
    assert_same(shop.load()[0], shop.load()[0])
    assert "more than this machine has" in caplog.records[-1].getMessage() and not (cache / "prepared").exists()


def test_without_array_record_the_source_is_read(cache, caplog, monkeypatch):
    found = prepared.find_spec
    monkeypatch.setattr(prepared, "find_spec", lambda name: None if name == "array_record" else found(name))
    shop = Shop()
    assert_same(shop.load()[0], shop.load()[0])
    assert shop.reads == 2 and not cache.exists()
    assert sum("is not installed" in record.getMessage() for record in caplog.records) == 2


TWO = """
import sys, time
sys.path.insert(0, "tests")
from test_prepared import Shop
import kdsr_jax.data.shard_writer
shop = Shop()
print("ready", flush=True)
sys.stdin.readline()
interactions, items = shop.load()
print(int(interactions.items.sum()), int(interactions.timestamps.sum()), items[3]["d"]["k"][:2])
"""


def test_two_processes_at_once(cache, repository):
    command, pipe = [sys.executable, "-c", TWO], subprocess.PIPE
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(command, cwd=repository, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )
            for _ in range(2)
        ]
        for process in both:
            assert process.stdout.readline() == "ready\n"
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=60) for process in both]
    assert answers[0][0] == answers[1][0] != ""
    assert "damaged" not in answers[0][1] + answers[1][1] and "cannot be kept" not in answers[0][1] + answers[1][1]
    assert len(folders(cache)) == 1
    shop = Shop()
    assert_same(shop.load()[0], build_interactions(shop.log, 1))
    assert shop.reads == 0


def test_what_a_killed_process_left_is_removed_and_a_busy_one_is_left_alone(cache):
    import fcntl

    root = cache / "prepared" / "shop"
    (root / ".tmp-123").mkdir(parents=True)
    shop = Shop()
    with open(root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shop.load()
        assert [path.name for path in folders(cache)] == [".tmp-123"]
    shop.load()
    [folder] = folders(cache)
    assert folder.name != ".tmp-123" and shop.reads == 2


def test_a_second_start_imports_neither_tfds_nor_jax(cache, repository):
    Shop().load()
    program = (
        TWO.replace("import kdsr_jax.data.shard_writer\n", "")
        + "print([n for n in ('tensorflow_datasets', 'jax') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=repository,
        input="go\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("[]\n")


def test_nothing_is_said_on_stdout(cache, capfd):
    Shop().load()
    assert capfd.readouterr().out == ""


def test_a_mistake_in_the_source_is_not_cached(cache):
    shop = Shop(RawLog(*(np.zeros(0, np.int32),) * 2, *(np.zeros(0, str),) * 2))
    with pytest.raises(UserError, match="the log is empty"):
        shop.load()
    assert not (cache / "prepared" / "shop").exists()
