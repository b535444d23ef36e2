"""DIF-SR: decoupled side information fusion (Xie, Zhou and Kim, SIGIR 2022), with modalities as attributes.

Form: R = dropout(LN(item vectors)), a stream of item ids alone. In every layer the item stream, the position
and each modality have projections and a score matrix of their own, S_s = Q_s K_s^T per head; the matrices, not the vectors, are
fused, divided by sqrt(dim / heads), masked, and weigh values of the item stream. Residuals, norms and feed-forward act on R;
position and modalities are the same in every layer. ``model.fusion`` of the rows of a query: "sum"; "concat", a linear map
of all rows to one; "gate", softmax over the rows of an MLP L -> L -> 1, weighted sum. The auxiliary prediction of
attributes is ``model.cluster_weight``, which serves every backbone.

Deviations from the source:
- the auxiliary task is off unless ``model.cluster_weight`` is set (the source's weight: 10 on Beauty, 5 on Sports and Toys), and its
  attributes are clusters of the features;
- concat and gate read scores at later positions and padding as zero; the source fuses first and masks after, which shows
  the future to a model that is trained on all positions;
- attributes are the modalities' dense vectors, projected straight to dim / 2 (the source: categories, embedded in width 64);
- trained on all positions at once, scored against the id table; inner width 2 dim (the source: dim);
- two layers and four heads by default (the source: by data set, Beauty four and eight, Sports three and eight, Toys three and
  four);
- no bias in the key projections, where it has an effect with gate and concat alone, nor in the gate's last layer, where it has none.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import INITIALIZER
from kdsr_jax.models.flat import Dense, linear
from kdsr_jax.models.layers import attend, causal_mask, finish_layer, layer_norm, query_key_scores


class DIFSR(Backbone):
    """Causal Transformer over item ids, whose attention fuses scores of ids, positions and modalities."""

    fused = False

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim]; padding positions hold meaningless values."""
        items = inputs.vectors["item"]
        position = self.param("position_embedding", INITIALIZER, (self.max_length, self.dim))
        sides = {"position": position[None, : items.shape[1]]}
        sides |= {name: inputs.vectors[name] for name in self.modalities}
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(layer_norm("input_norm")(items))
        mask = causal_mask(inputs.valid)
        settings = self.num_heads, self.hidden_dropout, self.attention_dropout, self.fusion, self.max_length
        for index in range(self.num_layers):
            x = DecoupledLayer(*settings, name=f"layer_{index}")(x, sides, mask, deterministic)
        return x


class DecoupledLayer(nn.Module):
    """A post-norm layer over the item stream, whose attention weights come from fused scores.

    Attributes:
      num_heads: H; items and positions have dim / H columns a head, modalities half as many.
      hidden_dropout: of both residual branches.
      attention_dropout: of the weights.
      fusion: of the score matrices, "sum", "concat" or "gate".
      max_length: of histories; the width of the rows of scores that are fused, whatever the length of a batch.
    """

    num_heads: int
    hidden_dropout: float
    attention_dropout: float
    fusion: str
    max_length: int

    @nn.compact
    def __call__(self, x, sides, mask, deterministic):
        """Apply the layer.

        Args:
          x: [B, L, dim] float32, the item stream.
          sides: dict name -> [B or 1, L, width] float32, "position" and the modalities.
          mask: [B, 1, L, L] bool, True where a query may read a key.
          deterministic: True switches dropout off.

        Returns:
          [B, L, dim] float32.
        """
        dim = x.shape[-1]
        head = dim // self.num_heads
        narrow = max(1, head // 2) * self.num_heads
        scores = [
            query_key_scores(stream, dim if name in ("item", "position") else narrow, self.num_heads, f"_{name}")
            for name, stream in ({"item": x} | sides).items()
        ]
        fused = sum(scores) if self.fusion == "sum" else self._fuse_rows(scores, mask)
        value = Dense(dim, kernel_init=INITIALIZER, name="value")(x)
        drop_weights = nn.Dropout(self.attention_dropout, deterministic=deterministic)
        mixed = attend(fused / jnp.sqrt(head), value, mask, drop_weights)
        attended = Dense(dim, kernel_init=INITIALIZER, name="out")(mixed)
        return finish_layer(x, attended, nn.Dropout(self.hidden_dropout, deterministic=deterministic))

    def _fuse_rows(self, scores, mask):
        """Fuse S matrices [B or 1, H, L, L] to [B, H, L, L] by "concat" or "gate", which read the rows of each query whole.

        What a query may not read is zero before, and so is all from L to max_length: kernels are cut to L instead.
        """
        length, most = mask.shape[-1], self.max_length
        rows = jnp.stack(jnp.broadcast_arrays(*scores), axis=-2)  # [B, H, query, S, key]
        rows = jnp.where(mask[..., None, :], rows, 0.0)
        if self.fusion == "concat":
            kernel = self.param("concat_kernel", INITIALIZER, (len(scores), most, most))[:, :length, :length]
            bias = self.param("concat_bias", nn.initializers.zeros, (most,))[:length]
            return jnp.einsum("bhqsk,skj->bhqj", rows, kernel) + bias[None, None, None]
        kernel = self.param("gate_kernel", INITIALIZER, (most, most))[:length]
        bias = self.param("gate_bias", nn.initializers.zeros, (most,))
        hidden = nn.relu(linear(rows, kernel) + bias[None, None, None, None])
        weights = Dense(1, use_bias=False, kernel_init=INITIALIZER, name="gate_out")(hidden)
        return (jax.nn.softmax(weights, axis=-2) * rows).sum(-2)
