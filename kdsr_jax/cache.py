"""Where fitted teachers, prepared data, downloads and compiled programs are kept between runs."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of all caches: $KDSR_CACHE, else kdsr_jax in the user's cache folder, or in the temporary one without a home."""
    if named := os.environ.get("KDSR_CACHE"):
        return Path(named)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # of a number without a name, as in containers
        home = tempfile.gettempdir()
    return Path(home) / "kdsr_jax"


def keep_compiled() -> None:
    """Let jax, which must not be imported yet, keep compiled programs in the caches' folder.

    $JAX_COMPILATION_CACHE_DIR, jax's own variable, takes precedence; empty, it keeps nothing. A folder that cannot be written is
    done without.
    """
    folder = cache_folder() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):  # else jax would warn of every program
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
            # A run compiles some hundred programs of less than the second below which jax would not keep them.
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
