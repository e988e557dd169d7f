"""Convert images to codes on all devices of a process; threads decode files in the meantime."""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32

from medmax_jax.data.image_tokens.encoder import Encoder, PrepareError
from medmax_jax.models import image_headers, vqgan
from medmax_jax.sharding import AXES, ROWS

PRECISIONS = ("highest", "bfloat16")
DECODERS = max(1, (os.cpu_count() or 1) - 1)  # threads; the encoder keeps one core on a CPU machine
AHEAD = 4  # batches that are decoded while one is encoded
COMPARED = 64  # images on which bfloat16 is compared with the exact encoder


class BatchEncoder:
    """Converts images to codes in batches of one shape, over all devices of this process.

    `batch`: images that a device encodes at once. In another shape fp32 sums round differently, and
    a latent between two rows of the codebook may be assigned to the other one.
    """

    def __init__(self, encoder: Encoder, *, precision: str, batch: int):
        if precision not in PRECISIONS:
            raise PrepareError(f"precision is {precision!r}; use {' or '.join(PRECISIONS)}")
        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(
            np.array(devices).reshape(-1, 1, 1), AXES, (AxisType.Explicit,) * 3
        )
        self.precision = precision
        self._mesh, self._batch = mesh, batch * len(devices)
        self._exact = jax.device_put(encoder.vq, NamedSharding(mesh, P()))
        self._low = precision == "bfloat16"
        self._vq = _rounded(self._exact) if self._low else self._exact
        self._compared, self._agreed = 0, 0.0  # images; the sum of their shares of equal codes

    @property
    def agreement(self) -> float | None:
        """Return the share of bfloat16 codes that equal the exact ones, on the first images."""
        return self._agreed / self._compared if self._compared else None

    def __call__(self, images: Iterator[Callable[[], np.ndarray]]) -> Iterator[np.ndarray | str]:
        """Yield the codes of each image, or the reason why it has none; in order.

        An image is given as a function that returns its pixels or raises an ImageError.
        """
        with concurrent.futures.ThreadPoolExecutor(DECODERS) as pool:
            pending: list[concurrent.futures.Future] = []
            try:
                while True:
                    count = (AHEAD + 1) * self._batch - len(pending)
                    next_images = itertools.islice(images, count)
                    pending += [pool.submit(_pixels, image) for image in next_images]
                    if not pending:
                        return
                    batch = [future.result() for future in pending[: self._batch]]
                    del pending[: self._batch]
                    yield from self._codes(batch)
            finally:
                pool.shutdown(cancel_futures=True)

    def _codes(self, batch: list[np.ndarray | str]) -> list[np.ndarray | str]:
        readable = [i for i, pixels in enumerate(batch) if not isinstance(pixels, str)]
        if readable:
            pixels = np.stack([batch[i] for i in readable])
            encoded = self._run(self._vq, pixels)
            if self._low and self._compared < COMPARED:
                equal = self._run(self._exact, pixels) == encoded
                equal = equal[: COMPARED - self._compared]
                self._compared += len(equal)
                self._agreed += float(equal.mean(axis=1).sum())
            for i, codes in zip(readable, encoded, strict=True):
                batch[i] = codes.astype(np.uint16)
        return batch

    def _run(self, vq: Any, pixels: Float32[np.ndarray, "b h w 3"]) -> Int32[np.ndarray, "b K"]:
        full = np.concatenate([pixels, np.repeat(pixels[:1], self._batch - len(pixels), axis=0)])
        with jax.set_mesh(self._mesh):
            placed = jax.device_put(full, NamedSharding(self._mesh, P(ROWS, None, None, None)))
            placed = placed.astype(jnp.bfloat16) if vq is self._vq and self._low else placed
            codes = np.asarray(vqgan.encode(vq, placed))
        return codes[: len(pixels)].reshape(len(pixels), -1)


def _pixels(load_image: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return load_image()
    except image_headers.ImageError as error:
        return str(error)


def _rounded(vq: vqgan.VQGAN) -> vqgan.VQGAN:
    """Return the VQGAN with its encoder in bfloat16; the codebook is still compared in fp32."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if path[0].name == "quantize" else x.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, vq)
