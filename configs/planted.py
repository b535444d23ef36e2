"""KDSR on the planted shop, which is generated on the fly: no download, no data folder.

    python -m kdsr_jax.main --config=configs/planted.py --workdir=runs/planted

Less than 2 minutes on 2 CPU cores, compilation included; expect hr@20 of about 24 and mrr@20 of about 6.6 percent on test (seed 0).

The true relations between items are known here, so ``--mode=stats`` also prints the best attainable hr@20 and that of
popularity, between which the result lies. ``configs/planted.py:sasrec`` and the other variants work as anywhere.
"""

from configs import default
from kdsr_jax.config import apply_variant


def get_config(argument=None):
    config = default.get_config()
    config.data.max_length = 16  # histories are 12 items long on average: one bucket, so one compilation
    config.model.dim = 64  # the features have no more dimensions
    config.train.epochs = 40
    return apply_variant(config, argument)
