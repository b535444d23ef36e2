"""MMSR with a node per item and modality: its size, its network by loops, padding, gradients."""

import jax
import numpy as np
import pytest
from graph_cases import (
    HISTORIES,
    ROWS,
    check_padding_and_neighbours,
    check_repeats_share_a_node,
    gradients,
    items_of,
    network_by_loops,
    newest_scores,
    rows_of,
    rows_reached,
    soft,
    states_of,
)
from model_cases import MISSING, MODALITIES, WITHOUT_FIRST, build, dense, make, shapes

from kdsr_jax.models.student import count_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_count(student):
    d, w, m, kinds = student.dim, student.table_width, len(student.modalities), 1 + len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    if w != d:
        count += m * (w * d + d)  # a linear map per modality
    count += kinds * d + student.max_length * d + 3 * d * d  # kinds, positions, W of [vector; kind; position]
    layer = 4 * d + kinds * d * d  # a_r, values
    layer += d * d + d + d + 1  # gate between the two orders
    count += student.num_layers * layer
    return count + d * d + d + 2 * d * d  # W1, W2, W3 of Eq. 6


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers": 3}, {"table_width": 4, "modalities": ("text",)}, {"tables": "frozen"}, {"tables": "none"}],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("mmsr_nodes", **changes)
    assert student.readout == "long_short"
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def network_of(student, variables, row):
    """The item states at each position of one history, by loops."""
    params = jax.tree.map(np.asarray, variables["params"])
    sequence = [int(item) for item in row if item]
    shows = {"item": [[item] for item in sequence]}
    for name in student.modalities:
        has_feature = np.asarray(variables["frozen"][f"{name}_has_feature"])
        shows[name] = [[item] if has_feature[item] else [] for item in sequence]

    def vector(kind, item):
        own = params[f"{kind}_embedding"]["embedding"][item]
        mapped = kind != "item" and student.table_width != student.dim
        return dense(params["encoder"][f"project_{kind}"], own) if mapped else own

    states = network_by_loops(params["encoder"]["graph"], shows, vector, True, student.num_layers)
    return np.array([states["item", item] for item in sequence])


@pytest.mark.parametrize(
    "changes", [{"num_layers": 2}, {"modalities": ("text",), "table_width": 4}, {"tables": "none"}], ids=str
)
def test_network_equals_loops(changes):
    student, variables = soft(*build("mmsr_nodes", **changes))
    states = states_of(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, states, strict=True):
        expected = network_of(student, variables, row)
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_equation_6():
    student, variables = soft(*build("mmsr_nodes", num_layers=2))
    params = jax.tree.map(np.asarray, variables["params"])
    scores = newest_scores(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, scores, strict=True):
        states = network_of(student, variables, row)
        hidden = np.maximum(states @ params["read"]["attention_hidden"]["kernel"], 0)
        alpha = hidden @ params["read"]["attention_out"]["kernel"]
        short_term, long_term = (alpha * states)[-student.short_term :].sum(0), states.mean(0)
        read = np.concatenate([short_term, long_term]) @ params["read"]["join"]["kernel"]
        expected = params["item_embedding"]["embedding"][1:] @ read
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_change_nothing():
    check_padding_and_neighbours("mmsr_nodes", num_layers=2)


def test_repeats_share_a_node():
    check_repeats_share_a_node("mmsr_nodes")


@pytest.mark.parametrize("tables", ["tuned", "frozen"])
def test_gradients_reach_the_nodes_there_are(tables):
    gradient = gradients("mmsr_nodes", tables)
    assert rows_reached(gradient["item_embedding"]["embedding"]) == items_of(ROWS)
    if tables == "frozen":
        assert set(gradient) == {"item_embedding", "encoder", "read"}
        return
    assert rows_reached(gradient["image_embedding"]["embedding"]) == items_of(ROWS, {MISSING, WITHOUT_FIRST})
    assert rows_reached(gradient["text_embedding"]["embedding"]) == items_of(ROWS, {MISSING})


def test_an_item_without_features_has_its_own_node_only():
    gradient = gradients("mmsr_nodes", "tuned", rows_of(MISSING, MISSING))
    assert rows_reached(gradient["item_embedding"]["embedding"]) == {MISSING}
    assert not any(gradient[f"{name}_embedding"]["embedding"].any() for name in MODALITIES)
    assert not any(gradient["encoder"]["graph"]["layer_0"][f"value_{name}"]["kernel"].any() for name in MODALITIES)
