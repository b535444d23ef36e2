"""Eight simulated devices give what one gives, and checkpoints go from one number of devices to another."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from kdsr_jax import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = ("eval.protocol=paper", "train.epochs=2")


@pytest.fixture(
    scope="module",
    params=[":sasrec", *(pytest.param(v, marks=pytest.mark.slow) for v in (":kdsr-sasrm", ":kdsr-mmsr"))],
)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def eight(variant, tiny_words, tmp_path_factory, quick_compilation):
    """The workdir of a run on eight devices, which take part in a process of their own."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    completed = subprocess.run(
        [sys.executable, "-m", "kdsr_jax.main", *tiny_words(*SETTINGS, variant=variant), f"--workdir={workdir}"],
        check=False,
        cwd=os.path.dirname(os.path.dirname(train.__file__)),
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr and "on 8 x cpu" in completed.stdout
    return workdir


@pytest.fixture(scope="module")
def one(variant, tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert train.train_and_evaluate(tiny(*SETTINGS, variant=variant), workdir)["device"] == "1 x cpu"
    return workdir


def read_log(workdir):
    """Return the lines of trained epochs, which come after one of epoch 0 where tables are tuned."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["epoch"]]


def assert_close(workdir, other):
    for line, wanted in zip(read_log(workdir), read_log(other), strict=True):
        assert line["step"] == wanted["step"]
        for group in ("losses", "gradient_norms", "metrics"):
            assert line[group] == pytest.approx(wanted[group], rel=1e-4)
    with np.load(workdir / "ranks.npz") as ranks, np.load(other / "ranks.npz") as wanted:
        assert ranks["target"].tolist() == wanted["target"].tolist()
        assert (ranks["rank"] == wanted["rank"]).mean() > 0.98  # nearly equal scores may change places


def test_eight_devices_train_as_one(eight, one):
    assert_close(eight, one)


def test_one_device_evaluates_the_checkpoint_of_eight(eight, variant, tiny):
    metrics = train.evaluate_workdir(tiny(*SETTINGS, variant=variant), eight)
    epoch = json.loads((eight / "result.json").read_text())["paper_epochs"]["mrr@20"]
    assert metrics == pytest.approx(read_log(eight)[epoch - 1]["metrics"], rel=1e-4)


def test_one_device_goes_on_where_eight_stopped(eight, one, variant, tiny, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(eight, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "refit" / "2")
    result = train.train_and_evaluate(tiny(*SETTINGS, variant=variant), workdir)
    assert (result["device"], result["epochs"]) == ("1 x cpu", 2)
    assert_close(workdir, one)
