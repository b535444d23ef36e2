"""KDSR on Amazon Beauty (22,363 users, 12,101 items, 198,502 interactions after 5-core), with texts.

    python -m kdsr_jax.main --config=configs/beauty.py --config.data.root=PATH --workdir=runs/beauty

Expect hr@20 14.0 and mrr@20 4.8 percent on test (three seeds) with these settings, the paper's. Its validation part prefers
--config.train.ramp_epochs=0 --config.distill.lambda_code=0.1: 13.9 and 5.2 (two seeds).
PATH/beauty holds interactions.* and features/text-minilm.npz.
``configs/beauty.py:sasrec`` and the other variants (docs/models.md) are rows to compare with.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.name = "beauty"
    config.data.modalities = ("text-minilm",)
    return apply_variant(config, argument)
