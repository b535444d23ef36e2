"""Clusters of features: who is linked to which, nearest first, and what is refused."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax.clusters import item_facts
from kdsr_jax.errors import UserError
from kdsr_jax.teacher import Teacher

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Six items around the corners; item 3 has no feature, and neither has padding.
POINTS = np.array([[0, 0], [0.1, 0], [9, 0.1], [0, 0], [0, 4], [8.9, 0], [0, 0.1]], np.float32)
COVERED = np.array([False, True, True, False, True, True, True])


def facts_of(num_clusters, cluster_links, clustered=True):
    teacher = Teacher(jnp.asarray(POINTS), jnp.asarray(COVERED), jnp.zeros((1, 1)))
    settings = types.SimpleNamespace(num_clusters=num_clusters, cluster_links=cluster_links)
    return item_facts({"image": teacher}, clustered, settings, seed=0)["image"]


def test_items_are_linked_to_their_nearest_clusters_nearest_first():
    facts = facts_of(3, 2)
    centres, links = np.asarray(facts.centres), np.asarray(facts.links)
    # The mean of each corner's items, in any order.
    expected = np.array([[0.05, 0.05], [8.95, 0.05], [0, 4]])
    order = [int(np.argmin(((centres - corner) ** 2).sum(1))) for corner in expected]
    np.testing.assert_allclose(centres[order], expected, atol=1e-5)
    assert links.dtype == np.int32 and links.shape == (7, 2)
    for item in np.flatnonzero(COVERED):
        by_distance = np.argsort(((centres - POINTS[item]) ** 2).sum(1))
        np.testing.assert_array_equal(links[item], by_distance[:2])
    np.testing.assert_array_equal(links[~COVERED], -1)  # no feature, no cluster; its zero row moves no centre
    np.testing.assert_array_equal(facts.has_feature, COVERED)


def test_as_many_clusters_as_covered_items_are_the_most():
    assert facts_of(5, 1).centres.shape == (5, 2)
    with pytest.raises(UserError, match=r"--config.model.num_clusters=6: only 5 items have image features"):
        facts_of(6, 1)


def test_without_clusters_only_the_features_are_known():
    facts = facts_of(6, 1, clustered=False)
    np.testing.assert_array_equal(facts.has_feature, COVERED)
    assert facts.links is None and facts.centres is None
