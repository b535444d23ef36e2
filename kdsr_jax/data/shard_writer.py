"""Writes prepared histories as a TFDS data set in array_record shards, one record a user.

No TensorFlow is needed: TFDS's usual builders need it to sort more than a gigabyte, while its sequential writer appends record
after record. TensorFlow Datasets takes a quarter of a second to import, so this is imported only to write.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.shards import NAME, VERSION

USERS_PER_SHARD = 250_000
_USERS_AT_ONCE = 2**16  # that are Python objects


def write(folder: Path, interactions: Interactions) -> None:
    """Write histories into an existing folder.

    A record holds a user's raw id, item numbers oldest first, and when each was taken, where that is known.

    Raises:
        Exception: whatever goes wrong in the libraries, such as OSError for a full disk.
    """
    columns = {"items": interactions.items, "timestamps": interactions.timestamps}
    columns = {name: values for name, values in columns.items() if values is not None}
    place = folder / NAME / VERSION
    place.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(NAME, tfds.core.Version(VERSION), str(place), __name__)
    info = tfds.core.DatasetInfo(
        builder=identity,
        description="Histories after k-core filter and numbering, users in the order of their numbers.",
        features=tfds.features.FeaturesDict(
            {"user_id": tfds.features.Text(), **{name: _array(values) for name, values in columns.items()}}
        ),
        disable_shuffling=True,
    )
    writer = tfds.core.SequentialWriter(info, USERS_PER_SHARD, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": _records(interactions, columns)})
    writer.close_all()


def _records(interactions: Interactions, columns: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield every user's record; columns are cut by the offsets of the interactions."""
    for begin in range(0, interactions.num_users, _USERS_AT_ONCE):
        users = slice(begin, begin + _USERS_AT_ONCE)
        ends, start = interactions.offsets[1:][users].tolist(), int(interactions.offsets[begin])
        for user_id, end in zip(interactions.user_ids[users].tolist(), ends, strict=True):
            yield {"user_id": user_id, **{name: values[start:end] for name, values in columns.items()}}
            start = end


def _array(values: np.ndarray) -> tfds.features.Tensor:
    """Describe an array that is stored as it lies in memory: a list of numbers reads ten times slower."""
    return tfds.features.Tensor(shape=(None,), dtype=values.dtype, encoding=tfds.features.Encoding.BYTES)
