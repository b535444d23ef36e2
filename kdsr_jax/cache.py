"""Where fitted teachers, prepared data and downloads are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of all caches: $KDSR_CACHE, else kdsr_jax in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KDSR_CACHE") or Path(home) / "kdsr_jax")
