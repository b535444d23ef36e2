"""Event files: the numbers of metrics.jsonl, no epoch twice whatever was killed, and one line where they cannot be had."""

import json
import shutil
import sys

import pytest

from kdsr_jax import train
from kdsr_jax.errors import UserError
from kdsr_jax.events import Events
from kdsr_jax.labels import PAPER

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINES = [
    {"phase": "select", "epoch": 0, "forgetting": {"text": {"features": 0.75}}},
    {"phase": "select", "epoch": 1, "losses": {"loss": 2.5, "holistic/text": 0.5}, "evaluated_on": "validation"},
    {"phase": "refit", "epoch": 1, "losses": {"loss": 1.5}, "metrics": {"hr@20": 12.5}, "evaluated_on": PAPER},
]


@pytest.fixture
def installed():
    """Skip where tensorboardX is not installed."""
    pytest.importorskip("tensorboardX")


def scalars(folder):
    """Read all event files of a folder: {(tag, step): value}; no pair may come twice."""
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 - the package is there
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")  # then 4 bytes of checksum, the event, and 4 more
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


def write_log(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_events_are_the_numbers_of_the_log_by_phase(installed, tmp_path):
    write_log(tmp_path, LINES[:1])
    events = Events(tmp_path, "select")
    events.add(LINES[1])
    events.close()
    assert scalars(tmp_path / "tensorboard" / "select") == {
        ("forgetting/text/features", 0): 0.75,
        ("losses/loss", 1): 2.5,
        ("losses/holistic/text", 1): 0.5,
    }


def test_tags_of_metrics_say_what_they_were_measured_on(installed, tmp_path):
    write_log(tmp_path, LINES)
    Events(tmp_path, "refit").close()
    tags = {tag for tag, _ in scalars(tmp_path / "tensorboard" / "refit")}
    assert tags == {"losses/loss", "metrics/paper_s_protocol_best_epoch_on_test/hr_20"}


def test_a_disk_that_is_full_is_a_warning_and_no_wait(installed, tmp_path, monkeypatch, caplog):
    from tensorboardX.event_file_writer import EventsWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    events = Events(tmp_path, "select")
    monkeypatch.setattr(EventsWriter, "flush", full)
    for line in LINES[:2] * 20:
        events.add(line)
    monkeypatch.undo()
    events.close()
    (record,) = caplog.records
    assert "No space left" in record.getMessage() and "the run goes on" in record.getMessage()
    (tmp_path / "file").write_text("")
    Events(tmp_path / "file", "select").close()
    assert len(caplog.records) == 2


def test_a_new_start_writes_them_anew(installed, tmp_path):
    for lines in (LINES, LINES[:1]):  # as after a kill, which takes the log back to the newest checkpoint
        write_log(tmp_path, lines)
        Events(tmp_path, "select").close()
        Events(tmp_path, "refit").close()
    assert scalars(tmp_path / "tensorboard" / "select").keys() == {("forgetting/text/features", 0)}
    assert scalars(tmp_path / "tensorboard" / "refit") == {}
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "metrics.jsonl").unlink()
    Events(tmp_path, "select").close()  # before the first line


def test_a_run_writes_what_it_logs_and_goes_on_under_the_same_config(installed, finished, tiny, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "refit")
    train.train_and_evaluate(tiny("eval.protocol=both", "log.tensorboard=true"), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    refit = {line["epoch"]: line for line in lines if line["phase"] == "refit"}
    found = scalars(workdir / "tensorboard" / "refit")
    assert {epoch for _, epoch in found} == {0, 1, 2, 3}
    measured = "metrics/test_and_paper_s_protocol_best_epoch_on_test"
    for epoch in (1, 2, 3):
        assert found["losses/loss", epoch] == pytest.approx(refit[epoch]["losses"]["loss"], rel=1e-6)
        assert found[f"{measured}/hr_20", epoch] == pytest.approx(refit[epoch]["metrics"]["hr@20"], rel=1e-6)
    assert found["forgetting/image/features", 0] == pytest.approx(refit[0]["forgetting"]["image"]["features"], rel=1e-6)


def test_without_the_package_a_run_that_asks_for_it_is_one_line_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"--config\.log\.tensorboard=true needs tensorboardX.*pip install"):
        train.train_and_evaluate(tiny("log.tensorboard=true"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
