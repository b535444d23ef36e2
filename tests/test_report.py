"""The report: what is read from a run's folder, what the page says of it, and that writing it can never end a run."""

import base64
import hashlib
import html
import json
import logging
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_parts import SECTIONS, make_examples, make_lines, make_workdir

from kdsr_jax import cli
from kdsr_jax.data import Dataset
from kdsr_jax.data.sources import planted
from kdsr_jax.errors import UserError
from kdsr_jax.report import figures
from kdsr_jax.report.bins import histogram, quantile_bins
from kdsr_jax.report.collect import break_down, collect, compare_settings
from kdsr_jax.report.page import COLUMNS, optional, refresh_report, render
from kdsr_jax.report.pictures import MOST_BYTES, is_picture, item_picture
from kdsr_jax.workdir import Workdir

PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 20


@pytest.fixture(scope="module")
def config(repository):
    words = [f"--config={repository / 'configs' / 'planted.py'}", "--config.eval.protocol=both", "--mode=stats"]
    return cli.parse([*words, "--config.data.root=/some/where", "--config.train.learning_rate=0.002"])[0]


@pytest.fixture
def workdir(tmp_path, config):
    make_workdir(tmp_path, config)
    return tmp_path


def sections(page):
    """The text of each section, tags aside."""
    parts = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    return {name: " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split()) for name, text in parts}


def test_what_the_sections_say(workdir):
    said = sections(render(collect(workdir)))
    assert tuple(said) == SECTIONS
    wanted = {
        "result": [
            "hr@20 21.50 21.50 22.50 2",
            "coverage@20 61.00 61.00 61.00",
            "98,765 ",
            "epoch chosen on validation",
        ],
        "settings": ["train.learning_rate 0.002 0.001", 'eval.protocol "both" "validation"'],
        "data": ["1,234", "90.00 %", "items with image features 55", "Popularity of the items", "4–7"],
        "curves": ["Total loss", "Holistic distillation (L_S), image", "Learning rates", "modality tables", "1e-4"],
        "gradients": ["Gradient on the image table, select", "Gradient on the image table, refit", "holistic"],
        "teacher": ["image 12.5 % 7 of 100 6.5 0.750", "Variance of each chunk"],
        "forgetting": ["Likeness of the image table", "features, select", "item ids, refit"],
        "validation": ["epoch 2", "Hit rate", "Test part, epoch by epoch: paper's protocol"],
        "breakdown": ["hr@20 by length of the history", "mrr@20 by popularity of the target", "n=2"],
        "examples": [
            "User u3",
            "taken next",
            "Title 4",
            "ranked 4 of 56",
            "image: like Title 2 · −0.25, code 5",
            "taken before",
        ],
    }
    for name, texts in wanted.items():
        for text in texts:
            assert text in said[name], (name, text)
    assert said["examples"].count("taken next") == 1
    assert "/some/where" not in render(collect(workdir))


def test_the_columns_are_called_as_in_the_readme(repository):
    readme = (repository / "README.md").read_text()
    assert all(COLUMNS[name] in readme for name in ("test", "paper"))


def test_the_committed_report_is_small_and_says_nothing_of_the_machine(repository):
    page = (repository / "docs" / "report.html").read_text()
    assert tuple(sections(page)) == SECTIONS and len(page) < 1_500_000
    assert not re.search("/home/|/root/|/tmp/|/Users/", page) and str(repository) not in page
    assert page.count('<img src="data:image/svg+xml;base64,') > 100 and "unfinished" not in page


def test_the_same_folder_gives_the_same_page_and_the_policy_names_its_style(workdir):
    page = render(collect(workdir))
    assert page == render(collect(workdir))
    style = re.search("<style>(.*?)</style>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    assert page.count("Content-Security-Policy") == 1 and f'content="{policy.replace(chr(39), "&#39;")}"' in page
    assert page.index("Content-Security-Policy") < page.index("<title>")
    assert (
        page.count("<style") == 1
        and "<script" not in page
        and "style=" not in page
        and "http" not in page.replace("http-equiv", "")
    )


def test_every_stage_of_a_run_has_a_page(workdir, config):
    for gone, said in (
        ("result.json", "unfinished: phase refit, 4 epochs done"),
        ("examples.json", "They are written when the run is finished"),
        ("ranks.npz", "The test part has not been looked at yet"),
        ("selection.json", "There are no final metrics yet"),
        ("metrics.jsonl", "started; no epoch is finished yet"),
        ("overview.json", "The run has not written its overview"),
        ("config.json", "All 0 settings"),
    ):
        (workdir / gone).unlink()
        page = render(collect(workdir))
        assert said in page and tuple(sections(page)) == SECTIONS


def test_the_validation_protocol_shows_no_test_curve(tmp_path, config):
    other = config.copy_and_resolve_references()
    other.eval.protocol = "validation"
    make_workdir(tmp_path, other)
    result = json.loads((tmp_path / "result.json").read_text()) | {"paper": None, "paper_epochs": None}
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = render(collect(tmp_path))
    assert "epoch by epoch: paper" not in page and COLUMNS["paper"] not in page


def test_without_distillation_nothing_is_explained_and_without_tables_nothing_forgotten(workdir):
    overview = json.loads((workdir / "overview.json").read_text()) | {"teacher": {}}
    (workdir / "overview.json").write_text(json.dumps(overview))
    examples = make_examples()
    for recommendation in examples["users"][0]["recommendations"] + examples["users"][1]["recommendations"]:
        recommendation["because"] = {}
    (workdir / "examples.json").write_text(json.dumps(examples))
    lines = [line | {"forgetting": {}} for line in make_lines() if line["epoch"]]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = sections(render(collect(workdir)))
    assert "There is no teacher" in said["teacher"] and "like Title" not in said["examples"]
    assert "--config.forgetting.reference_workdir=DIR" in said["forgetting"]


@pytest.mark.parametrize(
    "name", ["config.json", "overview.json", "examples.json", "result.json", "metrics.jsonl", "ranks.npz"]
)
def test_damaged_files_count_as_missing(workdir, name):
    file = workdir / name
    file.write_bytes(file.read_bytes()[:-3] if name == "metrics.jsonl" else b"\xff\x00{[")
    assert tuple(sections(render(collect(workdir)))) == SECTIONS
    assert len(collect(workdir)["lines"]) == (9 if name == "metrics.jsonl" else 10)


def test_a_byte_that_is_no_text_costs_its_line_alone(workdir):
    file = workdir / "metrics.jsonl"
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first.replace(b"e", b"\xff", 1) + b"\n" + rest)
    assert len(collect(workdir)["lines"]) == 9


def test_settings_beside_their_defaults():
    found = compare_settings(
        {"seed": 0, "model.dim": 64, "data.root": "/x", "data.modalities": ["text-t5"], "new": "<b>"}
    )
    by_name = {setting["name"]: setting for setting in found}
    assert list(by_name) == ["seed", "model.dim", "data.modalities", "new"]  # where the data lies is left out
    assert by_name["seed"] == {"name": "seed", "value": "0", "default": "0", "differs": False}
    assert by_name["model.dim"] == {"name": "model.dim", "value": "64", "default": "128", "differs": True}
    assert by_name["data.modalities"]["default"] == '["image-facets", "text-facets"]'
    assert by_name["new"] == {"name": "new", "value": '"<b>"', "default": None, "differs": True}


def test_metrics_by_group(workdir):
    found = break_down(workdir / "ranks.npz")
    assert found["evaluated_on"] == "test" and found["epoch"] == 2
    lengths, popularity = found["parts"]
    assert lengths["names"] == ["1–3", "4", "5", "6", "7", "8"] and lengths["counts"] == [3, 1, 1, 1, 1, 1]
    assert popularity["names"] == ["0", "3", "9", "20", "40", "80"] and popularity["counts"] == [2, 2, 1, 1, 1, 1]
    assert popularity["hr"] == [100, 100, 0, 0, 100, 100]
    assert popularity["mrr"] == pytest.approx([75, 7.5, 0, 0, 25, 100])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 7))
def test_bins_hold_every_value_in_order(values, most):
    values = np.array(values)
    names, which = quantile_bins(values, most)
    assert 1 <= len(names) <= most + 1 and set(which) == set(range(len(names)))
    for left in range(len(names)):
        inside = values[which == left]
        low, high = inside.min(), inside.max()
        assert names[left] == (str(low) if low == high else f"{low}–{high}")
        assert left == 0 or low > values[which == left - 1].max()
        assert low > 0 or high == 0


@pytest.mark.parametrize(
    ("values", "names", "counts"),
    [
        ([0, 1, 2, 3, 4, 7, 8], ["0", "1", "2–3", "4–7", "8–15"], [1, 1, 2, 2, 1]),
        ([5, 40], ["4–7", "8–15", "16–31", "32–63"], [1, 0, 0, 1]),
        ([1, 300], ["1", *(f"{2**n}+" for n in range(1, 9))], [1, *[0] * 7, 1]),
        ([], [], []),
    ],
)
def test_histograms_of_doubling_bins(values, names, counts):
    assert histogram(np.array(values, np.int64)) == {"names": names, "counts": counts}


def test_losses_are_drawn_total_first_and_skip_epoch_zero():
    titles = [re.search("<title>(.*?)</title>", chart).group(1) for chart in figures.loss_charts(make_lines())]
    expected = [
        "Total loss",
        "Next item (L_RS)",
        "Dissected distillation (L_C), image",
        "Holistic distillation (L_S), image",
    ]
    assert titles == expected
    assert "epoch 0" not in "".join(figures.loss_charts(make_lines()))


@pytest.fixture
def folder_data():
    return Dataset("shop", None, {}, None, None)


def test_pictures_of_a_folder(tmp_path, folder_data):
    images = tmp_path / "shop" / "images"
    images.mkdir(parents=True)
    (tmp_path / "shop" / "secret.png").write_bytes(PNG)
    contents = {
        "png.png": PNG,
        "jpg.jpg": b"\xff\xd8\xff\xe0",
        "jpeg.jpeg": b"\xff\xd8\xff\xe0",
        "webp.webp": b"RIFF\x0a\x00\x00\x00WEBPVP8 ",
        "gif.gif": b"GIF89a\x01",
        "sound.webp": b"RIFF\x0a\x00\x00\x00WAVEfmt ",
        "lies.jpg": PNG,
        "text.png": b"<svg onload=1>",
        "none.jpg": b"",
    }
    contents |= {"large.png": PNG + b"x" * MOST_BYTES, "é 1.png": PNG}
    for name, content in contents.items():
        (images / name).write_bytes(content)
    (images / "folder.png").mkdir()

    def found(item_id, root=str(tmp_path)):
        return item_picture(item_id, {}, folder_data, root)

    assert found("png") == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert found("jpg").startswith("data:image/jpeg;base64,") and found("lies").startswith("data:image/png;base64,")
    assert found("jpeg").startswith("data:image/jpeg;") and found("webp").startswith("data:image/webp;")
    assert found("gif").startswith("data:image/gif;base64,")
    pictures = ("png", "jpg", "jpeg", "webp", "gif", "lies", "é 1")
    assert all(is_picture(found(item_id)) for item_id in pictures)
    odd = [
        "sound",
        "text",
        "none",
        "large",
        "folder",
        "absent",
        "../secret",
        "..",
        ".",
        "",
        "a/../png",
        "x\0y",
        "n" * 10_000,
        "/etc/x",
    ]
    assert [found(item_id) for item_id in odd] == [None] * len(odd)
    assert found("png", root="") is None


def test_pictures_of_the_planted_shop(config):
    shop = planted.generate(**config.data.planted)
    uri = item_picture("any", shop.items[0], Dataset("planted", None, {}, None, shop), "")
    assert is_picture(uri) and base64.b64decode(uri.partition(",")[2]).decode() == planted.icon(shop.items[0])


@pytest.mark.parametrize(
    "uri",
    [
        None,
        3,
        "",
        "https://x/y.png",
        "data:text/html;base64,AA==",
        'data:image/png;base64,AA"x',
        "DATA:image/png;base64,AA",
    ],
)
def test_other_addresses_are_no_pictures(uri):
    assert not is_picture(uri)


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kdsr_jax"), "propagate", True)
    with Workdir(tmp_path / "run", config) as folder:
        refresh_report(folder)
        first = (folder.path / "report.html").read_text()
        for error in (OSError(28, "No space left on device"), UserError("full"), KeyError("odd"), RecursionError()):

            def fail(*_, error=error):
                raise error

            monkeypatch.setattr(folder, "_replace", fail)
            refresh_report(folder)
            assert "report.html could not be written" in caplog.records[-1].getMessage()
        assert (folder.path / "report.html").read_text() == first
    assert not caplog.records[-1].exc_info
    assert len({record.getMessage() for record in caplog.records}) == 4  # other tests may have doubled the handler


def test_ctrl_c_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), optional("anything"):
        raise KeyboardInterrupt


def test_a_finished_run_has_its_report(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert page == render(collect(workdir)) and tuple(sections(page)) == SECTIONS
    assert str(workdir) not in page and str(workdir.parent) not in page
    said = sections(page)
    assert COLUMNS["test"] in said["result"] and COLUMNS["paper"] in said["result"] and "code " in said["examples"]
    assert "unfinished" not in page


def test_examples_agree_with_the_evaluation_and_the_teacher(finished, tiny):
    from kdsr_jax import train

    workdir, _ = finished
    run = train.prepare(tiny("eval.protocol=both"))
    data, examples = run.dataset.interactions, json.loads((workdir / "examples.json").read_text())
    with np.load(workdir / "ranks.npz") as ranks:
        rank_of = {(u, p): r for u, p, r in zip(ranks["user"], ranks["position"], ranks["rank"], strict=True)}
    condensed = np.asarray(run.teachers["image"].condensed, np.float64)
    covered = np.asarray(run.teachers["image"].has_feature)
    unit = condensed / np.maximum(np.linalg.norm(condensed, axis=1, keepdims=True), 1e-12)
    users = data.user_ids.tolist()
    assert len({example["user"] for example in examples["users"]}) == 12
    for example in examples["users"]:
        user = users.index(example["user"])
        history = data.items[data.offsets[user] : data.offsets[user + 1]][: example["length"]]
        assert example["history"] == history[-4:].tolist()  # max_length is 4
        assert example["target"] == data.items[data.offsets[user] + example["length"]]
        assert example["rank"] == rank_of[user, example["length"]]
        top = [recommendation["item"] for recommendation in example["recommendations"]]
        assert len(set(top)) == 10 and (example["target"] in top) == (example["rank"] <= 10)
        scores = [recommendation["score"] for recommendation in example["recommendations"]]
        assert scores == sorted(scores, reverse=True)
        for recommendation in example["recommendations"]:
            item, reasons = recommendation["item"], recommendation["because"]
            assert recommendation["taken"] == (item in example["history"])
            others = [h for h in example["history"] if h != item and covered[h]]
            if not (others and covered[item]):
                assert reasons == {}
                continue
            best = max(unit[item] @ unit[h] for h in others)
            assert reasons["image"]["score"] == pytest.approx(best, abs=1e-5)
            assert unit[item] @ unit[reasons["image"]["item"]] == pytest.approx(best, abs=1e-5)
            assert 0 <= reasons["image"]["code"] < 8 and str(reasons["image"]["item"]) in examples["items"]
    assert all(item["title"] == item["id"] and item["picture"] is None for item in examples["items"].values())


def test_titles_fall_back_to_raw_ids(tiny):
    from kdsr_jax import examples, train

    run = train.prepare(tiny())
    n = run.dataset.interactions.num_items
    odd = [{}, {"title": "  A \n title "}, {"title": ""}, {"title": 7}, {"title": None}, {"title": ["x"]}]
    items = [*odd, *[{} for _ in range(n + 1 - len(odd))]]
    run = train.dataclasses.replace(run, dataset=train.dataclasses.replace(run.dataset, items=items))
    example = {"target": 1, "history": [2, 3], "recommendations": [{"item": 4, "because": {"image": {"item": 5}}}]}
    ids = run.dataset.interactions.item_ids
    titles = [item["title"] for item in examples._describe_items(run, [example]).values()]
    assert titles == ["A title", *ids[2:6].tolist()]


def numbers_apart(text):
    """Return JSON text as (content in which fractions are 0, those fractions)."""
    numbers = []
    return json.loads(text, parse_float=lambda number: numbers.append(float(number)) or 0), numbers


@pytest.mark.slow
def test_examples_that_could_not_be_written_come_with_the_next_start(finished, tiny, tmp_path, monkeypatch):
    from kdsr_jax import train

    workdir, config = shutil.copytree(finished[0], tmp_path / "copy"), tiny("eval.protocol=both")
    wanted = numbers_apart((workdir / "examples.json").read_text())
    (workdir / "examples.json").unlink()
    assert train.train_and_evaluate(config, workdir) == finished[1]
    found = numbers_apart((workdir / "examples.json").read_text())
    assert found[0] == wanted[0] and found[1] == pytest.approx(wanted[1], rel=1e-3, abs=1e-5)  # other compilation
    assert "They are written when" not in (workdir / "report.html").read_text()
    monkeypatch.setattr(train, "prepare", lambda *_, **__: pytest.fail("it was prepared without need"))
    train.train_and_evaluate(config, workdir)


@pytest.mark.slow
def test_a_full_disk_for_the_report_changes_nothing(finished, tiny, tmp_path, monkeypatch, caplog):
    from kdsr_jax import train

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Workdir, "write_text", full)
    monkeypatch.setattr(train, "make_examples", full)
    monkeypatch.setattr(logging.getLogger("kdsr_jax"), "propagate", True)
    workdir, expected = finished
    result = train.train_and_evaluate(tiny("eval.protocol=both"), tmp_path / "run")
    same = {name: value for name, value in expected.items() if "seconds" not in name}
    assert {name: value for name, value in result.items() if "seconds" not in name} == same
    epochs = len([line for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"losses"' in line])
    records = {id(record): record for record in caplog.records}  # other tests may have doubled the handler
    warnings = [record.getMessage() for record in records.values()]
    assert len([text for text in warnings if text.startswith("report.html could not be written")]) == epochs + 1
    assert len([text for text in warnings if text.startswith("examples.json could not be written")]) == 1
