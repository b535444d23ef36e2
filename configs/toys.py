"""KDSR on Amazon Toys (19,412 users, 11,924 items, 167,597 interactions after 5-core), with images and texts.

    python -m kdsr_jax.main --config=configs/toys.py --config.data.root=PATH --workdir=runs/toys

PATH/toys holds interactions.*, and features/image-efficientnet-lite0.npz and features/text-minilm.npz.
Untried: the dataset was not at hand. The settings are those of the paper for all Amazon datasets.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "toys"
    config.data.modalities = ("image-efficientnet-lite0", "text-minilm")
    return apply_variant(config, argument)
