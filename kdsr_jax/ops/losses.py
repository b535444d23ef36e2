"""The training losses: next item, L_S (Eq. 3), L_C (Eq. 5) and their sum (Eq. 7), clusters, and contrasts of a warm-up.

Masked entries take no part: whatever they hold, NaN and infinities included, the loss and its gradients are those of
the valid entries alone, and both are 0 where nothing is valid.
"""

import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

_MASKED = -1e30  # a logit that is finite and never matters
CHUNK_BYTES = 16 * 2**20  # of the scores that next_item_loss holds at once
SHORTEST_CHUNK = 64  # positions; every chunk reads and writes the whole gradient of the item vectors


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of values over the entries where mask, of the same shape, is True; 0 if it nowhere is."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _masked_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the valid entries of the last axis; 0 at masked entries and in rows without a valid one."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True))
    # Masked before exp, not after: an overflow in a masked entry would turn into 0 * inf on the way back.
    weights = jnp.exp(jnp.where(mask, logits - peak, -jnp.inf))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def holistic_loss(
    teacher_scores: jax.Array, student_scores: jax.Array, mask: jax.Array, *, temperature: float, sigma: str = "sigmoid"
) -> jax.Array:
    """Return L_S, how far the student's correlation scores are from the teacher's (Eq. 3), per valid pair.

    With tau the temperature, r the teacher's and r^ the student's scores: "sigmoid" is the mean of
    (sigmoid(r/tau) - sigmoid(r^/tau))^2; "identity" that of ((r - r^)/tau)^2, which with tau = 1 is the paper's
    "w/o tau"; "softmax" takes the softmax of r/tau and of r^/tau over the valid entries of the last axis first.

    Args:
      teacher_scores: [P] or [..., P] float, r; for "softmax" the last axis is an item's row of pairs.
      student_scores: the same shape, r^.
      mask: the same shape, bool, True at valid pairs.
      temperature: tau > 0; larger is softer.
      sigma: "sigmoid", "softmax" or "identity".

    Returns:
      Scalar >= 0, the mean over valid pairs; 0 if there are none. Padding takes no part, in the softmax either.

    Raises:
      ValueError: if sigma is none of the three.

    Gradient: to student_scores only; the teacher's scores are constants.
    """
    chex.assert_equal_shape([teacher_scores, student_scores, mask])
    teacher = jnp.where(mask, jax.lax.stop_gradient(teacher_scores), 0.0) / temperature
    student = jnp.where(mask, student_scores, 0.0) / temperature
    if sigma == "sigmoid":
        teacher, student = jax.nn.sigmoid(teacher), jax.nn.sigmoid(student)
    elif sigma == "softmax":
        teacher, student = _masked_softmax(teacher, mask), _masked_softmax(student, mask)
    elif sigma != "identity":
        raise ValueError(f"sigma={sigma!r} is not one of sigmoid, softmax, identity")
    return masked_mean((teacher - student) ** 2, mask)


@jax.custom_vjp
def _cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    return _cross_entropy_forward(logits, targets, mask)[0]


def _cross_entropy_forward(logits, targets, mask):
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return masked_mean(normaliser - target_logits, mask), (logits, normaliser, targets, mask)


def _cross_entropy_backward(saved, cotangent):
    # softmax - one-hot in a single pass over the logits, without a scatter: next to the two matrix products that
    # surround it this costs little, while what autodiff derives takes half as long again as the products.
    logits, normaliser, targets, mask = saved
    weight = jnp.where(mask, cotangent / jnp.maximum(jnp.sum(mask), 1), 0.0)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    slope = jnp.exp(logits - normaliser[..., None]) - is_target
    return jnp.where(mask[..., None], slope * weight[..., None], 0.0).astype(logits.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _check_classes(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> None:
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    chex.assert_rank(logits, targets.ndim + 1)


def dissected_loss(code_logits: jax.Array, codes: jax.Array, mask: jax.Array) -> jax.Array:
    """Return L_C, the cross-entropy of the student's code logits against the teacher's codes (Eq. 5), per valid pair.

    Args:
      code_logits: [P, x] or [..., P, x] float, the student's logits over the x codes (Eq. 4).
      codes: [P] or [..., P] int, the teacher's codes 0..x-1; anything at masked pairs.
      mask: the shape of codes, bool, True at valid pairs.

    Returns:
      Scalar >= 0 in nats, the mean over valid pairs; 0 if there are none. Padding takes no part.

    Gradient: to code_logits, reverse mode only.
    """
    _check_classes(code_logits, codes, mask)
    return _cross_entropy(code_logits, codes, mask)


def next_item_loss(
    representations: jax.Array,
    vectors: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    chunk_bytes: int = CHUNK_BYTES,
    rounded: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Return the recommender's loss, full-softmax cross-entropy over all N items (section 3.1), per valid position.

    The scores are representations @ vectors.T. They are never whole in memory: a chunk of positions is scored after
    another, and where a gradient is asked for, a chunk's share of it is taken while its scores are at hand.

    Args:
      representations: [P, d] float32, of the histories.
      vectors: [N, d] float32, of the items; row 0 is item 1.
      targets: [P] int, 0-based rows of vectors, that is item index - 1; anything at masked positions. A valid target past
        the last row makes the loss NaN.
      mask: [P] bool, True at valid positions.
      chunk_bytes: of a chunk's scores, > 0; changes speed and memory, not the result. A chunk has 64 positions at least.
      rounded: what the factors of the products are rounded to, float32 or bfloat16; sums are float32.

    Returns:
      Scalar >= 0 in nats, the mean over valid positions; 0 if there are none. Padding takes no part.

    Gradient: to representations and vectors, reverse mode only, and once: it has no gradient of its own.
    """
    chex.assert_rank([representations, vectors, targets, mask], [2, 2, 1, 1])
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape_prefix([representations, targets], 1)
    chex.assert_equal_shape_suffix([representations, vectors], 1)
    # Zeros for what is masked, so that an overflow there does not reach a product with another row's weight of zero.
    representations = jnp.where(mask[:, None], representations, 0.0)
    longest = max(SHORTEST_CHUNK, chunk_bytes // (4 * vectors.shape[0]))
    return _linear_cross_entropy(representations, vectors, targets, mask, longest, rounded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear_cross_entropy(representations, vectors, targets, mask, longest, rounded):
    chunks, factors = _chunks((representations, targets, mask), longest), vectors.astype(rounded)
    values = jax.lax.map(lambda chunk: _scored(factors, *chunk)[0], chunks)
    return jnp.sum(values) / jnp.maximum(jnp.sum(mask), 1)


def _linear_cross_entropy_forward(representations, vectors, targets, mask, longest, rounded):
    # The loss is a scalar, so its gradient is known here up to the factor that arrives in the backward pass: that of a score is
    # the item's share of the position's softmax, less one if it is the target.
    count = jnp.maximum(jnp.sum(mask), 1)
    weight = jnp.where(mask, 1.0 / count, 0.0)[:, None]
    factors = vectors.astype(rounded)
    # Float32 vectors are the fastest left to XLA; rounded ones have to be turned round beforehand.
    turned = None if rounded == jnp.float32 else jax.lax.optimization_barrier(factors.T)

    def add(sums, chunk):
        rows, _, mask = chunk
        value, powers, total = _scored(factors, *chunk)
        share = jnp.where(mask, 1.0 / (count * total), 0.0)[:, None]
        # [d, p], turned round after the scan only: next to the product, XLA would turn the powers [N, p] round instead.
        to_rows = share.T * _product(factors.T if turned is None else turned, powers)
        return (sums[0] + value, sums[1] + _product(powers, (share * rows).astype(rounded))), to_rows

    chunks = _chunks((representations, targets, mask), longest)
    (total, to_vectors), to_rows = jax.lax.scan(add, (jnp.zeros((), vectors.dtype), jnp.zeros_like(vectors)), chunks)
    to_rows = to_rows.swapaxes(1, 2).reshape(-1, vectors.shape[1])[: representations.shape[0]]
    to_rows = to_rows - weight * vectors[targets]
    to_vectors = to_vectors.at[targets].add(-weight * representations)
    return total / count, (to_rows, to_vectors)


def _linear_cross_entropy_backward(longest, rounded, saved, cotangent):
    return *(gradient * cotangent for gradient in saved), None, None


_linear_cross_entropy.defvjp(_linear_cross_entropy_forward, _linear_cross_entropy_backward)


def _chunks(arrays, longest):
    """Split arrays [P, ...] into [chunks, p, ...], p at most ``longest``, with zeros (masked) at the end."""
    size = arrays[0].shape[0]
    count = max(1, -(-size // longest))
    short = -size % count
    padded = (jnp.pad(a, ((0, short),) + ((0, 0),) * (a.ndim - 1)) for a in arrays)
    return tuple(a.reshape(count, -1, *a.shape[1:]) for a in padded)


def _product(first, second, axis=0):
    """Multiply matrices of one type along the last axis of the first and an axis of the second, with float32 sums."""
    if first.dtype == jnp.float32:
        return first @ (second.T if axis else second)

    @jax.custom_batching.sequential_vmap  # XLA has no batch of such products on CPUs
    def product(first, second):
        return jax.lax.dot_general(first, second, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

    return product(first, second)


def _scored(factors, rows, targets, mask):
    """Score a chunk, item by position: its products are the fastest so, as nothing of that size is turned round.

    Returns:
      (sum of the valid rows' losses, exp(scores less their position's highest) [N, p] rounded as factors are, their sums [p]).
    """
    scores = _product(factors, rows.astype(factors.dtype), axis=1)
    highest = jnp.max(scores, axis=0)
    powers = jnp.exp(scores - highest[None]).astype(factors.dtype)
    total = jnp.sum(powers, axis=0, dtype=jnp.float32)
    of_target = jnp.take_along_axis(scores, targets[None], axis=0)[0]
    return jnp.sum(jnp.where(mask, jnp.log(total) + (highest - of_target), 0.0)), powers, total


def sampled_next_item_loss(
    representations: jax.Array,
    target_vectors: jax.Array,
    sampled_vectors: jax.Array,
    targets: jax.Array,
    sampled: jax.Array,
    log_expected: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Return the next item's cross-entropy with the softmax's normaliser estimated from a sample of the items.

    The estimate of the normaliser is the target's own term and, over the draws of other items, the sum of theirs, each
    divided by how often it was to be expected (logQ correction; Bengio and Senecal, 2008). Its expectation is the
    normaliser, but the loss is the logarithm of it and so on average smaller than ``next_item_loss``: a biased and noisy
    stand-in, nearer the more is drawn, and the same where the sample is every item once.

    Args:
      representations: [P, d] float, of the histories.
      target_vectors: [P, d] float, of the items that they predict.
      sampled_vectors: [K, d] float, of the items drawn, which all positions share.
      targets: [P] int, the predicted items' numbers; anything at masked positions.
      sampled: [K] int, the drawn items' numbers. A draw of a position's target takes no part there.
      log_expected: [K] float, log of how often each of ``sampled`` is expected among K draws, K times its probability.
      mask: [P] bool, True at valid positions.

    Returns:
      Scalar >= 0 in nats, the mean over valid positions; 0 if there are none. Padding takes no part.
    """
    chex.assert_rank([representations, target_vectors, sampled_vectors], 2)
    chex.assert_equal_shape([representations, target_vectors])
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape([sampled, log_expected])
    representations, target_vectors = (jnp.where(mask[:, None], a, 0.0) for a in (representations, target_vectors))
    own = jnp.sum(representations * target_vectors, axis=-1)
    others = representations @ sampled_vectors.T - log_expected[None]
    others = jnp.where(sampled[None] == targets[:, None], _MASKED, others)
    normaliser = jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1))
    return masked_mean(normaliser - own, mask)


def cluster_loss(logits: jax.Array, links: jax.Array) -> jax.Array:
    """Return the loss of predicting which clusters an item is linked to, DIF-SR's auxiliary task on one example.

    Args:
      logits: [C] float, one for each cluster.
      links: [k] int32, the item's clusters 0..C-1; -1 is no link.

    Returns:
      Scalar >= 0 in nats: the binary cross-entropies of the logits against linked or not, their mean over the clusters.
    """
    chex.assert_rank([logits, links], 1)
    linked = jnp.any(links[:, None] == jnp.arange(logits.shape[0])[None], axis=0)
    return jnp.mean(jax.nn.softplus(jnp.where(linked, -logits, logits)))


def contrastive_loss(first: jax.Array, second: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the symmetric InfoNCE of two views of M items: each view of an item is to find the other one of the same item.

    Args:
      first: [M, d] float, one view of every item.
      second: [M, d] float, the other view; products of rows are logits, so a temperature is in one of the views.
      mask: [M] bool, True at the items that take part, as one to be found and as one to be told apart.

    Returns:
      Scalar >= 0 in nats: the cross-entropies of finding second by first and first by second, their mean, over the items
      that take part; 0 if there are none, or only one. Masked items take no part.

    Gradient: to both views, reverse mode only.
    """
    chex.assert_rank([first, second, mask], [2, 2, 1])
    chex.assert_equal_shape([first, second])
    first, second = (jnp.where(mask[:, None], view, 0.0) for view in (first, second))
    logits = jnp.where(mask[None], first @ second.T, _MASKED)
    backward = jnp.where(mask[None], second @ first.T, _MASKED)
    own = jnp.arange(mask.shape[0])
    return (_cross_entropy(logits, own, mask) + _cross_entropy(backward, own, mask)) / 2


def _sum_parts(parts: jax.Array | Mapping[str, jax.Array]) -> jax.Array:
    return sum(jax.tree.leaves(parts), start=0.0)


def total_loss(
    next_item: jax.Array,
    holistic: jax.Array | Mapping[str, jax.Array],
    dissected: jax.Array | Mapping[str, jax.Array],
    *,
    lambda_score: float,
    lambda_code: float,
) -> jax.Array:
    """Return the training objective L_RS + lambda1 L_S + lambda2 L_C (Eq. 7), summed over modalities.

    Args:
      next_item: scalar, L_RS.
      holistic: scalar L_S, or a dict of them by modality; an empty dict adds nothing.
      dissected: scalar L_C, or a dict of them by modality; an empty dict adds nothing.
      lambda_score: lambda1 >= 0.
      lambda_code: lambda2 >= 0.

    Returns:
      Scalar.
    """
    return next_item + lambda_score * _sum_parts(holistic) + lambda_code * _sum_parts(dissected)
