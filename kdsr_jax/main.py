"""Train KDSR, describe a dataset, or evaluate a finished run.

python -m kdsr_jax.main --config=FILE[:VARIANT] --workdir=FOLDER [--mode=MODE] [--config.FIELD=VALUE ...]
"""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from kdsr_jax import cli
from kdsr_jax.config import BACKBONES, entries_read
from kdsr_jax.errors import answer

_FLAGS = f"""
--config        a file of configs/, on its own KDSR. VARIANT is NAME (as published), tuned-NAME (modality tables
                trained) or kdsr-NAME (trained and distilled); NAME is one of {", ".join(BACKBONES)}
--workdir       folder of the run; the same command on the same folder resumes. Not needed by --mode=stats
--mode          train (default), stats (one line of JSON about the dataset), evaluate (the best checkpoint again)
--config.FIELD  sets one field; configs/default.py lists them all, e.g. --config.train.epochs=20
"""
_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}


def run(words: Sequence[str]) -> None:
    """Do what a command line asks for; jax is imported only once every word of it is known to be right."""
    if _HELP & set(words):
        print(__doc__ + _FLAGS)
        return
    config, workdir, mode = cli.parse(words)
    if mode == "stats":
        print(json.dumps(_describe(config)))
        return
    if mode == "train" and config.encode.missing:
        from kdsr_jax.encode import encode_missing

        encode_missing(config)
    from kdsr_jax import train

    work = train.train_and_evaluate if mode == "train" else train.evaluate_workdir
    work(config, workdir)


def main() -> int:
    """Run the command line; return 0, 2 for what the user can put right, or 130 after Ctrl-C."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("kdsr_jax")
    logger.addHandler(handler)
    logger.propagate = False  # a library that sets up the root logger would print every line twice
    return answer(lambda: run(sys.argv[1:]), "interrupted; the same command goes on from the last checkpoint")


def _describe(config: Any) -> dict[str, Any]:
    """Return the line of ``--mode=stats``; where the truth is planted, with the bounds that it sets."""
    from kdsr_jax.data import load_dataset
    from kdsr_jax.data.interactions import statistics

    dataset = load_dataset(config.data, entries_read(config))
    line = statistics(dataset.interactions, dataset.features)
    shop = dataset.oracle
    if shop is not None:
        line["oracle_hr@20"] = round(shop.oracle_hit_rates(dataset.interactions, topk=(20,))["hr@20"], 4)
        line["popularity_hr@20"] = round(shop.popularity_hit_rates(dataset.interactions, topk=(20,))["hr@20"], 4)
    return line


if __name__ == "__main__":
    sys.exit(main())
