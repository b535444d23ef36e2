"""Event files for TensorBoard: a view of metrics.jsonl, in tensorboard/<phase> beside it. The only module with tensorboardX."""

import json
import re
import shutil
import time

from kdsr_jax.config import flatten
from kdsr_jax.errors import UserError
from kdsr_jax.report.page import optional

FOLDER = "tensorboard"


class Events:
    """Writes the lines of one phase as scalars over epochs.

    The folder is written anew from metrics.jsonl at every start, so it shows neither gaps nor epochs twice, whatever happened
    to the process before. What cannot be written is a warning, and nothing more is written then.
    """

    def __init__(self, workdir, phase):
        """Replace the phase's event files by what metrics.jsonl holds.

        Args:
          workdir: path of the run's folder; its metrics.jsonl is whole.
          phase: "select" or "refit".
        """
        # Not SummaryWriter, whose thread dies of a full disk and lets the next writer wait for ever.
        from tensorboardX.event_file_writer import EventsWriter

        self._folder, log = workdir / FOLDER / phase, workdir / "metrics.jsonl"
        self._writer, self._working = None, False
        with optional(str(self._folder)):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._writer, self._working = EventsWriter(str(self._folder / "events")), True
        for text in log.read_text().splitlines() if log.exists() else ():
            line = json.loads(text)
            if line["phase"] == phase:
                self.add(line)

    def add(self, line):
        """Write the numbers of one object of metrics.jsonl, those of a group as ``group/name``.

        Metrics are called ``metrics/<evaluated_on>/name``, so that the paper's protocol is labelled here, too.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        if not self._working:
            return
        numbers = {name: value for name, value in flatten(line).items() if isinstance(value, int | float)}
        epoch = numbers.pop("epoch")
        self._working = False
        with optional(str(self._folder)):
            for name, value in numbers.items():
                summary = scalar(_tag(name, line), value)
                self._writer.write_event(Event(wall_time=time.time(), step=epoch, summary=summary))
            self._writer.flush()
            self._working = True

    def close(self):
        """Finish writing."""
        if self._writer is not None:
            with optional(str(self._folder)):
                self._writer.close()


def _tag(name, line):
    """Return the tag of a dotted name, of what a tag may hold: hr@20 becomes hr_20."""
    group, _, rest = name.partition(".")
    parts = [group, line["evaluated_on"], rest] if group == "metrics" else [group, *rest.split(".")]
    return "/".join(re.sub(r"[^/\w]+", "_", part).strip("_") for part in parts if part)


def check_installed(settings):
    """Raise UserError where the config's log group asks for event files and tensorboardX is not installed."""
    if not settings.tensorboard:
        return
    try:
        import tensorboardX  # noqa: F401 - only tried
    except ImportError:
        raise UserError(
            "--config.log.tensorboard=true needs tensorboardX, which is not installed; pip install -e '.[tensorboard]', or "
            "leave the flag out: metrics.jsonl holds the same numbers"
        ) from None
