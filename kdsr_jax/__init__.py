"""Multimodal sequential recommendation with correlation distillation (KDSR, ECIR 2024) in JAX.

Importing the package imports nothing heavy; ``Recommender`` and ``fit`` are loaded at their first use, all else is taken from
its modules, e.g. ``kdsr_jax.ops.losses``.
"""

__version__ = "0.1.0"

_LAZY = {"Recommender": "recommender", "fit": "fitting"}


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__():
    return sorted({*globals(), *_LAZY})
