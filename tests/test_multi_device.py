"""Eight simulated devices, laid out in any way, and two processes give what one gives; checkpoints go from one to the other."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from kdsr_jax import train
from kdsr_jax.errors import UserError
from kdsr_jax.mesh import mesh_shape

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = ("eval.protocol=paper", "train.epochs=2")
SLOW = pytest.mark.slow
# 37 rows of 36 items divide by neither 2 nor 8.
CASES = [(":kdsr-sasrm", 4, 2)]
CASES += [
    pytest.param(case, marks=SLOW) for case in ((":kdsr-sasrm", 8, 1), (":kdsr-sasrm", 1, 8), (":kdsr-mmsr", 4, 2))
]


def start(words, workdir, devices, *settings):
    """Start a process with simulated devices of its own on a run."""
    flags = f"--xla_force_host_platform_device_count={devices} " + os.environ.get("XLA_FLAGS", "")
    return subprocess.Popen(
        [sys.executable, "-m", "kdsr_jax.main", *words, f"--workdir={workdir}", *settings],
        cwd=os.path.dirname(os.path.dirname(train.__file__)),
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    """Wait for a process; return what it printed."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def variant(case):
    return case[0]


@pytest.fixture(scope="module")
def eight(case, tiny_words, tmp_path_factory, quick_compilation):
    """The workdir of a run on eight devices, which take part in a process of their own."""
    variant, data, model = case
    workdir = tmp_path_factory.mktemp("eight") / "run"
    settings = f"--config.mesh.data={data}", f"--config.mesh.model={model}"
    out, err = finish(start(tiny_words(*SETTINGS, variant=variant), workdir, 8, *settings))
    assert "on 8 x cpu" in out and "could not be written" not in err
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
        assert line["losses"] == pytest.approx(wanted["losses"], rel=1e-5, abs=1e-7)
        for group in ("gradient_norms", "metrics"):
            assert line[group] == pytest.approx(wanted[group], rel=1e-4)
    with np.load(workdir / "ranks.npz") as ranks, np.load(other / "ranks.npz") as wanted:
        assert ranks["target"].tolist() == wanted["target"].tolist()
        assert (ranks["rank"] == wanted["rank"]).mean() > 0.98  # nearly equal scores may change places


def test_eight_devices_train_as_one(eight, one):
    assert_close(eight, one)


@pytest.mark.slow
def test_row_sparse_tables_train_on_four_devices_as_on_one(tiny_words, tiny, tmp_path):
    settings = (*SETTINGS, "train.sparse_tables=true", "train.sampled_items=8")
    finish(start(tiny_words(*settings), tmp_path / "four", 4, "--config.mesh.data=4"))
    train.train_and_evaluate(tiny(*settings), tmp_path / "one")
    assert_close(tmp_path / "four", tmp_path / "one")


def test_one_device_evaluates_the_checkpoint_of_eight(eight, variant, tiny):
    metrics = train.evaluate_workdir(tiny(*SETTINGS, variant=variant), eight)
    epoch = json.loads((eight / "result.json").read_text())["paper_epochs"]["mrr@20"]
    assert metrics == pytest.approx(read_log(eight)[epoch - 1]["metrics"], rel=1e-4)


def go_on(workdir, copy, config):
    """Let this process train the second epoch of a copied run."""
    shutil.copytree(workdir, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "refit" / "2")
    return train.train_and_evaluate(config, copy)


def test_one_device_goes_on_where_eight_stopped(eight, one, variant, tiny, tmp_path):
    result = go_on(eight, tmp_path / "copy", tiny(*SETTINGS, variant=variant))
    assert (result["device"], result["epochs"]) == ("1 x cpu", 2)
    assert_close(tmp_path / "copy", one)


# --- several processes -----------------------------------------------------------------------------------------------


def start_two(words, workdirs, *settings):
    """Start two processes of two devices that find each other on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = f"--config.mesh.coordinator=127.0.0.1:{port}", "--config.mesh.num_processes=2", *settings
    return [start(words, workdir, 2, *common, f"--config.mesh.process={n}") for n, workdir in enumerate(workdirs)]


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tiny_words, tiny, tmp_path):
    variant, workdir = ":kdsr-sasrm", tmp_path / "two"
    words = tiny_words(*SETTINGS, variant=variant)
    settings = "--config.mesh.model=2", "--config.data.histories=host"  # the one goes on with them on its device
    (out, err), (other_out, other_err) = map(finish, start_two(words, (workdir, workdir), *settings))
    assert "on 4 x cpu" in out and "refit epoch 2/2" in err and "could not be written" not in err
    # Gloo's C++ says something of connections, in pieces that threads may interleave.
    said = [line for line in (other_out + other_err).splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert not said
    parts = {path.name for path in (workdir / "checkpoints" / "refit" / "1" / "state").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    train.train_and_evaluate(tiny(*SETTINGS, variant=variant), tmp_path / "one")
    assert_close(workdir, tmp_path / "one")
    result = go_on(workdir, tmp_path / "copy", tiny(*SETTINGS, variant=variant))
    assert (result["device"], result["epochs"]) == ("1 x cpu", 2)
    assert_close(tmp_path / "copy", tmp_path / "one")


@pytest.mark.slow
def test_a_mistake_ends_all_processes_and_is_told_once(tiny_words, tmp_path):
    (tmp_path / "letter").write_text("dear")
    processes = start_two(tiny_words(*SETTINGS), (tmp_path, tmp_path))
    (_, err), (_, other_err) = (finish(process, code=2) for process in processes)
    assert "holds files but no run" in err and "holds files" not in other_err
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


# --- the mesh --------------------------------------------------------------------------------------------------------


def test_mesh_shape_is_all_devices():
    shapes = [mesh_shape(*wanted, 8) for wanted in ((0, 0), (0, 2), (8, 0), (4, 2), (1, 8))]
    assert shapes == [(8, 1), (4, 2), (8, 1), (4, 2), (1, 8)]


@pytest.mark.parametrize("wanted", [(3, 0), (0, 3), (2, 2), (0, 16)])
def test_a_mesh_that_does_not_take_all_devices_is_refused(wanted):
    with pytest.raises(UserError, match=r"mesh\.data=.*product must be the number of devices, 8"):
        mesh_shape(*wanted, 8)


WHOLE = """
import re, sys
from kdsr_jax import cli, train
from kdsr_jax.ops import losses
from kdsr_jax.phase import PhaseRunner

losses.CHUNK_BYTES = 1
run = train.prepare(cli.parse(sys.argv[1:]).config)
runner = PhaseRunner(run, train.refit_phase(run, None), None)
state, (length, ids) = runner.new_state(), runner.batches.chunk(0)
resident, ids = runner.histories.of(ids, length)
given = state, resident, run.teachers, ids
print(runner.trainer.run_chunk.lower(*given, length=length, warmup=False).compile().as_text())
evaluator, variables = runner.evaluator, {"params": state.params, "frozen": state.frozen}
length, ids = evaluator._batches.chunk(0)
candidates = evaluator._candidates(variables)
given = variables, candidates, *evaluator._histories.of(ids, length)
print(evaluator._rank_batch.lower(*given, length=length).compile().as_text())
print(run.student.num_items)
"""


@pytest.mark.slow
def test_no_device_holds_a_whole_table_or_the_scores_of_all_items(tmp_path):
    settings = ("planted.num_items=3001", "planted.num_users=400", "k_core=1", "max_length=10")
    words = [f"--config.data.{setting}" for setting in settings]
    words += ["--config.model.dim=16", "--config.teacher.num_pairs=500", "--config.teacher.num_codes=8"]
    words += ["--config.train.batch_size=1024", "--config.mesh.model=2", "--mode=stats"]
    completed = subprocess.run(
        [sys.executable, "-c", WHOLE, "--config=configs/default.py", *words],
        check=True,
        cwd=os.path.dirname(os.path.dirname(train.__file__)),
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    shapes = {tuple(map(int, text.split(","))) for text in re.findall(r"f32\[([\d,]+)\]", completed.stdout)}
    num_items = int(completed.stdout.split()[-1])
    sizes = [{*shape} for shape in shapes if len(shape) > 1]  # an array a row an item or a score an item
    assert not [size for size in sizes if size & {num_items + extra for extra in range(3)}]
    assert [size for size in sizes if size & {-(-(num_items + extra) // 2) for extra in range(2)}]
