"""Fingerprints of a data set's content."""

import hashlib
from typing import Any

import numpy as np


def data_digests(dataset) -> tuple[str, str]:
    """Return the sha256 of what training and evaluation read of a dataset, histories, raw ids and features, and that without features."""
    data, digest = dataset.interactions, hashlib.sha256()
    for part in (data.items, data.offsets, "\n".join(data.user_ids), "\n".join(data.item_ids)):
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    log = digest.hexdigest()
    for name, feature in dataset.features.items():
        digest.update(name.encode() + feature.values.tobytes() + feature.has_feature.tobytes())
    return digest.hexdigest(), log


def feature_digests(dataset) -> dict[str, dict[str, Any]]:
    """Return by modality "sha256", of the features that belong to the items, and "recipe", how they were made if known."""
    return {
        name: {
            "sha256": hashlib.sha256(feature.values.tobytes() + feature.has_feature.tobytes()).hexdigest(),
            "recipe": feature.recipe,
        }
        for name, feature in dataset.features.items()
    }
