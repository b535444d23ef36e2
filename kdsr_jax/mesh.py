"""The device mesh: a batch is spread over its axis ``data``; the rows of item tables, and with them all scores, over ``model``.

An array that leaves a compiled function must divide evenly, and a table has N + 1 rows, which seldom do. So tables rest with
rows of zeros at their end (``pack``) and lose them inside (``unpack``); neither moves anything. The numbers of a run are those
of one device but for the order of sums, so a run may go on upon another mesh.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdsr_jax import processes
from kdsr_jax.errors import UserError
from kdsr_jax.optim import path_name

# Paths of arrays with a row an item in states, variables and teachers.
TABLE = re.compile(r"(.*/)?(\w+_embedding/embedding|condensed)")


class Placement:
    """Where arrays live.

    Attributes:
      data, model: sizes of the mesh's axes.
      replicated: sharding of all that is on every device.
    """

    def __init__(self, settings=None):
        """Lay the devices of all processes out as a mesh.

        Args:
          settings: the config's mesh group; None spreads batches over all devices.

        Raises:
          UserError: the axes do not multiply to the number of devices.
        """
        wanted = (settings.data, settings.model) if settings else (0, 0)
        self.data, self.model = mesh_shape(*wanted, jax.device_count())
        # Auto axes: with explicit ones, every embedding look-up would need an output sharding.
        axes = (self.data, self.model), ("data", "model")
        self._mesh = jax.make_mesh(*axes, axis_types=(AxisType.Auto, AxisType.Auto))
        self.replicated = self._sharding()

    def put(self, tree):
        """Replicate a tree of arrays, the same in every process, on all devices."""
        return jax.tree.map(lambda array: self._put(array, self.replicated), tree)

    def put_rows(self, window_ids):
        """Spread window ids [..., R] over the devices, padding R with -1 (no row) to a multiple of their axis ``data``.

        Every process has all ids, which cost little, and hands over the part of its own devices.
        """
        extra, before = -window_ids.shape[-1] % self.data, window_ids.ndim - 1
        padded = np.pad(window_ids, [(0, 0)] * before + [(0, extra)], constant_values=-1)
        return self._put(padded, self._sharding(*[None] * before, "data"))

    def put_tables(self, tree):
        """Spread every array of a tree by its rows [n, ...], padded as at rest, and replicate those that are no tables."""
        return self._map(tree, self.put_table, lambda array: self._put(array, self.replicated))

    def put_table(self, table):
        """Spread one array by its rows [n, ...], padded as at rest."""
        extra = -table.shape[0] % self.model
        padded = np.pad(table, [(0, extra)] + [(0, 0)] * (table.ndim - 1)) if extra else table
        return self._put(padded, self._sharding("model"))

    def spread(self, array, *axes):
        """Say, inside a compiled function, over which axes of the mesh an array's axes are spread.

        Args:
          array: any shape, divisible or not.
          *axes: for each axis of the array "data", "model" or None; those that are missing are None.
        """
        if self.data * self.model == 1:
            return array
        return jax.lax.with_sharding_constraint(array, self._sharding(*axes))

    def pad(self, table):
        """Give a table [n, ...] inside a compiled function the rows that it rests with."""
        extra = -table.shape[0] % self.model
        padded = jnp.pad(table, [(0, extra)] + [(0, 0)] * (table.ndim - 1)) if extra else table
        return self.spread(padded, "model")

    def unpad(self, table, rows):
        """Take the rows that a table rests with off again; returns [rows, ...], spread over ``model``."""
        return self.spread(table[:rows] if table.shape[0] != rows else table, "model")

    def pack(self, tree):
        """Bring a tree inside a compiled function into the form that it rests in: tables by rows, all else replicated."""
        return self._map(tree, self.pad, self.spread)

    def unpack(self, tree, num_items):
        """Bring a tree that rested into the form that models know; tables have num_items + 1 rows."""
        return self._map(tree, lambda table: self.unpad(table, num_items + 1), lambda array: array)

    def stored(self, tree):
        """Return the shardings of a tree as checkpoints hold it: tables of N + 1 rows, spread by columns where these divide."""

        def by_columns(table):
            return self._sharding(None, "model") if table.shape[1] % self.model == 0 else self.replicated

        return self._map(tree, by_columns, lambda _: self.replicated)

    def top_k(self, scores, k):
        """Do as ``jax.lax.top_k`` does, of equal scores the first, without bringing the parts of a row together.

        Args:
          scores: [S, N] float inside a compiled function, spread over ``data`` and ``model``; S divides by ``data``.
          k: 1..N.

        Returns:
          (values, columns), each [S, k], the best first.
        """
        if self.data * self.model == 1:
            return jax.lax.top_k(scores, k)
        width = -(-scores.shape[1] // self.model)
        short = width * self.model - scores.shape[1]
        padded = self.spread(jnp.pad(scores, ((0, 0), (0, short)), constant_values=-jnp.inf), "data", "model")

        def own(part):  # by hand: left to itself, the compiler gathers the scores for a top_k
            values, columns = jax.lax.top_k(part, min(k, width))
            return values, columns + width * jax.lax.axis_index("model")

        spec = PartitionSpec("data", "model")
        values, columns = jax.shard_map(own, mesh=self._mesh, in_specs=spec, out_specs=(spec, spec))(padded)
        values, best = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(columns, best, axis=1)

    def _map(self, tree, table, other):
        def convert(path, array):
            return (table if TABLE.fullmatch(path_name(path)) else other)(array)

        return jax.tree_util.tree_map_with_path(convert, tree)

    def _sharding(self, *axes):
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def _put(self, array, sharding):
        if processes.count() == 1:
            return jax.device_put(array, sharding)
        array = np.asarray(array)  # not device_put, which would first compare the array between the processes
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def mesh_shape(data, model, devices):
    """Return the sizes of the axes (data, model); 0 for model is 1, for data all devices that model leaves.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    sizes = data or devices // max(model, 1), model or 1
    if sizes[0] * sizes[1] != devices:
        raise UserError(
            f"--config.mesh.data={data} and --config.mesh.model={model}: their product must be the number of devices, "
            f"{devices}; 0 for data takes what model leaves, which must divide it"
        )
    return sizes
