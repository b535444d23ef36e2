"""From a config to the Student that it describes; nothing is allocated."""

import jax

from kdsr_jax.config import needs_clusters
from kdsr_jax.models.student import FrozenDict, Student

# Fields of the model group that some backbones alone read.
OPTIONS = {"mmsr": ("official_quirks",), "mmsr_nodes": ("official_quirks",), "mmsrec": ("score_temperature",)}
# train.matmul_precision -> what jax calls it.
_PRECISIONS = {"default": None, "float32": "float32", "tf32": "tensorfloat32", "bf16": "BF16_BF16_F32"}
_SAME = ("dim", "num_layers", "num_heads", "hidden_dropout", "attention_dropout", "fusion", "readout", "short_term")


def precision(config):
    """Return the context in which a run trains, ranks and recommends: what the inputs of matrix products are rounded to."""
    return jax.default_matmul_precision(_PRECISIONS[config.train.matmul_precision])


def table_width(config):
    """Return the width of the condensed features and the modality tables."""
    return config.teacher.condensed_dim or config.model.dim


def modality_names(config):
    """Return (names of the modalities with a table, names of those with clusters), two tuples in the order of the config."""
    names = tuple(entry.partition("-")[0] for entry in config.data.modalities)
    clustered = needs_clusters(config.model.name, config.model.cluster_weight)
    return names if config.model.tables != "none" else (), names if clustered else ()


def make_student(config, num_items):
    """Lay a Student out.

    Args:
      config: the whole config.
      num_items: N.

    Returns:
      Student.
    """
    model, (modalities, clustered) = config.model, modality_names(config)
    return Student(
        num_items=num_items,
        modalities=modalities,
        backbone=model.name,
        options=FrozenDict({name: model[name] for name in OPTIONS.get(model.name, ())}),  # hashable, for jit
        tuned=model.tables == "tuned",
        table_width=table_width(config),
        max_length=config.data.max_length,
        item_scores=model.item_scores,
        clustered=clustered,
        num_clusters=model.num_clusters if clustered else 0,
        cluster_links=model.cluster_links,
        predicts_clusters=model.cluster_weight > 0,
        num_codes=config.teacher.num_codes if config.distill.enabled else 0,
        **{name: model[name] for name in _SAME},
    )
