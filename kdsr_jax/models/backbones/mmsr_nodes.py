"""The graph backbone as the KDSR paper describes it (Section 3.1): MMSR with nodes for each item's own modality vectors.

Form: every distinct item of a history has a node for its id and one for each modality whose feature it has, so
at most (1 + M) n nodes; edges and layers are those of MMSR (``models/graph_layers.py``). Its own readout is Eq. 6 over the item
nodes, ``model.readout="long_short"``.

Deviations from the source: the released code of KDSR does not hold this model (``kdsr_lite`` is what it runs), so there is
nothing to deviate from but the text, which leaves out
- what a layer computes: taken from MMSR, whose deviations hold here too;
- positions and kinds of nodes: joined as in MMSR;
- items without a feature: they lack the node of that modality.
"""

import flax.linen as nn

from kdsr_jax.models import graph
from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import to_width, uniform
from kdsr_jax.models.graph_layers import states_of_items


class MMSRNodes(Backbone):
    """Dual attention over the ids and the modality vectors of each history's items.

    Attributes:
      official_quirks: the layer as the official code of MMSR runs, or as it was meant; see ``DualAttention``.
    """

    official_quirks: bool = True

    trained_on = "prefixes"
    fused = False
    initializer = staticmethod(uniform)

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns the states of the item nodes at every position, [B, L, dim]."""
        vectors, shown = {"item": inputs.vectors["item"]}, {"item": graph.shown_items(inputs.history)}
        for name in self.modalities:
            vectors[name] = to_width(inputs.vectors[name], self.dim, f"project_{name}")
            shown[name] = shown["item"] & inputs.present[name][..., None]
        return states_of_items(self, vectors, shown, inputs.history, deterministic)
