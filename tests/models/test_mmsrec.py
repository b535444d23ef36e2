"""MMSRec: its size, its equations by loops, who is read and scored, and the contrastive warm-up."""

import functools
from types import SimpleNamespace

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
    feed_forward,
    make,
    next_item_gradient,
    norm,
    shapes,
    softmax,
)

from configs import default
from kdsr_jax import train
from kdsr_jax.config import validate
from kdsr_jax.errors import UserError
from kdsr_jax.models.student import count_parameters
from kdsr_jax.objective import Objective
from kdsr_jax.phase import PhaseRunner

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS, TEMPERATURE = 2, 0.05
DEEP = {"num_layers": 2, "table_width": 4}
LACKING = {"image": {MISSING, WITHOUT_FIRST}, "text": {MISSING}}  # modality -> the items that lack it


def expected_count(student):
    d, w, m = student.dim, student.table_width, len(student.modalities)
    count = m * (w * d + d + 2 * d)  # a linear map and a norm per modality
    count += d + (student.max_length + 1) * d + m * d  # mask item, positions, modalities
    layer = 4 * d * d + 3 * d  # query, key, value, out; no bias for the key
    layer += 2 * d * 2 * d + 2 * d + d  # feed-forward d -> 2d -> d with biases
    layer += 2 * 2 * d  # two norms
    count += student.num_layers * layer
    count += 3 * 2 * d  # norms of the input, after the layers and of the output
    count += d * d + d  # linear map of the output
    if student.tuned:
        count += m * (student.num_items + 1) * w  # modality tables
    return count


@pytest.mark.parametrize(
    "changes",
    [{}, {"tables": "tuned", "table_width": 4, "num_layers": 3}, {"modalities": ("text",)}],
    ids=str,
)
def test_number_of_parameters(changes):
    student = make("mmsrec", **changes)
    assert count_parameters(shapes(student)[0]) == expected_count(student)


def sharpen(variables):
    """Shift the scales of norms from about 0 to about 1, without which all outputs are nearly alike."""

    def shift(path, leaf):
        return leaf + 1 if path[-1].key == "scale" else leaf

    return variables | {"params": jax.tree_util.tree_map_with_path(shift, variables["params"])}


@functools.cache
def built(tables=None, **changes):
    student, variables = build("mmsrec", tables, **changes)
    return student, sharpen(variables)


@functools.cache
def run(method, **changes):
    """Return a compiled method of the student's, its variables given."""
    student, variables = built(**changes)
    compiled = jax.jit(functools.partial(student.apply, method=method), compiler_options=QUICK)
    return lambda *arguments: np.asarray(compiled(variables, *arguments))


# --- transcription ---------------------------------------------------------------------------------------------------


def layer_by_loops(layer, x):
    """Apply a post-norm layer in which every one of the tokens x [T, d] reads every one."""
    own, width = layer["attention"], DIM // HEADS
    query, key, value = (dense(own[name], x) for name in ("query", "key", "value"))
    mixed = np.zeros_like(x)
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(x)):
            weights = softmax([query[i, part] @ k / np.sqrt(width) for k in key[:, part]])
            mixed[i, part] = sum(w * v for w, v in zip(weights, value[:, part], strict=True))
    return feed_forward(layer, norm(layer["attention_norm"], x + dense(own["out"], mixed)))


def encode_by_loops(variables, items, which=MODALITIES):
    """Encode items by the modalities in which, "mask" being the mask item; returns the unit vector of the last one."""
    own = variables["params"]["encoder"]
    tokens, owner = [], []
    for position, item in enumerate(items):
        for index, name in enumerate(MODALITIES):
            if item == "mask":
                vector = own["mask_item"]
            elif item in LACKING[name] or name not in which:
                continue
            else:
                row = np.asarray(variables["frozen"][f"{name}_embedding"]["embedding"])[item]
                vector = norm(own[f"{name}_norm"], dense(own[f"{name}_in"], row))
            tokens.append(vector + own["position_embedding"][position] + own["modality_embedding"][index])
            owner.append(position)
    if len(items) - 1 not in owner:
        return np.zeros(DIM)
    x = norm(own["input_norm"], np.stack(tokens))
    for index in range(2):
        x = layer_by_loops(own[f"layer_{index}"], x)
    x = norm(own["output_norm"], dense(own["out"], norm(own["final_norm"], x)))
    output = x[np.array(owner) == len(items) - 1].max(0)
    return output / np.linalg.norm(output)


def test_histories_and_candidates_equal_their_transcription():
    _, variables = built(**DEEP)
    states = run("encode", **DEEP)(HISTORY)
    for b, row in enumerate(HISTORY):
        expected = encode_by_loops(variables, [*row[row > 0], "mask"])
        np.testing.assert_allclose(states[b], np.tile(expected, (LENGTH, 1)), rtol=1e-3, atol=1e-4)
    candidates = run("candidate_vectors", **DEEP)()
    for item in (1, 2, WITHOUT_FIRST, MISSING, N):
        expected = encode_by_loops(variables, [item]) / TEMPERATURE
        np.testing.assert_allclose(candidates[item - 1], expected, rtol=1e-3, atol=2e-3)


# --- who is read and scored ------------------------------------------------------------------------------------------


def test_scores_are_cosines_over_the_temperature():
    states, candidates = run("encode", **DEEP)(HISTORY), run("candidate_vectors", **DEEP)()
    np.testing.assert_allclose(np.linalg.norm(states, axis=-1), 1, rtol=1e-5)
    lengths = np.where(np.arange(1, N + 1) == MISSING, 0, 1 / TEMPERATURE)
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=-1), lengths, rtol=1e-5)
    scores = states[:, 0] @ candidates.T
    assert (scores[:, MISSING - 1] == 0).all()  # an item without any modality
    assert np.ptp(scores) > 1  # histories and items are told apart


def test_an_item_without_modalities_is_read_by_no_history():
    student, variables = built()
    hidden = {
        f"{name}_has_feature": np.asarray(variables["frozen"][f"{name}_has_feature"]).copy() for name in MODALITIES
    }
    for rows in hidden.values():
        rows[[2, 8]] = False
    encode = jax.jit(functools.partial(student.apply, method="encode"), compiler_options=QUICK)
    given = variables | {"frozen": variables["frozen"] | hidden}
    one, other = (np.asarray(encode(given, np.array([[5, item, 1, 0, 0, 0]]))) for item in (2, 8))
    np.testing.assert_array_equal(one, other)
    shorter = np.asarray(encode(given, np.array([[5, 1, 0, 0, 0, 0]])))
    assert np.abs(one - shorter).max() > 1e-3  # its place is still counted


def test_gradients_reach_the_features_that_are_there():
    student, variables = built("tuned")
    history = np.concatenate([HISTORY, np.zeros((1, LENGTH), np.int32)])
    gradient = next_item_gradient(student, variables, history)
    for leaf in jax.tree.leaves(gradient["encoder"]):
        assert leaf.any() and np.isfinite(leaf).all()
    for name in MODALITIES:  # every item that has it is a candidate
        rows = np.abs(gradient[f"{name}_embedding"]["embedding"]).sum(1)
        np.testing.assert_array_equal(np.flatnonzero(rows == 0), sorted({0, *LACKING[name]}))


# --- warm-up ---------------------------------------------------------------------------------------------------------

ITEMS = np.array([3, WITHOUT_FIRST, 9, 3, MISSING, 0, 12, 0], np.int32)  # a repeat, padding, items that lack features


@functools.cache
def contrasts(**changes):
    """Return the views of ITEMS."""
    student, variables = built(**changes)
    compiled = jax.jit(functools.partial(student.apply, method="contrasts"), compiler_options=QUICK)
    return compiled(variables, jnp.asarray(ITEMS), rngs={"dropout": jax.random.key(0)})


def test_views_look_through_the_modalities_in_pairs():
    _, variables = built(**DEEP)
    image, text = ("image",), ("text",)
    pairs = [(image, image), (image, text), (text, text), (MODALITIES, MODALITIES)]
    terms = contrasts(**DEEP)
    assert len(terms) == len(pairs)
    for (first, second, present), looks in zip(terms, pairs, strict=True):
        for row, item in enumerate(ITEMS):
            lacks = [all(item == 0 or item in LACKING[name] for name in look) for look in looks]
            assert bool(present[row]) == (not any(lacks))
            if row in (1, 2):
                one, other = (encode_by_loops(variables, [item], look) for look in looks)
                np.testing.assert_allclose(first[row], one, rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(second[row] * TEMPERATURE, other, rtol=1e-3, atol=1e-4)


def test_one_modality_has_one_pair_of_views_which_dropout_tells_apart():
    ((first, second, present),) = contrasts(modalities=("text",), hidden_dropout=0.5)
    assert np.asarray(present).tolist() == [True, False, True, True, False, False, True, False]  # facts of one table
    assert np.abs(np.asarray(first - second * TEMPERATURE))[0].max() > 1e-3


@functools.cache
def warm_up():
    """Return a compiled targets -> ((total, parts), gradient) of the warm-up; without dropout, both sides are alike."""
    student, variables = built(**DEEP)
    objective = Objective(student, None, "cosine", 4)

    def loss(params, targets):
        batch = SimpleNamespace(targets=targets)
        return objective.warm_up(params, variables["frozen"], {}, batch, jax.random.key(0))

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return lambda targets: compiled(variables["params"], jnp.asarray(targets))


def test_warm_up_equals_loops_over_the_distinct_items():
    (total, parts), gradient = warm_up()(ITEMS)
    values = []
    for first, second, _ in contrasts(**DEEP):
        rows = [0, 1, 2, 6] if len(values) in (2, 3) else [0, 2, 6]  # the first of the terms need the image
        first, second = np.asarray(first)[rows], np.asarray(second)[rows]
        logits = first @ second.T
        found = [np.log(softmax(line)[own]) for side in (logits, logits.T) for own, line in enumerate(side)]
        values.append(-np.mean(found))
    np.testing.assert_allclose(total, np.mean(values), rtol=1e-4)
    assert parts == {"contrastive": total} and total > 0.01
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["encoder"]["image_in"]["kernel"]) and not np.any(gradient["encoder"]["mask_item"])


def test_warm_up_does_not_depend_on_the_order_of_targets_or_how_often_they_come():
    (total, _), gradient = warm_up()(ITEMS)
    for other in (ITEMS[::-1].copy(), np.array([12, 9, 9, 3, WITHOUT_FIRST, 12, 0, 0], np.int32)):
        (again, _), slope = warm_up()(other)
        np.testing.assert_allclose(again, total, rtol=1e-4)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), slope, gradient)


def test_warm_up_without_two_items_is_zero():
    (total, _), gradient = warm_up()(np.zeros_like(ITEMS))
    assert total == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # a NaN would count


@pytest.mark.slow  # compiles two programs
def test_a_phase_warms_up_first_and_then_recommends(tiny):
    settings = ("model.warmup_epochs=1", "train.epochs=2", "eval.protocol=paper")
    prepared = train.prepare(tiny(*settings, variant=":mmsrec"))
    runner = PhaseRunner(prepared, train.refit_phase(prepared, None), None)
    state, warm = runner.train_epoch(runner.new_state(), 1)
    assert set(warm) == {"contrastive", "loss", "gradient_norm"} and warm["loss"] == warm["contrastive"] > 0
    state, usual = runner.train_epoch(state, 2)
    assert set(usual) == {"next_item", "loss", "gradient_norm"}


# --- config ----------------------------------------------------------------------------------------------------------


def complaint(variant, **fields):
    config = default.get_config(variant)
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    with pytest.raises(UserError) as error:
        validate(config)
    return str(error.value)


def test_the_config_refuses_what_has_no_meaning():
    validate(default.get_config("mmsrec"))
    assert complaint("mmsrec", model__readout="mean").startswith("--config.model.readout=mean: must be last")
    message = complaint("nova", model__warmup_epochs=2)
    assert message.startswith("--config.model.warmup_epochs=2: must be 0; only mmsrec") and "nova has none" in message
    message = complaint("mmsrec", model__warmup_epochs=3, train__epochs=3)
    assert message.startswith("--config.model.warmup_epochs=3: must be less than --config.train.epochs=3")
