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
        features: each modality's features, in the order of `data.modalities`.
        items: metadata by item index (N + 1 objects, empty for padding), or None where there is none.
        oracle: the planted shop that knows the truth, or None for real data.
    """

    name: str
    interactions: Interactions
    features: dict[str, Features]
    items: list[dict] | None = None
    oracle: planted.PlantedShop | None = None


def load_dataset(data) -> Dataset:
    """Load what the data part of a config names.

    With `source` "auto", a folder `<root>/<name>/` that holds an interactions file is read; otherwise the name
    "planted" is the embedded shop.

    Args:
        data: the config's `data` group; `name`, `source`, `root`, `k_core`, `modalities` and `planted` (a mapping, for
            the planted source only) are read.

    Returns:
        The data set.

    Raises:
        UserError: there is no such data set, or its files break the format.
    """
    entries = modality_entries(data.modalities)
    if _choose_source(data) == "planted":
        return _load_planted(data, entries)
    place = Path(data.root) / data.name
    interactions = build_interactions(folder.load_log(place), data.k_core)
    features = {
        modality: load_features(place / "features" / f"{entry}.npz", interactions.item_ids)
        for modality, entry in entries.items()
    }
    return Dataset(data.name, interactions, features, folder.load_items(place, interactions.item_ids))


def modality_entries(entries: Iterable[str]) -> dict[str, str]:
    """Return each entry of `data.modalities` by its modality, the part before the first hyphen.

    Args:
        entries: such as ("image-efficientnet-lite0", "text-minilm").

    Raises:
        UserError: an entry without a modality or an encoder, or two entries of one modality.
    """
    by_modality: dict[str, str] = {}
    for entry in entries:
        modality, _, encoder = entry.partition("-")
        if not modality or not encoder:
            raise UserError(f"data.modalities: {entry!r} is not <modality>-<encoder>, such as 'text-minilm'")
        if modality in by_modality:
            raise UserError(
                f"data.modalities: {by_modality[modality]!r} and {entry!r} are both of modality {modality!r}; keep one"
            )
        by_modality[modality] = entry
    return by_modality


def _choose_source(data) -> str:
    """Return "folder" or "planted"."""
    if data.source not in ("auto", "folder", "planted"):
        raise UserError(f"data.source is {data.source!r}; choose auto, folder or planted")
    # An empty root names no folder: the working directory is never searched by accident.
    place = Path(data.root) / data.name if data.root else None
    if data.source == "planted" or (data.source == "auto" and data.name == "planted" and not _has_log(place)):
        return "planted"
    if _has_log(place):
        return "folder"
    names = ", ".join(folder.LOG_NAMES)
    if place is None:
        raise UserError(f"data.root is empty; set it to the folder that holds {data.name}/ with one of {names}")
    raise UserError(f"no data set {data.name!r}: looked in {place} for {names}")


def _has_log(place: Path | None) -> bool:
    """Tell whether there is an interactions file in a data set's folder."""
    return place is not None and folder.find_log(place) is not None


def _load_planted(data, entries: dict[str, str]) -> Dataset:
    """Generate the planted shop and bring it into the form of every other data set."""
    shop = planted.generate(**data.planted)
    interactions = build_interactions(shop.log, data.k_core)
    features = {}
    for modality, entry in entries.items():
        if modality not in shop.raw_features:
            have = ", ".join(f"{name}-facets" for name in shop.raw_features)
            raise UserError(f"data.modalities: the planted shop has no {entry!r}; it has: {have}")
        file_ids, values = shop.raw_features[modality]
        features[modality] = align_features(file_ids, values, interactions.item_ids, f"planted shop, {entry}")
    metadata = {item["item_id"]: item for item in shop.items}
    items = [metadata.get(item_id, {}) for item_id in interactions.item_ids.tolist()]
    return Dataset(data.name, interactions, features, items, shop)
