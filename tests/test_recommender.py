"""A finished run as a recommender, from Python and from the command line."""

import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdsr_jax
from kdsr_jax import fitting, recommend, teacher, train
from kdsr_jax.data import load_dataset
from kdsr_jax.errors import UserError
from kdsr_jax.explorer.answers import Answers
from kdsr_jax.recommender import Recommender
from kdsr_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def recommender(finished):
    return Recommender.from_workdir(finished[0])


@pytest.fixture(scope="module")
def reference(finished, tiny):
    """Return a function raw ids -> scores [N] by the model as training leaves it."""
    config = tiny("eval.protocol=both")
    with Workdir(finished[0], config, create=False) as folder:
        runner = train.reopen(config, folder)
        state = runner.load_best()
    item_ids = runner.run.dataset.interactions.item_ids.tolist()

    def score(ids):
        history = np.array([[item_ids.index(raw) for raw in ids]])[:, -config.data.max_length :]
        return np.asarray(runner.run.student.apply({"params": state.params, "frozen": state.frozen}, history)[0, -1])

    return score


HISTORIES = [["i03"], ["i01", "i02", "i05"], ["i00", "i09", "i08", "i07", "i33", "i02", "i09"]]


def test_lists_are_the_models_best_without_the_history(recommender, reference):
    lists = recommender.recommend_all(HISTORIES, k=7)
    for history, found in zip(HISTORIES, lists, strict=True):
        scores = reference(history).copy()
        scores[[int(raw[1:]) for raw in history]] = -np.inf  # i00 is item 1, and so forth
        best = np.argsort(-scores)[:7]
        assert [item for item, _ in found] == [f"i{n:02}" for n in best]
        np.testing.assert_allclose([score for _, score in found], scores[best], rtol=1e-5)


def test_one_history_is_a_batch_of_one_and_order_and_company_make_no_difference(recommender):
    together = recommender.recommend_all(HISTORIES * 3, k=5)
    for history, found in zip(HISTORIES * 3, together, strict=True):
        alone = recommender.recommend(history, k=5)
        assert [item for item, _ in alone] == [item for item, _ in found]
        np.testing.assert_allclose([s for _, s in alone], [s for _, s in found], rtol=1e-5)
    assert recommender.recommend_all([]) == []


def test_only_the_newest_of_a_history_are_read_but_all_are_left_out(recommender):
    long, newest = HISTORIES[2], HISTORIES[2][-4:]
    seen = [item for item, _ in recommender.recommend(newest, k=36, exclude_seen=False)]
    assert [item for item, _ in recommender.recommend(long, k=36)] == [item for item in seen if item not in long]
    assert len(seen) == 36


@pytest.mark.parametrize("wanted", [["i04", "i05", "absent"], lambda raw: raw in ("i04", "i05")])
def test_a_filter_says_what_may_be_recommended(recommender, wanted):
    assert {item for item, _ in recommender.recommend(["i01"], filter=wanted)} == {"i04", "i05"}
    assert [item for item, _ in recommender.recommend(["i05"], filter=wanted)] == ["i04"]


def test_numbers_are_taken_by_their_digits_and_unknown_ids_by_choice(recommender, caplog):
    known = recommender.recommend(["i01", "i02"], k=3)
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        assert recommender.recommend(["i01", 7, "i02"], k=3) == known
    assert "1 unknown item ids are left out of the histories: '7'" in caplog.text
    caplog.clear()
    assert recommender.recommend(["i01", "x", "i02"], k=3, unknown="ignore") == known and not caplog.text
    with pytest.raises(UserError, match="history 1: there is no item 'x'"):
        recommender.recommend(["i01", "x"], unknown="error")


@pytest.mark.parametrize(
    ("history", "options", "line"),
    [
        ([], {}, "history 1: is empty"),
        (["x"], {}, "history 1: no known item; there is no 'x'"),
        ("i01", {}, "a history is a list of item ids"),
        (["i01"], {"k": 0}, "k=0: must be from 1 to 36"),
        (["i01"], {"k": 37}, "k=37: must be from 1 to 36"),
        (["i01"], {"unknown": "drop"}, "unknown='drop': must be one of warn, error, ignore"),
    ],
)
def test_bad_input_is_one_line(recommender, history, options, line):
    with pytest.raises(UserError, match=line):
        recommender.recommend(history, **options)


def test_similar_items_are_the_teachers(recommender):
    found = recommender.similar("i05", k=50, modality="image")
    vectors = np.asarray(recommender.teachers["image"].condensed)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit[1:] @ unit[6]
    order = [n for n in np.argsort(-cosines, kind="stable") if n not in (5, 35)]  # itself; i35 has no feature
    assert [item for item, _ in found] == [f"i{n:02}" for n in order]
    np.testing.assert_allclose([score for _, score in found], cosines[order], atol=1e-5)
    assert recommender.similar("i05", k=3) == found[:3]
    for item, modality, line in (("i35", "image", "has no image feature"), ("i05", "sound", "must be one of image")):
        with pytest.raises(UserError, match=line):
            recommender.similar(item, modality=modality)


def test_explanations_are_by_the_teacher_of_the_run(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path))
    monkeypatch.setattr(teacher, "fit_teacher", lambda *_: pytest.fail("a teacher is fitted"))
    assert Recommender.from_workdir(finished[0]).explain(["i00", "i09"], "i04").links


def test_an_explanation_has_rank_links_and_shares(recommender, reference):
    history = ["i00", "i09", "i35", "i07", "i33"]  # four are read, of which one has no feature
    scores = reference(history)
    found = recommender.explain(history, "i04")
    assert found.score == pytest.approx(scores[4], rel=1e-5) and found.rank == (scores >= scores[4]).sum()
    assert [(link.item, link.modality) for link in found.links] == [
        ("i09", "image"),
        ("i07", "image"),
        ("i33", "image"),
    ]
    vectors = np.asarray(recommender.teachers["image"].condensed)
    cosine = vectors[10] @ vectors[5] / np.linalg.norm(vectors[10]) / np.linalg.norm(vectors[5])
    assert found.links[0].teacher_score == pytest.approx(cosine, abs=1e-5)
    assert all(0 <= code < 8 for link in found.links for code in (link.teacher_code, link.student_code))
    assert all(-1 <= link.student_score <= 1 for link in found.links)
    assert len(found.shares) == 4
    assert all(set(share) == {"item", "image"} and sum(share.values()) == pytest.approx(1) for share in found.shares)
    assert recommender.explain(history, "i35").links == []


def test_a_run_of_ids_alone_recommends_and_has_no_links_of_the_student(tiny, tmp_path):
    # A width that nothing held against the features at hand, which are narrower and to be cut into parts.
    config = tiny("train.epochs=1", "eval.protocol=paper", "model.dim=50", variant=":sasrec")
    assert config.model.dim % config.teacher.num_splits
    train.train_and_evaluate(config, tmp_path / "ids")
    ids = Recommender.from_workdir(tmp_path / "ids")
    assert len(ids.recommend(["i01"], k=4)) == 4
    found = ids.explain(["i01"], "i02")
    assert found.shares == [] and found.links[0].student_score is None and found.links[0].teacher_code is None
    assert found.links[0].teacher_score == pytest.approx(dict(ids.similar("i02", k=36))["i01"], abs=1e-6)


def test_what_is_no_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="holds no run of kdsr_jax"):
        Recommender.from_workdir(tmp_path)
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="the run is not finished"):
        Recommender.from_workdir(tmp_path / "run")


def test_a_run_of_another_version_is_named(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    del saved["config"]["train"]["prefixes"]
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=rf"{run}: the run was trained by another version \(.*train\.prefixes: missing"):
        Recommender.from_workdir(run)


def test_a_text_is_no_filter(recommender):
    with pytest.raises(UserError, match="filter: is a collection of item ids or a function, not the text 'i02'"):
        recommender.recommend(["i01"], filter="i02")


def test_other_data_is_refused(finished, tmp_path):
    shop = tmp_path / "shop"
    (shop / "features").mkdir(parents=True)
    (shop / "interactions.csv").write_text("user_id,item_id\n" + "".join(f"u{n % 2},j{n}\n" for n in range(9)))
    np.savez(shop / "features" / "image-random.npz", item_id=["j1", "j2"], features=np.eye(2, dtype=np.float32))
    with pytest.raises(UserError, match="has other items than the run was trained with"):
        Recommender.from_workdir(finished[0], tmp_path).similar("i01")


@pytest.fixture
def moved(tiny, tmp_path):
    """Return the folder data of the tiny runs, copied to where it may be changed."""
    return pathlib.Path(shutil.copytree(tiny().data.root, tmp_path / "moved"))


def test_features_of_another_encoder_are_refused_where_they_are_read(finished, moved):
    file = moved / "shop" / "features" / "image-random.npz"
    assert Recommender.from_workdir(finished[0], moved).similar("i01")
    with np.load(file) as saved:
        np.savez(file, item_id=saved["item_id"], features=saved["features"] + 1)
    other = Recommender.from_workdir(finished[0], moved)
    assert other.recommend(["i01"]) and other.title("i01") == ""
    for asked in (lambda: other.similar("i01"), lambda: other.explain(["i01"], "i02")):
        with pytest.raises(UserError, match="the image features are not those that the run was trained with"):
            asked()


def test_a_run_of_ids_alone_needs_no_features(tiny, moved, tmp_path, recommend_line, command, repository):
    shutil.rmtree(moved / "shop" / "features")
    lines = [json.dumps({"item_id": f"i{n:02}", "title": f"thing {n}"}) for n in range(36)]
    (moved / "shop" / "items.jsonl").write_text("\n".join(lines))
    config = f"--config={repository / 'configs' / 'folder.py'}:sasrec"
    code, out, _ = command(config, f"--config.data.root={moved}", "--config.data.k_core=1", "--mode=stats")
    assert code == 0 and json.loads(out)["items"] == 36
    settings = f"data.root={moved}", "train.epochs=1", "eval.protocol=paper"
    train.train_and_evaluate(tiny(*settings, variant=":sasrec"), tmp_path / "ids")
    code, out, err = recommend_line(f"--workdir={tmp_path / 'ids'}", "--history=i01", "-k", "1")
    assert code == 0 and "warning" not in err and out.split()[-2] == "thing"
    assert recommend_line(f"--workdir={tmp_path / 'ids'}", "--users=u01", "-k", "1")[0] == 0
    ids = Recommender.from_workdir(tmp_path / "ids")
    assert ids.explain(["i01"], "i02").links == [] and Answers({"ids": ids}).about()["modalities"] == []


@pytest.fixture
def recommend_line(capsys):
    def execute(*words):
        code = recommend.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


def test_the_command_line_prints_what_python_says(finished, recommender, recommend_line):
    code, out, err = recommend_line(f"--workdir={finished[0]}", "--history=i01, i02,i05", "-k", "3")
    expected = recommender.recommend(["i01", "i02", "i05"], k=3)
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()] == [item for item, _ in expected]
    code, out, _ = recommend_line(f"--workdir={finished[0]}", "--users=u03,u05", "-k", "2")
    assert code == 0 and out.count("\n") == 6 and out.startswith("user u03, 11 items, the newest i")


def test_all_users_go_to_a_file_that_a_killed_command_goes_on_with(
    finished, recommender, recommend_line, tmp_path, monkeypatch
):
    words = f"--workdir={finished[0]}", "--users=all", f"--out={tmp_path / 'recs.parquet'}", "-k", "4"
    monkeypatch.setattr(recommend, "USERS", 20)
    calls, top_items = [], Recommender.top_items

    def fails_once(self, histories, *rest, **named):
        calls.append(len(histories))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return top_items(self, histories, *rest, **named)

    monkeypatch.setattr(Recommender, "top_items", fails_once)
    assert recommend_line(*words)[0] == 130 and not (tmp_path / "recs.parquet").exists()
    code, _, err = recommend_line(*words[:-1], "5")
    assert code == 2 and "holds parts of another command" in err and err.count("\n") == 1
    code, out, _ = recommend_line(*words)
    assert code == 0 and calls == [20, 20, 20, 8] and "28 users in" in out
    rows = pq.read_table(tmp_path / "recs.parquet").to_pylist()
    data = recommender.dataset.interactions
    assert [row["user_id"] for row in rows] == data.user_ids.tolist()
    history = data.item_ids[data.items[data.offsets[30] : data.offsets[31]]]
    assert rows[30]["item_ids"] == [item for item, _ in recommender.recommend(history, k=4)]
    assert [path.name for path in tmp_path.iterdir()] == ["recs.parquet"]


def test_parts_of_another_model_of_the_same_config_and_log_are_not_taken(
    finished, recommend_line, tmp_path, monkeypatch
):
    words = f"--workdir={finished[0]}", "--users=u01,u02", f"--out={tmp_path / 'recs.parquet'}", "-k", "4"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(recommend, "_join", interrupt)
    assert recommend_line(*words)[0] == 130
    monkeypatch.undo()
    load = Recommender.from_workdir.__func__

    def other(cls, *given, **named):
        found = load(cls, *given, **named)
        found.variables = jax.tree.map(lambda a: a + 1 if a.dtype == "float32" else a, found.variables)
        return found

    monkeypatch.setattr(Recommender, "from_workdir", classmethod(other))
    code, _, err = recommend_line(*words)
    assert code == 2 and "holds parts of another command" in err


def test_a_folder_to_write_to_is_refused_before_there_are_parts(finished, recommend_line, tmp_path):
    (tmp_path / "recs").mkdir()
    code, _, err = recommend_line(f"--workdir={finished[0]}", "--users=u01", f"--out={tmp_path / 'recs'}")
    assert code == 2 and "is a folder; name a file" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recs"]


def test_a_wrong_k_leaves_nothing_behind(finished, recommend_line, tmp_path):
    words = f"--workdir={finished[0]}", "--users=u01", f"--out={tmp_path / 'recs.parquet'}"
    code, _, err = recommend_line(*words, "-k", "99")
    assert code == 2 and err.startswith("error: k=99: must be from 1 to 36") and not any(tmp_path.iterdir())


def test_approximate_lists_say_how_many_of_the_exact_they_hold(
    finished, recommender, recommend_line, tmp_path, monkeypatch
):
    words = f"--workdir={finished[0]}", "--history=i01,i02,i05", "-k", "3"
    exact, (code, out, err) = recommend_line(*words), recommend_line(*words, "--approximate")
    # On CPUs approx_max_k compares all scores.
    assert (code, out) == (0, exact[1]) and err == "approximate lists hold 100.00% of the exact ones, of 1 histories\n"
    code, _, err = recommend_line(
        f"--workdir={finished[0]}", "--users=all", f"--out={tmp_path / 'a.parquet'}", "--approximate"
    )
    assert code == 0 and err.startswith("approximate lists hold 100.00% of the exact ones, of 48 histories\n")
    numbers, top_items = recommender.numbers(HISTORIES), Recommender.top_items

    def worse(self, histories, k, exclude_seen=True, allowed=None, approximate=False):
        items, scores = top_items(self, histories, k, exclude_seen, allowed, approximate)
        items[0, 0] = 0 if approximate else items[0, 0]
        return items, scores

    monkeypatch.setattr(Recommender, "top_items", worse)
    assert recommender.recall(numbers, 4) == pytest.approx(11 / 12)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give either --history or --users"),
        (["--history=i01", "--users=all"], "give either --history or --users"),
        (["--history=i01", "--out=x"], "--out: goes with --users"),
        (["--history="], "history 1: is empty"),
        (["--history=i01", "-k", "99"], "k=99: must be from 1 to 36"),
        (["--users=nobody"], "--users: there is no user 'nobody'"),
        (["--histroy=i01"], "unrecognized arguments"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(finished, recommend_line, words, line):
    code, out, err = recommend_line(f"--workdir={finished[0]}", *words)
    assert code == 2 and not out and err.startswith(f"error: {line}") and err.count("\n") == 1


def test_fit_trains_on_tables_in_memory_and_not_twice(tmp_path):
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(40), 8), rng.integers(0, 25, 320)
    log = pa.table({"user_id": users, "item_id": items, "timestamp": np.arange(320)})
    titles = pa.table({"item_id": np.arange(25), "title": [f"thing {n}" for n in range(25)]})
    features = {"image": (np.arange(25), rng.normal(size=(25, 16)).astype(np.float32))}
    settings = {"data.k_core": 1, "data.max_length": 4, "model.dim": 8, "model.num_layers": 1, "train.epochs": 1}
    settings |= {"teacher.num_codes": 4, "teacher.num_splits": 4, "teacher.num_pairs": 300}
    fitted = kdsr_jax.fit(log, titles, features, tmp_path, **settings)
    found = fitted.recommend([3, 4], k=5)
    assert len(found) == 5 and fitted.title(found[0].item) == f"thing {found[0].item}"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["distill"]["enabled"]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = kdsr_jax.fit(log, titles, features, tmp_path, **settings).recommend([3, 4], k=5)
    assert again == found and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other = log.set_column(1, "item_id", pa.array(rng.permutation(items)))
    for changed in ({"log": other}, {"items": None}):
        given = {"log": log, "items": titles} | changed
        with pytest.raises(UserError, match="holds a run on other data"):
            kdsr_jax.fit(**given, features=features, folder=tmp_path, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    kept = kdsr_jax.Recommender.from_workdir(tmp_path / "run")
    assert kept.title(found[0].item) == f"thing {found[0].item}"
    with pytest.raises(UserError, match="log: has no column 'user_id'"):
        kdsr_jax.fit(titles)
    with pytest.raises(UserError, match="log: must be a pyarrow table"):
        kdsr_jax.fit(7)
    with pytest.raises(UserError, match="ids must be strings or whole numbers"):
        kdsr_jax.fit(pa.table({"user_id": [1.5], "item_id": ["a"]}))


@pytest.mark.parametrize("library", ["pyarrow", "pandas", "polars"])
def test_tables_of_any_library_become_the_same_data(library, tmp_path, monkeypatch):
    frames = pytest.importorskip(library)
    make = {"pyarrow": pa.table}.get(library) or frames.DataFrame
    log = {"user": list("aaabbb"), "item_id": [2, 1, 2, 1, 1, 2], "timestamp": [5, 4, 6, 1, 2, 3]}
    items = {"item_id": [1, 2], "title": ["one", None], "tags": [["x"], []]}
    made = []
    monkeypatch.setattr(fitting, "train_and_evaluate", lambda config, workdir: made.append(config))
    monkeypatch.setattr(fitting.Recommender, "from_workdir", lambda workdir: None)
    settings = {"data.k_core": 1, "data.columns.user_id": "user"}
    fitting.fit(make(log), make(items), folder=tmp_path, **settings)
    data = load_dataset(made[0].data, ())
    assert data.interactions.user_ids.tolist() == ["a", "b"]
    assert data.interactions.item_ids[data.interactions.items].tolist() == list("122112")  # by time
    assert [item["title"] for item in data.items[1:]] == ["one", None] and data.items[1]["tags"] == ["x"]


def test_importing_the_package_loads_nothing():
    code = "import sys, kdsr_jax; assert 'jax' not in sys.modules and 'fit' in dir(kdsr_jax); kdsr_jax.Recommender"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Recomender'"):
        kdsr_jax.Recomender  # noqa: B018


def test_loading_leaves_the_folder_as_it_is(finished):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    Recommender.from_workdir(finished[0]).recommend(["i01"])
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before
    assert jax.tree.leaves(Recommender.from_workdir(finished[0]).variables)
