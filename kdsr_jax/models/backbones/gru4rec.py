"""GRU4Rec: a recurrent network over the history (Hidasi et al., ICLR 2016), in the form the field compares with.

Form (the RecBole/KDSR one, closer to Tan et al. 2016): dropout on the item vectors, GRU layers without biases
whose reset gate acts after the recurrent product, then a linear map; the input and recurrent matrices of the three gates are
Xavier-uniform as one stacked matrix.

Deviations from the source:
- whole user histories under a full softmax (the original: parallel sessions, sampled negatives, ranking losses, Adagrad);
- the id table starts at N(0, 0.02^2), not Xavier-normal (0.013 with Beauty's 12,101 items), and the bias of the last map at
  zero;
- with tables of modalities it reads the fused item vector; the source knows ids only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import uniform
from kdsr_jax.models.flat import Dense, linear


class GRU4Rec(Backbone):
    """Gated recurrent layers over the fused item vectors; ``num_layers`` of them."""

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim]."""
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(inputs.fused)
        for index in range(self.num_layers):
            x = GRU(self.dim, name=f"layer_{index}")(x)
        return Dense(self.dim, kernel_init=uniform(self.dim), name="out")(x)


class GRU(nn.Module):
    """One layer: r, z = sigmoid(W x + U h), n = tanh(W_n x + r * U_n h), h = (1 - z) * n + z * h; h starts at zero.

    Attributes:
      dim: width of the states. Both kernels hold the gates in the order r, z, n.
    """

    dim: int

    @nn.compact
    def __call__(self, x):
        """Run over x [B, L, width]; returns the states [B, L, dim]."""
        xavier = nn.initializers.xavier_uniform()
        from_input = linear(x, self.param("input", xavier, (x.shape[-1], 3 * self.dim)))
        recurrent = self.param("recurrent", xavier, (self.dim, 3 * self.dim))

        def step(h, gates):
            reset_x, update_x, new_x = jnp.split(gates, 3, axis=-1)
            reset_h, update_h, new_h = jnp.split(h @ recurrent, 3, axis=-1)
            update = nn.sigmoid(update_x + update_h)
            new = jnp.tanh(new_x + nn.sigmoid(reset_x + reset_h) * new_h)
            h = (1 - update) * new + update * h
            return h, h

        start = jnp.zeros((x.shape[0], self.dim), x.dtype)
        return jax.lax.scan(step, start, from_input.swapaxes(0, 1))[1].swapaxes(0, 1)
