"""Condensing encoder features m into m~ (paper Section 3.2, "linear autoencoder"): linear, PCA, or the official code's sigmoid.

All work on features centred over the items that have them. A linear code is defined only up to an invertible map, so ``linear``
also returns the coordinates of its reconstruction in an orthonormal basis; which axes are used in the end is the teacher's
``rotation``.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kdsr_jax.models.flat import Dense

CHECK_EVERY = 100
MAX_STEPS = 10_000
SIGMOID_EPOCHS = 500
SIGMOID_BATCH = 256


class SigmoidAutoencoder(nn.Module):
    """The official code's autoencoder: sigmoid(Linear(d_m -> width)), then Linear(width -> d_m)."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Return (code [n, width] in (0, 1), reconstruction [n, d_m]) of x [n, d_m]."""
        code = nn.sigmoid(Dense(self.width, name="encoder")(x))
        return code, Dense(x.shape[-1], name="decoder")(code)


@functools.partial(jax.jit, static_argnames="width")
def pca(x, width):
    """Condense by principal components (closed form).

    Args:
      x: [n, d_m] float32, centred.
      width: 1..min(n, d_m).

    Returns:
      (code [n, width] with the components in order of variance, mean squared reconstruction error per entry).
    """
    _, vectors = jnp.linalg.eigh(x.T @ x)
    basis = vectors[:, ::-1][:, :width]
    code = x @ basis
    return code, jnp.mean((x - code @ basis.T) ** 2)


@functools.partial(jax.jit, static_argnames="width")
def linear(x, width, key):
    """Condense by a linear autoencoder trained to convergence with Adam.

    The loss of W, V depends on x only through its covariance C: tr((I - WV)' C (I - WV)), so each step sees all items at
    the cost of one [d_m, d_m, width] product. Stops when CHECK_EVERY steps gain less than 1e-4 of the loss.

    Args:
      x: [n, d_m] float32, centred.
      width: 1..min(n, d_m).
      key: a jax PRNG key.

    Returns:
      (raw code x @ W [n, width], the same reconstruction in orthonormal coordinates [n, width], mean squared error).
    """
    covariance = x.T @ x / x.shape[0]
    covariance = covariance / jnp.trace(covariance)
    dim = x.shape[1]
    encoder = jax.random.normal(key, (dim, width)) / jnp.sqrt(dim)
    weights = _train_linear({"encoder": encoder, "decoder": encoder.T}, covariance)
    raw = x @ weights["encoder"]
    _, triangle = jnp.linalg.qr(weights["decoder"].T)
    return raw, raw @ triangle.T, jnp.mean((x - raw @ weights["decoder"]) ** 2)


def _train_linear(weights, covariance):
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, MAX_STEPS // 4, alpha=0.05))
    identity = jnp.eye(covariance.shape[0])

    def loss(w):
        residual = identity - w["encoder"] @ w["decoder"]
        return jnp.sum(residual * (covariance @ residual))

    def step(carry, _):
        w, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(w)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(w, updates), opt_state), value

    def block(carry):
        w, opt_state, _, now, steps = carry
        (w, opt_state), values = jax.lax.scan(step, (w, opt_state), None, length=CHECK_EVERY)
        return w, opt_state, now, values.mean(), steps + CHECK_EVERY

    def unfinished(carry):
        _, _, before, now, steps = carry
        return (steps < 2 * CHECK_EVERY) | ((steps < MAX_STEPS) & (now < before * (1 - 1e-4)))

    carry = weights, optimizer.init(weights), jnp.inf, jnp.inf, jnp.int32(0)
    return jax.lax.while_loop(unfinished, block, carry)[0]


def sigmoid(x, width, key):
    """Condense much as the official code does: sigmoid encoder, MSE, Adam 1e-3, batches of 256, up to 500 epochs.

    Stops when ten epochs gain less than 0.1 % of the error over all rows (the official code: four checks of ten epochs
    without a gain). Other than there, x is centred, rows are shuffled, the last rows that fill no batch are left out, and the
    start is flax's. Only ``rotation="none"`` leaves the code in (0, 1).

    Args:
      x: [n, d_m] float32, centred.
      width: at least 1.
      key: a jax PRNG key.

    Returns:
      (code [n, width] in (0, 1), mean squared reconstruction error per entry).
    """
    model = SigmoidAutoencoder(width)
    optimizer = optax.adam(1e-3)
    init_key, key = jax.random.split(key)
    params = jax.jit(model.init)(init_key, x[:1])["params"]
    batch = min(SIGMOID_BATCH, x.shape[0])
    steps = x.shape[0] // batch

    def loss(p, rows):
        return jnp.mean((model.apply({"params": p}, rows)[1] - rows) ** 2)

    def step(carry, rows):
        p, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(p, x[rows]), opt_state)
        return (optax.apply_updates(p, updates), opt_state), None

    def epoch(carry, epoch_key):
        order = jax.random.permutation(epoch_key, x.shape[0])[: steps * batch].reshape(steps, batch)
        return jax.lax.scan(step, carry, order)

    @jax.jit
    def ten_epochs(carry, keys):
        carry, _ = jax.lax.scan(epoch, carry, keys)
        # Over all rows: an epoch's own loss depends on the rows it leaves out, and its noise would stop it at once.
        return carry, loss(carry[0], x)

    carry, before = (params, optimizer.init(params)), jnp.inf
    for keys in jax.random.split(key, (SIGMOID_EPOCHS // 10, 10)):
        carry, error = ten_epochs(carry, keys)
        if error > before * 0.999:
            break
        before = error
    code, reconstruction = model.apply({"params": carry[0]}, x)
    return code, jnp.mean((x - reconstruction) ** 2)
