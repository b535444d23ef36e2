"""From the words of a command line to a valid config, or to one line that says which word is wrong.

absl parses the flags. Fields of the config are set here and not by ``ml_collections.config_flags``, which answers a
missing file or an unknown field with a traceback and takes ``--config.data.modalities=image-a,text-b`` for one name.
Nothing here imports jax.
"""

import contextlib
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from kdsr_jax.checks import not_among
from kdsr_jax.config import unknown_field, validate
from kdsr_jax.errors import UserError

DEFAULTS = (
    Path(__file__).absolute().parent.parent / "configs" / "default.py"
)  # not in a package that was installed without it
MODES = ("train", "stats", "evaluate")
FLAGS = ("config", "workdir", "mode", "help")

_SETTING = re.compile(r"--?(?P<no>no)?config\.(?P<name>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)
_PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser(), bool: flags.BooleanParser()}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


class Command(NamedTuple):
    """What a command line asks for: a validated config, the folder of the run (None for stats) and a mode."""

    config: Any
    workdir: str | None
    mode: str


def parse(words: Sequence[str]) -> Command:
    """Read a whole command line, without the name of the program.

    Raises:
        UserError: for the first word that is wrong, before anything heavy is imported or anything is written.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "config file and variant", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    try:
        words = values.read_flags_from_files(list(words))
        _refuse_undefok(words)
        settings = values(["kdsr_jax", *words], known_only=True)[1:]
    except (flags.Error, ValueError) as error:
        raise UserError(str(error).removeprefix("ERROR:: ")) from error
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: {not_among(values.mode, MODES)}")
    _check_order(words)
    if not values.config:
        # A misspelt --config explains more than a missing one.
        wrong = [word for word in settings if not _SETTING.fullmatch(word)]
        missing = "--config is missing; give a config file, such as --config=configs/planted.py"
        raise UserError(_unexpected(wrong[0], FLAGS) if wrong else missing)
    config = load_config(values.config)
    apply_settings(config, settings)
    validate(config)
    check_workdir(values.workdir, needed=values.mode != "stats")
    return Command(config, values.workdir, values.mode)


def load_config(location: str) -> Any:
    """Run the config file of ``--config=FILE[:VARIANT]`` and return what its ``get_config`` gives.

    Args:
        location: path of the file, relative to the working directory, and the variant behind a colon.

    Returns:
        The config, locked against new fields.

    Raises:
        UserError: if the file is missing or cannot be run, whatever it raises, or if the variant is unknown.
    """
    path, colon, argument = location.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such config file{_nearest_file(Path(path))}")
    if not path.endswith(".py"):
        raise UserError(f"--config={path}: a config file is a Python file, FILE.py")
    try:
        with _importable(Path(path)):
            spec = importlib.util.spec_from_file_location("kdsr_jax_config_file", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(argument) if colon else module.get_config()
            return config.lock()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config={path}: line {error.lineno} of {error.filename}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"--config={path}: the config file fails with {type(error).__name__}: {error}") from error


def apply_settings(config: Any, words: Sequence[str], known: Sequence[str] = FLAGS) -> None:
    """Set the fields that words of the form ``--config.FIELD=VALUE`` name, in their order.

    A value may also be a word of its own; switches are also ``--config.FIELD`` and ``--noconfig.FIELD``; lists are
    comma-separated, with or without brackets and quotes.

    Args:
        config: the config, changed in place.
        words: what is left of the command line when all other flags are taken out.
        known: names of those other flags, one of which may be what an unknown one was meant to be.

    Raises:
        UserError: for an unknown flag, an unknown field, a value of the wrong type, or a word left over.
    """
    remaining = iter(words)
    for word in remaining:
        match = _SETTING.fullmatch(word)
        if not match:
            raise UserError(_unexpected(word, known))
        name = match["name"]
        current = _current(config, name)
        value = match["value"]
        if isinstance(current, bool) and value is None:
            value = "false" if match["no"] else "true"
        elif match["no"]:
            raise UserError(f"{word}: only switches can be set with --no; write --config.{name}=VALUE")
        elif value is None:
            value = next(remaining, None)
        if value is None:
            raise UserError(f"{word}: the value is missing; write --config.{name}=VALUE")
        group, _, leaf = name.rpartition(".")
        setattr(_walk(config, group), leaf, _parse(name, value, current))


def check_workdir(workdir: str | None, *, needed: bool = True) -> None:
    """Refuse a workdir that cannot be a writable folder; writes nothing.

    Args:
        workdir: what ``--workdir`` says, or None.
        needed: whether it must say something.

    Raises:
        UserError: naming the folder that is at fault.
    """
    if not workdir:
        if needed:
            raise UserError("--workdir is missing; give a folder for the run, such as --workdir=runs/planted")
        return
    path = Path(workdir).absolute()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # which of the folders above is at fault is told below
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--workdir={workdir!r}: not the path of a folder ({reason})") from None
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {existing} is not a folder that can be written to")


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Let a config file import ``configs.default``: that beside it, else that of this repository."""
    before = list(sys.path)
    sys.path.insert(0, str(path.absolute().parent.parent))
    sys.path.append(str(DEFAULTS.parent.parent))
    try:
        yield
    finally:
        sys.path[:] = before


def _refuse_undefok(words: Sequence[str]) -> None:
    """Refuse absl's own flag for passing over unknown flags, fields of the config among them."""
    for word in words:
        if re.match(r"--?undefok(=|$)", word):
            raise UserError(f"{word}: unknown flag; no unknown flag is passed over, so leave it out")


def _check_order(words: Sequence[str]) -> None:
    """Refuse a setting that stands before the ``--config`` it would change."""
    files = [index for index, word in enumerate(words) if re.match(r"--?config(=|$)", word)]
    for word in words[: files[-1] if files else 0]:
        if _SETTING.fullmatch(word):
            raise UserError(f"{word}: comes before --config=FILE; put it behind")


def _nearest_file(path: Path) -> str:
    files = [str(file) for file in path.parent.glob("*.py")]
    nearest = difflib.get_close_matches(str(path), files, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _unexpected(word: str, known: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; flags are written --flag=value"
    name = re.split(r"[.=]", word.lstrip("-"), maxsplit=1)[0]
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{word}: unknown flag" + (f"; did you mean --{nearest[0]}?" if nearest else "; see --help")


def _walk(config: Any, group: str) -> Any:
    for key in filter(None, group.split(".")):
        config = config[key]
    return config


def _current(config: Any, name: str) -> Any:
    try:
        value = _walk(config, name) if all(name.split(".")) else None
    except (KeyError, TypeError, AttributeError):
        value = None
    if value is None or hasattr(value, "keys"):
        raise UserError(unknown_field(name))
    return value


def _parse(name: str, text: str, current: Any) -> Any:
    """Read a value as the type of the one that it replaces."""
    if isinstance(current, tuple):
        items = [item.strip(" '\"") for item in text.strip(" ()[]").split(",")]
        return tuple(int(item) if re.fullmatch(r"-?\d+", item) else item for item in items if item)
    if type(current) not in _PARSERS:
        return text
    try:
        return _PARSERS[type(current)].parse(text)
    except ValueError:
        raise UserError(f"--config.{name}={text}: must be {_EXPECTED[type(current)]}") from None
