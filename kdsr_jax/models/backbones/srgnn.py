"""SR-GNN: a gated graph network over the items of a history (Wu et al., AAAI 2019).

Form: nodes are the distinct items; a node receives the mean over its predecessors and the mean over its
successors, each after a linear map, and updates itself by gates; ``num_layers`` such steps share their weights. Its own readout
is ``model.readout="attention"``. All parameters start uniformly in +-1/sqrt(dim).

Deviations from the source:
- padding is no isolated node;
- optimizer and learning rate are those of all models (the source: L2 of 1e-5, a tenth of the rate every three epochs);
- dropout on the item vectors exists (``model.hidden_dropout``; the source has none, and none is its default here);
- with tables of modalities it reads the fused item vector, whose fusion starts as everywhere; the source knows ids only.
"""

import flax.linen as nn
import jax.numpy as jnp

from kdsr_jax.models import graph
from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import uniform
from kdsr_jax.models.flat import Dense


class SRGNN(Backbone):
    """Gated graph steps over the distinct items of each history."""

    trained_on = "prefixes"
    initializer = staticmethod(uniform)

    @nn.compact
    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns the node states at every position, [B, L, dim]."""
        init = uniform(self.dim)

        def dense(width, name):
            return Dense(width, kernel_init=init, bias_init=init, name=name)

        follows = graph.successions(graph.shown_items(inputs.history)).astype(inputs.fused.dtype)
        out_mean = follows / jnp.maximum(follows.sum(2, keepdims=True), 1)
        in_mean = follows.swapaxes(1, 2) / jnp.maximum(follows.sum(1)[..., None], 1)
        from_in, from_out = dense(self.dim, "in"), dense(self.dim, "out")
        in_bias, out_bias = (self.param(name, init, (self.dim,)) for name in ("in_bias", "out_bias"))
        from_message, from_state = dense(3 * self.dim, "message"), dense(3 * self.dim, "state")
        h = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(inputs.fused)
        h = graph.at_positions(h, inputs.history)  # one dropout mask an item
        for _ in range(self.num_layers):
            message = [in_mean @ from_in(h) + in_bias[None, None], out_mean @ from_out(h) + out_bias[None, None]]
            gates = jnp.split(from_message(jnp.concatenate(message, axis=-1)), 3, axis=-1)
            reset_h, update_h, new_h = jnp.split(from_state(h), 3, axis=-1)
            update = nn.sigmoid(gates[1] + update_h)
            new = jnp.tanh(gates[2] + nn.sigmoid(gates[0] + reset_h) * new_h)
            h = new + update * (h - new)
        return graph.at_positions(h, inputs.history)
