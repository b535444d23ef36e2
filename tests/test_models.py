"""Tables, fusion, backbones and the student: sizes, transcriptions, causality to the bit, padding, gradients, overfitting."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax import config
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.sequences import train_windows
from kdsr_jax.mesh import Placement
from kdsr_jax.models.backbones import BACKBONES
from kdsr_jax.models.embeddings import FUSIONS, Fusion, ItemTable
from kdsr_jax.models.layers import TransformerLayer, causal_mask
from kdsr_jax.models.readout import READOUTS
from kdsr_jax.models.student import DistillationHead, Student, count_parameters, init_student
from kdsr_jax.objective import Objective
from kdsr_jax.ops import losses
from kdsr_jax.optim import make_optimizer, path_name
from kdsr_jax.resident import make_resident
from kdsr_jax.train_step import Trainer

N, DIM, LENGTH, MODALITIES = 30, 8, 6, ("image", "text")
MISSING = 7  # an item without features
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile, where the last bit does not matter
HISTORY = np.array([[3, 9, 3, 4, 7, 1], [5, 2, 8, 0, 0, 0], [6, 0, 0, 0, 0, 0]], np.int32)


def make(**changes):
    settings = {"dim": DIM, "table_width": DIM, "max_length": LENGTH, "modalities": MODALITIES, "num_layers": 1}
    return Student(**{"num_items": N, "hidden_dropout": 0.0, "attention_dropout": 0.0} | settings | changes)


def shapes(student):
    tables = {name: jnp.zeros((student.num_items + 1, student.table_width)) for name in student.modalities}
    return jax.eval_shape(lambda key: init_student(student, key, tables), jax.random.key(0))


def fill(tree, seed=0, scale=0.5):
    """Random numbers for every parameter, biases included; zero rows for padding and the missing item."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.normal(scale=scale, size=shape.shape).astype(np.float32)
        if path_name(path).endswith("_embedding/embedding"):
            values[0] = 0
            values[MISSING] *= "item" in path_name(path)
        return values

    return jax.tree_util.tree_map_with_path(leaf, tree)


@functools.cache
def build(**changes):
    student = make(**changes)
    params, frozen = fill(shapes(student))
    return student, {"params": params, "frozen": frozen}


def names(student):
    params, frozen = shapes(student)
    listed = [jax.tree_util.tree_leaves_with_path(tree) for tree in (params, frozen)]
    return [{path_name(path): leaf.shape for path, leaf in leaves} for leaves in listed]


# --- sizes and names -------------------------------------------------------------------------------------------------


def expected_count(student):
    d, w, x, m = student.dim, student.table_width, student.num_codes, len(student.modalities)
    count = (student.num_items + 1) * d  # id table
    count += student.max_length * d  # positions
    count += 2 * d  # norm of the input
    layer = 4 * d * d + 3 * d  # query, key, value, out; no bias for the key
    layer += 2 * d * 2 * d + 2 * d + d  # feed-forward d -> 2d -> d with biases
    layer += 2 * 2 * d  # two norms
    count += student.num_layers * layer
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    if student.backbone == "sasrm" or w != d:
        count += m * (w * d + d)  # a linear map per modality
    if m:
        count += {"gate": d * d + d + d + 1, "concat": (1 + m) * d * d + d, "sum": 0}[student.fusion]
    if student.readout == "long_short":
        count += d * d + d + 2 * d * d  # W1, W2, W3 of Eq. 6
    if x:
        count += m * (w * w + w)  # g_phi
        count += m * (w * w + w + w * x + x)  # W_c, W_out
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "sasrec", "modalities": ()},
        {"backbone": "sasrec"},
        {"backbone": "sasrec", "table_width": 4},
        {"modalities": ()},
        {"modalities": ("text",)},
        {},
        {"tuned": False},
        {"tuned": False, "table_width": 4, "num_layers": 3},
        {"num_codes": 10},
        {"num_codes": 10, "table_width": 12, "fusion": "concat"},
        {"fusion": "sum", "readout": "long_short"},
        {"fusion": "concat", "modalities": ("text",), "item_scores": "fused"},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make(**changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def test_paths_that_optimizer_and_checkpoints_rely_on():
    params, frozen = names(make())
    assert {path for path in params if path.endswith("/embedding")} == {
        "item_embedding/embedding",
        "image_embedding/embedding",
        "text_embedding/embedding",
    }
    assert not frozen
    params, frozen = names(make(tuned=False))
    assert frozen == {f"{name}_embedding/embedding": (N + 1, DIM) for name in MODALITIES}
    assert {path for path in params if path.endswith("/embedding")} == {"item_embedding/embedding"}


def test_sasrm_is_sasrec_and_a_linear_map_per_modality():
    sasrec, sasrm = (names(make(backbone=name))[0] for name in ("sasrec", "sasrm"))
    maps = {f"fuse/project_{name}/{part}" for name in MODALITIES for part in ("kernel", "bias")}
    assert set(sasrm) - set(sasrec) == maps and set(sasrec) <= set(sasrm)
    # With the identity as map both are the same function.
    student, variables = build(backbone="sasrec", num_layers=0)
    identity = {f"project_{name}": {"kernel": np.eye(DIM), "bias": np.zeros(DIM)} for name in MODALITIES}
    params = variables["params"] | {"fuse": variables["params"]["fuse"] | identity}
    scores = jax.jit(student.apply, compiler_options=QUICK)(variables, HISTORY)
    mapped = jax.jit(student.clone(backbone="sasrm").apply, compiler_options=QUICK)({"params": params}, HISTORY)
    np.testing.assert_allclose(scores, mapped, rtol=1e-5, atol=1e-6)


def test_every_backbone_of_the_config_exists_and_no_other():
    assert list(BACKBONES) == list(config.BACKBONES)


@pytest.mark.parametrize("tuned", [True, False])
def test_init_takes_the_given_rows_and_zero_for_padding(tuned):
    tables = {name: np.random.default_rng(0).normal(size=(N + 1, DIM)) for name in MODALITIES}
    for table in tables.values():
        table[0] = 0
    student = make(tuned=tuned, num_codes=4, num_layers=0, fusion="sum", backbone="sasrec")
    init = jax.jit(functools.partial(init_student, student), compiler_options=QUICK)
    params, frozen = init(jax.random.key(0), tables)
    home = params if tuned else frozen
    for name in MODALITIES:
        np.testing.assert_array_equal(home[f"{name}_embedding"]["embedding"], np.float32(tables[name]))
    ids = np.asarray(params["item_embedding"]["embedding"])
    assert not ids[0].any() and (ids[1:] != 0).all()
    np.testing.assert_allclose(ids[1:].std(), 0.02, rtol=0.2)
    assert count_parameters(params) == expected_count(student)


# --- parts against slow transcriptions -------------------------------------------------------------------------------


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0)


def norm(layer, x):
    centred = x - x.mean(-1, keepdims=True)
    return layer["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) + layer["bias"]


def attention_by_loops(layer, x, valid, heads):
    """For every head and query: softmax of q.k / sqrt(d/heads) over real keys that are not later, times the values."""
    query, key, value = (dense(layer[name], x) for name in ("query", "key", "value"))
    mixed, width = np.zeros_like(x), x.shape[1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in np.flatnonzero(valid):
            keys = [j for j in range(i + 1) if valid[j]]
            weights = np.exp([query[i, part] @ key[j, part] / math.sqrt(width) for j in keys])
            mixed[i, part] = sum(w * value[j, part] for w, j in zip(weights / weights.sum(), keys, strict=True))
    return dense(layer["out"], mixed)


def layer_by_loops(layer, x, valid, heads):
    x = norm(layer["attention_norm"], x + attention_by_loops(layer["attention"], x, valid, heads))
    inner = dense(layer["inner"], x)
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    return norm(layer["outer_norm"], x + dense(layer["outer"], inner))


@pytest.mark.parametrize("heads", [1, 2])
def test_transformer_layer_equals_loops(heads):
    layer = TransformerLayer(DIM, heads, 0.5, 0.5)
    valid = HISTORY > 0
    x = np.random.default_rng(1).normal(size=(*HISTORY.shape, DIM)).astype(np.float32)
    mask = causal_mask(jnp.asarray(valid))
    variables = fill(jax.eval_shape(lambda: layer.init(jax.random.key(0), x, mask, True)))
    got = jax.jit(layer.apply, static_argnums=3, compiler_options=QUICK)(variables, x, mask, True)
    got = np.asarray(got)
    for b in range(len(x)):
        expected = layer_by_loops(variables["params"], x[b], valid[b], heads)
        np.testing.assert_allclose(got[b][valid[b]], expected[valid[b]], rtol=1e-4, atol=1e-4)


def test_sasrec_equals_its_transcription():
    student, variables = build(backbone="sasrec", modalities=(), num_layers=2)
    encode = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)
    states = np.asarray(encode(variables, HISTORY))
    params = variables["params"]
    for b, row in enumerate(HISTORY):
        fused = params["item_embedding"]["embedding"][row] + params["encoder"]["position_embedding"]
        x = norm(params["encoder"]["input_norm"], fused)
        for index in range(2):
            x = layer_by_loops(params["encoder"][f"layer_{index}"], x, row > 0, 2)
        np.testing.assert_allclose(states[b][row > 0], x[row > 0], rtol=1e-3, atol=1e-3)
    scores = student.apply(variables, states[:, 0], method="score")
    assert scores.shape == (3, N)  # column n is item n + 1
    expected = states[1, 0] @ params["item_embedding"]["embedding"][5]
    np.testing.assert_allclose(scores[1, 4], expected, rtol=1e-4)


@pytest.mark.parametrize("kind", FUSIONS)
def test_fusion_equals_its_formula(kind):
    rng = np.random.default_rng(2)
    vectors = {"item": rng.normal(size=(5, DIM)), "image": rng.normal(size=(5, 4)), "text": rng.normal(size=(5, DIM))}
    vectors = {name: vector.astype(np.float32) for name, vector in vectors.items()}
    fusion = Fusion(DIM, kind)
    variables = fill(jax.eval_shape(fusion.init, jax.random.key(0), vectors))
    params = variables["params"]
    slots = [vectors["item"], dense(params["project_image"], vectors["image"]), vectors["text"]]
    assert "project_text" not in params  # its width is dim already
    if kind == "gate":
        hidden = [np.maximum(dense(params["gate_hidden"], slot), 0) for slot in slots]
        weights = np.exp([dense(params["gate_out"], h)[:, 0] for h in hidden])
        weights = weights / weights.sum(0)
        expected = sum(w[:, None] * slot for w, slot in zip(weights, slots, strict=True))
    else:
        expected = dense(params["concat"], np.concatenate(slots, -1)) if kind == "concat" else sum(slots)
    got = jax.jit(lambda v: fusion.apply(v, vectors))(variables)  # as an argument, jit would sort the dict
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_fusion_of_ids_alone_is_the_id_vector(kind):
    vectors = {"item": jnp.ones((2, DIM))}
    result, variables = Fusion(DIM, kind, project=True).init_with_output(jax.random.key(0), vectors)
    np.testing.assert_array_equal(result, vectors["item"])
    assert not variables


def test_padding_reads_as_zero_whatever_row_0_holds():
    table = ItemTable(3, 2)
    variables = {"params": {"embedding": jnp.arange(1.0, 9.0).reshape(4, 2)}}
    np.testing.assert_array_equal(table.apply(variables, jnp.array([[0, 2]])), [[[0, 0], [5, 6]]])
    gradient = jax.grad(lambda v: table.apply(v, jnp.array([0, 2, 2])).sum())(variables)["params"]["embedding"]
    np.testing.assert_array_equal(gradient, [[0, 0], [0, 0], [2, 2], [0, 0]])


def test_code_head_equals_its_formula_and_is_symmetric():
    head = DistillationHead(DIM, 5)
    x, y = np.random.default_rng(3).normal(size=(2, 4, DIM)).astype(np.float32)
    y[3] = x[3]
    variables = fill(jax.eval_shape(lambda: head.init(jax.random.key(0), x, y, method="code_logits")))
    params = variables["params"]
    expected = dense(params["code_out"], np.maximum(dense(params["code_hidden"], np.abs(x - y)), 0))
    run = jax.jit(functools.partial(head.apply, method="code_logits"))
    got = run(variables, x, y)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(variables, y, x), got)
    gradient = jax.grad(lambda a: run(variables, a, y).sum())(x)
    assert np.any(gradient[:3] != 0) and not np.any(gradient[3])  # |0| has gradient 0


# --- causality and padding -------------------------------------------------------------------------------------------

# Every backbone with every fusion, and among these every readout and both kinds of scores.
KINDS = [
    {"backbone": "sasrec", "fusion": "gate", "readout": "last_sum"},
    {"backbone": "sasrec", "fusion": "concat", "readout": "mean", "item_scores": "fused"},
    {"backbone": "sasrec", "fusion": "sum", "readout": "long_short"},
    {"backbone": "sasrm", "fusion": "gate", "readout": "last"},
    {"backbone": "sasrm", "fusion": "concat", "readout": "long_short"},
    {"backbone": "sasrm", "fusion": "sum", "readout": "last", "item_scores": "fused"},
]


def test_kinds_leave_none_out():
    assert {(kind["backbone"], kind["fusion"]) for kind in KINDS} == {(b, f) for b in BACKBONES for f in FUSIONS}
    assert {kind["readout"] for kind in KINDS} == set(READOUTS)


@functools.cache
def scorer(**changes):
    """A jitted function history [B, L] -> scores [B, L, N]."""
    student, variables = build(**changes)
    apply = jax.jit(student.apply)
    return lambda history: np.asarray(apply(variables, jnp.asarray(history)))


def futures(history):
    """For each i every row with other items after position i, then with nothing after it."""
    rng = np.random.default_rng(4)
    for i in range(LENGTH - 1):
        other = history.copy()
        other[:, i + 1 :] = rng.integers(1, N + 1, size=other[:, i + 1 :].shape)
        cut = history.copy()
        cut[:, i + 1 :] = 0
        yield i, other, cut


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_future_items_do_not_change_a_bit_of_the_past(changes):
    score = scorer(**changes)
    history = np.random.default_rng(5).integers(1, N + 1, size=(3, LENGTH)).astype(np.int32)
    now = score(history)
    for i, other, cut in futures(history):
        for changed in (other, cut):
            after = score(changed)
            np.testing.assert_array_equal(after[:, : i + 1], now[:, : i + 1])
            assert (after[:, i + 1] != now[:, i + 1]).any()


def test_future_items_do_not_change_a_bit_in_training():
    student, variables = build(modalities=())
    student, variables = student.clone(hidden_dropout=0.5, attention_dropout=0.5), jax.tree.map(jnp.asarray, variables)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def encode(history, key):
        return student.apply(variables, history, False, method="encode", rngs={"dropout": key})

    history = np.random.default_rng(5).integers(1, N + 1, size=(3, LENGTH)).astype(np.int32)
    now = np.asarray(encode(history, jax.random.key(0)))
    assert np.any(now != np.asarray(encode(history, jax.random.key(1))))
    for i, other, _ in futures(history):
        after = np.asarray(encode(other, jax.random.key(0)))
        np.testing.assert_array_equal(after[:, : i + 1], now[:, : i + 1])


@pytest.mark.parametrize("changes", [KINDS[2], KINDS[3]], ids=str)
def test_padding_and_neighbours_change_nothing(changes):
    score, real = scorer(**changes), HISTORY > 0
    together = score(HISTORY)
    alone = score(HISTORY[1:2, :3])  # no padding, no neighbours
    np.testing.assert_allclose(together[1, :3], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(score(HISTORY[::-1].copy())[::-1][real], together[real], rtol=1e-5, atol=1e-5)


def test_jit_equals_eager():
    student, variables = build(**KINDS[5])
    np.testing.assert_allclose(student.apply(variables, HISTORY), scorer(**KINDS[5])(HISTORY), rtol=1e-5, atol=1e-5)


def test_fused_scores_let_an_item_without_id_knowledge_score_by_its_features():
    student, variables = build(item_scores="fused")
    targets = jax.jit(functools.partial(student.apply, method="candidate_vectors"))(variables)
    assert targets.shape == (N, DIM)
    vectors = jax.jit(functools.partial(student.apply, method="item_vectors"))(variables, np.array([1, 9]))
    np.testing.assert_allclose(targets[jnp.array([0, 8])], vectors, rtol=1e-5, atol=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


def next_item_gradient(student, variables, history, encoder_only=False):
    """Gradients of the next-item loss over all real positions, or of the states alone."""

    def loss(params):
        states = student.apply(variables | {"params": params}, history, method="encode")
        if encoder_only:
            return jnp.sum(jnp.where((history > 0)[..., None], states, 0.0) ** 2 * jnp.arange(DIM)[None, None])
        logits = student.apply(variables | {"params": params}, states, method="score")
        return losses.next_item_loss(logits, jnp.roll(history, -1, 1) % N, history > 0)

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(variables["params"])
    return jax.tree.map(np.asarray, gradient)


@pytest.mark.parametrize("tuned", [True, False])
def test_gradients_reach_the_tables_they_should(tuned):
    student, variables = build(tuned=tuned, fusion="sum")
    gradient = next_item_gradient(student, variables, HISTORY, encoder_only=True)
    reached = ["item", *MODALITIES] if tuned else ["item"]
    assert {name for name in gradient if name.endswith("_embedding")} == {f"{name}_embedding" for name in reached}
    read = np.isin(np.arange(N + 1), HISTORY[HISTORY > 0])
    for name in reached:
        rows = np.abs(gradient[f"{name}_embedding"]["embedding"]).sum(1)
        np.testing.assert_array_equal(rows > 0, read)  # exactly the batch's items; row 0 is not among them
    if not tuned:
        assert all(np.any(gradient["fuse"][f"project_{name}"]["kernel"]) for name in MODALITIES)


def test_gradients_stay_finite():
    # a repeat, an item without features, a length of one and an empty row
    student, variables = build(item_scores="fused", readout="long_short")
    gradient = next_item_gradient(student, variables, np.concatenate([HISTORY, np.zeros((1, LENGTH), np.int32)]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path_name(path)
        assert leaf.any(), path_name(path)
    for name in ("item", *MODALITIES):
        assert not gradient[f"{name}_embedding"]["embedding"][0].any()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overfitted(quick_compilation):
    """A student trained on 32 sequences that differ in their first item, with coupled decay and a ramp."""
    rng = np.random.default_rng(6)
    num_items = 40
    rows = np.concatenate([rng.permutation(num_items)[:32, None], rng.integers(0, num_items, (32, LENGTH))], 1) + 1
    offsets = np.arange(33) * (LENGTH + 1)
    log = Interactions(rows.ravel().astype(np.int32), offsets, np.array(["u"] * 32), np.array(["i"] * (num_items + 1)))
    resident = make_resident(log, train_windows(offsets, log.lengths, LENGTH, 0))
    student = make(num_items=num_items, dim=32, modalities=("text",), fusion="sum")
    rows_of_text = rng.normal(scale=0.2, size=(num_items + 1, DIM)).astype(np.float32)
    rows_of_text[0] = 0
    train = {"learning_rate": 0.01, "weight_decay": 1e-5, "clip_norm": 1.0, "ramp_epochs": 5, "ramp_start": 0.1}
    optimizer, _ = make_optimizer(SimpleNamespace(**train), ("text",), steps_per_epoch=1)
    distill = SimpleNamespace(lambda_score=1.0, lambda_code=1.0)
    trainer = Trainer(Objective(student, distill, "cosine", 2), optimizer, num_slots=32 * LENGTH, seed=0)
    state = trainer.init({"text": rows_of_text}, Placement())
    ids = jnp.asarray(np.tile(np.arange(32, dtype=np.int32), (120, 1)))
    state, parts = trainer.run_chunk(state, resident, {}, ids, length=LENGTH)
    return student, state, rows, jax.tree.map(np.asarray, parts)


def test_a_tiny_set_is_learned_by_heart(overfitted):
    student, state, rows, parts = overfitted
    score = jax.jit(student.apply, compiler_options=QUICK)
    scores = score({"params": state.params}, jnp.asarray(rows[:, :-1], jnp.int32))
    hits = np.asarray(scores).argmax(-1) + 1 == rows[:, 1:]
    assert hits.mean() > 0.95
    assert parts["loss"][-1] < 0.25 * parts["loss"][0]


def test_padding_rows_are_zero_after_training(overfitted):
    _, state, _, _ = overfitted
    for name in ("item", "text"):
        table = np.asarray(state.params[f"{name}_embedding"]["embedding"])
        assert not table[0].any()
        assert np.abs(table[1:]).sum(1).all()
