"""Any text or vision model of the hub, through sentence-transformers and transformers; the only place that needs torch."""

import hashlib
import logging
import pathlib
from typing import Any

import numpy as np

from kdsr_jax.encoders import place_of_layer
from kdsr_jax.encoders.packages import require
from kdsr_jax.errors import UserError

INSTALL = 'pip install "kdsr-jax[encoders]"'
MOST_TOKENS = 512
_INPUTS = {"text": "texts", "image": "pictures"}


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
        UserError: the extra is not installed, or the model cannot be had, is of another kind, or lacks weights.
    """
    for package in ("torch", "transformers", "sentence_transformers"):
        require(package, INSTALL)
    local = pathlib.Path(settings.models_folder) / name if settings.models_folder else None
    place = str(local) if local and local.is_dir() else model
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision or None}
    _hush()
    revision = _find(place, settings, options)
    try:
        opened = _open(kind, place, settings.layer, options)
        encoder = _Encoder(opened.encode)
        dim = encoder(opened.probe).shape[1]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: cannot be read as a model of {_INPUTS[kind]} ({_line(error)})") from error
    source = {"model": model, "revision": revision}
    if place != model:
        source["weights_sha256"] = _weights_sha256(local)
    encoder.description = source | opened.facts | {"dim": dim}
    return encoder


class _Encoder:
    """What ``kdsr_jax.encoders`` describes, around ``encode`` of one of the three below."""

    def __init__(self, encode):
        self._encode, self.description = encode, {}

    def __call__(self, inputs):
        import torch

        with torch.inference_mode():
            return np.asarray(self._encode(list(inputs)), np.float32)


def _hush():
    """Silence what transformers says while it loads, but for the progress of downloads."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as sayings

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sayings.disable_progress_bar()
    enable_progress_bars()


def _find(place, settings, options):
    """Return the revision of a model, None where it is not known; an error if the model cannot be had."""
    from transformers import AutoConfig
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        AutoConfig.from_pretrained(place, **options)
        file = cached_file(place, "config.json", revision=options["revision"])
    except Exception as error:
        if "trust_remote_code" in str(error):
            advice = "runs code of its own; if you trust it, --config.encode.trust_remote_code=true"
            raise UserError(f"{place}: {advice}") from error
        advice = "check its name and the network, or give --config.encode.models_folder"
        raise UserError(f"{place}: no model can be had by this name ({_line(error)}); {advice}") from error
    return extract_commit_hash(str(file), None) or settings.revision or None


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _open(kind, place, layer, options):
    from transformers.utils import cached_file

    if kind == "image":
        return _Images(place, layer, options)
    found = {"_raise_exceptions_for_missing_entries": False, "revision": options["revision"]}
    whole = layer == -1 and cached_file(place, "modules.json", **found)
    return _Sentences(place, options) if whole else _Texts(place, layer, options)


class _Sentences:
    """A model that says itself how its tokens are pooled."""

    probe = ("a",)

    def __init__(self, place, options):
        from sentence_transformers import SentenceTransformer

        self._transformer = SentenceTransformer(place, **options)
        self.facts = {"pooling": "the model's own", "layer": -1, "max_tokens": self._transformer.max_seq_length}

    def encode(self, texts):
        return self._transformer.encode(
            texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False, normalize_embeddings=False
        )


class _Texts:
    """An encoder, or the encoder of an encoder-decoder, or a decoder: the mean of a layer's states over the tokens."""

    probe = ("a",)

    def __init__(self, place, layer, options):
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(place, **options)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._tokenizer.padding_side = "right"  # so that positions count from the first token
        self._model, self._device, _ = _load("text", place, options)
        config = self._model.config.get_text_config()
        self._layer, self._last = place_of_layer(layer, config.num_hidden_layers + 1), layer == -1
        most = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
        self._most = min(MOST_TOKENS, most, self._tokenizer.model_max_length)
        self.facts = {"pooling": "mean over tokens", "layer": self._layer, "max_tokens": self._most}

    def encode(self, texts):
        words = {"padding": True, "truncation": True, "max_length": self._most, "return_tensors": "pt"}
        batch = self._tokenizer(texts, **words).to(self._device)
        read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        output = self._model(**read, output_hidden_states=not self._last)
        states = (output.last_hidden_state if self._last else output.hidden_states[self._layer]).float()
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()


class _Images:
    """A vision model: what it pools itself, or the mean of a layer's states over places or patches."""

    probe = (np.zeros((64, 64, 3), np.uint8),)

    def __init__(self, place, layer, options):
        from transformers import AutoImageProcessor

        self._processor = AutoImageProcessor.from_pretrained(place, **options)
        self._model, self._device, pooler_is_random = _load("image", place, options)
        output = self._run(self.probe, True)
        self._layer, self._last = place_of_layer(layer, len(output.hidden_states)), layer == -1
        pooled = getattr(output, "pooler_output", None) is not None and not pooler_is_random
        self._pools = self._last and pooled
        self.facts = {"pooling": "the model's own" if self._pools else "spatial mean", "layer": self._layer}

    def encode(self, pictures):
        output = self._run(pictures, not self._last)
        if self._pools:
            return output.pooler_output.flatten(1).float().cpu().numpy()
        states = (output.last_hidden_state if self._last else output.hidden_states[self._layer]).float()
        return (states.mean((2, 3)) if states.ndim == 4 else states.mean(1)).cpu().numpy()

    def _run(self, pictures, all_layers):
        import torch

        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return self._model(pixel_values=pixels.to(self._device, self._model.dtype), output_hidden_states=all_layers)


def _load(kind, place, options):
    """Load the part of a model that reads a kind, on the accelerator if there is one, there in its own type of numbers.

    Weights that a file does not have get random values. Where that is the pooler of a model that was trained without one,
    the pooler is of no use; any other weights are missed.

    Returns:
        (part, device, whether its pooler is random).
    """
    import torch
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    encodes = kind == "text" and type(AutoConfig.from_pretrained(place, **options)) in MODEL_FOR_TEXT_ENCODING_MAPPING
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = "auto" if device.type == "cuda" else torch.float32
    loader = AutoModelForTextEncoding if encodes else AutoModel  # of T5, the encoder alone
    model, said = loader.from_pretrained(place, dtype=numbers, output_loading_info=True, **options)
    part = getattr(model, "text_model" if kind == "text" else "vision_model", model)
    if kind == "text" and not encodes and model.config.is_encoder_decoder:
        part = model.get_encoder()
    name = next(name for name, module in model.named_modules() if module is part)
    lost = sorted(key for key in said["missing_keys"] if not name or key.startswith(f"{name}."))
    missed = [key for key in lost if "pooler" not in key.split(".")]
    if missed:
        raise UserError(f"{place}: its file of weights lacks {len(missed)} of them, such as {missed[0]}")
    return part.eval().to(device), device, bool(lost)


def _weights_sha256(folder):
    """Return the hash of a folder's weights: of the file where there is one, else of the hashes by name."""
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin"))
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
