"""Picture files to pixels."""

import pathlib
import warnings
from typing import Any

import numpy as np


def open_picture(file: pathlib.Path) -> Any:
    """Return a picture as a PIL image in RGB, upright, or None where the file is none that can be read.

    Pictures so large that they may be an attack on memory count as unreadable.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception:  # noqa: BLE001 - broken files raise a dozen kinds
        return None


def pixels_of(picture: Any, side: int) -> np.ndarray:
    """Return [side, side, 3] uint8: a PIL picture resized (bilinear) to a square, so that nothing of it is cut off."""
    from PIL import Image

    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), np.uint8)
