"""What results are called wherever they stand: in tables, on pages and in metrics.jsonl."""

import pathlib
from collections.abc import Sequence

SELECT_K = 20  # epochs are chosen by mrr@20, whatever eval.topk asks for besides
SELECT_METRIC = f"mrr@{SELECT_K}"
PAPER = "paper's protocol (best epoch on test)"
# Key of result.json -> name, as the README has them.
COLUMNS = {"validation": "validation", "test": "test, epoch chosen on validation", "paper": PAPER}


def names_of_runs(folders: Sequence[str]) -> Sequence[str]:
    """Return the last parts of the folders' paths, or the folders where that does not tell them apart."""
    names = [pathlib.Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) and all(names) else folders
