"""MovieLens-1M: an archive of the official form, made here, and everything that can be wrong with one."""

import csv
import gzip
import hashlib
import json
import re
import types
import zipfile

import numpy as np
import pytest

from kdsr_jax.data import load_dataset
from kdsr_jax.data.interactions import statistics
from kdsr_jax.data.sources import download, movielens
from kdsr_jax.errors import UserError

MOVIES = (
    "1::Toy Story (1995)::Animation|Children's|Comedy\n"
    "2::Misérables, Les (1998)::Drama\n"
    "10::GoldenEye (1995)::Action\n"
    "40::Cry, the Beloved: Country::Drama\n"
    "999::Seen by Nobody (2000)::Horror|[/]\n"
)
# user 2 first in the file; user 1 rates 10 and 2 in the same second, and that order holds
RATINGS = "2::1::5::978300760\n1::10::3::978302109\n1::2::3::978302109\n1::1::4::978301968\n2::40::2::978300761\n2::2::1::978300000\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def manual(tmp_path, monkeypatch):
    """Return a function that writes ml-1m.zip, by default registers its digest, and returns its folder."""

    def write(register=True, **entries):
        entries = {"ratings.dat": RATINGS, "movies.dat": MOVIES} | {k.replace("_", "."): v for k, v in entries.items()}
        path = tmp_path / "manual" / "ml-1m.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ml-1m/", "")
            for name, text in entries.items():
                if text is not None:
                    archive.writestr(f"ml-1m/{name}", text if isinstance(text, bytes) else text.encode("latin-1"))
        if register:
            registers(monkeypatch, path)
        return path.parent

    return write


def registers(monkeypatch, path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(movielens, "ARCHIVE", movielens.ARCHIVE._replace(sha256=digest, size=path.stat().st_size))


def load(manual_dir="", **changes):
    settings = {
        "name": "ml-1m",
        "source": "auto",
        "root": "",
        "k_core": 1,
        "user_fraction": 1.0,
        "modalities": (),
        "manual_dir": str(manual_dir),
    }
    return load_dataset(types.SimpleNamespace(**settings | changes))


def test_ratings_become_histories_and_movies_items(manual):
    folder = manual()
    for _ in range(2):  # from the archive, and from the cache
        dataset = load(folder)
        log = dataset.interactions
        assert log.user_ids.tolist() == ["1", "2"] and log.item_ids.tolist() == ["", "1", "10", "2", "40"]
        assert log.items.tolist() == [1, 2, 3, 3, 1, 4] and log.offsets.tolist() == [0, 3, 6]
        assert log.timestamps.tolist() == [978301968, 978302109, 978302109, 978300000, 978300760, 978300761]
        assert dataset.items[0] == {}
        assert dataset.items[1:3] == [
            {
                "item_id": "1",
                "title": "Toy Story (1995)",
                "genres": ["Animation", "Children's", "Comedy"],
                "year": 1995,
            },
            {"item_id": "10", "title": "GoldenEye (1995)", "genres": ["Action"], "year": 1995},
        ]
        assert dataset.items[3]["title"] == "Misérables, Les (1998)"
        assert dataset.items[4] == {"item_id": "40", "title": "Cry, the Beloved: Country", "genres": ["Drama"]}
    assert sorted(path.name for path in folder.iterdir()) == ["ml-1m.zip"]


def test_the_digest_is_that_of_tfds(repository):
    import tensorflow_datasets

    table = (tensorflow_datasets.core.tfds_path() / "url_checksums" / "movielens.txt").read_text()
    url, size, digest = movielens.ARCHIVE
    assert [url, str(size), digest, "ml-1m.zip"] in [line.split("\t") for line in table.splitlines()]


def test_another_archive_is_refused(manual):
    with pytest.raises(UserError, match="damaged or not the original: its sha256 is .* which is registered for it"):
        load(manual(register=False))


def test_a_download_is_what_a_file_put_there_by_hand_is(manual, tmp_path, monkeypatch):
    path = manual() / "ml-1m.zip"
    monkeypatch.setattr(
        download, "_receive", lambda archive, file: (file.write(path.read_bytes()), movielens.ARCHIVE.sha256)
    )
    assert np.array_equal(load().interactions.items, load(path.parent).interactions.items)
    assert (tmp_path / "cache" / "downloads" / "ml-1m.zip").read_bytes() == path.read_bytes()


def test_offline_says_which_file_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setattr(movielens, "ARCHIVE", movielens.ARCHIVE._replace(url="http://127.0.0.1:1/ml-1m.zip"))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(
        UserError, match="fetch ml-1m.zip by hand and give its folder with --config.data.manual_dir=FOLDER"
    ):
        load()
    with pytest.raises(UserError, match=f"--config.data.manual_dir={tmp_path}: ml-1m.zip is missing; it is at http"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"ratings_dat": None},
            "ml-1m/ratings.dat is missing or occurs twice; the archive has: ml-1m/, ml-1m/movies.dat",
        ),
        ({"movies_dat": None}, "ml-1m/movies.dat is missing"),
        ({"ratings_dat": RATINGS + "3::4::5\n"}, "ml-1m/ratings.dat: line 7: not four whole numbers"),
        ({"ratings_dat": "\n" + RATINGS + "3::x::5::6\n"}, "ml-1m/ratings.dat: line 8: not four whole numbers"),
        ({"ratings_dat": RATINGS + "3::4::5::-6\n"}, "ml-1m/ratings.dat: line 7: not"),
        ({"ratings_dat": RATINGS + "3::4::5::²\n"}, "ml-1m/ratings.dat: line 7: not"),
        ({"ratings_dat": RATINGS + "3::4::5::" + "9" * 30}, "ml-1m/ratings.dat: line 7: not"),
        ({"ratings_dat": ""}, "the log is empty"),
        ({"movies_dat": MOVIES + "12::No genres\n"}, "ml-1m/movies.dat: line 6: not movie::title::genres"),
        ({"../../evil": "x"}, "the entry 'ml-1m/../../evil' points outside of the archive"),
    ],
)
def test_bad_archives(manual, entries, message, tmp_path):
    folder = manual(**entries)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kept", [0, 10, 300, -10])
def test_a_truncated_archive(manual, monkeypatch, kept):
    path = manual() / "ml-1m.zip"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="damaged or not the original"):
        load(path.parent)
    registers(monkeypatch, path)  # so that nothing but the archive itself can tell
    with pytest.raises(UserError, match="ml-1m.zip: not a readable zip file, cut short or damaged"):
        load(path.parent)


def test_features_come_from_the_root(manual, tmp_path):
    folder = manual()
    with pytest.raises(
        UserError, match="--config.data.root is missing; the public data set 'ml-1m' comes without features"
    ):
        load(folder, modalities=("text-x",))
    place = tmp_path / "root" / "ml-1m" / "features"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="text-x.npz: no such features file; the public data set"):
        load(folder, modalities=("text-x",), root=str(tmp_path / "root"))
    np.savez(place / "text-x.npz", item_id=["10", "1", "2", "40"], features=np.eye(4, dtype=np.float32))
    features = load(folder, modalities=("text-x",), root=str(tmp_path / "root")).features["text"]
    assert features.values.tolist() == [[0] * 4, [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_folder_of_ones_own_goes_first_unless_movielens_is_named(manual, tmp_path):
    place = tmp_path / "root" / "ml-1m"
    place.mkdir(parents=True)
    (place / "interactions.csv").write_text("user_id,item_id\n" + "u,a\nu,b\nu,c\n")
    folder = manual()
    assert load(folder, root=str(tmp_path / "root")).interactions.user_ids.tolist() == ["u"]
    assert load(folder, root=str(tmp_path / "root"), source="movielens").interactions.user_ids.tolist() == ["1", "2"]


@pytest.mark.slow
def test_the_real_ratings_in_the_official_form_are_the_folder(manual, data_root):
    """Every count of Table 1, and the histories of the folder; only the seconds are made up."""
    if not (data_root / "ml-1m").is_dir():
        pytest.skip("no ml-1m")
    with gzip.open(data_root / "ml-1m" / "interactions.csv.gz", "rt") as file:
        rows = list(csv.reader(file))[1:]
    ratings = "".join(f"{user}::{item}::5::{second}\n" for second, (user, item) in enumerate(rows))
    with gzip.open(data_root / "ml-1m" / "items.jsonl.gz", "rt") as file:
        movies = {str(item["item_id"]): item for item in map(json.loads, file)}
    lines = "".join(f"{key}::{m['title']}::{'|'.join(m['genres'])}\n" for key, m in movies.items())
    dataset = load(manual(ratings_dat=ratings, movies_dat=lines), k_core=5)
    facts = statistics(dataset.interactions, {})
    assert (facts["users"], facts["items"], facts["interactions"]) == (6_040, 3_416, 999_611)
    assert (facts["train_instances"], facts["test_instances"]) == (796_045, 197_526)
    expected = load(root=str(data_root), k_core=5).interactions
    for name in ("items", "offsets", "user_ids", "item_ids"):
        assert np.array_equal(getattr(dataset.interactions, name), getattr(expected, name))
    for item in dataset.items[1:]:
        assert {name: movies[item["item_id"]][name] for name in ("title", "genres", "year")} == {
            name: item[name] for name in ("title", "genres", "year")
        }
