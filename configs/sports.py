"""KDSR on Amazon Sports (35,598 users, 18,357 items, 296,337 interactions after 5-core), with texts.

    python -m kdsr_jax.main --config=configs/sports.py --config.data.root=PATH --workdir=runs/sports

No run has been measured yet; an epoch has 1.5 times the targets of Beauty's and 1.5 times the items to score.
PATH/sports holds interactions.* and features/text-minilm.npz.
``configs/sports.py:sasrec`` and the other variants (docs/models.md) are rows to compare with.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "sports"
    config.data.modalities = ("text-minilm",)
    return apply_variant(config, argument)
