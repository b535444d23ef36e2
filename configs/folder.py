"""KDSR on your own shop: a log, items with texts, and pictures; features that are missing are made first.

    python -m kdsr_jax.main --config=configs/folder.py --config.data.root=PATH --workdir=runs/shop

PATH (or PATH/shop) holds interactions.csv (.csv.gz, .parquet), items.jsonl (.csv, .parquet) and images/<item_id>.jpg
(.png, .webp). --config.data.columns.* say what the columns are called, --config.data.modalities which encoders to use:
texts alone by --config.data.modalities=text-minilm. docs/own-shop.md goes through it.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "shop"
    config.data.source = "folder"
    config.data.modalities = ("image-efficientnet-lite0", "text-minilm")
    config.encode.missing = True
    return apply_variant(config, argument)
