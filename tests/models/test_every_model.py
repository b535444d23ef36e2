"""What holds for every backbone alike: shapes, gradients, causality, padding, no sight of the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    DIM,
    HISTORY,
    LENGTH,
    QUICK,
    N,
    build,
    counted,
    futures,
    gradients,
    make,
    scorer,
    shapes,
)

from kdsr_jax import config
from kdsr_jax.data.batches import Batches
from kdsr_jax.data.interactions import Interactions
from kdsr_jax.data.sequences import train_windows
from kdsr_jax.models import student as student_module
from kdsr_jax.models.backbones import BACKBONES
from kdsr_jax.models.embeddings import FUSIONS
from kdsr_jax.optim import path_name
from kdsr_jax.resident import at_slots, cut_batch, make_resident

pytestmark = pytest.mark.usefixtures("quick_compilation")

LONGEST = LENGTH + 4  # of the students here, so that histories can be padded further
EMPTY = np.zeros((1, LENGTH), np.int32)
ON_POSITIONS = [name for name, backbone in BACKBONES.items() if backbone.trained_on == "positions"]
KINDS = [(name, kind) for name in BACKBONES for kind in dict.fromkeys([config.BACKBONES[name]["tables"], "tuned"])]


def test_the_config_knows_the_same_models_and_what_they_read():
    assert list(BACKBONES) == list(config.BACKBONES)
    assert [name for name, backbone in BACKBONES.items() if backbone.fused] == list(config.FUSED)
    assert [name for name, backbone in BACKBONES.items() if backbone.has_clusters] == list(config.CLUSTERED)
    assert [name for name, backbone in BACKBONES.items() if not backbone.has_ids] == list(config.WITHOUT_IDS)


def slow_unless(quick, *case):
    return pytest.param(*case, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kind", "fusion"), [slow_unless(fusion == "gate", *case, fusion) for case in KINDS for fusion in FUSIONS]
)
def test_shapes(name, kind, fusion):
    student = make(name, kind, fusion=fusion, table_width=DIM - 2)
    params, frozen = shapes(student)
    variables = {"params": params, "frozen": frozen}
    scores = jax.eval_shape(student.apply, variables, HISTORY[:, :4])
    assert (scores.shape, scores.dtype) == ((3, 4, N), jnp.float32)
    candidates = jax.eval_shape(functools.partial(student.apply, method="candidate_vectors"), variables)
    assert candidates.shape == (N, DIM)
    tables = {f"{table}_embedding" for table in student.modalities}
    assert tables == {table for table in params if table in tables} | {table for table in frozen if table in tables}
    assert tables.isdisjoint(frozen if kind == "tuned" else params)  # what is frozen has no gradient at all
    assert ("item_embedding" in params) == BACKBONES[name].has_ids


@pytest.mark.parametrize(("name", "scores"), [("sasrec", "ids"), ("sasrm", "fused"), ("mmsrec", "ids")])
def test_item_vectors_are_the_same_when_made_a_few_at_a_time(name, scores, monkeypatch):
    student, variables = build(name, item_scores=scores)
    whole = jax.jit(functools.partial(student_module.candidates_of, student))(variables)
    monkeypatch.setattr(student_module, "ITEMS_AT_ONCE", 7)
    parts = jax.jit(functools.partial(student_module.candidates_of, student))(variables)
    assert parts.shape == (N, DIM) and N % 7
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [slow_unless(kind == "tuned", name, kind) for name, kind in KINDS])
def test_gradients_are_finite_and_reach_the_tables(name, kind):
    # a repeat, items without features, a length of one and an empty row
    student, variables = build(name, kind)
    gradient, of_states = gradients(student, variables, np.concatenate([HISTORY, EMPTY]))
    read = np.isin(np.arange(N + 1), HISTORY[HISTORY > 0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path_name(path)
    for table in [name for name in gradient if name.endswith("_embedding")]:
        assert gradient[table]["embedding"].any() and not gradient[table]["embedding"][0].any(), table
        # Representations, other than scores, know only the items read; which of them, each model's own test says.
        reached = np.abs(of_states[table]["embedding"]).sum(1) > 0
        assert reached.any() and not reached[~read].any(), table


# --- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fusion"),
    [  # all but nova and difsr fuse each position by itself
        slow_unless(name in ("nova", "difsr") or fusion == "gate", name, fusion)
        for name in ON_POSITIONS
        for fusion in FUSIONS
    ],
)
def test_future_items_do_not_change_a_bit_of_the_past(name, fusion):
    score = scorer(name, "tuned", fusion=fusion)
    history = np.random.default_rng(5).integers(1, N + 1, size=(3, LENGTH)).astype(np.int32)
    now = score(history)
    for i, other, cut in futures(history):
        for changed in (other, cut):
            after = score(changed)
            np.testing.assert_array_equal(after[:, : i + 1], now[:, : i + 1])
            assert (after[:, i + 1] != now[:, i + 1]).any()


def make_log(rows):
    """A log of one history a row."""
    rows = np.asarray(rows, np.int32)
    offsets = np.arange(len(rows) + 1) * rows.shape[1]
    return Interactions(rows.ravel(), offsets, np.arange(len(rows)).astype(str), np.arange(rows.max() + 1).astype(str))


@functools.cache
def slot_scores(name, users, length):
    """A function log -> (index of the target in the log [S], scores [S, N]) of all targets, cut as in training."""
    student, variables = build(name, "tuned")
    offsets = np.arange(users + 1) * length
    windows = train_windows(offsets, np.diff(offsets), LENGTH, 0, student.trained_on == "prefixes")
    slots = windows.num_targets
    batches = Batches(windows, batch_size=slots, steps_per_call=1, seed=0)
    assert batches.chunks_per_epoch == 1
    padded, ids = batches.chunk(0)

    @jax.jit
    def score(variables, resident):
        batch = cut_batch(resident, jnp.asarray(ids[0]), padded, slots)
        states = student.apply(variables, batch.history, method="encode")
        return batch.end, student.apply(variables, at_slots(states, batch), method="score")

    return lambda log: jax.device_get(score(variables, make_resident(log, windows)))


@pytest.mark.parametrize("name", BACKBONES)
def test_targets_and_what_follows_do_not_change_a_bit_of_their_scores(name):
    users, length = 3, LENGTH + 3  # longer than a window
    rng = np.random.default_rng(8)
    rows = rng.integers(1, N + 1, size=(users, length))
    score = slot_scores(name, users, length)
    end, now = score(make_log(rows))
    assert sorted(end) == [u * length + t for u in range(users) for t in range(1, length)]
    for t in range(1, length):
        other = rows.copy()
        other[:, t:] = 1 + (rows[:, t:] + rng.integers(1, N - 1, size=rows[:, t:].shape)) % N
        after = score(make_log(other))[1]
        before_change = end % length <= t
        np.testing.assert_array_equal(after[before_change], now[before_change])
        assert t == length - 1 or (after[end % length == t + 1] != now[end % length == t + 1]).any(1).all()


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_padding_and_neighbours_change_nothing(name):
    student, variables = build(name, "tuned", max_length=LONGEST)
    apply = jax.jit(student.apply, compiler_options=QUICK)

    together = np.asarray(apply(variables, HISTORY))
    order = [2, 0, 1]
    moved = np.pad(HISTORY[order], ((1, 0), (0, LONGEST - LENGTH)))  # behind an empty row
    longer = np.asarray(apply(variables, moved))[1:, :LENGTH]
    used = counted(student, HISTORY)
    np.testing.assert_allclose(longer[np.argsort(order)][used], together[used], rtol=1e-5, atol=1e-5)
