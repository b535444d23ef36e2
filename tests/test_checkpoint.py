"""Checkpoints: which are kept, what they hold, and that a damaged one is never taken for a good one."""

import gc
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax.checkpoint import Checkpoints
from kdsr_jax.errors import UserError

# When orbax meets a damaged file it leaves its other reads unawaited and their event loop to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"),
    pytest.mark.usefixtures("collect_garbage"),
]

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ABSTRACT = {
    "table": jax.ShapeDtypeStruct((50, 4), jnp.float32, sharding=SHARDING),
    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=SHARDING),
}


def make_state(epoch):
    return {"table": jnp.arange(200.0).reshape(50, 4) / 3 + epoch, "step": jnp.int32(epoch)}


def make_record(epoch):
    return {"epoch": epoch, "evaluations": [{"epoch": epoch, "metrics": {"hr@5": 0.1 + 0.2}}], "seconds": 1 / 3}


def assert_holds(epoch, state, record):
    jax.tree.map(np.testing.assert_array_equal, state, make_state(epoch))
    assert record == make_record(epoch)


@pytest.fixture(scope="module")
def collect_garbage():
    """Let complaints about what orbax leaves behind appear in this module, where they are ignored."""
    yield
    gc.collect()


@pytest.fixture
def opened():
    """Return a function folder -> Checkpoints; all are closed in the end."""
    made = []

    def make(folder):
        made.append(Checkpoints(folder))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


def save_all(folder, scores):
    checkpoints = Checkpoints(folder)
    for epoch, score in enumerate(scores, 1):
        checkpoints.save(epoch, make_state(epoch), make_record(epoch), score)
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 4 and 5, the newest, and 2, the best."""
    folder = tmp_path_factory.mktemp("saved") / "select"
    save_all(folder, [0.0, 5.0, 1.0, 0.5, -1.0])
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "select")
    return tmp_path / "select"


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.0, 5.0, 1.0, 0.5], [2, 3, 4], 2),
        ([0.0, 1.0, 2.0, 3.0], [3, 4], 4),
        ([-1.0, -1.0, -1.0, -1.0], [1, 3, 4], 1),  # of equal ones the first
        ([3.0, 3.0, 3.0], [1, 2, 3], 1),
    ],
)
def test_newest_two_and_the_first_best_are_kept(tmp_path, opened, scores, kept, best):
    save_all(tmp_path, scores)
    checkpoints = opened(tmp_path)
    assert checkpoints.epochs() == kept
    assert int(checkpoints.load_best(ABSTRACT)["step"]) == best


def test_newest_comes_back_bit_for_bit_with_its_record(saved, opened):
    epoch, state, record = opened(saved).load_newest(ABSTRACT)
    assert epoch == 5
    assert_holds(epoch, state, record)


def test_folder_without_checkpoints_gives_none(tmp_path, opened):
    checkpoints = opened(tmp_path / "new")
    assert checkpoints.load_newest(ABSTRACT) is None
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.load_best(ABSTRACT)


def test_state_may_be_donated_while_it_is_written(tmp_path, opened):
    change = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 7, s), donate_argnums=0)
    checkpoints = opened(tmp_path)
    for epoch in (1, 2, 3):
        state = make_state(epoch)
        checkpoints.save(epoch, state, make_record(epoch), 0.0)
        state = change(state)
        assert int(state["step"]) == -7
    checkpoints.close()
    for epoch in (1, 2, 3):
        assert_holds(epoch, *opened(tmp_path).load(epoch, ABSTRACT))


def damage(file, how):
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes(255 - byte for byte in content[middle:][:4]) + content[middle + 4 :])
    else:
        file.write_bytes(content[: len(content) // 2] if how == "halved" else b"")


ESSENTIAL = [
    ("_CHECKPOINT_METADATA", "halved"),
    ("state/_METADATA", "emptied"),
    ("state/manifest.ocdbt", "deleted"),
    ("state/d/*", "halved"),
]


@pytest.mark.parametrize(("file", "how"), ESSENTIAL)
def test_damaged_newest_falls_back_to_the_one_before(copy, opened, caplog, file, how):
    for path in (copy / "5").glob(file):
        damage(path, how)
    with caplog.at_level(logging.WARNING, "kdsr_jax"):
        epoch, state, record = opened(copy).load_newest(ABSTRACT)
    assert epoch == 4
    assert_holds(epoch, state, record)
    assert f"{copy / '5'} is damaged" in caplog.text and "going on from epoch 4 instead of 5" in caplog.text


@pytest.mark.parametrize("how", ["emptied", "flipped"])
def test_damaged_score_falls_back_too(copy, opened, caplog, how):
    damage(copy / "5" / "metrics" / "metrics", how)
    epoch, state, record = opened(copy).load_newest(ABSTRACT)
    assert epoch == 4
    assert_holds(epoch, state, record)
    assert f"{copy / '5'} is damaged" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "emptied", "halved", "flipped"])
def test_no_damage_to_any_file_gives_wrong_values(saved, tmp_path, opened, how):
    files = [file.relative_to(saved) for file in (saved / "5").rglob("*") if file.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(saved, copy)
        damage(copy / file, how)
        epoch, state, record = opened(copy).load_newest(ABSTRACT)
        assert epoch in (4, 5), file
        assert_holds(epoch, state, record)


def test_after_falling_back_the_epoch_can_be_saved_again(copy, opened):
    shutil.rmtree(copy / "5" / "state")
    checkpoints = opened(copy)
    assert checkpoints.load_newest(ABSTRACT)[0] == 4
    checkpoints.save(5, make_state(5), make_record(5), 0.0)
    checkpoints.close()
    assert_holds(*opened(copy).load_newest(ABSTRACT))


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "metrics/metrics"])
def test_all_damaged_is_an_error_and_nothing_is_deleted(copy, opened, file):
    for path in copy.glob(f"*/{file}"):
        damage(path, "halved")
    before = sum(path.is_file() for path in copy.rglob("*"))
    for _ in range(2):
        checkpoints = opened(copy)
        with pytest.raises(UserError, match=f"all checkpoints in {copy} are damaged"):
            checkpoints.load_newest(ABSTRACT)
        checkpoints.close()
    assert sum(path.is_file() for path in copy.rglob("*")) == before > 20


def test_damaged_best_is_an_error(copy, opened):
    shutil.rmtree(copy / "2" / "state" / "d")
    with pytest.raises(UserError, match="is damaged"):
        opened(copy).load_best(ABSTRACT)


def test_leftovers_of_a_killed_save_are_removed(copy, opened):
    torn = copy / "6.orbax-checkpoint-tmp-1"
    shutil.copytree(copy / "5", torn)
    assert opened(copy).load_newest(ABSTRACT)[0] == 5
    assert not torn.exists()
