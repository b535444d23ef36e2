"""The optimizer: the ramp of the modality tables, who is in which group, coupled L2 and global clipping by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdsr_jax.optim import BODY, TABLES, embedding_ramp, label_params, make_optimizer, table_rules

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPSILON = 1e-8


def settings(**changes):
    defaults = {"learning_rate": 0.01, "weight_decay": 0.0, "clip_norm": 0.0}
    defaults |= {"ramp_epochs": 2, "ramp_start": 0.1, "ramp_end": 1.0}
    return SimpleNamespace(**defaults | changes)


@pytest.fixture
def params():
    return {
        "item_embedding": {"embedding": jnp.array([[1.0, -2.0]])},
        "text_embedding": {"embedding": jnp.array([[0.5, 3.0], [2.0, -1.0]])},
        "encoder": {"text_embedding": {"embedding": jnp.array([4.0])}, "kernel": jnp.array([0.25])},
    }


def gradients(params, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(steps)]


def run(optimizer, params, steps):
    """Return the parameters after each gradient."""
    state, history, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for gradient in steps:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def adam_by_hand(params, steps, rate, weight_decay=0.0):
    """torch.optim.Adam in float64: decay is added to the gradient before the moments."""
    leaves, structure = jax.tree.flatten(params)
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    first, second = [0.0] * len(leaves), [0.0] * len(leaves)
    for t, gradient in enumerate(steps, start=1):
        for n, g in enumerate(jax.tree.leaves(gradient)):
            g = np.asarray(g, np.float64) + weight_decay * leaves[n]
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g**2
            step = (first[n] / (1 - 0.9**t)) / (np.sqrt(second[n] / (1 - 0.999**t)) + EPSILON)
            leaves[n] = leaves[n] - rate * step
    return jax.tree.unflatten(structure, leaves)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (25, 0.325), (50, 0.55), (100, 1.0), (101, 1.0), (10**6, 1.0)])
def test_ramp(step, share):
    np.testing.assert_allclose(embedding_ramp(0.02, 100)(step), 0.02 * share, rtol=1e-6)


def test_ramp_starts_where_it_is_told_and_never_falls():
    values = np.array([embedding_ramp(1.0, 7, start=0.25)(step) for step in range(12)])
    np.testing.assert_allclose(values[[0, 7, 11]], [0.25, 1.0, 1.0], rtol=1e-6)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_no_ramp_is_the_full_rate_at_once(step):
    assert embedding_ramp(0.02, 0)(step) == 0.02
    assert embedding_ramp(0.02, 0, end=0.25)(step) == 0.005  # the official code's
    assert embedding_ramp(0.02, 100, start=0.1, end=0.5)(500) == pytest.approx(0.01)


def test_ramp_is_counted_in_epochs():
    _, schedules = make_optimizer(settings(ramp_epochs=3, learning_rate=1.0), ["text"], steps_per_epoch=50)
    np.testing.assert_allclose([schedules[TABLES](s) for s in (0, 75, 150)], [0.1, 0.55, 1.0], rtol=1e-6)
    assert schedules[BODY](0) == schedules[BODY](150) == 1.0


def test_labels_only_whole_paths(params):
    labels = label_params(params, table_rules(["text"]))
    assert labels == {
        "item_embedding": {"embedding": BODY},
        "text_embedding": {"embedding": TABLES},
        "encoder": {"text_embedding": {"embedding": BODY}, "kernel": BODY},
    }


def test_first_matching_rule_wins(params):
    labels = label_params(params, [("text.*", "a"), (".*embedding", "b"), (".*", "c")])
    assert labels["text_embedding"]["embedding"] == "a"
    assert labels["encoder"] == {"text_embedding": {"embedding": "b"}, "kernel": "c"}


def test_a_rule_that_takes_nothing_is_an_error(params):
    with pytest.raises(ValueError, match="image_embedding/embedding"):
        label_params(params, table_rules(["text", "image"]))


def test_a_parameter_without_a_rule_is_an_error(params):
    with pytest.raises(ValueError, match="encoder/kernel"):
        label_params(params, [(".*embedding", TABLES)])


def test_only_modality_tables_are_ramped(params):
    optimizer, _ = make_optimizer(settings(ramp_epochs=2), ["text"], steps_per_epoch=2)
    steps = gradients(params, 6)
    got = run(optimizer, params, steps)
    plain = run(optax.adam(0.01), params, steps)

    def moved(history, pick):
        points = [np.asarray(pick(p)) for p in [params, *history]]
        return np.diff(points, axis=0)

    for pick in (lambda p: p["item_embedding"]["embedding"], lambda p: p["encoder"]["text_embedding"]["embedding"]):
        np.testing.assert_allclose(moved(got, pick), moved(plain, pick), rtol=1e-5, atol=1e-7)
    share = np.array([0.1, 0.325, 0.55, 0.775, 1.0, 1.0])[:, None, None]
    tables, free = (moved(history, lambda p: p["text_embedding"]["embedding"]) for history in (got, plain))
    np.testing.assert_allclose(tables, share * free, rtol=1e-3, atol=1e-6)


def test_without_modalities_it_is_plain_adam(params):
    optimizer, schedules = make_optimizer(settings(), [], steps_per_epoch=5)
    steps = gradients(params, 3)
    assert set(schedules) == {BODY}
    assert_close(run(optimizer, params, steps)[-1], adam_by_hand(params, steps, 0.01))


def test_decay_leaves_rows_without_a_gradient_as_they_are():
    rows = jnp.array([[0.2, 0.2], [0.2, 0.2], [0.2, 0.2]])
    params = {"text_embedding": {"embedding": rows}, "bias": jnp.array([0.2, 0.2]), "scale": jnp.array(0.2)}
    gradient = {"text_embedding": {"embedding": jnp.array([[0.0, 0.0], [0.0, 1e-9], [1.0, -1.0]])}}
    gradient |= {"bias": jnp.zeros(2), "scale": jnp.array(0.0)}
    optimizer, _ = make_optimizer(settings(weight_decay=1e-5, ramp_epochs=0), ["text"], steps_per_epoch=5)
    moved = run(optimizer, params, [gradient] * 5)[-1]
    table = moved["text_embedding"]["embedding"]
    np.testing.assert_array_equal(table[0], rows[0])
    assert (table[1] < 0.16).all()  # Adam's steps have the size of the rate, whatever the weight
    np.testing.assert_array_equal(moved["bias"], params["bias"])
    np.testing.assert_array_equal(moved["scale"], params["scale"])


def test_decay_is_coupled_as_in_torch(params):
    optimizer, _ = make_optimizer(settings(weight_decay=0.5, ramp_epochs=0), ["text"], steps_per_epoch=5)
    steps = gradients(params, 3)
    got = run(optimizer, params, steps)
    assert_close(got[0], adam_by_hand(params, steps[:1], 0.01, weight_decay=0.5))
    assert_close(got[2], adam_by_hand(params, steps, 0.01, weight_decay=0.5))
    # Adam's first step has the size of the rate whatever the gradient: with p = -2, g = 0.1 decay turns its sign.
    one = {"text_embedding": {"embedding": jnp.array([-2.0])}, "kernel": jnp.array([2.0])}
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 0.1), one)
    moved = run(optimizer, one, [gradient])[0]
    np.testing.assert_allclose([moved["text_embedding"]["embedding"][0], moved["kernel"][0]], [-1.99, 1.99], rtol=1e-5)


def test_clipping_is_by_the_norm_over_all_groups():
    one = {"text_embedding": {"embedding": jnp.array([1.0])}, "kernel": jnp.array([1.0])}
    optimizer, _ = make_optimizer(settings(clip_norm=1.0, ramp_epochs=0), ["text"], steps_per_epoch=5)
    small = {"text_embedding": {"embedding": jnp.array([0.3])}, "kernel": jnp.array([0.4])}  # norm 0.5: left alone
    large = {"text_embedding": {"embedding": jnp.array([6.0])}, "kernel": jnp.array([8.0])}  # norm 10: a tenth of it
    clipped = jax.tree.map(lambda g: g / 10, large)
    got = run(optimizer, one, [small, large, small])[-1]
    assert_close(got, adam_by_hand(one, [small, clipped, small], 0.01))
    with pytest.raises(AssertionError):  # each group by its own norm would be something else
        assert_close(got, adam_by_hand(one, [small, jax.tree.map(jnp.sign, large), small], 0.01))


def test_a_zero_gradient_moves_nothing(params):
    optimizer, _ = make_optimizer(settings(clip_norm=1.0), ["text"], steps_per_epoch=5)
    moved = run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])[0]
    jax.tree.map(np.testing.assert_array_equal, moved, params)
