"""The folder source: three log formats, item metadata, and one clear line for everything that is wrong with them."""

import datetime
import gzip
import json
import logging
import os
import re
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from configs import default
from kdsr_jax.data import load_dataset, spill
from kdsr_jax.data.sources import codes, folder, tables
from kdsr_jax.errors import UserError

ROWS = [("007", "b", 3), ("7", "a", 1), ("007", "a", 2), ("7", "c,d", 4), ("007", "ü", 5), ("7", "b", 6)]
CSV = "user_id,item_id,timestamp\n" + "".join(f'{user},"{item}",{time}\n' for user, item, time in ROWS)
ITEM_IDS = np.array(["", "a", "b", "c"])


def write_log(place: Path, data: str | bytes, name: str = "interactions.csv") -> Path:
    """Write a log file, compressed where its name ends in .gz."""
    data = data.encode() if isinstance(data, str) else data
    (place / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return place


def write_parquet(place: Path, **columns) -> Path:
    """Write a log in parquet."""
    pa.parquet.write_table(pa.table(columns), place / "interactions.parquet")
    return place


def decoded(log) -> list[tuple]:
    """Return the rows of a log."""
    times = [None] * len(log.user_codes) if log.timestamps is None else log.timestamps.tolist()
    users, items = log.user_names[log.user_codes].tolist(), log.item_names[log.item_codes].tolist()
    return list(zip(users, items, times, strict=True))


def data_config(**changes) -> types.SimpleNamespace:
    """Return the data group of a config."""
    defaults = {
        "name": "shop",
        "source": "auto",
        "root": "",
        "k_core": 1,
        "user_fraction": 1.0,
        "modalities": (),
        "planted": {},
    }
    return types.SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize("name", ["interactions.csv", "interactions.csv.gz"])
def test_csv(tmp_path, name):
    log = folder.load_log(write_log(tmp_path, CSV, name))
    assert decoded(log) == ROWS
    assert log.user_codes.dtype == log.item_codes.dtype == np.int32 and log.timestamps.dtype == np.int64


def test_parquet(tmp_path):
    users, items, times = zip(*ROWS, strict=True)
    assert decoded(folder.load_log(write_parquet(tmp_path, user_id=users, item_id=items, timestamp=times))) == ROWS


def test_parquet_with_number_ids_dates_and_other_columns(tmp_path):
    times = np.array(["2020-01-02", "2020-01-01"], "M8[s]")
    log = folder.load_log(write_parquet(tmp_path, note=["x", None], item_id=[10, 9], user_id=[1, 1], timestamp=times))
    assert [row[:2] for row in decoded(log)] == [("1", "10"), ("1", "9")]
    assert log.timestamps[0] - log.timestamps[1] > 0


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("item_id,rating,user_id\na,5,u\nb,,u\n", [("u", "a", None), ("u", "b", None)]),
        ("\ufeffuser_id,item_id\r\nu,a\r\n\r\nu,b\r\n", [("u", "a", None), ("u", "b", None)]),
        ("user_id,item_id\nNA,null\nnan, 1\n", [("NA", "null", None), ("nan", " 1", None)]),
        ("user_id,item_id,timestamp\nu,a,1\nu,b,-2.5e1\n", [("u", "a", 1.0), ("u", "b", -25.0)]),
        ('user_id,item_id,review\nu,a,"two\nlines"\nu,b,\n', [("u", "a", None), ("u", "b", None)]),
    ],
    ids=["other-columns", "bom-crlf-blank-line", "words-for-null", "fractions", "line-break-in-quotes"],
)
def test_csv_dialects(tmp_path, text, rows):
    assert decoded(folder.load_log(write_log(tmp_path, text))) == rows


HEAD = "user_id,item_id,timestamp\nu,a,1\n"
LONG = HEAD + "u,a,1\n" * 300_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "interactions.csv: its first line must name the columns, and is blank"),
        ("user_id,item_id\n", "interactions.csv: the log is empty: it has no interactions"),
        ("user_id,item\nu,a\n", "interactions.csv: column 'item_id' is missing; the file has: user_id, item"),
        ("user_id,item_id,user_id\nu,a,v\n", "column 'user_id' occurs more than once"),
        (HEAD + "u,b\n", "interactions.csv: row 2 (line 3): 2 fields where the header has 3"),
        (HEAD + "\nu,b,2,3\n", "row 2 (line 4): 4 fields where the header has 3"),
        (LONG + "u,b\n", "row 300002 (line 300003): 2 fields where the header has 3"),
        (HEAD.encode() + b"u,\xff,2\n", "interactions.csv: row 2 (line 3): not UTF-8"),
        (LONG.encode() + b"\xe9,b,2\n", "row 300002 (line 300003): not UTF-8"),
        (b"user_id,item_id,\xff\nu,a,1\n", "row 0 (line 1, the header): not UTF-8"),
        ("user_id,item_id\ru,a\ru,b\r", "row 0 (line 1, the header): not readable as csv"),
        ("user_id,item_id\nu,a\nu,a\rb\nu\n", "line 3: not readable as csv"),
        (HEAD + "u,,2\n", "interactions.csv: row 2 (line 3): 'item_id' is empty"),
        (HEAD + '"",a,2\n', "interactions.csv: row 2 (line 3): 'user_id' is empty"),
        (
            'user_id,item_id\nu,a\nu,"b\nu,c\n',
            "row 2 (line 4): 'item_id' is empty, missing, or holds a line break or zero byte (an unclosed quote?)",
        ),
        (HEAD + "u,b,2014-07-23\n", "row 2 (line 3): timestamp '2014-07-23' is not a number"),
        (HEAD + "\nu,b,\n", "row 2 (line 4): timestamp '' is not a number"),
        (HEAD + "u,b,2\nu,b,nan\n", "row 3 (line 4): timestamp 'nan' is not a number"),
        (HEAD + "u,b,2.5\nu,b,inf\nu,b,x\n", "row 3 (line 4): timestamp 'inf' is not a number"),
    ],
)
def test_bad_csv(tmp_path, data, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        folder.load_log(write_log(tmp_path, data))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [15, 1000, -3])
def test_truncated_gzip(tmp_path, kept):
    rows = "".join(f"u{n % 97},i{n * 7919 % 1009},{n}\n" for n in range(20_000))
    (tmp_path / "interactions.csv.gz").write_bytes(gzip.compress((HEAD + rows).encode())[:kept])
    with pytest.raises(UserError, match="interactions.csv.gz: broken gzip file, cut short or damaged"):
        folder.load_log(tmp_path)


def test_a_plain_file_that_is_named_gz(tmp_path):
    (tmp_path / "interactions.csv.gz").write_text(CSV)
    with pytest.raises(UserError, match="interactions.csv.gz: broken gzip file.*Not a gzipped file"):
        folder.load_log(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["u"]}, "column 'item_id' is missing; the file has: user_id"),
        ({"user_id": ["u", None], "item_id": ["a", "b"]}, "row 2: 'user_id' is empty"),
        ({"user_id": ["u"], "item_id": pa.array([None], pa.string())}, "row 1: 'item_id' is empty"),
        ({"user_id": [1.0], "item_id": ["a"]}, "column 'user_id' is of type double; ids must be"),
        (
            {"user_id": ["u"], "item_id": ["a"], "timestamp": ["noon"]},
            "column 'timestamp' is of type string; times must",
        ),
        ({"user_id": ["u"] * 2, "item_id": ["a"] * 2, "timestamp": [1.5, np.nan]}, "row 2: timestamp nan is not"),
        ({"user_id": ["u"] * 2, "item_id": ["a"] * 2, "timestamp": [1, None]}, "row 2: timestamp None is not"),
        ({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())}, "the log is empty"),
    ],
)
def test_bad_parquet(tmp_path, columns, message):
    with pytest.raises(UserError, match=f"interactions.parquet: {message}"):
        folder.load_log(write_parquet(tmp_path, **columns))


def test_a_small_parquet_of_many_rows_is_refused_before_it_is_read(tmp_path, monkeypatch):
    rows = 3_000_000
    same = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["u"])
    file = write_parquet(tmp_path, user_id=same, item_id=same) / "interactions.parquet"
    assert file.stat().st_size < 20_000
    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(tables, "_room", lambda: 2 * 8 * rows - 1)
    with pytest.raises(
        UserError, match="interactions.parquet: it claims 3,000,000 rows, which need .* this machine has"
    ):
        folder.load_log(tmp_path)
    monkeypatch.setattr(tables, "_MOST_ROWS", rows - 1)
    with pytest.raises(UserError, match="it claims 3,000,000 rows, more than 2,999,999"):
        folder.load_log(tmp_path)


def write_shards(place: Path, parts: dict[str, dict]) -> Path:
    """Write a log in parquet files of a folder."""
    (place / "interactions").mkdir(exist_ok=True)
    for name, columns in parts.items():
        pa.parquet.write_table(pa.table(columns), place / "interactions" / name, row_group_size=2)
    return place


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path):
    users, items, times = zip(*ROWS, strict=True)
    columns = {"user_id": users, "item_id": items, "timestamp": times}
    parts = {
        name: {key: list(values[rows]) for key, values in columns.items()}
        for name, rows in (("b.parquet", slice(4, 6)), ("a.parquet", slice(0, 3)), ("aa.parquet", slice(3, 4)))
    }
    write_shards(tmp_path, parts)
    (tmp_path / "interactions" / "_SUCCESS").touch()
    assert decoded(folder.load_log(tmp_path)) == ROWS
    one = folder.find(tmp_path).digest
    (tmp_path / "interactions" / "b.parquet").rename(tmp_path / "interactions" / "0.parquet")
    assert folder.find(tmp_path).digest != one
    assert decoded(folder.load_log(tmp_path)) == ROWS[4:] + ROWS[:4]
    write_log(tmp_path, CSV)
    with pytest.raises(UserError, match="interactions.csv and interactions both exist; keep one"):
        folder.load_log(tmp_path)


def test_parquet_files_of_different_types_and_an_empty_one_are_one_log(tmp_path):
    texts = pa.array(["7", "8"]).dictionary_encode()
    parts = {
        "0.parquet": {"user_id": [7, 7], "item_id": texts, "timestamp": [1, 2]},
        "1.parquet": {"user_id": pa.array([], pa.string()), "item_id": [], "timestamp": pa.array([], pa.int8())},
        "2.parquet": {
            "item_id": pa.array(["a", "8"], pa.large_string()),
            "timestamp": [0.5, 3.0],
            "user_id": ["u", "7"],
        },
    }
    parts["1.parquet"]["item_id"] = pa.array([], pa.string())
    log = folder.load_log(write_shards(tmp_path, parts))
    assert decoded(log) == [("7", "7", 1.0), ("7", "8", 2.0), ("u", "a", 0.5), ("7", "8", 3.0)]
    assert log.user_names.tolist() == ["7", "u"] and log.timestamps.dtype == np.float64


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"user_id": ["u"]}, "b.parquet: column 'item_id' is missing; the file has: user_id"),
        ({"user_id": ["u"], "item_id": ["a"]}, "b.parquet: column 'timestamp' is missing; a.parquet has it"),
        ({"user_id": ["u"] * 3, "item_id": ["a", "b", ""], "timestamp": [1, 2, 3]}, "b.parquet: row 3: 'item_id' is"),
        ({"user_id": ["u"] * 3, "item_id": ["a"] * 3, "timestamp": [1, 2, None]}, "b.parquet: row 3: timestamp None"),
        ({"user_id": [1.5], "item_id": ["a"], "timestamp": [1]}, "b.parquet: column 'user_id' is of type double"),
    ],
)
def test_a_mistake_in_a_folder_of_parquet_files_names_the_file(tmp_path, second, message):
    first = {"user_id": ["u"] * 5, "item_id": ["a"] * 5, "timestamp": [1] * 5}
    write_shards(tmp_path, {"a.parquet": first, "b.parquet": second})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "interactions" / message))):
        folder.load_log(tmp_path)


def test_an_empty_or_broken_folder_of_parquet_files(tmp_path):
    (tmp_path / "interactions").mkdir()
    with pytest.raises(UserError, match=re.escape("no interactions file; looked for interactions.csv")):
        folder.load_log(tmp_path)
    nothing = pa.array([], pa.string())
    write_shards(tmp_path, {"a.parquet": {"user_id": nothing, "item_id": nothing}})
    with pytest.raises(UserError, match="/interactions: the log is empty: it has no interactions"):
        folder.load_log(tmp_path)
    (tmp_path / "interactions" / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="interactions/b.parquet: not a readable parquet file"):
        folder.load_log(tmp_path)


def test_the_claims_of_all_parquet_files_are_added_up(tmp_path, monkeypatch):
    one = {"user_id": ["u"] * 3, "item_id": ["a"] * 3}
    write_shards(tmp_path, {"a.parquet": one, "b.parquet": one})
    monkeypatch.setattr(tables, "_MOST_ROWS", 5)
    with pytest.raises(UserError, match="b.parquet: it claims 6 rows, more than 5"):
        folder.load_log(tmp_path)


@pytest.mark.parametrize("fractions", [False, True])
def test_a_log_in_many_small_batches_and_on_disk_is_the_same_log(tmp_path, monkeypatch, fractions):
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 40, 500), rng.zipf(1.5, 500) % 30
    times = [float(n) / 2 if fractions and n > 300 else int(n) for n in rng.permutation(500)]
    text = "".join(f"u{u},i{i},{t}\n" for u, i, t in zip(users, items, times, strict=True))
    whole = folder.load_log(write_log(tmp_path, "user_id,item_id,timestamp\n" + text))
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 200)
    monkeypatch.setattr(codes, "_MERGED_ROWS", 64)
    monkeypatch.setattr(spill, "machine_memory", lambda: 16 * 700)  # bytes of a column in memory
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))
    parts = folder.load_log(tmp_path)
    assert isinstance(parts.user_codes, np.memmap) and isinstance(parts.timestamps, np.memmap)
    assert decoded(parts) == decoded(whole)
    assert parts.timestamps.dtype == whole.timestamps.dtype == (np.float64 if fractions else np.int64)
    assert parts.item_names.tolist() == whole.item_names.tolist()
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name


def test_a_log_that_fits_neither_memory_nor_disk_is_one_line(disk, fill_up, tmp_path, monkeypatch):
    write_log(tmp_path, "user_id,item_id\n" + "".join(f"u{n % 9},i{n}\n" for n in range(200_000)))
    monkeypatch.setattr(spill, "machine_memory", lambda: 0)
    monkeypatch.setenv("KDSR_CACHE", str(disk / "cache"))
    fill_up(100_000)
    with pytest.raises(UserError, match="cache: the log is larger .* \\(No space left on device\\); KDSR_CACHE names"):
        folder.load_log(tmp_path)


def test_a_quote_that_is_never_closed_in_a_column_that_is_not_read_is_named(tmp_path):
    rows = [f"u{n % 9},i{n % 7},fine" for n in range(90)]
    rows[40] = 'u4,i5,"so big'
    path = write_log(tmp_path, "\n".join(["user_id,item_id,comment", *rows]) + "\n")
    with pytest.raises(
        UserError, match=r"interactions.csv: row 41 \(line 42\): a quote is opened that is never closed"
    ):
        folder.load_log(path)
    rows[40] = 'u4,i5,5" pipe'  # no quote but an inch
    write_log(tmp_path, "\n".join(["user_id,item_id,comment", *rows]) + "\n")
    assert len(folder.load_log(path).user_codes) == 90


def test_a_root_that_cannot_be_looked_into_is_one_line(tmp_path):
    config = default.get_config()
    config.data.root, config.data.name, config.data.source = str(tmp_path / ("x" * 300)), "shop", "auto"
    with pytest.raises(UserError, match=r"shop: cannot be read \(File name too long\)"):
        load_dataset(config.data, ())


def test_items_that_begin_with_a_mark_of_their_byte_order(tmp_path):
    write_log(tmp_path, "user_id,item_id\nu,a\n")
    (tmp_path / "items.jsonl").write_text('\ufeff{"item_id": "a", "title": "x"}\n')
    assert folder.load_items(tmp_path, np.array(["", "a"]))[1]["title"] == "x"


def test_broken_parquet(tmp_path):
    with pytest.raises(UserError, match="interactions.parquet: not a readable parquet file"):
        folder.load_log(write_log(tmp_path, CSV, "interactions.parquet"))


def test_no_log_and_two_logs(tmp_path):
    with pytest.raises(UserError, match="looked for interactions.csv, interactions.csv.gz, interactions.parquet"):
        folder.load_log(tmp_path)
    write_log(write_log(tmp_path, CSV), CSV, "interactions.csv.gz")
    with pytest.raises(UserError, match="interactions.csv and interactions.csv.gz both exist; keep one"):
        folder.load_log(tmp_path)


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_items(tmp_path, name, caplog):
    lines = [{"item_id": "c", "title": "ü"}, {"item_id": "zz"}, {"item_id": "a", "tags": [1]}]
    write_log(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", name)
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        items = folder.load_items(tmp_path, ITEM_IDS)
    assert items == [{}, lines[2], {}, lines[0]]
    [record] = caplog.records
    assert record.getMessage().endswith("ignored 1 items outside the log")


def test_items_that_are_all_in_the_log_are_silent(tmp_path, caplog):
    write_log(tmp_path, '{"item_id": "a"}\n', "items.jsonl")
    with caplog.at_level(logging.INFO, "kdsr_jax"):
        folder.load_items(tmp_path, ITEM_IDS)
    assert not caplog.records


def test_item_ids_that_are_numbers_become_strings(tmp_path):
    write_log(tmp_path, '{"item_id": 7}', "items.jsonl")
    assert folder.load_items(tmp_path, np.array(["", "07", "7"])) == [{}, {}, {"item_id": "7"}]


def test_items_of_parquet_hold_what_json_can(tmp_path):
    when = datetime.date(2020, 1, 2)
    pa.parquet.write_table(pa.table({"item_id": ["a"], "since": [when], "raw": [b"x"]}), tmp_path / "items.parquet")
    items = folder.load_items(tmp_path, np.array(["", "a"]))
    assert items == [{}, {"item_id": "a", "since": "2020-01-02", "raw": "b'x'"}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o000)
    with pytest.raises(UserError, match=r"shut: cannot be read \(Permission denied\)"):
        folder.load_log(tmp_path / "shut")


def test_a_name_that_is_too_long_for_a_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        folder.load_log(tmp_path / (300 * "x"))


def test_a_title_that_no_item_has_and_a_column_that_occurs_twice_are_named(tmp_path):
    ids = np.array(["", "a"])
    (tmp_path / "items.csv").write_text("item_id,name\na,mug\n")
    assert folder.load_items(tmp_path, ids, {"title": "name"})[1]["title"] == "mug"
    with pytest.raises(UserError, match=r"items.csv: no item has 'nmae', which --config.data.columns.title names"):
        folder.load_items(tmp_path, ids, {"title": "nmae"})
    (tmp_path / "items.csv").write_text("item_id,title,title\na,mug,cup\n")
    with pytest.raises(UserError, match=r"items.csv: column 'title' occurs more than once"):
        folder.load_items(tmp_path, ids)


def test_other_columns_of_the_same_files_are_another_source(tmp_path):
    write_log(tmp_path, CSV)
    plain, renamed = folder.find(tmp_path), folder.find(tmp_path, {"timestamp": "when"})
    assert plain.place != renamed.place and plain.digest != renamed.digest  # neither makes the other stale
    assert folder.find(tmp_path, {"timestamp": "timestamp"}).place == plain.place


def test_items_are_optional(tmp_path):
    assert folder.load_items(tmp_path, ITEM_IDS) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"item_id": "a"}\n{"item_id": \n', "items.jsonl: line 2: not JSON"),
        ('{"item_id": "a"}\n["b"]\n', "items.jsonl: line 2: not a JSON object"),
        ('{"title": "a"}\n', "items.jsonl: line 1: 'item_id' is missing"),
        ('{"item_id": 1.5}\n', "items.jsonl: line 1: 'item_id' is missing, or neither a string nor a whole number"),
        ('{"item_id": "a"}\n\n{"item_id": "a"}\n', "items.jsonl: line 3: item 'a' occurs a second time"),
        (b'{"item_id": "a"}\n{"item_id": "\xff"}\n', "items.jsonl: line 2: not UTF-8"),
    ],
)
def test_bad_items(tmp_path, data, message):
    with pytest.raises(UserError, match=re.escape(message)):
        folder.load_items(write_log(tmp_path, data, "items.jsonl"), ITEM_IDS)


def test_truncated_items(tmp_path):
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(b'{"item_id": "a"}\n{"item_id": "b"}\n')[:-9])
    with pytest.raises(UserError, match="items.jsonl.gz: broken gzip file after line"):
        folder.load_items(tmp_path, ITEM_IDS)


PLANTED = default.get_config().data.planted.to_dict() | {"num_users": 60, "num_items": 40}


def write_shop(root: Path) -> Path:
    """Write a data set `shop` with a text modality."""
    (root / "shop" / "features").mkdir(parents=True)
    write_log(root / "shop", CSV, "interactions.csv.gz")
    write_log(root / "shop", '{"item_id": "a", "title": "A"}', "items.jsonl")
    np.savez(root / "shop" / "features" / "text-x-small.npz", item_id=["b", "a"], features=np.eye(2, dtype=np.float16))
    return root


def test_load_dataset_from_a_folder(tmp_path):
    dataset = load_dataset(data_config(root=str(write_shop(tmp_path)), modalities=("text-x-small",)))
    interactions = dataset.interactions
    assert interactions.item_ids.tolist() == ["", "a", "b", "c,d", "ü"]
    assert interactions.items.tolist() == [1, 2, 4, 1, 3, 2]
    assert dataset.features["text"].values.tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 0]]
    assert dataset.items[1] == {"item_id": "a", "title": "A"} and dataset.items[2] == {}
    assert dataset.name == "shop" and dataset.oracle is None


def test_load_dataset_from_the_planted_shop():
    settings = PLANTED | {"missing_rate": 0.1, "feature_dim": 16}
    modalities = ("text-facets", "image-facets")
    dataset = load_dataset(data_config(name="planted", modalities=modalities, planted=settings, k_core=3))
    shop, item_ids = dataset.oracle, dataset.interactions.item_ids
    assert list(dataset.features) == ["text", "image"]
    assert dataset.items[0] == {} and [item["item_id"] for item in dataset.items[1:]] == item_ids[1:].tolist()
    ids, values = shop.raw_features["image"]
    features = dataset.features["image"]
    for index, item_id in enumerate(item_ids.tolist()):
        expected = values[ids.tolist().index(item_id)] if item_id in ids.tolist() else np.zeros(16)
        assert np.array_equal(features.values[index], expected)
    assert features.has_feature.tolist() == np.isin(item_ids, ids).tolist()


def test_a_folder_goes_before_the_planted_shop(tmp_path):
    write_shop(tmp_path)
    (tmp_path / "shop").rename(tmp_path / "planted")
    assert load_dataset(data_config(name="planted", root=str(tmp_path))).oracle is None
    named = data_config(name="planted", source="planted", root=str(tmp_path), planted=PLANTED)
    assert load_dataset(named).oracle is not None


def test_features_are_not_looked_for_where_no_modality_is_wanted(tmp_path):
    data = data_config(root=str(write_shop(tmp_path)), modalities=("text-absent", "image-absent"))
    with pytest.raises(UserError, match="text-absent.npz: no such features file"):
        load_dataset(data)
    assert load_dataset(data, modalities=()).features == {}
    assert list(load_dataset(data, modalities=("text-x-small",)).features) == ["text"]
    planted = data_config(name="planted", modalities=("sound-facets",), planted=PLANTED)
    assert load_dataset(planted, modalities=()).features == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "/nowhere"}, "--config.data.root=/nowhere: has no folder 'shop'; give the one that has"),
        (
            {"root": "/nowhere", "name": "beauty"},  # a slip of the pen starts no download
            "has no folder 'beauty'; give the one that has (or --config.data.source=amazon to download it)",
        ),
        (
            {"root": "/nowhere", "source": "folder", "name": "planted"},
            "/nowhere/planted holds none of interactions.csv, interactions.csv.gz, interactions.parquet",
        ),
        (
            {"name": "planted", "modalities": ("sound-facets",)},
            "--config.data.modalities: the planted shop has no 'sound-facets'; it has: image-facets, text-facets",
        ),
    ],
)
def test_bad_data_config(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_dataset(data_config(planted=PLANTED, **changes))
