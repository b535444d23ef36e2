"""The objective of a batch against loops over sequences and pairs, and that drawing pairs changes no expectation."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdsr_jax import train
from kdsr_jax.models.student import Facts, Student, init_student
from kdsr_jax.objective import Objective
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.resident import Batch
from kdsr_jax.teacher import Teacher

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, DIM, WIDTH, SPLITS, CODES, LENGTH, TAU = 15, 4, 6, 3, 5, 6, 0.7
SIGMAS = ("sigmoid", "softmax", "identity")
MISSING = {"image": (4, 9), "text": (2,)}
# repeats, an item missing from one modality, two short rows; the second row has most pairs
HISTORY = np.array([[3, 4, 3, 7, 0, 0], [2, 8, 5, 1, 6, 9], [4, 9, 0, 0, 0, 0], [10, 0, 0, 0, 0, 0]], np.int32)


def frozen():
    """What the student knows of its items: nothing, for the teacher says whose pairs count."""
    return {f"{name}_has_feature": jnp.ones(N + 1, bool) for name in MISSING}


def make_student(modalities=("image", "text"), num_codes=CODES):
    size = {"dim": DIM, "table_width": WIDTH, "max_length": LENGTH, "num_layers": 0, "fusion": "sum"}
    return Student(N, modalities, "sasrm", num_codes=num_codes, hidden_dropout=0.0, attention_dropout=0.0, **size)


@pytest.fixture(scope="module")
def params():
    """Random numbers for every parameter; row 0 of the tables zero."""
    tables = {name: jnp.zeros((N + 1, WIDTH)) for name in MISSING}
    shapes = jax.eval_shape(lambda key: init_student(make_student(), key, tables)[0], jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    for name in ("item", *MISSING):
        table = params[f"{name}_embedding"]["embedding"]
        params[f"{name}_embedding"] = {"embedding": table.at[0].set(0.0)}
    return params


@pytest.fixture(scope="module")
def teachers():
    rng = np.random.default_rng(1)
    teachers = {}
    for name, missing in MISSING.items():
        condensed = rng.normal(size=(N + 1, WIDTH)).astype(np.float32)
        has_feature = np.ones(N + 1, bool)
        has_feature[[0, *missing]] = False
        condensed[~has_feature] = 0
        codebook = rng.uniform(-1, 1, size=(CODES, SPLITS)).astype(np.float32)
        teachers[name] = Teacher(*map(jnp.asarray, (condensed, has_feature, codebook)))
    return teachers


def make_objective(student=None, cluster_weight=0.0, **changes):
    distill = {"lambda_score": 2.0, "lambda_code": 0.5, "temperature": TAU, "sigma": "sigmoid", "pair_budget": 0}
    settings = SimpleNamespace(**distill | changes), "cosine", SPLITS
    return Objective(student or make_student(), *settings, cluster_weight)


def make_batch(history=HISTORY):
    """Every position that has a successor is a target slot, the other slots are padding."""
    history = np.asarray(history)
    rows, places = np.nonzero((history[:, :-1] > 0) & (history[:, 1:] > 0))
    spare = history.size - len(rows)
    slots = np.pad(rows * LENGTH + places, (0, spare), constant_values=history.size).astype(np.int32)
    targets = np.pad(history[rows, places + 1], (0, spare)).astype(np.int32)
    unused = np.zeros_like(slots)
    return Batch(*map(jnp.asarray, (history, slots, targets, targets > 0, unused, unused, unused)))


@functools.cache
def compiled(sigma, budget, name="image"):
    """A compiled (params, teacher, history) -> ((sum, (L_S, L_C)), gradient of the sum) of one modality."""
    objective = make_objective(sigma=sigma, pair_budget=2 * budget)  # of which each of two modalities has its half

    def both(params, teacher, history):
        parts = objective.distillation(
            {"params": params, "frozen": frozen()}, name, teacher, history, jax.random.key(2)
        )
        return sum(parts), parts

    return jax.jit(jax.value_and_grad(both, has_aux=True))


# --- by loops --------------------------------------------------------------------------------------------------------


def cosine(x, y):
    length = np.linalg.norm(x) * np.linalg.norm(y)
    return x @ y / length if length else 0.0


def dense(layer, x):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


def covered(row, teacher):
    """The distinct items of a row that have features, in order of their first occurrence."""
    return [item for item in dict.fromkeys(row.tolist()) if item and teacher.has_feature[item]]


def softmax(values):
    weights = np.exp(np.asarray(values) / TAU)
    return weights / weights.sum()


def by_loops(params, teacher, history, sigma, name="image"):
    """Eqs. 3 and 5: means over the pairs of all sequences together; softmax is over each item's row of pairs."""
    condensed = np.asarray(teacher.condensed, np.float64)
    table = np.asarray(params[f"{name}_embedding"]["embedding"], np.float64)
    head = params[f"{name}_head"]
    transformed = dense(head["holistic"], table)
    squash = {"sigmoid": lambda r: 1 / (1 + np.exp(-r / TAU)), "identity": lambda r: r / TAU}.get(sigma)
    holistic, dissected = [], []
    for row in history:
        items = covered(row, teacher)
        for n, i in enumerate(items):
            for j in items[n + 1 :]:
                x, y = (condensed[k].reshape(SPLITS, -1) for k in (i, j))
                vector = [cosine(a, b) for a, b in zip(x, y, strict=True)]
                code = np.argmin(((np.asarray(teacher.codebook) - vector) ** 2).sum(1))
                hidden = np.maximum(dense(head["code_hidden"], np.abs(table[i] - table[j])), 0)
                logits = dense(head["code_out"], hidden)
                dissected.append(np.log(np.exp(logits).sum()) - logits[code])
                if squash:
                    target, predicted = (cosine(v[i], v[j]) for v in (condensed, transformed))
                    holistic.append((squash(target) - squash(predicted)) ** 2)
            others = [j for j in items if j != i]
            if sigma == "softmax" and others:
                target, predicted = (softmax([cosine(v[i], v[j]) for j in others]) for v in (condensed, transformed))
                holistic.extend((target - predicted) ** 2)
    return np.mean(holistic), np.mean(dissected)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_losses_equal_loops_over_the_pairs_of_the_batch(params, teachers, sigma):
    (_, got), _ = compiled(sigma, 0)(params, teachers["image"], HISTORY)
    expected = by_loops(params, teachers["image"], HISTORY, sigma)
    assert min(expected) > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_chosen_pairs_are_the_distinct_covered_ones(teachers):
    valid = np.array([[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]], bool)
    row, i, j, mask = make_objective().choose_pairs(jnp.asarray(valid), jax.random.key(0))
    pairs = {
        (r, HISTORY[r, a], HISTORY[r, b]) for r, a, b, m in zip(*map(np.asarray, (row, i, j, mask)), strict=True) if m
    }
    five = [2, 8, 5, 1, 6]
    assert pairs == {(0, 3, 7)} | {(1, a, b) for n, a in enumerate(five) for b in five[n + 1 :]}


@pytest.mark.parametrize("sigma", SIGMAS)
def test_expectation_over_draws_is_the_mean_over_all_pairs(params, teachers, sigma):
    full = np.asarray(compiled(sigma, 0)(params, teachers["image"], HISTORY)[0][1])
    objective = make_objective(sigma=sigma, pair_budget=24)  # 12 of 60 places for pairs; two rows for softmax

    def draw(key, params, teacher):
        return jnp.stack(
            objective.distillation({"params": params, "frozen": frozen()}, "image", teacher, jnp.asarray(HISTORY), key)
        )

    draws = jax.jit(jax.vmap(draw, (0, None, None)))
    values = np.asarray(draws(jax.random.split(jax.random.key(1), 4000), params, teachers["image"]))
    error = values.std(0) / np.sqrt(len(values))
    assert (error > 0).all()
    assert (np.abs(values.mean(0) - full) < 4 * error).all()
    assert (error < 0.05 * full).all()  # so that a wrong weighting of the rows would show


def test_a_budget_that_holds_all_pairs_takes_each_once():
    valid = jnp.asarray(HISTORY > 0)
    for budget, count in ((60, 60), (59, 59)):  # the shape has room for 60 pairs
        choose = jax.jit(make_objective(make_student(("image",)), pair_budget=budget).choose_pairs)
        first, second = (choose(valid, jax.random.key(key)) for key in (0, 1))
        assert len(first[0]) == count
        same = all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert same == (count == 60)  # drawn ones change with the key


@pytest.mark.parametrize(("modalities", "budget", "share"), [(("image",), 13, 13), (("image", "text"), 13, 7)])
def test_modalities_share_the_budget(modalities, budget, share):
    objective = make_objective(make_student(modalities), pair_budget=budget)
    assert len(objective.choose_pairs(jnp.asarray(HISTORY > 0), jax.random.key(0))[0]) == share


@pytest.mark.parametrize("sigma", ["sigmoid", "softmax"])
def test_empty_rows_that_fill_a_batch_up_do_not_decide_whether_pairs_are_drawn(params, teachers, sigma):
    length = HISTORY.shape[1]
    pairs = (
        length * (length - 1) // 2 if sigma == "sigmoid" else length**2
    )  # softmax: an item's row is as many as there are places
    objective = make_objective(
        sigma=sigma, pair_budget=2 * len(HISTORY) * pairs
    )  # of two modalities: just all of the batch
    objective.rows = {length: len(HISTORY)}
    padded = np.pad(HISTORY, ((0, 3), (0, 0)))
    found = []
    for history in (HISTORY, padded):
        arguments = {"params": params, "frozen": frozen()}, "image", teachers["image"], jnp.asarray(history)
        found.append(
            jax.jit(functools.partial(objective.distillation, key=jax.random.key(0)), static_argnums=1)(*arguments)
        )
    np.testing.assert_allclose(*np.asarray(found), rtol=1e-5)


# --- what takes no part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 12])
@pytest.mark.parametrize("sigma", ["sigmoid", "softmax"])
def test_items_without_features_and_padding_take_no_part(params, teachers, sigma, budget):
    run = compiled(sigma, budget)
    (value, _), gradient = run(params, teachers["image"], HISTORY)
    table = np.asarray(gradient["image_embedding"]["embedding"])
    out = [0, 4, 9, 10, 11, 12, 13, 14, 15]  # padding; missing; alone in its row; not in the batch
    assert value > 0 and not table[out].any()
    if not budget:
        assert table[[1, 2, 3, 5, 6, 7, 8]].any(1).all()
    # Whatever the student believes about items 4 and 9, nothing changes.
    other = params["image_embedding"]["embedding"].at[np.array([4, 9])].add(9.0)
    assert run(params | {"image_embedding": {"embedding": other}}, teachers["image"], HISTORY)[0][0] == value


@pytest.mark.parametrize("budget", [0, 12])
@pytest.mark.parametrize("sigma", ["sigmoid", "softmax"])
def test_a_batch_without_a_valid_pair_is_zero(params, teachers, sigma, budget):
    history = np.array([[4, 9, 4, 0, 0, 0], [10, 10, 4, 0, 0, 0], [0] * 6, [0] * 6], np.int32)
    (value, _), gradient = compiled(sigma, budget)(params, teachers["image"], history)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # a NaN would count


def test_gradients_stop_at_the_teacher(params, teachers):
    key = jax.random.key(0)

    def total(teacher):
        return sum(
            make_objective().distillation(
                {"params": params, "frozen": frozen()}, "image", teacher, jnp.asarray(HISTORY), key
            )
        )

    gradient = jax.jit(jax.grad(total, allow_int=True))(teachers["image"])
    assert not np.any(gradient.condensed) and not np.any(gradient.codebook)


# --- the sum ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(params, teachers):
    """A compiled (teachers, batch, the two lambdas) -> ((total, parts), gradient)."""

    def total(params, teachers, batch, lambda_score, lambda_code):
        objective = make_objective(lambda_score=lambda_score, lambda_code=lambda_code)
        return objective(params, frozen(), teachers, batch, jax.random.key(3))

    step = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(teachers=teachers, batch=None, lambda_score=2.0, lambda_code=0.5):
        return step(params, teachers, batch or make_batch(), lambda_score, lambda_code)

    return run


def next_item_by_loops(params, batch):
    student = make_student(num_codes=0)
    scores = jax.jit(student.apply)({"params": params, "frozen": frozen()}, batch.history)
    scores = np.asarray(scores, np.float64).reshape(-1, N)
    losses = [
        np.log(np.exp(scores[slot]).sum()) - scores[slot][target - 1]
        for slot, target in zip(np.asarray(batch.slots), np.asarray(batch.targets), strict=True)
        if target
    ]
    assert len(losses) == 9
    return np.mean(losses)


def test_total_is_the_weighted_sum_of_the_parts_of_all_modalities(whole, params, teachers):
    (total, parts), _ = whole()
    assert set(parts) == {"next_item"} | {f"{part}/{name}" for part in ("holistic", "dissected") for name in MISSING}
    np.testing.assert_allclose(parts["next_item"], next_item_by_loops(params, make_batch()), rtol=1e-5)
    for name in MISSING:
        expected = by_loops(params, teachers[name], HISTORY, "sigmoid", name)
        np.testing.assert_allclose([parts[f"holistic/{name}"], parts[f"dissected/{name}"]], expected, rtol=1e-4)
    weighted = sum(make_objective().weight(part) * value for part, value in parts.items())
    np.testing.assert_allclose(total, weighted, rtol=1e-6)
    assert make_objective().weight("next_item") == 1.0
    assert make_objective().weight("holistic/text") == 2.0 and make_objective().weight("dissected/image") == 0.5


def test_without_teachers_the_next_item_is_all(whole, params):
    (total, parts), gradient = whole(teachers={})
    assert set(parts) == {"next_item"}
    assert total == parts["next_item"]
    assert all(not np.any(leaf) for name in MISSING for leaf in jax.tree.leaves(gradient[f"{name}_head"]))


def test_every_term_can_be_switched_off(whole):
    _, plain = whole(teachers={})
    (total, parts), gradient = whole(lambda_score=0.0, lambda_code=0.0)
    assert total == parts["next_item"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, plain)
    for name, off, on in (("lambda_score", "holistic", "code_out"), ("lambda_code", "code_out", "holistic")):
        _, gradient = whole(**{name: 0.0})
        for head in ("image_head", "text_head"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[head][off]))
            assert np.any(gradient[head][on]["kernel"])


def test_a_batch_without_targets_and_pairs_is_zero(whole):
    (total, parts), gradient = whole(batch=make_batch(np.zeros_like(HISTORY)))
    assert total == 0 and not any(np.any(value) for value in parts.values())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_histories_and_candidates_have_dropout_of_their_own():
    keys = {}

    def apply(variables, *arguments, method, rngs):
        keys[method] = jax.random.key_data(rngs["dropout"]).tolist()
        return jnp.zeros((*HISTORY.shape, DIM) if method == "encode" else (N, DIM))

    student = SimpleNamespace(apply=apply, predicts_clusters=False, num_items=N)
    make_objective(student)({}, {}, {}, make_batch(), jax.random.key(0))
    assert keys["encode"] != keys["candidate_vectors"]  # else both drop the same


# --- clusters of the next item ---------------------------------------------------------------------------------------

CLUSTERS = 5


@pytest.fixture(scope="module")
def predicting():
    """A student that predicts clusters, and its random variables; items without the feature have no links."""
    names = tuple(MISSING)
    student = make_student(num_codes=0).clone(
        clustered=names, num_clusters=CLUSTERS, cluster_links=2, predicts_clusters=True
    )
    rng, facts = np.random.default_rng(3), {}
    for name, missing in MISSING.items():
        links = np.stack([rng.permutation(CLUSTERS)[:2] for _ in range(N + 1)]).astype(np.int32)
        covered = ~np.isin(np.arange(N + 1), [0, *missing])
        facts[name] = Facts(covered, np.where(covered[:, None], links, -1), np.zeros((CLUSTERS, WIDTH), np.float32))
    tables = {name: jnp.zeros((N + 1, WIDTH)) for name in names}
    params, known = jax.jit(functools.partial(init_student, student))(jax.random.key(0), tables, facts)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    return student, params, known


@pytest.fixture(scope="module")
def predicted(predicting):
    """A compiled (batch, cluster_weight) -> ((total, parts), gradient)."""
    student, params, known = predicting

    def total(params, batch, cluster_weight):
        return make_objective(student, cluster_weight)(params, known, {}, batch, jax.random.key(3))

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    return lambda batch, cluster_weight=10.0: step(params, batch, cluster_weight)


def clusters_by_loops(predicting, batch, name):
    """The mean over the targets with the feature of the mean over the clusters of -log P(linked or not)."""
    student, params, known = predicting
    states = student.apply({"params": params, "frozen": known}, batch.history, method="encode").reshape(-1, DIM)
    costs = []
    for slot, target in zip(np.asarray(batch.slots), np.asarray(batch.targets), strict=True):
        if target and target not in MISSING[name]:
            chance = 1 / (1 + np.exp(-dense(params[f"{name}_clusters"], np.asarray(states[slot], np.float64))))
            links = np.asarray(known[f"{name}_links"])[target]
            costs.append(-np.mean([np.log(p if c in links else 1 - p) for c, p in enumerate(chance)]))
    return np.mean(costs), len(costs)


def test_clusters_of_the_next_item_equal_loops_and_add_to_the_total(predicting, predicted):
    batch = make_batch()
    (total, parts), _ = predicted(batch)
    assert set(parts) == {"next_item", "clusters/image", "clusters/text"}
    for name, count in (("image", 6), ("text", 9)):  # without an image are the targets 4, 9 and 9
        expected, counted = clusters_by_loops(predicting, batch, name)
        assert counted == count
        np.testing.assert_allclose(parts[f"clusters/{name}"], expected, rtol=1e-4)
    objective = make_objective(predicting[0], 10.0)
    assert objective.weight("clusters/text") == 10.0 and objective.weight("next_item") == 1.0
    weighted = sum(objective.weight(part) * value for part, value in parts.items())
    np.testing.assert_allclose(total, weighted, rtol=1e-6)


def test_predicting_clusters_teaches_the_whole_student_and_can_be_switched_off(predicted):
    (total, parts), gradient = predicted(make_batch(), 0.0)
    assert total == parts["next_item"] and parts["clusters/image"] > 0
    _, weighted = predicted(make_batch())
    for name in MISSING:
        assert not np.any(gradient[f"{name}_clusters"]["kernel"]) and np.any(weighted[f"{name}_clusters"]["kernel"])
        difference = weighted[f"{name}_embedding"]["embedding"] - gradient[f"{name}_embedding"]["embedding"]
        read = np.unique(HISTORY[:, :-1])[1:]
        assert set(np.flatnonzero(np.any(difference, axis=1))) <= set(read)
        assert np.any(difference)


def test_a_batch_without_a_target_that_has_the_feature_is_zero(predicted):
    history = np.zeros_like(HISTORY)
    history[0, :3] = 3, 4, 9
    (_, parts), gradient = predicted(make_batch(history))
    assert parts["clusters/image"] == 0 and not np.any(gradient["image_clusters"]["kernel"])
    assert parts["clusters/text"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_phase_weighs_clusters_as_the_config_says(tiny):
    run = train.prepare(tiny("model.cluster_weight=3", "model.num_clusters=4", "model.tables=none", variant=":difsr"))
    assert run.student.predicts_clusters and run.student.clustered == ("image",) and not run.student.modalities
    objective = PhaseRunner(run, train.refit_phase(run, 1), None).trainer.objective
    assert objective.weight("clusters/image") == 3.0


def test_a_softmax_over_drawn_items_touches_only_them_and_comes_near_the_whole(params, teachers):
    batch, key = make_batch(), jax.random.key(3)
    student = make_student().clone(hidden_dropout=0.0, attention_dropout=0.0)
    distill = SimpleNamespace(lambda_score=0.0, lambda_code=0.0, temperature=1.0, sigma="sigmoid", pair_budget=0)

    def loss(params, sampled_items):
        objective = Objective(student, distill, "cosine", SPLITS, sampled_items=sampled_items)
        return objective(params, frozen(), {}, batch, key)[1]["next_item"]

    small = jax.tree.map(lambda leaf: leaf * 0.3, params)
    np.testing.assert_allclose(loss(small, 20_000), loss(small, 0), rtol=0.02)
    table = jax.grad(loss)(params, 1)["item_embedding"]["embedding"]
    known = set(np.asarray(batch.targets)) | set(np.asarray(batch.history).ravel())
    assert len(set(np.flatnonzero(np.any(table, axis=1))) - known) <= 1  # but for the one that is drawn
    assert not np.any(table[0])


def test_a_phase_draws_as_many_items_as_the_config_says(tiny):
    run = train.prepare(tiny("train.sampled_items=7"))
    assert PhaseRunner(run, train.refit_phase(run, 1), None).trainer.objective.sampled_items == 7
