"""Fingerprints of a data set's content."""

import hashlib
from typing import Any

import numpy as np


def data_digest(dataset) -> str:
    """Return the sha256 of what training and evaluation read of a dataset: histories, raw ids and features."""
    digest = _log_digest(dataset.interactions)
    for name, feature in dataset.features.items():
        digest.update(name.encode() + feature.values.tobytes() + feature.has_feature.tobytes())
    return digest.hexdigest()


def log_digest(dataset) -> str:
    """Return the sha256 of a dataset's histories and raw ids."""
    return _log_digest(dataset.interactions).hexdigest()


def _log_digest(data):
    digest = hashlib.sha256()
    for part in (data.items, data.offsets, "\n".join(data.user_ids), "\n".join(data.item_ids)):
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return digest


def feature_digests(dataset) -> dict[str, dict[str, Any]]:
    """Return by modality "sha256", of the features that belong to the items, and "recipe", how they were made if known."""
    return {
        name: {
            "sha256": hashlib.sha256(feature.values.tobytes() + feature.has_feature.tobytes()).hexdigest(),
            "recipe": feature.recipe,
        }
        for name, feature in dataset.features.items()
    }
