"""The explorer without a browser: what its server answers, what it refuses, and its command line."""

import json
import shutil
import socket

import numpy as np
import pytest
from explore_parts import post, request, serve

from kdsr_jax import explore, train
from kdsr_jax.data.interactions import train_lengths
from kdsr_jax.explorer.server import MOST_BYTES, Server
from kdsr_jax.recommender import Recommender

pytestmark = pytest.mark.usefixtures("quick_compilation")

HISTORY = ["i00", "i09", "i08", "i07", "i33", "i02", "i09"]  # the model reads the newest four
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture(scope="module")
def ids_run(tiny, tmp_path_factory):
    """The folder of a finished run on item ids alone, on the data of ``finished``."""
    folder = tmp_path_factory.mktemp("ids") / "ids"
    train.train_and_evaluate(tiny("train.epochs=1", "eval.protocol=paper", variant=":sasrec"), folder)
    return folder


@pytest.fixture(scope="module")
def root(tiny, tmp_path_factory):
    """The data root of ``finished`` with titles and pictures besides, and with things that must not be served."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(f"{tiny().data.root}/shop", folder / "shop")
    titles = [{"item_id": f"i{n:02}", "title": f"{'Red' if n % 2 else 'Blue'}  shoe {n}"} for n in range(35)]
    (folder / "shop" / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in titles))
    images = folder / "shop" / "images"
    images.mkdir()
    (images / "i00.png").write_bytes(PNG)
    (images / "i01.jpg").write_bytes(b"\xff\xd8\xff" + bytes(100_000))  # larger than a report takes
    (images / "i02.png").write_bytes(b"<script>")
    (folder / "shop" / "secret.png").write_bytes(PNG)
    return folder


@pytest.fixture(scope="module")
def recommender(finished, root):
    return Recommender.from_workdir(finished[0], root)


@pytest.fixture(scope="module")
def ids_recommender(ids_run, root):
    return Recommender.from_workdir(ids_run, root)


@pytest.fixture(scope="module")
def port(recommender, ids_recommender):
    with serve({"kdsr": recommender, "ids": ids_recommender}) as server:
        yield server.server_port


@pytest.fixture
def get(port):
    """Return a function path -> JSON of the answer, which must be a good one."""

    def ask(path):
        status, headers, body = request(port, "GET", path)
        assert (status, headers["Content-Type"]) == (200, "application/json"), body
        return json.loads(body)

    return ask


def sent(port, name, **content):
    status, answer = post(port, f"/api/{name}", content)
    assert status == 200, answer
    return answer


def listed(answer, run=0):
    return [row["item"]["id"] for row in answer["runs"][run]["recommendations"]]


def test_the_page_and_its_parts_are_served_under_a_policy(port):
    for path, kind in (("/", "text/html"), ("/explore.css", "text/css"), ("/explore.js", "text/javascript")):
        status, headers, body = request(port, "GET", path)
        assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8" and len(body) > 1000
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers
        assert b"http:" not in body and b"https:" not in body and b"innerHTML" not in body
    assert request(port, "GET", "/", host=[f"localhost:{port + 1}"])[0] == 200  # a forwarded port


@pytest.mark.parametrize(
    "host",
    [
        ["example.org"],
        ["127.0.0.1.example.org:80"],
        ["example.org:127.0.0.1"],
        ["[::1]:80"],
        [""],
        [],
        ["localhost"] * 2,
    ],
)
def test_other_hosts_are_refused(port, host):
    for method, path in (("GET", "/"), ("GET", "/api/about"), ("GET", "/picture/1"), ("POST", "/api/recommend")):
        status, _, body = request(port, method, path, host=host)
        assert status == 403 and "open it as 127.0.0.1 or localhost" in json.loads(body)["error"]


def test_about_names_the_runs(get):
    about = get("/api/about")
    assert (about["name"], about["items"], about["users"], about["most"]) == ("shop", 36, 48, 36)
    assert about["modalities"] == ["image"] and [run["name"] for run in about["runs"]] == ["kdsr", "ids"]
    assert about["runs"][1]["model"] == "sasrec, item ids only"


def test_search_finds_all_words_in_titles_and_ids(get, recommender):
    found = get("/api/items?words=SHOE+red")
    assert found["found"] == 17 and all(item["title"].startswith("Red shoe ") for item in found["items"])
    assert [item["id"] for item in get("/api/items?words=i07")["items"]] == ["i07"]
    assert get("/api/items?words=i35")["items"] == [{"id": "i35", "title": "i35", "picture": None}]
    assert get("/api/items?words=nothing") == {"found": 0, "items": []}
    many = get("/api/items?words=")
    assert many["found"] == 36 and len(many["items"]) == 20
    taken = np.bincount(recommender.dataset.interactions.items, minlength=37)
    counts = [taken[recommender.number(item["id"])] for item in many["items"]]
    assert counts == sorted(counts, reverse=True)


def test_a_user_has_a_train_and_a_test_part(get, recommender):
    assert [user["id"] for user in get("/api/users?words=3")["users"]][:2] == ["u03", "u13"]
    answer, data = get("/api/user?user=u05"), recommender.dataset.interactions
    taken = data.item_ids[data.items[data.offsets[5] : data.offsets[6]]].tolist()
    assert [item["id"] for item in answer["history"] + answer["after"]] == taken
    assert len(answer["history"]) == train_lengths(data.lengths)[5] == 9
    assert get("/api/user")["user"] in set(data.user_ids)


def test_both_lists_are_those_of_python_with_places_in_each_other(port, recommender, ids_recommender):
    answer = sent(port, "recommend", history=HISTORY, k=7)
    assert [item["id"] for item in answer["history"]] == HISTORY and answer["read"] == 4
    whole = [[item for item, _ in run.recommend(HISTORY, k=36)] for run in (recommender, ids_recommender)]
    for run in (0, 1):
        assert listed(answer, run) == whole[run][:7] and answer["runs"][run]["dropped"] == []
        for place, row in enumerate(answer["runs"][run]["recommendations"], 1):
            assert row["place"] == row["before"] == place
            assert whole[1 - run][row["elsewhere"] - 1] == row["item"]["id"]
    assert all(row["because"] == {} for row in answer["runs"][1]["recommendations"])


def test_the_reason_of_a_list_is_the_nearest_of_the_explanation(port, recommender):
    for row in sent(port, "recommend", history=HISTORY, k=7)["runs"][0]["recommendations"]:
        links = recommender.explain(HISTORY, row["item"]["id"]).links
        if not links:
            assert row["because"] == {}
            continue
        best = max(links, key=lambda link: link.teacher_score)
        reason = row["because"]["image"]
        assert (reason["item"]["id"], reason["code"]) == (best.item, best.teacher_code)
        assert reason["score"] == pytest.approx(best.teacher_score, abs=1e-5)


def test_leaving_an_item_out_changes_the_lists_and_says_what_moved(port, recommender):
    without = [6, 4]
    kept = [raw for place, raw in enumerate(HISTORY) if place not in without]
    others = [f"i{n:02}" for n in range(36) if f"i{n:02}" not in HISTORY]
    before = [item for item, _ in recommender.recommend(HISTORY, k=36, filter=others)]
    now = [item for item, _ in recommender.recommend(kept, k=36, filter=others)]
    answer = sent(port, "recommend", history=HISTORY, without=without, k=5)
    assert listed(answer) == now[:5] and now[:5] != before[:5]
    assert [before[row["before"] - 1] for row in answer["runs"][0]["recommendations"]] == now[:5]
    dropped = answer["runs"][0]["dropped"]
    assert [row["item"]["id"] for row in dropped] == [item for item in before[:5] if item not in now[:5]] != []
    assert all(now[row["place"] - 1] == before[row["before"] - 1] == row["item"]["id"] for row in dropped)


def test_an_explanation_has_links_weights_and_what_each_item_does(port, recommender, ids_recommender):
    item = "i04"
    answer, found = sent(port, "explain", history=HISTORY, item=item), recommender.explain(HISTORY, item)
    links = {link.item: link for link in found.links}
    shown = answer["modalities"]["image"]
    assert {row["item"]["id"] for row in shown} == set(links) == set(HISTORY[-4:])
    assert [row["teacher_score"] for row in shown] == sorted((row["teacher_score"] for row in shown), reverse=True)
    for row in shown:
        link = links[row.pop("item")["id"]]
        assert row == {key: pytest.approx(getattr(link, key), abs=1e-5) for key in row} and len(row) == 4
    means = {name: np.mean([share[name] for share in found.shares]) for name in ("item", "image")}
    assert answer["shares"] == pytest.approx(means) and sum(answer["shares"].values()) == pytest.approx(1)
    own = [[i for i, _ in run.recommend(HISTORY, k=36)].index(item) + 1 for run in (recommender, ids_recommender)]
    assert answer["places"] == own
    assert [row["item"]["id"] for row in answer["alone"]] == HISTORY[-4:]
    for place, row in zip(range(3, 7), answer["alone"], strict=True):
        rows = sent(port, "recommend", history=HISTORY, without=[place], k=30)["runs"][0]["recommendations"]
        assert {r["item"]["id"]: r["place"] for r in rows}[item] == row["place"]


def test_an_explanation_at_the_edges(port):
    answer = sent(port, "explain", history=["i01"], item="i35")  # without an image feature
    assert answer["modalities"] == {"image": []} and answer["alone"] == []
    assert sent(port, "explain", history=["i01", "i02"], item="i01")["places"] == [None, None]


def test_similar_items_are_those_of_python(get, recommender):
    answer = get("/api/similar?item=i05")
    expected = recommender.similar("i05", 8, "image")
    assert [(row["item"]["id"], row["score"]) for row in answer["modalities"]["image"]] == expected
    assert get("/api/similar?item=i35")["modalities"] == {"image": []}


def test_pictures_are_those_of_known_items_and_nothing_else(port, get):
    pictures = {item["id"]: item["picture"] for item in get("/api/items?words=shoe+0")["items"]}
    assert pictures["i00"] == "/picture/1"
    status, headers, body = request(port, "GET", "/picture/1")
    assert (status, headers["Content-Type"], body) == (200, "image/png", PNG) and "Content-Security-Policy" in headers
    status, headers, body = request(port, "GET", "/picture/2")
    assert (status, headers["Content-Type"], len(body)) == (200, "image/jpeg", 100_003)
    assert get("/api/items?words=i02")["items"][0]["picture"] is None
    outside = [
        "/secret.png",
        "/../secret.png",
        "/picture/../secret.png",
        "/picture/1/../../secret.png",
        "/picture/secret",
    ]
    outside += [
        "/picture/%2e%2e%2fsecret.png",
        "/images/i00.png",
        "/picture/i00",
        "/picture/-1",
        "/../../../etc/passwd",
    ]
    for path in (
        *outside,
        "/picture/0",
        "/picture/3",
        "/picture/37",
        "/picture/999999999",
        "/explore.html",
    ):
        status, headers, body = request(port, "GET", path)
        assert status == 404 and headers["Content-Type"] == "application/json" and json.loads(body)["error"], path


@pytest.mark.parametrize("item", ["../secret", "..", "/etc/passwd", "a\0b", "x" * 5000])
def test_an_id_is_no_path(recommender, root, item):
    from kdsr_jax.report.pictures import find_picture

    assert find_picture(item, {}, recommender.dataset, str(root)) is None


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/api/nothing", 404, "there is no such thing"),
        ("/nothing", 404, "there is no such thing"),
        ("/about", 404, "there is no such thing"),
        ("/api/_item?number=1", 404, "there is no such thing"),
        ("/api/recommend", 405, "takes POST"),
        ("/api/similar", 400, "missing a required argument: 'item'"),
        ("/api/similar?item=x", 400, "there is no item 'x'"),
        ("/api/similar?item=i01&k=3", 400, "unexpected keyword argument 'k'"),
        ("/api/similar?item=i01&item=i02", 400, "item: is given twice"),
        ("/api/items?words=%ff", 400, "the query cannot be read"),
        ("/api/user?user=nobody", 400, "there is no user 'nobody'"),
    ],
)
def test_a_bad_question_gets_a_clear_line(port, path, status, error):
    got, _, body = request(port, "GET", path)
    assert got == status and error in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("path", "content", "status", "error"),
    [
        ("/api/recommend", {"history": []}, 400, "history: is empty"),
        ("/api/recommend", {"history": ["i01", "x"]}, 400, "there is no item 'x'"),
        ("/api/recommend", {"history": "i01"}, 400, "history: must be a list of item ids"),
        ("/api/recommend", {"history": [1]}, 400, "history: must be a list of item ids"),
        ("/api/recommend", {"history": ["i01"], "k": 37}, 400, "k=37: must be a whole number from 1 to 36"),
        ("/api/recommend", {"history": ["i01"], "k": 0}, 400, "k=0: must be a whole number"),
        ("/api/recommend", {"history": ["i01"], "k": None}, 400, "must be a whole number"),
        ("/api/recommend", {"history": ["i01"], "k": True}, 400, "must be a whole number"),
        ("/api/recommend", {"history": ["i01"], "without": [0]}, 400, "without: leaves nothing of the history"),
        ("/api/recommend", {"history": ["i01"], "without": [1]}, 400, "without: must be a list of places"),
        ("/api/recommend", {"history": ["i01"], "without": [-1]}, 400, "without: must be a list of places"),
        ("/api/recommend", {}, 400, "missing a required argument: 'history'"),
        ("/api/recommend", {"histroy": ["i01"]}, 400, "argument: 'history'"),
        ("/api/recommend", ["i01"], 400, "must be a JSON object"),
        ("/api/recommend", b"{", 400, "cannot be read as JSON"),
        ("/api/recommend", b"\xff", 400, "cannot be read as JSON"),
        ("/api/recommend", b"[" * 100_000, 400, "cannot be read as JSON"),
        ("/api/explain", {"history": ["i01"], "item": "x"}, 400, "there is no item 'x'"),
        ("/api/explain", {"history": ["i01"], "item": 7}, 400, "item: must be a text"),
        ("/api/about", {}, 404, "there is no such thing here that takes POST"),
    ],
)
def test_a_bad_body_gets_a_clear_line(port, path, content, status, error):
    got, answer = post(port, path, content)
    assert got == status and error in answer["error"]


def test_bodies_of_another_kind_or_size_and_other_methods_are_refused(port):
    kind, length = ("Content-Type", "application/json"), ("Content-Length", "2")
    for headers, expected in (
        ([("Content-Type", "text/plain"), length], 415),  # what a form of another origin could send
        ([kind], 411),
        ([kind, ("Content-Length", "-2")], 411),
        ([kind, ("Content-Length", str(MOST_BYTES + 1))], 413),
    ):
        status, _, body = request(port, "POST", "/api/recommend", headers=headers)
        assert status == expected and json.loads(body)["error"]
    status, headers, body = request(port, "PUT", "/", headers=[("Content-Length", "0")])
    assert status == 501 and "PUT" in json.loads(body)["error"] and "Content-Security-Policy" in headers


def test_a_fault_of_our_own_ends_one_answer_and_not_the_server(port, get, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Recommender, "similar", fail)
    status, _, body = request(port, "GET", "/api/similar?item=i01")
    assert status == 500 and b"secret" not in body and "ZeroDivisionError: secret" in capsys.readouterr().err
    assert get("/api/about")["items"] == 36


@pytest.fixture
def explore_line(capsys):
    def execute(*words):
        code = explore.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


def test_the_command_prints_its_address_and_ends_by_an_interrupt(finished, ids_run, root, explore_line, monkeypatch):
    def interrupted(server):
        status = server.answers.recommend(["i01"])
        assert len(status["runs"]) == 2 and server.server_address[0] == "127.0.0.1"
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    words = f"--workdir={finished[0]}", f"--compare={ids_run}", "--port=0", f"--data-root={root}"
    code, out, err = explore_line(*words)
    assert (code, err) == (0, "stopped\n") and "http://127.0.0.1:" in out.splitlines()[-1]


def test_a_port_in_use_is_one_line(finished, explore_line):
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        code, out, err = explore_line(f"--workdir={finished[0]}", f"--port={number}")
    assert (code, out) == (2, "") and err.startswith(f"error: --port={number}: is in use;") and err.count("\n") == 1


def test_mistakes_on_the_command_line_are_one_line(finished, ids_run, tmp_path, explore_line):
    run, unfinished, other = finished[0], tmp_path / "unfinished", tmp_path / "other"
    for copy in (unfinished, other):
        shutil.copytree(run, copy)
    (unfinished / "result.json").unlink()
    saved = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(saved | {"log_sha256": "0" * 64}))
    lines = [
        ([], "the following arguments are required: --workdir"),
        ([f"--workdir={tmp_path}"], f"{tmp_path}: holds no run of kdsr_jax"),
        ([f"--workdir={unfinished}"], f"{unfinished}: the run is not finished"),
        ([f"--workdir={run}", f"--compare={unfinished}"], f"{unfinished}: the run is not finished"),
        ([f"--workdir={run}", f"--compare={other}"], f"--compare={other}: is a run on other data than {run}"),
        ([f"--workdir={run}", f"--compare={run}"], f"--compare={run}: is the run itself"),
        ([f"--workdir={run}", "--compare="], ".: holds no run of kdsr_jax"),
        ([f"--workdir={run}", "--port=70000"], "--port=70000: cannot be had"),
        ([f"--workdir={run}", "--port=x"], "argument --port: invalid int value"),
        ([f"--workdir={run}", "--ports=1"], "unrecognized arguments"),
    ]
    for words, line in lines:
        code, out, err = explore_line(*words, *([] if any("--port" in word for word in words) else ["--port=0"]))
        assert code == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1, (words, out, err)
