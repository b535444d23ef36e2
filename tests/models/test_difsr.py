"""DIF-SR: its size, and its equations by loops."""

import functools

import jax
import numpy as np
import pytest
from model_cases import DIM, HISTORY, LENGTH, MODALITIES, QUICK, build, dense, feed_forward, make, norm, shapes, softmax

from kdsr_jax.models.embeddings import FUSIONS
from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = 2


def expected_count(student):
    d, w, m, n = student.dim, student.table_width, len(student.modalities), student.max_length
    narrow = max(1, d // student.num_heads // 2) * student.num_heads  # of a modality's queries and keys
    count = (student.num_items + 1) * d  # id table
    count += n * d  # positions
    count += 2 * d  # norm of the input
    layer = 2 * (2 * d * d + d)  # query and key of items and of positions; no bias for the keys
    layer += m * (2 * w * narrow + narrow)  # query and key of every modality
    layer += 2 * (d * d + d)  # value and out
    layer += 2 * d * 2 * d + 2 * d + d  # feed-forward d -> 2d -> d with biases
    layer += 2 * 2 * d  # two norms
    layer += {"sum": 0, "concat": (2 + m) * n * n + n, "gate": n * n + n + n}[student.fusion]  # of rows of scores
    count += student.num_layers * layer
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "gate"},
        {"fusion": "concat", "num_layers": 3},
        {"fusion": "sum", "tables": "frozen", "table_width": 4},
        {"fusion": "concat", "tables": "none"},
        {"fusion": "gate", "modalities": ("text",), "table_width": 12, "num_heads": 8},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("difsr", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def score_row(layer, streams, h, i):
    """Scores of query i in head h by every stream, [S, LENGTH]; keys that it may not read count as zero."""
    rows = np.zeros((len(streams), LENGTH))
    for s, (name, x) in enumerate(streams.items()):
        query, key = dense(layer[f"query_{name}"], x), dense(layer[f"key_{name}"], x)
        width = query.shape[1] // HEADS
        part = slice(h * width, (h + 1) * width)
        for j in range(i + 1):
            rows[s, j] = query[i, part] @ key[j, part]
    return rows


def fuse_rows(layer, rows, fusion):
    """One row [LENGTH] of the rows [S, LENGTH]: their sum, a linear map of all, or weighed by an MLP of each."""
    if fusion == "sum":
        return rows.sum(0)
    if fusion == "concat":
        return np.concatenate(rows) @ layer["concat_kernel"].reshape(-1, LENGTH) + layer["concat_bias"]
    hidden = [np.maximum(row @ layer["gate_kernel"] + layer["gate_bias"], 0) for row in rows]
    weights = softmax([h @ layer["gate_out"]["kernel"][:, 0] for h in hidden])
    return weights @ rows


@pytest.mark.parametrize("fusion", FUSIONS)
def test_states_equal_the_equations_by_loops(fusion):
    student, variables = build("difsr", fusion=fusion, table_width=6, num_layers=2)
    states = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)(variables, HISTORY)
    params = jax.tree.map(np.asarray, variables["params"])
    encoder = params["encoder"]
    assert encoder["layer_0"]["query_image"]["kernel"].shape == (6, DIM // 2)
    for b, row in enumerate(HISTORY):
        items = row[row > 0]
        sides = {"position": encoder["position_embedding"][: len(items)]}
        sides |= {name: params[f"{name}_embedding"]["embedding"][items] for name in MODALITIES}
        x = norm(encoder["input_norm"], params["item_embedding"]["embedding"][items])
        for index in range(2):
            layer, mixed, width = encoder[f"layer_{index}"], np.zeros_like(x), DIM // HEADS
            value = dense(layer["value"], x)
            for h in range(HEADS):
                part = slice(h * width, (h + 1) * width)
                for i in range(len(items)):
                    fused = fuse_rows(layer, score_row(layer, {"item": x} | sides, h, i), fusion)
                    mixed[i, part] = softmax(fused[: i + 1] / np.sqrt(width)) @ value[: i + 1, part]
            x = feed_forward(layer, norm(layer["attention_norm"], x + dense(layer["out"], mixed)))
        np.testing.assert_allclose(states[b][: len(items)], x, rtol=1e-3, atol=1e-3)
