"""Trans2D: attention over a grid of positions and channels (Singer et al., WSDM 2022).

Form: a history is a grid of cells [L, C], the channels being the item id and every modality. Position
vectors are shared by the channels; linear maps belong to a channel each; norms act on a position's C dim numbers at once. With
queries Q and keys K per head, a cell (i, c) reads a cell (j, e) by

    full = Q[i,c].K[j,e]    feature[c,e] = sum_l Q[l,c].K[l,e]    time[i,j] = sum_c Q[i,c].K[j,c]
    S = (a1 full + a2 feature + a3 time) / sqrt(dim / heads)    a learned, (1, 1, 1) at first

and one softmax over all cells (j, e). Post-norm, exact GELU; at the end channels are averaged.

The feature term sums over the whole history, the future of its earlier positions included: hence one target per prefix.

Deviations from the source:
- trained on the next item among all (the source: click or not, for every item shown, and bidirectional); a position reads none
  that are later than itself;
- padding is neither read nor part of the feature term (the source masks none);
- a head has dim / heads columns (the source: dim), and the feed-forward block 2 dim (the source: 3072 whatever dim is);
- no token-type constant, which the position vectors absorb;
- channels are dense vectors, not categories; a modality's table of another width than dim is mapped linearly to dim.
"""

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import INITIALIZER, to_width
from kdsr_jax.models.flat import linear
from kdsr_jax.models.layers import attend, causal_mask, layer_norm


class Trans2D(Backbone):
    """Transformer over the cells of a grid; ids alone are a grid of one channel."""

    trained_on = "prefixes"
    fused = False

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim]; padding positions hold meaningless values."""
        channels = [to_width(inputs.vectors[name], self.dim, f"project_{name}") for name in ("item", *self.modalities)]
        grid = jnp.stack(channels, axis=2)
        position = self.param("position_embedding", INITIALIZER, (self.max_length, self.dim))
        x = grid_norm(grid + position[None, : grid.shape[1], None], "input_norm")
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(x)
        for index in range(self.num_layers):
            layer = GridLayer(self.num_heads, self.hidden_dropout, self.attention_dropout, name=f"layer_{index}")
            x = layer(x, inputs.valid, deterministic)
        return x.mean(2)


class GridLayer(nn.Module):
    """A post-norm layer on a grid: attention among cells, then a feed-forward block; inner width 2 dim."""

    num_heads: int
    hidden_dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x, valid, deterministic):
        """Apply the layer to x [B, L, C, dim], of whose positions valid [B, L] bool are real; returns [B, L, C, dim]."""
        batch, length, channels, dim = x.shape
        drop = nn.Dropout(self.hidden_dropout, deterministic=deterministic)
        drop_weights = nn.Dropout(self.attention_dropout, deterministic=deterministic)
        query, key, value = (ChannelDense(dim, name=name)(x) for name in ("query", "key", "value"))
        heads = (batch, length, channels, self.num_heads, dim // self.num_heads)
        alphas = self.param("alphas", nn.initializers.ones, (3,))
        scores = cell_scores(query.reshape(heads), key.reshape(heads), valid, alphas)
        mask = jnp.repeat(jnp.repeat(causal_mask(valid), channels, axis=2), channels, axis=3)
        mixed = attend(scores, value.reshape(batch, length * channels, dim), mask, drop_weights).reshape(x.shape)
        x = grid_norm(x + drop(ChannelDense(dim, name="out")(mixed)), "attention_norm")
        inner = nn.gelu(ChannelDense(2 * dim, name="inner")(x), approximate=False)
        return grid_norm(x + drop(ChannelDense(dim, name="outer")(inner)), "outer_norm")


class ChannelDense(nn.Module):
    """A linear map of its own, with bias, for every channel of a grid [B, L, C, w]; returns [B, L, C, width]."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Apply the maps."""
        channels, width = x.shape[-2:]
        kernel = self.param("kernel", INITIALIZER, (channels, width, self.width))
        bias = self.param("bias", nn.initializers.zeros, (channels, self.width))
        return jnp.stack([linear(x[:, :, c], kernel[c]) for c in range(channels)], axis=2) + bias[None, None]


def cell_scores(query, key, valid, alphas):
    """Compare all cells of a grid by the sum of the full, the feature and the time term.

    Args:
      query, key: [B, L, C, H, w] float32.
      valid: [B, L] bool, True at real positions; others are left out of the feature term.
      alphas: [3] float32, weights of the full, the feature and the time term.

    Returns:
      [B, H, L C, L C] float32 (batch, heads, cell of the query, cell of the key), divided by sqrt(w) and not masked.
    """
    batch, length, channels, num_heads, width = query.shape
    # The weights are on the queries, so that nothing as large as the result has to be kept for their gradients.
    full, feature, time = (alpha * query for alpha in alphas / jnp.sqrt(width))
    real = jnp.where(valid[..., None, None, None], feature, 0.0)
    scores = jnp.einsum("bichw,bjehw->bhicje", full, key)
    scores += jnp.einsum("blchw,blehw->bhce", real, key)[:, :, None, :, None, :]
    scores += jnp.einsum("bichw,bjchw->bhij", time, key)[:, :, :, None, :, None]
    cells = length * channels
    return scores.reshape(batch, num_heads, cells, cells)


def grid_norm(x, name):
    """Normalise a grid [B, L, C, w] over channels and columns at once; the layer belongs to the calling module."""
    return layer_norm(name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
