"""Features files: aligned with the items, and loud about whatever breaks the format."""

import hashlib
import json
import logging
import pickle
import re

import numpy as np
import pytest

from kdsr_jax.data.features import align_features, load_features
from kdsr_jax.errors import UserError

ITEM_IDS = np.array(["", "007", "a", "b"])
EYE = np.eye(2, dtype=np.float16)


def test_rows_go_to_their_items(tmp_path, caplog):
    path = tmp_path / "text-x.npz"
    np.savez(path, item_id=["unknown-item", "b", "7", "007"], features=np.arange(8, dtype=np.float16).reshape(4, 2))
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        features = load_features(path, ITEM_IDS)
    assert features.values.dtype == np.float32
    assert features.values.tolist() == [[0, 0], [6, 7], [0, 0], [2, 3]]
    assert features.has_feature.tolist() == [False, True, False, True]
    assert "1 of 3 items have no features" in caplog.text
    assert "ignored the features of 2 items outside the log" in caplog.text


def test_complete_features_are_silent(caplog):
    with caplog.at_level(logging.INFO, "kdsr_jax"):
        features = align_features(np.array(["b", "a", "007"]), np.ones((3, 1), np.float32), ITEM_IDS, "here")
    assert features.has_feature.tolist() == [False, True, True, True] and not caplog.records


def test_whole_number_ids_and_double_precision_are_taken():
    features = align_features(np.array([10, 9]), np.array([[1.5], [2.5]]), np.array(["", "10", "9"]), "here")
    assert features.values.tolist() == [[0], [1.5], [2.5]]


def test_padding_has_no_feature_even_if_the_file_has_an_empty_id():
    features = align_features(np.array(["", "a"]), EYE, ITEM_IDS, "here")
    assert features.values[0].tolist() == [0, 0] and not features.has_feature[0]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["a", "b"], [[1.0, 2.0], [np.nan, 0.0]], "the features of item 'b' (row 2) hold NaN or Inf"),
        (["b", "a"], [[-np.inf, 0.0], [np.nan, 0.0]], "the features of item 'b' (row 1) hold NaN or Inf"),
        (["b", "a", "b"], np.ones((3, 2)), "item 'b' has more than one row"),
        (["a", "b"], np.ones((3, 2)), "'item_id' has 2 rows and 'features' 3; they must agree"),
        (["a", "b"], np.ones(2), "'features' must be [n, d] floating point, it is [2] float64"),
        (["a", "b"], np.ones((2, 2, 2)), "'features' must be [n, d] floating point, it is [2, 2, 2] float64"),
        (["a", "b"], np.ones((2, 0)), "'features' must be [n, d] floating point, it is [2, 0]"),
        (["a", "b"], np.ones((2, 2), np.int64), "'features' must be [n, d] floating point, it is [2, 2] int64"),
        ([["a"], ["b"]], np.ones((2, 2)), "'item_id' must be [n] unicode, it is [2, 1]"),
        ([b"a", b"b"], np.ones((2, 2)), "'item_id' must be [n] unicode, it is [2] |S1"),
        (np.array([], str), np.ones((0, 2)), "it has no rows"),
        (["x", "y"], np.ones((2, 2)), "it has features for none of the 3 items of the log"),
    ],
)
def test_bad_arrays(tmp_path, ids, values, message):
    path = tmp_path / "text-x.npz"
    np.savez(path, item_id=np.array(ids), features=np.array(values))
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        load_features(path, ITEM_IDS)


def test_a_recipe_is_that_of_the_file_beside_it(tmp_path):
    path, sidecar = tmp_path / "text-x.npz", tmp_path / "text-x.json"
    np.savez(path, item_id=["a", "b"], features=EYE)
    assert load_features(path, ITEM_IDS).recipe is None
    content = {"encoder": {"model": "m"}, "text": {"fields": ["title"]}, "seconds": 1.0}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar.write_text(json.dumps(content | {"sha256": digest}))
    assert load_features(path, ITEM_IDS).recipe == {"encoder": {"model": "m"}, "text": {"fields": ["title"]}}
    for other in (json.dumps(content | {"sha256": "0" * 64}), "[]", "{"):
        sidecar.write_text(other)
        assert load_features(path, ITEM_IDS).recipe is None


def test_a_missing_file_names_what_there_is(tmp_path):
    for name in ("text-b", "image-a"):
        np.savez(tmp_path / f"{name}.npz", item_id=["a"], features=np.ones((1, 2)))
    with pytest.raises(UserError, match="text-c.npz: no such features file; .*: image-a, text-b$"):
        load_features(tmp_path / "text-c.npz", ITEM_IDS)
    with pytest.raises(UserError, match="no such features file; available in that folder: none"):
        load_features(tmp_path / "absent" / "text-c.npz", ITEM_IDS)


@pytest.mark.parametrize("missing", ["item_id", "features"])
def test_a_missing_array_names_what_there_is(tmp_path, missing):
    arrays = {"item_id": np.array(["a"]), "features": np.ones((1, 2)), "other": np.ones(1)}
    del arrays[missing]
    np.savez(tmp_path / "text-x.npz", **arrays)
    with pytest.raises(UserError, match=f"array '{missing}' is missing; the file has: .*other"):
        load_features(tmp_path / "text-x.npz", ITEM_IDS)


def test_pickled_arrays_are_never_read(tmp_path):
    np.savez(tmp_path / "text-x.npz", item_id=np.array(["a", "b"], object), features=EYE)
    with pytest.raises(UserError, match=r"text-x.npz: it holds pickled \(object\) arrays"):
        load_features(tmp_path / "text-x.npz", ITEM_IDS)


def test_files_that_are_no_archive(tmp_path):
    path = tmp_path / "text-x.npz"
    np.savez(path, item_id=["a", "b"], features=EYE)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b"NUMPY") + 130] ^= 255
    for data in (b"", b"text", pickle.dumps([1]), whole[:-40], bytes(damaged)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="text-x.npz: not a readable .npz file"):
            load_features(path, ITEM_IDS)


def test_a_single_array_is_no_features_file(tmp_path):
    with open(tmp_path / "text-x.npz", "wb") as file:
        np.save(file, EYE)
    with pytest.raises(UserError, match="text-x.npz: not a readable .npz file"):
        load_features(tmp_path / "text-x.npz", ITEM_IDS)
