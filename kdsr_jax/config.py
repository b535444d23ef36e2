"""What a config may say: variants of a dataset's config, validation, and the fingerprint of a run.

A config is an ``ml_collections.ConfigDict`` with the fields of ``configs/default.py``. Nothing here imports jax.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kdsr_jax.catalogue import PUBLIC, names_of
from kdsr_jax.checks import not_among
from kdsr_jax.errors import UserError
from kdsr_jax.fields import COLUMNS, ENCODE, MESH, make_fields

_GRAPH = {"num_layers": 1, "hidden_dropout": 0.4, "attention_dropout": 0.2}
# Backbone -> the settings of the model group that it was published with, or one choice where these differ by data set
# (mmsrec, difsr: heads and layers; mmsr: clusters), in the order of the paper's Table 2. "tables" is the kind of modality tables; what is not named stays as the dataset's config has it.
BACKBONES: dict[str, dict[str, Any]] = {
    "gru4rec": {"tables": "none", "num_layers": 1, "hidden_dropout": 0.3},
    "sasrec": {"tables": "none"},
    "srgnn": {"tables": "none", "num_layers": 1, "hidden_dropout": 0.0, "readout": "attention"},
    "mmsrec": {"tables": "frozen", "num_heads": 4},
    "sasrm": {"tables": "frozen"},
    "nova": {"tables": "tuned"},
    "difsr": {"tables": "tuned", "num_heads": 4, "attention_dropout": 0.3},
    "trans2d": {"tables": "tuned", "num_layers": 1, "num_heads": 4, "hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mmsr": {"tables": "none"} | _GRAPH,
    "mmsr_nodes": {"tables": "tuned", "readout": "long_short"} | _GRAPH,
    "kdsr_lite": {"tables": "tuned", "readout": "last_sum"} | _GRAPH,
}
CLUSTERED = ("mmsr",)  # backbones that read clusters of the modalities' features, whatever their tables
FUSED = ("gru4rec", "sasrec", "srgnn", "sasrm", "mmsr")  # backbones that read one fused vector an item
FUSING = ("nova", "difsr", "kdsr_lite")  # backbones that fuse something of their own by model.fusion, tables or not
WITHOUT_IDS = ("mmsrec",)
WITHOUT_ATTENTION = ("gru4rec", "srgnn")  # backbones that do not read model.attention_dropout
NOT_READ_OUT = ("mmsrec",)  # backbones whose states are representations already
CONTRASTIVE = ("mmsrec",)  # backbones that know a contrastive warm-up

# Where the data lies and what its columns are called, how features are made, what is measured beside training, how it is
# shown and on which devices say nothing about what comes out of given data; a run is tied to its data besides.
_VIEWS = ("forgetting.num_pairs", "forgetting.reference_workdir", "log.tensorboard")
NOT_FINGERPRINTED = ("data.root", "data.manual_dir", "data.histories", *COLUMNS, *ENCODE, *MESH, *_VIEWS)
FIELDS = make_fields(BACKBONES)


def apply_variant(config: Any, argument: str | None) -> Any:
    """Turn a dataset's KDSR config into the variant that stands behind the colon of ``--config=FILE:VARIANT``.

    Rows of the paper's Table 2 and Figure 3. ``NAME`` is the backbone with the settings it was published with
    (``BACKBONES``), its own kind of modality tables among them, no distillation, no ramp. ``tuned-NAME`` trains the tables
    and keeps the ramp. ``kdsr-NAME`` adds distillation.

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
    config.model.update(BACKBONES[name])
    if kind != "published":
        config.model.tables = "tuned"
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
    for rule in (_check_data, _check_tables, _check_backbone, _check_widths, _check_sparse, _check_processes):
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


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested plain dictionaries, lists, numbers and strings, ready for JSON."""
    return _plain(config.to_dict() if hasattr(config, "to_dict") else config)


def from_dict(saved: Mapping[str, Any]) -> Any:
    """Return the config that ``to_dict`` made a dictionary of.

    Raises:
        UserError: as ``validate``, for what another version has written.
    """
    import ml_collections

    config = ml_collections.ConfigDict(_with_tuples(saved), convert_dict=True)
    validate(config)
    return config


def _with_tuples(value: Any) -> Any:
    """Undo what JSON makes of tuples; configs hold no lists."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def fingerprint(config: Any) -> str:
    """Return the sha256 of everything in a config that can change a result, as 64 hexadecimal digits.

    Args:
        config: a config, or the dictionary that ``to_dict`` made of one.

    Returns:
        The digest; equal for configs that differ only in ``NOT_FINGERPRINTED``.
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


def _check_data(fields: Mapping[str, Any]) -> None:
    source, name, entries = fields["data.source"], fields["data.name"], fields["data.modalities"]
    columns = [fields[f"data.columns.{column}"] for column in ("user_id", "item_id", "timestamp")]
    if len(set(columns)) < len(columns):
        raise UserError(
            f"--config.data.columns: user_id, item_id and timestamp must be three columns, not {', '.join(columns)}"
        )
    if names_of(source) and name not in names_of(source):
        raise _error(fields, "data.source", f"has {', '.join(names_of(source))}, not --config.data.name={name}")
    if not fields["data.root"] and source != "planted" and (source, name) != ("auto", "planted"):
        featured = entries and _reads_features(fields)
        wanted = f"features/{entries[0]}.npz; FILE:sasrec needs none" if featured else ""
        if wanted or source == "folder" or name not in PUBLIC:
            wanted = wanted if name in PUBLIC and source != "folder" else "interactions.*"
            raise UserError(f"--config.data.root is missing; give the folder that holds {name}/{wanted}")
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
        published = {"frozen": "sasrm", "none": "sasrec"}[tables]
        advice = f"without distillation, --config.distill.enabled=false or FILE:{published}"
        advice += f"; with it, --config.model.tables=tuned or FILE:kdsr-{fields['model.name']}"
        raise _error(fields, "model.tables", f"only tuned tables can be distilled; {advice}")
    if (fields["teacher.quantizer"], fields["teacher.autoencoder"]) == ("vq_joint", "sigmoid"):
        raise _error(
            fields,
            "teacher.autoencoder",
            "vq_joint trains a linear encoder; take linear or pca with it, or another quantizer",
        )


def _check_backbone(fields: Mapping[str, Any]) -> None:
    name, tables = fields["model.name"], fields["model.tables"]
    if name in WITHOUT_IDS and tables == "none":
        raise _error(fields, "model.tables", f"{name} has no item ids; it needs tables, tuned or frozen")
    if needs_clusters(name, fields["model.cluster_weight"]) and not fields["data.modalities"]:
        raise _error(fields, "data.modalities", "clusters of items need the features of a modality")
    if fields["model.cluster_links"] > fields["model.num_clusters"]:
        most = fields["model.num_clusters"]
        raise _error(fields, "model.cluster_links", f"must be at most --config.model.num_clusters={most}")
    if name not in FUSED and fields["model.item_scores"] != "ids":
        raise _error(fields, "model.item_scores", f"{name} has no fused item vectors; only {', '.join(FUSED)} have")
    if name not in (*FUSED, *FUSING) and fields["model.fusion"] != "gate":
        raise _error(fields, "model.fusion", f"must be left at gate; {name} fuses nothing by it")
    if name in NOT_READ_OUT and fields["model.readout"] != "last":
        raise _error(fields, "model.readout", f"must be last; what {name} has at its mask item is not read out")
    if fields["model.warmup_epochs"] and name not in CONTRASTIVE:
        advice = f"must be 0; only {', '.join(CONTRASTIVE)} has a contrastive warm-up, {name} has none"
        raise _error(fields, "model.warmup_epochs", advice)
    if fields["model.warmup_epochs"] >= fields["train.epochs"]:
        advice = (
            f"must be less than --config.train.epochs={fields['train.epochs']}; a warm-up trains no recommendations"
        )
        raise _error(fields, "model.warmup_epochs", advice)


def entries_read(config: Any) -> tuple[str, ...]:
    """Return the entries of data.modalities whose features a config's model reads: all of them, or none."""
    model = config.model
    return tuple(config.data.modalities) if reads_features(model.name, model.tables, model.cluster_weight) else ()


def reads_features(name: str, tables: str, cluster_weight: float) -> bool:
    """Say whether a model, by its config fields, reads features of items, as tables or for clusters."""
    return tables != "none" or needs_clusters(name, cluster_weight)


def needs_clusters(name: str, cluster_weight: float) -> bool:
    """Say whether a model, by its config fields, reads clusters of items' features, which it does even without tables."""
    return name in CLUSTERED or cluster_weight > 0


def _reads_features(fields: Mapping[str, Any]) -> bool:
    return reads_features(*(fields[f"model.{name}"] for name in ("name", "tables", "cluster_weight")))


def _check_widths(fields: Mapping[str, Any]) -> None:
    dim = fields["model.dim"]
    if dim % fields["model.num_heads"]:
        raise _error(fields, "model.num_heads", f"must divide --config.model.dim={dim}")
    width = fields["teacher.condensed_dim"] or dim
    if _reads_features(fields) and width % fields["teacher.num_splits"]:
        source = "teacher.condensed_dim" if fields["teacher.condensed_dim"] else "model.dim"
        raise _error(fields, "teacher.num_splits", f"must divide the condensed width, --config.{source}={width}")


def _check_sparse(fields: Mapping[str, Any]) -> None:
    if not fields["train.sparse_tables"]:
        return
    if not fields["train.sampled_items"]:
        advice = "needs --config.train.sampled_items=K; a softmax over all items touches every row"
        raise _error(fields, "train.sparse_tables", advice)
    if fields["mesh.model"] > 1:
        advice = (
            f"needs whole tables on every device, not --config.mesh.model={fields['mesh.model']}; spread batches alone"
        )
        raise _error(fields, "train.sparse_tables", advice)


def _check_processes(fields: Mapping[str, Any]) -> None:
    coordinator, processes = fields["mesh.coordinator"], fields["mesh.num_processes"]
    if not coordinator and (processes, fields["mesh.process"]) != (1, 0):
        name = "mesh.num_processes" if processes != 1 else "mesh.process"
        advice = (
            "needs --config.mesh.coordinator=HOST:PORT; under Slurm and the like, --config.mesh.distributed=true does"
        )
        raise _error(fields, name, advice)
    if fields["mesh.process"] >= processes:
        raise _error(fields, "mesh.process", f"must be less than --config.mesh.num_processes={processes}")
    if fields["encode.missing"] and (coordinator or fields["mesh.distributed"]):
        advice = "several processes do not encode; make the features with python -m kdsr_jax.encode first"
        raise _error(fields, "encode.missing", advice)
