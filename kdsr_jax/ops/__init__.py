"""Pure functions over arrays, written for one example; callers ``vmap``. They import jax and chex only."""
