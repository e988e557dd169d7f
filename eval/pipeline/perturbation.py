"""Perturbs the images that a model is shown, as Kvasir-VQA-x1 does for its transformed track.

    crop of 90 to 100 % of the area  -> resized back -> rotated by up to 10 degrees
    -> shifted by up to 10 %         -> brightness and contrast by 0.8 to 1.2, in random order
    -> JPEG of Pillow's default quality

The operations are those that torchvision runs on Pillow images, in the published order
(README.md of github.com/simula/Kvasir-VQA-x1 at 67903e52). The draws differ: the published ones are
of torch's generator in four processes, which its script does not seed one by one, so no two runs
of it agree. Here they are a function of the seed 42, the item's id and the image's position in the
request: the same in every run, shard and order. The published track perturbs an image once for all
questions about it. A perturbed image is a file of WORKDIR/perturbed_images.
"""

import dataclasses
import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageEnhance

from medmax_jax.eval.config import EvalError
from medmax_jax.models import images

FOLDER = "perturbed_images"
SEED = 42
SCALE, RATIO, DEGREES, SHIFT, JITTER = (0.9, 1.0), (0.95, 1.05), 10.0, 0.1, (0.8, 1.2)
TRIES = 10  # of a crop that fits, as in torchvision; then the complete image
BICUBIC = PIL.Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """Holds the parameters for one image. crop: left, top, width, height in pixels."""

    crop: tuple[int, int, int, int]
    degrees: float
    shift: tuple[int, int]
    brightness: float
    contrast: float
    contrast_first: bool


def perturbed_parts(
    parts: Sequence[Path | str], item_id: str, folder: Path, *, write: bool = True
) -> tuple[Path | str, ...]:
    """Return the parts of a request with perturbed images, which are written into `folder`.

    Not `write`: images that are not in the folder stay as they are, for an estimate.
    """
    changed, number = [], 0
    for part in parts:
        if isinstance(part, Path):
            path = folder / _file_name(item_id, number, part)
            if write and not path.exists():
                _write(part, path, key=f"{SEED} {item_id} {number}")
            part = path if path.exists() else part
            number += 1
        changed.append(part)
    return tuple(changed)


def draw(size: tuple[int, int], key: str) -> Draw:
    """Return the parameters for an image of this width and height: a function of the key."""
    rng, (width, height) = random.Random(key), size
    crop = (0, 0, width, height)
    for _ in range(TRIES):
        area = width * height * rng.uniform(*SCALE)
        low, high = (math.log(width / height * end) for end in RATIO)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            crop = (rng.randint(0, width - w), rng.randint(0, height - h), w, h)
            break
    return Draw(
        crop=crop,
        degrees=rng.uniform(-DEGREES, DEGREES),
        shift=tuple(round(rng.uniform(-SHIFT * side, SHIFT * side)) for side in size),
        brightness=rng.uniform(*JITTER),
        contrast=rng.uniform(*JITTER),
        contrast_first=rng.random() < 0.5,
    )


def apply(image: PIL.Image.Image, parameters: Draw) -> PIL.Image.Image:
    """Return the perturbed image, of the same size; uncovered pixels are black."""
    left, top, width, height = parameters.crop
    cropped = image.crop((left, top, left + width, top + height))
    rotated = cropped.resize(image.size, BICUBIC).rotate(parameters.degrees, BICUBIC, fillcolor=0)
    dx, dy = parameters.shift
    affine = PIL.Image.Transform.AFFINE
    shifted = rotated.transform(image.size, affine, (1, 0, -dx, 0, 1, -dy), BICUBIC, fillcolor=0)
    enhancers = [
        (PIL.ImageEnhance.Brightness, parameters.brightness),
        (PIL.ImageEnhance.Contrast, parameters.contrast),
    ]
    for enhancer, factor in reversed(enhancers) if parameters.contrast_first else enhancers:
        shifted = enhancer(shifted).enhance(factor)
    return shifted


def _file_name(item_id: str, number: int, image: Path) -> str:
    digest = hashlib.sha256("\0".join((item_id, str(number), str(image))).encode()).hexdigest()
    return f"{digest[:32]}.jpg"


def _write(source: Path, path: Path, *, key: str) -> None:
    image = images.load(source, max_pixels=images.MAX_PIXELS)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        apply(image, draw(image.size, key)).save(partial, "JPEG")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EvalError(
            f"cannot write {path} ({error.strerror}); free disk space and rerun the same command"
        ) from error
