"""The facets of the planted shop's items by name, and the small drawing each item makes of itself."""

from math import cos, pi, sin
from xml.sax.saxutils import escape


def _star(points: int, inner: float) -> str:
    """Return the path of a star, or with ``inner`` = 1 of a regular polygon of twice the points, around (32, 32)."""
    corners = (
        (32 + r * sin(pi * k / points), 32 - r * cos(pi * k / points)) for k, r in enumerate([27, 27 * inner] * points)
    )
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in corners) + "Z"


SHAPES = {  # name -> SVG path on a canvas of 64 x 64
    "circle": "M32 5A27 27 0 1 1 31.9 5Z",
    "square": "M9 9H55V55H9Z",
    "triangle": "M32 5L60 55H4Z",
    "diamond": "M32 4L58 32L32 60L6 32Z",
    "hexagon": _star(3, 1.0),
    "star": _star(5, 0.42),
    "gear": _star(12, 0.8),
    "cross": "M23 5H41V23H59V41H41V59H23V41H5V23H23Z",
    "heart": "M32 58L8 32A14 14 0 1 1 32 16A14 14 0 1 1 56 32Z",
    "drop": "M32 4C40 18 52 26 52 40A20 20 0 0 1 12 40C12 26 24 18 32 4Z",
    "moon": "M44 7A27 27 0 1 0 58 44A22 22 0 0 1 44 7Z",
    "leaf": "M6 58C4 24 24 6 58 6C60 40 40 60 6 58Z",
}
COLOURS = {  # name -> fill
    "red": "#d62839", "orange": "#f3722c", "yellow": "#ead000", "lime": "#9bc53d",
    "green": "#2e8b4f", "cyan": "#32bfe0", "blue": "#2167d6", "violet": "#7b3fc4",
    "pink": "#f48fb1", "brown": "#7a4a2b", "grey": "#8a8f98", "black": "#222428",
}  # fmt: skip
PATTERNS = {  # name -> strokes on a tile of 8 x 8
    "plain": "",
    "striped": "M0 4H8",
    "diagonal": "M-2 2L2 -2M0 8L8 0M6 10L10 6",
    "gridded": "M0 4H8M4 0V8",
    "dotted": "M3 4H5",
    "checked": "M0 2H4M4 6H8M0 1H4M4 5H8M0 3H4M4 7H8",
    "zigzag": "M0 6L4 2L8 6",
    "crossed": "M2 2L6 6M6 2L2 6",
}
_BRAND_NAMES = (
    "Acorn", "Boreal", "Cobalt", "Dune", "Ember", "Fjord", "Grove", "Harbor",
    "Iris", "Juniper", "Kestrel", "Lumen", "Mistral", "Nimbus", "Onyx", "Pebble",
)  # fmt: skip
BRANDS = {name: name[0] for name in _BRAND_NAMES}  # name -> letter on the badge
FACETS = {"shape": tuple(SHAPES), "colour": tuple(COLOURS), "pattern": tuple(PATTERNS), "brand": tuple(BRANDS)}


def icon(item: dict) -> str:
    """Draw an item as an SVG document of less than one kilobyte.

    The pattern's id depends on the pattern alone, so that many icons may stand in one page.

    Args:
        item: metadata with the names ``shape``, ``colour``, ``pattern`` and ``brand``, and a ``title``.

    Returns:
        A coloured shape, filled with the pattern, with the brand's initial on a badge.

    Raises:
        KeyError: a facet is missing or has an unknown name.
    """
    shape, colour, pattern = SHAPES[item["shape"]], COLOURS[item["colour"]], item["pattern"]
    initial = BRANDS[item["brand"]]
    tile = f'<path d="{PATTERNS[pattern]}" fill="none" stroke="#fff" stroke-width="1.6"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64" role="img">'
        f"<title>{escape(item['title'])}</title>"
        f'<pattern id="pattern-{pattern}" width="8" height="8" patternUnits="userSpaceOnUse">{tile}</pattern>'
        f'<path d="{shape}" fill="{colour}"/><path d="{shape}" fill="url(#pattern-{pattern})"/>'
        '<circle cx="53" cy="53" r="9" fill="#fff" stroke="#222"/>'
        f'<text x="53" y="57.5" font-family="sans-serif" font-size="13" text-anchor="middle">{initial}</text></svg>'
    )
