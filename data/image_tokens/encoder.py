"""Load the encoder of a model folder, the variants of images, and image files as pixels.

A variant other than number 0 is the image slightly cropped, brightened or darkened. None is
mirrored or rotated: left, right and orientation are facts that texts refer to. Of every variant the
VQGAN reads the square that the view of models/images.py shows.
"""

import dataclasses
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float32

from medmax_jax.checkpoints import export
from medmax_jax.config import VQ, Vocab, build, check_vq
from medmax_jax.data.image_tokens import dicom
from medmax_jax.data.records.document import Layout
from medmax_jax.io.errors import PrintableFormatter
from medmax_jax.io.text_files import read_json_object
from medmax_jax.models import image_headers, images, vqgan
from medmax_jax.models.tokenizer import Tokenizer
from medmax_jax.storage.folder import file_sha256

log = logging.getLogger("medmax_jax.prepare")

BATCH = 16  # images that a device encodes at once, by default
LOG_SECONDS = 5.0
ENCODING = "encoding images; the first batch includes the compilation"  # logged during long waits
MIN_CROP_AREA = 0.5  # of what the view shows: smaller crops lose what texts describe
JITTER = 0.2  # contrast 0.8 .. 1.2 and brightness -0.2 .. 0.2 of the range -1 .. 1


class PrepareError(ValueError):
    """Data that cannot be prepared; the message states the reason and what to change."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Converts text and images to ids, with the layout that records state."""

    layout: Layout
    vq_config: VQ
    vq: Any  # vqgan.VQGAN
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class ImageView:
    """One variant of an image: number 0 is the image itself, others are changed slightly."""

    path: str
    number: int
    seed: str
    crop: bool
    view: str = "released"  # of models/images.py


def load_encoder(
    folder: str | Path,
    *,
    vq: Any = None,
    tokenizer: Tokenizer | None = None,
    view: str = "",
    answer_view: str = "",
) -> Encoder:
    """Load tokenizer and VQGAN of a model folder; the language model in it is not read.

    `view`, `answer_view`: of images in prompts and in answers; empty: those of the model.
    """
    folder = export.local_copy(folder)
    path = folder / "config.json"
    try:
        raw = read_json_object(path)
        vocab, vq_config = build(Vocab, raw["vocab"]), build(VQ, raw["vq"])
        views = dict(view=view or vq_config.view, answer_view=answer_view or vq_config.answer_view)
        vq_config = dataclasses.replace(vq_config, **views)
        check_vq(vq_config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrepareError(
            f"{path}: not a valid model folder ({error}); set --model to one"
        ) from error
    file = folder / "vqgan.safetensors"
    vq = vqgan.load(file, vq_config) if vq is None else vq
    tokenizer = tokenizer or Tokenizer.from_file(folder / "tokenizer.json", vocab)
    layout = Layout(
        vocab=vocab,
        codes_per_image=vq_config.codes_per_image,
        tokenizer=tokenizer.fingerprint,
        vqgan=file_sha256(file),
        **views,
    )
    return Encoder(layout=layout, vq_config=vq_config, vq=vq, tokenizer=tokenizer)


def load_pixels(
    image: PIL.Image.Image, view: ImageView, config: VQ
) -> Float32[np.ndarray, "h w 3"]:
    """Return pixels: number 0 is plain preprocessing, others depend on the seed only."""
    if view.number == 0:
        return images.preprocess(image, config.image_size, view.view)
    draw = random.Random(view.seed)  # seeded by a string: the same in every process and version
    if view.crop:
        shown = image.size if view.view == "pad" else 2 * (min(image.size),)
        share = draw.uniform(MIN_CROP_AREA, 1.0) ** 0.5
        width, height = (max(1, round(n * share)) for n in shown)
        left, top = (
            (n - whole) // 2 + draw.randint(0, whole - part)
            for n, whole, part in zip(image.size, shown, (width, height), strict=True)
        )
        image = image.crop((left, top, left + width, top + height))
    contrast, brightness = draw.uniform(1 - JITTER, 1 + JITTER), draw.uniform(-JITTER, JITTER)
    pixels = images.preprocess(image, config.image_size, view.view) * contrast + brightness
    return np.clip(pixels, -1, 1).astype(np.float32)


def open_image(
    path: Path, *, name: str, burned_in: bool = False, secret: bool = False
) -> PIL.Image.Image:
    """Open an image file, also DICOM; an ImageError has `name`, and if `secret` nothing more."""
    if path.suffix.lower() == ".dcm":
        return dicom.load(path, name=name, burned_in=burned_in)
    try:
        return images.load(path, max_pixels=images.MAX_PIXELS, name=name)
    except image_headers.ImageError:
        if not secret:
            raise
        # Pillow's message may repeat content of the file.
        problem = "no such file, or damaged; check the image folder"
        raise image_headers.ImageError(f"{name}: {problem}") from None


def log_to_stderr() -> None:
    """Log the lines of the data preparation programs to stderr, with the time."""
    # Not logging.basicConfig: a library may have given the root logger a handler and a level.
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
