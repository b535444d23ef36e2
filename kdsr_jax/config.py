"""What a config may say: variants of a dataset's config, validation, and the fingerprint of a run.

A config is an ``ml_collections.ConfigDict`` with the fields of ``configs/default.py``. Nothing here imports jax.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdsr_jax.errors import UserError

# Backbone -> the kind of modality tables it was published with; keys in the order of the paper's Table 2.
BACKBONES = {"sasrec": "none", "sasrm": "frozen"}

# Where the data lies says nothing about what comes out.
NOT_FINGERPRINTED = ("data.root",)

_LARGEST = 2**31 - 1

Complaint = str | None
Check = Callable[[Any], Complaint]


def apply_variant(config: Any, argument: str | None) -> Any:
    """Turn a dataset's KDSR config into the variant that stands behind the colon of ``--config=FILE:VARIANT``.

    Rows of the paper's Table 2 and Figure 3. ``NAME`` is the backbone as published: its own kind of modality tables,
    no distillation, no ramp. ``tuned-NAME`` trains the tables and keeps the ramp. ``kdsr-NAME`` adds distillation.

    Args:
        config: the dataset's config, KDSR; changed in place.
        argument: the variant, or None to leave the config as it is.

    Returns:
        The same config.

    Raises:
        UserError: if the argument names no variant.
    """
    if argument is None:
        return config
    kind, _, name = argument.partition("-")
    if kind not in ("kdsr", "tuned"):
        kind, name = "published", argument
    if name not in BACKBONES:
        choices = [prefix + backbone for prefix in ("", "kdsr-", "tuned-") for backbone in BACKBONES]
        raise UserError(f"--config=FILE:{argument}: the variant {not_among(argument, choices)}")
    config.model.name = name
    config.model.tables = BACKBONES[name] if kind == "published" else "tuned"
    config.distill.enabled = kind == "kdsr"
    if kind == "published":
        config.train.ramp_epochs = 0
    return config


def validate(config: Any) -> None:
    """Check every field of a config and the rules between fields, before anything is loaded or compiled.

    Args:
        config: the config as the flags left it.

    Raises:
        UserError: naming the flag, its value and what it may be, for the first field that is wrong.
    """
    fields = flatten(to_dict(config))
    for name in fields:
        if name not in FIELDS:
            raise UserError(unknown_field(name))
    for name, check in FIELDS.items():
        if name not in fields:
            raise UserError(f"--config.{name}: missing; start from get_config() of configs/default.py")
        complaint = check(fields[name])
        if complaint:
            raise _error(fields, name, complaint)
    for rule in (_check_data, _check_tables, _check_widths):
        rule(fields)


def unknown_field(name: str) -> str:
    """Say in one line that no field, or only a group, has this dotted name, and which field is nearest."""
    inside = [field for field in FIELDS if field.startswith(name + ".")]
    if inside:
        return f"--config.{name}: is a group of fields; set one of them, such as --config.{inside[0]}"
    # The right field in the wrong group, or without its group, is the commonest slip.
    same_leaf = [field for field in FIELDS if field.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = same_leaf or difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean --config.{nearest[0]}?" if nearest else "configs/default.py lists all fields"
    return f"--config.{name}: unknown config field; {hint}"


def not_among(value: str, choices: Sequence[str]) -> str:
    """Say in one line which choices there are, and which one is nearest to the value given."""
    nearest = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"must be one of {', '.join(choices)}{hint}"


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested plain dictionaries, lists, numbers and strings, ready for JSON."""
    return _plain(config.to_dict() if hasattr(config, "to_dict") else config)


def fingerprint(config: Any) -> str:
    """Return the sha256 of everything in a config that can change a result, as 64 hexadecimal digits.

    Args:
        config: a config, or the dictionary that ``to_dict`` made of one.

    Returns:
        The digest; equal for configs that differ only in where the data lies.
    """
    canonical = json.dumps(_relevant(to_dict(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the fields in which two configs differ, leaving out what the fingerprint leaves out.

    Args:
        saved: the dictionary of the config a run was started with.
        current: the dictionary of the config it is asked to go on with.

    Returns:
        One ``key: saved -> current`` a field, by name; a field that one side lacks reads ``absent`` there.
    """
    before, after = _relevant(saved), _relevant(current)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return [f"{name}: {_shown(before, name)} -> {_shown(after, name)}" for name in names]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries under dotted names, in their order."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _relevant(nested: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flatten(_plain(nested)).items() if name not in NOT_FINGERPRINTED}


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "absent"


def _error(fields: Mapping[str, Any], name: str, complaint: str) -> UserError:
    value = fields[name]
    shown = ",".join(map(str, value)) if isinstance(value, list) else value
    return UserError(f"--config.{name}={shown}: {complaint}")


def _whole(low: int, high: int = _LARGEST) -> Check:
    def check(value: Any) -> Complaint:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"must be a whole number from {low} to {high}"

    return check


def _real(low: float = 0.0, *, above: bool = False, high: float = math.inf, below: bool = False) -> Check:
    """Check for a finite number between low and high; ``above`` and ``below`` leave the bounds themselves out."""
    span = f"{'greater than' if above else 'at least'} {low:g}"
    span += "" if high == math.inf else f" and {'less than' if below else 'at most'} {high:g}"

    def check(value: Any) -> Complaint:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = right and (value > low if above else value >= low) and (value < high if below else value <= high)
        return None if right else f"must be a finite number {span}"

    return check


def _choice(*choices: str) -> Check:
    return lambda value: None if value in choices else not_among(str(value), choices)


def _switch(value: Any) -> Complaint:
    return None if isinstance(value, bool) else "must be true or false"


def _text(value: Any) -> Complaint:
    return None if isinstance(value, str) else "must be text"


def _folder_name(value: Any) -> Complaint:
    right = isinstance(value, str) and re.fullmatch(r"[\w][\w.-]*", value)
    return None if right else "must be the name of a folder below --config.data.root"


def _modalities(value: Any) -> Complaint:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*-[\w.-]+", name)):
            return f"{name!r} is no <modality>-<encoder>, such as text-minilm"
    modalities = [name.partition("-")[0] for name in names]
    if "item" in modalities:
        return "a modality cannot be called item, which is the table of item ids"
    twice = sorted({modality for modality in modalities if modalities.count(modality) > 1})
    return f"names the modality {twice[0]} twice; each modality has one table" if twice else None


def _cutoffs(value: Any) -> Complaint:
    right = isinstance(value, list) and value and not any(_whole(1)(k) for k in value)
    right = right and all(left < k for left, k in itertools.pairwise(value))
    return None if right else f"must be rising whole numbers from 1 to {_LARGEST}, such as 5,10,20"


def _check_data(fields: Mapping[str, Any]) -> None:
    planted = fields["data.source"] == "planted" or (fields["data.source"], fields["data.name"]) == ("auto", "planted")
    if not planted and not fields["data.root"]:
        raise UserError(
            f"--config.data.root is missing; give the folder that holds {fields['data.name']}/interactions.*"
        )
    if fields["data.window_stride"] > fields["data.max_length"]:
        longest = fields["data.max_length"]
        raise _error(fields, "data.window_stride", f"must be at most --config.data.max_length={longest}")
    items = fields["data.planted.num_items"]
    if fields["data.planted.mean_length"] > items / 3:
        advice = f"must be at most a third of --config.data.planted.num_items={items}"
        raise _error(fields, "data.planted.mean_length", advice)


def _check_tables(fields: Mapping[str, Any]) -> None:
    tables, distilled = fields["model.tables"], fields["distill.enabled"]
    if tables != "none" and not fields["data.modalities"]:
        switches = "--config.model.tables=none" + (" --config.distill.enabled=false" if distilled else "")
        advice = f"--config.model.tables={tables} need a modality; item ids alone are FILE:sasrec, or {switches}"
        raise _error(fields, "data.modalities", advice)
    if distilled and tables != "tuned":
        published = next(name for name, kind in BACKBONES.items() if kind == tables)
        advice = f"without distillation, --config.distill.enabled=false or FILE:{published}"
        advice += f"; with it, --config.model.tables=tuned or FILE:kdsr-{fields['model.name']}"
        raise _error(fields, "model.tables", f"only tuned tables can be distilled; {advice}")


def _check_widths(fields: Mapping[str, Any]) -> None:
    dim = fields["model.dim"]
    if dim % fields["model.num_heads"]:
        raise _error(fields, "model.num_heads", f"must divide --config.model.dim={dim}")
    width = fields["teacher.condensed_dim"] or dim
    if fields["model.tables"] != "none" and width % fields["teacher.num_splits"]:
        source = "teacher.condensed_dim" if fields["teacher.condensed_dim"] else "model.dim"
        raise _error(fields, "teacher.num_splits", f"must divide the condensed width, --config.{source}={width}")


# Every field and what it may hold, in the order of configs/default.py; rules between fields are above.
FIELDS: dict[str, Check] = {
    "seed": _whole(0),
    "data.name": _folder_name,
    "data.source": _choice("auto", "folder", "planted"),
    "data.root": _text,
    "data.k_core": _whole(1),
    "data.max_length": _whole(2),
    "data.window_stride": _whole(0),
    "data.modalities": _modalities,
    "data.planted.num_users": _whole(1),
    "data.planted.num_items": _whole(18),
    "data.planted.mean_length": _real(6),
    "data.planted.entanglement": _real(high=1),
    "data.planted.noise": _real(),
    "data.planted.missing_rate": _real(high=1),
    "data.planted.cold_rate": _real(high=0.5),
    "data.planted.feature_dim": _whole(8),
    "data.planted.seed": _whole(0),
    "teacher.condensed_dim": _whole(0),
    "teacher.autoencoder": _choice("linear", "pca", "sigmoid"),
    "teacher.rotation": _choice("balanced", "random", "none"),
    "teacher.score_fn": _choice("cosine", "dot", "euclidean", "manhattan"),
    "teacher.num_splits": _whole(1),
    "teacher.num_codes": _whole(2, 65535),
    "teacher.quantizer": _choice("vq", "kmeans", "vq_joint"),
    "teacher.num_pairs": _whole(1),
    "teacher.seed": _whole(0),
    "distill.enabled": _switch,
    "distill.lambda_score": _real(),
    "distill.lambda_code": _real(),
    "distill.temperature": _real(above=True),
    "distill.sigma": _choice("sigmoid", "softmax", "identity"),
    "distill.pair_budget": _whole(0),
    "model.name": _choice(*BACKBONES),
    "model.tables": _choice("tuned", "frozen", "none"),
    "model.dim": _whole(1),
    "model.num_layers": _whole(1),
    "model.num_heads": _whole(1),
    "model.hidden_dropout": _real(high=1, below=True),
    "model.attention_dropout": _real(high=1, below=True),
    "model.fusion": _choice("gate", "concat", "sum"),
    "model.readout": _choice("last", "last_sum", "mean", "long_short"),
    "model.short_term": _whole(1),
    "model.item_scores": _choice("ids", "fused"),
    "model.table_scale": _real(above=True),
    "train.epochs": _whole(1, 100_000),
    "train.batch_size": _whole(1, 1_000_000),
    "train.learning_rate": _real(above=True),
    "train.weight_decay": _real(),
    "train.clip_norm": _real(),
    "train.ramp_epochs": _whole(0, 10_000),
    "train.ramp_start": _real(high=1),
    "train.steps_per_call": _whole(1, 10_000),
    "train.patience": _whole(1),
    "eval.protocol": _choice("validation", "paper", "both"),
    "eval.every": _whole(1),
    "eval.topk": _cutoffs,
    "eval.filter_seen": _switch,
}
