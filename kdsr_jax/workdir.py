"""The folder of a run: config.json, checkpoints/, metrics.jsonl, selection.json, ids.npz, ranks.npz, result.json.

teacher-MODALITY.npz is what it is distilled from. For report.html there are overview.json and examples.json besides. Of several
processes, the first locks, reads and writes it; the methods are called by all, which learn from it what it read, or why it could
not write.
"""

import contextlib
import fcntl
import json
import pathlib

import numpy as np

from kdsr_jax import processes
from kdsr_jax.config import differing_keys, fingerprint, to_dict
from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file

PHASES = ("select", "refit")
TEACHER = "teacher-"  # and a modality: what that is distilled from

# Left behind by a process that was killed, or stopped by bad input, before it had anything to keep.
_EARLY = ("config.json", "ids.npz", "overview.json")
_WORTHLESS = {".lock", *_EARLY, *(f".{name}.tmp" for name in _EARLY)}


class Workdir:
    """A run's folder, held by one process at a time.

    Attributes:
      path: the folder.
      fingerprint: of the config.
    """

    def __init__(self, path, config, create=True):
        """Lock the folder and check that it belongs to this config.

        Raises:
          UserError: it cannot be written, holds something else, belongs to another config, or is in use; or it does not
            exist and ``create`` is False.
        """
        self.path = pathlib.Path(path)
        self.fingerprint = fingerprint(config)
        self._lock, self._create = None, create
        processes.first(lambda: self._open(path, config, create))

    def _open(self, path, config, create):
        try:
            if not create and not (self.path / "config.json").is_file():
                raise UserError(f"--workdir={path}: there is no run here; train one with --mode=train first")
            self._check_owner(config)
        except OSError as error:  # a forbidden folder, a name that is too long
            raise UserError(f"--workdir={path}: cannot be read ({error.strerror})") from error
        self._made = [folder for folder in (self.path, *self.path.parents) if create and not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until __exit__
        except OSError as error:
            raise UserError(f"--workdir={path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(f"--workdir={path}: another process is working in this folder") from error
        try:
            self._check_owner(config)  # again: another first start may have come between
        except (UserError, OSError):
            self._lock.close()
            raise
        if not (self.path / "config.json").exists():
            try:
                self._write_json("config.json", {"fingerprint": self.fingerprint, "config": to_dict(config)})
            except UserError as error:
                self.__exit__(type(error))
                raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._lock is None:
            return
        if self._create and kind is not None and issubclass(kind, UserError):
            self._leave_no_trace()
        self._lock.close()

    def _leave_no_trace(self):
        """Remove what was written if bad input ended the run before it began, so that a corrected command can start."""
        entries = list(self.path.iterdir())
        if all(entry.name in _WORTHLESS or entry.name.startswith((TEACHER, f".{TEACHER}")) for entry in entries):
            for entry in entries:
                entry.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    def _check_owner(self, config):
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: is a file; give a folder")
        foreign = f"--workdir={self.path}: holds files but no run of kdsr_jax; give an empty or new folder"
        saved = self._read_json("config.json")
        if saved is None:
            if any(entry.name not in (".lock", ".config.json.tmp") for entry in self.path.iterdir()):
                raise UserError(foreign)
            return
        if not (isinstance(saved, dict) and isinstance(saved.get("config"), dict)):
            raise UserError(foreign)
        differing = differing_keys(saved["config"], to_dict(config))
        if differing:
            raise UserError(f"--workdir={self.path}: holds a run with another config; {'; '.join(differing)}")

    def claim_data(self, digest, log, features=None):
        """Tie the run to its data at the first start, and refuse other data later.

        Args:
          digest: sha256 of the data.
          log: sha256 of the histories alone, by which runs are compared.
          features: as ``feature_digests`` gives them, to say more of what has changed.

        Raises:
          UserError: the run began with data of another digest.
        """
        processes.first(lambda: self._claim_data(digest, log, features or {}))

    def _claim_data(self, digest, log, features):
        saved = self._read_json("config.json")
        if saved.get("data_sha256", digest) != digest:
            refuse_other_features(f"--workdir={self.path}", saved.get("features", {}), features)
            raise UserError(
                f"--workdir={self.path}: the data is not what this run began with (file contents or --config.data.root "
                f"have changed); give the same data or another --workdir"
            )
        if "data_sha256" not in saved:
            self._write_json("config.json", saved | {"data_sha256": digest, "log_sha256": log, "features": features})

    def checkpoints(self, phase):
        """Return the folder of a phase's checkpoints."""
        return self.path / "checkpoints" / phase

    def read_json(self, name):
        """Return a JSON file's content, or None where it does not exist.

        Raises:
          UserError: the file is not JSON.
        """
        return processes.first(lambda: self._read_json(name))

    def _read_json(self, name):
        file = self.path / name
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read ({error}); delete it or give another --workdir") from error

    def write_json(self, name, content):
        """Write a JSON file by rename, so that it is there whole or not at all."""
        processes.first(lambda: self._write_json(name, content))

    def _write_json(self, name, content):
        self._replace(name, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))

    def write_text(self, name, text):
        """Write a text file by rename; for the first process alone."""
        self._replace(name, lambda file: file.write(text.encode()))

    def write_arrays(self, name, **arrays):
        """Write an .npz file by rename."""
        processes.first(lambda: self._replace(name, lambda file: np.savez_compressed(file, **arrays)))

    def _replace(self, name, write):
        with self._writing(name):
            replace_file(self.path / name, write)

    @contextlib.contextmanager
    def _writing(self, name):
        """Turn a full or read-only disk into one line; nothing is lost, the same command goes on from the last checkpoint."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be written ({error.strerror}); put that right and give the same command again"
            ) from error

    def log(self, **line):
        """Append one object to metrics.jsonl.

        Raises:
          UserError: the disk is full; a line that is torn by that is dropped at the next start.
        """
        processes.first(lambda: self._log(line))

    def _log(self, line):
        with self._writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def truncate_log(self, phase, epoch):
        """Drop the lines of metrics.jsonl that come after an epoch of a phase, torn ones too."""
        processes.first(lambda: self._truncate_log(phase, epoch))

    def _truncate_log(self, phase, epoch):
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        last = PHASES.index(phase), epoch
        kept = [text for text in file.read_bytes().splitlines() if (place := _place(text)) and place <= last]
        self._replace("metrics.jsonl", lambda out: out.write(b"".join(text + b"\n" for text in kept)))


def refuse_other_features(where, saved, current):
    """Compare the features at hand with those of a run, both as ``feature_digests`` gives them.

    Args:
      where: what the error names.
      saved: of config.json; modalities that it does not know are not compared.
      current: of the data at hand.

    Raises:
      UserError: those of a modality differ; it says how they were made then and now, where both is known.
    """
    for name, before in saved.items():
        if name not in current or current[name]["sha256"] == before["sha256"]:
            continue
        recipes = before["recipe"], current[name]["recipe"]
        made = [] if None in recipes else differing_keys(*recipes)
        how = f" ({'; '.join(made)})" if made else ""
        raise UserError(f"{where}: the {name} features are not those that the run was trained with{how}; give the same")


def _place(text):
    """Return (phase, epoch) of a line of metrics.jsonl; None for one torn by a kill, a full disk or a lost sector."""
    try:
        line = json.loads(text)
        return PHASES.index(line["phase"]), int(line["epoch"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
