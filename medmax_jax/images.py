"""Image files to the pixels that the VQGAN reads, as Meta's Chameleon does it.

    file -> RGB: as is, or blended on white where any alpha < 255 (truncated to uint8), or converted
         -> short side = size: other side round(size / short * side), halves to even, LANCZOS
         -> centre crop size x size at ((w - size) // 2, (h - size) // 2)
         -> / 255 * 2 - 1, float32 [size, size, 3]

Two things the released MedMax script does otherwise: it drops alpha before it could be blended, and
turns an unreadable file into a black picture. Here the first is blended and the second raises an
ImageError.
"""

import io
import os
import warnings

import numpy as np
from jaxtyping import Float32
from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's own line between a large picture and a decompression bomb
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file, the problem and the mend."""


def load(path: str | os.PathLike | bytes, *, max_pixels: int, name: str = "") -> Image.Image:
    """The first frame as RGB; raises ImageError, also above `max_pixels` = width x height.

    `path`: a file, or the bytes of one. `name`: what errors call it, if not by its path.
    """
    file = io.BytesIO(path) if isinstance(path, bytes) else path
    name = name or ("a picture" if isinstance(path, bytes) else str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image, max_pixels)
                image.load()
                return to_rgb(image)
    except FileNotFoundError:
        problem = "no such file; check the path in the record and the image folder"
    except IsADirectoryError:
        problem = "is a folder; name a picture file"
    except PermissionError:
        problem = "may not be read; mend its permissions"
    except Image.UnidentifiedImageError:
        problem = f"not a picture this program reads ({', '.join(FORMATS)}); convert or remove it"
    except ImageError as e:
        problem = str(e)
    except Image.DecompressionBombError as e:  # Pillow's own bound, met before ours
        problem = f"{e}; the limit is {max_pixels}: scale the picture down first"
    except (OSError, SyntaxError, ValueError, EOFError) as e:
        problem = f"damaged or cut short ({e}); copy the file again or remove it"
    raise ImageError(f"{name}: {problem}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: alpha over white, 16-bit grey by its upper byte."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ImageError("mode F has no fixed range; save the picture with 8 or 16 bit integers")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = np.asarray(image.convert("RGBA"))
    if (rgba[..., 3] < 255).any():
        return Image.fromarray(_over_white(rgba))
    return image.convert("RGB")


def preprocess(image: Image.Image, size: int) -> Float32[np.ndarray, "h w 3"]:
    """The centre square of the picture, its short side scaled to `size`, in [-1, 1].

    Raises ImageError where a line of a picture would be scaled to more than MAX_PIXELS.
    """
    if not min(image.size):
        raise ImageError(f"has {image.width} x {image.height} pixels; give a picture of some")
    scaled = [round(size / min(image.size) * side) for side in image.size]
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"too narrow ({image.width} x {image.height} pixels); crop the picture")
    image = to_rgb(image).resize(scaled, Image.Resampling.LANCZOS)
    left, top = ((side - size) // 2 for side in scaled)
    square = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    return square / np.float32(255) * 2 - 1


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255.0
    return ((1 - alpha) * 255.0 + alpha * rgba[..., :3]).astype(np.uint8)  # truncates


def _eight_bits(image: Image.Image) -> Image.Image:
    """PIL's own conversion of 16-bit grey clips at 255, which turns a radiograph white."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65_535)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels; the limit is {max_pixels}: scale the picture down first"
        )
