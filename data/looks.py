"""What pictures look like, as perceptual hashes: of the files, or of codes through the VQGAN.

A hash of a file and one of decoded codes are not compared with each other: what the VQGAN gives
back differs from the picture by more than a copy does.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Int, UInt8, UInt32

from data import overlap
from data.codes import BATCH, Encoder
from data.records import file_sha256
from medmax_jax import images, vqgan
from medmax_jax.io import image_paths

Look = UInt32[np.ndarray, "8"]


def of_file(folder: Path, path: str) -> tuple[str, Look | None]:
    """(SHA-256 of the bytes, look, None where flat); raises ImageError."""
    try:
        file = image_paths.resolve(folder, path, label="its path")
    except image_paths.ImagePathError as error:
        raise images.ImageError(str(error)) from error
    picture = images.load(file, max_pixels=images.MAX_PIXELS, name="picture")
    return file_sha256(file), overlap.look(picture)


def of_codes(encoder: Encoder, each: Iterable[Int[np.ndarray, "K"]]) -> Iterator[Look | None]:
    """The look of each image, decoded."""
    for pixels in decoded(encoder, each):
        yield overlap.look(PIL.Image.fromarray(pixels))


def decoded(
    encoder: Encoder, each: Iterable[Int[np.ndarray, "K"]]
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Images of codes, some at a time in one shape, which is compiled once."""
    side = encoder.vq_config.codes_per_side
    each = iter(each)
    while some := list(itertools.islice(each, BATCH)):
        full = np.stack([*some, *some[:1] * (BATCH - len(some))]).astype(np.int32)
        pixels = vqgan.decode_codes(encoder.vq, full.reshape(-1, side, side))
        yield from np.asarray(vqgan.to_uint8(pixels))[: len(some)]


def encoded(encoder: Encoder, paths: Iterable[Path]) -> Iterator[Int[np.ndarray, "K"]]:
    """The codes of picture files, as the records have them."""
    paths, size = iter(paths), encoder.vq_config.image_size
    while some := list(itertools.islice(paths, BATCH)):
        pixels = [
            images.preprocess(images.load(p, max_pixels=images.MAX_PIXELS), size) for p in some
        ]
        full = np.stack([*pixels, *pixels[:1] * (BATCH - len(pixels))])
        found = np.asarray(vqgan.encode(encoder.vq, full)).reshape(BATCH, -1)
        yield from found[: len(some)]
