"""The post-norm Transformer layer that the attention backbones share, and its parts.

A mask says what may be read: ``causal_mask`` for the models that are trained on all positions.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.embeddings import INITIALIZER
from kdsr_jax.models.flat import Dense, LayerNorm

LAYER_NORM_EPSILON = 1e-12
MASKED = -1e9  # finite, so that a row without a single visible key stays finite; exp underflows to exactly 0


def causal_mask(valid):
    """Say which keys each position may read: real ones, not later than itself.

    Args:
      valid: [B, L] bool, True at real positions.

    Returns:
      [B, 1, L, L] bool (batch, heads, query, key).
    """
    length = valid.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool))[None, None] & valid[:, None, None, :]


def query_key_scores(x, width, num_heads, suffix=""):
    """Compare every position with every other one, head by head; the projections belong to the calling module.

    The key projection has no bias: it would shift every score of a query alike, so where these go straight into a softmax its
    true gradient is zero and Adam would only amplify rounding noise.

    Args:
      x: [B, L, w] float32.
      width: of the queries and keys of all heads together, divisible by num_heads.
      num_heads: H.
      suffix: of the names of the projections, "query" and "key".

    Returns:
      [B, H, L, L] float32 (batch, heads, query, key), neither scaled nor masked.
    """
    query = Dense(width, kernel_init=INITIALIZER, name=f"query{suffix}")(x)
    key = Dense(width, use_bias=False, kernel_init=INITIALIZER, name=f"key{suffix}")(x)
    return jnp.einsum("bqhd,bkhd->bhqk", _split_heads(query, num_heads), _split_heads(key, num_heads))


def attend(scores, values, mask, drop):
    """Mix values by the softmax of their scores; dropout acts on the weights, after the softmax.

    Args:
      scores: [B, H, L, L] float32 (batch, heads, query, key).
      values: [B, L, dim] float32, split evenly among the heads.
      mask: bool, broadcast against scores, True where a query may read a key; a query that may read none gets finite,
        meaningless values.
      drop: dropout for the weights.

    Returns:
      [B, L, dim] float32.
    """
    weights = drop(jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, _split_heads(values, scores.shape[1]))
    return mixed.reshape(values.shape)


def finish_layer(x, attended, drop):
    """Finish a post-norm layer: residual and norm of what was attended to, then of a feed-forward block, exact GELU.

    Args:
      x: [B, L, dim] float32, the layer's input.
      attended: [B, L, dim] float32, what its attention made of it.
      drop: dropout for both residual branches.

    Returns:
      [B, L, dim] float32. The layers belong to the calling module; the inner width is 2 dim.
    """
    dim = x.shape[-1]
    x = layer_norm("attention_norm")(x + drop(attended))
    inner = Dense(2 * dim, kernel_init=INITIALIZER, name="inner")(x)
    outer = Dense(dim, kernel_init=INITIALIZER, name="outer")(nn.gelu(inner, approximate=False))
    return layer_norm("outer_norm")(x + drop(outer))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention."""

    dim: int
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic, context=None):
        """Attend.

        Args:
          x: [B, L, dim] float32, read by the values.
          mask: [B, 1, L, L] bool, True where a query may read a key.
          deterministic: True switches dropout off.
          context: [B, L, width] float32, read by queries and keys; None for x itself.

        Returns:
          [B, L, dim] float32.
        """
        scores = query_key_scores(x if context is None else context, self.dim, self.num_heads)
        value = Dense(self.dim, kernel_init=INITIALIZER, name="value")(x)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        mixed = attend(scores / jnp.sqrt(self.dim // self.num_heads), value, mask, drop)
        return Dense(self.dim, kernel_init=INITIALIZER, name="out")(mixed)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and layer norm after it; inner width 2 dim, exact GELU."""

    dim: int
    num_heads: int
    hidden_dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic, context=None):
        """Apply the layer to x [B, L, dim] under mask [B, 1, L, L]; returns [B, L, dim].

        Queries and keys are read from context [B, L, width], or from x where it is None.
        """
        drop = nn.Dropout(self.hidden_dropout, deterministic=deterministic)
        attention = SelfAttention(self.dim, self.num_heads, self.attention_dropout, name="attention")
        return finish_layer(x, attention(x, mask, deterministic, context), drop)


def _split_heads(x, num_heads):
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def layer_norm(name):
    """Return a layer norm with the epsilon of the BERT family (1e-12)."""
    return LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)
