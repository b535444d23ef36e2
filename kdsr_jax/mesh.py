"""The device mesh: state replicated, the rows of a batch spread over all devices."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Placement:
    """Where arrays live.

    Attributes:
      replicated: sharding of states, tables and resident data.
      rows: sharding of [K, R] window ids, R over the devices.
    """

    def __init__(self):
        # Auto axes: with the default explicit ones, every embedding look-up would need an output sharding.
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(None, "data"))

    def put(self, tree):
        """Replicate a tree of arrays on all devices."""
        return jax.device_put(tree, self.replicated)

    def put_rows(self, window_ids):
        """Spread window ids [K, R] over the devices, padding R with -1 (no row) to a multiple of their number."""
        extra = -window_ids.shape[1] % jax.device_count()
        return jax.device_put(np.pad(window_ids, ((0, 0), (0, extra)), constant_values=-1), self.rows)
