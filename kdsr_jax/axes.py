"""What a search tries: ``--try=FIELD=VALUES`` words to axes, and a trial's settings to a config. Nothing here imports jax."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kdsr_jax import cli
from kdsr_jax.config import FIELDS, NOT_FINGERPRINTED, WITHOUT_ATTENTION, flatten, to_dict, unknown_field, validate
from kdsr_jax.errors import UserError

LOG_RATIO = 10  # a range whose ends are so far apart is searched by orders of magnitude
_MOST_CHECKED = 5000  # combinations of values that are held against the rules between fields before the first trial
# Trials must be judged on the same targets by the same ranking; of the data group, these change what a model reads alone.
_SEARCHABLE_DATA = ("data.max_length", "data.window_stride")


class Axis(NamedTuple):
    """A field that trials differ in, and what it may be.

    Attributes:
        name: dotted name of the field.
        word: what named it, ``FIELD=VALUES``.
        values: the choices, or the two ends of a range.
        ranged: whether it is a range, of whole numbers where the ends are.
        log: whether the range is searched by orders of magnitude.
    """

    name: str
    word: str
    values: tuple
    ranged: bool = False
    log: bool = False

    def suggest(self, trial: Any) -> Any:
        """Return the value that an optuna trial has or gets on this axis."""
        if not self.ranged:
            return trial.suggest_categorical(self.name, self.values)
        suggest = trial.suggest_int if isinstance(self.values[0], int) else trial.suggest_float
        return suggest(self.name, *self.values, log=self.log)

    def holds(self, value: Any) -> bool:
        """Say whether a value lies on the axis."""
        return self.values[0] <= value <= self.values[1] if self.ranged else value in self.values

    def text(self) -> str:
        """Return its values as one text, the same for all words that mean the same."""
        return (".." if self.ranged else ",").join(map(str, self.values))


def read_axes(config: Any, words: Sequence[str]) -> list[Axis]:
    """Read what stands behind ``--try=``, or choose by the config where nothing does.

    Args:
        config: a valid config.
        words: ``FIELD=LOW..HIGH`` for a range of numbers, ``FIELD=V1,V2`` for choices.

    Returns:
        The axes, each value and their combinations held against the rules of the config.

    Raises:
        UserError: naming the word that is wrong.
    """
    axes = [_axis(config, word) for word in words or default_words(config)]
    for axis, other in itertools.combinations(axes, 2):
        if axis.name == other.name:
            raise UserError(f"--try={other.word}: {axis.name} has --try={axis.word} already; give each field once")
    _check_combinations(config, axes)
    return axes


def default_words(config: Any) -> list[str]:
    """Return the axes of a search that names none: learning rate, dropout, and what tuning and distillation add."""
    words = ["train.learning_rate=3e-4..3e-3", "model.hidden_dropout=0.1..0.6"]
    if config.model.name not in WITHOUT_ATTENTION:
        words.append("model.attention_dropout=0.1..0.6")
    if config.distill.enabled:
        words += ["distill.lambda_code=0.01..1", "distill.lambda_score=0.1..100"]
    if config.model.tables == "tuned":
        words.append("model.table_scale=0.05..1")
    return words


def settings_of(config: Any, axes: Iterable[Axis]) -> dict[str, Any] | None:
    """Return a config's own values on the axes, or None where one lies outside."""
    fields = flatten(to_dict(config))
    inside = all(axis.holds(fields[axis.name]) for axis in axes)
    return {axis.name: fields[axis.name] for axis in axes} if inside else None


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return a copy of a config with other values of some fields.

    Args:
        config: a valid config; left as it is.
        settings: dict dotted name -> value.

    Raises:
        UserError: as ``validate``.
    """
    changed = config.copy_and_resolve_references()
    cli.apply_settings(changed, [f"--config.{name}={value}" for name, value in settings.items()])
    validate(changed)
    return changed.lock()


def _axis(config: Any, word: str) -> Axis:
    name, equal, text = word.partition("=")
    if not (name and equal and text):
        raise UserError(f"--try={word}: write --try=FIELD=LOW..HIGH or --try=FIELD=V1,V2")
    fields = flatten(to_dict(config))
    if name not in fields:
        raise UserError(f"--try={word}: {unknown_field(name).replace('--config.', '')}")
    if complaint := _not_searched(name, fields[name]):
        raise UserError(f"--try={word}: {name} {complaint}")
    numeric = isinstance(fields[name], int | float) and not isinstance(fields[name], bool)
    if ".." in text and numeric:
        values = tuple(_value(config, name, end, word) for end in text.split("..", 1))
        if not values[0] < values[1]:
            raise UserError(f"--try={word}: a range goes up, LOW..HIGH")
        return Axis(name, word, values, True, values[0] > 0 and values[1] / values[0] >= LOG_RATIO)
    values = tuple(_value(config, name, part, word) for part in text.split(","))
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"--try={word}: names {twice[0]} twice")
    return Axis(name, word, values)


def _not_searched(name: str, value: Any) -> str | None:
    """Say why a field cannot be searched, or return None."""
    if name in NOT_FINGERPRINTED:
        return "changes no result"
    if name == "seed":
        return "is no setting; its best value is luck"
    if name.startswith("eval.") or name.startswith("data.") and name not in _SEARCHABLE_DATA:
        return "decides what trials are measured on, which must be the same for all"
    return "is a list, which cannot be searched" if isinstance(value, list) else None


def _value(config: Any, name: str, text: str, word: str) -> Any:
    """Read one value as the type of its field and hold it against the field's own check."""
    text, copy = text.strip(), config.copy_and_resolve_references()
    try:
        if not text:
            raise UserError("a value is missing")
        cli.apply_settings(copy, [f"--config.{name}={text}"])
        value = flatten(to_dict(copy))[name]
        if complaint := FIELDS[name](value):
            raise UserError(f"{value}: {complaint}")
    except UserError as error:
        raise UserError(f"--try={word}: {str(error).removeprefix(f'--config.{name}=')}") from None
    return value


def _check_combinations(config: Any, axes: Sequence[Axis]) -> None:
    """Hold the axes against the rules between fields: all combinations where they are few, else those of first and last values."""
    candidates = [_listed(axis) for axis in axes]
    if math.prod(map(len, candidates)) > _MOST_CHECKED:
        candidates = [(axis.values[0], axis.values[-1]) for axis in axes]
    fields, names = flatten(to_dict(config)), [axis.name for axis in axes]
    for values in itertools.islice(itertools.product(*candidates), _MOST_CHECKED):
        try:
            validate(fields | dict(zip(names, values, strict=True)))
        except UserError as error:
            blamed = [axis for axis in axes if axis.name in str(error)] or axes
            raise UserError(f"{' '.join(f'--try={axis.word}' for axis in blamed)}: {error}") from None


def _listed(axis: Axis) -> Sequence:
    """Return all values of an axis of choices or whole numbers, and the ends of another."""
    if axis.ranged and isinstance(axis.values[0], int):
        return range(axis.values[0], axis.values[1] + 1)
    return axis.values
