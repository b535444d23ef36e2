"""Line and bar charts as SVG markup: small, without scripts or style attributes, so that a strict page may hold them.

Colours come from the custom properties of ``CSS``, which follow the reader's light or dark setting; a page that shows charts
holds that style once. Series differ in dashes too, not in colour alone. All text is escaped.
"""

import dataclasses
import html
import itertools
import math
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence

from kdsr_jax.files import replace_file
from kdsr_jax.report.text import clean
from kdsr_jax.report.ticks import log_ticks, nice_ticks, tick_texts

WIDTH = 360  # of the view box: at the width of a phone one unit is about one pixel
_PLOT_HEIGHT = 150
_LINE = 15  # height of a line of text
_LETTER = 6.8  # mean width of a letter at 11 pixels
_COLOURS = 8
_NOTHING = 1e-30  # what is smaller is zero, as its ratios are no longer exact
_MOST_POINTS = 40  # marked points of a series; its line has all of them

# Light and dark values of the palette pass 3 : 1 against their backgrounds; the first three are told apart by all readers.
_LIGHT = ("#0067b1", "#c84c00", "#00805e", "#a2418c", "#6b6b00", "#7048c8", "#a03030", "#4f5d6b")
_DARK = ("#62b5f0", "#ff9a57", "#3fcf9f", "#f29bd4", "#d9cf4a", "#b8a2ff", "#ff8a8a", "#aab6c2")


def _palette(colours, ink, muted, grid, surface):
    named = {"ink": ink, "muted": muted, "grid": grid, "surface": surface}
    named |= {f"c{number}": colour for number, colour in enumerate(colours)}
    return ":root{" + "".join(f"--{name}:{value};" for name, value in named.items()) + "}"


CSS = (
    _palette(_LIGHT, "#1b1f24", "#59636e", "#d9dee3", "#ffffff")
    + "@media (prefers-color-scheme:dark){"
    + _palette(_DARK, "#e8ebee", "#a3adb8", "#3a424b", "#15191e")
    + "}"
    + ".chart{display:block;width:100%;height:auto;font-family:system-ui,'Segoe UI',Roboto,'Liberation Sans',sans-serif}"
    + ".chart text{fill:var(--muted);font-size:11px}.chart .head{fill:var(--ink);font-size:13px;font-weight:600}"
    + ".chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--muted);stroke-width:1}"
    + ".chart .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3}"
    + ".chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    + ".chart .end{text-anchor:end}.chart .mid{text-anchor:middle}"
    + "".join(
        f".chart .line.s{n}{{stroke:var(--c{n})}}.chart .fill.s{n},.chart text.s{n}{{fill:var(--c{n})}}"
        for n in range(_COLOURS)
    )
    + "".join(
        f".chart .line.s{n}{{stroke-dasharray:{dashes}}}" for n, dashes in ((1, "7 4"), (3, "2 4"), (5, "9 4 2 4"))
    )
)


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
    mark: tuple[float, str] | None = None,
) -> str:
    """Draw lines over a common x axis.

    Names stand at the ends of the lines where there is room, else in a legend below. Every point has a tooltip.

    Args:
        title: heading of the chart, shown and read out.
        series: name -> points (x, y) in rising order of x; a y that is not finite leaves a gap. Colours follow the order.
        x_label: what x is, such as "epoch".
        y_label: what y is, with its unit.
        log_y: a logarithmic y axis; points that are not positive are left out.
        from_zero: lets the y axis begin at 0.
        mark: (x, text) of a vertical line, such as a chosen epoch.

    Returns:
        One ``<svg class="chart">`` element; without any point it says so.
    """
    kept = {name: _drawable(points, log_y) for name, points in series.items()}
    flat = [point for points in kept.values() for point in points if math.isfinite(point[1])]
    if not flat:
        return _empty(title)
    xs, ys = [x for x, _ in flat], [y for _, y in flat]
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else nice_ticks(0 if from_zero else min(ys), max(ys), cover=True)
    labeled = _has_end_labels(kept, (y_ticks[0], y_ticks[-1]), log_y)
    right = max(map(_text_width, kept)) + 10 if labeled else 12
    heading = _wrap(title, 46)
    frame = _Frame(
        left=max(_text_width(text) for text in tick_texts(y_ticks)) + 10,
        right=WIDTH - right,
        top=_LINE * (len(heading) + 1) + 10,
        x=(min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1),
        y=(y_ticks[0], y_ticks[-1]),
        log=log_y,
    )
    parts = [_axes(frame, y_ticks, y_label), _x_axis(frame, xs, x_label)]
    if mark is not None and frame.x[0] <= mark[0] <= frame.x[1]:
        parts.append(_mark(frame, *mark))
    for number, (name, points) in enumerate(kept.items()):
        parts.append(_line(frame, number % _COLOURS, name, points, x_label))
    for number, name in enumerate(kept):
        if labeled:
            y = frame.down(kept[name][-1][1]) + 4
            parts.append(
                f'<text class="s{number % _COLOURS}" x="{frame.right + 6:.1f}" y="{y:.1f}">{_safe(name)}</text>'
            )
    legend, rows = ("", 0) if labeled or len(kept) == 1 else _legend(list(kept), frame.bottom + 46, lines=True)
    return _svg(heading, title, _describe(kept, x_label, y_label), [*parts, legend], frame.bottom + 40 + rows * _LINE)


def bar_chart(
    title: str,
    categories: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    x_label: str,
    y_label: str,
    *,
    notes: Sequence[str] = (),
) -> str:
    """Draw groups of bars from zero.

    Args:
        title: heading of the chart, shown and read out.
        categories: short names of the groups, left to right; a handful, as they are not turned.
        series: name -> one value a category, None or NaN where there is none; each value has a tooltip.
        x_label: what the categories are.
        y_label: what the values are, with their unit.
        notes: one short text a category, shown below its name, such as the count behind it.

    Returns:
        One ``<svg class="chart">`` element; without any value it says so.
    """
    values = [v for column in series.values() for v in column if v is not None and math.isfinite(v)]
    if not values:
        return _empty(title)
    y_ticks = nice_ticks(min(0, *values), max(0, *values), cover=True)
    heading = _wrap(title, 46)
    left = max(_text_width(text) for text in tick_texts(y_ticks)) + 10
    top = _LINE * (len(heading) + 1) + 10
    frame = _Frame(left, WIDTH - 8, top, (0, len(categories)), (y_ticks[0], y_ticks[-1]))
    parts = [_axes(frame, y_ticks, y_label)]
    width = 0.8 / len(series)
    room = (frame.right - frame.left) / len(categories)
    for place, category in enumerate(categories):
        for number, (name, column) in enumerate(series.items()):
            start = place + 0.1 + number * width
            parts.append(_bar(frame, number % _COLOURS, (start, width), column[place], f"{name}, {category}"))
        middle = frame.across(place + 0.5)
        parts.append(_label(middle, frame.bottom + 15, _short(category, room)))
        if notes:
            parts.append(_label(middle, frame.bottom + 28, _short(notes[place], room)))
    below = frame.bottom + (28 if notes else 15)
    parts.append(_label((frame.left + frame.right) / 2, below + 16, x_label))
    legend, rows = ("", 0) if len(series) == 1 else _legend(list(series), below + 34, lines=False)
    pairs = {name: [(0, v) for v in column if v is not None] for name, column in series.items()}
    return _svg(heading, title, _describe(pairs, x_label, y_label), [*parts, legend], below + 24 + rows * _LINE)


def standalone(svg: str) -> str:
    """Return a chart as an SVG document of its own, with its style and background, for files such as those of ``docs/``."""
    start = svg.index(">") + 1
    opening = svg[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    style = f"<style>{CSS}.back{{fill:var(--surface)}}</style>"
    x, y, width, height = re.search(r'viewBox="([^"]*)"', svg)[1].split()
    back = f'<rect class="back" x="{x}" y="{y}" width="{width}" height="{height}"/>'
    return f"{opening}{style}{back}{svg[start:]}\n"


def write_svg(path: str | pathlib.Path, svg: str) -> None:
    """Write a chart as a file of its own, by rename."""
    replace_file(path, lambda file: file.write(standalone(svg).encode()))


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where the plot lies in the view box and what its edges stand for."""

    left: float
    right: float
    top: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    @property
    def bottom(self) -> float:
        return self.top + _PLOT_HEIGHT

    def across(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def down(self, y: float) -> float:
        low, high, y = (math.log10(v) for v in (*self.y, y)) if self.log else (*self.y, y)
        return self.bottom - (y - low) / (high - low) * _PLOT_HEIGHT


def _drawable(points, log_y):
    kept = [(float(x), 0.0 if abs(y) < _NOTHING else float(y)) for x, y in points if math.isfinite(x)]
    return [(x, y if not log_y or y > 0 else math.nan) for x, y in kept]


def _has_end_labels(series, span, log_y):
    """Say whether names can be written at the lines' ends: these all have one x and lie apart, and the names are short."""
    ends = [points[-1] if points else (math.nan, math.nan) for points in series.values()]
    if not 1 < len(series) <= 6 or any(not math.isfinite(y) for _, y in ends) or len({x for x, _ in ends}) > 1:
        return False
    frame = _Frame(0, 1, 0, (0, 1), span, log_y)
    heights = sorted(frame.down(y) for _, y in ends)
    apart = all(b - a >= 12 for a, b in itertools.pairwise(heights))
    return apart and max(map(_text_width, series)) <= 90


def _axes(frame, ticks, y_label):
    parts = [f'<text x="2" y="{frame.top - 9:.1f}">{_safe(y_label)}</text>']
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        y = frame.down(tick)
        kind = "axis" if tick == ticks[0] else "grid"
        parts.append(f'<line class="{kind}" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{frame.left - 5:.1f}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)


def _x_axis(frame, xs, x_label):
    whole = all(x == int(x) for x in xs)
    ticks = nice_ticks(*frame.x, count=6, whole=whole) if min(xs) < max(xs) else [xs[0]]
    parts = []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        x = frame.across(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom:.1f}" y2="{frame.bottom + 4:.1f}"/>'
        )
        parts.append(_label(x, frame.bottom + 17, text))
    return "".join([*parts, _label((frame.left + frame.right) / 2, frame.bottom + 32, x_label)])


def _mark(frame, x, text):
    place = frame.across(x)
    side = ("end", -4) if place > (frame.left + frame.right) / 2 else ("start", 4)
    return (
        f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{frame.top:.1f}" y2="{frame.bottom:.1f}"/>'
        f'<text class="{side[0]}" x="{place + side[1]:.1f}" y="{frame.top + 9:.1f}">{_safe(text)}</text>'
    )


def _line(frame, colour, name, points, x_label):
    steps, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            steps.append(f"{pen}{frame.across(x):.1f} {frame.down(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    stride = math.ceil(len(points) / _MOST_POINTS)
    shown = [p for n, p in enumerate(points) if (len(points) - 1 - n) % max(1, stride) == 0 and math.isfinite(p[1])]
    dots = "".join(
        f'<circle class="fill s{colour}" cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}" r="2.5">'
        f"<title>{_safe(f'{name}, {x_label} {x:g}: {y:.4g}')}</title></circle>"
        for x, y in shown
    )
    return f'<path class="line s{colour}" d="{"".join(steps)}"/>{dots}'


def _bar(frame, colour, place, value, name):
    if value is None or not math.isfinite(value):
        return ""
    start, width = frame.across(place[0]), frame.across(place[0] + place[1]) - frame.across(place[0])
    top, bottom = sorted((frame.down(value), frame.down(0)))
    return (
        f'<rect class="fill s{colour}" x="{start:.1f}" y="{top:.1f}" width="{max(1, width - 1):.1f}" '
        f'height="{max(0.5, bottom - top):.1f}"><title>{_safe(f"{name}: {value:.4g}")}</title></rect>'
    )


def _legend(names, y, *, lines):
    """Return (markup, number of rows) of names with their colours, wrapped to the width."""
    parts, x, row = [], 4.0, 0
    for number, name in enumerate(names):
        text, colour = _short(name, WIDTH - 40), number % _COLOURS
        width = 26 + _text_width(text) + 12
        if x + width > WIDTH and x > 4:
            x, row = 4.0, row + 1
        height = y + row * _LINE
        key = f'<path class="line s{colour}" d="M{x:.1f} {height:.1f}h20"/>'
        if not lines:
            key = f'<rect class="fill s{colour}" x="{x + 8:.1f}" y="{height - 5:.1f}" width="10" height="10"/>'
        parts.append(f'{key}<text x="{x + 25:.1f}" y="{height + 4:.1f}">{_safe(text)}</text>')
        x += width
    return "".join(parts), row + 1


def _svg(heading, title, description, parts, height):
    head = "".join(
        f'<text class="head" x="2" y="{_LINE * n + 13}">{_safe(text)}</text>' for n, text in enumerate(heading)
    )
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height:.0f}"><title>{_safe(title)}</title>'
        f"<desc>{_safe(description)}</desc>{head}{''.join(parts)}</svg>"
    )


def _empty(title):
    return _svg(_wrap(title, 46), title, "no data", [_label(WIDTH / 2, 50, "no data yet")], 70)


def _describe(series, x_label, y_label):
    """Say in words what a chart shows, for those who cannot see it."""
    spans = []
    for name, points in series.items():
        ys = [y for _, y in points if math.isfinite(y)]
        spans.append(f"{name} from {ys[0]:.4g} to {ys[-1]:.4g}" if ys else f"{name}: no data")
    return f"{y_label or 'value'} by {x_label}: {'; '.join(spans)}"


def _label(x, y, text):
    return f'<text class="mid" x="{x:.1f}" y="{y:.1f}">{_safe(text)}</text>'


def _wrap(text, width):
    return textwrap.wrap(clean(text), width, max_lines=2, placeholder=" …") or [""]


def _short(text, room):
    most = max(2, int(room / _LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def _text_width(text):
    """Estimate the width of a text at 11 pixels, rather too wide than too narrow: fonts differ."""
    return sum(3.8 if c in " .,:;|!'()[]/filjt" else 11 if c in "@%MWmw" or c > "\u2e80" else 7 for c in text)


def _safe(text):
    return html.escape(clean(text))
