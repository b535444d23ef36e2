"""The page of all studies: their tables and figures in one file, without scripts."""

import base64
import pathlib
import re

from kdsr_jax.files import replace_file
from kdsr_jax.report.markup import render_page

_PIECE = re.compile(r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`")
_BAR = re.compile(r"(?<!\\)\|")  # between cells; "\|" is a bar in a cell
_RULER = re.compile(r"\|?(\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?")


def write_index(root):
    """Write root/index.html anew from root/*/table.md and figure.svg; other processes may do so at the same time.

    Args:
      root: folder of the studies' results.
    """
    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    names = sorted((file.parent.name for file in root.glob("*/table.md")), key=_place)
    page = render_page("studies.html.j2", studies=[read_study(root / name) for name in names])
    replace_file(root / "index.html", lambda file: file.write(page.encode()), shared=True)


def read_study(folder):
    """Read what the page shows of a study.

    Args:
      folder: of its table.md and, where it has one, figure.svg.

    Returns:
      dict "name", "title", "blocks" (see ``parse``), "figure" (an address that holds the whole picture, or "") and
      "width" of the picture.
    """
    blocks = parse((folder / "table.md").read_text(encoding="utf-8", errors="replace"))
    headed = bool(blocks) and blocks[0]["kind"] == "heading"
    title = "".join(piece for _, piece in blocks[0]["text"]) if headed else folder.name
    study = {"name": folder.name, "title": title, "blocks": blocks[headed:], "figure": "", "width": 0}
    if (folder / "figure.svg").is_file():
        svg = (folder / "figure.svg").read_bytes()
        box = re.search(rb'viewBox="\S+ \S+ ([\d.]+) ', svg)
        study["figure"] = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
        study["width"] = round(float(box[1])) if box else 720
    return study


def parse(text):
    """Take the little markdown apart that tables are written in.

    Args:
      text: headings, paragraphs, lists of "-", tables with bars; bold and code inside. Anything else is plain text.

    Returns:
      List of dicts with "kind": "heading" and "paragraph" have "text", "list" has "items" and "table" has "header" and
      "lines". A text, an item and a cell are lists of (kind, text) with the kinds "plain", "bold" and "code".
    """
    blocks, lines = [], [*text.splitlines(), ""]
    while lines:
        line = lines.pop(0).strip()
        if line.startswith("|") and _RULER.fullmatch(lines[0].strip()):
            lines.pop(0)
            rows = _taken(lines, lambda line: line.startswith("|"))
            blocks.append({"kind": "table", "header": _cells(line), "lines": [_cells(row) for row in rows]})
        elif heading := re.fullmatch(r"#{1,6}\s+(.*)", line):
            blocks.append({"kind": "heading", "text": _pieces(heading[1])})
        elif line.startswith("- "):
            items = [line, *_taken(lines, lambda line: line.startswith("- "))]
            blocks.append({"kind": "list", "items": [_pieces(item[2:]) for item in items]})
        elif line:
            more = _taken(lines, lambda line: line and not line.startswith(("|", "#", "- ")))
            blocks.append({"kind": "paragraph", "text": _pieces(" ".join([line, *more]))})
    return blocks


def _taken(lines, belongs):
    """Take the first lines that belong together off a list; returns them stripped."""
    taken = []
    while lines and belongs(lines[0].strip()):
        taken.append(lines.pop(0).strip())
    return taken


def _cells(line):
    cells = _BAR.split(line.removeprefix("|").removesuffix("|"))
    return [_pieces(cell.strip().replace("\\|", "|")) for cell in cells]


def _pieces(text):
    pieces, end = [], 0
    for match in _PIECE.finditer(text):
        pieces += [("plain", text[end : match.start()]), (match.lastgroup, match[match.lastgroup])]
        end = match.end()
    return [piece for piece in (*pieces, ("plain", text[end:])) if piece[1]]


def _place(name):
    """Tables come first, then figures, then the rest."""
    return not name.startswith("table"), not name.startswith("figure"), name
