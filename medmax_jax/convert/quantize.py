"""Matrices to 8 or 4 bits by qwix, on the host, one in memory at a time; quant.py reads them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Shaped

from medmax_jax import arrays
from medmax_jax.quant import PACKED, TILE


def quantize(kernel: Float[np.ndarray, "I O"], kind: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """qvalue and scale of a matrix, on the host."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = _qwix(jnp.asarray(kernel), kind)
    codes, scale = np.asarray(found.qvalue), np.asarray(found.scale, np.float32)
    if kind in PACKED:
        pairs = codes.astype(np.int8).view(np.uint8) & 15
        codes = pairs[0::2] | (pairs[1::2] << 4)
    return {"qvalue": codes, "scale": scale}


def write(
    writer: arrays.Writer,
    name: str,
    kernels: Iterator[Float[np.ndarray, "I O"]],
    like: jax.ShapeDtypeStruct,
    kind: str,
) -> None:
    """Quantises a stack of kernels, layer by layer, into the arrays name.qvalue and name.scale."""
    cut, scales = tuple(axis is not None for axis in like.sharding.spec), []
    store = None
    for layer, kernel in enumerate(kernels):
        made = quantize(kernel, kind)
        scales.append(made["scale"])
        codes = made["qvalue"]
        if store is None:
            store = writer.create(f"{name}.qvalue", (like.shape[0], *codes.shape), codes.dtype, cut)
        writer.write(store, layer, codes)
    stack = np.stack(scales)
    store = writer.create(f"{name}.scale", stack.shape, stack.dtype, (False, False, False))
    writer.write(store, ..., stack)


@functools.partial(jax.jit, static_argnums=1)
def _qwix(kernel: Float[Array, "I O"], kind: str) -> qwix.QArray:
    tiles = {0: TILE} if kind in PACKED else {}
    return qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tiles)
