"""NOVA: its size, and its equations by loops."""

import functools

import jax
import numpy as np
import pytest
from model_cases import (
    DIM,
    HISTORY,
    MODALITIES,
    QUICK,
    build,
    dense,
    feed_forward,
    make,
    norm,
    shapes,
    sigmoid,
    softmax,
)

from kdsr_jax.models.embeddings import FUSIONS
from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    count += student.max_length * d  # positions
    count += 2 * d  # norm of the input
    layer = 4 * d * d + 3 * d  # query, key, value, out; no bias for the key
    layer += 2 * d * 2 * d + 2 * d + d  # feed-forward d -> 2d -> d with biases
    layer += 2 * 2 * d  # two norms
    layer += {"gate": d, "concat": (2 + m) * d * d + d, "sum": 0}[student.fusion]  # of item, position and modalities
    count += student.num_layers * layer
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    if w != d:
        count += m * (w * d + d)  # a linear map per modality
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "gate"},
        {"fusion": "concat", "num_layers": 3},
        {"fusion": "sum", "tables": "frozen", "table_width": 4},
        {"fusion": "concat", "tables": "none"},
        {"fusion": "gate", "modalities": ("text",), "table_width": 12},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("nova", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def fused(encoder, streams, fusion, index):
    """F of every position: the streams [L, d] added up, joined by a linear map, or each times its own gate."""
    if fusion == "sum":
        return sum(streams)
    if fusion == "concat":
        return dense(encoder[f"fuse_{index}"]["concat"], np.concatenate(streams, axis=1))
    weight = encoder[f"fuse_{index}"]["kernel"][:, 0]
    return np.stack([sum(sigmoid(x[t] @ weight) * x[t] for x in streams) for t in range(len(streams[0]))])


def attention_by_loops(layer, x, context, heads):
    """Queries and keys of the context, values of x, no key later than its query."""
    query, key, value = dense(layer["query"], context), dense(layer["key"], context), dense(layer["value"], x)
    mixed, width = np.zeros_like(x), DIM // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(x)):
            weights = softmax([query[i, part] @ key[j, part] / np.sqrt(width) for j in range(i + 1)])
            mixed[i, part] = sum(weight * value[j, part] for j, weight in enumerate(weights))
    return dense(layer["out"], mixed)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_states_equal_the_equations_by_loops(fusion):
    student, variables = build("nova", fusion=fusion, table_width=4, num_layers=2)
    states = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)(variables, HISTORY)
    params = jax.tree.map(np.asarray, variables["params"])
    encoder = params["encoder"]
    for b, row in enumerate(HISTORY):
        items = row[row > 0]
        sides = [encoder["position_embedding"][: len(items)]]
        sides += [
            dense(encoder[f"project_{name}"], params[f"{name}_embedding"]["embedding"][items]) for name in MODALITIES
        ]
        x = norm(encoder["input_norm"], params["item_embedding"]["embedding"][items])
        for index in range(2):
            layer = encoder[f"layer_{index}"]
            context = fused(encoder, [x, *sides], fusion, index)  # with this layer's x, but ever the same sides
            x = norm(layer["attention_norm"], x + attention_by_loops(layer["attention"], x, context, 2))
            x = feed_forward(layer, x)
        np.testing.assert_allclose(states[b][: len(items)], x, rtol=1e-3, atol=1e-3)
