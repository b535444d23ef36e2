"""From the states of a history to its representation P, at every position at once (paper Eq. 6 and alternatives).

Every readout is causal: its value at position i uses states 0..i only, so one pass serves all prefixes of a history.
"""

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models.embeddings import INITIALIZER

READOUTS = ("last", "last_sum", "mean", "long_short")


class Readout(nn.Module):
    """Summarise each prefix of a history.

    Attributes:
      dim: width of the states and of the result.
      kind: "last": the newest state; "last_sum": the sum of the last two, the first counted twice for a single one
        (the official code); "mean": the mean of all; "long_short": paper Eq. 6.
      short_term: q of Eq. 6, at least 1.
    """

    dim: int
    kind: str = "last"
    short_term: int = 3

    @nn.compact
    def __call__(self, states):
        """Read out.

        Args:
          states: [B, L, dim] float32, oldest first, padding on the right (its results are meaningless and unused).

        Returns:
          [B, L, dim] float32; position i summarises states 0..i.
        """
        if self.kind == "last":
            return states
        if self.kind == "last_sum":
            return states + jnp.concatenate([states[:, :1], states[:, :-1]], axis=1)
        long_term = jnp.cumsum(states, axis=1) / jnp.arange(1, states.shape[1] + 1)[None, :, None]
        if self.kind == "mean":
            return long_term
        hidden = nn.relu(nn.Dense(self.dim, use_bias=False, kernel_init=INITIALIZER, name="attention_hidden")(states))
        alpha = nn.Dense(1, use_bias=False, kernel_init=INITIALIZER, name="attention_out")(hidden)
        short_term = _sum_of_last(alpha * states, self.short_term)
        both = jnp.concatenate([short_term, long_term], axis=-1)
        return nn.Dense(self.dim, use_bias=False, kernel_init=INITIALIZER, name="join")(both)


def _sum_of_last(x, count):
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (count - 1, 0), (0, 0)))
    return sum(padded[:, shift : shift + length] for shift in range(count))
