"""Provide the codes of document images: encoded here, or read from a folder written by `tokenize`.

Both give the same codes on the same kind and number of devices with the same --batch, since both
come from a BatchEncoder. The folder is indexed by the bytes of an image file, so the location and
name of an image do not matter, and an image that was changed since is not found.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int

from medmax_jax.data.image_tokens.batch_encoder import BatchEncoder
from medmax_jax.data.image_tokens.encoder import (
    BATCH,
    ENCODING,
    LOG_SECONDS,
    Encoder,
    ImageView,
    PrepareError,
    load_pixels,
    log,
)
from medmax_jax.data.image_tokens.store_reader import CodeStore, digest_of, open_codes
from medmax_jax.io.progress import ItemProgress, report_waits
from medmax_jax.models import image_headers


class EncodeResult(NamedTuple):
    """Codes by (path, number of the view), and the reason for each path that cannot be read."""

    codes: dict[tuple[str, int], Int[np.ndarray, "K"]]
    unreadable: dict[str, str]


class Files(NamedTuple):
    """The image files of views: `load` raises ImageError, `content` is a file or bytes.

    `name`: the name of a path in messages, if the path must not be repeated.
    """

    load: Callable[[str], PIL.Image.Image]
    content: Callable[[str], Path | bytes]
    name: Callable[[str], str] = str


class OnlineEncoder:
    """Computes codes with the encoder of a model folder."""

    def __init__(self, encoder: Encoder, precision: str):
        self._encoder = encoder
        self._encode = BatchEncoder(encoder, precision=precision, batch=BATCH)

    def __call__(
        self, views: Iterable[ImageView], files: Files, *, log_progress: bool
    ) -> EncodeResult:
        """Return the codes of views."""
        todo = sorted(set(views), key=lambda v: (v.path, v.number))
        result, progress = EncodeResult({}, {}), None
        config = self._encoder.vq_config
        loaders = (lambda v=v: load_pixels(files.load(v.path), v, config) for v in todo)
        encoded = self._encode(loaders)
        if log_progress:
            progress = ItemProgress(len(todo), "images", log.info, every=LOG_SECONDS)
            encoded = report_waits(encoded, ENCODING, log.info)
        for v, codes in zip(todo, encoded, strict=True):
            if not isinstance(codes, str):
                result.codes[v.path, v.number] = codes.astype(np.int32)
            elif v.path not in result.unreadable:
                result.unreadable[v.path] = codes
                log.warning("excluded: %s", codes)
            if progress:
                progress.tick("codes", 1)
        return result

    def notes(self) -> dict[str, Any]:
        """Return the notes for dataset.json."""
        return dict(precision=self._encode.precision, agreement=self._encode.agreement)


class StoredCodes:
    """Reads codes from a folder that `data.prepare tokenize` made with the same VQGAN."""

    def __init__(self, folder: Path, encoder: Encoder, precision: str):
        self._codes: CodeStore = open_codes(folder)
        self._folder, plan = folder, self._codes.meta["plan"]
        expected = dict(vqgan=encoder.layout.vqgan, codes_per_image=encoder.layout.codes_per_image)
        for name, value in (expected | dict(precision=precision)).items():
            if plan[name] != value:
                raise PrepareError(
                    f"--codes {folder}: {name} is {plan[name]!r}, but --model or --precision "
                    f"requires {value!r}; tokenize with the same model and precision"
                )

    def check_credentialed(self, *, burned_in: bool) -> None:
        """Raise PrepareError unless the folder was made by the rules of a credentialed source."""
        plan = self._codes.meta["plan"]
        for name, value in (("credentialed", True), ("burned_in", burned_in)):
            if plan[name] != value:
                raise PrepareError(
                    f"--codes {self._folder}: this source requires images that were tokenized "
                    f"{'with' if value else 'without'} --{name}; tokenize them again"
                )

    def __call__(
        self, views: Iterable[ImageView], files: Files, *, log_progress: bool
    ) -> EncodeResult:
        """Return the codes of views; a folder has each image unchanged, view 0."""
        result, todo = EncodeResult({}, {}), sorted(set(views), key=lambda v: (v.path, v.number))
        if any(v.number for v in todo):
            raise PrepareError("--codes has one view of each image; use --views 1")
        for v in todo:
            codes = self._lookup(v.path, files)
            if isinstance(codes, str):
                result.unreadable[v.path] = codes
                log.warning("excluded: %s", codes)
            else:
                result.codes[v.path, 0] = codes.astype(np.int32)
        return result

    def notes(self) -> dict[str, Any]:
        """Return the notes for dataset.json."""
        return dict(
            precision=self._codes.meta["plan"]["precision"], agreement=self._codes.meta["agreement"]
        )

    def _lookup(self, path: str, files: Files) -> np.ndarray | str:
        try:
            digest = digest_of(files.content(path))
        except OSError:
            digest = b""  # `load` reports why it cannot be opened
        if digest and digest not in self._codes:
            raise PrepareError(
                f"--codes {self._folder}: {files.name(path)} is missing, or the image was changed "
                "since; tokenize the images again, into a new folder"
            )
        codes = self._codes.by_digest(digest) if digest else None
        if codes is not None:
            return codes
        try:
            files.load(path)
        except image_headers.ImageError as error:
            return str(error)
        raise PrepareError(
            f"--codes {self._folder}: {files.name(path)} was unreadable when it was tokenized and "
            "is readable now; tokenize the images again, into a new folder"
        )


def open_code_source(
    folder: Path | None, encoder: Encoder, precision: str
) -> OnlineEncoder | StoredCodes:
    """Return the folder of codes if one is named, else the encoder."""
    return StoredCodes(folder, encoder, precision) if folder else OnlineEncoder(encoder, precision)
