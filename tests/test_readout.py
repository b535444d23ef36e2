"""From states to the representation of every prefix: worked examples, Eq. 6 by loops, causality, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdsr_jax.models.readout import READOUTS, Readout

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIM = 4


def build(kind, short_term=3, length=6, batch=2, seed=0, **changes):
    """A readout, its parameters filled with numbers that are not small, and states."""
    module = Readout(DIM, kind, short_term, **changes)
    rng = np.random.default_rng(seed)
    states = jnp.asarray(rng.normal(size=(batch, length, DIM)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), states, all_real(states))
    return module, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes), states


def all_real(states):
    return jnp.ones(states.shape[:2], bool)


def read_by_loops(params, states, short_term):
    """Eq. 6 for every prefix: h^l the mean, h^s the last q states weighted by W2 ReLU(W1 h), P = W3 [h^s; h^l]."""
    w1, w2, w3 = (np.asarray(params["params"][n]["kernel"]) for n in ("attention_hidden", "attention_out", "join"))
    states = np.asarray(states)
    out = np.zeros_like(states)
    for b, row in enumerate(states):
        for i in range(len(row)):
            long_term = sum(row[t] for t in range(i + 1)) / (i + 1)
            short = np.zeros(DIM)
            for t in range(max(0, i - short_term + 1), i + 1):
                short = short + (np.maximum(row[t] @ w1, 0) @ w2) * row[t]
            out[b, i] = np.concatenate([short, long_term]) @ w3
    return out


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("last", [1.0, 2.0, 6.0]), ("last_sum", [2.0, 3.0, 8.0]), ("mean", [1.0, 1.5, 3.0])],
)
def test_worked_example(kind, expected):
    states = jnp.array([1.0, 2.0, 6.0])[None, :, None]
    np.testing.assert_allclose(Readout(1, kind).apply({}, states)[0, :, 0], expected, rtol=1e-6)


def test_worked_example_of_equation_6():
    # W1 = 1, W2 = 2, W3 = (1, 10): P = sum of 2 relu(h) h over the last two states, plus ten times the mean.
    params = {"attention_hidden": [[1.0]], "attention_out": [[2.0]], "join": [[1.0], [10.0]]}
    variables = {"params": {name: {"kernel": jnp.array(value)} for name, value in params.items()}}
    states = jnp.array([1.0, -2.0, 4.0])[None, :, None]
    got = Readout(1, "long_short", 2).apply(variables, states)
    np.testing.assert_allclose(got[0, :, 0], [2 + 10.0, 2 + 0 - 5.0, 0 + 32 + 10.0], rtol=1e-6)


def test_last_sum_counts_a_single_state_twice():
    states = jnp.array([[[3.0, -1.0]]])
    np.testing.assert_array_equal(Readout(2, "last_sum").apply({}, states), 2 * states)


@pytest.mark.parametrize("short_term", [1, 3, 20, 2**31 - 1])
def test_equation_6_equals_loops(short_term):
    module, params, states = build("long_short", short_term)
    expected = read_by_loops(params, states, short_term)
    np.testing.assert_allclose(module.apply(params, states, all_real(states)), expected, rtol=2e-5, atol=2e-5)


def attend_by_loops(params, states, valid):
    """SR-GNN's readout of every prefix: s = sum_t q . sigmoid(W1 x_l + W2 x_t) x_t, P = W3 [s; x_l]."""
    layers = {name: {k: np.asarray(v) for k, v in layer.items()} for name, layer in params["params"].items()}
    dense = {name: lambda x, w=w: x @ w["kernel"] + w.get("bias", 0) for name, w in layers.items()}
    states = np.asarray(states)
    out = np.zeros_like(states)
    for b, i in np.argwhere(valid):
        newest, summed = states[b, i], np.zeros(DIM)
        for t in range(i + 1):
            hidden = dense["attention_query"](newest) + dense["attention_key"](states[b, t])
            summed = summed + dense["attention_out"](1 / (1 + np.exp(-hidden))) * states[b, t]
        out[b, i] = dense["join"](np.concatenate([summed, newest]))
    return out


@pytest.mark.parametrize("trained_on", ["positions", "prefixes"])
def test_soft_attention_equals_loops(trained_on):
    module, params, states = build("attention", batch=3, trained_on=trained_on)
    lengths = np.array([6, 3, 1])
    valid = np.arange(6)[None] < lengths[:, None]
    got = np.asarray(module.apply(params, states, jnp.asarray(valid)))
    used = valid if trained_on == "positions" else np.arange(6)[None] == lengths[:, None] - 1
    expected = attend_by_loops(params, states, valid)
    np.testing.assert_allclose(got[used], expected[used], rtol=2e-5, atol=2e-5)


def test_soft_attention_of_an_empty_history_is_finite():
    module, params, states = build("attention", trained_on="prefixes")
    value, gradient = jax.value_and_grad(lambda s: module.apply(params, s, ~all_real(s)).sum())(states)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", READOUTS)
def test_later_states_do_not_change_a_bit(kind):
    module, params, states = build(kind)
    read = jax.jit(module.apply)
    before = np.asarray(read(params, states, all_real(states)))
    for i in range(5):
        changed = np.array(states)
        changed[:, i + 1 :] = 1e3 * np.random.default_rng(i).normal(size=(2, 5 - i, DIM))
        after = np.asarray(read(params, changed, all_real(changed)))
        np.testing.assert_array_equal(before[:, : i + 1], after[:, : i + 1])
        assert np.any(before[:, i + 1] != after[:, i + 1])


@pytest.mark.parametrize("kind", READOUTS)
def test_jit_length_and_neighbours_change_nothing(kind):
    module, params, states = build(kind)
    eager = module.apply(params, states, all_real(states))
    np.testing.assert_allclose(jax.jit(module.apply)(params, states, all_real(states)), eager, rtol=1e-5, atol=1e-5)
    longer = jnp.pad(states[:1], ((0, 0), (0, 3), (0, 0)))
    valid = jnp.arange(9)[None] < 6
    np.testing.assert_allclose(module.apply(params, longer, valid)[:, :6], eager[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", READOUTS)
def test_gradient(kind):
    module, params, states = build(kind, length=4, batch=1)
    with jax.enable_x64(True):
        both = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, states))
        check_grads(
            jax.jit(lambda *given: module.apply(*given, all_real(states))), both, order=1, modes=["rev"], eps=1e-6
        )


@pytest.mark.parametrize("kind", READOUTS)
def test_zero_states_read_as_zero(kind):
    module, params, states = build(kind)
    read = jax.value_and_grad(lambda p, s: module.apply(p, s, all_real(s)).sum(), argnums=1)
    no_bias = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (path[-1].key != "bias"), params)
    value, gradient = read(no_bias, jnp.zeros_like(states))
    assert value == 0
    assert np.isfinite(gradient).all()


def test_parameters():
    counts = {kind: sum(leaf.size for leaf in jax.tree.leaves(build(kind)[1])) for kind in READOUTS}
    # W1 d x d, W2 d x 1, W3 2d x d, no biases; the attention has a second W1 and biases but in W2; the others have none
    equation_6 = DIM**2 + DIM + 2 * DIM**2
    attention = equation_6 + DIM**2 + 3 * DIM
    assert counts == {"last": 0, "last_sum": 0, "mean": 0, "long_short": equation_6, "attention": attention}
