"""Encoders: items' texts or pictures to vectors. Nothing that an encoder needs is imported before it is opened.

An encoder has a ``description``, plain data that says what it is, and is a function of n texts, or n PIL pictures in RGB,
to [n, dim] float32. Built in are a few small ones whose weights come inside packages; all others come from the hub.
"""

import difflib
from typing import Any

from kdsr_jax.errors import UserError

# Name behind the hyphen of data.modalities -> (what it reads, the model on the hub or None for a built-in one).
KNOWN: dict[str, tuple[str, str | None]] = {
    "wordllama": ("text", None),
    "minilm": ("text", None),
    "efficientnet-lite0": ("image", None),
    "efficientnet-lite1": ("image", None),
    "efficientnet-lite2": ("image", None),
    "mpnet": ("text", "sentence-transformers/all-mpnet-base-v2"),
    "t5-base": ("text", "google-t5/t5-base"),
    "t5-large": ("text", "google-t5/t5-large"),
    "glm4-9b": ("text", "zai-org/glm-4-9b-hf"),
    "llama3-8b": ("text", "meta-llama/Meta-Llama-3-8B"),
    **{f"resnet{depth}": ("image", f"microsoft/resnet-{depth}") for depth in (18, 34, 50, 101, 152)},
    "swin-t": ("image", "microsoft/swin-tiny-patch4-window7-224"),
    "swin-b": ("image", "microsoft/swin-base-patch4-window7-224"),
    "vit-b": ("image", "google/vit-base-patch16-224"),
    "dinov2-b": ("image", "facebook/dinov2-base"),
    "clip-b": ("image", "openai/clip-vit-base-patch32"),
}


def what_it_reads(entry: str) -> str:
    """Return "text" or "image", what the encoder of an entry of data.modalities reads.

    Raises:
        UserError: the entry names no encoder.
    """
    modality, _, name = entry.partition("-")
    if name in KNOWN:
        return KNOWN[name][0]
    if "__" not in name:
        nearest = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {modality}-{nearest[0]}? " if nearest else ""
        raise UserError(
            f"--config.data.modalities: {entry}: no encoder {name!r}; {hint}there are {', '.join(KNOWN)}, and "
            f"{modality}-OWNER__MODEL for any model of the hub"
        )
    return "image" if modality.startswith("image") else "text"


def open_encoder(entry: str, settings: Any) -> Any:
    """Load the encoder of an entry.

    Args:
        entry: <modality>-<encoder>.
        settings: the config's encode group.

    Raises:
        UserError: there is none, or a package or its weights are missing.
    """
    kind, name = what_it_reads(entry), entry.partition("-")[2]
    model = KNOWN[name][1] if name in KNOWN else name.replace("__", "/", 1)
    if model is not None:
        from kdsr_jax.encoders import hub

        return hub.open_model(kind, name, model, settings)
    if name == "wordllama":
        from kdsr_jax.encoders.wordllama import WordLlama

        return WordLlama(settings.layer)
    if name == "minilm":
        from kdsr_jax.encoders.minilm import MiniLM

        return MiniLM(settings.layer)
    from kdsr_jax.encoders.efficientnet import EfficientNetLite

    return EfficientNetLite(name, settings.layer)


def place_of_layer(layer: int, count: int) -> int:
    """Return a layer's place from 0, counted from the end where it is negative.

    Raises:
        UserError: there are only ``count``.
    """
    if not -count <= layer < count:
        raise UserError(f"--config.encode.layer={layer}: must be from {-count} to {count - 1} in this encoder")
    return layer % count
