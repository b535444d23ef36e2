"""Writes the tables of the studies into README.md and docs/results.md, between their marks, out of experiments/results alone.

python -m experiments.readme
"""

import argparse
import pathlib
import re
import sys

from experiments import results, tune
from experiments.tables import METRICS
from kdsr_jax.files import replace_file
from kdsr_jax.labels import PAPER as PAPERS_PROTOCOL
from kdsr_jax.report.files import read_json

ROOT = pathlib.Path(__file__).parent.parent
SUMMARISED = "table2"
COLUMNS = ("setting", *METRICS, "seeds", PAPERS_PROTOCOL, "the paper reports", "s training, both phases")
_BETWEEN = re.compile(r"(?<=<!-- studies -->\n).*?(?=<!-- /studies -->)", re.DOTALL)


def main():
    """Bring both files up to date; returns 0."""
    for name, make in PAGES.items():
        text = updated((ROOT / name).read_text(), make)
        replace_file(ROOT / name, lambda file, text=text: file.write(text.encode()), shared=True)
    return 0


def updated(text, make, folder=results.FOLDER):
    """Return a page's text with the tables of today.

    Args:
      text: with "<!-- studies -->" and "<!-- /studies -->", each on a line of its own.
      make: folder -> markdown of the tables; ``summary`` or ``tables``.
      folder: of the results.
    """
    return _BETWEEN.sub(lambda _: make(pathlib.Path(folder)), text, count=1)


def summary(folder):
    """Return the metrics of the study of all models in markdown, data set by data set."""
    file, parts = folder / SUMMARISED / "table.md", []
    for part in file.read_text().split("\n## ")[1:] if file.exists() else ():
        name, _, body = part.partition("\n")
        lines = [line.strip("| ").split(" | ") for line in body.strip().partition("\n\n")[0].splitlines()]
        places = [lines[0].index(column) for column in COLUMNS if column in lines[0]]
        table = "\n".join(f"| {' | '.join(line[place] for place in places)} |" for line in lines)
        parts.append(f"**{name}**\n\n{table}")
    return "\n".join(f"\n{part}\n" for part in parts) + "\n"


def tables(folder):
    """Return all studies' tables and all searches for settings in markdown, without the notes before their first data set."""
    parts = []
    for file in sorted(folder.glob("*/table.md")):
        title, _, body = file.read_text().removeprefix("# ").partition("\n")
        _, heading, rest = body.partition("\n## ")
        text = f"## {rest}" if heading else f"## \n{body}"
        text = re.sub(
            r"^## (.*)$", lambda line, title=title: f"**{title}{line[1] and ': '}{line[1]}**", text, flags=re.MULTILINE
        )
        parts.append(text.strip())
    for file in sorted((folder / "tuning").glob("*.json")):
        heading = f"**Search {file.stem}**, validation mrr@20 in percent, the choice bold"
        parts.append(f"{heading}\n\n{tune.table(read_json(file))}")
    return "\n".join(f"\n{part}\n" for part in parts) + "\n"


PAGES = {"README.md": summary, "docs/results.md": tables}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    sys.exit(main())
