"""Reads prepared data back: histories in array_record shards and the item map in JSON, checked against their sha256.

The shards are those of a TFDS data set (``shard_writer.py``), and TFDS can read them, too. All records are wanted
here, so shards are read in bulk and decoded by hand, which needs neither TFDS nor protobuf and a tenth of the time.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.spill import Numbers

NAME, VERSION = "kdsr_histories", "1.0.0"
_ITEMS, _MANIFEST = "items.json", "manifest.json"


class Damaged(Exception):
    """Prepared data that is not whole, or not what was written."""


def complete(folder: Path, item_ids: np.ndarray, items: list[dict] | None, origin: str) -> None:
    """Write all but the shards.

    Args:
        folder: where ``shard_writer.write`` wrote the shards.
        item_ids: [N + 1] unicode, raw item ids.
        items: N + 1 objects of JSON, or None.
        origin: what the data was prepared from.
    """
    (folder / _ITEMS).write_text(json.dumps({"item_ids": item_ids.tolist(), "items": items}))
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / _MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=1) + "\n")


def origin_of(folder: Path) -> str | None:
    """Return what prepared data was prepared from; None where that cannot be read."""
    try:
        return json.loads((folder / _MANIFEST).read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(folder: Path) -> tuple[Interactions, list[dict] | None]:
    """Read prepared data.

    Args:
        folder: one that ``shard_writer.write`` and ``complete`` wrote to.

    Returns:
        The interactions, and N + 1 objects of metadata or None.

    Raises:
        Damaged: a file is missing, has another content than it was written with, or cannot be read.
    """
    try:
        _verify(folder)
        maps, place = json.loads((folder / _ITEMS).read_text()), folder / NAME / VERSION
        kinds = json.loads((place / "features.json").read_text())["featuresDict"]["features"]
        columns = {name: kind["tensor"]["dtype"] for name, kind in kinds.items() if "tensor" in kind}
        numbers, sizes, user_ids = {name: Numbers() for name in columns}, [], []
        # Records as objects are many times as large as what they hold: no more than one shard's are there at a time.
        for shard in sorted(place.glob("*.array_record-*")):
            part = _read_shard(shard, columns)
            sizes.append(part.pop("sizes"))
            user_ids.append(part.pop("user_id"))
            for name, values in part.items():
                numbers[name].append(values)
        whole = {name: numbers[name].array(np.dtype(kind)) for name, kind in columns.items()}
        interactions = Interactions(
            items=whole["items"],
            offsets=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64),
            user_ids=np.concatenate(user_ids),
            item_ids=np.array(maps["item_ids"]),
            timestamps=whole.get("timestamps"),
        )
        return interactions, maps["items"]
    except (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _verify(folder: Path) -> None:
    """Hold every file against the manifest."""
    for name, digest in json.loads((folder / _MANIFEST).read_text())["files"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} has another sha256 than it was written with")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_shard(shard: Path, columns: dict[str, str]) -> dict[str, np.ndarray]:
    """Return a shard's columns, its users' raw ids as "user_id", and how many items each has as "sizes"."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(shard))
    records = [decode_example(record) for record in reader.read_all()]
    reader.close()
    part = {
        name: np.frombuffer(b"".join([record[name] for record in records]), dtype) for name, dtype in columns.items()
    }
    itemsize = np.dtype(columns["items"]).itemsize
    part["sizes"] = np.array([len(record["items"]) // itemsize for record in records])
    part["user_id"] = np.array([record["user_id"].decode() for record in records])
    return part


def decode_example(record: bytes) -> dict[str, bytes]:
    """Decode a serialized ``tf.train.Example`` whose features are lists of one text.

    The message is ``{1: {1: {1: name, 2: {1: {1: text}}}, ...}}``, each number a field and each brace a length.

    Args:
        record: the message.

    Returns:
        The texts by name.

    Raises:
        IndexError: the record is cut short.
    """
    fields = {}
    _, place = _length(record, 0)
    while place < len(record):
        size, place = _length(record, place)  # of an entry of the map
        end = place + size
        size, place = _length(record, place)
        name = record[place : place + size].decode()
        place += size
        for _ in range(3):  # the feature, its list, the text
            size, place = _length(record, place)
        fields[name] = record[place : place + size]
        place = end
    return fields


def _length(record: bytes, place: int) -> tuple[int, int]:
    """Read the length behind the one byte of a field's tag; return it and where its content begins."""
    place += 1
    size = record[place]
    place += 1
    shift = 7
    if size >= 128:
        size &= 127
        while True:
            byte = record[place]
            place += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
    return size, place
