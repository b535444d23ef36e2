"""Charts as SVG: well formed whatever they are given, everything escaped, ticks round, colours readable in light and dark."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr_jax.report import charts
from kdsr_jax.report.ticks import log_ticks, nice_ticks, tick_texts

texts = st.text(max_size=30)
numbers = st.floats(-1e30, 1e30) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-30])
points = st.lists(st.tuples(st.integers(0, 200), numbers), max_size=12).map(sorted)


def parse(svg):
    return ElementTree.fromstring(svg)


def words(svg):
    return [node.text for node in parse(svg).iter("text")]


def places(svg):
    """Every coordinate that a chart draws at."""
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy")
    found = [float(node.attrib[name]) for node in parse(svg).iter() for name in names if name in node.attrib]
    return found + [float(n) for node in parse(svg).iter("path") for n in re.findall(r"-?[\d.]+", node.attrib["d"])]


@settings(max_examples=40)
@given(st.dictionaries(texts, points, max_size=9), texts, texts, texts, st.booleans())
def test_line_charts_are_well_formed_and_stay_inside_their_box(series, title, x_label, y_label, log_y):
    svg = charts.line_chart(title, series, x_label, y_label, log_y=log_y)
    _, _, width, height = map(float, parse(svg).attrib["viewBox"].split())
    assert all(-0.1 <= place <= max(width, height) + 0.1 for place in places(svg))
    assert parse(charts.standalone(svg)).tag == "{http://www.w3.org/2000/svg}svg"
    assert "style=" not in svg


@settings(max_examples=40)
@given(st.lists(texts, min_size=1, max_size=8), st.data())
def test_bar_charts_are_well_formed_and_stay_inside_their_box(categories, data):
    column = st.lists(st.none() | numbers, min_size=len(categories), max_size=len(categories))
    series = data.draw(st.dictionaries(texts, column, min_size=1, max_size=4))
    svg = charts.bar_chart("bars", categories, series, "x", "y", notes=categories)
    _, _, width, height = map(float, parse(svg).attrib["viewBox"].split())
    assert all(-0.1 <= place <= max(width, height) + 0.1 for place in places(svg))
    assert all(float(node.attrib["height"]) > 0 for node in parse(svg).iter("rect"))


@pytest.mark.parametrize("text", ["<script>1</script>", '"><svg onload=1>', "a & b", "]]>", "\x00\ud800\uffff"])
def test_text_is_shown_and_never_markup(text):
    shown = text.replace("\x00\ud800\uffff", "\ufffd" * 3)
    for svg in (
        charts.line_chart(text, {text: [(1, 1.0)], "b": [(1, 9.0)]}, text, text, mark=(1, text)),
        charts.bar_chart(text, [text], {text: [1.0], "b": [2.0]}, text, text, notes=[text]),
    ):
        assert words(svg).count(shown) >= 4
        assert {node.tag for node in parse(svg).iter()} <= {
            "svg",
            "title",
            "desc",
            "text",
            "line",
            "path",
            "circle",
            "rect",
        }
        charts.standalone(svg).encode()


def test_a_worked_line():
    svg = charts.line_chart("t", {"a": [(0, 0.0), (1, 5.0), (2, 10.0)]}, "epoch", "loss")
    (path,) = [node.attrib["d"] for node in parse(svg).iter("path")]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split()) for pair in re.split("[ML]", path)[1:])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(75) and y1 - y2 == pytest.approx(75)
    assert [node.text for node in parse(svg).iter("title")] == ["t", "a, epoch 0: 0", "a, epoch 1: 5", "a, epoch 2: 10"]
    assert parse(svg).find("desc").text == "loss by epoch: a from 0 to 10"
    assert words(svg) == ["t", "loss", "0", "2", "4", "6", "8", "10", "0", "1", "2", "epoch"]


def test_a_gap_breaks_the_line():
    svg = charts.line_chart("t", {"a": [(0, 1.0), (1, math.nan), (2, 3.0), (3, 4.0)]}, "x", "y")
    (path,) = [node.attrib["d"] for node in parse(svg).iter("path")]
    assert re.sub("[^ML]", "", path) == "MML"


def test_names_stand_at_the_lines_where_there_is_room_else_below():
    apart = {"a": [(1, 0.0), (2, 0.0)], "b": [(1, 1.0), (2, 1.0)]}
    close = {"a": [(1, 0.0), (2, 0.99)], "b": [(1, 1.0), (2, 1.0)]}
    longer = {"a": [(1, 0.0), (2, 0.0)], "b": [(1, 1.0), (3, 1.0)]}
    assert charts.line_chart("t", apart, "x", "y").count("h20") == 0
    for series in (close, longer, apart | {"n" * 40: [(1, 0.5), (2, 0.5)]}):
        assert charts.line_chart("t", series, "x", "y").count("h20") == len(series)


def test_a_logarithmic_axis_spaces_decades_evenly_and_leaves_zero_out():
    svg = charts.line_chart("t", {"a": [(1, 1.0), (2, 10.0), (3, 100.0), (4, 0.0)]}, "x", "y", log_y=True)
    (path,) = [node.attrib["d"] for node in parse(svg).iter("path")]
    ys = [float(pair.split()[1]) for pair in re.split("[ML]", path)[1:]]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)


def test_many_points_have_few_marks_the_last_among_them():
    svg = charts.line_chart("t", {"a": [(x, float(x)) for x in range(1000)]}, "x", "y")
    titles = [node.text for node in parse(svg).iter("title")]
    assert 20 <= len(titles) <= 42 and titles[-1] == "a, x 999: 999"


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, math.nan)]}])
def test_without_a_point_a_chart_says_so(series):
    assert "no data yet" in words(charts.line_chart("t", series, "x", "y"))
    assert "no data yet" in words(charts.bar_chart("t", ["c"], {"a": [None]}, "x", "y"))


def test_bars_hang_below_zero_and_missing_ones_leave_a_gap():
    svg = charts.bar_chart("t", ["p", "q", "r"], {"a": [2.0, -1.0, None]}, "x", "y", notes=["n=1", "n=2", "n=3"])
    first, second = parse(svg).iter("rect")
    assert float(first.attrib["height"]) == pytest.approx(2 * float(second.attrib["height"]))
    assert float(second.attrib["y"]) == pytest.approx(float(first.attrib["y"]) + float(first.attrib["height"]))
    assert {"n=1", "n=2", "n=3", "p", "q", "r"} <= set(words(svg))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
def test_ticks_are_round_even_and_cover(low, span, cover):
    high = low + span
    ticks = nice_ticks(low, high, cover=cover)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert ticks == sorted(set(ticks)) and len(ticks) <= 12
    assert max(steps, default=1) == pytest.approx(min(steps, default=1), rel=1e-3)
    if cover:
        slack = 1e-6 * max(abs(low), abs(high), 1e-9)
        assert len(ticks) >= 2 and ticks[0] <= low + slack and ticks[-1] >= high - slack


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        (nice_ticks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (nice_ticks(1, 3, 6, whole=True), [1, 2, 3]),
        (nice_ticks(5, 5, cover=True), [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (log_ticks(1e-5, 3), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10]),
        (log_ticks(0.2, 0.9), [0.2, 0.5, 1.0]),
        (log_ticks(3, 3), [2, 5]),
    ],
)
def test_worked_ticks(ticks, expected):
    assert ticks == pytest.approx(expected)


@given(st.floats(1e-12, 1e12), st.floats(1, 1e9))
def test_logarithmic_ticks_enclose(low, factor):
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 9 and ticks[0] <= low * (1 + 1e-6) and ticks[-1] >= low * factor * (1 - 1e-6)


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0, 5e-5, 1e-4, 1.5e-4], ["0", "5e-5", "1e-4", "1.5e-4"]),
        ([0.998, 0.9985, 0.999], ["0.9980", "0.9985", "0.9990"]),
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([1e-5, 1e-3, 0.1], ["1e-5", "0.001", "0.1"]),
        ([0, 1e6, 2e6], ["0", "1e6", "2e6"]),
    ],
)
def test_ticks_as_text(ticks, expected):
    assert tick_texts(ticks) == expected


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_their_background(scheme):
    palette = dict(re.findall(r"--(\w+):(#\w{6})", re.findall(r":root\{(.*?)\}", charts.CSS)[scheme]))
    for name in ("ink", "muted"):
        assert contrast(palette[name], palette["surface"]) >= 4.5
    for number in range(8):
        assert contrast(palette[f"c{number}"], palette["surface"]) >= 4.5


def test_a_file_of_its_own_is_written_by_rename(tmp_path):
    svg = charts.line_chart("t", {"a": [(1, 1.0)]}, "x", "y")
    charts.write_svg(tmp_path / "chart.svg", svg)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chart.svg"]
    assert (tmp_path / "chart.svg").read_text() == charts.standalone(svg)
    assert "prefers-color-scheme" in charts.standalone(svg) and "url(" not in charts.standalone(svg)
