"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), in the form the field compares with.

Form (the RecBole/KDSR one): u = dropout(LN(x + position)), then post-norm Transformer layers of inner width
2 dim with exact GELU; position 0 is the oldest kept item; weights N(0, 0.02^2), biases 0.

Deviations from the source:
- right padding and a full softmax over all items, trained on all positions at once (the original: left padding, one
  sampled negative per position, pre-norm on the query path only);
- no bias in the key projection (it has no effect on the scores);
- with tables of modalities, x is the fused item vector; the source knows ids only.
"""

import flax.linen as nn

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import INITIALIZER
from kdsr_jax.models.layers import TransformerLayer, causal_mask, layer_norm


class SASRec(Backbone):
    """Causal Transformer over the fused item vectors."""

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim]; padding positions hold meaningless values."""
        position = self.param("position_embedding", INITIALIZER, (self.max_length, self.dim))
        x = layer_norm("input_norm")(inputs.fused + position[None, : inputs.fused.shape[1]])
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(x)
        mask = causal_mask(inputs.valid)
        for index in range(self.num_layers):
            layer = TransformerLayer(
                self.dim, self.num_heads, self.hidden_dropout, self.attention_dropout, name=f"layer_{index}"
            )
            x = layer(x, mask, deterministic)
        return x
