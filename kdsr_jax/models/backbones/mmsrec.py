"""MMSRec: multi-modal sequences without item ids (Song et al., "Self-Supervised Multi-Modal Sequential Recommendation", 2023).

Form: one encoder serves histories and single items. Every modality that an item has is a token
LN(Linear(feature)); after the last item of a history comes a learned mask item. Tokens get position and modality vectors, LN and
dropout, and go through a bidirectional post-norm Transformer with a final LN. An item's output is the element-wise maximum, over
the modalities it has, of LN(Linear(token)). The output of the mask item represents the history; a candidate is the
output of an item that stands alone, at position 0. Scores are cosines, divided by ``model.score_temperature``; the candidates
are encoded anew, with gradient, in every step.

Where modalities are missing: a token that an item lacks is not read, and an item without any modality is read by no history; as
a candidate it has the score 0, that of a right angle, whatever the history.

Warm-up (``model.warmup_epochs``), the source's contrastive pre-training on the items at hand: ``contrasts``.

Deviations from the source:
- the warm-up is off unless ``model.warmup_epochs`` is set;
- right padding; the mask item is always after the last item and nothing else is masked (the source: the last item of a longer
  prefix, and a fifth of the others);
- dense features as the teacher condenses them, not of CLIP; no pre-training on another corpus;
- one rate of dropout for embeddings and layers, no bias in the key projection; four heads by default (the source: eight).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.backbones.base import Backbone
from kdsr_jax.models.embeddings import INITIALIZER
from kdsr_jax.models.flat import Dense
from kdsr_jax.models.layers import MASKED, TransformerLayer, layer_norm
from kdsr_jax.ops.scoring import unit


class MMSRec(Backbone):
    """Bidirectional Transformer over modality tokens, whose mask item stands for what comes next.

    Attributes:
      score_temperature: divisor of the cosines, > 0.
    """

    score_temperature: float = 0.05

    trained_on = "prefixes"
    fused = False
    has_ids = False

    def __call__(self, inputs, deterministic=True):
        """Encode histories; see ``Backbone``. Returns [B, L, dim], the same unit vector at all positions of a history."""
        last = inputs.valid.sum(1)[:, None]
        masked = jnp.arange(inputs.valid.shape[1] + 1)[None] == last
        vectors = [jnp.pad(inputs.vectors[name], ((0, 0), (0, 1), (0, 0))) for name in self.modalities]
        present = [jnp.pad(inputs.present[name], ((0, 0), (0, 1))) | masked for name in self.modalities]
        outputs = self.encode_items(vectors, jnp.stack(present, axis=-1), masked, deterministic)
        represented = jnp.take_along_axis(outputs, last[..., None], axis=1)
        return jnp.broadcast_to(represented, (*inputs.valid.shape, self.dim))

    def candidates(self, inputs, deterministic=True):
        """Encode N single items; see ``Backbone``. Returns [N, dim]; a product with a representation is a score."""
        return self._look(inputs, [self.modalities], deterministic)[0] / self.score_temperature

    def contrasts(self, inputs, deterministic):
        """Look at single items twice, through some of their modalities each time, for contrastive training.

        The terms compare each modality with itself and with every other one and, if there are several modalities, all of them
        with all of them. The two sides of a term have dropout of their own.

        Args:
          inputs: Inputs of N histories of one item, [N, 1].
          deterministic: True switches dropout off.

        Returns:
          A list of terms (first, second, present): [N, dim] float32 unit vectors; the same of the other side, divided by
          ``score_temperature``; [N] bool, True for the items that have what both sides look at.
        """
        views = [(name,) for name in self.modalities]
        pairs = [(a, b) for index, a in enumerate(views) for b in views[index:]]
        if len(views) > 1:
            views.append(self.modalities)
            pairs.append((self.modalities, self.modalities))
        outputs = self._look(inputs, views + views, deterministic)
        first, second = (dict(zip(views, side, strict=True)) for side in (outputs[: len(views)], outputs[len(views) :]))
        has = {view: sum(inputs.present[name][:, 0] for name in view) > 0 for view in views}
        return [(first[a], second[b] / self.score_temperature, has[a] & has[b]) for a, b in pairs]

    def _look(self, inputs, views, deterministic):
        """Encode single items, inputs of [N, 1], through V views, which name modalities; returns [V, N, dim]."""
        present = jnp.stack([inputs.present[name] for name in self.modalities], axis=-1)
        seen = jnp.array([[name in view for name in self.modalities] for view in views])
        present = (present[None] & seen[:, None, None]).reshape(-1, 1, len(self.modalities))
        vectors = [jnp.tile(inputs.vectors[name], (len(views), 1, 1)) for name in self.modalities]
        outputs = self.encode_items(vectors, present, jnp.zeros_like(present[..., 0]), deterministic)
        return outputs.reshape(len(views), -1, self.dim)

    @nn.compact
    def encode_items(self, vectors, present, masked, deterministic):
        """Encode the items of sequences; all parameters are here.

        Args:
          vectors: for each of the M modalities [B, P, width] float32.
          present: [B, P, M] bool, True for tokens that are there.
          masked: [B, P] bool, True at mask items, whose vectors are not read.
          deterministic: True switches dropout off.

        Returns:
          [B, P, dim] float32, of length 1; zeros for an item without tokens.
        """
        batch, length, count = present.shape
        tokens = [
            layer_norm(f"{name}_norm")(Dense(self.dim, kernel_init=INITIALIZER, name=f"{name}_in")(vector))
            for name, vector in zip(self.modalities, vectors, strict=True)
        ]
        mask_item = self.param("mask_item", INITIALIZER, (self.dim,))
        position = self.param("position_embedding", INITIALIZER, (self.max_length + 1, self.dim))
        kind = self.param("modality_embedding", INITIALIZER, (count, self.dim))
        x = jnp.where(masked[..., None, None], mask_item[None, None, None], jnp.stack(tokens, axis=2))
        x = layer_norm("input_norm")(x + position[None, :length, None] + kind[None, None])
        x = nn.Dropout(self.hidden_dropout, deterministic=deterministic)(x).reshape(batch, length * count, self.dim)
        for index in range(self.num_layers):
            layer = TransformerLayer(
                self.dim, self.num_heads, self.hidden_dropout, self.attention_dropout, name=f"layer_{index}"
            )
            x = layer(x, present.reshape(batch, 1, 1, -1), deterministic)
        x = Dense(self.dim, kernel_init=INITIALIZER, name="out")(layer_norm("final_norm")(x))
        x = layer_norm("output_norm")(x).reshape(batch, length, count, self.dim)
        fused = jnp.max(jnp.where(present[..., None], x, MASKED), axis=2)
        fused = jnp.where(present.any(-1)[..., None], fused, 0.0)
        return jax.vmap(jax.vmap(unit))(fused)
