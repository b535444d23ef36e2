"""KDSR on a planted shop of 60 items, for trying things out: how fast it runs, not how well it recommends.

    python -m kdsr_jax.main --config=configs/small.py --workdir=runs/small

Seconds on 2 CPU cores, most of them compilation; the pages of docs/ use it.
"""

from configs import planted
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = planted.get_config()
    config.data.planted.num_users = 150
    config.data.planted.num_items = 60
    config.data.planted.mean_length = 8.0
    config.data.max_length = 8
    config.teacher.num_codes = 16
    config.teacher.num_pairs = 2000
    config.model.dim = 16
    config.model.num_layers = 1
    config.train.epochs = 2
    return apply_variant(config, argument)
