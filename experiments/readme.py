"""Writes the tables of the studies into the README, between its marks, out of experiments/results alone.

python -m experiments.readme
"""

import argparse
import pathlib
import re
import sys

from experiments import results, tune
from kdsr_jax.files import replace_file
from kdsr_jax.report.files import read_json

README = pathlib.Path(__file__).parent.parent / "README.md"
_BETWEEN = re.compile(r"(?<=<!-- studies -->\n).*?(?=<!-- /studies -->)", re.DOTALL)


def main():
    """Bring the README up to date; returns 0."""
    text = README.read_text()
    replace_file(README, lambda file: file.write(updated(text).encode()), shared=True)
    return 0


def updated(text, folder=results.FOLDER):
    """Return the README's text with the tables of today.

    Args:
      text: with "<!-- studies -->" and "<!-- /studies -->", each on a line of its own.
      folder: of the results.
    """
    return _BETWEEN.sub(lambda _: tables(pathlib.Path(folder)), text, count=1)


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


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    sys.exit(main())
