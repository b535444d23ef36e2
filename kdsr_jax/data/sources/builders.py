"""Writes prepared histories as a TFDS data set in array_record shards, one record a user.

No TensorFlow is needed. TensorFlow Datasets takes a quarter of a second to import, so this is imported only to write.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.shards import NAME, VERSION


class KdsrHistories(tfds.core.GeneratorBasedBuilder):
    """One record a user: raw id, item numbers oldest first, and when each was taken, where that is known."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, interactions: Interactions, **kwargs: Any) -> None:
        self._interactions = interactions
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        arrays = {name: _array(values) for name, values in self._columns().items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Histories after k-core filter and numbering, users in the order of their numbers.",
            features=tfds.features.FeaturesDict({"user_id": tfds.features.Text(), **arrays}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        columns, offsets = self._columns(), self._interactions.offsets.tolist()
        for user, user_id in enumerate(self._interactions.user_ids.tolist()):
            rows = slice(offsets[user], offsets[user + 1])
            yield user, {"user_id": user_id, **{name: values[rows] for name, values in columns.items()}}

    def _columns(self) -> dict[str, np.ndarray]:
        """Return the arrays that are cut into histories."""
        columns = {"items": self._interactions.items, "timestamps": self._interactions.timestamps}
        return {name: values for name, values in columns.items() if values is not None}


def write(folder: Path, interactions: Interactions) -> None:
    """Write histories into an existing folder.

    Raises:
        Exception: whatever goes wrong in the libraries, such as OSError for a full disk.
    """
    tfds.disable_progress_bar()
    alone = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself, where --mode=stats prints JSON
        builder = KdsrHistories(interactions, data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_config=alone)


def _array(values: np.ndarray) -> tfds.features.Tensor:
    """Describe an array that is stored as it lies in memory: a list of numbers reads ten times slower."""
    return tfds.features.Tensor(shape=(None,), dtype=values.dtype, encoding=tfds.features.Encoding.BYTES)
