"""The post-norm causal Transformer layer that the attention backbones share (models.md 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.embeddings import INITIALIZER

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


class CausalSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention; dropout on the weights, after the softmax.

    The key projection has no bias: a key bias shifts every score of a query alike, so its true gradient is zero and Adam
    would only amplify rounding noise.
    """

    dim: int
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic):
        """Attend.

        Args:
          x: [B, L, dim] float32.
          mask: [B, 1, L, L] bool, True where a query may read a key.
          deterministic: True switches dropout off.

        Returns:
          [B, L, dim] float32.
        """
        shape = (*x.shape[:2], self.num_heads, self.dim // self.num_heads)
        query, value = (
            nn.Dense(self.dim, kernel_init=INITIALIZER, name=n)(x).reshape(shape) for n in ("query", "value")
        )
        key = nn.Dense(self.dim, use_bias=False, kernel_init=INITIALIZER, name="key")(x).reshape(shape)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(shape[-1])
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
        weights = nn.Dropout(self.dropout, deterministic=deterministic)(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(self.dim, kernel_init=INITIALIZER, name="out")(mixed)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and layer norm after it; inner width 2 dim, exact GELU."""

    dim: int
    num_heads: int
    hidden_dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x, mask, deterministic):
        """Apply the layer to x [B, L, dim] under mask [B, 1, L, L]; returns [B, L, dim]."""
        drop = nn.Dropout(self.hidden_dropout, deterministic=deterministic)
        attended = CausalSelfAttention(self.dim, self.num_heads, self.attention_dropout, name="attention")
        x = layer_norm("attention_norm")(x + drop(attended(x, mask, deterministic)))
        inner = nn.Dense(2 * self.dim, kernel_init=INITIALIZER, name="inner")(x)
        outer = nn.Dense(self.dim, kernel_init=INITIALIZER, name="outer")(nn.gelu(inner, approximate=False))
        return layer_norm("outer_norm")(x + drop(outer))


def layer_norm(name):
    """Return a layer norm with the epsilon of the BERT family (1e-12)."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)
