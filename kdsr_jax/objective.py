"""The training objective of a batch: next item, holistic and dissected correlations (paper Eqs. 3, 5, 7), clusters."""

import copy

import jax
import jax.numpy as jnp

from kdsr_jax.ops import correlation, losses
from kdsr_jax.ops.scoring import SCORE_FNS, factored
from kdsr_jax.resident import at_slots
from kdsr_jax.teacher import correlations_among


class Objective:
    """Loss parts and their sum as functions of the parameters.

    Attributes:
      student: Student.
      distill: the config's distill group.
      score_fn, num_splits: of the config's teacher group.
      cluster_weight: of predicting the next item's clusters, which a student with ``predicts_clusters`` does.
      placement: Placement; None on one device.
      sampled_items: drawn uniformly in each step for the softmax; 0 is the softmax over all items.
      num_items: N, from which these are drawn, however many rows the student's tables have.
      rows: dict length of histories -> rows of such a batch, less those that fill it up for the devices; what is missing is
        taken as it comes.
      rounded: as in ``losses.next_item_loss``, of the softmax over all items.
    """

    def __init__(
        self,
        student,
        distill,
        score_fn,
        num_splits,
        cluster_weight=0.0,
        placement=None,
        sampled_items=0,
        rows=None,
        rounded=jnp.float32,
    ):
        self.student, self.distill, self.placement = student, distill, placement
        self.sampled_items, self.num_items = sampled_items, student.num_items
        self.score_fn, self.num_splits, self.cluster_weight = score_fn, num_splits, cluster_weight
        self.rows, self.rounded = rows or {}, rounded

    @property
    def pairs_per_modality(self):
        """Item pairs a step of one modality, its share of ``distill.pair_budget``; 0 is all pairs."""
        return -(-self.distill.pair_budget // len(self.student.modalities))

    def on_rows(self, count):
        """Return the same objective for a student with tables of so many rows, row 0 included."""
        narrow = copy.copy(self)
        narrow.student = self.student.clone(num_items=count - 1)
        return narrow

    def draw_items(self, key):
        """Draw the items [sampled_items] int32 of a step's softmax uniformly, with replacement; key as for the loss."""
        sample_key = jax.random.fold_in(jax.random.split(key)[1], 2**31 - 1)
        return jax.random.randint(sample_key, (self.sampled_items,), 1, self.num_items + 1)

    def __call__(self, params, frozen, teachers, batch, key, sampled=None):
        """Compute the loss of one batch with dropout.

        Args:
          params, frozen: the student's variables.
          teachers: dict modality -> Teacher; empty switches distillation off.
          batch: Batch.
          key: a jax PRNG key.
          sampled: [sampled_items] int32, items drawn for the softmax; None draws them.

        Returns:
          (total, parts): scalar and dict name -> scalar: "next_item", "holistic/<modality>", "dissected/<modality>",
          "clusters/<modality>".
        """
        dropout_key, pair_key = jax.random.split(key)
        variables = {"params": params, "frozen": frozen}
        encode = {"method": "encode", "rngs": {"dropout": dropout_key}}
        with jax.named_scope("encoder"):  # the scopes' names stand in profiles (experiments/costs.py)
            representations = at_slots(self.student.apply(variables, batch.history, False, **encode), batch)
        # A key of its own: candidates and histories may go through the same layers, which would drop the same numbers.
        scored = {"method": "candidate_vectors", "rngs": {"dropout": jax.random.fold_in(dropout_key, 1)}}
        with jax.named_scope("next_item"):
            if self.sampled_items:
                sampled = self.draw_items(key) if sampled is None else sampled
                next_item = self._sampled_loss(variables, representations, batch, sampled, scored)
            else:
                vectors = self.student.apply(variables, False, **scored)
                next_item = self.next_item(representations, vectors, batch.targets - 1, batch.mask)
        holistic, dissected = {}, {}
        with jax.named_scope("distillation"):
            for index, (name, teacher) in enumerate(teachers.items()):
                arguments = name, teacher, batch.history, jax.random.fold_in(pair_key, index)
                holistic[name], dissected[name] = self.distillation(variables, *arguments)
        with jax.named_scope("clusters"):
            clusters = self.clusters(variables, representations, batch)
        weights = {"lambda_score": self.distill.lambda_score, "lambda_code": self.distill.lambda_code}
        total = losses.total_loss(next_item, holistic, dissected, **weights)
        total += self.cluster_weight * sum(clusters.values())
        parts = {"next_item": next_item} | {f"clusters/{name}": value for name, value in clusters.items()}
        parts |= {f"holistic/{name}": value for name, value in holistic.items()}
        return total, parts | {f"dissected/{name}": value for name, value in dissected.items()}

    def next_item(self, representations, vectors, targets, mask):
        """Compute ``losses.next_item_loss``, on a mesh so that a device scores its part of positions and items alone.

        The positions of every part of the batch are a group with sums of its own, which are added up in the end; in chunks
        over all positions, the gradient of the item vectors would be brought together once a chunk.
        """
        place = self.placement
        if place is None or place.data * place.model == 1:
            return losses.next_item_loss(representations, vectors, targets, mask, rounded=self.rounded)

        def group(array):
            padded = jnp.pad(array, [(0, -len(array) % place.data)] + [(0, 0)] * (array.ndim - 1))
            return place.spread(padded.reshape(place.data, -1, *array.shape[1:]), "data")

        def loss(*arrays):
            return losses.next_item_loss(*arrays, losses.CHUNK_BYTES * place.model, self.rounded)

        mask = group(mask)
        vectors = place.spread(vectors, "model")
        means = jax.vmap(loss, (0, None, 0, 0))(group(representations), vectors, group(targets), mask)
        return jnp.sum(means * mask.sum(1)) / jnp.maximum(mask.sum(), 1)

    def _sampled_loss(self, variables, representations, batch, sampled, scored):
        """Compute the next item's loss against drawn items."""
        size = batch.targets.shape[0]
        vectors = self.student.apply(variables, False, jnp.concatenate([batch.targets, sampled]), **scored)
        log_expected = jnp.full(sampled.shape, jnp.log(self.sampled_items / self.num_items))
        arguments = vectors[:size], vectors[size:], batch.targets, sampled, log_expected
        return losses.sampled_next_item_loss(representations, *arguments, batch.mask)

    def warm_up(self, params, frozen, teachers, batch, key):
        """Compute the contrastive loss that takes the place of all others in a warm-up (``model.warmup_epochs``).

        Args:
          params, frozen, teachers, batch, key: as for the usual loss; of the batch, the distinct target items are read.

        Returns:
          (total, parts): the mean over the backbone's pairs of views, and the same as part "contrastive".
        """
        distinct = correlation.distinct_mask(batch.targets)
        variables, rngs = {"params": params, "frozen": frozen}, {"dropout": key}
        terms = self.student.apply(variables, batch.targets, method="contrasts", rngs=rngs)
        values = [losses.contrastive_loss(first, second, present & distinct) for first, second, present in terms]
        total = sum(values) / len(values)
        return total, {"contrastive": total}

    def weight(self, part):
        """Return the factor of a loss part in the total (Eq. 7)."""
        factors = {"holistic": self.distill.lambda_score, "dissected": self.distill.lambda_code}
        factors |= {"clusters": self.cluster_weight}
        return factors.get(part.partition("/")[0], 1.0)

    def clusters(self, variables, representations, batch):
        """Predict each target's clusters from the representation that it is scored with (DIF-SR's auxiliary task).

        Args:
          variables: of the student.
          representations: [S, dim] at the batch's slots.
          batch: Batch.

        Returns:
          dict modality -> scalar, the mean over the real targets whose item has the feature; empty for a student that
          predicts no clusters.
        """
        values = {}
        for name in self.student.clustered if self.student.predicts_clusters else ():
            logits = self.student.apply(variables, name, representations, method="cluster_logits")
            links = self.student.apply(variables, name, batch.targets, method="links")
            counted = batch.mask & (links[:, 0] >= 0)
            values[name] = losses.masked_mean(jax.vmap(losses.cluster_loss)(logits, links), counted)
        return values

    def distillation(self, variables, name, teacher, history, key):
        """Compare student and teacher on pairs of distinct covered items within the batch's sequences.

        All pairs are used where ``pairs_per_modality`` is 0 or the batch's shape allows no more than it; else that many are
        drawn uniformly with replacement from the union of all rows' pairs, which leaves the expectation as it is.

        Args:
          variables: of the student.
          name: the modality.
          teacher: its Teacher.
          history: [R, L] int32.
          key: a jax PRNG key for the draw.

        Returns:
          (L_S, L_C) of the modality: means over the pairs.
        """
        valid = jax.vmap(correlation.distinct_mask)(history) & teacher.has_feature[history]
        row, i, j, mask = self.choose_pairs(valid, key)
        items, first, second = history.ravel(), row * history.shape[1] + i, row * history.shape[1] + j
        scores, codes = correlations_among(teacher, items, first, second, self.score_fn, self.num_splits)
        vectors = self.student.apply(variables, name, items, method="modality_vectors")
        logits = self.student.apply(variables, name, vectors[first], vectors[second], method="code_logits")
        transformed = self.student.apply(variables, name, vectors, method="transform")
        dissected = losses.dissected_loss(logits, codes, mask)
        if self.distill.sigma == "softmax":
            transformed = transformed.reshape(*history.shape, -1)
            return self._row_loss(teacher, transformed, history, valid, key), dissected
        of_one, of_pair = factored(self.score_fn)
        prepared = jax.vmap(of_one)(transformed)
        predicted = jax.vmap(of_pair)(prepared[first], prepared[second])
        return self._holistic(scores, predicted, mask), dissected

    def choose_pairs(self, valid, key):
        """Return (row, i, j, mask), each [P]: all pairs, or ``pairs_per_modality`` drawn ones; see ``distillation``."""
        rows, length = valid.shape
        pairs = self.rows.get(length, rows) * length * (length - 1) // 2  # the same on any number of devices
        if self.pairs_per_modality and pairs > self.pairs_per_modality:
            return correlation.sample_pairs(key, valid, self.pairs_per_modality)
        i, j, mask = correlation.all_pairs(valid)
        row = jnp.repeat(jnp.arange(rows), i.shape[0])
        return row, jnp.tile(i, rows), jnp.tile(j, rows), mask.ravel()

    def _holistic(self, scores, predicted, mask):
        settings = {"temperature": self.distill.temperature, "sigma": self.distill.sigma}
        return losses.holistic_loss(scores, predicted, mask, **settings)

    def _row_loss(self, teacher, transformed, history, valid, key):
        """Compare the softmax over each item's row of pairs: all rows, or as many as ``pairs_per_modality`` pairs pay for.

        A row is drawn with a probability proportional to its number of pairs, so the plain mean of the drawn rows' means
        has the mean over all pairs as its expectation.
        """
        rows, length = valid.shape
        draws = max(1, self.pairs_per_modality // length)
        drawing = bool(self.pairs_per_modality) and self.rows.get(length, rows) * length > draws
        if drawing:
            row, i, j, drawn = correlation.sample_pairs(key, valid, draws)
            i = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), shape=i.shape), i, j)
        else:
            row, i = (index.ravel() for index in jnp.indices((rows, length)))
            drawn = valid.ravel()
        mask = valid[row] & (jnp.arange(length)[None] != i[:, None]) & drawn[:, None]
        score = jax.vmap(jax.vmap(SCORE_FNS[self.score_fn], (None, 0)))
        target = score(teacher.condensed[history[row, i]], teacher.condensed[history[row]])
        row_means = jax.vmap(self._holistic)(target, score(transformed[row, i], transformed[row]), mask)
        weight = mask.any(-1) if drawing else mask.sum(-1)
        return jnp.sum(weight * row_means) / jnp.maximum(jnp.sum(weight), 1)
