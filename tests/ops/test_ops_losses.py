"""Losses: hand-worked values, gradients, masks, and independence of flax."""

import functools
import math
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdsr_jax.ops import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = hypothesis.settings(max_examples=20)
SIGMAS = ("sigmoid", "identity", "softmax")
BAD_VALUES = (float("nan"), float("inf"), -float("inf"), 3e38)


def next_item_loss_of_logits(logits, targets, mask):
    """The next item's loss where the scores of the histories are these logits."""
    return losses.next_item_loss(logits, jnp.eye(logits.shape[-1]), targets, mask)


CROSS_ENTROPIES = (next_item_loss_of_logits, losses.dissected_loss)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def scores(seed, shape=(6,)):
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(size=(2, *shape)).astype(np.float32)
    return teacher, student, rng.random(shape) < 0.6


def classes(seed, shape=(6,), num=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3.0, size=(*shape, num)).astype(np.float32)
    return logits, rng.integers(0, num, shape).astype(np.int32), rng.random(shape) < 0.6


@jax.jit
def reference_cross_entropy(logits, targets):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1))


# --- holistic loss ---------------------------------------------------------------------------------------------------


# r = (1, -1, .), r^ = (0, 1, .), the third pair masked, tau = 2: sigmoid(1/2) = .6224593, sigmoid(-1/2) = .3775407,
# so the differences are .1224593 and -.2449187, the squares .01499629 and .05998517, their mean .03749073.
# identity: ((1/2)^2 + 1^2) / 2 = .625.
# softmax: over (1/2, -1/2) = (.7310586, .2689414), over (0, 1/2) = (.3775407, .6224593): both differ by .3535179,
# whose square is .1249749.
@pytest.mark.parametrize(("sigma", "expected"), [("sigmoid", 0.03749073), ("identity", 0.625), ("softmax", 0.1249749)])
def test_holistic_loss_by_hand(sigma, expected):
    teacher, student = jnp.array([1.0, -1.0, 9.0]), jnp.array([0.0, 1.0, 5.0])
    mask = jnp.array([True, True, False])
    loss = losses.holistic_loss(teacher, student, mask, temperature=2.0, sigma=sigma)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    if sigma == "sigmoid":
        np.testing.assert_allclose(losses.holistic_loss(teacher, student, mask, temperature=2.0), expected, rtol=1e-5)
        assert math.isclose(
            expected, ((logistic(0.5) - 0.5) ** 2 + (logistic(-0.5) - logistic(0.5)) ** 2) / 2, rel_tol=1e-6
        )


def test_softmax_is_taken_within_rows_and_rows_without_a_pair_add_nothing():
    teacher = jnp.array([[1.0, -1.0, 9.0], [4.0, 5.0, 6.0], [2.0, 9.0, 9.0]])
    student = jnp.array([[0.0, 1.0, 5.0], [1.0, 2.0, 3.0], [7.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [False] * 3, [True, False, False]])
    loss, gradient = jax.value_and_grad(losses.holistic_loss, argnums=1)(
        teacher, student, mask, temperature=2.0, sigma="softmax"
    )
    # Row 0 as worked out above, twice .1249749; the lone pair of row 2 has probability 1 on both sides; 3 valid pairs.
    np.testing.assert_allclose(loss, 2 * 0.1249749 / 3, rtol=1e-5)
    np.testing.assert_array_equal(gradient[1:], np.zeros((2, 3)))
    assert gradient[0, :2].all() and gradient[0, 2] == 0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_holistic_gradient_goes_to_the_student_alone(sigma):
    teacher, student, _ = scores(0)
    mask = np.array([1, 1, 0, 1, 1, 0], bool)

    def loss(teacher, student):
        return losses.holistic_loss(teacher, student, mask, temperature=0.7, sigma=sigma)

    check_grads(lambda student: loss(teacher, student), (student,), order=1, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)
    to_teacher, to_student = jax.grad(loss, argnums=(0, 1))(teacher, student)
    np.testing.assert_array_equal(to_teacher, np.zeros(6))
    np.testing.assert_array_equal(np.asarray(to_student) != 0, mask)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_holistic_loss_ignores_whatever_masked_pairs_hold(sigma, bad):
    teacher, student, _ = scores(1, (2, 3))
    mask = np.array([[True, False, True], [False, False, False]])
    value_and_grad = jax.value_and_grad(
        lambda teacher, student: losses.holistic_loss(teacher, student, mask, temperature=0.5, sigma=sigma),
        argnums=(0, 1),
    )
    clean = value_and_grad(teacher, student)
    dirty = value_and_grad(np.where(mask, teacher, bad), np.where(mask, student, bad))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_holistic_loss_of_nothing_is_zero_with_zero_gradient(sigma):
    teacher, student, mask = np.full((2, 3), np.nan), np.full((2, 3), np.inf), np.zeros((2, 3), bool)
    value, gradient = jax.value_and_grad(losses.holistic_loss, argnums=1)(
        teacher, student, mask, temperature=1.5, sigma=sigma
    )
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_softmax_survives_scores_far_below_zero():
    # The valid scores lie 2,000 below the 0 that stands in for masked ones: exp must not see the difference.
    teacher, student = jnp.array([-2000.0, -2001.0, 0.0]), jnp.array([-2001.0, -2000.0, 0.0])
    value, gradient = jax.value_and_grad(losses.holistic_loss, argnums=1)(
        teacher, student, jnp.array([True, True, False]), temperature=1.0, sigma="softmax"
    )
    np.testing.assert_allclose(value, (logistic(1) - logistic(-1)) ** 2, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_an_unknown_sigma_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        losses.holistic_loss(jnp.ones(1), jnp.ones(1), jnp.ones(1, bool), temperature=1.0, sigma="tanh")


@SETTINGS
@hypothesis.given(st.integers(0, 2**20), st.sampled_from(SIGMAS), st.floats(0.2, 5.0))
def test_masking_pairs_equals_dropping_them(seed, sigma, temperature):
    teacher, student, mask = scores(seed)
    masked = losses.holistic_loss(teacher, student, mask, temperature=temperature, sigma=sigma)
    if mask.any():
        kept = teacher[mask].astype(np.float64) / temperature, student[mask].astype(np.float64) / temperature
        sigmas = {
            "sigmoid": lambda r: 1 / (1 + np.exp(-r)),
            "identity": lambda r: r,
            "softmax": lambda r: np.exp(r) / np.exp(r).sum(),
        }
        expected = np.mean((sigmas[sigma](kept[0]) - sigmas[sigma](kept[1])) ** 2)
        np.testing.assert_allclose(masked, expected, rtol=1e-4, atol=1e-7)
    swapped = losses.holistic_loss(student, teacher, mask, temperature=temperature, sigma=sigma)
    np.testing.assert_allclose(swapped, masked, rtol=1e-5)
    assert losses.holistic_loss(teacher, teacher, mask, temperature=temperature, sigma=sigma) == 0.0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_holistic_loss_under_jit_and_vmap(sigma):
    teacher, student, mask = scores(2, (3, 4))

    def loss(teacher, student, mask):
        return losses.holistic_loss(teacher, student, mask, temperature=1.5, sigma=sigma)

    eager = np.stack([loss(*row) for row in zip(teacher, student, mask, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(teacher, student, mask), eager, rtol=1e-5)


# --- cross-entropies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", CROSS_ENTROPIES)
def test_cross_entropy_and_its_gradient_by_hand(loss_fn):
    # Logits log 1, log 2, log 1 are probabilities 1/4, 1/2, 1/4, so target 1 costs log 2 and target 0 log 4; the third
    # row is masked. Mean: (log 2 + log 4)/2 = 1.5 log 2. Gradient: (probabilities - one-hot) / 2.
    row = [0.0, math.log(2.0), 0.0]
    logits, targets = jnp.array([row, row, row]), jnp.array([1, 0, 2])
    value, gradient = jax.value_and_grad(loss_fn)(logits, targets, jnp.array([True, True, False]))
    np.testing.assert_allclose(value, 1.5 * math.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, [[0.125, -0.25, 0.125], [-0.375, 0.25, 0.125], [0.0, 0.0, 0.0]], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("loss_fn", CROSS_ENTROPIES)
def test_cross_entropy_gradient_matches_finite_differences_and_scales(loss_fn):
    logits, targets, _ = classes(0)
    mask = np.array([1, 1, 0, 1, 0, 1], bool)

    def loss(logits):
        return loss_fn(logits, targets, mask)

    check_grads(loss, (logits,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)
    tripled = jax.grad(lambda logits: 3.0 * loss(logits))(logits)
    np.testing.assert_allclose(tripled, 3.0 * jax.grad(loss)(logits), rtol=1e-6)


@pytest.mark.parametrize("loss_fn", CROSS_ENTROPIES)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_cross_entropy_ignores_whatever_masked_rows_hold(loss_fn, bad):
    logits, targets, _ = classes(1, (3,))
    mask = np.array([True, False, True])
    clean = jax.value_and_grad(loss_fn)(logits, targets, mask)
    dirty_logits = np.where(mask[:, None], logits, np.float32(bad))
    for target in (-1, 999):
        dirty = jax.value_and_grad(loss_fn)(dirty_logits, np.where(mask, targets, target), mask)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("loss_fn", CROSS_ENTROPIES)
def test_cross_entropy_of_nothing_is_zero_with_zero_gradient(loss_fn):
    value, gradient = jax.value_and_grad(loss_fn)(jnp.full((2, 3), jnp.nan), jnp.array([0, 1]), jnp.zeros(2, bool))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_masked_rows_send_nothing_through_the_matrix_product():
    table = jnp.ones((3, 2))

    def loss(hidden):
        return losses.next_item_loss(hidden, table, jnp.array([0, 1]), jnp.array([True, False]))

    hidden = jnp.array([[1.0, 2.0], [3e38, 3e38]])  # the masked row's logits overflow
    assert np.isfinite(jax.grad(loss)(hidden)).all()


def test_a_valid_target_past_the_last_column_is_not_silent():
    assert np.isnan(next_item_loss_of_logits(jnp.zeros((1, 3)), jnp.array([3]), jnp.array([True])))


def test_large_logits_do_not_overflow():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    value, gradient = jax.value_and_grad(next_item_loss_of_logits)(logits, jnp.array([1]), jnp.array([True]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[1.0, -1.0, 0.0]])


@SETTINGS
@hypothesis.given(st.integers(0, 2**20), st.sampled_from(CROSS_ENTROPIES))
def test_masking_rows_equals_dropping_them(seed, loss_fn):
    logits, targets, mask = classes(seed)
    value, gradient = jax.value_and_grad(loss_fn)(logits, targets, mask)
    expected, dropped = 0.0, np.zeros_like(logits)
    if mask.any():
        expected, dropped[mask] = jax.value_and_grad(reference_cross_entropy)(logits[mask], targets[mask])
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, dropped, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss_fn(logits + 7.0, targets, mask), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_fn", CROSS_ENTROPIES)
def test_cross_entropy_under_jit_and_vmap(loss_fn):
    logits, targets, mask = classes(3, (4, 6))
    mask[2] = False
    value_and_grad = jax.value_and_grad(loss_fn)
    eager = [value_and_grad(*row) for row in zip(logits, targets, mask, strict=True)]
    values, gradients = jax.jit(jax.vmap(value_and_grad))(logits, targets, mask)
    np.testing.assert_allclose(values, np.stack([value for value, _ in eager]), rtol=1e-5)
    np.testing.assert_allclose(gradients, np.stack([gradient for _, gradient in eager]), rtol=1e-4, atol=1e-7)


def test_cross_entropy_takes_further_leading_axes():
    logits, targets, mask = classes(3, (4, 6))
    flat = losses.dissected_loss(logits.reshape(24, 5), targets.ravel(), mask.ravel())
    np.testing.assert_allclose(losses.dissected_loss(logits, targets, mask), flat, rtol=1e-6)


# --- the next item, a chunk of positions after another ---------------------------------------------------------------


def next_items(seed, positions=150, items=40, width=5):
    rng = np.random.default_rng(seed)
    representations = rng.normal(size=(positions, width)).astype(np.float32)
    vectors = rng.normal(size=(items, width)).astype(np.float32)
    return representations, vectors, rng.integers(0, items, positions), rng.random(positions) < 0.7


# 150 positions are chunks of 64 at least: three, two (of 100 and padded, or of 75) and one.
@pytest.mark.parametrize("chunk_bytes", [1, 75 * 4 * 40, 100 * 4 * 40, 10**6])
def test_next_item_loss_is_the_same_however_it_is_cut(chunk_bytes):
    representations, vectors, targets, mask = next_items(0)

    def loss(representations, vectors):
        return losses.next_item_loss(representations, vectors, targets, mask, chunk_bytes)

    def whole(representations, vectors):
        return reference_cross_entropy((representations @ vectors.T)[mask], targets[mask])

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))(representations, vectors)
    expected = jax.value_and_grad(whole, (0, 1))(representations, vectors)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6), both, expected)
    np.testing.assert_allclose(loss(representations, vectors), expected[0], rtol=1e-5)  # the pass without a gradient


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
@pytest.mark.parametrize("width", [5, 32])
def test_rounded_factors_change_little_alone_and_side_by_side(chunk_bytes, width):
    first, second = (next_items(seed, positions=130, items=400, width=width) for seed in (3, 4))

    def loss(rounded, representations, vectors, targets, mask):
        return losses.next_item_loss(representations, vectors, targets, mask, chunk_bytes, rounded)

    def trained(rounded):
        return jax.jit(jax.value_and_grad(functools.partial(loss, rounded), (0, 1)))

    exact, near = trained(jnp.float32)(*first), trained(jnp.bfloat16)(*first)
    assert near[0] != exact[0]  # it is rounded
    np.testing.assert_allclose(near[0], exact[0], rtol=1e-3)
    for got, want in zip(near[1], exact[1], strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)  # bfloat16 has 8 bits
    np.testing.assert_allclose(loss(jnp.bfloat16, *first), near[0], rtol=1e-5)  # the pass without a gradient
    both = jax.jit(jax.vmap(trained(jnp.bfloat16)))(*(jnp.stack(pair) for pair in zip(first, second, strict=True)))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7), both, near)


def test_next_item_gradient_matches_finite_differences_and_scales():
    representations, vectors, targets, mask = next_items(1, positions=70, items=6, width=3)

    def loss(representations, vectors):
        return losses.next_item_loss(representations, vectors, targets, mask, 1)

    check_grads(loss, (representations, vectors), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)
    gradient = jax.grad(loss, (0, 1))(representations, vectors)
    tripled = jax.grad(lambda *a: 3.0 * loss(*a), (0, 1))(representations, vectors)
    jax.tree.map(lambda three, one: np.testing.assert_allclose(three, 3.0 * one, rtol=1e-6), tripled, gradient)


def test_scores_are_never_whole_in_memory():
    representations, vectors, targets, mask = next_items(2, positions=1024, items=2000)

    def needed(chunk_bytes):
        def loss(representations, vectors):
            return losses.next_item_loss(representations, vectors, targets, mask, chunk_bytes)

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(representations, vectors).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 1024 * 2000
    assert needed(whole) >= whole
    assert needed(whole // 16) < whole / 4


def test_shapes_that_do_not_fit_are_refused():
    three, items = jnp.ones((3, 5)), jnp.ones((7, 5))
    with pytest.raises(AssertionError):
        losses.next_item_loss(three, items, jnp.ones(3, jnp.int32), jnp.ones(2, bool))
    with pytest.raises(AssertionError):
        losses.next_item_loss(three[:2], items, jnp.ones(3, jnp.int32), jnp.ones(3, bool))
    with pytest.raises(AssertionError):
        losses.next_item_loss(three, items[:, :4], jnp.ones(3, jnp.int32), jnp.ones(3, bool))
    with pytest.raises(AssertionError):
        losses.holistic_loss(jnp.ones(3), jnp.ones(3), jnp.ones((3, 1), bool), temperature=1.0)


# --- clusters --------------------------------------------------------------------------------------------------------


def test_cluster_loss_and_its_gradient_by_hand():
    # Logits 0, log 3, -log 3 are probabilities 1/2, 3/4, 1/4. Linked to clusters 1 and 2, the costs are log 2 (not
    # linked), log 4/3 and log 4, together log 32/3. Gradient: (probabilities - linked) / 3.
    logits, links = jnp.array([0.0, math.log(3.0), -math.log(3.0)]), jnp.array([2, -1, 1])
    value, gradient = jax.value_and_grad(losses.cluster_loss)(logits, links)
    np.testing.assert_allclose(value, math.log(32 / 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [1 / 6, -1 / 12, -1 / 4], rtol=1e-5)
    check_grads(lambda logits: losses.cluster_loss(logits, links), (logits,), order=1, atol=1e-2, rtol=1e-2)


def test_cluster_loss_counts_a_cluster_once_and_no_link_not_at_all():
    logits = jnp.array([0.5, -1.0, 2.0, 0.0])
    once = losses.cluster_loss(logits, jnp.array([3]))
    assert losses.cluster_loss(logits, jnp.array([3, 3, -1])) == once
    nothing = np.mean(np.log1p(np.exp(np.asarray(logits))))
    np.testing.assert_allclose(losses.cluster_loss(logits, jnp.array([-1, -1])), nothing, rtol=1e-6)


def test_cluster_loss_of_large_logits_does_not_overflow():
    value, gradient = jax.value_and_grad(losses.cluster_loss)(jnp.array([1e4, -1e4]), jnp.array([1]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [0.5, -0.5])


def test_cluster_loss_under_jit_and_vmap():
    rng = np.random.default_rng(4)
    logits, links = rng.normal(size=(6, 5)).astype(np.float32), rng.integers(-1, 5, (6, 2)).astype(np.int32)
    eager = np.stack([losses.cluster_loss(*row) for row in zip(logits, links, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(losses.cluster_loss))(logits, links), eager, rtol=1e-5)
    with pytest.raises(AssertionError):
        losses.cluster_loss(logits, links)  # one example only


def test_masked_mean_of_nothing_is_zero():
    assert losses.masked_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])) == 2.0
    assert losses.masked_mean(jnp.array([jnp.nan]), jnp.array([False])) == 0.0


# --- contrastive -----------------------------------------------------------------------------------------------------


contrastive = jax.jit(losses.contrastive_loss)
contrastive_slope = jax.jit(jax.value_and_grad(losses.contrastive_loss, (0, 1)))


def views(seed):
    return np.random.default_rng(seed).normal(size=(2, 5, 3)).astype(np.float32)


def test_contrastive_loss_by_hand():
    # Logits [[2, 0], [1, 3]]. Rows: log(1 + e^-2) twice. Columns: log(1 + e^-1) and log(1 + e^-3).
    loss = contrastive(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.eye(2), jnp.ones(2, bool))
    rows, columns = math.log1p(math.exp(-2)), (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2
    np.testing.assert_allclose(loss, (rows + columns) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.153926, rtol=1e-5)


def test_contrastive_loss_of_views_that_say_nothing_is_log_of_the_items():
    mask = jnp.array([True, True, True, False, False])
    np.testing.assert_allclose(contrastive(*jnp.ones((2, 5, 3)), mask), math.log(3), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_contrastive_loss_without_two_items_is_zero_and_so_is_its_gradient(count):
    value, gradient = contrastive_slope(*views(0), np.arange(5) < count)
    assert value == 0 and not np.any(gradient)  # a NaN would count


def contrastive_by_loops(first, second, mask):
    real, values = np.flatnonzero(mask), []
    for one, other in ((first, second), (second, first)):
        values += [np.log(sum(np.exp(one[i] @ other[j] - one[i] @ other[i]) for j in real)) for i in real]
    return np.mean(values) if values else 0.0


@SETTINGS
@hypothesis.given(st.integers(0, 999), st.permutations(range(5)), st.lists(st.booleans(), min_size=5, max_size=5))
def test_contrastive_loss_equals_loops_in_any_order_and_with_sides_swapped(seed, order, mask):
    first, second = views(seed)
    mask, order = np.array(mask), np.array(order)
    expected = contrastive_by_loops(first, second, mask)
    for given in ((first, second, mask), (first[order], second[order], mask[order]), (second, first, mask)):
        np.testing.assert_allclose(contrastive(*given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", BAD_VALUES)
def test_masked_items_do_not_touch_the_contrastive_loss(bad):
    mask = np.array([True, True, False, True, False])
    first, second = views(1)
    expected = contrastive_slope(first, second, mask)
    first[2], second[4] = bad, bad
    got = contrastive_slope(first, second, mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)
    assert not np.any(got[1][0][2]) and not np.any(got[1][1][4])


def test_gradient_of_the_contrastive_loss():
    mask = np.array([True, False, True, True, True])
    check_grads(lambda a, b: contrastive(a, b, mask), views(2), 1, modes=("rev",), rtol=1e-2, atol=1e-2)


# --- the sum ---------------------------------------------------------------------------------------------------------


def test_total_loss_by_hand():
    # 2 + 10 (0.1 + 0.3) + 0.5 (4 + 8) = 12.
    total = losses.total_loss(
        jnp.float32(2.0),
        {"image": jnp.float32(0.1), "text": jnp.float32(0.3)},
        {"image": jnp.float32(4.0), "text": jnp.float32(8.0)},
        lambda_score=10.0,
        lambda_code=0.5,
    )
    np.testing.assert_allclose(total, 12.0, rtol=1e-6)


def test_total_loss_takes_scalars_and_no_modalities():
    assert losses.total_loss(jnp.float32(2.0), jnp.float32(3.0), 4.0, lambda_score=0.5, lambda_code=0.25) == 4.5
    assert losses.total_loss(jnp.float32(2.0), {}, {}, lambda_score=1.0, lambda_code=1.0) == 2.0


def test_total_loss_gradients_are_the_weights():
    gradients = jax.grad(losses.total_loss, argnums=(0, 1, 2))(
        1.0, {"image": 1.0, "text": 1.0}, {"text": 1.0}, lambda_score=3.0, lambda_code=0.5
    )
    assert gradients == (1.0, {"image": 3.0, "text": 3.0}, {"text": 0.5})


def test_ops_are_importable_without_flax(repository):
    program = (
        "import sys; import kdsr_jax.ops.losses, kdsr_jax.ops.scoring, kdsr_jax.ops.correlation, "
        "kdsr_jax.ops.quantize, kdsr_jax.ops.metrics; assert 'jax' in sys.modules; "
        "assert not {'flax', 'optax', 'orbax', 'ml_collections'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the sampled softmax ----------------------------------------------------------------------------------------------


def sampled_loss(logits, targets, sampled, probability, mask):
    """The sampled loss where the scores [P, N] of the histories are these logits, with a probability of each item."""
    vectors = jnp.eye(logits.shape[1])
    log_expected = jnp.log(len(sampled) * probability[sampled])
    return losses.sampled_next_item_loss(
        logits, vectors[targets], vectors[sampled], targets, sampled, log_expected, mask
    )


def test_sampled_loss_by_hand():
    logits = jnp.log(jnp.array([[6.0, 1.0, 2.0, 5.0]]))
    probability = jnp.array([0.1, 0.2, 0.25, 0.45])
    sampled = jnp.array([2, 0, 2, 1])  # the draw of the target 0 takes no part; 2 counts twice
    expected = math.log((6 + 2 * 2 / (4 * 0.25) + 1 / (4 * 0.2)) / 6)
    got = sampled_loss(logits, jnp.array([0]), sampled, probability, jnp.array([True]))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sampled_loss_of_every_item_once_is_the_whole_softmax():
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.normal(size=(6, 9)), jnp.float32), jnp.asarray(rng.integers(0, 9, 6))
    mask, order = jnp.array([True, False, True, True, True, False]), jnp.asarray(rng.permutation(9))
    uniform = jnp.full(9, 1 / 9)
    one, whole = sampled_loss(logits, targets, order, uniform, mask), next_item_loss_of_logits(logits, targets, mask)
    np.testing.assert_allclose(one, whole, rtol=1e-5)
    gradients = (
        jax.grad(f)
        for f in (
            lambda x: sampled_loss(x, targets, order, uniform, mask),
            lambda x: next_item_loss_of_logits(x, targets, mask),
        )
    )
    first, second = (gradient(logits) for gradient in gradients)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skewed", [False, True])
def test_the_estimated_normaliser_is_unbiased_and_the_loss_comes_nearer_with_more_draws(skewed):
    rng = np.random.default_rng(1)
    logits, targets, mask = jnp.asarray(rng.normal(size=(1, 20)), jnp.float32), jnp.array([3]), jnp.array([True])
    probability = np.arange(1, 21) / 210 if skewed else np.full(20, 1 / 20)
    whole = float(next_item_loss_of_logits(logits, targets, mask))
    run = jax.jit(jax.vmap(lambda sampled: sampled_loss(logits, targets, sampled, jnp.asarray(probability), mask)))
    distances = []
    for count in (4, 400):
        draws = np.asarray(run(jnp.asarray(rng.choice(20, (4000, count), p=probability))), np.float64)
        ratios = np.exp(draws)  # of the normaliser to the target's term, which is exact
        assert abs(ratios.mean() - math.exp(whole)) < 4 * ratios.std() / math.sqrt(4000)
        distances.append(abs(draws.mean() - whole))
        assert draws.mean() < whole + 4 * draws.std() / math.sqrt(4000)  # biased low
    assert distances[1] < distances[0] / 5


def test_gradients_of_the_sampled_loss_are_right_and_masked_rows_take_no_part():
    rng = np.random.default_rng(2)
    rows, own, drawn = (jnp.asarray(rng.normal(size=(size, 3)), jnp.float32) for size in (4, 4, 5))
    targets, sampled = jnp.array([1, 2, 3, 4]), jnp.array([3, 7, 3, 1, 9])
    log_expected, mask = jnp.asarray(rng.normal(size=5), jnp.float32), jnp.array([True, True, True, False])

    def loss(rows, own, drawn):
        return losses.sampled_next_item_loss(rows, own, drawn, targets, sampled, log_expected, mask)

    check_grads(loss, (rows, own, drawn), order=1, modes=["rev"], rtol=2e-2, atol=1e-3)
    for bad in BAD_VALUES:
        spoilt = loss(rows.at[3].set(bad), own.at[3].set(bad), drawn)
        assert spoilt == loss(rows, own, drawn)
        gradients = jax.grad(loss, (0, 1, 2))(rows.at[3].set(bad), own.at[3].set(bad), drawn)
        assert all(np.isfinite(gradient).all() for gradient in gradients) and not gradients[0][3].any()
    assert losses.sampled_next_item_loss(rows, own, drawn, targets, sampled, log_expected, mask & False) == 0
