"""Models of the hub, as tiny ones of the same families have them: pooling, layers, padding, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra encoders is not installed")
pytest.importorskip("sentence_transformers", reason="the extra encoders is not installed")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's packages are imported

from kdsr_jax import cli, encode, encoders
from kdsr_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and transformers among themselves
TEXTS = ["a red film about dogs", "love", "a film about cats , dogs , love . a red film about blue cats", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one tiny model of each family, see hub_models.py."""
    import warnings

    from hub_models import write_models

    folder = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        write_models(folder)
    return folder


@pytest.fixture
def opened(folder, repository):
    """Return a function (entry, **settings of the encode group) -> encoder."""

    def open_entry(entry, **settings):
        config = cli.load_config(str(repository / "configs" / "folder.py"))
        for name, value in {"models_folder": str(folder), **settings}.items():
            config.encode[name] = value
        return encoders.open_encoder(entry, config.encode)

    return open_entry


@pytest.fixture(scope="module")
def pictures():
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes = (40, 60), (64, 32), (33, 33)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("name", ["bert", "t5", "t5-encoder", "bart", "llama", "clip", "sentences"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_a_texts_vector_does_not_depend_on_its_batch(opened, name, layer):
    encoder = opened(f"text-tests__{name}", layer=layer)
    together, alone = encoder(TEXTS), np.concatenate([encoder([text]) for text in TEXTS])
    assert together.dtype == np.float32 and together.shape == (4, encoder.description["dim"])
    np.testing.assert_allclose(together, alone, atol=2e-5 * np.abs(alone).max())
    assert np.abs(together[0] - together[1]).max() > 0.01 * np.abs(together).max()


@pytest.mark.parametrize("name", ["resnet", "swin", "vit", "vit-classifier", "clip"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_a_pictures_vector_does_not_depend_on_its_batch(opened, pictures, name, layer):
    encoder = opened(f"image-tests__{name}", layer=layer)
    together, alone = encoder(pictures), np.concatenate([encoder([picture]) for picture in pictures])
    assert together.dtype == np.float32 and together.shape == (3, encoder.description["dim"])
    np.testing.assert_allclose(together, alone, atol=2e-5 * np.abs(alone).max())
    assert np.abs(together[0] - together[1]).max() > 0.001 * np.abs(together).max()


def test_texts_are_the_mean_over_their_tokens_of_the_encoder_alone(opened, folder):
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "tests__t5")
    words = transformers.AutoTokenizer.from_pretrained(folder / "tests__t5")
    for layer in (-1, 0, 2):
        found = opened("text-tests__t5", layer=layer)(TEXTS)
        for row, text in zip(found, TEXTS, strict=True):
            tokens = torch.tensor([words(text)["input_ids"]])
            with torch.inference_mode():
                states = model.encoder(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
            np.testing.assert_allclose(row, states[0].mean(0), atol=1e-5)


def test_a_sentence_model_pools_as_it_says_and_its_layers_are_pooled_by_the_mean(opened):
    whole, bare = opened("text-tests__sentences"), opened("text-tests__bert")
    mean = bare(TEXTS)
    np.testing.assert_allclose(whole(TEXTS), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(opened("text-tests__sentences", layer=3)(TEXTS), mean, atol=1e-5)


def test_the_image_tower_alone_reads_pictures(opened, folder, pictures):
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder / "tests__clip")
    reader = transformers.AutoImageProcessor.from_pretrained(folder / "tests__clip")
    with torch.inference_mode():
        output = model.vision_model(**reader(images=pictures, return_tensors="pt"))
    np.testing.assert_allclose(opened("image-tests__clip")(pictures), output.pooler_output, atol=1e-5)


def test_convolutions_are_averaged_over_places(opened, folder, pictures):
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder / "tests__resnet")
    reader = transformers.AutoImageProcessor.from_pretrained(folder / "tests__resnet")
    with torch.inference_mode():
        states = model(**reader(images=pictures[:1], return_tensors="pt"), output_hidden_states=True).hidden_states
    for layer in (-1, 0, 1):
        found = opened("image-tests__resnet", layer=layer)(pictures[:1])
        np.testing.assert_allclose(found, states[layer].mean((2, 3)), atol=1e-5)


def test_a_pooler_that_was_never_trained_is_not_used(opened, pictures):
    first, again = opened("image-tests__vit-classifier"), opened("image-tests__vit-classifier")
    assert first.description["pooling"] == "spatial mean"
    np.testing.assert_array_equal(first(pictures), again(pictures))
    assert opened("image-tests__vit").description["pooling"] == "the model's own"


def test_weights_that_are_missing_are_not_made_up(opened, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "tests__bert", tmp_path / "tests__bert")
    file = tmp_path / "tests__bert" / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of them, such as encoder\.layer\.1\.output\.dense\.weight"):
        opened("text-tests__bert", models_folder=str(tmp_path))


def test_code_that_comes_with_a_model_runs_only_when_asked(opened, folder, tmp_path):
    place, mark = tmp_path / "tests__own", tmp_path / "ran"
    shutil.copytree(folder / "tests__bert", place)
    said = json.loads((place / "config.json").read_text())
    said |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel"}}
    (place / "config.json").write_text(json.dumps(said))
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import BertConfig as Own, BertModel as OwnModel\n"
    (place / "own.py").write_text(code)
    with pytest.raises(UserError, match=r"code of its own; if you trust it, --config\.encode\.trust_remote_code=true"):
        opened("text-tests__own", models_folder=str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("text-tests__resnet", "cannot be read as a model of texts"),
        ("image-tests__bert", "cannot be read as a model of pictures"),
        ("text-nobody__nothing", "nobody/nothing: no model can be had by this name"),
        ("image-nobody__nothing", "nobody/nothing: no model can be had by this name"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(opened, entry, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(entry)
    assert "\n" not in str(caught.value)


def test_a_model_of_the_hub_is_known_by_its_commit(opened, folder, tmp_path, monkeypatch):
    import huggingface_hub.constants
    import transformers.utils.hub

    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--tests--vit"  # as the hub's cache lays it out
    shutil.copytree(folder / "tests__vit", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said = opened("image-tests__vit", models_folder="").description
    assert (said["model"], said["revision"]) == ("tests/vit", commit) and "weights_sha256" not in said


def test_layers_that_are_not_there_are_refused_at_the_start(opened):
    for entry in ("text-tests__bert", "image-tests__vit"):
        assert opened(entry, layer=-4).description["layer"] == 0
        with pytest.raises(UserError, match="--config.encode.layer=4: must be from -4 to 3 in this encoder"):
            opened(entry, layer=4)


def test_a_folder_is_encoded_and_goes_on_after_a_kill(folder, pictures, repository, tmp_path, monkeypatch, capsys):
    from kdsr_jax.encoders import hub, store

    (tmp_path / "images").mkdir()
    rows = [f"u{user},i{(user + step) % 6}" for user in range(6) for step in range(4)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id", *rows, ""]))
    for item in range(6):
        pictures[item % 3].rotate(item).save(tmp_path / "images" / f"i{item}.png")
    words = [f"--config={repository / 'configs' / 'folder.py'}", f"--config.data.root={tmp_path}"]
    words += ["--config.data.k_core=1", "--config.data.modalities=image-tests__vit", "--config.encode.batch_size=2"]
    words += [f"--config.encode.models_folder={folder}"]
    assert encode.main(words) == 0
    file = tmp_path / "features" / "image-tests__vit.npz"
    sidecar = json.loads(file.with_suffix(".json").read_text())
    said = sidecar["encoder"]
    assert (said["model"], said["revision"], said["pooling"]) == ("tests/vit", None, "the model's own")
    assert (said["layer"], said["dim"], sidecar["items"]) == (3, 16, 6)
    assert len(said["weights_sha256"]) == len(sidecar["sha256"]) == 64
    whole = dict(np.load(file))
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    monkeypatch.setattr(store, "PART_SECONDS", 0.0)
    calls, original = [], hub._Images.encode

    def dies(self, inputs):
        calls.append(len(inputs))
        if len(calls) == 3:  # the first is the trial that says how wide the vectors are
            raise KeyboardInterrupt
        return original(self, inputs)

    monkeypatch.setattr(hub._Images, "encode", dies)
    assert encode.main(words) == 130 and not file.exists()
    capsys.readouterr()
    assert encode.main(words) == 0
    assert "2 of 6 items are encoded already" in capsys.readouterr().out
    again = dict(np.load(file))
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
