"""Tables of item ids and modalities, and their fusion into one vector per item (paper Section 3.1, Feature Encoding)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.flat import Dense

INITIALIZER = nn.initializers.normal(0.02)
FUSIONS = ("gate", "concat", "sum")


def uniform(dim):
    """Return the initializer U(-1/sqrt(dim), 1/sqrt(dim)) of the graph models, whatever the shape."""
    bound = dim**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class ItemTable(nn.Module):
    """A table with one row per item and a zero row 0 for padding.

    Attributes:
      num_items: N; the table has N + 1 rows.
      width: columns.
      trainable: False keeps the rows in the variable collection "frozen", out of the optimizer's sight.
      initializer: of the rows; zeros where they are filled from the condensed features later.
    """

    num_items: int
    width: int
    trainable: bool = True
    initializer: Callable = INITIALIZER

    def setup(self):
        """Make the table: a parameter if it is trained, else a variable of the collection "frozen"."""
        shape = (self.num_items + 1, self.width)
        if self.trainable:
            self.embedding = self.param("embedding", lambda *a: self.initializer(*a).at[0].set(0.0), shape)
        else:
            self.embedding = self.variable("frozen", "embedding", jnp.zeros, shape).value

    def __call__(self, item_ids):
        """Look rows up.

        Args:
          item_ids: [...] int32 in 0..N; 0 is padding and gives zeros without a gradient.

        Returns:
          [..., width] float32.
        """
        return self.embedding[item_ids] * (item_ids > 0)[..., None]


class Fusion(nn.Module):
    """Fuse an item's id vector and its modality vectors into one vector of width dim.

    Attributes:
      dim: width of the result.
      kind: "gate": softmax over the vectors of a shared MLP dim -> dim -> 1, weighted sum; "concat": one linear map of
        their concatenation; "sum".
      project: True maps every modality vector linearly to dim first; this also happens when its width is not dim.
      initializer: of the kernels of gate and concat.
    """

    dim: int
    kind: str = "gate"
    project: bool = False
    initializer: Callable = INITIALIZER

    @nn.compact
    def __call__(self, vectors):
        """Fuse.

        Args:
          vectors: dict name -> [..., width] float32; "item" (width dim) and any number of modalities.

        Returns:
          [..., dim] float32. With a single vector there is nothing to weigh and it is returned as it is.
        """
        vectors = [
            vector if name == "item" else to_width(vector, self.dim, f"project_{name}", always=self.project)
            for name, vector in vectors.items()
        ]
        if len(vectors) == 1:
            return vectors[0]
        if self.kind == "concat":
            return Dense(self.dim, kernel_init=self.initializer, name="concat")(jnp.concatenate(vectors, axis=-1))
        stacked = jnp.stack(vectors, axis=-2)
        if self.kind == "sum":
            return stacked.sum(-2)
        hidden = nn.relu(Dense(self.dim, kernel_init=self.initializer, name="gate_hidden")(stacked))
        weights = jax.nn.softmax(Dense(1, kernel_init=self.initializer, name="gate_out")(hidden), axis=-2)
        self.sow("intermediates", "weights", weights[..., 0])  # for those who ask; see Recommender.explain
        return (weights * stacked).sum(-2)


def to_width(vector, width, name, always=False):
    """Map vectors [..., w] linearly to [..., width] where w differs, or always; the layer belongs to the calling module."""
    if vector.shape[-1] == width and not always:
        return vector
    return Dense(width, kernel_init=INITIALIZER, name=name)(vector)
