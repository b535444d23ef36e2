"""report.html in a real browser: every section has content, nothing overflows, and hostile text stays text."""

import json

import numpy as np
import pytest
from report_parts import HOSTILE, SECTIONS, find_browser, look, make_lines, make_workdir

from kdsr_jax import cli
from kdsr_jax.report.collect import collect
from kdsr_jax.report.page import render
from kdsr_jax.report.text import clean

pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium in the path")

WIDTHS = (360, 1200)
# Where what a page says of itself stands, and so may not be replaced.
KEPT = {"phase", "protocol", "picture"}


def poison(content, texts):
    """Replace every text of JSON data by the next of an endless row of hostile ones, structure aside."""
    if isinstance(content, dict):
        return {key: value if key in KEPT else poison(value, texts) for key, value in content.items()}
    if isinstance(content, list):
        return [poison(value, texts) for value in content]
    return next(texts) if isinstance(content, str) else content


def endless():
    while True:
        yield from HOSTILE


@pytest.fixture(scope="module")
def config(repository):
    return cli.parse(
        [f"--config={repository / 'configs' / 'planted.py'}", "--config.eval.protocol=both", "--mode=stats"]
    )[0]


def hostile_page(folder):
    """Render the report of a folder in which every text is an attack."""
    texts = endless()
    for name in ("overview", "selection", "result", "examples"):
        file = folder / f"{name}.json"
        file.write_text(json.dumps(poison(json.loads(file.read_text()), texts)))
    examples = json.loads((folder / "examples.json").read_text())
    examples["items"]["1"]["picture"] = "https://example.org/stolen.png"
    user = examples["users"][0]
    user["history"] = [n + 10 for n in range(len(HOSTILE))]
    user["recommendations"] = [
        {"item": n + 10, "score": 1.0, "taken": False, "because": {text: {"item": n + 10, "score": 1.0, "code": 3}}}
        for n, text in enumerate(HOSTILE)
    ]
    for n, text in enumerate(HOSTILE):
        examples["items"][str(n + 10)] = {"id": text, "title": text, "picture": f'x" {text}'}
    (folder / "examples.json").write_text(json.dumps(examples))
    settings = json.loads((folder / "config.json").read_text())["config"]
    settings |= {"poisoned": {text: text for text in HOSTILE}}
    settings["data"]["name"], settings["model"]["name"], settings["teacher"]["score_fn"] = HOSTILE[:3]
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    lines = make_lines()
    for line, text in zip(lines, HOSTILE, strict=False):
        line |= {"forgetting": {text: {text: 0.5}}, "learning_rates": {text: 1.0}, "metrics": {text: 2.0}}
        line |= {"losses": {f"holistic/{text}": 1.0, text: 2.0}, "gradient_norms": {f"{text} on {text}": 1.0}}
        line["targets_per_second"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with np.load(folder / "ranks.npz") as file:
        arrays = dict(file)
    np.savez(folder / "ranks.npz", **(arrays | {"evaluated_on": HOSTILE[0]}))
    return render(collect(folder))


@pytest.fixture(scope="module")
def seen(tmp_path_factory, config, repository):
    """What the browser found on all pages: (frames, console, asked)."""
    folder = tmp_path_factory.mktemp("run")
    pages = {"begun": render(collect(folder)), "committed": (repository / "docs" / "report.html").read_text()}
    make_workdir(folder, config)
    pages["finished"] = page = render(collect(folder))
    attack = "<script>window.hacked=1</script><img src='/stopped'><style>body{background:url(/stopped)}</style>"
    pages["attacked"] = page.replace("<h1>", attack + "<h1>", 1)
    pages["control"] = (
        "<!DOCTYPE html><title>t</title><section id='s'>x</section><div onclick='1'></div>"
        "<div style='width:2000px'>wide</div><script>window.hacked=1;fetch('/control-asked');console.error('bad')</script>"
    )
    pages["hostile"] = hostile_page(folder)
    return look(pages, WIDTHS)


@pytest.mark.parametrize("page", ["begun", "finished", "committed", "hostile"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_and_still(seen, page, width):
    frames, console, asked = seen
    assert console[page] == [] and console[""] == []
    assert f"/{page}?{width}" in asked and "/stolen" not in asked
    frame = frames[page, width]
    assert frame["overflow"] == 0
    assert tuple(frame["sections"]) == SECTIONS and min(frame["sections"].values()) > 30
    assert not frame["hacked"] and frame["handlers"] == []
    assert set(frame["elements"]).isdisjoint(
        {"script", "iframe", "form", "base", "object", "embed", "image", "textarea"}
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_finished_run_has_all_its_charts_and_pictures(seen, width):
    frame = seen[0]["finished", width]
    assert frame["charts"] == 23 and frame["pictures"] == ["data:image/svg+"] * 6


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(seen, text):
    frame = seen[0]["hostile", 360]
    assert frame["text"].count(clean(text)) >= 5
    assert set(frame["pictures"]) <= {"data:image/svg+"} and "49" not in frame["title"]


def test_nothing_else_was_asked_for(seen):
    names = ("begun", "committed", "finished", "attacked", "control", "hostile")
    pages = {f"/{page}?{width}" for page in names for width in WIDTHS}
    assert set(seen[2]) == {"/", "/control-asked"} | pages


def test_the_browser_would_have_noticed(seen):
    frame = seen[0]["control", 360]
    assert frame["overflow"] > 1000 and frame["hacked"] and frame["handlers"] == ["onclick"]
    assert any("bad" in line for line in seen[1]["control"])


def test_the_policy_stops_what_is_not_the_style(seen):
    assert not seen[0]["attacked", 360]["hacked"]
    assert sum("Content Security Policy" in line for line in seen[1]["attacked"]) >= 3
