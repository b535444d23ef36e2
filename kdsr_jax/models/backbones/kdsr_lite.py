"""KDSR's backbone as its official code runs it: relational attention on the ids, then a gate over all that is known of an item.

Form: nodes are the distinct items of a history; a relational attention layer on the id vectors weighs a node's
neighbours by LeakyReLU(a_r . (x_i * x_j)) c_r, where r says whether j is i itself, follows it, precedes it, or both. A softmax
gate with a shared MLP fuses {id, result of the layer, modalities} (``model.fusion``). No positions, no residual. Its own readout
is the sum of the last two positions, ``model.readout="last_sum"``. The layer's parameters start uniformly in +-1/sqrt(dim).

Deviations from the source:
- dropout on attention weights comes after the softmax (the source drops logits before it, so nodes that are no neighbours, and
  padding, leak in while training);
- ``num_layers`` layers, one after the other, with parameters of their own (the source has one).
"""

import flax.linen as nn

from kdsr_jax.models import graph
from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import Fusion
from kdsr_jax.models.graph_layers import RelationalAttention


class KDSRLite(Backbone):
    """Relational attention over the distinct items of each history and a fusion with the modality vectors."""

    trained_on = "prefixes"
    fused = False

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns the node states at every position, [B, L, dim]."""
        relations = graph.relations([graph.shown_items(inputs.history)])
        nodes = inputs.vectors["item"]
        for index in range(self.num_layers):
            layer = RelationalAttention(self.dim, self.attention_dropout, name=f"layer_{index}")
            nodes = layer(nodes, relations, deterministic)
        known = {"item": inputs.vectors["item"], "graph": nodes} | {n: inputs.vectors[n] for n in self.modalities}
        fused = Fusion(self.dim, self.fusion, name="fuse")(known)
        fused = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(fused)  # one mask a node
        return graph.at_positions(fused, inputs.history)
