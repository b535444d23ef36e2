"""Train on a log that is in memory, for notebooks and services."""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdsr_jax import cli
from kdsr_jax.config import validate
from kdsr_jax.errors import UserError
from kdsr_jax.recommender import Recommender
from kdsr_jax.train import train_and_evaluate

NAME = "shop"


def fit(
    log: Any,
    items: Any = None,
    features: Mapping[str, tuple] | None = None,
    folder: Any = None,
    variant: str | None = None,
    **overrides: Any,
) -> Recommender:
    """Train and test a model as ``python -m kdsr_jax.main`` does, and return it.

    Args:
      log: table of user_id, item_id and, if known, timestamp: a pyarrow table, or a frame of pandas or polars. Columns of
        other names are named by ``**{"data.columns.user_id": NAME}``.
      items: likewise, of item_id and, if known, title and other columns; None without.
      features: dict "<modality>" or "<modality>-<encoder>" -> (item ids [n], features [n, d]); None trains on ids alone.
      folder: where data and run are kept, in data/ and run/; None makes a temporary one. A finished run of the same
        arguments is not trained again, one on other data is left as it is.
      variant: as behind the colon of --config; None is KDSR, or SASRec without features.
      **overrides: fields by dotted name, such as ``**{"train.epochs": 20, "data.k_core": 1}``.

    Returns:
      Recommender.

    Raises:
      UserError: a table lacks a column, the folder holds a run on other data, or what the command line would say.
    """
    folder = pathlib.Path(folder or tempfile.mkdtemp(prefix="kdsr-"))
    features = dict(features or {})
    entries = {name if "-" in name else f"{name}-given": values for name, values in features.items()}
    config = cli.load_config(f"{cli.DEFAULTS}:{variant or ('' if features else 'sasrec')}".removesuffix(":"))
    words = {"data.name": NAME, "data.source": "folder", "data.root": folder / "data"}
    words |= {"data.modalities": ",".join(entries)} | overrides
    cli.apply_settings(config, [f"--config.{name}={value}" for name, value in words.items()])
    validate(config)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        given = pathlib.Path(new) / "data"
        _write_data(given / NAME, log, items, entries, config.data.columns)
        if not (folder / "data").exists():
            given.rename(folder / "data")
        elif _contents(given) != _contents(folder / "data"):
            raise UserError(f"{folder}: holds a run on other data; give another folder")
    train_and_evaluate(config, folder / "run")
    return Recommender.from_workdir(folder / "run")


def _contents(folder):
    """Return the sha256 of every file, by its place in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _write_data(place, log, items, entries, columns):
    """Write the files of a folder data set."""
    import pyarrow.parquet as pq

    (place / "features").mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(log, "log", (columns.user_id, columns.item_id)), place / "interactions.parquet")
    if items is not None:
        lines = _table(items, "items", (columns.item_id,)).to_pylist()
        (place / "items.jsonl").write_text("".join(json.dumps(line, default=str) + "\n" for line in lines))
    for entry, (ids, values) in entries.items():
        np.savez(place / "features" / f"{entry}.npz", item_id=np.array([str(raw) for raw in ids]), features=values)


def _table(frame, name, columns):
    """Return a frame as a pyarrow table whose strings in the columns of ids are of pyarrow's usual kind."""
    import pyarrow as pa

    try:
        table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: must be a pyarrow table, or a frame of pandas or polars ({error})") from error
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(f"{name}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    for column in columns:
        kind = table.schema.field(column).type
        if pa.types.is_dictionary(kind) or pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
            texts = [None if raw is None else str(raw) for raw in table[column].to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(texts, pa.string()))
    return table
