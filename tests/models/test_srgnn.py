"""SR-GNN: its size, its gated steps and its readout by loops, padding, gradients."""

import itertools

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
    newest_scores,
    rows_reached,
    states_of,
)
from model_cases import MODALITIES, build, dense, make, shapes, sigmoid

from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    count += (
        2 * (d * d + d) + 2 * d
    )  # maps of incoming and outgoing messages, each with a bias before and after the mean
    count += (2 * d * 3 * d + 3 * d) + (d * 3 * d + 3 * d)  # three gates from messages and from the state
    count += 2 * (d * d + d) + d  # query, key and weights of the soft attention
    count += 2 * d * d + d  # W3
    if m:
        count += m * (student.num_items + 1) * w + d * d + d + d + 1  # modality tables and the gate that fuses them
    return count


@pytest.mark.parametrize("changes", [{}, {"num_layers": 3}, {"tables": "tuned"}], ids=str)
def test_number_of_parameters(changes):
    student = make("srgnn", **changes)
    assert student.readout == "attention"
    assert count_parameters(shapes(student)[0]) == expected_count(student)  # steps share their parameters


def step_by_loops(encoder, h, sequence):
    """Let each node of dict item -> state take up the means of its distinct predecessors and successors."""
    links, new = set(itertools.pairwise(sequence)), {}
    for item, state in h.items():
        before = [dense(encoder["in"], h[u]) for u, v in links if v == item]
        after = [dense(encoder["out"], h[v]) for u, v in links if u == item]
        incoming = encoder["in_bias"] + (np.mean(before, axis=0) if before else 0)
        outgoing = encoder["out_bias"] + (np.mean(after, axis=0) if after else 0)
        of_message = np.split(dense(encoder["message"], np.concatenate([incoming, outgoing])), 3)
        of_state = np.split(dense(encoder["state"], state), 3)
        reset, update = (sigmoid(of_message[g] + of_state[g]) for g in (0, 1))
        candidate = np.tanh(of_message[2] + reset * of_state[2])
        new[item] = (1 - update) * candidate + update * state
    return new


def states_by_loops(student, variables, row):
    """The states at each position of one history."""
    params = jax.tree.map(np.asarray, variables["params"])
    sequence = [int(item) for item in row if item]
    own = {i: [params[f"{n}_embedding"]["embedding"][i] for n in ("item", *student.modalities)] for i in sequence}
    h = {item: v[0] if len(v) == 1 else gate_by_loops(params["fuse"], v) for item, v in own.items()}
    for _ in range(student.num_layers):
        h = step_by_loops(params["encoder"], h, sequence)
    return np.array([h[item] for item in sequence])


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"num_layers": 2, "tables": "tuned"}], ids=str)
def test_states_equal_loops(changes):
    student, variables = build("srgnn", **changes)
    states = states_of(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, states, strict=True):
        expected = states_by_loops(student, variables, row)
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_soft_attention_from_the_last_item():
    student, variables = build("srgnn", num_layers=2)
    params = jax.tree.map(np.asarray, variables["params"])
    scores = newest_scores(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, scores, strict=True):
        states, read = states_by_loops(student, variables, row), params["read"]
        total = np.zeros(student.dim)
        for state in states:
            hidden = sigmoid(dense(read["attention_query"], states[-1]) + dense(read["attention_key"], state))
            total = total + dense(read["attention_out"], hidden) * state
        expected = dense(read["join"], np.concatenate([total, states[-1]]))
        np.testing.assert_allclose(got, params["item_embedding"]["embedding"][1:] @ expected, rtol=1e-4, atol=1e-4)


def test_padding_and_neighbours_change_nothing():
    check_padding_and_neighbours("srgnn", num_layers=2)


def test_repeats_share_a_node():
    check_repeats_share_a_node("srgnn")


def test_gradients_reach_the_tables_they_should():
    gradient = gradients("srgnn", "tuned")
    for name in ("item", *MODALITIES):
        assert rows_reached(gradient[f"{name}_embedding"]["embedding"]) == items_of(ROWS)
    for leaf in jax.tree.leaves((gradient["encoder"], gradient["read"])):
        assert leaf.any()
