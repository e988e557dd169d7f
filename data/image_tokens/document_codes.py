"""Provide the codes of document images: encoded here, or read from a folder written by `tokenize`.

Both give the same codes on the same kind and number of devices with the same --batch, since both
come from a BatchEncoder. The folder is indexed by the bytes of an image file, so the location and
name of an image do not matter, and an image that was changed since is not found. A folder has one
view of models/images.py: records whose answers have another one than their prompts need two.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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
from medmax_jax.data.image_tokens.store_reader import CodeStore, digest_of, open_codes, view_of
from medmax_jax.data.records.document import Layout
from medmax_jax.io.progress import ItemProgress, report_waits
from medmax_jax.models import image_headers
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME


class EncodeResult(NamedTuple):
    """Codes by (path, number, view), and the reason for each path that cannot be read."""

    codes: dict[tuple[str, int, str], Int[np.ndarray, "K"]]
    unreadable: dict[str, str]


class Files(NamedTuple):
    """The image files of views: `load` raises ImageError, `content` is a file or bytes.

    `name`: the name of a path in messages, if the path must not be repeated.
    """

    load: Callable[[str], PIL.Image.Image]
    content: Callable[[str], Path | bytes]
    name: Callable[[str], str] = str


def views_of_text(text: str, turns: int, layout: Layout) -> list[str]:
    """Return the view of each `<image>` of a document: answer_view where it is trained.

    That is where loss_mask selects its tokens in the mode `answers`:
        "<image> CT?<reserved08706>yes"            ->  [view]
        "Draw it.<reserved08706><image>", "<image>"  ->  [answer_view]
    """
    sections = text.split(SEP_NAME)
    views = []
    for number, section in enumerate(sections):
        answer = len(sections) == 1 or (number % 2 == 1 if turns > 0 else number > 0)
        views += section.count(IMAGE_NAME) * [layout.answer_view if answer else layout.view]
    return views


def of_document(image: ImageView, text: str, turns: int, layout: Layout) -> list[ImageView]:
    """Return the image in the view of each `<image>` of a document's text."""
    return [dataclasses.replace(image, view=v) for v in views_of_text(text, turns, layout)]


class OnlineEncoder:
    """Computes codes with the encoder of a model folder."""

    def __init__(self, encoder: Encoder, precision: str):
        self._encoder = encoder
        self._encode = BatchEncoder(encoder, precision=precision, batch=BATCH)

    def __call__(
        self, views: Iterable[ImageView], files: Files, *, log_progress: bool
    ) -> EncodeResult:
        """Return the codes of views."""
        todo = sorted(set(views), key=key)
        result, progress = EncodeResult({}, {}), None
        config = self._encoder.vq_config
        loaders = (lambda v=v: load_pixels(files.load(v.path), v, config) for v in todo)
        encoded = self._encode(loaders)
        if log_progress:
            progress = ItemProgress(len(todo), "images", log.info, every=LOG_SECONDS)
            encoded = report_waits(encoded, ENCODING, log.info)
        for v, codes in zip(todo, encoded, strict=True):
            if not isinstance(codes, str):
                result.codes[key(v)] = codes.astype(np.int32)
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
    """Reads codes from folders that `data.prepare tokenize` made with the same VQGAN."""

    def __init__(self, folders: Sequence[Path], encoder: Encoder, precision: str):
        layout, self._codes = encoder.layout, {}
        expected = dict(vqgan=layout.vqgan, codes_per_image=layout.codes_per_image)
        for folder in folders:
            codes = open_codes(folder)
            for name, value in (expected | dict(precision=precision)).items():
                if codes.meta["plan"][name] != value:
                    raise PrepareError(
                        f"--codes {folder}: {name} is {codes.meta['plan'][name]!r}, but --model or "
                        f"--precision requires {value!r}; tokenize with the same model and "
                        "precision"
                    )
            if (view := view_of(codes.meta["plan"])) in self._codes:
                raise PrepareError(f"--codes {folder}: a second folder of view {view}; name one")
            self._codes[view] = codes
        for name in ("view", "answer_view"):
            if (view := getattr(layout, name)) not in self._codes:
                raise PrepareError(
                    f"--codes {' '.join(map(str, folders))}: view {' and '.join(self._codes)}, but "
                    f"{name} is {view}; add a folder of `tokenize --view {view}`, or set --{name}"
                )

    def check_credentialed(self, *, burned_in: bool) -> None:
        """Raise PrepareError unless the folder was made by the rules of a credentialed source."""
        for codes in self._codes.values():
            for name, value in (("credentialed", True), ("burned_in", burned_in)):
                if codes.meta["plan"][name] != value:
                    raise PrepareError(
                        f"--codes {codes.folder}: this source requires images that were tokenized "
                        f"{'with' if value else 'without'} --{name}; tokenize them again"
                    )

    def __call__(
        self, views: Iterable[ImageView], files: Files, *, log_progress: bool
    ) -> EncodeResult:
        """Return the codes of views; a folder has each image unchanged, number 0."""
        result, todo = EncodeResult({}, {}), sorted(set(views), key=key)
        if any(v.number for v in todo):
            raise PrepareError("--codes has one view of each image; use --views 1")
        for v in todo:
            codes = self._lookup(self._codes[v.view], v.path, files)
            if isinstance(codes, str):
                result.unreadable[v.path] = codes
                log.warning("excluded: %s", codes)
            else:
                result.codes[key(v)] = codes.astype(np.int32)
        return result

    def notes(self) -> dict[str, Any]:
        """Return the notes for dataset.json."""
        metas = [codes.meta for codes in self._codes.values()]
        agreements = [meta["agreement"] for meta in metas if meta["agreement"] is not None]
        return dict(
            precision=metas[0]["plan"]["precision"], agreement=min(agreements, default=None)
        )

    def _lookup(self, codes: CodeStore, path: str, files: Files) -> np.ndarray | str:
        try:
            digest = digest_of(files.content(path))
        except OSError:
            digest = b""  # `load` reports why it cannot be opened
        if digest and digest not in codes:
            raise PrepareError(
                f"--codes {codes.folder}: {files.name(path)} is missing, or the image was changed "
                "since; tokenize the images again, into a new folder"
            )
        found = codes.by_digest(digest) if digest else None
        if found is not None:
            return found
        try:
            files.load(path)
        except image_headers.ImageError as error:
            return str(error)
        raise PrepareError(
            f"--codes {codes.folder}: {files.name(path)} was unreadable when it was tokenized and "
            "is readable now; tokenize the images again, into a new folder"
        )


def open_code_source(
    folders: Sequence[Path], encoder: Encoder, precision: str
) -> OnlineEncoder | StoredCodes:
    """Return the folders of codes if any are named, else the encoder."""
    if folders:
        return StoredCodes(folders, encoder, precision)
    return OnlineEncoder(encoder, precision)


def key(v: ImageView) -> tuple[str, int, str]:
    """Return the key of a view in EncodeResult."""
    return v.path, v.number, v.view
