"""The folder of a run: whose it is, that one process at a time works in it, and that nothing in it is half written."""

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from kdsr_jax import cli, files, workdir
from kdsr_jax.config import fingerprint
from kdsr_jax.errors import UserError
from kdsr_jax.workdir import Workdir


@pytest.fixture(scope="module")
def config_of(repository):
    """Return a function (*settings) -> config."""

    def make(*settings):
        words = [f"--config={repository / 'configs' / 'planted.py'}", "--mode=stats"]
        return cli.parse([*words, *(f"--config.{setting}" for setting in settings)]).config

    return make


@pytest.fixture(scope="module")
def config(config_of):
    return config_of()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_new_folder_holds_the_config_and_its_fingerprint(tmp_path, config):
    with Workdir(tmp_path / "runs" / "a", config) as folder:
        saved = folder.read_json("config.json")
    assert saved["fingerprint"] == fingerprint(saved["config"]) == fingerprint(config)
    assert saved["config"]["eval"]["topk"] == [5, 10, 20]


def test_other_config_is_refused_with_the_differing_keys(tmp_path, config, config_of):
    with Workdir(tmp_path, config):
        pass
    with pytest.raises(UserError) as error:
        Workdir(tmp_path, config_of("train.epochs=7", "seed=3"))
    assert "another config; seed: 0 -> 3; train.epochs: 40 -> 7" in str(error.value)
    with Workdir(tmp_path, config_of("data.root=/elsewhere")):  # where the data lies does not matter
        pass


@pytest.mark.parametrize("content", [None, "[]", '{"architectures": ["BertModel"]}', '{"config": "text"}'])
def test_foreign_folder_is_refused_and_left_alone(tmp_path, config, content):
    (tmp_path / "thesis.tex").write_text("mine")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = names(tmp_path)
    with pytest.raises(UserError, match="holds files but no run"):
        Workdir(tmp_path, config)
    assert names(tmp_path) == before


def test_damaged_config_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text('{"fingerprint": "ab')
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        Workdir(tmp_path, config)


def test_folder_that_was_killed_before_its_config_was_whole_is_taken(tmp_path, config):
    (tmp_path / ".config.json.tmp").write_text('{"finger')
    (tmp_path / ".lock").touch()
    with Workdir(tmp_path, config) as folder:
        assert folder.read_json("config.json")["fingerprint"] == folder.fingerprint


def test_file_and_unwritable_place_are_refused(tmp_path, config):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        Workdir(file, config)
    with pytest.raises(UserError, match="cannot be written"):
        Workdir(file / "below", config)
    assert names(tmp_path) == ["file"]


def test_folder_without_a_run_is_not_created_for_evaluation(tmp_path, config):
    with pytest.raises(UserError, match="there is no run here"):
        Workdir(tmp_path / "nothing", config, create=False)
    assert names(tmp_path) == []


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def test_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path, config):
    with Workdir(tmp_path, config), pytest.raises(UserError, match="another process"):
        Workdir(tmp_path, config)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"):
            Workdir(tmp_path, config)
        other.kill()  # the lock goes with the process, however it ends
    with Workdir(tmp_path, config):
        pass


def test_first_start_of_another_config_that_came_between_keeps_the_folder(tmp_path, config, config_of, monkeypatch):
    lock = workdir.fcntl.flock

    def late(*arguments):
        monkeypatch.undo()
        with Workdir(tmp_path, config_of("seed=3")):
            pass
        lock(*arguments)

    monkeypatch.setattr(workdir.fcntl, "flock", late)
    with pytest.raises(UserError, match="another config; seed: 3 -> 0"):
        Workdir(tmp_path, config)
    with Workdir(tmp_path, config_of("seed=3")):  # it is there, and not locked
        pass


def test_bad_input_leaves_nothing_so_that_a_corrected_command_can_start(tmp_path, config, config_of):
    target = tmp_path / "runs" / "a"
    with pytest.raises(UserError, match="no such"), Workdir(target, config):
        raise UserError("no such features file")
    assert names(tmp_path) == []
    target.mkdir(parents=True)  # a folder that was there stays
    with pytest.raises(UserError), Workdir(target, config) as folder:
        folder.write_arrays("ids.npz", user_ids=np.array(["u"]))
        raise UserError("there are no training targets")
    assert names(target) == []
    with Workdir(target, config_of("seed=1")):
        pass


@pytest.mark.parametrize(("error", "content"), [(UserError, "metrics.jsonl"), (RuntimeError, "ids.npz")])
def test_a_run_that_began_or_crashed_is_kept(tmp_path, config, error, content):
    with pytest.raises(error), Workdir(tmp_path, config) as folder:
        (folder.path / content).touch()
        raise error("diverged")
    assert names(tmp_path) == sorted([".lock", "config.json", content])


def test_json_and_arrays_appear_whole_or_not_at_all(tmp_path, config):
    class Torn:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    with Workdir(tmp_path, config) as folder:
        assert folder.read_json("result.json") is None
        folder.write_json("result.json", {"test": 1 / 3})
        folder.write_arrays("ranks.npz", rank=np.arange(3))
        with pytest.raises(KeyboardInterrupt):
            folder.write_arrays("ranks.npz", rank=np.arange(9), user=Torn())
        assert folder.read_json("result.json") == {"test": 1 / 3}
    with np.load(tmp_path / "ranks.npz") as file:
        assert file["rank"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("phase", "epoch", "kept"),
    [
        ("select", 0, []),
        ("select", 1, [("select", 1)]),
        ("refit", 0, [("select", 1), ("select", 2)]),
        ("refit", 1, [("select", 1), ("select", 2), ("refit", 1)]),
        ("refit", 2, [("select", 1), ("select", 2), ("refit", 1), ("refit", 2)]),
    ],
)
def test_log_is_cut_behind_an_epoch_of_a_phase(tmp_path, config, phase, epoch, kept):
    with Workdir(tmp_path, config) as folder:
        folder.truncate_log(phase, epoch)  # without a log there is nothing to do
        for line in [("select", 1), ("select", 2), ("refit", 1), ("refit", 2)]:
            folder.log(phase=line[0], epoch=line[1])
        file = tmp_path / "metrics.jsonl"
        file.write_text(file.read_text() + '{"phase": "refit", "epo')  # torn by a kill
        folder.truncate_log(phase, epoch)
        folder.log(phase=phase, epoch=epoch + 1)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [*kept, (phase, epoch + 1)]


TORN = [
    b'{"phase": "refit", "epo',
    b'{"phase": "refit", "epo{"phase": "refit", "epoch": 3}',  # a full disk, and on with another line
    b"",
    bytes(512),  # a sector that never reached the disk
    b"\xff\xfe",
    b"[]",
    b"7",
    b'{"epoch": 1}',
    b'{"phase": "other", "epoch": 1}',
    b'{"phase": "refit", "epoch": null}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("torn", TORN, ids=range(len(TORN)))
def test_torn_lines_of_the_log_are_dropped(tmp_path, config, torn):
    with Workdir(tmp_path, config) as folder:
        folder.log(phase="refit", epoch=1)
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(torn + b"\n")
        folder.log(phase="refit", epoch=2)
        folder.truncate_log("refit", 9)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"phase": "refit", "epoch": epoch} for epoch in (1, 2)]


class FullDisk(io.FileIO):
    """A file that takes a few bytes more."""

    room = 30

    def write(self, content):
        """Write what there is room for."""
        super().write(bytes(content)[: self.room])
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)


def full_disk(name, mode, **_):
    file = FullDisk(name, mode.replace("b", ""))
    return file if "b" in mode else io.TextIOWrapper(file, write_through=True)


@pytest.mark.filterwarnings("error")
def test_a_full_disk_leaves_what_was_there(tmp_path, config, monkeypatch):
    with Workdir(tmp_path, config) as folder:
        folder.write_json("result.json", {"test": 1})
        folder.write_arrays("ranks.npz", rank=np.arange(3))
        folder.log(phase="select", epoch=1)
        before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
        for module in (files, workdir):
            monkeypatch.setattr(module, "open", full_disk, raising=False)
        for write in (
            lambda: folder.write_json("result.json", {"test": list(range(100))}),
            lambda: folder.write_json("selection.json", {"test": list(range(100))}),
            lambda: folder.write_arrays("ranks.npz", rank=np.arange(9)),
            lambda: folder.log(phase="select", epoch=2, losses={"loss": 1 / 3}),
        ):
            with pytest.raises(UserError, match=r"/\w+\.\w+: cannot be written \(No space left on device\)"):
                write()
        gc.collect()
        monkeypatch.undo()
        folder.truncate_log("select", 2)
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_at_the_start_is_left_empty_and_unlocked(tmp_path, config, monkeypatch):
    monkeypatch.setattr(files, "open", full_disk, raising=False)
    with pytest.raises(UserError, match=r"config\.json: cannot be written \(No space left on device\)"):
        Workdir(tmp_path / "runs" / "a", config)
    assert names(tmp_path) == []
    monkeypatch.undo()
    with Workdir(tmp_path / "runs" / "a", config):
        pass


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_impossible_names_are_refused(tmp_path, config, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="--workdir="):
        Workdir(tmp_path / name, config)
    assert names(tmp_path) == ["loop"]


@pytest.mark.parametrize("content", ["[" * 100_000, "\ud800", '{"config": {"train": 5, "new": null}}'])
def test_a_strange_config_is_refused(tmp_path, config, content):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        Workdir(tmp_path, config)
    assert names(tmp_path) == ["config.json"]


def test_copy_of_a_run_is_a_run(tmp_path, config):
    with Workdir(tmp_path / "a", config) as folder:
        folder.write_json("result.json", {"seed": 0})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with Workdir(tmp_path / "b", config, create=False) as folder:
        assert folder.read_json("result.json") == {"seed": 0}


def test_other_data_in_the_same_workdir_is_refused(tmp_path, tiny):
    config = tiny()
    with Workdir(tmp_path / "run", config) as folder:
        folder.claim_data("a" * 64, "c")
        folder.claim_data("a" * 64, "c")
        with pytest.raises(UserError, match="the data is not what this run began with"):
            folder.claim_data("b" * 64, "c")
    assert folder.read_json("config.json")["data_sha256"] == "a" * 64


def test_other_features_are_named_with_what_made_them(tmp_path, tiny):
    def features(sha256, layer):
        return {"text": {"sha256": sha256, "recipe": {"encoder": {"model": "m", "layer": layer}}}}

    with Workdir(tmp_path / "run", tiny()) as folder:
        folder.claim_data("a" * 64, "c", features("1", 6))
        folder.claim_data("a" * 64, "c", features("1", 6))
        message = r"the text features are not those that the run was trained with \(encoder.layer: 6 -> 3\)"
        with pytest.raises(UserError, match=message):
            folder.claim_data("b" * 64, "c", features("2", 3))
        with pytest.raises(UserError, match="the data is not what this run began with"):
            folder.claim_data("b" * 64, "c", features("1", 6))
