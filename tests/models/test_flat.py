"""Layers over rows: what flax's layers give, whatever the leading axes."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from kdsr_jax.models import flat

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEADING = [(), (3,), (2, 1), (2, 3, 4)]
PAIRS = {
    "dense": (flat.Dense(6, bias_init=nn.initializers.normal(1.0)), nn.Dense(6, bias_init=nn.initializers.normal(1.0))),
    "layer norm": (flat.LayerNorm(epsilon=1e-12), nn.LayerNorm(epsilon=1e-12)),
}


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("name", PAIRS)
def test_parameters_values_and_gradients_are_those_of_flax(name, leading):
    ours, theirs = PAIRS[name]
    x = jax.random.normal(jax.random.key(0), (*leading, 5))
    params = ours.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(params, theirs.init(jax.random.key(1), x))

    def loss(layer):
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x))), (0, 1))(params, x)

    assert ours.apply(params, x).shape == theirs.apply(params, x).shape
    chex.assert_trees_all_close(loss(ours), loss(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leading", LEADING)
def test_linear_multiplies_the_last_axis(leading):
    x = jax.random.normal(jax.random.key(0), (*leading, 5))
    kernel = jax.random.normal(jax.random.key(1), (5, 4))
    chex.assert_trees_all_close(flat.linear(x, kernel), jnp.einsum("...w,wv->...v", x, kernel), rtol=1e-5, atol=1e-6)
