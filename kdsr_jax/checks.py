"""Checks of single config values: a check takes a value and returns what is wrong with it, or None."""

import difflib
import itertools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

_LARGEST = 2**31 - 1

Complaint = str | None
Check = Callable[[Any], Complaint]


def not_among(value: str, choices: Sequence[str]) -> str:
    """Say in one line which choices there are, and which one is nearest to the value given."""
    nearest = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"must be one of {', '.join(choices)}{hint}"


def whole(low: int, high: int = _LARGEST) -> Check:
    """Return a check for a whole number from low to high."""

    def check(value: Any) -> Complaint:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"must be a whole number from {low} to {high}"

    return check


def real(low: float = 0.0, *, above: bool = False, high: float = math.inf, below: bool = False) -> Check:
    """Check for a finite number between low and high; ``above`` and ``below`` leave the bounds themselves out."""
    span = f"{'greater than' if above else 'at least'} {low:g}"
    span += "" if high == math.inf else f" and {'less than' if below else 'at most'} {high:g}"

    def check(value: Any) -> Complaint:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = right and (value > low if above else value >= low) and (value < high if below else value <= high)
        return None if right else f"must be a finite number {span}"

    return check


def choice(*choices: str) -> Check:
    """Return a check for one of the choices."""
    return lambda value: None if value in choices else not_among(str(value), choices)


def switch(value: Any) -> Complaint:
    """Check for true or false."""
    return None if isinstance(value, bool) else "must be true or false"


def text(value: Any) -> Complaint:
    """Check for text."""
    return None if isinstance(value, str) else "must be text"


def address(value: Any) -> Complaint:
    """Check for HOST:PORT; "" is fine."""
    right = isinstance(value, str) and (value == "" or re.fullmatch(r"[^\s/]+:\d{1,5}", value))
    return None if right else "must be HOST:PORT, such as 10.0.0.1:12345"


def column(value: Any) -> Complaint:
    """Check for the name of a column."""
    return None if isinstance(value, str) and value.strip() else "must be the name of a column"


def names(value: Any) -> Complaint:
    """Check for names, each once; none is fine."""
    right = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    return None if right and len(set(value)) == len(value) else "must be different names, such as title,brand"


def template(value: Any) -> Complaint:
    """Check for a text with fields in braces, ``{title}`` or ``{title:.100}`` for its first 100 characters; "" is fine."""
    try:
        fields = [field for _, *field in string.Formatter().parse(value) if field[0] is not None]
        right = all(
            re.fullmatch(r"[^\W\d]\w*", name) and re.fullmatch(r"(\.\d+)?", length) and not conversion
            for name, length, conversion in fields
        )
    except (ValueError, TypeError):
        right, fields = False, ()
    right = right and (fields or value == "")
    return None if right else "must be a text with fields in braces, such as '{title}. {plot:.400}'"


def folder_name(value: Any) -> Complaint:
    """Check for the name of a folder."""
    right = isinstance(value, str) and re.fullmatch(r"[\w][\w.-]*", value)
    return None if right else "must be the name of a folder below --config.data.root"


# First parts of other names in the models.
_TAKEN = ("item", "position", "graph", "input", "final", "output", "num", "cluster", "predicts")


def modalities(value: Any) -> Complaint:
    """Check for names <modality>-<encoder>, each modality once."""
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*-[\w.-]+", name)):
            return f"{name!r} is no <modality>-<encoder>, such as text-minilm"
    modalities = [name.partition("-")[0] for name in names]
    taken = [modality for modality in modalities if modality in _TAKEN]
    if taken:
        return f"a modality cannot be called {taken[0]}, a name that the models use otherwise"
    twice = sorted({modality for modality in modalities if modalities.count(modality) > 1})
    return f"names the modality {twice[0]} twice; each modality has one table" if twice else None


def cutoffs(value: Any) -> Complaint:
    """Check for rising whole numbers from 1 on."""
    right = isinstance(value, list) and value and not any(whole(1)(k) for k in value)
    right = right and all(left < k for left, k in itertools.pairwise(value))
    return None if right else f"must be rising whole numbers from 1 to {_LARGEST}, such as 5,10,20"
