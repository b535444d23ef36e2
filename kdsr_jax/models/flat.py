"""Layers that see all leading axes of x as one axis of rows.

The gradients of their parameters are sums over the rows. XLA computes sums and products over several axes at once where x has
several; on CPUs it then copies x number by number, which can take longer than the rest of the layer.
"""

import flax.linen as nn


def linear(x, kernel):
    """Multiply x [..., w] by a kernel [w, v]; returns [..., v]."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Dense):
    """``flax.linen.Dense``, with the same parameters."""

    def __call__(self, x):
        """Map x [..., w] to [..., features]."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.LayerNorm):
    """``flax.linen.LayerNorm`` of the last axis, with the same parameters."""

    def __call__(self, x):
        """Normalise x [..., w]; same shape."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(x.shape)
