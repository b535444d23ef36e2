"""Histories as graphs: MMSR's relations on a drawn example, and everything against loops on drawn-at-random histories."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import BACKWARDS, relations_by_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr_jax.models import graph

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, LENGTH, ITEMS, CLUSTERS, LINKS = 4, 6, 4, 3, 2


def numbered(shown, labels):
    """Return dict (label, label) -> relation of one history, of what is not 0."""
    numbers = np.asarray(graph.relations([jnp.asarray(kind)[None] for kind in shown]))[0]
    assert all(numbers[i].max() == 0 and numbers[:, i].max() == 0 for i, label in enumerate(labels) if label is None)
    at = [(i, label) for i, label in enumerate(labels) if label is not None]
    return {(a, b): numbers[i, j] for (i, a), (j, b) in itertools.product(at, at) if numbers[i, j]}


def test_relations_of_mmsr_on_a_drawn_example():
    """Five items A..E, visited as A B A C C D E, with two image clusters each (C has no image) and one text cluster (D none).

    A: images 0 1, text 2; B: images 1 2, text 2; C: text 0; D: images 0 2; E: images 0 4, text 0.
    """
    a, b, c, d, e = 3, 5, 9, 4, 7
    history = np.array([a, b, a, c, c, d, e, 0])
    images = {a: [1, 0], b: [1, 2], c: [-1, -1], d: [0, 2], e: [4, 0], 0: [-1, -1]}
    texts = {a: [2], b: [2], c: [0], d: [-1], e: [0], 0: [-1]}
    image_ids, image_shown = graph.shown_attributes(jnp.array([[images[i] for i in history]]), 6)
    text_ids, text_shown = graph.shown_attributes(jnp.array([[texts[i] for i in history]]), 3)
    np.testing.assert_array_equal(image_ids, [[0, 1, 2, 4, -1, -1]])
    np.testing.assert_array_equal(text_ids, [[0, 2, -1]])
    items = graph.shown_items(jnp.asarray(history)[None])[0]
    labels = ["A", "B", None, "C", None, "D", "E", None, "i0", "i1", "i2", "i4", None, None, "t0", "t2", None]
    drawn = {(node, node): 1 for node in labels if node}  # 1 self
    drawn |= {("A", "B"): 4, ("A", "C"): 2, ("C", "D"): 2, ("D", "E"): 2}  # A B A goes both ways; C C is self alone
    # A B: 0-1 0-2 1-2, B A: 1-0 2-0 2-1, so these three go both ways; D E: 0-4 2-4, and 2-0, which is there; C cuts the rest
    drawn |= {("i0", "i1"): 4, ("i0", "i2"): 4, ("i1", "i2"): 4, ("i0", "i4"): 2, ("i2", "i4"): 2}
    drawn |= {("t2", "t0"): 2}  # A C; A B and C C are self alone, D cuts C from E
    drawn |= {pair: 5 for pair in [("A", "i0"), ("A", "i1"), ("B", "i1"), ("B", "i2"), ("D", "i0"), ("D", "i2")]}
    drawn |= {pair: 5 for pair in [("E", "i0"), ("E", "i4")]}
    drawn |= {pair: 7 for pair in [("A", "t2"), ("B", "t2"), ("C", "t0"), ("E", "t0")]}
    drawn |= {
        pair: 9 for pair in [("i0", "t2"), ("i1", "t2"), ("i2", "t2"), ("i0", "t0"), ("i4", "t0")]
    }  # of A, B and E
    other_way = {1: 1, 2: 3, 4: 4, 5: 6, 7: 8, 9: 10}
    expected = drawn | {(v, u): other_way[number] for (u, v), number in drawn.items()}
    assert numbered([items, image_shown[0], text_shown[0]], labels) == expected
    assert set(expected.values()) == set(range(1, 11))  # the example holds every relation


def padded(rows):
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)


histories = st.lists(st.lists(st.integers(1, ITEMS), min_size=0, max_size=LENGTH), min_size=ROWS, max_size=ROWS).map(
    padded
)
# what each item is linked to; -1s for an item without the feature, never the same cluster twice
linked = st.lists(
    st.one_of(st.just([-1] * LINKS), st.permutations(range(CLUSTERS)).map(lambda order: order[:LINKS])),
    min_size=ITEMS,
    max_size=ITEMS,
)


@jax.jit
def whole_graph(history, links):
    ids, attributes = graph.shown_attributes(links, CLUSTERS)
    items = graph.shown_items(history)
    return items, ids, attributes, graph.relations([items, attributes]), graph.successions(items)


@settings(max_examples=60)
@given(histories, linked)
def test_graphs_equal_loops(history, linked):
    links = np.array([[-1] * LINKS, *linked], np.int32)[history]
    items, ids, attributes, numbers, follows = map(np.asarray, whole_graph(history, links))
    for row, sequence in enumerate(history):
        sequence = [int(item) for item in sequence if item]
        shows = {
            "item": [[item] for item in sequence],
            "cluster": [[int(c) for c in links[row, p] if c >= 0] for p in range(len(sequence))],
        }
        first = {item: sequence.index(item) for item in sequence}
        distinct = sorted({c for shown in shows["cluster"] for c in shown})
        assert ids[row].tolist() == distinct + [-1] * (ids.shape[1] - len(distinct))
        slot = {("item", item): place for item, place in first.items()}
        slot |= {("cluster", c): LENGTH + place for place, c in enumerate(distinct)}
        expected = np.zeros_like(numbers[row])
        for (u, v), number in relations_by_loops(shows).items():
            expected[slot[u], slot[v]] = number
        np.testing.assert_array_equal(numbers[row], expected)
        shown = np.concatenate([items[row], attributes[row]], axis=1)
        expected = np.zeros_like(shown)
        for kind, positions in shows.items():
            for p, named in enumerate(positions):
                expected[p, [slot[kind, name] for name in named]] = True
        np.testing.assert_array_equal(shown, expected)
        expected = np.zeros_like(follows[row])
        for u, v in itertools.pairwise(sequence):
            expected[first[u], first[v]] = True
        np.testing.assert_array_equal(follows[row], expected)
        backwards = numbers[row, :LENGTH, :LENGTH].T
        np.testing.assert_array_equal(backwards, np.vectorize({0: 0, **BACKWARDS}.get)(numbers[row, :LENGTH, :LENGTH]))


@given(histories)
def test_states_go_back_to_every_position_of_their_item(history):
    nodes = np.arange(ROWS * LENGTH, dtype=np.float32).reshape(ROWS, LENGTH, 1)
    states = np.asarray(_at_positions(nodes, history))
    for row, position in itertools.product(range(ROWS), range(LENGTH)):
        first = history[row].tolist().index(history[row, position])
        assert states[row, position] == nodes[row, first]


_at_positions = jax.jit(graph.at_positions)


def test_there_are_no_more_slots_than_attributes_or_links():
    for length, most, expected in [(2, 30, 4), (4, 5, 5)]:
        links = jnp.zeros((1, length, 2), jnp.int32)
        ids, shown = jax.eval_shape(functools.partial(graph.shown_attributes, most=most), links)
        assert ids.shape == (1, expected)
        assert shown.shape == (1, length, expected)
