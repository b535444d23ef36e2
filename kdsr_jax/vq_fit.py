"""Fitting codebooks of correlation vectors: by moving averages on fixed features, or together with the condensed features.

Paper Section 3.2: codewords start as random samples and are then optimised to match the distribution of the vectors.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from kdsr_jax.ops import quantize
from kdsr_jax.ops.correlation import split_scores
from kdsr_jax.ops.scoring import SCORE_FNS

EMA_STEPS, EMA_BATCH, EMA_DECAY = 500, 4096, 0.99
REVIVE_EVERY, DEAD_SHARE = 50, 0.02  # a code with less than this share of the average use is dead
JOINT_STEPS, JOINT_BATCH, JOINT_RATE = 1000, 1024, 1e-3
COMMITMENT, SCORE_HIDDEN = 0.25, 64


@functools.partial(jax.jit, static_argnames="num_codes")
def fit_ema(key, vectors, num_codes):
    """Fit a codebook by exponential moving averages over random mini-batches, reviving dead codes (quantizer "vq").

    Args:
      key: a jax PRNG key.
      vectors: [n, D] float32 correlation vectors, n >= num_codes.
      num_codes: x.

    Returns:
      [x, D] float32.
    """
    init_key, key = jax.random.split(key)
    total, batch = vectors.shape[0], min(EMA_BATCH, vectors.shape[0])
    start = vectors[jax.random.choice(init_key, total, (num_codes,), replace=False)]

    def step(state, index):
        draw_key, revive_key = jax.random.split(jax.random.fold_in(key, index))
        points = vectors[jax.random.randint(draw_key, (batch,), 0, total)]
        state = quantize.ema_update(state, points, decay=EMA_DECAY)
        # The last stretch is left alone, so that no code ends where a random point put it.
        revive = (index % REVIVE_EVERY == 0) & (0 < index) & (index < EMA_STEPS - 2 * REVIVE_EVERY)
        return jax.lax.cond(revive, lambda s: _revive(revive_key, s, points), lambda s: s, state), None

    return jax.lax.scan(step, quantize.ema_start(start), jnp.arange(EMA_STEPS))[0].codebook


def _revive(key, state, points):
    dead_below = DEAD_SHARE * state.counts.mean()
    codebook, dead = quantize.revive_dead(key, state.codebook, state.counts, points, min_count=dead_below)
    return quantize.ema_restart(state, codebook, dead)


def joint_loss(params, x, y, target, score_fn, num_splits, through=quantize.straight_through):
    """Return the loss of quantizer "vq_joint" on a batch of pairs.

    Reconstruction of both items, codebook and commitment losses, and the squared error of a decoder that predicts the
    holistic score from the straight-through quantized correlation vector.

    Args:
      params: "encoder" [d_m, width], "decoder" [width, d_m], "codebook" [x, D], and the score decoder's "hidden" [D, h],
        "hidden_bias" [h], "out" [h], "out_bias" scalar.
      x, y: [P, d_m] float32, centred features of the two items.
      target: [P] float32, holistic scores to predict (constants).
      score_fn, num_splits: as in ``teacher``.
      through: (vector, codebook) -> vector; the identity on the vector shows what straight-through gradients equal.

    Returns:
      (loss, correlation vectors [P, D]).

    Gradient: of the score decoder to the encoder through ``straight_through``, as if the vectors were not quantized.
    """
    code_x, code_y = x @ params["encoder"], y @ params["encoder"]
    vectors = jax.vmap(lambda a, b: split_scores(a, b, num_splits, SCORE_FNS[score_fn]))(code_x, code_y)
    lost = jnp.mean((x - code_x @ params["decoder"]) ** 2) + jnp.mean((y - code_y @ params["decoder"]) ** 2)
    on_codebook = functools.partial(jax.vmap, in_axes=(0, None))
    codebook = on_codebook(quantize.codebook_loss)(vectors, params["codebook"]).mean()
    commitment = on_codebook(quantize.commitment_loss)(vectors, params["codebook"]).mean()
    quantized = on_codebook(through)(vectors, params["codebook"])
    hidden = jax.nn.relu(quantized @ params["hidden"] + params["hidden_bias"][None])
    predicted = hidden @ params["out"] + params["out_bias"]
    error = jnp.mean((predicted - target) ** 2)
    scale = jnp.mean(x**2) + jnp.mean(y**2)
    return lost / scale + codebook + COMMITMENT * commitment + error, vectors


def fit_joint(key, x, condensed, pairs, num_codes, score_fn, num_splits):
    """Train encoder, decoder and codebook together, from a fitted condensing as the start (quantizer "vq_joint").

    The decoder undoes any stretch of the code, so codebook and commitment may shrink some of its directions at no loss: scores
    of the result are those of the features less closely than at the start, and tables start from it.

    Args:
      key: a jax PRNG key.
      x: [n, d_m] float32 centred features.
      condensed: [n, width] float32, an affine map of x to start from.
      pairs: (i, j), [P] int32 each.
      num_codes, score_fn, num_splits: as in ``teacher``.

    Returns:
      (condensed [n, width], codebook [x, D], mean squared reconstruction error per entry).
    """
    params = _joint_start(key, x, condensed, pairs, num_codes, score_fn, num_splits)
    holistic = jax.vmap(SCORE_FNS[score_fn])(condensed[pairs[0]], condensed[pairs[1]])
    params = _train_joint(key, params, x, pairs, holistic, score_fn=score_fn, num_splits=num_splits)
    code = x @ params["encoder"]
    return code, params["codebook"], jnp.mean((x - code @ params["decoder"]) ** 2)


def _joint_start(key, x, condensed, pairs, num_codes, score_fn, num_splits):
    chosen_key, hidden_key, out_key = jax.random.split(key, 3)
    chosen = jax.random.choice(chosen_key, pairs[0].shape[0], (num_codes,), replace=False)
    score = jax.vmap(lambda a, b: split_scores(a, b, num_splits, SCORE_FNS[score_fn]))
    return {
        "encoder": jnp.linalg.lstsq(x, condensed)[0],
        "decoder": jnp.linalg.lstsq(condensed, x)[0],
        "codebook": score(condensed[pairs[0][chosen]], condensed[pairs[1][chosen]]),
        "hidden": jax.random.normal(hidden_key, (num_splits, SCORE_HIDDEN)) / jnp.sqrt(num_splits),
        "hidden_bias": jnp.zeros(SCORE_HIDDEN),
        "out": jax.random.normal(out_key, (SCORE_HIDDEN,)) / jnp.sqrt(SCORE_HIDDEN),
        "out_bias": jnp.zeros(()),
    }


@functools.partial(jax.jit, static_argnames=("score_fn", "num_splits"))
def _train_joint(key, params, x, pairs, holistic, score_fn, num_splits):
    optimizer = optax.adam(JOINT_RATE)
    batch = min(JOINT_BATCH, pairs[0].shape[0])
    num_codes = params["codebook"].shape[0]

    def step(carry, index):
        params, opt_state, counts = carry
        draw_key, revive_key = jax.random.split(jax.random.fold_in(key, index))
        drawn = jax.random.randint(draw_key, (batch,), 0, pairs[0].shape[0])
        arguments = params, x[pairs[0][drawn]], x[pairs[1][drawn]], holistic[drawn], score_fn, num_splits
        (loss, vectors), gradient = jax.value_and_grad(joint_loss, has_aux=True)(*arguments)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
        codes = quantize.nearest_codes(vectors, params["codebook"])
        counts = EMA_DECAY * counts + (1 - EMA_DECAY) * jnp.bincount(codes, length=num_codes)
        revive = (index % REVIVE_EVERY == 0) & (0 < index) & (index < JOINT_STEPS - 2 * REVIVE_EVERY)
        dead_below = jnp.where(revive, DEAD_SHARE * counts.mean(), -1.0)
        codebook, dead = quantize.revive_dead(revive_key, params["codebook"], counts, vectors, min_count=dead_below)
        counts = jnp.where(dead, counts.mean(), counts)
        return (params | {"codebook": codebook}, opt_state, counts), loss

    counts = jnp.full(num_codes, batch / num_codes)
    return jax.lax.scan(step, (params, optimizer.init(params), counts), jnp.arange(JOINT_STEPS))[0][0]
