"""What the tests of graph models share: the graph and MMSR's network by loops over named nodes, and checks of prefix models.

The modules that use it compile quickly (fixture ``quick_compilation``).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import MISSING, WITHOUT_FIRST, build, dense, softmax

BACKWARDS = {1: 1, 2: 3, 3: 2, 4: 4}
# Both repeats next to each other and apart, items without features, a short history, one of a single item, one of padding.
ROWS = np.array(
    [
        [3, 9, 3, WITHOUT_FIRST, WITHOUT_FIRST, 1],
        [5, 2, 8, 0, 0, 0],
        [MISSING, 3, MISSING, 2, 3, 0],
        [6, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
HISTORIES = ROWS[:-1]


def relations_by_loops(shows):
    """Number the relations of a graph.

    Args:
      shows: dict kind -> list over positions of the list of names of the nodes that a position shows.

    Returns:
      dict ((kind, name), (kind, name)) -> number, of all pairs that have a relation.
    """
    kinds = list(shows)
    related = {}
    for kind, positions in shows.items():
        for before, after in itertools.pairwise(positions):
            for u, v in itertools.product(before, after):
                if u != v:
                    one_way = related.get(((kind, u), (kind, v)))
                    both = one_way in (3, 4)  # v came before u earlier on
                    related[(kind, u), (kind, v)] = 4 if both else 2
                    related[(kind, v), (kind, u)] = 4 if both else 3
        for name in itertools.chain(*positions):
            related[(kind, name), (kind, name)] = 1
    for index, (first, second) in enumerate(itertools.combinations(kinds, 2)):
        for left, right in zip(shows[first], shows[second], strict=True):
            for u, v in itertools.product(left, right):
                related[(first, u), (second, v)] = 5 + 2 * index
                related[(second, v), (first, u)] = 6 + 2 * index
    return related


def leaky(x):
    """Apply LeakyReLU with slope 0.1."""
    return x if x > 0 else 0.1 * x


def gate_by_loops(layer, vectors):
    """Weigh vectors by the softmax of a shared MLP."""
    scores = [dense(layer["gate_out"], np.maximum(dense(layer["gate_hidden"], x), 0))[0] for x in vectors]
    return sum(w * x for w, x in zip(softmax(scores), vectors, strict=True))


def dual_attention_by_loops(layer, h, related, quirks):
    """Apply MMSR's layer to node states h, dict (kind, name) -> vector."""
    nodes = list(h)
    value, query, key = ({u: dense(layer[f"{n}_{u[0]}"], h[u]) for u in h} for n in _projections(quirks))

    def within(x, u):
        near = [v for v in nodes if related.get((u, v), 9) <= 4]
        scores = [leaky(layer["relation"][related[u, v] - 1] @ (x[u] * x[v])) for v in near]
        return dict(zip(near, softmax(scores), strict=True))

    def across(q, k, u):
        near = [v for v in nodes if related.get((u, v), 2) not in (2, 3, 4)]
        return dict(zip(near, softmax([leaky(q[u] @ k[v]) for v in near]), strict=True))

    def mix(weights, x):
        return sum(weight * x[v] for v, weight in weights.items())

    crossed = {u: mix(across(query, key, u), value) for u in nodes}
    across_first = {u: mix(within(crossed, u), value) for u in nodes}
    if quirks:
        within_first = crossed
    else:
        weights = {u: within(value, u) for u in nodes}
        query, key = ({u: mix(weights[u], x) for u in nodes} for x in (query, key))
        within_first = {u: mix(across(query, key, u), value) for u in nodes}
    return {u: gate_by_loops(layer["gate"], [within_first[u], across_first[u]]) for u in nodes}


def _projections(quirks):
    return ("value", "value", "value") if quirks else ("value", "query", "key")


def network_by_loops(params, shows, vectors, quirks, num_layers):
    """Run MMSR's graph network on one history.

    Args:
      params: of KindsOfNodes.
      shows: see ``relations_by_loops``.
      vectors: function (kind, name) -> the node's own vector.

    Returns:
      dict (kind, name) -> state.
    """
    h = {}
    for index, (kind, positions) in enumerate(shows.items()):
        for name in dict.fromkeys(itertools.chain(*positions)):
            at = [params["position"][p] for p, names in enumerate(positions) if name in names]
            h[kind, name] = (
                np.concatenate([vectors(kind, name), params["kind"][index], sum(at) / len(at)]) @ params["join"]
            )
    related = relations_by_loops(shows)
    for index in range(num_layers):
        h = dual_attention_by_loops(params[f"layer_{index}"], h, related, quirks)
    return h


# --- checks of every graph model -------------------------------------------------------------------------------------


def soft(student, variables):
    """Return a student with parameters for which no softmax is saturated, so that every weight shows in the states."""
    return student, variables | {"params": jax.tree.map(lambda leaf: 0.7 * leaf, variables["params"])}


def states_of(student, variables, histories):
    """Return the backbone's states [B, L, dim] before any readout."""

    def encode(module):
        return module.encoder(module.inputs(jnp.asarray(histories)))

    return np.asarray(jax.jit(lambda v: student.apply(v, method=encode))(variables))


def newest_scores(student, variables, histories):
    """Return the scores [B, N] at each history's last real position."""
    scores = np.asarray(jax.jit(student.apply)(variables, jnp.asarray(histories)))
    return scores[np.arange(len(scores)), np.maximum((histories > 0).sum(1) - 1, 0)]


def check_padding_and_neighbours(backbone, **changes):
    """Check that a history scores alike in a row of its own length and in a longer one among others."""
    student, variables = build(backbone, **changes)
    together = newest_scores(student, variables, HISTORIES)
    alone = newest_scores(student, variables, HISTORIES[1:2, :3])
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-5, atol=1e-5)


def check_repeats_share_a_node(backbone):
    """Check that an item has one state wherever it stands, under dropout too."""
    student, variables = build(backbone, hidden_dropout=0.5, attention_dropout=0.5)

    def encode(module):
        return module.encoder(module.inputs(jnp.asarray(HISTORIES)), False)

    apply = jax.jit(lambda variables, key: student.apply(variables, method=encode, rngs={"dropout": key}))
    states = apply(variables, jax.random.key(0))
    np.testing.assert_array_equal(states[0, 0], states[0, 2])
    np.testing.assert_array_equal(states[0, 3], states[0, 4])
    assert (states[0, 0] != states[0, 1]).any()
    assert (states != apply(variables, jax.random.key(1))).any()


@functools.cache
def _gradient(backbone, tables, **changes):
    student, variables = build(backbone, tables, **{"hidden_dropout": 0.1, "attention_dropout": 0.1} | changes)
    weights = np.random.default_rng(3).normal(size=student.dim).astype(np.float32)[None, None]

    def loss(params, frozen, histories):
        given, rngs = {"params": params, "frozen": frozen}, {"dropout": jax.random.key(2)}
        states = student.apply(given, histories, False, method="encode", rngs=rngs)
        return jnp.sum(jnp.where((histories > 0)[..., None], states * weights, 0.0))

    gradient = jax.jit(jax.grad(loss))
    return lambda histories: gradient(variables["params"], variables["frozen"], jnp.asarray(histories))


def gradients(backbone, tables, histories=ROWS, **changes):
    """Return the parameters' gradient of a sum over the states of all real positions, with dropout; all finite."""
    gradient = jax.tree.map(np.asarray, _gradient(backbone, tables, **changes)(histories))
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    return gradient


def rows_of(*items):
    """Return histories in the shape of ROWS, one of which holds these items alone."""
    histories = np.zeros_like(ROWS)
    histories[1, : len(items)] = items
    return histories


def rows_reached(table):
    """List the rows of a table's gradient that are not zero."""
    return set(np.flatnonzero(np.abs(table).sum(1)))


def items_of(histories, without=()):
    """List the real items of histories, leaving some out."""
    return set(np.unique(histories[histories > 0])) - set(without)
