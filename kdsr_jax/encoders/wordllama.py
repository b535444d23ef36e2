"""wordllama: a static table of token vectors (256 dimensions); a text's vector is their mean. Read without the package's code."""

from collections.abc import Sequence

import numpy as np

from kdsr_jax.encoders.packages import package_file, require
from kdsr_jax.errors import UserError

INSTALL = "pip install wordllama==0.4.0.post1"
SHA256 = {
    "weights/l2_supercat_256.safetensors": "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
    "tokenizers/l2_supercat_tokenizer_config.json": "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
}


class WordLlama:
    """Texts to vectors.

    Attributes:
        description: what the sidecar of a features file says of the encoder.
    """

    def __init__(self, layer=-1):
        """Load the table and the tokenizer.

        Args:
            layer: -1 or 0; there is but one.

        Raises:
            UserError: a package is missing or has other weights, or there is no such layer.
        """
        if layer not in (-1, 0):
            raise UserError(f"--config.encode.layer={layer}: wordllama has one layer; leave it out")
        tokenizers, _ = require("tokenizers", INSTALL), require("safetensors", INSTALL)
        from safetensors.numpy import load_file

        weights, words = (package_file("wordllama", path, digest, INSTALL) for path, digest in SHA256.items())
        self._table = load_file(weights)["embedding.weight"].astype(np.float32)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(words))
        self.description = {
            "model": "wordllama l2_supercat 256",
            "revision": "wordllama 0.4.0.post1",
            "weights_sha256": next(iter(SHA256.values())),
            "pooling": "mean over tokens",
            "layer": 0,
            "dim": self._table.shape[1],
        }

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors [n, 256] float32; texts without a token have zeros."""
        rows = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        zero = np.zeros(self._table.shape[1], np.float32)
        return np.stack([self._table[row.ids].mean(0) if row.ids else zero for row in rows])
