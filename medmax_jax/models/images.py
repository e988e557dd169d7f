"""Converts image files to the pixels that the VQGAN reads, by default as Meta's Chameleon does.

    file -> 8 bits: as is, or wider gray or color by the range it states, or by its own
         -> RGB: as is, or blended on white where any alpha < 255 (truncated to uint8), or converted
         -> short side = size: other side round(size / short * side), halves to even, LANCZOS
         -> center crop size x size at ((w - size) // 2, (h - size) // 2)
         -> / 255 * 2 - 1, float32 [size, size, 3]

That is the view `released`: what is outside of the center square is lost. The view `pad` shows the
complete image, as Chameleon's paper states for images in prompts (its released code does not):

         -> long side = size: other side round(size / long * side), at least 1, LANCZOS
         -> on a white square size x size, at ((size - w) // 2, (size - h) // 2)

The paper does not state the color. White, 255, is the only one that the released code puts where an
image has no pixels: beneath transparent ones.

Every image file that this project reads is opened here, with one list of formats and one set of
limits, so that local models, endpoints, scorers and pages get the same pixels. As in the MedMax
release, the EXIF orientation of JPEG, PNG and WebP is not applied; Pillow applies that of TIFF.

The released MedMax script differs in two ways: it drops alpha before it could be blended, and it
turns an unreadable file into a black image. Here alpha is blended and an unreadable file raises an
ImageError.
"""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from medmax_jax.config import VIEWS
from medmax_jax.models import image_range
from medmax_jax.models.image_headers import ImageError, check_header, check_regular, check_size

PADDING = 255  # white, see above
MAX_PIXELS = 89_478_485  # Pillow's own limit between a large image and a decompression bomb
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm")
MAX_WEBP = 2**26  # pixels; its decoder holds 15 bytes for each, others 4 to 12
MAX_PYTHON = 2**24  # pixels of a PPM that Pillow decodes in Python, microseconds for each
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
# What Pillow raises for damaged files, found by trial: TypeError where a TIFF tag has another type
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)


def load(path: str | os.PathLike | bytes, *, max_pixels: int, name: str = "") -> Image.Image:
    """Return the first frame as RGB; raise ImageError, also above `max_pixels` = width x height.

    `path`: a file, or the bytes of one. `name`: its name in errors, if not its path. The result
    contains none of the file's metadata.
    """
    opened = functools.partial(open_image, path, max_pixels=max_pixels, name=name)
    with opened() as image:
        stated = image_range.read_stated_range(image, image.info["significant_bits"])
        lower = image_range.lower_byte_tiles(image)
        image.load()
        if lower and image_range.is_below_12_bits(image):
            with opened() as other:
                other.tile = lower
                other.load()
                image_range.join_bytes(image, other, stated, gray=lower[0].args == "RGBA")
        rgb = to_rgb(image, stated)
        rgb.info = {}
        return rgb


@contextlib.contextmanager
def open_image(
    path: str | os.PathLike | bytes, *, max_pixels: int, name: str = ""
) -> Iterator[Image.Image]:
    """Open the image without decoding it, in the mode of its file; `load` returns its RGB.

    Its header is within the limits. Any error while it is open becomes an ImageError. Its
    info["significant_bits"] is what a PNG states, else 0.
    """
    name = name or ("the image" if isinstance(path, bytes) else str(path))
    try:
        with warnings.catch_warnings(), _file(path) as file:
            warnings.simplefilter("ignore")  # of Pillow: max_pixels decides, and damage is an error
            bits = check_header(file, max_pixels=max_pixels)
            with Image.open(file, formats=FORMATS) as image:
                check_size(*image.size, _bound(image, max_pixels))
                image.info["significant_bits"] = bits
                yield image
                return
    except FileNotFoundError:
        problem = "no such file; check the path in the record and the image folder"
    except IsADirectoryError:
        problem = "is a folder; use an image file"
    except PermissionError:
        problem = "permission denied; make the file readable"
    except Image.UnidentifiedImageError:
        problem = f"not an image in a supported format ({', '.join(FORMATS)}); convert or remove it"
    except ImageError as e:
        problem = str(e).removeprefix(f"{name}: ")
    except Image.DecompressionBombError as e:  # Pillow's own limit, reached before ours
        problem = f"{e}; the limit is {max_pixels}: scale the image down first"
    except MemoryError:
        problem = "needs more memory than is available; scale the image down first"
    except _DAMAGE as e:
        problem = f"damaged or truncated ({e}); copy the file again or remove it"
    raise ImageError(f"{name}: {problem}")


def to_rgb(
    image: Image.Image, stated: image_range.StatedRange = image_range.NOT_STATED
) -> Image.Image:
    """Convert any mode to RGB: alpha over white, wider samples by their range (image_range)."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = image_range.to_eight_bits(image, stated)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top, band in image_range.bands(image):
        rgba = np.asarray(band.convert("RGBA"))
        index = rgba[..., 3:].astype(np.uint16) << 8 | rgba[..., :3]
        rgb.paste(Image.fromarray(_over_white().take(index)), (0, top))
    return rgb


def preprocess(
    image: Image.Image, size: int, view: str = "released"
) -> Float32[np.ndarray, "h w 3"]:
    """Return the square of `size` that a view shows of an image, in [-1, 1].

    Raises ImageError where a narrow image would be scaled to more than MAX_PIXELS.
    """
    whole = _is_whole(view)
    if not min(image.size):
        raise ImageError(
            f"has {image.width} x {image.height} pixels; each side requires at least one"
        )
    side = max(image.size) if whole else min(image.size)
    scaled = [max(1, round(size / side * n)) for n in image.size]
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"too narrow ({image.width} x {image.height} pixels); crop the image")
    image = to_rgb(image).resize(scaled, Image.Resampling.LANCZOS)
    if whole:
        square = Image.new("RGB", (size, size), 3 * (PADDING,))
        square.paste(image, tuple((size - n) // 2 for n in scaled))
    else:
        left, top = ((n - size) // 2 for n in scaled)
        square = image.crop((left, top, left + size, top + size))
    return np.asarray(square, np.float32) / np.float32(255) * 2 - 1


def area_lost(width: int, height: int, view: str) -> float:
    """Return the share of an image's area that a view does not show.

    area_lost(400, 300, "released") -> 0.25, area_lost(400, 300, "pad") -> 0.0
    """
    return 0.0 if _is_whole(view) else 1 - min(width, height) / max(width, height)


def _is_whole(view: str) -> bool:
    if view not in VIEWS:
        raise ValueError(f"view is {view!r}; use one of {', '.join(VIEWS)}")
    return view == "pad"


def _bound(image: Image.Image, max_pixels: int) -> int:
    if image.format == "WEBP":
        return min(max_pixels, MAX_WEBP)
    slow = bool(image.tile) and image.tile[0].codec_name in ("ppm", "ppm_plain")
    return min(max_pixels, MAX_PYTHON) if slow else max_pixels


def _file(path: str | os.PathLike | bytes) -> io.BufferedIOBase:
    if isinstance(path, bytes):
        return io.BytesIO(path)
    check_regular(path)
    return open(path, "rb")


@functools.cache
def _over_white() -> UInt8[np.ndarray, "256 256"]:
    """Tabulate a value under an alpha, over white: row alpha, column value."""
    alpha = np.arange(256)[:, None] / 255.0
    return ((1 - alpha) * 255.0 + alpha * np.arange(256)).astype(np.uint8)  # truncates
