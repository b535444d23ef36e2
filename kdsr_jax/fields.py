"""Every field of a config and what it may hold, by dotted name; rules between fields are in config.py."""

from collections.abc import Iterable

from kdsr_jax.checks import (
    Check,
    address,
    choice,
    column,
    cutoffs,
    folder_name,
    modalities,
    names,
    real,
    switch,
    template,
    text,
    whole,
)

COLUMNS = tuple(f"data.columns.{name}" for name in ("user_id", "item_id", "timestamp", "title"))
_ENCODE = {
    "missing": switch,
    "text_fields": names,
    "field_characters": whole(1),
    "template": template,
    "layer": whole(-1000, 1000),
    "batch_size": whole(1, 65536),
    "revision": text,
    "models_folder": text,
    "trust_remote_code": switch,
}
ENCODE = tuple(f"encode.{name}" for name in _ENCODE)
_MESH = {
    "data": whole(0),
    "model": whole(0),
    "distributed": switch,
    "coordinator": address,
    "num_processes": whole(1),
    "process": whole(0),
}
MESH = tuple(f"mesh.{name}" for name in _MESH)


def make_fields(backbones: Iterable[str]) -> dict[str, Check]:
    """Return the check of every field, in the order of configs/default.py; backbones are the choices of model.name."""
    return {**_BEFORE, "model.name": choice(*backbones), **_BEHIND}


_BEFORE: dict[str, Check] = {
    "seed": whole(0),
    "data.name": folder_name,
    "data.source": choice("auto", "folder", "planted", "movielens", "amazon"),
    "data.root": text,
    "data.manual_dir": text,
    "data.k_core": whole(1),
    "data.user_fraction": real(high=1, above=True),
    "data.max_length": whole(2),
    "data.window_stride": whole(0),
    "data.modalities": modalities,
    "data.histories": choice("auto", "device", "host"),
    **dict.fromkeys(COLUMNS, column),
    "data.planted.num_users": whole(1),
    "data.planted.num_items": whole(18),
    "data.planted.mean_length": real(6),
    "data.planted.entanglement": real(high=1),
    "data.planted.noise": real(),
    "data.planted.missing_rate": real(high=1),
    "data.planted.cold_rate": real(high=0.5),
    "data.planted.feature_dim": whole(8),
    "data.planted.seed": whole(0),
    **{f"encode.{name}": check for name, check in _ENCODE.items()},
    "teacher.condensed_dim": whole(0),
    "teacher.autoencoder": choice("linear", "pca", "sigmoid"),
    "teacher.rotation": choice("balanced", "random", "none"),
    "teacher.score_fn": choice("cosine", "dot", "euclidean", "manhattan"),
    "teacher.num_splits": whole(1),
    "teacher.num_codes": whole(2, 65535),
    "teacher.quantizer": choice("vq", "kmeans", "vq_joint"),
    "teacher.num_pairs": whole(1),
    "teacher.seed": whole(0),
    "distill.enabled": switch,
    "distill.lambda_score": real(),
    "distill.lambda_code": real(),
    "distill.temperature": real(above=True),
    "distill.sigma": choice("sigmoid", "softmax", "identity"),
    "distill.pair_budget": whole(0),
}
_BEHIND: dict[str, Check] = {
    "model.tables": choice("tuned", "frozen", "none"),
    "model.dim": whole(1),
    "model.num_layers": whole(1),
    "model.num_heads": whole(1),
    "model.hidden_dropout": real(high=1, below=True),
    "model.attention_dropout": real(high=1, below=True),
    "model.fusion": choice("gate", "concat", "sum"),
    "model.readout": choice("last", "last_sum", "mean", "long_short", "attention"),
    "model.short_term": whole(1),
    "model.item_scores": choice("ids", "fused"),
    "model.table_scale": real(above=True),
    "model.num_clusters": whole(1),
    "model.cluster_links": whole(1),
    "model.cluster_weight": real(),
    "model.official_quirks": switch,
    "model.score_temperature": real(above=True),
    "model.warmup_epochs": whole(0, 10_000),
    "train.epochs": whole(1, 100_000),
    "train.batch_size": whole(1, 1_000_000),
    "train.sampled_items": whole(0, 10_000_000),
    "train.sparse_tables": switch,
    "train.prefixes": switch,
    "train.learning_rate": real(above=True),
    "train.weight_decay": real(),
    "train.clip_norm": real(),
    "train.ramp_epochs": whole(0, 10_000),
    "train.ramp_start": real(high=1),
    "train.ramp_end": real(above=True, high=1),
    "train.steps_per_call": whole(1, 10_000),
    "train.matmul_precision": choice("default", "float32", "tf32", "bf16"),
    "train.patience": whole(1),
    "eval.protocol": choice("validation", "paper", "both"),
    "eval.every": whole(1),
    "eval.topk": cutoffs,
    "eval.filter_seen": switch,
    **{f"mesh.{name}": check for name, check in _MESH.items()},
    "forgetting.num_pairs": whole(0, 10_000_000),
    "forgetting.reference_workdir": text,
    "log.tensorboard": switch,
}
