"""Steps on the rows of a few items alone (``train.sparse_tables``), whose cost does not depend on the number of items.

The rows that a step can touch, of tables, Adam moments, facts and teachers, are taken out as tables of their own; the usual step
is made on these, with items renumbered, and its rows are put back. This is "lazy" Adam. Clipping, the gradient's norm and the
number of the step that corrects the moments' bias are those of the whole model. Unlike in dense Adam, where a row goes on by its
momentum and decays in every step, a row that is not touched keeps its values and moments, and weight decay acts in the steps
that touch it.
"""

import re

import jax
import jax.numpy as jnp

from kdsr_jax.mesh import TABLE
from kdsr_jax.optim import path_name

# Paths of all arrays with a row an item: tables, and what is known of items.
_ROWS = re.compile(rf"{TABLE.pattern}|(.*/)?((\w+_)?has_feature|\w+_links)")


def touched_rows(num_items, *item_ids):
    """Collect the rows of items, each once, in order and after row 0, so that equal and ordered ids stay so as places.

    Args:
      num_items: N.
      *item_ids: int32 arrays of any shapes, 0..N, U numbers in all.

    Returns:
      [U + 1] int32, filled up with N + 1, which is no row.
    """
    ids = jnp.concatenate([jnp.zeros(1, jnp.int32), *(part.ravel() for part in item_ids)])
    return jnp.unique(ids, size=ids.size, fill_value=num_items + 1)


def places(rows, item_ids):
    """Return where items [...], all of them among the rows, stand in these; same shape, int32."""
    return jnp.searchsorted(rows, item_ids).astype(jnp.int32)


def take(tree, rows):
    """Take rows out of every array of a tree that has a row an item; zeros where there is no such row."""

    def convert(path, whole):
        by_item = _ROWS.fullmatch(path_name(path))
        return whole.at[rows].get(mode="fill", fill_value=0, indices_are_sorted=True) if by_item else whole

    return jax.tree_util.tree_map_with_path(convert, tree)


def put(tree, part, rows):
    """Put rows that were taken out back into the tables of a tree; what is no table is taken from the part as it is."""

    def convert(path, whole, few):
        table = TABLE.fullmatch(path_name(path))
        return whole.at[rows].set(few, mode="drop", indices_are_sorted=True) if table else few

    return jax.tree_util.tree_map_with_path(convert, tree, part)
