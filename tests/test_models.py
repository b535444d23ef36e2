"""Tables, fusion, backbones and the student: sizes, transcriptions, causality to the bit, padding, gradients, overfitting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    DIM,
    HISTORY,
    LENGTH,
    MISSING,
    MODALITIES,
    QUICK,
    WITHOUT_FIRST,
    N,
    build,
    dense,
    fill,
    futures,
    layer_by_loops,
    make,
    names,
    next_item_gradient,
    norm,
    scorer,
    shapes,
    states_gradient,
)

from kdsr_jax.models.embeddings import FUSIONS, Fusion, ItemTable
from kdsr_jax.models.layers import TransformerLayer, causal_mask
from kdsr_jax.models.student import DistillationHead, count_parameters, init_student
from kdsr_jax.optim import path_name

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
        {"backbone": "sasrec"},
        {"backbone": "sasrec", "tables": "tuned"},
        {"backbone": "sasrec", "tables": "tuned", "table_width": 4},
        {"tables": "none"},
        {"tables": "tuned", "modalities": ("text",)},
        {"tables": "tuned"},
        {"tables": "frozen"},
        {"tables": "frozen", "table_width": 4, "num_layers": 3},
        {"tables": "tuned", "num_codes": 10},
        {"tables": "tuned", "num_codes": 10, "table_width": 12, "fusion": "concat"},
        {"tables": "tuned", "fusion": "sum", "readout": "long_short"},
        {"tables": "tuned", "fusion": "concat", "modalities": ("text",), "item_scores": "fused"},
    ],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make(**changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def test_paths_that_optimizer_and_checkpoints_rely_on():
    params, frozen = names(make("sasrm", "tuned"))
    known = {f"{name}_has_feature": (N + 1,) for name in MODALITIES}
    assert {path for path in params if path.endswith("/embedding")} == {
        "item_embedding/embedding",
        "image_embedding/embedding",
        "text_embedding/embedding",
    }
    assert frozen == known
    params, frozen = names(make("sasrm", "frozen"))
    assert frozen == known | {f"{name}_embedding/embedding": (N + 1, DIM) for name in MODALITIES}
    assert {path for path in params if path.endswith("/embedding")} == {"item_embedding/embedding"}


def test_sasrm_is_sasrec_and_a_linear_map_per_modality():
    sasrec, sasrm = (names(make(name, "tuned"))[0] for name in ("sasrec", "sasrm"))
    maps = {f"fuse/project_{name}/{part}" for name in MODALITIES for part in ("kernel", "bias")}
    assert set(sasrm) - set(sasrec) == maps and set(sasrec) <= set(sasrm)
    # With the identity as map both are the same function.
    student, variables = build("sasrec", "tuned", num_layers=0)
    identity = {f"project_{name}": {"kernel": np.eye(DIM), "bias": np.zeros(DIM)} for name in MODALITIES}
    params = variables["params"] | {"fuse": variables["params"]["fuse"] | identity}
    scores = jax.jit(student.apply, compiler_options=QUICK)(variables, HISTORY)
    mapped = jax.jit(student.clone(backbone="sasrm").apply, compiler_options=QUICK)(
        variables | {"params": params}, HISTORY
    )
    np.testing.assert_allclose(scores, mapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tuned", "frozen"])
def test_init_takes_the_given_rows_and_zero_for_padding(kind):
    tables = {name: np.random.default_rng(0).normal(size=(N + 1, DIM)) for name in MODALITIES}
    for table in tables.values():
        table[0] = 0
    student = make("sasrec", kind, num_codes=4, num_layers=0, fusion="sum")
    init = jax.jit(functools.partial(init_student, student), compiler_options=QUICK)
    params, frozen = init(jax.random.key(0), tables)
    home = params if kind == "tuned" else frozen
    for name in MODALITIES:
        np.testing.assert_array_equal(home[f"{name}_embedding"]["embedding"], np.float32(tables[name]))
    ids = np.asarray(params["item_embedding"]["embedding"])
    assert not ids[0].any() and (ids[1:] != 0).all()
    np.testing.assert_allclose(ids[1:].std(), 0.02, rtol=0.2)
    assert count_parameters(params) == expected_count(student)


# --- parts against slow transcriptions -------------------------------------------------------------------------------


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
    student, variables = build("sasrec", num_layers=2)
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


# --- the student as a whole ------------------------------------------------------------------------------------------


def test_future_items_do_not_change_a_bit_in_training():
    student, variables = build("sasrec")
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


def test_jit_equals_eager():
    changes = {"fusion": "sum", "item_scores": "fused"}
    student, variables = build("sasrm", "tuned", **changes)
    scores = scorer("sasrm", "tuned", **changes)(HISTORY)
    np.testing.assert_allclose(student.apply(variables, HISTORY), scores, rtol=1e-5, atol=1e-5)


def test_fused_scores_let_an_item_without_id_knowledge_score_by_its_features():
    student, variables = build("sasrm", "tuned", item_scores="fused")
    targets = jax.jit(functools.partial(student.apply, method="candidate_vectors"))(variables)
    assert targets.shape == (N, DIM)
    inputs = jax.jit(functools.partial(student.apply, method="inputs"))(variables, np.array([[1, 9]]))
    np.testing.assert_allclose(targets[jnp.array([0, 8])], inputs.fused[0], rtol=1e-5, atol=1e-6)


def test_inputs_say_what_is_there():
    student, variables = build("mmsr", "tuned")
    history = np.array([[MISSING, WITHOUT_FIRST, 1, 0]], np.int32)
    inputs = student.apply(variables, history, method="inputs")
    np.testing.assert_array_equal(inputs.valid, [[True, True, True, False]])
    np.testing.assert_array_equal(inputs.present["image"], [[False, False, True, False]])
    np.testing.assert_array_equal(inputs.present["text"], [[False, True, True, False]])
    for name in MODALITIES:
        np.testing.assert_array_equal(inputs.vectors[name].any(-1), inputs.present[name])
        np.testing.assert_array_equal((inputs.links[name] >= 0).all(-1), inputs.present[name])
        np.testing.assert_array_equal((inputs.links[name] < 0).all(-1), ~inputs.present[name])


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuned", "frozen"])
def test_gradients_reach_the_tables_they_should(kind):
    student, variables = build("sasrm", kind, fusion="sum")
    gradient = states_gradient(student, variables, HISTORY)
    reached = ["item", *MODALITIES] if kind == "tuned" else ["item"]
    assert {name for name in gradient if name.endswith("_embedding")} == {f"{name}_embedding" for name in reached}
    read = np.isin(np.arange(N + 1), HISTORY[HISTORY > 0])
    for name in reached:
        rows = np.abs(gradient[f"{name}_embedding"]["embedding"]).sum(1)
        np.testing.assert_array_equal(rows > 0, read)  # exactly the batch's items; row 0 is not among them
    if kind == "frozen":
        assert all(np.any(gradient["fuse"][f"project_{name}"]["kernel"]) for name in MODALITIES)


def test_every_parameter_has_a_gradient():
    student, variables = build("sasrm", "tuned", item_scores="fused", readout="long_short")
    gradient = next_item_gradient(student, variables, HISTORY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert leaf.any(), path_name(path)
