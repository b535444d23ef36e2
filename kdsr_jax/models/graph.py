"""Histories as graphs: the distinct items of a history are its nodes, and nodes of consecutive positions are linked.

An item's node lies at the position of its first occurrence, so that node arrays are as long as histories and nothing has to be
built on the host; positions of later occurrences and padding hold no node. Other kinds of nodes, such as clusters, have slots of
their own. What a graph is follows from which nodes each position shows: ``shown`` [B, L, n] bool, one per kind of node.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

SELF, OUT, IN, BOTH = 1, 2, 3, 4  # relations within a kind of nodes; those across kinds follow, see ``relations``


def first_occurrence(history):
    """Return for each position of histories [B, L] int32 the first position with the same item, [B, L] int32."""
    return jnp.argmax(history[:, :, None] == history[:, None, :], axis=-1)


def at_positions(nodes, history):
    """Return the node states [B, L, ...] of every position's item, from states at first occurrences [B, L, ...]."""
    return jax.vmap(lambda states, index: states[index])(nodes, first_occurrence(history))


def shown_items(history):
    """Say which item node each position shows.

    Args:
      history: [B, L] int32, oldest first, right padded with 0.

    Returns:
      [B, L, L] bool: [b, p, u] is True where real position p holds the item whose node is at u; none at padding.
    """
    node = jnp.arange(history.shape[1])[None, None]
    return (first_occurrence(history)[..., None] == node) & (history > 0)[..., None]


def shown_attributes(links, most):
    """Give each history a node per distinct attribute of its items, and say which ones each position shows.

    Args:
      links: [B, L, k] int32, attributes of each position's item; -1 for none.
      most: number of attributes there are.

    Returns:
      (ids, shown): [B, n] int32 the attribute of each node, rising, -1 where a slot holds no node, with n = min(most, L k);
      [B, L, n] bool.
    """
    rows, length, count = links.shape
    ordered = jnp.sort(links.reshape(rows, -1), axis=1)
    repeated = jnp.concatenate([jnp.zeros((rows, 1), bool), ordered[:, 1:] == ordered[:, :-1]], axis=1)
    ids = jnp.sort(jnp.where(repeated | (ordered < 0), most, ordered), axis=1)[:, : min(most, length * count)]
    ids = jnp.where(ids < most, ids, -1)
    shown = (links[:, :, None, :] == ids[:, None, :, None]).any(-1) & (ids >= 0)[:, None]
    return ids, shown


def successions(shown):
    """Say which nodes follow each other directly.

    Args:
      shown: [B, L, n] bool.

    Returns:
      [B, n, n] bool: [b, u, v] is True where a position that shows v comes right after one that shows u at least once; an
      item that follows itself gives [b, u, u].
    """
    shown = shown.astype(jnp.float32)
    return jnp.einsum("bpu,bpv->buv", shown[:, :-1], shown[:, 1:]) > 0


def relations(kinds):
    """Number the relations between all nodes of a graph.

    Args:
      kinds: list of [B, L, n_t] bool, the nodes of each kind that each position shows.

    Returns:
      [B, n, n] int32 over the nodes of all kinds one after the other, 0 for none. Within a kind: SELF; OUT from u to v
      where v follows u directly, IN the other way round, BOTH where either follows the other. Between two kinds, for nodes
      that one position shows together: 5 from the first to the second kind, 6 back, 7 and 8 for the next pair, and so on,
      with pairs in the order (0, 1), (0, 2), ..., (1, 2), ...
    """
    shown = jnp.concatenate(kinds, axis=-1)
    kind_of = np.repeat(np.arange(len(kinds)), [kind.shape[-1] for kind in kinds])
    number = np.zeros((len(kinds), len(kinds)), np.int32)
    for index, (first, second) in enumerate(itertools.combinations(range(len(kinds)), 2)):
        number[first, second], number[second, first] = BOTH + 1 + 2 * index, BOTH + 2 + 2 * index
    across = number[kind_of[:, None], kind_of[None]]
    follows = successions(shown)
    precedes = follows.swapaxes(1, 2)
    within = jnp.select([follows & precedes, follows, precedes], [BOTH, OUT, IN], default=0)
    within = jnp.where(np.eye(len(kind_of), dtype=bool)[None], SELF * shown.any(1)[..., None], within)
    real = shown.astype(jnp.float32)
    together = jnp.einsum("bpu,bpv->buv", real, real) > 0
    return jnp.where((across == 0)[None], within, jnp.where(together, across[None], 0)).astype(jnp.int32)
