"""Maps samples of more than 8 bits to 8 bits, by the range the file states or by their own.

    stated   PNG: sBIT; TIFF: 12 bits per sample, SMinSampleValue and SMaxSampleValue, or
             MaxSampleValue; PPM: 16 bits, to which Pillow scales
    own      0 .. 255, 0 .. 4095 or 0 .. 65535, the first that holds the largest value; least to
             largest where values are negative or above 65535, for which no depth is customary

A value v of the range a .. b becomes floor(256 (v - a) / (b - a + 1)): the upper byte of 16 bits,
v >> 4 of 12 bits. A stated range that the values contradict is ignored.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from medmax_jax.models.image_headers import ImageError

log = logging.getLogger("medmax_jax.models.images")
BAND = 2**18  # pixels that are converted at a time, so that memory is that of the image alone
DEPTHS = (8, 12, 16)  # of detectors and of files; others are rare and would make a series flicker
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_VALUE, _SAMPLE_FORMAT, _SMIN, _SMAX = (
    258,
    262,
    281,
    339,
    340,
    341,
)
_NATIVE = "L" if sys.byteorder == "little" else "B"
# Where Pillow unpacks the upper bytes of 16-bit color, these raw modes unpack the lower ones.
_LOWER = {f"{m};16{a}": f"{m};16{b}" for m in ("RGB", "RGBA") for a, b in ("BL", "LB")}
_LOWER |= {f"{m};16N": _LOWER[f"{m};16{_NATIVE}"] for m in ("RGB", "RGBA")}
_LOWER |= {"LA;16B": "RGBA"}  # the two bytes of gray in R and G, those of alpha in B and A


@dataclasses.dataclass(frozen=True)
class StatedRange:
    """Holds the statements of a file about its samples; nothing by default."""

    bits: int = 0  # significant bits of a PNG
    low: int | float = 0
    high: int | float | None = None  # None: not stated
    inverted: bool = False  # TIFF's WhiteIsZero, which Pillow applies up to 8 bits only
    unsigned: bool = False  # 32 bits that Pillow reads as signed


NOT_STATED = StatedRange()


def read_stated_range(image: Image.Image, bits: int) -> StatedRange:
    """Return what the file of an opened image states; `bits` are those of sBIT, or 0."""
    if image.format == "PPM":
        return NOT_STATED if image.mode == "F" else StatedRange(high=65_535)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return StatedRange(bits=min(bits, 16))
    depth, form, low, high, most = (
        _first(image.tag_v2.get(tag))
        for tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SMIN, _SMAX, _MAX_VALUE)
    )
    high = high if high is not None else most
    if high is None and depth == 12:
        high = 4095
    low = low if low is not None else 0
    if high is None or not low < high:
        low, high = 0, None
    inverted = image.tag_v2.get(_PHOTOMETRIC) == 0
    return StatedRange(0, low, high, inverted, unsigned=depth == 32 and form in (None, 1))


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each band, and the band."""
    rows = max(1, BAND // max(1, image.width))
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield top, image.crop((0, top, image.width, bottom))


def to_eight_bits(image: Image.Image, stated: StatedRange) -> Image.Image:
    """Convert gray of 16 or 32 bits to mode L; pixels of the transparent value become white."""
    if image.mode == "F":
        if stated.high is None:
            raise ImageError(
                "a float image that states no range; save the image with 8- or 16-bit integers"
            )
        first, last = stated.low, stated.high
    else:
        first, last = _range(*_extent(_values(b, stated) for _, b in bands(image)), stated)
    clear = image.info.get("transparency")
    gray = Image.new("L", image.size)
    for top, band in bands(image):
        values = _values(band, stated)
        shown = _scaled(values, first, last)
        shown = 255 - shown if stated.inverted else shown
        if isinstance(clear, int):
            shown[values == clear] = 255
        gray.paste(Image.fromarray(shown), (0, top))
    return gray


def lower_byte_tiles(image: Image.Image) -> list[Any] | None:
    """Return tiles that decode the lower bytes of 16-bit color; Pillow keeps the upper ones.

    Returns None for any other image.
    """
    tiles = []
    for tile in image.tile:
        args = (tile.args,) if isinstance(tile.args, str) else tuple(tile.args or ())
        if not args or args[0] not in _LOWER:
            return None
        args = (_LOWER[args[0]], *args[1:])
        tiles.append(tile._replace(args=args[0] if isinstance(tile.args, str) else args))
    return tiles or None


def is_below_12_bits(image: Image.Image) -> bool:
    """Return whether the upper bytes of 16-bit color are those of values below 4096."""
    return max(high for _, high in image.getextrema()[:3]) < 16


def join_bytes(upper: Image.Image, lower: Image.Image, stated: StatedRange, *, gray: bool) -> None:
    """Scale 16-bit color, in place, by the range of its values; alpha keeps its upper byte.

    `gray`: whether `lower` has both bytes of gray in its first two channels.
    """

    def values() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for (top, high), (_, low) in zip(bands(upper), bands(lower), strict=True):
            high, low = np.asarray(high), np.asarray(low)
            below = low[..., 1:2] if gray else low[..., :3]
            yield top, high, high[..., :3].astype(np.int64) << 8 | below

    first, last = _range(*_extent(v for _, _, v in values()), stated)
    for top, high, wide in values():
        shown = np.concatenate([_scaled(wide, first, last), high[..., 3:]], axis=-1)
        upper.paste(Image.fromarray(shown), (0, top))


def _first(value: Any) -> float | int | None:
    """Return the first value of a TIFF tag, where it is a finite number, or None."""
    value = value[0] if isinstance(value, Sequence) and value else value
    number = isinstance(value, int | float) and math.isfinite(value)
    return value if number else None


def _values(band: Image.Image, stated: StatedRange) -> np.ndarray:
    values = np.asarray(band)
    if band.mode == "F":
        if not np.isfinite(values).all():
            raise ImageError("has values that are not finite; save the image without them")
        return values.astype(np.float64)
    values = values.astype(np.int64)
    return values & 0xFFFFFFFF if stated.unsigned else values


def _extent(parts: Iterator[np.ndarray]) -> tuple[int, int, int]:
    """Return the least and the largest value, and the bits that any value uses."""
    extents = [(int(v.min()), int(v.max()), int(np.bitwise_or.reduce(v, axis=None))) for v in parts]
    lows, highs, used = zip(*extents, strict=True)
    return min(lows), max(highs), functools.reduce(int.__or__, used)


def _range(low: int, high: int, used: int, stated: StatedRange) -> tuple[int, int]:
    if stated.high is not None and stated.low <= low and high <= stated.high:
        return math.floor(stated.low), math.ceil(stated.high)
    if stated.bits:
        # PNG requires values scaled to the full depth. Many writers store them unscaled: such
        # values use the lower bits, which scaled values of this size do not use.
        plain = high < 2**stated.bits and used & (2 ** (16 - stated.bits) - 1)
        return 0, 2 ** (stated.bits if plain else 16) - 1
    if low < 0 or high > 65_535:
        _log_range("by their least and largest value (negative, or more than 16 bits)")
        return low, max(high, low + 1)
    bits = next(bits for bits in DEPTHS if high < 2**bits)
    if bits < 16:
        _log_range(f"as {bits} bits (no value above {2**bits - 1})")
    return 0, 2**bits - 1


def _scaled(values: np.ndarray, first: int | float, last: int | float) -> np.ndarray:
    if values.dtype == np.float64:
        shown = np.round((values - first) / (last - first) * 255)
    else:
        shown = (values - first) * 256 // (last - first + 1)
    return np.clip(shown, 0, 255).astype(np.uint8)


@functools.cache  # once per run, whatever the number of images
def _log_range(how: str) -> None:
    log.warning("images of 16 or 32 bits per sample that state no range are mapped %s", how)
