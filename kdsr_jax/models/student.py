"""The student: tables, fusion, backbone, readout, scores and the heads of distillation behind one module (paper Section 3)."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from kdsr_jax.models.backbones import BACKBONES
from kdsr_jax.models.backbones.base import Inputs
from kdsr_jax.models.embeddings import INITIALIZER, Fusion, ItemTable
from kdsr_jax.models.flat import Dense
from kdsr_jax.models.readout import Readout

ITEMS_AT_ONCE = 2**16  # for which vectors are made; more only cost memory


class Facts(NamedTuple):
    """What is known of a modality besides the rows of its table; never trained.

    Attributes:
      has_feature: [N + 1] bool.
      links: [N + 1, k] int32, each item's nearest clusters, nearest first; -1 where it has no feature. None without clusters.
      centres: [C, table_width] float32, the clusters' centres. None without clusters.
    """

    has_feature: jax.Array
    links: jax.Array | None = None
    centres: jax.Array | None = None


class Student(nn.Module):
    """A recommender with id and modality tables.

    Attributes:
      num_items: N.
      modalities: names in order of the modalities with a table; empty for a model of ids only.
      backbone: a key of BACKBONES.
      options: dict, settings of this backbone alone, by the names of its fields.
      dim: width of id vectors, states and scores.
      table_width: width of the modality tables (the teacher's condensed_dim).
      tuned: True trains the modality tables, False keeps them frozen.
      clustered: names of the modalities whose clusters are known; empty for a student without clusters.
      num_clusters, cluster_links: C clusters a modality, of which an item is linked to k.
      predicts_clusters: whether a head predicts the clusters of the next item (``cluster_logits``).
      num_codes: x, or 0 for a student without distillation heads.
    """

    num_items: int
    modalities: tuple = ()
    backbone: str = "sasrm"
    options: Mapping = FrozenDict()
    tuned: bool = True
    dim: int = 128
    table_width: int = 128
    max_length: int = 50
    num_layers: int = 2
    num_heads: int = 2
    hidden_dropout: float = 0.5
    attention_dropout: float = 0.5
    fusion: str = "gate"
    readout: str = "last"
    short_term: int = 3
    item_scores: str = "ids"
    clustered: tuple = ()
    num_clusters: int = 0
    cluster_links: int = 1
    predicts_clusters: bool = False
    num_codes: int = 0

    @property
    def trained_on(self):
        """What the backbone is trained on, "positions" or "prefixes"; see ``Backbone``."""
        return BACKBONES[self.backbone].trained_on

    @property
    def scores_by_ids(self):
        """Whether representations are scored against rows of the id table as they are."""
        return self.item_scores == "ids" and not hasattr(BACKBONES[self.backbone], "candidates")

    def setup(self):
        """Make the tables, whose attribute names are the parameter paths, and what reads them."""
        backbone = BACKBONES[self.backbone]
        initializer = backbone.initializer(self.dim)
        if backbone.has_ids:
            self.item_embedding = ItemTable(self.num_items, self.dim, initializer=initializer)
        rows = self.num_items + 1
        for name in self.modalities:
            table = ItemTable(self.num_items, self.table_width, trainable=self.tuned, initializer=nn.initializers.zeros)
            setattr(self, f"{name}_embedding", table)
            setattr(self, f"{name}_has_feature", self.variable("frozen", f"{name}_has_feature", jnp.ones, rows, bool))
        for name in self.clustered:
            links = self.variable("frozen", f"{name}_links", jnp.zeros, (rows, self.cluster_links), jnp.int32)
            setattr(self, f"{name}_links", links)
            if self.predicts_clusters:
                setattr(self, f"{name}_clusters", Dense(self.num_clusters, kernel_init=INITIALIZER))
        if backbone.fused:
            self.fuse = Fusion(self.dim, self.fusion, backbone.project_modalities)
        self.encoder = backbone(**self._backbone_settings(), **self.options)
        self.read = Readout(self.dim, self.readout, self.short_term, self.trained_on, initializer)
        if self.num_codes:
            for name in self.modalities:
                setattr(self, f"{name}_head", DistillationHead(self.table_width, self.num_codes))

    def _backbone_settings(self):
        shared = ("dim", "max_length", "num_layers", "num_heads", "hidden_dropout", "attention_dropout", "fusion")
        settings = {name: getattr(self, name) for name in (*shared, "modalities")}
        if BACKBONES[self.backbone].has_clusters:
            settings |= {
                "clustered": self.clustered,
                "num_clusters": self.num_clusters,
                "table_width": self.table_width,
            }
        return settings

    def modality_vectors(self, modality, item_ids):
        """Look items [...] int32 up in a modality's table; returns [..., table_width], zeros at padding."""
        return getattr(self, f"{modality}_embedding")(item_ids)

    def transform(self, modality, vectors):
        """Apply g_phi, the linear layer of Eq. 2, to a modality's vectors [..., table_width]; same shape."""
        return getattr(self, f"{modality}_head").transform(vectors)

    def code_logits(self, modality, x, y):
        """Predict the codes of pairs of a modality's vectors x, y [..., table_width] (Eq. 4); returns [..., num_codes]."""
        return getattr(self, f"{modality}_head").code_logits(x, y)

    def inputs(self, history):
        """Look up all that a backbone reads of histories [B, L] int32 (0 = padding); returns ``Inputs``."""
        backbone = BACKBONES[self.backbone]
        vectors = {"item": self.item_embedding(history)} if backbone.has_ids else {}
        vectors |= {name: self.modality_vectors(name, history) for name in self.modalities}
        real = history > 0
        present = {name: getattr(self, f"{name}_has_feature").value[history] & real for name in self.modalities}
        links = {name: self.links(name, history) for name in self.clustered}
        return Inputs(history, real, vectors, present, self.fuse(vectors) if backbone.fused else None, links)

    def links(self, modality, item_ids):
        """Look up the nearest clusters [..., k] int32 of items [...] int32; -1 at padding and without the feature."""
        return jnp.where(item_ids[..., None] > 0, getattr(self, f"{modality}_links").value[item_ids], -1)

    def encode(self, history, deterministic=True):
        """Represent every prefix of each history (paper Eq. 1 and Eq. 6).

        Args:
          history: [B, L] int32 item ids, oldest first, right padded with 0.
          deterministic: True switches dropout off.

        Returns:
          [B, L, dim] float32; position i stands for the prefix 0..i; values at padding are meaningless, and with a backbone
          that is trained on prefixes so are all values but the one at the last real position.
        """
        inputs = self.inputs(history)
        return self.read(self.encoder(inputs, deterministic), inputs.valid)

    def candidate_vectors(self, deterministic=True, items=None):
        """Return the vectors that representations are scored against (``item_scores``).

        Args:
          deterministic: True switches dropout off.
          items: [M] int32 items 1..N, or 0 where the result does not matter; None is all of them.

        Returns:
          [M, dim] float32, or [N, dim].
        """
        if self.scores_by_ids:
            return self.item_embedding.embedding[1:] if items is None else self.item_embedding(items)
        inputs = self.inputs((jnp.arange(1, self.num_items + 1) if items is None else items)[:, None])
        if hasattr(BACKBONES[self.backbone], "candidates"):
            return self.encoder.candidates(inputs, deterministic)
        return inputs.fused[:, 0]

    def contrasts(self, items):
        """Return the views (first, second, present) of items [M] int32 that a warm-up tells apart, with dropout; 0 has none."""
        return self.encoder.contrasts(self.inputs(items[:, None]), deterministic=False)

    def score(self, representations, deterministic=True):
        """Score all items: P . e_v for representations [M, dim]; returns [M, N], column n for item n + 1."""
        return representations @ self.candidate_vectors(deterministic).T

    def cluster_logits(self, modality, representations):
        """Predict which clusters of a modality the next item is linked to, [M, C] for representations [M, dim]."""
        return getattr(self, f"{modality}_clusters")(representations)

    def __call__(self, history):
        """Touch every parameter, for initialisation; returns the scores [B, L, N] of history [B, L]."""
        if self.num_codes:
            for name in self.modalities:
                vectors = self.modality_vectors(name, history)
                self.transform(name, vectors)
                self.code_logits(name, vectors, vectors)
        states = self.encode(history)
        if self.predicts_clusters:
            for name in self.clustered:
                self.cluster_logits(name, states)
        return self.score(states)


class DistillationHead(nn.Module):
    """The student's side of one modality's correlations: g_phi of Eq. 2 and the code classifier of Eq. 4.

    Attributes:
      width: of the modality table.
      num_codes: x.
    """

    width: int
    num_codes: int

    def setup(self):
        self.holistic = Dense(self.width, kernel_init=INITIALIZER)
        self.code_hidden = Dense(self.width, kernel_init=INITIALIZER)
        self.code_out = Dense(self.num_codes, kernel_init=INITIALIZER)

    def transform(self, vectors):
        """Apply g_phi to vectors [..., width]; same shape."""
        return self.holistic(vectors)

    def code_logits(self, x, y):
        """Return W_out ReLU(W_c |x - y|), [..., num_codes], for x, y [..., width]."""
        distance = (x - y) * jnp.sign(x - y)  # |x - y| with gradient 0, not 1, where x equals y
        return self.code_out(nn.relu(self.code_hidden(distance)))


def candidates_of(student, variables):
    """Do as ``Student.candidate_vectors`` does for all items, where layers make the vectors for ``ITEMS_AT_ONCE`` at a time.

    Args:
      student: Student.
      variables: its variables.

    Returns:
      [N, dim] float32.
    """
    items = jnp.arange(1, student.num_items + 1, dtype=jnp.int32)
    if len(items) <= ITEMS_AT_ONCE or student.scores_by_ids:
        return student.apply(variables, method="candidate_vectors")
    parts = jnp.pad(items, (0, -len(items) % ITEMS_AT_ONCE)).reshape(-1, ITEMS_AT_ONCE)
    vectors = jax.lax.map(lambda part: student.apply(variables, True, part, method="candidate_vectors"), parts)
    return vectors.reshape(-1, student.dim)[: len(items)]


def init_student(student, key, tables, facts=None):
    """Initialise the variables and fill in what is known of the items.

    Args:
      student: Student.
      key: a jax PRNG key.
      tables: dict modality -> [N + 1, table_width] float32 initial rows of the student's modality tables (row 0 zeros).
      facts: dict modality -> Facts, for all modalities with a table or clusters; None takes every item as covered.

    Returns:
      (params, frozen): two dicts; frozen holds the facts and the tables of a student with ``tuned=False``.
    """
    variables = student.init(key, jnp.zeros((1, 1), jnp.int32))
    params, frozen = dict(variables["params"]), dict(variables.get("frozen", {}))
    home = params if student.tuned else frozen
    for name in student.modalities:
        home[f"{name}_embedding"] = {"embedding": jnp.asarray(tables[name], jnp.float32)}
        if facts:
            frozen[f"{name}_has_feature"] = jnp.asarray(facts[name].has_feature)
    for name in student.clustered:
        frozen[f"{name}_links"] = jnp.asarray(facts[name].links)
        if BACKBONES[student.backbone].has_clusters:
            rows = _spread(jnp.asarray(facts[name].centres, jnp.float32), student.dim**-0.5)
            params["encoder"] = params["encoder"] | {f"{name}_clusters": rows}
    return params, frozen


def _spread(values, bound):
    """Map values linearly so that the smallest of all is -bound and the largest bound; zeros where all are equal."""
    low, high = values.min(), values.max()
    span = jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, bound * (2 * (values - low) / span - 1), 0.0)


def count_parameters(params):
    """Count the trainable numbers of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
