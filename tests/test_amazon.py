"""Amazon 2014: reviews, ratings and metadata in their published forms, made here."""

import csv
import gzip
import json
import logging
import re
import types

import numpy as np
import pytest

from kdsr_jax.catalogue import PUBLIC, names_of
from kdsr_jax.data import load_dataset
from kdsr_jax.data.interactions import statistics
from kdsr_jax.data.sources import amazon, download
from kdsr_jax.errors import UserError

ROWS = [
    ("A1", "B00A", 30),
    ("A2", "B00A", 10),
    ("A1", "B00B", 10),
    ("A2", "B00C", 10),
    ("A1", "B00C", 10),
    ("A2", "B00B", 40),
]
REVIEWS = "".join(
    json.dumps({"reviewerID": user, "asin": item, "reviewText": "ü\n", "overall": 5.0, "unixReviewTime": time}) + "\n"
    for user, item, time in ROWS
)
RATINGS = "".join(f"{user},{item},5.0,{time}\n" for user, item, time in ROWS)
# As published: Python literals, one product a line, ids of no interest among them.
METADATA = (
    "{'asin': 'B00A', 'description': \"It's \\d fine\", 'title': 'Soap &amp; Water \\xe9', 'price': 5.2, 'imUrl': 'http://x/a.jpg',"
    " 'related': {'also_bought': ['B00B']}, 'salesRank': {'Beauty': 3}, 'categories': [['Beauty', 'Skin']], 'brand': ''}\n"
    "{'asin': 'ZZZZ', 'title': broken and of no interest\n"
    '{"asin": "B00B", "title": "<script>", "categories": [["Beauty"]]}\n'
)
ITEMS = {
    "B00A": {
        "item_id": "B00A",
        "title": "Soap & Water é",
        "description": "It's \\d fine",
        "categories": [["Beauty", "Skin"]],
        "price": 5.2,
    },
    "B00B": {"item_id": "B00B", "title": "<script>", "categories": [["Beauty"]]},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def manual(tmp_path):
    """Return a function that writes files, compressed where their name says so, and returns their folder."""

    def write(files):
        folder = tmp_path / "manual"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            data = text if isinstance(text, bytes) else text.encode()
            (folder / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
        return folder

    return write


def load(manual_dir="", **changes):
    settings = {
        "name": "beauty",
        "source": "auto",
        "root": "",
        "k_core": 1,
        "user_fraction": 1.0,
        "modalities": (),
        "manual_dir": str(manual_dir),
    }
    return load_dataset(types.SimpleNamespace(**settings | changes))


FORMS = {
    "reviews": {"reviews_Beauty_5.json.gz": REVIEWS},
    "reviews-unpacked": {"reviews_Beauty_5.json": REVIEWS},
    "ratings": {"ratings_Beauty.csv": RATINGS},
    "ratings-packed": {"ratings_Beauty.csv.gz": RATINGS},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metadata", ["meta_Beauty.json.gz", "meta_Beauty.json"])
def test_each_form_gives_the_same_histories_and_items(manual, form, metadata):
    folder = manual(FORMS[form] | {metadata: METADATA})
    for _ in range(2):  # from the files, and from the cache
        dataset = load(folder)
        log = dataset.interactions
        assert log.user_ids.tolist() == ["A1", "A2"] and log.item_ids.tolist() == ["", "B00A", "B00B", "B00C"]
        assert log.items.tolist() == [2, 3, 1, 1, 3, 2], "in time order, and in that of the file within a second"
        assert log.timestamps.tolist() == [10, 10, 30, 10, 10, 40]
        assert dataset.items == [{}, ITEMS["B00A"], ITEMS["B00B"], {}]


def test_ids_beyond_ascii_are_one_id_in_every_file(manual):
    ids = {"A1": "Aé", "B00A": "Bü"}
    texts = [REVIEWS, RATINGS, METADATA]
    for old, new in ids.items():
        texts = [text.replace(old, new) for text in texts]
    for log in ("reviews_Beauty_5.json", "ratings_Beauty.csv"):
        folder = manual({log: texts[log.startswith("ratings")], "meta_Beauty.json": texts[2]})
        dataset = load(folder)
        assert dataset.interactions.user_ids.tolist() == ["A2", "Aé"]
        assert dataset.items[dataset.interactions.item_ids.tolist().index("Bü")]["title"] == "Soap & Water é"
        (folder / log).unlink()


def test_ratings_that_are_no_text_are_named(manual):
    with pytest.raises(UserError, match="ratings_Beauty.csv: line 2: not UTF-8"):
        load(manual({"ratings_Beauty.csv": b"A1,B00A,5.0,1\nA\xe9,B00A,5.0,1\n"}))


def test_reviews_go_before_ratings(manual):
    folder = manual(FORMS["reviews"] | {"ratings_Beauty.csv": "nonsense"})
    assert load(folder).interactions.num_users == 2


def test_ratings_are_filtered_to_the_core(manual):
    noise = "".join(f"N{n},B00A,1.0,5\n" for n in range(20))
    dataset = load(manual({"ratings_Beauty.csv": noise + RATINGS}), k_core=2)
    assert dataset.interactions.user_ids.tolist() == ["A1", "A2"]


def test_without_metadata_there_are_no_items(manual, caplog):
    folder = manual(FORMS["reviews"])
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        assert load(folder).items is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: meta_Beauty.json.gz is not there, so items have no titles"
    ]


@pytest.mark.parametrize("name", names_of("amazon"))
def test_every_category_has_its_files(manual, name):
    category = amazon.CATEGORIES[name]
    assert load(manual({f"reviews_{category}_5.json.gz": REVIEWS}), name=name).interactions.num_items == 3


def test_the_catalogue_knows_the_categories():
    assert names_of("amazon") == list(amazon.CATEGORIES)
    assert set(PUBLIC.values()) == {"movielens", "amazon"}


@pytest.mark.parametrize("name", ["ml-1m", "books", "Beauty"])
def test_other_names_are_no_categories(tmp_path, name):
    with pytest.raises(
        UserError, match="the source amazon has no such data set; it has beauty, clothing, sports, toys"
    ):
        load(tmp_path, name=name, source="amazon")


def test_a_changed_file_is_read_anew(manual):
    assert load(manual(FORMS["reviews"])).interactions.num_items == 3
    assert load(manual({"reviews_Beauty_5.json.gz": REVIEWS.replace("B00C", "B00B")})).interactions.num_items == 2


def test_both_files_are_downloaded_and_their_digests_recorded(manual, tmp_path, monkeypatch):
    folder = manual(FORMS["reviews"] | {"meta_Beauty.json.gz": METADATA})
    asked = []

    def receive(archive, file):
        asked.append(archive.url)
        data = (folder / archive.name).read_bytes()
        file.write(data)
        return len(data), download.hashlib.sha256(data).hexdigest()

    monkeypatch.setattr(download, "_receive", receive)
    for _ in range(2):
        assert load().items[1] == ITEMS["B00A"]
    names = ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"]
    assert asked == [amazon.ADDRESS + name for name in names]
    kept = {path.name for path in (tmp_path / "cache" / "downloads").iterdir() if not path.name.startswith(".")}
    assert kept == {*names, *(f"{name}.sha256" for name in names)}


def test_offline_says_which_file_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr(amazon, "ADDRESS", "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(
        UserError, match="fetch reviews_Beauty_5.json.gz by hand and give its folder with --config.data"
    ):
        load()
    with pytest.raises(UserError, match="neither reviews_Beauty_5.json.gz nor ratings_Beauty.csv is there"):
        load(tmp_path)


def review(**changes):
    return json.dumps({"reviewerID": "A1", "asin": "B00A", "unixReviewTime": 5} | changes) + "\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (REVIEWS + "{'asin': 'x'}\n", "reviews_Beauty_5.json.gz: line 7: not JSON"),
        (REVIEWS + "\n" + REVIEWS[:40], "line 8: not JSON"),
        (REVIEWS + "[" * 200_000 + "\n", "line 7: not JSON"),
        (REVIEWS.encode() + b'{"asin": "\xff"}\n', "line 7: not JSON"),
        (REVIEWS + "[]\n", "line 7: not a JSON object"),
        (REVIEWS + review(unixReviewTime="5"), "line 7: 'unixReviewTime' is missing or not a whole number"),
        (review(unixReviewTime=True), "line 1: 'unixReviewTime' is missing"),
        (review(unixReviewTime=2**63), "line 1: 'unixReviewTime' is missing"),
        (review(unixReviewTime=1.5), "line 1: 'unixReviewTime' is missing"),
        (review(reviewerID=7), "line 1: 'reviewerID' is missing or not a text"),
        (review(reviewerID=""), "line 1: 'reviewerID' is missing or not a text"),
        (review(asin=["B00A"]), "line 1: 'asin' is missing or not a text"),
        (review(asin="\ud800"), "line 1: 'asin' is missing or not a text"),
        (review(asin="a\0"), "line 1: 'asin' is missing or not a text"),
        (review(asin="x" * 101), "line 1: 'asin' is missing or not a text of at most 100 characters"),
        (REVIEWS + "x" * (2**20 + 1), "line 7: longer than 1,048,576 bytes"),
        ("", "the log is empty"),
    ],
)
def test_bad_reviews_are_named_by_line(manual, data, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(manual({"reviews_Beauty_5.json.gz": data}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "line",
    [
        "A1,B00A,5.0",
        "A1,B00A,5.0,x",
        "A1,,5.0,1",
        "A1,B00A,5.0,-1",
        "A1,a\0b,5,1",
        "x" * 101 + ",B,5,1",
        "user,item,rating,timestamp",
    ],
)
def test_bad_ratings_are_named_by_line(manual, line):
    with pytest.raises(UserError, match="ratings_Beauty.csv: line 7: not user,item,rating,seconds"):
        load(manual({"ratings_Beauty.csv": RATINGS + line + "\n"}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{'asin': 'B00A', 'title': __import__('os').system('touch pwned')}",
            "neither JSON nor a Python literal (ValueError)",
        ),
        ("{'asin': 'B00A', 'title': [x for x in (1,)]}", "neither JSON nor a Python literal (ValueError)"),
        ("{'asin': 'B00A', 'title': 'cut sho", "neither JSON nor a Python literal (SyntaxError)"),
        ('{"asin": "B00A", "title": "cut sho', "neither JSON nor a Python literal (JSONDecodeError)"),
        ("{'asin': 'B00A', 'price': " + "-" * 100_000 + "1}", "neither JSON nor a Python literal (MemoryError)"),
        ("{'asin': 'B00A', 'price': " + "1+" * 50_000 + "1}", "neither JSON nor a Python literal (RecursionError)"),
        ("{'asin': 'B00A', 'title': " + "[" * 500 + "]" * 500 + "}", "neither JSON nor a Python literal (SyntaxError)"),
        ("{'asin': 'B00A', 'title': b'bytes'}", "holds values that JSON has no words for"),
        ("{'asin': 'B00A', 'categories': {1, 2}}", "holds values that JSON has no words for"),
        ("{'asin': 'B00A', 'price': 1j}", "holds values that JSON has no words for"),
        ("{['B00A']: 1}", "neither JSON nor a Python literal (TypeError)"),
        ("['asin', 'B00A']", "not an object"),
        ("{'title': 'no id'}", "'asin' is missing or not a text"),
        ("{'title': 'x', 'asin': ['B00A']}", "'asin' is missing or not a text"),
    ],
)
def test_bad_metadata_is_named_by_line_and_runs_nothing(manual, line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = manual(FORMS["reviews"] | {"meta_Beauty.json.gz": METADATA + line + "\n"})
    with pytest.raises(UserError, match=re.escape(f"meta_Beauty.json.gz: line 4: {message}")) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"])
@pytest.mark.parametrize("kept", [12, -9])
def test_truncated_files(manual, name, kept):
    folder = manual(FORMS["reviews"] | {"meta_Beauty.json.gz": METADATA})
    (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{name}: broken gzip file after line [0-9]+"):
        load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["reviews_Beauty_5.json.gz", "ratings_Beauty.csv"])
def test_the_real_log_in_the_published_form_is_the_folder(manual, data_root, form):
    """Every count of Table 1; of the ratings, after a filter of our own has had work to do. The seconds are made up."""
    if not (data_root / "beauty").is_dir():
        pytest.skip("no beauty")
    with gzip.open(data_root / "beauty" / "interactions.csv.gz", "rt") as file:
        rows = [(user, item, second) for second, (user, item) in enumerate(list(csv.reader(file))[1:])]
    if form.startswith("reviews"):
        rows.sort(key=lambda row: row[1])  # as published: product by product
        text = "".join(f'{{"reviewerID": "{u}", "asin": "{i}", "unixReviewTime": {t}}}\n' for u, i, t in rows)
    else:
        rows += [(f"X{n}", rows[n][1], n) for n in range(50_000)] + [
            (rows[n][0], f"Y{n // 4}", n) for n in range(50_000)
        ]
        text = "".join(f"{u},{i},5.0,{t}\n" for u, i, t in rows)
    log = load(manual({form: text}), k_core=5).interactions
    facts = statistics(log, {})
    assert (facts["users"], facts["items"], facts["interactions"]) == (22_363, 12_101, 198_502)
    assert (facts["train_instances"], facts["test_instances"]) == (142_197, 33_942)
    expected = load(root=str(data_root), k_core=5).interactions
    for name in ("items", "offsets", "user_ids", "item_ids"):
        assert np.array_equal(getattr(log, name), getattr(expected, name))
