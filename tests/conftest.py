"""Settings for all tests. They go through the environment, so that tests that need no jax do not import it."""

import contextlib
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # jax does not write programs by rename, so none must be read while another writes
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds kdsr_jax/ and configs/."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep teachers and prepared data in a temporary folder, here and in processes that inherit the environment."""
    before = os.environ.get("KDSR_CACHE")
    os.environ["KDSR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["KDSR_CACHE"]
    if before is not None:
        os.environ["KDSR_CACHE"] = before


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real datasets, KDSR_DATA_ROOT or ../shared/data; without it the test is skipped."""
    folder = Path(os.environ.get("KDSR_DATA_ROOT") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set KDSR_DATA_ROOT to the folder that holds ml-1m/, beauty/ ...")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process; return exit code, stdout and stderr."""

    from kdsr_jax import main

    def execute(*words):
        monkeypatch.setattr(sys, "argv", ["main", *map(str, words)])
        handlers = list(logging.getLogger("kdsr_jax").handlers)
        try:
            code = main.main()
        finally:
            logging.getLogger("kdsr_jax").handlers[:] = handlers
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return execute


# Shapes are such that both phases share their compiled programs: all histories are equally long and longer than
# max_length, and select and refit both need 5 batches of 29 rows, one row empty, and with them a no-op step.
TINY = (
    *("data.name=shop", "data.modalities=image-random", "data.k_core=1", "data.max_length=4"),
    *("teacher.num_codes=8", "teacher.num_splits=4", "teacher.num_pairs=500", "model.dim=8", "model.num_layers=1"),
    *("train.batch_size=80", "train.steps_per_call=2", "train.epochs=3"),
)


@pytest.fixture(scope="session")
def tiny_words(repository, tmp_path_factory):
    """Return a function (*settings, variant="") -> words of the command line of a tiny run, without --workdir.

    A run takes a second or so, compilation aside.
    """
    root = tmp_path_factory.mktemp("data")
    _write_shop(root / "shop")

    def words(*settings, variant=""):
        file = f"--config={repository / 'configs' / 'default.py'}{variant}"
        return [file, f"--config.data.root={root}", *(f"--config.{setting}" for setting in (*TINY, *settings))]

    return words


def _write_shop(folder, num_users=48, length=11, num_items=36):
    """Write a folder dataset of random histories and features; one item has no feature."""
    import numpy as np

    rng = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True)
    items = [f"i{item:02}" for item in range(num_items)]
    rows = [f"u{user:02},{item}" for user in range(num_users) for item in rng.choice(items, length)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id", *rows, ""]))
    for modality in ("image", "text"):
        features = rng.normal(size=(num_items - 1, 16)).astype(np.float32)
        np.savez(folder / "features" / f"{modality}-random.npz", item_id=np.array(items[:-1]), features=features)


@pytest.fixture(scope="session")
def tiny(tiny_words):
    """Return a function (*settings, variant="") -> config of a tiny run."""
    from kdsr_jax import cli

    return lambda *settings, variant="": cli.parse([*tiny_words(*settings, variant=variant), "--mode=stats"]).config


@contextlib.contextmanager
def _quick_compilation():
    """Compile without most optimizations, which takes half the time; the environment is for other processes."""
    import jax

    before = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = before
        jax.config.update("jax_disable_most_optimizations", before == "1")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimizations while a module of tests runs that compile much and compute little."""
    with _quick_compilation():
        yield


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Return (workdir, result) of a tiny run of KDSR with protocol both; copy the folder before changing it."""
    from kdsr_jax import train

    workdir = tmp_path_factory.mktemp("finished") / "run"
    with _quick_compilation():
        return workdir, train.train_and_evaluate(tiny("eval.protocol=both"), workdir)


@pytest.fixture(scope="session")
def newest_checkpoint():
    """Return a function (workdir, config, phase) -> (epoch, state, record) of the phase's newest checkpoint."""
    from kdsr_jax import train
    from kdsr_jax.checkpoint import Checkpoints
    from kdsr_jax.config import fingerprint
    from kdsr_jax.phase import PhaseRunner

    shapes = {}

    def load(workdir, config, name):
        key = fingerprint(config), name
        if key not in shapes:
            run = train.prepare(config)
            phase = train.select_phase(run) if name == "select" else train.refit_phase(run, 1)
            shapes[key] = PhaseRunner(run, phase, None)._abstract_state()
        checkpoints = Checkpoints(workdir / "checkpoints" / name)
        try:
            return checkpoints.load_newest(shapes[key])
        finally:
            checkpoints.close()

    return load


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB, where this process may mount one; else the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.call(f"mount -t tmpfs -o size=16m tmpfs {shlex.quote(str(folder))} 2>/dev/null", shell=True):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def fill_up(disk):
    """Return a function that leaves so many free bytes on the disk; its file "filler" gives the room back."""

    def fill(free):
        state = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(0, state.f_bavail * state.f_frsize - free)))

    return fill
