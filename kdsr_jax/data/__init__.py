"""Data: from files or a generator to numbered interactions, aligned features, windows and batches. No jax here."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from kdsr_jax.catalogue import PUBLIC, names_of
from kdsr_jax.data.features import Features, align_features, load_features
from kdsr_jax.data.interactions import Interactions, sample_users
from kdsr_jax.data.prepared import load_prepared
from kdsr_jax.data.sources import amazon, folder, movielens, planted
from kdsr_jax.data.sources.archives import is_there
from kdsr_jax.data.sources.base import Source, items_by_index
from kdsr_jax.errors import UserError

__all__ = ["Dataset", "entries_at_hand", "load_dataset"]

_BUILDERS = {"movielens": movielens, "amazon": amazon}


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

    def title(self, number: int) -> str:
        """Return the title of an item, by its index, in one line; "" where it has none."""
        title = self.items[number].get("title") if self.items else None
        return " ".join(title.split()) if isinstance(title, str) else ""


def load_dataset(data, modalities: Iterable[str] | None = None) -> Dataset:
    """Load what the data part of a config names.

    With `source` "auto", a folder `<root>/<name>/`, or else `<root>` itself, that holds an interactions file is read; otherwise the name "planted"
    is the embedded shop, and the name of a public data set is that one, downloaded or from `manual_dir`, its features
    still from `<root>/<name>/features/`. A root that is given but has no such folder is an error, not a download.

    Args:
        data: the config's `data` group; `name`, `source`, `root`, `k_core`, `user_fraction`, `modalities`, `columns` (for folders only),
            `planted` (a mapping, for the planted source only) and `manual_dir` (for public data sets only) are read;
            `config.validate` has checked them.
        modalities: what to load instead of `data.modalities`; () where a model uses no features.

    Returns:
        The data set.

    Raises:
        UserError: there is no such data set, it cannot be downloaded, or its files break the format.
    """
    dataset = _load_whole(data, data.modalities if modalities is None else modalities)
    return dataclasses.replace(dataset, interactions=sample_users(dataset.interactions, data.user_fraction))


def entries_at_hand(data) -> tuple[str, ...]:
    """Return the entries of the config's data.modalities whose features are there; the planted shop makes its own."""
    if _choose_source(data) == "planted":
        return tuple(data.modalities)
    features = folder.place(data.root, data.name) / "features"
    return tuple(entry for entry in data.modalities if data.root and is_there(features / f"{entry}.npz"))


def _load_whole(data, wanted: Iterable[str]) -> Dataset:
    """Load with every user."""
    entries = {entry.partition("-")[0]: entry for entry in wanted}
    kind, place = _choose_source(data), folder.place(data.root, data.name)
    if kind == "planted":
        return _load_planted(data, entries)
    if kind == "folder":
        source = folder.find(place, dict(getattr(data, "columns", ())))
    else:
        _require_features(data, place, entries)
        source = _BUILDERS[kind].find(data.name, data.manual_dir)
    interactions, items = load_prepared(data.name, source, data.k_core)
    features = {
        modality: load_features(place / "features" / f"{entry}.npz", interactions.item_ids)
        for modality, entry in entries.items()
    }
    return Dataset(data.name, interactions, features, items)


def _choose_source(data) -> str:
    """Return "folder", "planted", "movielens" or "amazon"."""
    place = folder.place(data.root, data.name)
    # An empty root names no folder: the working directory is never searched by accident.
    if data.source in ("auto", "folder") and data.root and folder.find_log(place):
        return "folder"
    if data.source == "planted" or (data.source, data.name) == ("auto", "planted"):
        return "planted"
    if data.source == "auto" and data.root and not is_there(place, folder=True):
        named = f" (or --config.data.source={PUBLIC[data.name]} to download it)" if data.name in PUBLIC else ""
        raise UserError(f"--config.data.root={data.root}: has no folder {data.name!r}; give the one that has{named}")
    if data.source != "folder" and data.name in PUBLIC and data.source in ("auto", PUBLIC[data.name]):
        return PUBLIC[data.name]
    if data.source in _BUILDERS:
        have = ", ".join(names_of(data.source))
        raise UserError(f"--config.data.name={data.name}: the source {data.source} has no such data set; it has {have}")
    missing = f"no data set {data.name!r}: {place} holds none of {', '.join(folder.LOG_NAMES)}"
    if data.source == "auto":
        missing += f", and it is none of those that are downloaded by name, {', '.join(PUBLIC)}"
    raise UserError(missing)


def _require_features(data, place: Path, entries: dict[str, str]) -> None:
    """Raise where a public data set lacks features, before it is downloaded for nothing."""
    for entry in entries.values():
        path = place / "features" / f"{entry}.npz"
        if not data.root or not is_there(path):
            where = f"{path}: no such features file" if data.root else "--config.data.root is missing"
            raise UserError(
                f"{where}; the public data set {data.name!r} comes without features: give the folder that holds "
                f"{data.name}/features/{entry}.npz with --config.data.root, or ask for none with --config.data.modalities="
            )


def _load_planted(data, entries: dict[str, str]) -> Dataset:
    """Generate the planted shop and bring it into the form of every other data set."""
    shop = planted.generate(**data.planted)
    metadata = {item["item_id"]: item for item in shop.items}
    # The shop is generated in any case, for its features and its truth.
    source = Source(
        "planted",
        str(sorted(dict(data.planted).items())),
        _shop_digest(shop),
        lambda: shop.log,
        lambda item_ids: items_by_index(metadata, item_ids),
    )
    interactions, items = load_prepared(data.name, source, data.k_core)
    features = {}
    for modality, entry in entries.items():
        if modality not in shop.raw_features:
            have = ", ".join(f"{name}-facets" for name in shop.raw_features)
            raise UserError(f"--config.data.modalities: the planted shop has no {entry!r}; it has: {have}")
        file_ids, values = shop.raw_features[modality]
        features[modality] = align_features(file_ids, values, interactions.item_ids, f"planted shop, {entry}")
    return Dataset(data.name, interactions, features, items, shop)


def _shop_digest(shop: planted.PlantedShop) -> str:
    """Return the sha256 of a generated shop's log and items."""
    digest = hashlib.sha256(json.dumps(shop.items).encode())
    for column in dataclasses.astuple(shop.log):
        digest.update(column.tobytes())
    return digest.hexdigest()
