"""Any text or vision model of the hub, through sentence-transformers and transformers; the only place that needs torch."""

import logging
import pathlib
from typing import Any

import numpy as np

from kdsr_jax.encoders import place_of_layer
from kdsr_jax.encoders.packages import require
from kdsr_jax.errors import UserError

INSTALL = 'pip install "kdsr-jax[encoders]"'
MOST_TOKENS = 512


def open_model(kind: str, name: str, model: str, settings: Any) -> Any:
    """Load a model from ``settings.models_folder``/NAME, or from the hub (its cache, or the network).

    Args:
        kind: "text" or "image".
        name: the encoder's, as in data.modalities.
        model: OWNER/MODEL.
        settings: the config's encode group.

    Returns:
        The encoder.

    Raises:
        UserError: the extra is not installed, or the model cannot be had.
    """
    for package in ("torch", "transformers", "sentence_transformers"):
        require(package, INSTALL)
    local = pathlib.Path(settings.models_folder) / name if settings.models_folder else None
    place = str(local) if local and local.is_dir() else model
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision or None}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        opened = _open(kind, place, settings.layer, options)
    except UserError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{place}: cannot be loaded ({what[0][:300]})") from error
    return _Encoder(opened, {"model": model, "revision": _revision(opened, settings)} | opened.facts)


class _Encoder:
    """What ``kdsr_jax.encoders`` describes, around one of the three below."""

    def __init__(self, opened, description):
        self._encode, self.description = opened.encode, description

    def __call__(self, inputs):
        import torch

        with torch.inference_mode():
            return np.asarray(self._encode(list(inputs)), np.float32)


def _open(kind, place, layer, options):
    from transformers.utils import cached_file

    if kind == "image":
        return _Images(place, layer, options)
    found = {"_raise_exceptions_for_missing_entries": False, "revision": options["revision"]}
    whole = layer == -1 and cached_file(place, "modules.json", **found)
    return _Sentences(place, options) if whole else _Texts(place, layer, options)


def _revision(opened, settings):
    return settings.revision or getattr(opened.model.config, "_commit_hash", None) or "unknown"


class _Sentences:
    """A model that says itself how its tokens are pooled."""

    def __init__(self, place, options):
        from sentence_transformers import SentenceTransformer

        self._transformer = SentenceTransformer(place, **options)
        self.model = self._transformer[0].auto_model
        self.facts = {"pooling": "the model's own", "layer": -1}

    def encode(self, texts):
        return self._transformer.encode(
            texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False, normalize_embeddings=False
        )


class _Texts:
    """An encoder, or the encoder of an encoder-decoder, or a decoder: the mean of a layer's states over the tokens."""

    def __init__(self, place, layer, options):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(place, **options)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._tokenizer.padding_side = "right"
        model = AutoModel.from_pretrained(place, **_size(torch), **options)
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.model, self._device = _ready(torch, model)
        config = self.model.config.get_text_config()
        self._layer = place_of_layer(layer, config.num_hidden_layers + 1)
        most = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
        self._most = min(MOST_TOKENS, most, self._tokenizer.model_max_length)
        self.facts = {"pooling": "mean over tokens", "layer": self._layer, "max_tokens": self._most}

    def encode(self, texts):
        words = {"padding": True, "truncation": True, "max_length": self._most, "return_tensors": "pt"}
        batch = self._tokenizer(texts, **words).to(self._device)
        read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        states = self.model(**read, output_hidden_states=True).hidden_states[self._layer].float()
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()


class _Images:
    """A vision model: what it pools itself, or the mean of a layer's states over places or patches."""

    def __init__(self, place, layer, options):
        import torch
        from transformers import AutoImageProcessor, AutoModel

        self._processor = AutoImageProcessor.from_pretrained(place, **options)
        model = AutoModel.from_pretrained(place, **_size(torch), **options)
        model = getattr(model, "vision_model", model)  # of models that read pictures and texts
        self.model, self._device = _ready(torch, model)
        self._layer, self._pools = layer, layer == -1
        self.facts = {
            "pooling": "the model's own, else spatial mean" if self._pools else "spatial mean",
            "layer": layer,
        }

    def encode(self, pictures):
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        output = self.model(
            pixel_values=pixels.to(self._device, self.model.dtype), output_hidden_states=not self._pools
        )
        if not self._pools:
            states = output.hidden_states[place_of_layer(self._layer, len(output.hidden_states))]
        elif getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1).float().cpu().numpy()
        else:
            states = output.last_hidden_state
        mean = states.float().mean((2, 3)) if states.ndim == 4 else states.float().mean(1)
        return mean.cpu().numpy()


def _size(torch):
    """Return the options that decide on the type of numbers: the model's own on an accelerator, else 32 bits."""
    return {"dtype": "auto" if torch.cuda.is_available() else torch.float32}


def _ready(torch, model):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), device
