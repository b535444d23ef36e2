"""Make features of a folder's texts and pictures, for each entry of data.modalities.

python -m kdsr_jax.encode --config=configs/folder.py --config.data.root=PATH [--config.FIELD=VALUE ...]
"""

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from kdsr_jax import cli
from kdsr_jax.config import entries_read, validate
from kdsr_jax.errors import Parser, UserError, answer

_logger = logging.getLogger("kdsr_jax")
REPORT_SECONDS = 10.0


class Shop(NamedTuple):
    """What there is to encode.

    Attributes:
        folder: of the data set.
        item_ids: raw ids of the items of the log, after its filter.
        texts: raw id -> text, of the items that have one.
        recipe: plain data: how the texts were put together.
        pictures: raw id -> file, of the items that have one.
    """

    folder: Any
    item_ids: list[str]
    texts: dict[str, str]
    recipe: dict[str, Any]
    pictures: dict[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after one line about what the user can put right, or 130 after Ctrl-C."""
    parser = Parser(prog="python -m kdsr_jax.encode", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="config file; its data.modalities name the encoders")
    logging.basicConfig(format="warning: %(message)s")

    def work():
        arguments, settings = parser.parse_known_args(words)
        config = cli.load_config(arguments.config)
        cli.apply_settings(config, settings, known=("config", "help"))
        validate(config)
        encode_all(config, config.data.modalities)

    return answer(work, "interrupted; the same command goes on from what is encoded")


def encode_missing(config: Any) -> None:
    """Make the features files that a run needs and that are not there.

    Args:
        config: the whole config; ``encode.missing`` is set.

    Raises:
        UserError: see ``encode_all``.
    """
    from kdsr_jax.data import entries_at_hand
    from kdsr_jax.data.sources import folder
    from kdsr_jax.encoders import what_it_reads

    place, there = folder.place(config.data.root, config.data.name), entries_at_hand(config.data)
    missing = [entry for entry in entries_read(config) if entry not in there]
    for entry in missing:
        try:
            what_it_reads(entry)
        except UserError as error:
            file = place / "features" / f"{entry}.npz"
            raise UserError(f"{file}: no such features file, and none can be made; {error}") from error
    if missing:
        encode_all(config, missing)


def encode_all(config: Any, entries: Sequence[str]) -> None:
    """Encode the items of a folder data set, and write features/<entry>.npz and .json for each entry.

    Args:
        config: the whole config; data and encode are read.
        entries: <modality>-<encoder> each.

    Raises:
        UserError: no folder, no items of a kind, an encoder that is not installed, or files by another recipe.
    """
    from kdsr_jax.encoders import open_encoder, what_it_reads
    from kdsr_jax.encoders.store import locked

    if not config.data.root:
        raise UserError("--config.data.root is missing; give the folder that holds interactions.* and items.*")
    kinds = {entry: what_it_reads(entry) for entry in entries}
    shop = read_shop(config)
    _report_coverage(shop)
    for entry, kind in kinds.items():
        if not (shop.texts if kind == "text" else shop.pictures):
            where = shop.folder / ("items.*" if kind == "text" else "images")
            rest = ",".join(other for other in config.data.modalities if other != entry)
            raise UserError(f"{where}: nothing for {entry} to read; without it: --config.data.modalities={rest}")
    for entry, kind in kinds.items():
        with locked(shop.folder / "features"):
            _encode(shop, entry, kind, open_encoder(entry, config.encode), config.encode.batch_size)


def read_shop(config: Any) -> Shop:
    """Read the items of a folder data set, their texts, and the list of their pictures."""
    from kdsr_jax.data import load_dataset
    from kdsr_jax.data.sources import folder
    from kdsr_jax.encoders.items import picture_files, render, template_fields, text_fields

    dataset, settings = load_dataset(config.data, ()), config.encode
    if dataset.oracle is not None:
        raise UserError("the planted shop brings its features; there is nothing to encode")
    place = folder.place(config.data.root, config.data.name)
    ids, items = [str(raw) for raw in dataset.interactions.item_ids[1:]], (dataset.items or [{}])[1:]
    columns = config.data.columns
    given = {columns.item_id, columns.title} - {"title"}  # they are there as item_id and title, too
    fields = list(settings.text_fields or [name for name in text_fields(items) if name not in given])
    flag, named = "text_fields", settings.text_fields
    if settings.template:
        flag, named = "template", template_fields(settings.template)
    held = {name for item in items for name in item}
    if unknown := [name for name in named if items and name not in held]:
        raise UserError(f"--config.encode.{flag}: no item has {unknown[0]!r}; they have {', '.join(sorted(held))}")
    recipe = {"fields": fields, "field_characters": settings.field_characters}
    recipe = {"template": settings.template} if settings.template else recipe
    texts = {
        raw: text
        for raw, item in zip(ids, items, strict=False)
        if (text := render(item, fields, settings.field_characters, settings.template))
    }
    return Shop(place, ids, texts, recipe, picture_files(place / "images", ids))


def _report_coverage(shop):
    both = sum(raw in shop.pictures for raw in shop.texts)
    neither = len(shop.item_ids) - len(shop.texts) - len(shop.pictures) + both
    print(
        f"{shop.folder}: {len(shop.item_ids):,} items, {len(shop.texts):,} with text, {len(shop.pictures):,} with a "
        f"picture, {neither:,} with neither"
    )


def _encode(shop, entry, kind, encoder, batch_size):
    """Encode what one entry lacks, and write its files."""
    from kdsr_jax.encoders.store import FeatureStore, digest

    if kind == "text":
        wanted = {raw: digest(text.encode()) for raw, text in shop.texts.items()}
        order = sorted(wanted, key=lambda raw: len(shop.texts[raw]))  # alike lengths together, for little padding
    else:
        wanted = {raw: digest(file.read_bytes()) for raw, file in shop.pictures.items()}
        order = list(wanted)
    recipe = {"encoder": encoder.description} | ({"text": shop.recipe} if kind == "text" else {})
    store = FeatureStore(shop.folder / "features", entry, recipe)
    todo = [raw for raw in order if not store.knows(raw, wanted[raw])]
    if len(todo) < len(order):
        print(f"{entry}: {len(order) - len(todo):,} of {len(order):,} items are encoded already")
    started, unreadable, told = time.monotonic(), [], time.monotonic()
    for begin in range(0, len(todo), batch_size):
        part = todo[begin : begin + batch_size]
        inputs = [shop.texts[raw] for raw in part] if kind == "text" else _open_pictures(shop, part, unreadable)
        readable = [raw for raw, content in zip(part, inputs, strict=True) if content is not None]
        contents = [content for content in inputs if content is not None]
        if readable:
            padded = contents + contents[-1:] * (batch_size - len(contents))  # one size, one compiled program
            vectors = encoder(padded)[: len(readable)]
            store.add(readable, [wanted[raw] for raw in readable], vectors)
        if time.monotonic() - told > REPORT_SECONDS:
            told = time.monotonic()
            _report_progress(entry, begin + len(part), len(todo), told - started)
    if len(unreadable) == len(order):
        raise UserError(f"{shop.folder / 'images'}: none of the {len(order):,} pictures can be read")
    seconds = round(time.monotonic() - started, 1)
    facts = {"missing": len(shop.item_ids) - len(order), "unreadable": unreadable, "seconds": seconds}
    store.finish(wanted, facts)
    lost = f", {len(unreadable):,} unreadable pictures" if kind == "image" else ""
    print(f"{entry}: {len(todo) - len(unreadable):,} items encoded in {seconds:.1f} s{lost}: {store.file}")


def _open_pictures(shop, part, unreadable):
    """Return the pictures of items, None for those that cannot be read; these are warned of and noted."""
    from kdsr_jax.encoders.pictures import open_picture

    pictures = [open_picture(shop.pictures[raw]) for raw in part]
    for raw, picture in zip(part, pictures, strict=True):
        if picture is None:
            _logger.warning("%s: is no picture that can be read; the item has none", shop.pictures[raw])
            unreadable.append(raw)
    return pictures


def _report_progress(entry, done, total, seconds):
    left = seconds / done * (total - done)
    print(f"{entry}: {done:,} of {total:,} items, {done / seconds:,.0f} items/s, {left:,.0f} s left", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
