"""An export scores like its run, to the bit, without this package."""

import errno
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from kdsr_jax import export, export_loader, train
from kdsr_jax.config import BACKBONES
from kdsr_jax.errors import UserError
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.recommender import Recommender

pytestmark = pytest.mark.usefixtures("quick_compilation")
HISTORIES = [["i03"], ["i01", "i02", "i05"], ["i00", "i09", "i08", "i07", "i33", "i02"]]
ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import load
score, item_ids = load.load()
assert not any(name.split(".")[0] in ("kdsr_jax", "flax", "safetensors") for name in sys.modules)
import numpy as np
np.save(sys.argv[2], score(json.loads(sys.argv[3])))
assert item_ids[3] == "i03"
"""


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    return folder, export.export(finished[0], folder)


def test_scores_are_those_of_the_run_to_the_bit_in_a_process_of_its_own(exported, finished, tmp_path):
    words = [sys.executable, "-c", ALONE, exported[0], tmp_path / "scores.npy", json.dumps(HISTORIES)]
    subprocess.run(list(map(str, words)), check=True, cwd=tmp_path)
    recommender = Recommender.from_workdir(finished[0])
    expected = recommender.scores(recommender.numbers(HISTORIES))
    assert np.load(tmp_path / "scores.npy").tobytes() == expected.tobytes()


def test_the_manifest_tells_every_file(exported):
    folder, manifest = exported
    assert json.loads((folder / "manifest.json").read_text())["files"] == manifest["files"]
    assert {file.name for file in folder.iterdir()} == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len((folder / "load.py").read_text().splitlines()) <= 40
    assert b"kdsr_jax/" not in (folder / "scorer.jaxexport").read_bytes()  # no paths of this machine
    assert np.load(folder / "item_vectors.npy").shape == (36, 8) and manifest["max_length"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["gru4rec", "mmsrec", "trans2d", "mmsr_nodes"])
def test_other_models_too(backbone, tiny, tmp_path):
    words = ["model.num_heads=2"] if backbone in ("mmsrec", "trans2d") else []
    train.train_and_evaluate(
        tiny("train.epochs=1", "eval.protocol=paper", *words, variant=f":{backbone}"), tmp_path / "run"
    )
    export.export(tmp_path / "run", tmp_path / "out")
    score, _ = export_loader.load(tmp_path / "out")
    recommender = Recommender.from_workdir(tmp_path / "run")
    expected = recommender.scores(recommender.numbers(HISTORIES))
    assert score(HISTORIES).tobytes() == expected.tobytes()


def test_an_onnx_file_recommends_the_same(finished, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("jax2onnx", reason="the extra onnx is not installed")
    assert export.main([f"--workdir={finished[0]}", f"--out={tmp_path / 'out'}", "--onnx"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "scorer.onnx" in manifest["files"] and "jax2onnx" in manifest["versions"]
    recommender = Recommender.from_workdir(finished[0])
    session = runtime.InferenceSession(tmp_path / "out" / "scorer.onnx")
    numbers = recommender.numbers(HISTORIES)
    for part in (numbers, numbers[:1]):  # any number of rows
        rows = np.stack([np.pad(row[-4:], (0, 4 - len(row[-4:]))) for row in part])
        found, expected = session.run(["scores"], {"histories": rows})[0], recommender.scores(part)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(*(np.argsort(-scores, kind="stable")[:, :20] for scores in (found, expected)))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_which_models_onnx_can_hold(backbone, tiny):
    pytest.importorskip("jax2onnx", reason="the extra onnx is not installed")
    words = ["model.num_heads=2"] if backbone in ("mmsrec", "trans2d") else []
    config = tiny("data.modalities=image-random,text-random", *words, variant=f":{backbone}")
    run = train.prepare(config)
    state = PhaseRunner(run, train.refit_phase(run, 1), None).new_state()
    recommender = Recommender(config, run.dataset.interactions.item_ids, state.params, state.frozen)
    if backbone == "mmsrec":
        with pytest.raises(UserError, match="--onnx: jax2onnx .* cannot convert mmsrec .*; leave --onnx out"):
            export._onnx_scorer(recommender)
    else:
        assert export._onnx_scorer(recommender)  # which compares scores


def test_onnx_that_scores_otherwise_is_refused(finished, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

    class Other:
        def __init__(self, content, providers):
            pass

        def run(self, names, rows):
            return [np.ones((len(rows["histories"]), 36), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Other)
    with pytest.raises(UserError, match="sasrm scores otherwise in ONNX"):
        export._try_onnx(Recommender.from_workdir(finished[0]), b"")


def test_mistakes_are_one_line_and_leave_nothing(finished, exported, tmp_path, capsys, monkeypatch):
    def line(*words):
        assert export.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "exists already" in line(f"--workdir={finished[0]}", f"--out={exported[0]}")
    assert "holds no run of kdsr_jax" in line(f"--workdir={tmp_path}", f"--out={tmp_path / 'new'}")
    new = f"--out={tmp_path / 'new'}"
    with monkeypatch.context() as patch:

        def full(file, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(export.pathlib.Path, "write_bytes", full)
        assert "new: cannot be written (No space left on device)" in line(f"--workdir={finished[0]}", new)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'kdsr-jax[onnx]'" in line(f"--workdir={finished[0]}", new, "--onnx")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert re.search(r"pip install 'kdsr-jax\[export\]'", line(f"--workdir={finished[0]}", f"--out={tmp_path / 'new'}"))
    assert not list(tmp_path.iterdir())
