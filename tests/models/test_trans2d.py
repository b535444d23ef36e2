"""Trans2D: its size, its three terms against explicit sums, its equations by loops, and where it may look."""

import functools

import jax
import numpy as np
import pytest
from model_cases import HISTORY, LENGTH, MODALITIES, QUICK, N, build, gelu, make, shapes, softmax, states_gradient

from kdsr_jax.models.backbones.trans2d import cell_scores
from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = 2
ROWS, STEPS, CHANNELS, WIDTH = 2, 4, 3, 5
VALID = np.array([[True, True, True, False], [True, False, False, False]])


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    channels = 1 + m
    count = (student.num_items + 1) * d  # id table
    count += student.max_length * d  # positions
    count += 2 * channels * d  # norm of the input
    layer = 4 * (d * d + d)  # query, key, value and out
    layer += 2 * d * 2 * d + 2 * d + d  # feed-forward d -> 2d -> d with biases
    layer += 2 * 2 * d  # two norms
    count += student.num_layers * (channels * layer + 3)  # all of it for every channel; three alphas
    if w != d:
        count += m * (w * d + d)  # a linear map per modality
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "tables": "frozen", "table_width": 4},
        {"tables": "none"},
        {"modalities": ("text",), "table_width": 12, "num_heads": 4},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("trans2d", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


@pytest.fixture(scope="module")
def compare():
    """A compiled (query, key, alphas) -> scores of the constants' shape, VALID of which is real."""
    return jax.jit(lambda query, key, alphas: cell_scores(query, key, VALID, alphas), compiler_options=QUICK)


@pytest.fixture(scope="module")
def cells():
    """Queries and keys [B, L, C, H, w]."""
    return np.random.default_rng(0).normal(size=(2, ROWS, STEPS, CHANNELS, HEADS, WIDTH)).astype(np.float32)


def full_term(query, key, valid, i, c, j, e):
    return query[i, c] @ key[j, e]


def feature_term(query, key, valid, i, c, j, e):
    return sum(query[step, c] @ key[step, e] for step in range(STEPS) if valid[step])


def time_term(query, key, valid, i, c, j, e):
    return sum(query[i, channel] @ key[j, channel] for channel in range(CHANNELS))


@pytest.mark.parametrize(("index", "term"), [(0, full_term), (1, feature_term), (2, time_term)])
def test_each_term_equals_its_sum(compare, cells, index, term):
    alphas = np.zeros(3, np.float32)
    alphas[index] = 1.5
    scores = np.asarray(compare(*cells, alphas))
    assert scores.shape == (ROWS, HEADS, STEPS * CHANNELS, STEPS * CHANNELS)
    scores = scores.reshape(ROWS, HEADS, STEPS, CHANNELS, STEPS, CHANNELS)
    for b, h, i, c, j, e in np.ndindex(scores.shape):
        query, key = cells[:, b, :, :, h]
        expected = 1.5 * term(query, key, VALID[b], i, c, j, e) / np.sqrt(WIDTH)
        np.testing.assert_allclose(scores[b, h, i, c, j, e], expected, rtol=1e-4, atol=1e-5)


def test_terms_are_added_and_padding_is_in_no_sum_over_positions(compare, cells):
    weights = np.array([0.5, -2.0, 3.0], np.float32)
    total = compare(*cells, weights)
    parts = [compare(*cells, weights * np.eye(3, dtype=np.float32)[index]) for index in range(3)]
    np.testing.assert_allclose(total, sum(parts), rtol=1e-4, atol=1e-4)
    other = cells.copy()
    other[:, ~VALID] += 100
    real = np.repeat(VALID, CHANNELS, axis=1)
    real = np.broadcast_to((real[:, :, None] & real[:, None])[:, None], total.shape)
    np.testing.assert_array_equal(np.asarray(compare(*other, weights))[real], np.asarray(total)[real])


def channel_dense(layer, x):
    return np.stack([x[:, c] @ layer["kernel"][c] + layer["bias"][c] for c in range(x.shape[1])], axis=1)


def grid_norm(layer, x):
    centred = x - x.mean((1, 2), keepdims=True)
    deviation = np.sqrt((centred**2).mean((1, 2), keepdims=True) + 1e-12)
    return layer["scale"].reshape(x.shape[-2:]) * centred / deviation + layer["bias"].reshape(x.shape[-2:])


def grid_layer_by_loops(layer, x, heads):
    """Apply a layer to the real positions of one history, x [n, C, d]."""
    length, channels, dim = x.shape
    query, key, value = (channel_dense(layer[name], x) for name in ("query", "key", "value"))
    mixed, width = np.zeros_like(x), dim // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = query[..., part], key[..., part], value[..., part]
        for i, c in np.ndindex(length, channels):
            read = [(j, e) for j in range(i + 1) for e in range(channels)]
            scores = []
            for j, e in read:
                terms = (
                    q[i, c] @ k[j, e],
                    sum(q[step, c] @ k[step, e] for step in range(length)),
                    sum(q[i, other] @ k[j, other] for other in range(channels)),
                )
                scores.append(np.dot(layer["alphas"], terms) / np.sqrt(width))
            mixed[i, c, part] = sum(weight * v[cell] for weight, cell in zip(softmax(scores), read, strict=True))
    x = grid_norm(layer["attention_norm"], x + channel_dense(layer["out"], mixed))
    return grid_norm(layer["outer_norm"], x + channel_dense(layer["outer"], gelu(channel_dense(layer["inner"], x))))


def test_trans2d_equals_its_transcription():
    student, variables = build("trans2d", num_layers=2, table_width=4)
    params, own = variables["params"], variables["params"]["encoder"]
    encode = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)
    states = np.asarray(encode(variables, HISTORY))
    for b, row in enumerate(HISTORY):
        row = row[row > 0]
        channels = [params["item_embedding"]["embedding"][row]]
        for name in MODALITIES:
            project = own[f"project_{name}"]
            channels.append(params[f"{name}_embedding"]["embedding"][row] @ project["kernel"] + project["bias"])
        x = np.stack(channels, axis=1) + own["position_embedding"][: len(row), None]
        x = grid_norm(own["input_norm"], x)
        for index in range(2):
            x = grid_layer_by_loops(own[f"layer_{index}"], x, HEADS)
        np.testing.assert_allclose(states[b, : len(row)], x.mean(1), rtol=1e-3, atol=1e-3)


def test_only_the_feature_term_sees_what_is_later():
    student, variables = build("trans2d")
    encode = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)
    own = variables["params"]["encoder"]
    alphas = {"alphas": np.array([1.0, 0.0, 1.0], np.float32)}
    blind = {"params": variables["params"] | {"encoder": own | {"layer_0": own["layer_0"] | alphas}}}
    later = HISTORY[:1].copy()
    later[:, 3:] = [[8, 2, 0]]
    now, then = (np.asarray(encode(variables | blind, history))[:, :3] for history in (HISTORY[:1], later))
    np.testing.assert_array_equal(now, then)
    assert np.abs(np.asarray(encode(variables, HISTORY[:1]) - encode(variables, later))[:, :3]).min() > 1e-6


def test_gradients_reach_the_tables_and_every_parameter_and_are_finite():
    student, variables = build("trans2d")
    empty = np.zeros((1, LENGTH), np.int32)
    gradient = states_gradient(student, variables, np.concatenate([HISTORY, empty]))
    read = np.isin(np.arange(N + 1), HISTORY[HISTORY > 0])
    for name in ("item", *MODALITIES):
        rows = np.abs(gradient[f"{name}_embedding"]["embedding"]).sum(1)
        np.testing.assert_array_equal(rows > 0, read)
    for leaf in jax.tree.leaves(gradient["encoder"]):
        assert leaf.any() and np.isfinite(leaf).all()


@pytest.mark.parametrize("rate", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_honoured(rate):
    student, variables = build("trans2d")
    student = student.clone(**{rate: 0.5})

    @functools.partial(jax.jit, compiler_options=QUICK)
    def encode(key):
        return student.apply(variables, HISTORY, False, method="encode", rngs={"dropout": key})

    first, other = (np.asarray(encode(jax.random.key(seed))) for seed in (0, 1))
    assert np.isfinite(first).all() and np.any(first != other)
