"""The student: tables, fusion, backbone, readout, scores and the heads of distillation behind one module (paper Section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdsr_jax.models.backbones import BACKBONES
from kdsr_jax.models.embeddings import INITIALIZER, Fusion, ItemTable
from kdsr_jax.models.readout import Readout


class Student(nn.Module):
    """A recommender with id and modality tables.

    Attributes:
      num_items: N.
      modalities: names in order; empty for a model of ids only.
      backbone: a key of BACKBONES.
      dim: width of id vectors, states and scores.
      table_width: width of the modality tables (the teacher's condensed_dim).
      tuned: True trains the modality tables, False keeps them frozen.
      num_codes: x, or 0 for a student without distillation heads.
    """

    num_items: int
    modalities: tuple = ()
    backbone: str = "sasrm"
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
    num_codes: int = 0

    def setup(self):
        """Make the tables, whose attribute names are the parameter paths, and what reads them."""
        backbone = BACKBONES[self.backbone]
        self.item_embedding = ItemTable(self.num_items, self.dim)
        for name in self.modalities:
            table = ItemTable(self.num_items, self.table_width, trainable=self.tuned, random=False)
            setattr(self, f"{name}_embedding", table)
        self.fuse = Fusion(self.dim, self.fusion, backbone.project_modalities)
        self.encoder = backbone(
            dim=self.dim,
            max_length=self.max_length,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
        )
        self.read = Readout(self.dim, self.readout, self.short_term)
        if self.num_codes:
            for name in self.modalities:
                setattr(self, f"{name}_head", DistillationHead(self.table_width, self.num_codes))

    def modality_vectors(self, modality, item_ids):
        """Look items [...] int32 up in a modality's table; returns [..., table_width], zeros at padding."""
        return getattr(self, f"{modality}_embedding")(item_ids)

    def transform(self, modality, vectors):
        """Apply g_phi, the linear layer of Eq. 2, to a modality's vectors [..., table_width]; same shape."""
        return getattr(self, f"{modality}_head").transform(vectors)

    def code_logits(self, modality, x, y):
        """Predict the codes of pairs of a modality's vectors x, y [..., table_width] (Eq. 4); returns [..., num_codes]."""
        return getattr(self, f"{modality}_head").code_logits(x, y)

    def item_vectors(self, item_ids):
        """Return the fused vectors [..., dim] of items [...] int32 (0 = padding)."""
        vectors = {"item": self.item_embedding(item_ids)}
        vectors |= {name: self.modality_vectors(name, item_ids) for name in self.modalities}
        return self.fuse(vectors)

    def encode(self, history, deterministic=True):
        """Represent every prefix of each history (paper Eq. 1 and Eq. 6).

        Args:
          history: [B, L] int32 item ids, oldest first, right padded with 0.
          deterministic: True switches dropout off.

        Returns:
          [B, L, dim] float32; position i stands for the prefix 0..i; values at padding are meaningless.
        """
        return self.read(self.encoder(self.item_vectors(history), history > 0, deterministic))

    def candidate_vectors(self):
        """Return the vectors [N, dim] of items 1..N that representations are scored against (``item_scores``)."""
        if self.item_scores == "ids":
            return self.item_embedding.embedding[1:]
        return self.item_vectors(jnp.arange(1, self.num_items + 1))

    def score(self, representations):
        """Score all items: P . e_v for representations [M, dim]; returns [M, N], column n for item n + 1."""
        return representations @ self.candidate_vectors().T

    def __call__(self, history):
        """Touch every parameter, for initialisation; returns the scores [B, L, N] of history [B, L]."""
        if self.num_codes:
            for name in self.modalities:
                vectors = self.modality_vectors(name, history)
                self.transform(name, vectors)
                self.code_logits(name, vectors, vectors)
        return self.score(self.encode(history))


class DistillationHead(nn.Module):
    """The student's side of one modality's correlations: g_phi of Eq. 2 and the code classifier of Eq. 4.

    Attributes:
      width: of the modality table.
      num_codes: x.
    """

    width: int
    num_codes: int

    def setup(self):
        self.holistic = nn.Dense(self.width, kernel_init=INITIALIZER)
        self.code_hidden = nn.Dense(self.width, kernel_init=INITIALIZER)
        self.code_out = nn.Dense(self.num_codes, kernel_init=INITIALIZER)

    def transform(self, vectors):
        """Apply g_phi to vectors [..., width]; same shape."""
        return self.holistic(vectors)

    def code_logits(self, x, y):
        """Return W_out ReLU(W_c |x - y|), [..., num_codes], for x, y [..., width]."""
        distance = (x - y) * jnp.sign(x - y)  # |x - y| with gradient 0, not 1, where x equals y
        return self.code_out(nn.relu(self.code_hidden(distance)))


def init_student(student, key, tables):
    """Initialise the variables and fill the modality tables.

    Args:
      student: Student.
      key: a jax PRNG key.
      tables: dict modality -> [N + 1, table_width] float32 initial rows (row 0 zeros).

    Returns:
      (params, frozen): two dicts; frozen holds the tables of a student with ``tuned=False``, else it is empty.
    """
    variables = student.init(key, jnp.zeros((1, 1), jnp.int32))
    params, frozen = dict(variables["params"]), dict(variables.get("frozen", {}))
    home = params if student.tuned else frozen
    for name in student.modalities:
        home[f"{name}_embedding"] = {"embedding": jnp.asarray(tables[name], jnp.float32)}
    return params, frozen


def count_parameters(params):
    """Count the trainable numbers of a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
