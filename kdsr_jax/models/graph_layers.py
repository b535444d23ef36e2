"""Attention over the nodes of a history's graph that the models of MMSR's family share.

Dropout on attention weights comes after the softmax: before it, as in the official code of KDSR, a dropped mask would let nodes
in that are no neighbours. All parameters start uniformly in +-1/sqrt(dim), biases of the gate excepted, which start at zero.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models import graph
from kdsr_jax.models.embeddings import Fusion, uniform
from kdsr_jax.models.flat import Dense, linear
from kdsr_jax.models.layers import MASKED

WITHIN = (graph.SELF, graph.OUT, graph.IN, graph.BOTH)
SLOPE = 0.1  # of LeakyReLU below zero


def neighbour_weights(scores, neighbours):
    """Turn scores [B, n, n] into weights over each node's neighbours, [B, n, n] bool; zeros for a node without any."""
    weights = jax.nn.softmax(jnp.where(neighbours, scores, MASKED), axis=-1)
    return jnp.where(neighbours, weights, 0.0)


def relation_scores(nodes, vectors, relations):
    """Score pairs of nodes within a kind by LeakyReLU(a_r . (x_i * x_j)).

    Args:
      nodes: [B, n, d] float32.
      vectors: [4, d] float32, a_r of SELF, OUT, IN and BOTH.
      relations: [B, n, n] int32, see ``graph.relations``.

    Returns:
      [B, n, n] float32; 0 for pairs of other relations or none.
    """
    scores = jnp.sum(nodes * nodes * vectors[0][None, None], axis=-1)[..., None]  # SELF, only right on the diagonal
    scores = jnp.where(relations == graph.SELF, scores, 0.0)
    for relation, vector in zip(WITHIN[1:], vectors[1:], strict=True):
        of_all = jnp.einsum("bid,bjd->bij", nodes * vector[None, None], nodes)
        scores = jnp.where(relations == relation, of_all, scores)
    return nn.leaky_relu(scores, negative_slope=SLOPE)


class RelationalAttention(nn.Module):
    """Relational graph attention within one kind of nodes: e_ij = LeakyReLU(a_r . (x_i * x_j)) c_r with x = h W.

    Attributes:
      dim: width of the nodes.
      dropout: rate on the attention weights.
    """

    dim: int
    dropout: float

    @nn.compact
    def __call__(self, nodes, relations, deterministic):
        """Apply the layer to nodes [B, n, dim] with relations [B, n, n] int32; returns [B, n, dim], zeros where no node is."""
        init = uniform(self.dim)
        x = Dense(self.dim, use_bias=False, kernel_init=init, name="value")(nodes)
        scores = relation_scores(x, self.param("relation", init, (len(WITHIN), self.dim)), relations)
        factors = self.param("relation_factor", init, (len(WITHIN),))
        scores = sum(jnp.where(relations == r, scores * factors[place], 0.0) for place, r in enumerate(WITHIN))
        weights = neighbour_weights(scores, relations > 0)
        return nn.Dropout(self.dropout, deterministic=deterministic)(weights) @ x


class DualAttention(nn.Module):
    """MMSR's layer: attention within and across kinds of nodes, one after the other in both orders, and a gate.

    With v = h W_kind, S(x) = softmax_j LeakyReLU(a_r . (x_i * x_j)) over neighbours of the same kind and the node itself, and
    C(q, k) = softmax_j LeakyReLU(q_i . k_j) over those of other kinds and the node itself:
    across first: S(C(q, k) v) v; within first: C(q, k) v with q = k = v, as the official code has it, or, as intended,
    C(S(v) q, S(v) k) v with q, k of their own matrices. Weights act on the original v ("non-invasive").

    Attributes:
      dim: width of the nodes.
      dropout: rate on the attention weights.
      official_quirks: which form.
    """

    dim: int
    dropout: float
    official_quirks: bool

    @nn.compact
    def __call__(self, nodes, relations, deterministic):
        """Apply the layer.

        Args:
          nodes: dict kind -> [B, n_t, dim] float32.
          relations: [B, n, n] int32 over all kinds in their order, see ``graph.relations``.
          deterministic: True switches dropout off.

        Returns:
          dict kind -> [B, n_t, dim] float32; zeros where no node is.
        """
        init = uniform(self.dim)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        vectors = self.param("relation", init, (len(WITHIN), self.dim))

        def project(name):
            def dense(kind):
                return Dense(self.dim, use_bias=False, kernel_init=init, name=f"{name}_{kind}")

            return jnp.concatenate([dense(kind)(x) for kind, x in nodes.items()], axis=1)

        def within(x):
            neighbours = (relations > 0) & (relations <= graph.BOTH)
            return drop(neighbour_weights(relation_scores(x, vectors, relations), neighbours))

        def across(query, key):
            scores = nn.leaky_relu(query @ key.swapaxes(1, 2), negative_slope=SLOPE)
            return drop(neighbour_weights(scores, (relations == graph.SELF) | (relations > graph.BOTH)))

        value = project("value")
        query, key = (value, value) if self.official_quirks else (project("query"), project("key"))
        across_first = within(across(query, key) @ value) @ value
        if not self.official_quirks:
            mixed = within(value)
            query, key = mixed @ query, mixed @ key
        within_first = across(query, key) @ value
        gate = Fusion(self.dim, "gate", initializer=init, name="gate")
        mixed = gate({"within_first": within_first, "across_first": across_first})
        ends = list(itertools.accumulate(x.shape[1] for x in nodes.values()))
        return dict(zip(nodes, jnp.split(mixed, ends[:-1], axis=1), strict=True))


class KindsOfNodes(nn.Module):
    """MMSR's graph network: node inputs h = [vector; kind; mean position] W, then DualAttention, dropout after each.

    Attributes:
      dim: width of the nodes.
      max_length: longest history.
      num_layers: layers, each with its own parameters.
      hidden_dropout, attention_dropout: rates on the states after a layer and on attention weights.
      official_quirks: see ``DualAttention``.
    """

    dim: int
    max_length: int
    num_layers: int
    hidden_dropout: float
    attention_dropout: float
    official_quirks: bool

    @nn.compact
    def __call__(self, vectors, shown, deterministic):
        """Run the network.

        Args:
          vectors: dict kind -> [B, n_t, dim] float32, the nodes' own vectors, items first.
          shown: dict kind -> [B, L, n_t] bool, which nodes each position shows.
          deterministic: True switches dropout off.

        Returns:
          dict kind -> [B, n_t, dim] float32; zeros where no node is.
        """
        relations = graph.relations([shown[kind] for kind in vectors])
        nodes = self._inputs(vectors, shown)
        for index in range(self.num_layers):
            layer = DualAttention(self.dim, self.attention_dropout, self.official_quirks, name=f"layer_{index}")
            nodes = layer(nodes, relations, deterministic)
            nodes = {kind: nn.Dropout(self.hidden_dropout, deterministic=deterministic)(x) for kind, x in nodes.items()}
        return nodes

    def _inputs(self, vectors, shown):
        init = uniform(self.dim)
        kinds = self.param("kind", init, (len(vectors), self.dim))
        positions = self.param("position", init, (self.max_length, self.dim))
        of_vector, of_kind, of_position = jnp.split(self.param("join", init, (3 * self.dim, self.dim)), 3)
        nodes = {}
        for kind, row in zip(vectors, kinds @ of_kind, strict=True):
            at = shown[kind].astype(jnp.float32)
            at = at / jnp.maximum(at.sum(1, keepdims=True), 1)
            place = jnp.einsum("bpn,pd->bnd", at, positions[: at.shape[1]] @ of_position)
            nodes[kind] = linear(vectors[kind], of_vector) + row[None, None] + place
        return nodes


def states_of_items(backbone, vectors, shown, history, deterministic):
    """Run the network of a backbone, a ``Backbone`` with ``official_quirks``, from within its ``__call__``.

    Args:
      backbone: whose settings the network has, and whose parameter "graph" it becomes.
      vectors, shown, deterministic: see ``KindsOfNodes``.
      history: [B, L] int32.

    Returns:
      [B, L, dim], the states of the item nodes at every position.
    """
    settings = ("dim", "max_length", "num_layers", "hidden_dropout", "attention_dropout", "official_quirks")
    network = KindsOfNodes(**{name: getattr(backbone, name) for name in settings}, name="graph")
    return graph.at_positions(network(vectors, shown, deterministic)["item"], history)
