"""Steps on the rows of their items alone: dense Adam where rows are touched, nothing elsewhere, at a cost without N."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdsr_jax import sparse, train
from kdsr_jax.mesh import TABLE
from kdsr_jax.objective import Objective
from kdsr_jax.optim import make_optimizer, path_name
from kdsr_jax.phase import PhaseRunner
from kdsr_jax.resident import cut_batch
from kdsr_jax.train_step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")

ON = ("train.sampled_items=3", "train.sparse_tables=true")
NUM_ITEMS = 36
# The gradients of repeated items may be summed in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def runner_of(tiny, *settings, variant=""):
    run = train.prepare(tiny(*settings, variant=variant))
    return PhaseRunner(run, train.refit_phase(run, 1), None)


def pairs(dense, other):
    """Yield (path, array, array of the other tree), numpy."""
    others = jax.tree_util.tree_leaves(other)
    for (path, array), second in zip(jax.tree_util.tree_leaves_with_path(dense), others, strict=True):
        yield path_name(path), np.asarray(array), np.asarray(second)


def touched_by(runner, ids):
    """Whether the histories, targets and drawn items of the first step hold each row [N + 1]."""
    trainer = runner.trainer
    batch = cut_batch(*runner.histories.of(ids, 4), 4, trainer.num_slots)
    drawn = trainer.objective.draw_items(runner.new_state().key)
    return np.isin(np.arange(NUM_ITEMS + 1), np.concatenate([batch.history.ravel(), batch.targets, drawn]))


def few_rows(runner):
    """Window ids [1, R] of the first batch, all but three of its rows left empty."""
    ids = runner.batches.chunk(0)[1][:1].copy()
    ids[:, 3:] = -1
    return ids


def one_step(runner, state, ids):
    resident, ids = runner.histories.of(ids, 4)
    return runner.trainer.run_chunk(state, resident, runner.run.teachers, ids, length=4)


def copied(state):
    return jax.tree.map(np.array, state)


DECAY = ("train.clip_norm=0.05", "train.weight_decay=0.01")


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("", DECAY),  # KDSR: tuned tables and distillation
        pytest.param(":sasrec", (), marks=pytest.mark.slow),
        pytest.param(":sasrm", ("model.item_scores=fused",), marks=pytest.mark.slow),  # frozen tables
        pytest.param(":kdsr-kdsr_lite", (), marks=pytest.mark.slow),
        pytest.param(":kdsr-mmsr", (), marks=pytest.mark.slow),
        pytest.param(":srgnn", (), marks=pytest.mark.slow),
        pytest.param(":mmsrec", (), marks=pytest.mark.slow),
    ],
)
def test_a_first_step_is_dense_adams_on_its_rows_and_leaves_the_others(tiny, variant, settings):
    results = []
    for switches in (ON[:1], ON):
        runner = runner_of(tiny, *switches, *settings, variant=variant)
        ids = few_rows(runner)
        start = runner.new_state()
        before = copied(start)
        results.append(one_step(runner, start, ids))
    (dense, dense_log), (few, few_log) = results
    touched = touched_by(runner, ids[0])
    assert 3 < touched[1:].sum() < NUM_ITEMS - 5
    for (name, whole, part), (_, old, _) in zip(pairs(dense, few), pairs(before, before), strict=True):
        if TABLE.fullmatch(name) and not name.startswith("frozen"):
            np.testing.assert_array_equal(part[~touched], old[~touched], err_msg=name)
            whole, part = whole[touched], part[touched]
            assert "embedding" not in name or np.any(part != old[touched]), name
        np.testing.assert_allclose(part, whole, err_msg=name, **CLOSE)
    for name, values in dense_log.items():
        np.testing.assert_allclose(few_log[name], values, rtol=1e-5, err_msg=name)


def test_steps_that_touch_every_row_are_dense_adams(tiny):
    many = "train.sampled_items=400", "train.clip_norm=0.05", "train.weight_decay=0.01"
    states = []
    for switches in (many, (*many, "train.sparse_tables=true")):
        runner = runner_of(tiny, *switches)
        state = runner.new_state()
        for index in range(3):
            state, _ = runner.train_chunk(state, index)
        states.append(state)
    assert int(states[0].step) == int(states[1].step) > 3
    assert touched_by(runner, runner.batches.chunk(0)[1][0])[1:].all()
    for name, whole, part in pairs(*states):
        np.testing.assert_allclose(part, whole, rtol=1e-3, atol=2e-5, err_msg=name)


def test_an_idle_step_changes_no_bit(tiny):
    runner = runner_of(tiny, *ON)
    ids = runner.batches.chunk(0)[1]
    state, _ = one_step(runner, runner.new_state(), ids)
    before = copied(state)
    state, log = one_step(runner, state, np.full_like(ids, -1))
    jax.tree.map(np.testing.assert_array_equal, copied(state), before)
    assert all((np.asarray(values) == 0).all() for values in log.values())


def test_the_dense_step_is_plain_adam_of_the_whole_tables_to_the_bit(tiny):
    runner = runner_of(tiny)
    trainer, ids = runner.trainer, runner.batches.chunk(0)[1][:1]
    assert not trainer.sparse_tables
    resident, _ = runner.histories.of(ids, 4)

    @jax.jit
    def plain(state, teachers):
        batch = cut_batch(resident, jnp.asarray(ids[0]), 4, trainer.num_slots)
        loss = jax.grad(trainer.objective, has_aux=True)
        gradient, _ = loss(state.params, state.frozen, teachers, batch, state.key)
        updates, opt_state = trainer.optimizer.update(gradient, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    wanted = copied(plain(runner.new_state(), runner.run.teachers))
    state, _ = one_step(runner, runner.new_state(), ids)
    jax.tree.map(np.testing.assert_array_equal, copied((state.params, state.opt_state)), wanted)


def test_rows_are_collected_once_in_order_and_put_back():
    rows = sparse.touched_rows(9, jnp.array([[7, 0], [3, 7]]), jnp.array([9, 3]))
    assert rows.tolist() == [0, 3, 7, 9, 10, 10, 10]
    assert sparse.places(rows, jnp.array([[9, 0], [3, 7]])).tolist() == [[3, 0], [1, 2]]
    tree = {"item_embedding": {"embedding": jnp.arange(10.0)[:, None]}, "kernel": jnp.arange(10.0)}
    few = sparse.take(tree, rows)
    assert few["item_embedding"]["embedding"][:, 0].tolist() == [0, 3, 7, 9, 0, 0, 0]
    assert few["kernel"].shape == (10,)
    back = sparse.put(tree, jax.tree.map(lambda leaf: leaf + 1, few), rows)
    assert back["item_embedding"]["embedding"][:, 0].tolist() == [1, 1, 2, 4, 4, 5, 6, 8, 8, 10]


def compiled_chunk(tiny, num_items, sparse_tables):
    """Compile two steps of KDSR on a catalogue of so many items; no array of that size is made."""
    runner = runner_of(tiny, *ON)
    shape = jax.ShapeDtypeStruct
    student = runner.run.student.clone(num_items=num_items)
    settings = runner.run.config
    objective = Objective(student, settings.distill, "cosine", 4, sampled_items=3)
    optimizer, _ = make_optimizer(settings.train, student.modalities, 5)
    trainer = Trainer(objective, optimizer, 80, runner.run.placement, sparse_tables)
    state = trainer.stored_shapes({"image": shape((num_items + 1, 8), jnp.float32)})
    teachers = jax.tree.map(
        lambda a: shape((num_items + 1, *a.shape[1:]) if a.shape[0] == NUM_ITEMS + 1 else a.shape, a.dtype),
        runner.run.teachers,
    )
    resident, _ = runner.histories.of(few_rows(runner), 4)
    resident = jax.tree.map(lambda a: shape(a.shape, a.dtype), resident)
    return trainer.run_chunk.lower(state, resident, teachers, shape((2, 29), jnp.int32), length=4).compile()


@pytest.mark.slow
def test_what_a_step_works_on_does_not_grow_with_the_catalogue(tiny):
    # Memory besides arguments and results: gradients, updates, and every copy of a table. The compiler's count of bytes
    # moved is no measure, since it takes a look-up of a few rows for a reading of the whole table.
    cases = (1_000, True), (100_000, True), (100_000, False)
    small, large, dense = (compiled_chunk(tiny, *case).memory_analysis().temp_size_in_bytes for case in cases)
    table = 100_000 * 8 * 4
    assert abs(large - small) < table / 100
    assert dense - small > table


def test_it_learns_a_tiny_set_by_heart(tiny):
    calm = "model.hidden_dropout=0", "model.attention_dropout=0", "train.learning_rate=0.03", "train.ramp_epochs=0"
    runner = runner_of(tiny, "train.sampled_items=30", ON[1], *calm, "distill.enabled=false", "model.dim=16")
    state, ids = runner.new_state(), few_rows(runner)
    losses = []
    for _ in range(150):
        state, log = one_step(runner, state, ids)
        losses.append(float(log["next_item"][0]))
    assert losses[0] > 3 and np.mean(losses[-10:]) < 0.1


@pytest.mark.slow  # a whole run, and the rest of one
def test_a_run_that_is_resumed_gives_the_same_bits(tiny, tmp_path):
    config = tiny(*ON, "eval.protocol=paper")
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.train_and_evaluate(config, whole)
    shutil.copytree(whole, part)
    (part / "result.json").unlink()
    shutil.rmtree(part / "checkpoints" / "refit" / "3")
    train.train_and_evaluate(config, part)

    def results(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: line.get(name) for name in ("epoch", "losses", "gradient_norms", "metrics")} for line in lines]

    assert results(part) == results(whole)
    with np.load(part / "ranks.npz") as ranks, np.load(whole / "ranks.npz") as wanted:
        np.testing.assert_array_equal(ranks["rank"], wanted["rank"])
