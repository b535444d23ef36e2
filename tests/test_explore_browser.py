"""The explorer in a real browser: search, click, see what changes; and hostile titles and ids stay text."""

import json
import re
import urllib.parse

import numpy as np
import pyarrow as pa
import pytest
from browser import open_browser
from explore_parts import post, serve
from report_parts import HOSTILE, find_browser

import kdsr_jax
from kdsr_jax.recommender import Recommender
from kdsr_jax.report.text import clean

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="needs a Chromium in the path"),
]

ATTACKS = [text for text in HOSTILE if "\ud800" not in text]  # which no file can hold
SHOES = [f"shoe-{n:02}" for n in range(14)]
RULED = "!document.querySelector('.waiting') && document.querySelectorAll('.recs li').length > 0"
LIST = "[...document.querySelectorAll('.lists > div:first-child .recs li')].map(row => row.dataset.item)"
STRIP = "[...document.querySelectorAll('#strip .name')].map(name => name.title)"


@pytest.fixture(scope="module")
def shop(tmp_path_factory, quick_compilation):
    """A finished run on a shop where every other id and title, and every user, is an attack; served beside itself."""
    rng, ids = np.random.default_rng(0), [*ATTACKS, *SHOES]
    log = {
        "user_id": np.repeat(ATTACKS, 9).tolist(),
        "item_id": [ids[n] for n in rng.integers(0, len(ids), 9 * len(ATTACKS))],
    }
    log["item_id"][: len(ids)] = ids  # none is missing
    titles = {"item_id": ids, "title": [*ATTACKS[1:], ATTACKS[0], *(f"Red {name}" for name in SHOES)]}
    features = {"image": (ids, rng.normal(size=(len(ids), 16)).astype(np.float32))}
    settings = {"data.k_core": 1, "data.max_length": 32, "model.dim": 8, "model.num_layers": 1, "train.epochs": 1}
    settings |= {"teacher.num_codes": 4, "teacher.num_splits": 4, "teacher.num_pairs": 300}
    folder = tmp_path_factory.mktemp("hostile")
    run = kdsr_jax.fit(pa.table(log), pa.table(titles), features, folder, **settings)
    with serve({"kdsr": run, ATTACKS[0]: Recommender.from_workdir(folder / "run")}) as server:
        yield server


@pytest.fixture(scope="module")
def page(shop):
    with open_browser() as page:
        yield page


def address(shop, **state):
    return f"{shop.address}#{urllib.parse.quote(json.dumps(state))}" if state else shop.address


def search(page, words, number):
    """Add the item that is found first, with which the history has so many."""
    page.type("#words", words)
    page.wait("document.querySelector('#found-items button')")
    page.click("#found-items button")
    page.wait(f"document.querySelectorAll('#strip li').length === {number} && {RULED}")


def expected(shop, history, **arguments):
    status, answer = post(shop.server_port, "/api/recommend", {"history": history, **arguments})
    assert status == 200, answer
    return [row["item"]["id"] for row in answer["runs"][0]["recommendations"]]


def test_search_click_and_see_the_recommendations_change(shop, page):
    page.open(address(shop))
    page.wait(RULED)  # any user, to begin with
    assert page.run("document.querySelector('#told').textContent").startswith("User ")
    page.click("#clear")
    page.wait("document.querySelectorAll('#strip li, .recs li').length === 0")
    search(page, "red shoe-03", 1)
    one = page.run(LIST)
    assert page.run(STRIP) == ["shoe-03"] and one == expected(shop, ["shoe-03"])
    search(page, "shoe-07", 2)
    two = page.run(LIST)
    assert two == expected(shop, ["shoe-03", "shoe-07"]) != one
    assert page.run("document.querySelectorAll('.recs').length") == 2 and not page.run(
        "!!document.querySelector('.move')"
    )

    page.click("#strip li:first-child .toggle")
    page.wait("document.querySelector('#strip .out') && document.querySelector('.move')")
    assert page.run(LIST) == expected(shop, ["shoe-03", "shoe-07"], without=[0])
    page.open(page.run("location.href"))  # where what was done is kept
    page.wait("document.querySelector('#strip .out') && document.querySelector('.move')")
    page.click("#strip li:first-child .toggle")
    page.wait(f"!document.querySelector('#strip .out') && !document.querySelector('.move') && {RULED}")
    assert page.run(LIST) == two


def test_a_chosen_recommendation_is_explained_and_can_be_added(shop, page):
    history = ["shoe-03", "shoe-07"]
    page.open(address(shop, history=history))
    page.wait(RULED)
    first = page.run(LIST)[0]
    page.click(".recs .name")
    page.wait("document.querySelector('#details h2')")
    _, why = post(shop.server_port, "/api/explain", {"history": history, "item": first})
    text = page.run("document.querySelector('#details').textContent")
    assert "Nearest in the history: image" in text and "Similar by image" in text and "Weights in the fusion" in text
    for link in why["modalities"]["image"]:
        assert clean(link["item"]["title"]) in text
        for score, code in (
            (link["teacher_score"], link["teacher_code"]),
            (link["student_score"], link["student_code"]),
        ):
            assert f"{score:+.2f}code {code}".replace("-", "−") in text
    assert page.run("document.querySelectorAll('.chosen').length") >= 1
    page.click("#add")
    page.wait(f"document.querySelectorAll('#strip li').length === 3 && {RULED}")
    assert page.run(STRIP) == [*history, first] and page.run(LIST) == expected(shop, [*history, first])


def test_what_the_server_refuses_is_told(shop, page):
    page.open(address(shop, history=["shoe-03"], k=1000))
    page.wait("document.querySelector('#error').textContent.startsWith('k=1000: must be a whole number from 1 to')")
    page.open(address(shop, history=["gone"]))
    page.wait("document.querySelector('#error').textContent === \"there is no item 'gone'\"")
    page.complaints[:] = [c for c in page.complaints if "400 (Bad Request)" not in json.dumps(c)]


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("item", range(0, len(ATTACKS), 5))
def test_hostile_texts_are_shown_and_do_nothing(shop, page, width, item):
    page.open(address(shop, user=ATTACKS[item], history=ATTACKS, item=ATTACKS[item], without=[3], k=30), width)
    page.wait(f"{RULED} && document.querySelectorAll('#details h3').length > 2")
    shown = page.run("[...document.querySelectorAll('#strip .name')].map(name => name.textContent)")
    assert shown == [" ".join(clean(text).split()) for text in [*ATTACKS[1:], ATTACKS[0]]]
    assert ATTACKS[0] in page.run("[...document.querySelectorAll('.lists h3')].map(h => h.textContent)")
    page.type("#words", "hacked")
    page.wait("document.querySelectorAll('#found-items button').length > 3")
    page.run("document.querySelector('#words').value = ''")
    page.type("#users", "<")
    page.wait("document.querySelectorAll('#found-users button').length > 3")
    assert page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.run("typeof window.hacked") == "undefined"
    elements = page.run("[...new Set([...document.querySelectorAll('body *')].map(e => e.tagName.toLowerCase()))]")
    assert set(elements).isdisjoint(
        {"script", "iframe", "form", "base", "object", "svg", "math", "style", "link", "textarea"}
    )
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
    assert page.run(handlers) == []


def test_nothing_was_asked_of_others_and_nothing_went_wrong(shop, page):
    own = re.compile(
        re.escape(shop.address)
        + r"(explore\.(js|css)|api/(about|items|users?|similar|recommend|explain)(\?.*)?)?(#.*)?"
    )
    others = {url for url in page.asked if not own.fullmatch(url)} - {"about:blank", "data:,"}
    assert others == set() and len(page.asked) > 50
    assert page.complaints == []


def test_the_policy_would_have_stopped_it(shop, page):
    page.open(address(shop, history=["shoe-03"]))
    page.wait(RULED)
    refused = "(() => {try {document.body.innerHTML = '<b>'; return false} catch (error) {return error.name}})()"
    assert page.run(refused) == "TypeError"
    page.run("document.body.append(Object.assign(new Image(), {src: 'https://example.org/stolen.png'}))")
    page.run(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/stolen.png'}))"
    )
    page.wait("new Promise(done => setTimeout(() => done(true), 200))")
    told = [json.dumps(complaint) for complaint in page.complaints]
    assert sum("Content Security Policy" in line and "stolen" in line for line in told) == 2
