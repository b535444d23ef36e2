"""From the states of a history to its representation P, at every position at once (paper Eq. 6 and alternatives).

Every readout is causal: its value at position i uses states 0..i only, so one pass serves all prefixes of a history.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models.embeddings import INITIALIZER
from kdsr_jax.models.flat import Dense

READOUTS = ("last", "last_sum", "mean", "long_short", "attention")


class Readout(nn.Module):
    """Summarise each prefix of a history.

    Attributes:
      dim: width of the states and of the result.
      kind: "last": the newest state; "last_sum": the sum of the last two, the first counted twice for a single one
        (the official code); "mean": the mean of all; "long_short": paper Eq. 6; "attention": the soft attention of SR-GNN,
        W3 [s; x_l] with s = sum_t q . sigmoid(W1 x_l + W2 x_t) x_t and x_l the newest state.
      short_term: q of Eq. 6, at least 1.
      trained_on: "prefixes" where only the last real position is used, which makes "attention" cheaper.
      initializer: of the kernels.
    """

    dim: int
    kind: str = "last"
    short_term: int = 3
    trained_on: str = "positions"
    initializer: Callable = INITIALIZER

    @nn.compact
    def __call__(self, states, valid=None):
        """Read out.

        Args:
          states: [B, L, dim] float32, oldest first, padding on the right (its results are meaningless and unused).
          valid: [B, L] bool, True at real positions; only "attention" reads it.

        Returns:
          [B, L, dim] float32; position i summarises states 0..i.
        """
        if self.kind == "last":
            return states
        if self.kind == "last_sum":
            return states + jnp.concatenate([states[:, :1], states[:, :-1]], axis=1)
        if self.kind == "attention":
            return self._attend(states, valid)
        long_term = jnp.cumsum(states, axis=1) / jnp.arange(1, states.shape[1] + 1)[None, :, None]
        if self.kind == "mean":
            return long_term
        alpha = self._dense(1, "attention_out")(nn.relu(self._dense(self.dim, "attention_hidden")(states)))
        short_term = _sum_of_last(alpha * states, self.short_term)
        return self._dense(self.dim, "join")(jnp.concatenate([short_term, long_term], axis=-1))

    def _attend(self, states, valid):
        position = jnp.arange(states.shape[1])
        if self.trained_on == "prefixes":
            position = jnp.maximum(valid.sum(1) - 1, 0)[:, None]  # [B, 1]
            newest = jnp.take_along_axis(states, position[..., None], axis=1)
        else:
            position, newest = position[None], states  # [1, L]
        query = self._dense(self.dim, "attention_query", bias=True)(newest)[:, :, None]
        key = self._dense(self.dim, "attention_key", bias=True)(states)[:, None]
        alpha = self._dense(1, "attention_out")(nn.sigmoid(query + key))[..., 0]  # [B, Q, L]
        earlier = jnp.arange(states.shape[1])[None, None] <= position[..., None]
        weighted = jnp.where(earlier & valid[:, None], alpha, 0.0) @ states
        joined = self._dense(self.dim, "join", bias=True)(jnp.concatenate([weighted, newest], axis=-1))
        return jnp.broadcast_to(joined, states.shape)

    def _dense(self, width, name, bias=False):
        return Dense(width, use_bias=bias, kernel_init=self.initializer, bias_init=self.initializer, name=name)


def _sum_of_last(x, count):
    length = x.shape[1]
    count = min(count, length)
    padded = jnp.pad(x, ((0, 0), (count - 1, 0), (0, 0)))
    return sum(padded[:, shift : shift + length] for shift in range(count))
