"""MMSR: a graph of items and of clusters of their features (Hu et al., CIKM 2023).

Form: nodes are the distinct items of a history and, per modality, the distinct clusters that these items are
linked to. A node's input joins its vector, a vector of its kind and the mean of the position vectors where it occurs. One layer
attends within and across kinds of nodes, in both orders, and gates the two (``models/graph_layers.py``). The representation is
the state of the last item. Cluster vectors are trained; they start as the k-means centres, scaled together to +-1/sqrt(dim),
which ``init_student`` does. All other parameters start uniformly in that interval.

``official_quirks=True`` is what the published numbers were measured with: queries, keys and values are one, and the order
"within first" ignores its first step. False is the intended layer; see ``DualAttention``.
With one official layer, as published, items read their sequence and their own clusters; what links clusters among themselves
acts from a second layer on.

Deviations from the source:
- consecutive items that are equal or already linked both ways still link their clusters (the source skips these);
- an item without a feature is linked to no cluster of it; k-means looks at all items at once (the source: mini-batches);
- several layers have parameters of their own (the source shares them, and publishes one layer);
- the biases of the gate start at zero;
- 30 clusters, three links an item by default (the source's code: 20 and one);
- with tables of modalities an item node holds the fused item vector, whose fusion starts as everywhere; the source's hold ids
  only. What maps features of another width to dim starts like it.
"""

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models import graph
from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import to_width, uniform
from kdsr_jax.models.graph_layers import states_of_items


class MMSR(Backbone):
    """Dual attention over the items of each history and the clusters of their features.

    Attributes:
      clustered: names of the modalities whose clusters are nodes.
      num_clusters: C, clusters a modality.
      table_width: width of the cluster vectors, that of the features they come from.
      official_quirks: as the official code runs, or as it was meant.
    """

    clustered: tuple = ()
    num_clusters: int = 0
    table_width: int = 0
    official_quirks: bool = True

    trained_on = "prefixes"
    has_clusters = True
    initializer = staticmethod(uniform)

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns the states of the item nodes at every position, [B, L, dim]."""
        vectors, shown = {"item": inputs.fused}, {"item": graph.shown_items(inputs.history)}
        for name in self.clustered:
            table = self.param(f"{name}_clusters", uniform(self.dim), (self.num_clusters, self.table_width))
            ids, shown[name] = graph.shown_attributes(inputs.links[name], self.num_clusters)
            vectors[name] = to_width(table, self.dim, f"project_{name}")[jnp.maximum(ids, 0)]
        return states_of_items(self, vectors, shown, inputs.history, deterministic)
