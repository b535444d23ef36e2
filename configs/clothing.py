"""KDSR on Amazon Clothing (39,387 users, 23,033 items, 278,677 interactions after 5-core), with images and texts.

    python -m kdsr_jax.main --config=configs/clothing.py --config.data.root=PATH --workdir=runs/clothing

PATH/clothing holds interactions.*, and features/image-efficientnet-lite0.npz and features/text-minilm.npz.
Untried: the dataset was not at hand. The settings are those of the paper for all Amazon datasets.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "clothing"
    config.data.modalities = ("image-efficientnet-lite0", "text-minilm")
    return apply_variant(config, argument)
