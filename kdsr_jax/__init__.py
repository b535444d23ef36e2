"""Multimodal sequential recommendation with correlation distillation (KDSR, ECIR 2024) in JAX.

Importing the package imports nothing heavy; take what you need from its modules, e.g. ``kdsr_jax.ops.losses``.
"""

__version__ = "0.1.0"
