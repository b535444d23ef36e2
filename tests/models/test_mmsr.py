"""MMSR: its size, its start, its network by loops in both forms, padding, gradients."""

import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from graph_cases import (
    HISTORIES,
    ROWS,
    check_padding_and_neighbours,
    check_repeats_share_a_node,
    gate_by_loops,
    gradients,
    items_of,
    network_by_loops,
    rows_of,
    rows_reached,
    soft,
    states_of,
)
from model_cases import DIM, MISSING, MODALITIES, WITHOUT_FIRST, build, dense, facts_of, make, names, shapes

from kdsr_jax.models.student import count_parameters, init_student

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUIRKS = [FrozenDict({"official_quirks": True}), FrozenDict({"official_quirks": False})]


def expected_count(student):
    d, w, m, kinds = student.dim, student.table_width, len(student.clustered), 1 + len(student.clustered)
    count = (student.num_items + 1) * d  # id table
    count += m * student.num_clusters * w  # cluster vectors
    count += kinds * d + student.max_length * d + 3 * d * d  # kinds, positions, W of [vector; kind; position]
    layer = 4 * d  # a_r
    layer += kinds * d * d * (1 if student.options["official_quirks"] else 3)  # values, queries, keys
    layer += d * d + d + d + 1  # gate between the two orders
    count += student.num_layers * layer
    if w != d:
        count += m * (w * d + d)  # a linear map per modality's clusters
    if student.modalities:
        count += m * (student.num_items + 1) * w + d * d + d + d + 1  # modality tables and the gate that fuses them
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 2, "options": QUIRKS[1]},
        {"table_width": 4, "modalities": ("text",)},
        {"tables": "tuned"},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("mmsr", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)
    assert names(student)[0]["encoder/text_clusters"] == (student.num_clusters, student.table_width)


def test_clusters_start_as_centres_spread_over_the_interval_of_all_other_parameters():
    student, bound = make("mmsr"), DIM**-0.5
    facts = facts_of(student)
    facts["image"] = facts["image"]._replace(centres=facts["image"].centres * 7 + 3)
    facts["text"] = facts["text"]._replace(centres=np.ones_like(facts["text"].centres))
    params, frozen = jax.jit(lambda: init_student(student, jax.random.key(0), {}, facts))()
    rows, centres = np.asarray(params["encoder"]["image_clusters"]), facts["image"].centres
    np.testing.assert_allclose([rows.min(), rows.max()], [-bound, bound], rtol=1e-6)
    low, high = centres.min(), centres.max()
    np.testing.assert_allclose((rows + bound) / (2 * bound), (centres - low) / (high - low), atol=1e-6)
    assert not np.any(params["encoder"]["text_clusters"])  # all alike: nothing to spread
    np.testing.assert_array_equal(frozen["image_links"], facts["image"].links)
    network = params["encoder"]["graph"]
    for leaf in (
        params["item_embedding"]["embedding"][1:],
        network["join"],
        network["layer_0"]["value_item"]["kernel"],
    ):
        assert 0.8 * bound < np.abs(leaf).max() <= bound
        assert abs(np.mean(leaf)) < bound / 4


def network_of(student, variables, row):
    """The states at each position of one history, by loops."""
    params = jax.tree.map(np.asarray, variables["params"])
    sequence = [int(item) for item in row if item]
    links = {name: np.asarray(variables["frozen"][f"{name}_links"]) for name in student.clustered}
    shows = {"item": [[item] for item in sequence]}
    shows |= {name: [[int(c) for c in links[name][item] if c >= 0] for item in sequence] for name in links}

    def vector(kind, name):
        if kind != "item":
            cluster, width = params["encoder"][f"{kind}_clusters"][name], student.table_width
            return cluster if width == student.dim else dense(params["encoder"][f"project_{kind}"], cluster)
        own = [params[f"{kind}_embedding"]["embedding"][name] for kind in ("item", *student.modalities)]
        return own[0] if len(own) == 1 else gate_by_loops(params["fuse"], own)

    quirks = student.options["official_quirks"]
    states = network_by_loops(params["encoder"]["graph"], shows, vector, quirks, student.num_layers)
    return np.array([states["item", item] for item in sequence])


@pytest.mark.parametrize(
    "changes",
    [
        {"options": QUIRKS[0], "num_layers": 2},
        {"options": QUIRKS[1], "num_layers": 2, "modalities": ("text",), "table_width": 4},
        {"options": QUIRKS[0], "tables": "tuned"},
    ],
    ids=str,
)
def test_network_equals_loops(changes):
    student, variables = soft(*build("mmsr", **changes))
    states = states_of(student, variables, HISTORIES)
    for row, got in zip(HISTORIES, states, strict=True):
        expected = network_of(student, variables, row)
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_padding_and_neighbours_change_nothing():
    check_padding_and_neighbours("mmsr", tables="tuned", num_layers=2)


def test_repeats_share_a_node():
    check_repeats_share_a_node("mmsr")


@pytest.mark.parametrize("options", QUIRKS, ids=["official", "intended"])
def test_gradients_reach_the_items_and_their_clusters(options):
    _, variables = build("mmsr", options=options)
    gradient = gradients("mmsr", "none", options=options)
    assert rows_reached(gradient["item_embedding"]["embedding"]) == items_of(ROWS)
    assert set(gradient) == {"item_embedding", "encoder"}
    for name in MODALITIES:
        links = np.asarray(variables["frozen"][f"{name}_links"])[sorted(items_of(ROWS))]
        assert rows_reached(gradient["encoder"][f"{name}_clusters"]) == set(links[links >= 0])


def test_items_without_any_feature_have_no_clusters():
    gradient = gradients("mmsr", "none", rows_of(MISSING, MISSING), options=QUIRKS[0])
    assert not any(gradient["encoder"][f"{name}_clusters"].any() for name in MODALITIES)
    assert rows_reached(gradient["item_embedding"]["embedding"]) == {MISSING}
    gradient = gradients("mmsr", "none", rows_of(WITHOUT_FIRST), options=QUIRKS[0])
    assert not gradient["encoder"]["image_clusters"].any()
    assert gradient["encoder"]["text_clusters"].any()


def test_tuned_tables_are_trained_and_fused_into_the_items():
    gradient = gradients("mmsr", "tuned")
    for name in ("item", *MODALITIES):
        assert rows_reached(gradient[f"{name}_embedding"]["embedding"]) == items_of(ROWS)
