"""Clusters of a modality's condensed features, which some models read as discrete attributes of items."""

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.errors import UserError
from kdsr_jax.models.student import Facts
from kdsr_jax.ops import quantize
from kdsr_jax.teacher import KMEANS_ITERATIONS


def item_facts(teachers, clustered, settings, seed):
    """State what is known of each modality's items: who has the feature and, if wanted, the clusters of the features.

    Args:
      teachers: dict modality -> Teacher, whose condensed features are clustered.
      clustered: whether clusters are wanted.
      settings: the config's model group; ``num_clusters`` (C) and ``cluster_links`` (k) are read.
      seed: of the clusters.

    Returns:
      dict modality -> Facts.

    Raises:
      UserError: a modality covers fewer items than there are to be clusters.
    """
    if not clustered:
        return {name: Facts(teacher.has_feature) for name, teacher in teachers.items()}
    with jax.default_matmul_precision("float32"):  # as the teacher's
        return {name: _cluster(name, teacher, settings, seed) for name, teacher in teachers.items()}


def _cluster(name, teacher, settings, seed):
    covered = np.flatnonzero(teacher.has_feature)
    if len(covered) < settings.num_clusters:
        raise UserError(
            f"--config.model.num_clusters={settings.num_clusters}: only {len(covered)} items have {name} features; lower it"
        )
    vectors = teacher.condensed[covered]
    centres = quantize.kmeans(jax.random.key(seed), vectors, settings.num_clusters, KMEANS_ITERATIONS)
    distance = jnp.sum(vectors**2, 1, keepdims=True) - 2 * vectors @ centres.T + jnp.sum(centres**2, 1)[None]
    nearest = jax.lax.top_k(-distance, settings.cluster_links)[1].astype(jnp.int32)
    links = jnp.full((len(teacher.has_feature), settings.cluster_links), -1, jnp.int32).at[covered].set(nearest)
    return Facts(teacher.has_feature, links, centres)
