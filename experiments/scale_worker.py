"""What experiments.scale measures, in a process of its own: requests on standard input, as experiments.contestant takes them."""

import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import default
from experiments import contestant
from kdsr_jax.cli import apply_settings
from kdsr_jax.config import validate
from kdsr_jax.data import Dataset, load_dataset
from kdsr_jax.data.features import Features
from kdsr_jax.data.interactions import Interactions

LENGTH = 20  # interactions of a user: on average in logs, exactly in catalogues
ITEM_USES = 50  # interactions of a log's item on average
SHARD = 2**20  # rows of a shard
SHARDS = 4  # at least, of a log
WIDTH = 32  # of the features, the modality tables and the representations


class Server(contestant.Server):
    """The operations of the process."""

    def write(self, folder, interactions):
        """Write a log of users who take random items at random times as a folder of parquet shards; say its bytes."""
        folder, rng, size = pathlib.Path(folder), np.random.default_rng(0), 0
        folder.mkdir(parents=True)
        rows = min(SHARD, -(-interactions // SHARDS))
        for number, begin in enumerate(range(0, interactions, rows)):
            count = min(rows, interactions - begin)
            columns = {
                "user_id": pa.array(rng.integers(0, max(1, interactions // LENGTH), count)).cast(pa.string()),
                "item_id": pa.array(rng.integers(0, max(1, interactions // ITEM_USES), count)).cast(pa.string()),
                "timestamp": pa.array(rng.integers(0, 2**30, count)),
            }
            file = folder / f"{number:05}.parquet"
            pq.write_table(pa.table(columns), file)
            size += file.stat().st_size
        return {"bytes": size}

    def prepare(self, root, name):
        """Read a log, filter, number and sort it, and keep it in the cache folder, then read it from there."""
        config = _config("none", [f"--config.data.root={root}", f"--config.data.name={name}"])
        before, seconds = contestant.memory()["process"], {}
        for kind in ("prepare", "again"):
            started = time.perf_counter()
            found = load_dataset(config.data, ()).interactions
            seconds[kind] = time.perf_counter() - started
            if kind == "prepare":
                peak = contestant.memory()["process"]
        counts = {"interactions": len(found.items), "users": found.num_users, "items": found.num_items}
        return counts | {"seconds": seconds, "memory": {"before": before, "peak": peak}}

    def catalogue(self, items, users, features, settings):
        """Compile a model for a catalogue that is made in memory."""
        config = _config("tuned" if features else "none", settings)
        self.contestant = contestant.Contestant(config, random_catalogue(items, users, features), phase="select")
        return self.contestant.work()


def _config(tables, settings):
    config = default.get_config(None if tables == "tuned" else "sasrec")
    modalities = "text-random" if tables == "tuned" else ""
    apply_settings(config, [f"--config.data.modalities={modalities}", *settings])
    validate(config)
    return config


def random_catalogue(items, users, features):
    """Return a Dataset of users with ``LENGTH`` random items each; most items of a large catalogue are in no history.

    Args:
      items: N.
      users: U.
      features: whether every item has a random "text" of ``WIDTH`` numbers.
    """
    rng = np.random.default_rng(0)
    numbers = [f"{number:08}" for number in range(max(items, users) + 1)]
    interactions = Interactions(
        items=rng.integers(1, items + 1, users * LENGTH, np.int32),
        offsets=np.arange(users + 1, dtype=np.int64) * LENGTH,
        user_ids=np.array(numbers[:users]),
        item_ids=np.array(["", *numbers[1 : items + 1]]),
    )
    found = {}
    if features:
        values, has_feature = rng.standard_normal((items + 1, WIDTH), np.float32), np.arange(items + 1) > 0
        values[0] = 0
        found["text"] = Features(values, has_feature)
    return Dataset("catalogue", interactions, found)


if __name__ == "__main__":
    contestant.serve(Server())
