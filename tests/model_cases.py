"""Tiny students of every backbone with random parameters, and what tests of models compare them with.

A test module imports it as ``from model_cases import ...``; pytest puts this folder on the path.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from configs import default
from kdsr_jax import config
from kdsr_jax.layout import OPTIONS
from kdsr_jax.models.backbones import BACKBONES
from kdsr_jax.models.student import Facts, Student, init_student
from kdsr_jax.ops import losses
from kdsr_jax.optim import path_name

N, DIM, LENGTH, MODALITIES = 30, 8, 6, ("image", "text")
NUM_CLUSTERS, CLUSTER_LINKS = 5, 2
MISSING = 7  # an item without any feature
WITHOUT_FIRST = 4  # an item that lacks the first modality's feature only
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile, where the last bit does not matter
# A full history with a repeat and both items that lack features, a short one, and one of a single item.
HISTORY = np.array([[3, 9, 3, 4, 7, 1], [5, 2, 8, 0, 0, 0], [6, 0, 0, 0, 0, 0]], np.int32)


def make(backbone="sasrm", tables=None, **changes):
    """Lay out a tiny student without dropout, else as published: readout, options and kind of tables.

    Args:
      backbone: a key of BACKBONES.
      tables: "tuned", "frozen" or "none"; None is the kind it was published with.
      changes: further attributes of Student; ``modalities`` says which ones, if it is to have tables.
    """
    published = config.BACKBONES[backbone]
    tables = tables or published["tables"]
    names = tuple(changes.pop("modalities", MODALITIES))
    model = default.get_config().model
    settings = {"num_items": N, "dim": DIM, "table_width": DIM, "max_length": LENGTH, "num_layers": 1, "num_heads": 2}
    settings |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "readout": published.get("readout", "last")}
    settings |= {"options": FrozenDict({name: model[name] for name in OPTIONS.get(backbone, ())})}
    if BACKBONES[backbone].has_clusters or changes.get("predicts_clusters"):
        settings |= {"clustered": names, "num_clusters": NUM_CLUSTERS, "cluster_links": CLUSTER_LINKS}
    settings |= {"modalities": names if tables != "none" else (), "tuned": tables != "frozen"}
    return Student(backbone=backbone, **settings | changes)


def facts_of(student, seed=7):
    """Make up what is known of the items: who lacks features, and random clusters; dict modality -> Facts."""
    rng = np.random.default_rng(seed)
    rows, facts = student.num_items + 1, {}
    for index, name in enumerate(dict.fromkeys((*student.modalities, *student.clustered))):
        has_feature = np.arange(rows) > 0
        has_feature[[MISSING] if index else [MISSING, WITHOUT_FIRST]] = False
        facts[name] = Facts(has_feature)
        if name in student.clustered:
            links = np.stack([rng.permutation(student.num_clusters)[: student.cluster_links] for _ in range(rows)])
            centres = rng.normal(scale=0.5, size=(student.num_clusters, student.table_width)).astype(np.float32)
            facts[name] = Facts(has_feature, np.where(has_feature[:, None], links, -1).astype(np.int32), centres)
    return facts


def shapes(student):
    """Return (params, frozen) as shapes, exactly as training has them."""
    tables = {name: jnp.zeros((student.num_items + 1, student.table_width)) for name in student.modalities}
    return jax.eval_shape(lambda key: init_student(student, key, tables, facts_of(student)), jax.random.key(0))


def names(student):
    """Return two dicts path -> shape, of the parameters and of what is frozen."""
    listed = [jax.tree_util.tree_leaves_with_path(tree) for tree in shapes(student)]
    return [{path_name(path): leaf.shape for path, leaf in leaves} for leaves in listed]


def fill(tree, seed=0, scale=0.5, facts=None):
    """Random numbers for every leaf, biases included; zero rows for padding and for items without the feature."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.normal(scale=scale, size=shape.shape).astype(np.float32)
        name, _, kind = path_name(path).partition("_embedding")
        if kind == "/embedding":
            values[0] = 0
            if facts and name in facts:
                values[~facts[name].has_feature] = 0
        return values

    return jax.tree_util.tree_map_with_path(leaf, tree)


@functools.cache
def build(backbone="sasrm", tables=None, **changes):
    """Return (student, variables) with random numbers in every parameter (NumPy) and table; see ``make``."""
    student = make(backbone, tables, **changes)
    facts, (params, frozen) = facts_of(student), shapes(student)
    known = {f"{name}_has_feature": fact.has_feature for name, fact in facts.items()}
    known |= {f"{name}_links": fact.links for name, fact in facts.items() if fact.links is not None}
    frozen = {
        name: known[name] if name in known else fill({name: tree}, 1, 0.5, facts)[name] for name, tree in frozen.items()
    }
    return student, {"params": fill(params, facts=facts), "frozen": jax.tree.map(jnp.asarray, frozen)}


@functools.cache
def scorer(backbone="sasrm", tables=None, **changes):
    """Return a jitted function history [B, L] -> scores [B, L, N]; of a model of prefixes only the last ones count."""
    student, variables = build(backbone, tables, **changes)
    apply = jax.jit(student.apply)
    return lambda history: np.asarray(apply(variables, jnp.asarray(history, jnp.int32)))


def counted(student, history):
    """Say which positions of histories [B, L] are used: all real ones, or the last real one; [B, L] bool."""
    real = np.asarray(history) > 0
    newest = np.arange(real.shape[1])[None] == real.sum(1)[:, None] - 1
    return real & newest if student.trained_on == "prefixes" else real


def next_item_gradient(student, variables, history, dropout_key=None):
    """Return the gradient of the next-item loss over the positions that count; targets are made up."""
    return gradients(student, variables, history, dropout_key)[0]


def states_gradient(student, variables, history):
    """Return the gradient of a function of the representations that count, which no scores are in."""
    return gradients(student, variables, history)[1]


def gradients(student, variables, history, dropout_key=None):
    """Return (``next_item_gradient``, ``states_gradient``), compiled together; with a key under dropout."""
    rngs = {} if dropout_key is None else {"rngs": {"dropout": dropout_key}}
    mask = counted(student, history)
    targets = np.where(mask, np.arange(mask.size).reshape(mask.shape) % N, 0)

    def values(params):
        given = variables | {"params": params}
        states = student.apply(given, history, dropout_key is None, method="encode", **rngs)[mask]
        vectors = student.apply(given, dropout_key is None, method="candidate_vectors", **rngs)
        weights = jnp.arange(1, student.dim + 1)[None]
        next_item = losses.next_item_loss(states, vectors, targets[mask], np.ones(mask.sum(), bool))
        return next_item, jnp.sum(states**2 * weights)

    def both(params):
        _, pull_back = jax.vjp(values, params)
        return pull_back((1.0, 0.0))[0], pull_back((0.0, 1.0))[0]

    return jax.tree.map(np.asarray, jax.jit(both, compiler_options=QUICK)(variables["params"]))


def futures(history, seed=4):
    """Yield for each position i the full histories with other items after it, and with nothing after it."""
    rng = np.random.default_rng(seed)
    for i in range(history.shape[1] - 1):
        other, cut = history.copy(), history.copy()
        other[:, i + 1 :] = rng.integers(1, N + 1, size=other[:, i + 1 :].shape)
        cut[:, i + 1 :] = 0
        yield i, other, cut


# --- transcriptions, slow and plain ----------------------------------------------------------------------------------


def dense(layer, x):
    """Apply a linear layer."""
    return x @ layer["kernel"] + layer.get("bias", 0)


def norm(layer, x):
    """Apply a layer norm."""
    centred = x - x.mean(-1, keepdims=True)
    return layer["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) + layer["bias"]


def softmax(scores):
    """Turn a list of scores into weights."""
    weights = np.exp(np.asarray(scores) - np.max(scores))
    return weights / weights.sum()


def sigmoid(x):
    """Apply the logistic function."""
    return 1 / (1 + np.exp(-np.asarray(x)))


def gelu(x):
    """Apply the exact GELU."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention_by_loops(layer, x, valid, heads):
    """For every head and query: softmax of q.k / sqrt(d/heads) over real keys that are not later, times the values."""
    query, key, value = (dense(layer[name], x) for name in ("query", "key", "value"))
    mixed, width = np.zeros_like(x), x.shape[1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in np.flatnonzero(valid):
            keys = [j for j in range(i + 1) if valid[j]]
            weights = softmax([query[i, part] @ key[j, part] / math.sqrt(width) for j in keys])
            mixed[i, part] = sum(w * value[j, part] for w, j in zip(weights, keys, strict=True))
    return dense(layer["out"], mixed)


def layer_by_loops(layer, x, valid, heads):
    """Apply a post-norm Transformer layer, causal attention and feed-forward, to x [L, d]."""
    return feed_forward(
        layer, norm(layer["attention_norm"], x + attention_by_loops(layer["attention"], x, valid, heads))
    )


def feed_forward(layer, x):
    """Apply the second half of a Transformer layer."""
    return norm(layer["outer_norm"], x + dense(layer["outer"], gelu(dense(layer["inner"], x))))
