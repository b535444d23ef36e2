"""What every backbone is: a Flax module from the vectors of a history to one state per position."""

from typing import NamedTuple

import flax.linen as nn
import jax

from kdsr_jax.models.embeddings import INITIALIZER


class Inputs(NamedTuple):
    """What a backbone reads of a batch of histories, oldest item first, right padded.

    Attributes:
      history: [B, L] int32 item ids, 0 at padding.
      valid: [B, L] bool, True at real positions.
      vectors: dict name -> [B, L, width] float32, "item" (width dim; absent for a backbone without ids) and then every
        modality; zeros at padding; items without the feature start at zero, too, and tuned rows move away from it.
      present: dict modality -> [B, L] bool, True where the item has the feature.
      fused: [B, L, dim] float32, ``vectors`` fused to one vector an item; None for a backbone with ``fused = False``.
      links: dict modality -> [B, L, k] int32, the item's nearest clusters, -1 where it has none; empty for a student
        without clusters.
    """

    history: jax.Array
    valid: jax.Array
    vectors: dict
    present: dict
    fused: jax.Array | None
    links: dict


class Backbone(nn.Module):
    """Settings that all backbones share; each honours those that mean something to it.

    A backbone is called with (inputs: Inputs, deterministic) and returns states [B, L, dim] float32. Trained on "positions",
    its state at i depends on positions 0..i only. Trained on "prefixes", a history has one target, the item after its last
    one, and only the readout at the last real position is used; states may look at the whole history.

    Class attributes:
      trained_on: "positions" or "prefixes".
      fused: whether it reads ``Inputs.fused``; else it fuses ``Inputs.vectors`` in its own way.
      project_modalities: whether the fusion maps each modality vector linearly before it is fused.
      has_ids: whether there is a table of item ids.
      has_clusters: whether it reads ``Inputs.links``; it then has a field ``num_clusters``.
      initializer: function dim -> initializer of the id table and the readout.

    A backbone may also have a method ``candidates(inputs, deterministic)``, inputs of all items as N histories of one item
    [N, 1], which returns what representations are scored against, [N, dim]; else it is the id table. One that can be warmed up
    has a method ``contrasts(inputs, deterministic)``, inputs as above, which returns views of the items to tell apart.
    """

    dim: int
    max_length: int
    modalities: tuple = ()
    num_layers: int = 2
    num_heads: int = 2
    hidden_dropout: float = 0.5
    attention_dropout: float = 0.5
    fusion: str = "gate"

    trained_on = "positions"
    fused = True
    project_modalities = False
    has_ids = True
    has_clusters = False

    @staticmethod
    def initializer(dim):
        """Return the initializer of the id table and the readout: N(0, 0.02^2)."""
        return INITIALIZER
