"""NOVA: non-invasive self-attention for side information (Liu et al., AAAI 2021), on a causal encoder.

Form: R = dropout(LN(item vectors)) is a stream of item ids alone. Side information, which is the position and
every modality's vector, says only where to look: each layer fuses it with its current R to F and takes
Q = F W_Q, K = F W_K, V = R W_V; residuals, norms and the feed-forward block act on R. The side information itself is the same
in every layer. ``model.fusion``: "sum" adds the streams X_s; "concat" maps their concatenation linearly; "gate", the source's
best, is sum_s G_s X_s with G = sigmoid(X w), a gate per stream and position.

Deviations from the source, whose code is not public:
- causal, and trained on the next item at all positions (the source: bidirectional, masked items, as BERT4Rec), which is how
  DIF-SR's authors compare with it;
- one weight vector w a layer, and no bias in the key projection;
- a modality table of another width than dim is mapped linearly to dim, once for all layers.
"""

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import INITIALIZER, Fusion, to_width
from kdsr_jax.models.flat import Dense
from kdsr_jax.models.layers import TransformerLayer, causal_mask, layer_norm


class NOVA(Backbone):
    """Causal Transformer over item ids, whose queries and keys know the side information too."""

    fused = False

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim]; padding positions hold meaningless values."""
        items = inputs.vectors["item"]
        position = self.param("position_embedding", INITIALIZER, (self.max_length, self.dim))
        sides = {"position": jnp.broadcast_to(position[None, : items.shape[1]], items.shape)}
        sides |= {name: to_width(inputs.vectors[name], self.dim, f"project_{name}") for name in self.modalities}
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(layer_norm("input_norm")(items))
        mask = causal_mask(inputs.valid)
        for index in range(self.num_layers):
            context = self._fuse({"item": x} | sides, f"fuse_{index}")
            layer = TransformerLayer(
                self.dim, self.num_heads, self.hidden_dropout, self.attention_dropout, name=f"layer_{index}"
            )
            x = layer(x, mask, deterministic, context)
        return x

    def _fuse(self, streams, name):
        """Fuse streams, each [B, L, dim], to [B, L, dim]."""
        if self.fusion != "gate":
            return Fusion(self.dim, self.fusion, name=name)(streams)
        stacked = jnp.stack(list(streams.values()), axis=-2)
        gates = nn.sigmoid(Dense(1, use_bias=False, kernel_init=INITIALIZER, name=name)(stacked))
        return (gates * stacked).sum(-2)
