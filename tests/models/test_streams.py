"""What NOVA and DIF-SR share: side information says where to look, and only item ids are looked at; nothing sees the future."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    DIM,
    HISTORY,
    LENGTH,
    MODALITIES,
    QUICK,
    N,
    build,
    futures,
    make,
    names,
    next_item_gradient,
    scorer,
)

from kdsr_jax.models.embeddings import FUSIONS
from kdsr_jax.optim import path_name

pytestmark = pytest.mark.usefixtures("quick_compilation")

STREAMS = [(backbone, fusion) for backbone in ("nova", "difsr") for fusion in FUSIONS]
# Where every fusion is compiled anew at length: make test takes the gate, make check the others.
GATE_FIRST = [pytest.param(*case, marks=() if case[1] == "gate" else pytest.mark.slow) for case in STREAMS]
NARROW = {"table_width": 4, "num_layers": 2}
PERMUTED = np.random.default_rng(5).permutation(np.arange(1, N + 1))[: 3 * LENGTH].reshape(3, LENGTH).astype(np.int32)


@functools.cache
def trained(backbone, fusion):
    """A compiled (params, history, weight [L], key) -> gradient of sum_t weight_t |state_t| with dropout, and the states."""
    student, variables = build(backbone, fusion=fusion)
    student = student.clone(hidden_dropout=0.3, attention_dropout=0.3)

    def total(params, history, weight, key):
        given = variables | {"params": params}
        states = student.apply(given, history, False, method="encode", rngs={"dropout": key})
        return jnp.sum(jnp.abs(states) * weight[None, :, None] * jnp.arange(DIM)[None, None]), states

    step = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
    return lambda *arguments: jax.tree.map(np.asarray, step(variables["params"], *arguments))


@pytest.mark.slow  # with one layer, test_every_model.py has the same
@pytest.mark.parametrize(("backbone", "fusion"), STREAMS)
def test_future_items_do_not_change_a_bit_of_any_score(backbone, fusion):
    score = scorer(backbone, fusion=fusion, **NARROW)
    now = score(PERMUTED)
    for i, other, cut in futures(PERMUTED):
        for changed in (other, cut):
            after = score(changed)
            np.testing.assert_array_equal(after[:, : i + 1], now[:, : i + 1])
            assert (after[:, i + 1] != now[:, i + 1]).any()


@pytest.mark.parametrize(("backbone", "fusion"), GATE_FIRST)
def test_training_does_not_see_the_future_either(backbone, fusion):
    step, key = trained(backbone, fusion), jax.random.key(0)
    _, now = step(PERMUTED, np.ones(LENGTH, np.float32), key)
    assert np.any(now != step(PERMUTED, np.ones(LENGTH, np.float32), jax.random.key(1))[1])
    for i, changed, _ in futures(PERMUTED):
        past = (np.arange(LENGTH) <= i).astype(np.float32)
        gradient, states = step(changed, past, key)
        np.testing.assert_array_equal(states[:, : i + 1], now[:, : i + 1])
        later = np.setdiff1d(changed[:, i + 1 :], changed[:, : i + 1])
        for name in ("item", *MODALITIES):
            table = gradient[f"{name}_embedding"]["embedding"]
            assert not table[later].any()
            assert table[changed[:, : i + 1]].any() or not i  # a single item has nowhere else to look


@pytest.mark.parametrize(("backbone", "fusion"), GATE_FIRST)
def test_padding_and_neighbours_change_nothing(backbone, fusion):
    score, real = scorer(backbone, fusion=fusion, **NARROW), HISTORY > 0
    together = score(HISTORY)
    np.testing.assert_allclose(
        together[1:2, :3], score(HISTORY[1:2, :3]), rtol=1e-5, atol=1e-5
    )  # another bucket, alone
    others = np.concatenate([HISTORY[2:], np.zeros((1, LENGTH), np.int32), HISTORY[:1]])
    np.testing.assert_allclose(
        score(others)[[2, 0]][real[[0, 2]]], together[[0, 2]][real[[0, 2]]], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("backbone", ["nova", "difsr"])
def test_parameters_do_not_depend_on_the_bucket(backbone, fusion):
    student = make(backbone, fusion=fusion)
    short, full = (
        jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, length), jnp.int32)) for length in (1, LENGTH)
    )
    assert short == full


# --- side information ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["nova", "difsr"])
def test_values_are_items_alone(backbone):
    # The first item has only itself to look at: no table, no position and no fusion can change its state.
    student, variables = build(backbone, fusion="gate", num_layers=2)
    encode = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)
    now, params = np.asarray(encode(variables, HISTORY)), dict(variables["params"])
    for name in MODALITIES:
        params[f"{name}_embedding"] = jax.tree.map(lambda table: 3 * table[::-1], params[f"{name}_embedding"])
    params["encoder"] = params["encoder"] | {"position_embedding": -params["encoder"]["position_embedding"]}
    after = np.asarray(encode(variables | {"params": params}, HISTORY))
    np.testing.assert_allclose(after[:, 0], now[:, 0], rtol=1e-5, atol=1e-6)
    assert (np.abs(after[0, 1:] - now[0, 1:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("backbone", ["nova", "difsr"])
def test_ids_and_positions_are_enough(backbone):
    plain = names(make(backbone, tables="none", fusion="gate"))[0]
    assert set(plain) < set(names(make(backbone, fusion="gate"))[0])
    score = scorer(backbone, "none", fusion="gate")
    now, swapped = score(HISTORY), HISTORY[:, [1, 0, 2, 3, 4, 5]]
    assert np.abs(score(swapped)[0, 2] - now[0, 2]).max() > 1e-3  # without positions, order would not matter


@pytest.mark.parametrize(
    ("backbone", "tables", "fusion"),
    [
        ("nova", "tuned", "gate"),
        ("nova", "frozen", "concat"),
        ("difsr", "tuned", "concat"),
        ("difsr", "frozen", "gate"),
    ],
)
def test_gradients_are_finite_and_reach_the_tables_they_should(backbone, tables, fusion):
    # a repeat, items without features, a length of one and an empty row
    history = np.concatenate([HISTORY, np.zeros((1, LENGTH), np.int32)])
    gradient = next_item_gradient(*build(backbone, tables, fusion=fusion), history, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path_name(path)
        assert leaf.any(), path_name(path)
    reached = ("item", *MODALITIES) if tables == "tuned" else ("item",)
    assert {name for name in gradient if name.endswith("_embedding")} == {f"{name}_embedding" for name in reached}
    read = np.unique(HISTORY[HISTORY.astype(bool).sum(1) > 1])[1:]  # a lone item has nowhere to look
    for name in reached[1:]:
        rows = gradient[f"{name}_embedding"]["embedding"].any(1)
        assert set(np.flatnonzero(rows)) == set(read)
    assert not gradient["item_embedding"]["embedding"][0].any()
