"""KDSR on Amazon Beauty (22,363 users, 12,101 items, 198,502 interactions after 5-core), with texts.

    python -m kdsr_jax.main --config=configs/beauty.py --config.data.root=PATH --workdir=runs/beauty

Expect hr@20 13.5 and mrr@20 4.9 percent on test after 16 epochs (seed 0).
PATH/beauty holds interactions.* and features/text-minilm.npz.
``configs/beauty.py:sasrec`` and the other variants (README, "Which model") are rows to compare with.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "beauty"
    config.data.modalities = ("text-minilm",)
    return apply_variant(config, argument)
