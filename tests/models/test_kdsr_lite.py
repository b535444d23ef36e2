"""The backbone of KDSR's official code: its size, its equations by loops, padding, gradients."""

import jax
import numpy as np
import pytest
from graph_cases import (
    HISTORIES,
    ROWS,
    check_padding_and_neighbours,
    check_repeats_share_a_node,
    gate_by_loops,
    gradients,
    items_of,
    leaky,
    newest_scores,
    relations_by_loops,
    rows_reached,
    states_of,
)
from model_cases import MODALITIES, build, dense, make, shapes, softmax

from kdsr_jax.models.embeddings import FUSIONS
from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    if w != d:
        count += m * (w * d + d)  # a linear map per modality
    count += student.num_layers * (d * d + 4 * d + 4)  # W, a_r, c_r
    return count + {"gate": d * d + d + d + 1, "concat": (2 + m) * d * d + d, "sum": 0}[student.fusion]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 2, "tables": "none"},
        {"fusion": "concat", "table_width": 4, "modalities": ("text",)},
        {"fusion": "sum", "tables": "frozen"},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("kdsr_lite", **changes)
    assert student.readout == "last_sum"
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def attention_by_loops(layer, nodes, related):
    """Apply the relational layer to dict item -> vector."""
    x = {item: dense(layer["value"], vector) for item, vector in nodes.items()}
    out = {}
    for u in nodes:
        near = [v for v in nodes if (("item", u), ("item", v)) in related]
        numbers = [related[("item", u), ("item", v)] - 1 for v in near]
        scores = [
            leaky(layer["relation"][r] @ (x[u] * x[v])) * layer["relation_factor"][r]
            for r, v in zip(numbers, near, strict=True)
        ]
        out[u] = sum(weight * x[v] for weight, v in zip(softmax(scores), near, strict=True))
    return out


def model_by_loops(student, variables, row):
    """The states at each position of one history."""
    params = jax.tree.map(np.asarray, variables["params"])
    sequence = [int(item) for item in row if item]
    related = relations_by_loops({"item": [[item] for item in sequence]})
    tables = [params[f"{name}_embedding"]["embedding"] for name in ("item", *student.modalities)]
    nodes = {item: tables[0][item] for item in sequence}
    for index in range(student.num_layers):
        nodes = attention_by_loops(params["encoder"][f"layer_{index}"], nodes, related)
    states = []
    for item in sequence:
        slots = [tables[0][item], nodes[item], *(table[item] for table in tables[1:])]
        if student.fusion == "concat":
            states.append(dense(params["encoder"]["fuse"]["concat"], np.concatenate(slots)))
        else:
            states.append(sum(slots) if student.fusion == "sum" else gate_by_loops(params["encoder"]["fuse"], slots))
    return np.array(states)


@pytest.mark.parametrize(
    "changes",
    [*({"fusion": fusion} for fusion in FUSIONS), {"num_layers": 2, "tables": "none"}],
    ids=str,
)
def test_states_equal_loops(changes):
    student, variables = build("kdsr_lite", **changes)
    states = states_of(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, states, strict=True):
        expected = model_by_loops(student, variables, row)
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_the_last_two_positions():
    student, variables = build("kdsr_lite")
    scores = newest_scores(student, variables, HISTORIES)
    ids = np.asarray(variables["params"]["item_embedding"]["embedding"])[1:]
    for row, got in zip(HISTORIES, scores, strict=True):
        states = model_by_loops(student, variables, row)
        read = states[-1] + states[max(0, len(states) - 2)]  # a single item counts twice
        np.testing.assert_allclose(got, ids @ read, rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_change_nothing():
    check_padding_and_neighbours("kdsr_lite", num_layers=2)


def test_repeats_share_a_node():
    check_repeats_share_a_node("kdsr_lite")


@pytest.mark.parametrize("tables", ["tuned", "frozen"])
def test_gradients_reach_the_tables_they_should(tables):
    gradient = gradients("kdsr_lite", tables)
    reached = ["item", *MODALITIES] if tables == "tuned" else ["item"]
    assert {name for name in gradient if name.endswith("_embedding")} == {f"{name}_embedding" for name in reached}
    for name in reached:
        assert rows_reached(gradient[f"{name}_embedding"]["embedding"]) == items_of(ROWS)
    for leaf in jax.tree.leaves(gradient["encoder"]):
        assert leaf.any()
