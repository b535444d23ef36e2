"""Data: from files or a generator to numbered interactions, aligned features, windows and batches. No jax here."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from kdsr_jax.data.features import Features, align_features, load_features
from kdsr_jax.data.interactions import Interactions, build_interactions
from kdsr_jax.data.sources import folder, planted
from kdsr_jax.errors import UserError

__all__ = ["Dataset", "load_dataset"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All that a run knows of a data set.

    Attributes:
        name: the data set's name, `data.name`.
        interactions: the filtered log.
        features: each modality's features by name, the part of its entry before the first hyphen, in their order.
        items: metadata by item index (N + 1 objects, empty for padding), or None where there is none.
        oracle: the planted shop that knows the truth, or None for real data.
    """

    name: str
    interactions: Interactions
    features: dict[str, Features]
    items: list[dict] | None = None
    oracle: planted.PlantedShop | None = None


def load_dataset(data, modalities: Iterable[str] | None = None) -> Dataset:
    """Load what the data part of a config names.

    With `source` "auto", a folder `<root>/<name>/` that holds an interactions file is read; otherwise the name
    "planted" is the embedded shop.

    Args:
        data: the config's `data` group; `name`, `source`, `root`, `k_core`, `modalities` and `planted` (a mapping, for
            the planted source only) are read; `config.validate` has checked them.
        modalities: what to load instead of `data.modalities`; () where a model uses no features.

    Returns:
        The data set.

    Raises:
        UserError: there is no such data set, or its files break the format.
    """
    wanted = data.modalities if modalities is None else modalities
    entries = {entry.partition("-")[0]: entry for entry in wanted}
    if _choose_source(data) == "planted":
        return _load_planted(data, entries)
    place = Path(data.root) / data.name
    interactions = build_interactions(folder.load_log(place), data.k_core)
    features = {
        modality: load_features(place / "features" / f"{entry}.npz", interactions.item_ids)
        for modality, entry in entries.items()
    }
    return Dataset(data.name, interactions, features, folder.load_items(place, interactions.item_ids))


def _choose_source(data) -> str:
    """Return "folder" or "planted"."""
    place = Path(data.root) / data.name
    # An empty root names no folder: the working directory is never searched by accident.
    if data.source != "planted" and data.root and folder.find_log(place):
        return "folder"
    if data.source != "folder" and "planted" in (data.source, data.name):
        return "planted"
    missing = f"no data set {data.name!r}: {place} holds none of {', '.join(folder.LOG_NAMES)}"
    if data.source == "auto":
        missing += ", and this version has no TFDS builder of that name (builders come later)"
    raise UserError(missing)


def _load_planted(data, entries: dict[str, str]) -> Dataset:
    """Generate the planted shop and bring it into the form of every other data set."""
    shop = planted.generate(**data.planted)
    interactions = build_interactions(shop.log, data.k_core)
    features = {}
    for modality, entry in entries.items():
        if modality not in shop.raw_features:
            have = ", ".join(f"{name}-facets" for name in shop.raw_features)
            raise UserError(f"--config.data.modalities: the planted shop has no {entry!r}; it has: {have}")
        file_ids, values = shop.raw_features[modality]
        features[modality] = align_features(file_ids, values, interactions.item_ids, f"planted shop, {entry}")
    metadata = {item["item_id"]: item for item in shop.items}
    items = [metadata.get(item_id, {}) for item_id in interactions.item_ids.tolist()]
    return Dataset(data.name, interactions, features, items, shop)
