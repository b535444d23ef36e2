"""Checkpoints: which are kept, what they hold, and that a damaged one is never taken for a good one."""

import errno
import gc
import hashlib
import logging
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax import checkpoint
from kdsr_jax.checkpoint import Checkpoints, load_best_variables
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
    assert f"{copy / '5'} is damaged" in caplog.text and "going on from epoch 4" in caplog.text
    assert len(caplog.records) == 1 and (copy / "5.damaged").is_dir()


@pytest.mark.parametrize("how", ["emptied", "flipped"])
def test_damaged_score_falls_back_too(copy, opened, caplog, how):
    damage(copy / "5" / "metrics" / "metrics", how)
    epoch, state, record = opened(copy).load_newest(ABSTRACT)
    assert epoch == 4
    assert_holds(epoch, state, record)
    assert f"{copy / '5'} is damaged" in caplog.text


def attack(rng, folder):
    """Do one random damage to a checkpoint folder; returns what was done."""
    steps = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    step = rng.choice(steps)
    file = rng.choice(sorted(f for f in step.rglob("*") if f.is_file()))
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "cut", "swap files", "swap steps", "swap sums", "delete", "grow", "add"])
    if kind == "flip":
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "grow":
        file.write_bytes(content + bytes(1))
    elif kind == "add":
        (step / "state" / "d" / "stranger").write_bytes(content)
    elif kind == "delete":
        file.unlink()
    elif kind == "swap files":
        content = file.read_bytes()
        files = [f for other in steps for f in other.rglob("*") if f.is_file() and f.read_bytes() != content]
        swap(folder, file, rng.choice(sorted(files)))
    else:
        pair = rng.sample(steps, 2)
        swap(folder, *(entry / "SHA256SUMS" if kind == "swap sums" else entry for entry in pair))
    return f"{kind} {file}"


def swap(folder, one, other):
    one.rename(folder / "between")
    other.rename(one)
    (folder / "between").rename(other)


def attack_often(saved, tmp_path, opened, seeds):
    """Damage copies of a folder of checkpoints; each must come to light, and only true values be loaded."""
    for seed in seeds:
        copy = tmp_path / str(seed) / "select"
        shutil.copytree(saved, copy)
        what = attack(random.Random(seed), copy)
        with pytest.raises(UserError, match="is damaged"):
            load_best_variables(copy)
        try:
            checkpoints = opened(copy)
        except UserError as error:
            assert "all checkpoints" in str(error), what
            continue
        epoch, state, record = checkpoints.load_newest(ABSTRACT)
        assert_holds(epoch, state, record)
        assert any(entry.name.endswith((".damaged", ".unfinished")) for entry in copy.iterdir()), what
        with pytest.raises(UserError, match="is damaged and may have been the best"):
            checkpoints.load_best(ABSTRACT)
        shutil.rmtree(copy)


def test_damage_at_30_random_places_is_caught(saved, tmp_path, opened):
    attack_often(saved, tmp_path, opened, range(30))


@pytest.mark.slow
def test_damage_at_200_random_places_is_caught(saved, tmp_path, opened):
    attack_often(saved, tmp_path, opened, range(1000, 1200))


def test_sums_are_those_of_sha256sum(saved):
    lines = (saved / "5" / "SHA256SUMS").read_text().splitlines()
    files = sorted(
        str(f.relative_to(saved)) for f in (saved / "5").rglob("*") if f.is_file() and f.name != "SHA256SUMS"
    )
    assert sorted(line.split("  ")[1] for line in lines) == files and len(files) > 8
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == digest


def test_newest_without_sums_counts_as_unfinished(copy, opened, caplog):
    (copy / "5" / "SHA256SUMS").unlink()  # as a kill between the end of orbax's work and the sums leaves it
    (copy / "5" / ".SHA256SUMS.tmp").write_text("03")
    checkpoints = opened(copy)
    assert_holds(*checkpoints.load_newest(ABSTRACT))
    assert checkpoints.epochs() == [2, 4] and "5 was not finished" in caplog.text and "epoch 4" in caplog.text
    with pytest.raises(UserError, match="may have been the best"):
        checkpoints.load_best(ABSTRACT)
    checkpoints.save(5, make_state(5), make_record(5), -1.0)
    checkpoints.close()
    assert not (copy / "5.unfinished").exists()
    checkpoints = opened(copy)
    assert checkpoints.epochs() == [2, 4, 5]
    assert int(checkpoints.load_best(ABSTRACT)["step"]) == 2


def test_only_one_without_sums_starts_the_phase_over(tmp_path, opened, caplog):
    save_all(tmp_path, [1.0])
    (tmp_path / "1" / "SHA256SUMS").unlink()
    assert opened(tmp_path).load_newest(ABSTRACT) is None
    assert "1 was not finished" in caplog.text and "the phase starts over" in caplog.text


def test_several_without_sums_are_damaged(copy):
    for file in copy.glob("*/SHA256SUMS"):
        file.unlink()
    with pytest.raises(UserError, match="all checkpoints"):
        Checkpoints(copy)
    assert sorted(entry.name for entry in copy.iterdir()) == ["2", "4", "5"]


def test_lost_best_is_never_replaced_by_another(copy, opened, caplog):
    damage(copy / "2" / "metrics" / "metrics", "flipped")
    checkpoints = opened(copy)
    assert_holds(*checkpoints.load_newest(ABSTRACT))
    assert f"{copy / '2'} is damaged" in caplog.text
    checkpoints.save(6, make_state(6), make_record(6), 4.0)
    checkpoints.close()
    with pytest.raises(UserError, match=r"2\.damaged is damaged and may have been the best"):
        opened(copy).load_best(ABSTRACT)


def test_parameters_of_the_best_need_no_model(tmp_path):
    folder = tmp_path / "refit"
    checkpoints = Checkpoints(folder)
    for epoch, score in enumerate([0.0, 2.0, 1.0], 1):
        state = {"params": {"item_embedding": {"embedding": jnp.full((3, 2), 1.5 * epoch)}}, "step": jnp.int32(epoch)}
        checkpoints.save(epoch, state, make_record(epoch), score)
    checkpoints.close()
    before = sorted(folder.rglob("*"))
    params, _ = load_best_variables(folder)
    assert type(params["item_embedding"]["embedding"]) is np.ndarray
    assert params["item_embedding"]["embedding"].tolist() == [[3.0, 3.0]] * 3
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_best_variables(tmp_path / "absent")
    for file in (folder / "2" / "state" / "d").iterdir():
        damage(file, "flipped")
    with pytest.raises(UserError, match=f"{folder / '2'} is damaged"):
        load_best_variables(folder)


def test_checkpoint_of_another_model_is_an_error_and_kept(saved, copy, opened):
    other = ABSTRACT | {"bias": ABSTRACT["step"]}
    with pytest.raises(UserError, match="5 is whole but cannot be loaded"):
        opened(copy).load_newest(other)
    with pytest.raises(UserError, match="5 is whole but cannot be loaded"):
        opened(copy).load(5, other)
    assert_holds(*opened(copy).load_newest(ABSTRACT))


def fill(monkeypatch, module, name):
    """Let every call of module.name meet a full disk."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize("where", ["orbax", "sums"])
def test_full_disk_is_one_line_and_the_last_checkpoint_stays(copy, opened, monkeypatch, where):
    checkpoints = opened(copy)
    if where == "sums":
        fill(monkeypatch, checkpoint, "_sums")
    else:
        fill(monkeypatch, checkpoints._orbax, "save_checkpointables_async")
    with pytest.raises(UserError, match="cannot be written .No space left on device.; earlier ones are kept"):
        checkpoints.save(6, make_state(6), make_record(6), 9.0)
        checkpoints.close()
    checkpoints.close()  # says it once
    monkeypatch.undo()
    checkpoints = opened(copy)
    assert_holds(*checkpoints.load_newest(ABSTRACT))
    assert checkpoints.epochs()[-1] == 5
    checkpoints.save(6, make_state(6), make_record(6), 9.0)
    checkpoints.close()
    checkpoints = opened(copy)
    assert checkpoints.load_newest(ABSTRACT)[0] == int(checkpoints.load_best(ABSTRACT)["step"]) == 6


@pytest.mark.parametrize("free", [0, 9000, 60_000, 400_000])
def test_full_file_system_loses_nothing(disk, fill_up, opened, capfd, free):
    """A checkpoint of 400 kB where only so many bytes are left; its files are cut short wherever that happens."""
    wide = jax.random.normal(jax.random.key(0), (100, 1000))
    abstract = {"wide": jax.ShapeDtypeStruct(wide.shape, wide.dtype, sharding=SHARDING)}
    folder = disk / "select"
    checkpoints = opened(folder)
    checkpoints.save(1, {"wide": wide}, make_record(1), 1.0)
    checkpoints._finish()
    fill_up(free)
    with pytest.raises(UserError, match="cannot be written .No space left on device."):
        checkpoints.save(2, {"wide": wide + 1}, make_record(2), 2.0)
        checkpoints.close()
    assert "absl" not in capfd.readouterr().err
    (disk / "filler").unlink()
    checkpoints = opened(folder)
    epoch, state, _ = checkpoints.load_newest(abstract)
    assert epoch == 1 and (state["wide"] == wide).all()
    checkpoints.save(2, {"wide": wide + 1}, make_record(2), 2.0)
    checkpoints.close()
    assert opened(folder).load_newest(abstract)[0] == 2


def test_after_falling_back_the_epoch_can_be_saved_again(copy, opened):
    shutil.rmtree(copy / "5" / "state")
    checkpoints = opened(copy)
    assert checkpoints.load_newest(ABSTRACT)[0] == 4
    checkpoints.save(5, make_state(5), make_record(5), 0.0)
    checkpoints.close()
    assert_holds(*opened(copy).load_newest(ABSTRACT))


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "metrics/metrics"])
def test_all_damaged_is_an_error_and_nothing_is_deleted(copy, file):
    for path in copy.glob(f"*/{file}"):
        damage(path, "halved")
    before = sorted(copy.rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match=f"all checkpoints in {copy} are damaged"):
            Checkpoints(copy)
    assert sorted(copy.rglob("*")) == before and len(before) > 20


def test_damaged_best_is_an_error(copy, opened):
    shutil.rmtree(copy / "2" / "state" / "d")
    with pytest.raises(UserError, match="is damaged"):
        opened(copy).load_best(ABSTRACT)


def test_half_of_a_discarded_checkpoint_is_no_damage(copy, opened, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before the files are gone
    checkpoints = opened(copy)
    checkpoints.save(6, make_state(6), make_record(6), 1.0)
    checkpoints.close()
    monkeypatch.undo()
    assert sorted(entry.name for entry in copy.iterdir()) == ["2", "4.discarded", "5", "6"]
    (copy / "4.discarded" / "metrics" / "metrics").unlink()
    checkpoints = opened(copy)
    assert int(checkpoints.load_best(ABSTRACT)["step"]) == 2 and not caplog.records
    assert sorted(entry.name for entry in copy.iterdir()) == ["2", "5", "6"]


def test_leftovers_of_a_killed_save_are_removed(copy, opened):
    torn = copy / "6.orbax-checkpoint-tmp-1"
    shutil.copytree(copy / "5", torn)
    assert opened(copy).load_newest(ABSTRACT)[0] == 5
    assert not torn.exists()
