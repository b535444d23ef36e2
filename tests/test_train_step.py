"""A chunk of training steps: like single steps, idle where it is told to, and alone on the device."""

import jax
import numpy as np
import pytest

from kdsr_jax import train
from kdsr_jax.data.batches import Batches
from kdsr_jax.objective import Objective
from kdsr_jax.optim import make_optimizer
from kdsr_jax.resident import make_resident
from kdsr_jax.train_step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 4


class Setting:
    """A trainer of the tiny run's refit phase and what its calls need."""

    def __init__(self, config):
        self.run = run = train.prepare(config)
        windows = train.refit_phase(run, 1).train
        self.batches = Batches(windows, batch_size=config.train.batch_size, steps_per_call=2, seed=0)
        self.resident = run.placement.put(make_resident(run.dataset.interactions, windows))
        tuned = run.student.modalities if run.student.tuned else ()
        optimizer, _ = make_optimizer(config.train, tuned, self.batches.steps_per_epoch)
        objective = Objective(run.student, config.distill, config.teacher.score_fn, config.teacher.num_splits)
        self.trainer = Trainer(objective, optimizer, config.train.batch_size, run.placement)

    def start(self):
        return self.trainer.init(0, self.run.tables)

    def call(self, state, ids):
        placed = self.run.placement.put_rows(np.asarray(ids))
        return self.trainer.run_chunk(state, self.resident, self.run.teachers, placed, length=LENGTH)


@pytest.fixture(scope="module")
def setting(tiny):
    return Setting(tiny())


@pytest.fixture(scope="module")
def chunk(setting):
    """Window ids [2, R] of two real steps."""
    chunks = [setting.batches.chunk(index) for index in range(setting.batches.chunks_per_epoch)]
    assert {length for length, _ in chunks} == {LENGTH}
    return next(ids for _, ids in chunks if (ids >= 0).any(1).all())


def copied(state):
    return jax.tree.map(np.array, state)


def test_idle_steps_leave_the_state_bit_identical(setting, chunk):
    state, _ = setting.call(setting.start(), chunk)
    before = copied(state)
    state, log = setting.call(state, np.full_like(chunk, -1))
    jax.tree.map(np.testing.assert_array_equal, copied(state), before)
    assert all((np.asarray(values) == 0).all() for values in log.values())


def test_idle_step_inside_a_chunk_changes_nothing_else(setting, chunk):
    half = chunk.copy()
    half[1] = -1
    other = chunk[::-1].copy()
    other[1] = -1
    stepwise, first = setting.call(setting.start(), half)
    stepwise, second = setting.call(stepwise, other)
    whole, log = setting.call(setting.start(), chunk)
    assert int(whole.step) == int(stepwise.step) == 2
    jax.tree.map(np.testing.assert_array_equal, copied(stepwise), copied(whole))
    assert [float(first["loss"][0]), float(second["loss"][0])] == np.asarray(log["loss"]).tolist()


@pytest.mark.slow  # compiles a program for single steps
def test_chunk_equals_single_steps(setting, chunk):
    whole, log = setting.call(setting.start(), chunk)
    state, losses = setting.start(), []
    for ids in chunk:
        state, one = setting.call(state, ids[None])
        losses.append(float(one["loss"][0]))
    assert losses == pytest.approx(np.asarray(log["loss"]).tolist(), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), copied(state), copied(whole))


def test_same_start_and_ids_give_the_same_bits(setting, chunk):
    first, again = (copied(setting.call(setting.start(), chunk)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_state_is_donated(setting, chunk):
    state = setting.start()
    setting.call(state, chunk)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_a_chunk_transfers_nothing(setting, chunk):
    state, _ = setting.call(setting.start(), chunk)
    placed = setting.run.placement.put_rows(chunk)
    arguments = setting.resident, setting.run.teachers
    with jax.transfer_guard("disallow"):
        state, _ = setting.trainer.run_chunk(state, *arguments, placed, length=LENGTH)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard does see transfers
            setting.trainer.run_chunk(state, *arguments, np.asarray(chunk), length=LENGTH)


def test_one_program_a_shape(setting, chunk):
    before = setting.trainer.run_chunk._cache_size()
    state = setting.start()
    for index in range(2 * setting.batches.chunks_per_epoch):
        state, _ = setting.call(state, setting.batches.chunk(index)[1])
    assert setting.trainer.run_chunk._cache_size() - before <= (before == 0)


def test_a_model_without_tables_has_one_program_a_shape(tiny):
    setting = Setting(tiny(variant=":gru4rec"))
    state = setting.start()
    for _ in range(2):
        state, _ = setting.call(state, setting.batches.chunk(0)[1])
    assert setting.trainer.run_chunk._cache_size() == 1


def test_log_counts_targets_and_parts_add_up(setting):
    state, targets = setting.start(), 0
    for index in range(setting.batches.chunks_per_epoch):
        state, log = setting.call(state, setting.batches.chunk(index)[1])
        targets += int(np.sum(log["targets"]))
        total = log["next_item"] + log["holistic/image"] + 0.5 * log["dissected/image"]
        np.testing.assert_allclose(log["loss"], total, rtol=1e-5)
    assert targets == train.refit_phase(setting.run, 1).train.num_targets
    assert int(state.step) == setting.batches.steps_per_epoch
