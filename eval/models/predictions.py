"""Reads recorded answers as a model: JSONL of {"id", "text", "images": [paths]}.

Paths are relative to the file and must be inside its folder. Items without a line are failed
answers, counted as such; a line without an item is an error, since other items were answered.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from medmax_jax.endpoints import egress
from medmax_jax.eval.models.base import FailedResponse, ModelRequest, Segment
from medmax_jax.eval.tasks.items import Item, is_credentialed
from medmax_jax.io import image_paths
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, read_objects
from medmax_jax.models import image_headers, images

MAX_LINE = 1_000_000  # bytes
MAX_IMAGES = 16  # of an answer
MAX_NAME = 1_024  # characters of an image's path
MAX_IMAGE_BYTES = 20_000_000
MAX_PIXELS = 64_000_000


class PredictionsError(ValueError):
    """Raised for unusable predictions; the message names the line and the fix."""


class Predictions:
    """Returns answers by the item's id. `missing`: the number of items without an answer."""

    no_options = "predictions are texts; nobody told their likelihoods"

    def __init__(self, path: str | Path, items: Sequence[Item]):
        self.path = Path(path)
        self.name, self.fingerprint = self.path.name, digest(self.path)
        self._rows = _read(self.path)
        known = {item.id for item in items}
        secret = any(map(is_credentialed, items))
        strange = [name for name in self._rows if name not in known]
        if strange:
            shown = printable(repr(strange[0]), 80)
            first = f"that of {self._rows[strange[0]]['place']}" if secret else shown
            raise PredictionsError(
                f"{path}: {len(strange)} ids are no items of this evaluation, the first is "
                f"{first}; predict the items of this config, or leave those lines out"
            )
        for row in self._rows.values():  # before any file is opened
            for number, name in enumerate(row["images"], start=1):
                self._file(row["place"], name, f"image {number}" if secret else "")
        self.missing = len(known) - len(self._rows)
        if self.missing == len(known):
            raise PredictionsError(f"{path}: has no predictions; write a line for each item")

    def generate(self, asks: Sequence[ModelRequest]) -> list[list[Segment] | FailedResponse]:
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: ModelRequest) -> list[Segment] | FailedResponse:
        row = self._rows.get(ask.id)
        if row is None:
            return FailedResponse(why=f"no prediction in {self.path.name}")
        secret = ask.data_class == egress.CREDENTIALED
        return [
            row["text"],
            *(
                self._image(row["place"], name, f"image {number}" if secret else "")
                for number, name in enumerate(row["images"], start=1)
            ),
        ]

    def _file(self, place: str, name: str, label: str) -> Path:
        """Return the file of an image; `label` replaces the path in messages if it is private."""
        where, folder = f"{self.path} {place}", self.path.parent
        shown = label or f"image {name!r}"
        try:
            path = image_paths.resolve(folder, name, label=label)
        except image_paths.ImagePathError as error:
            raise PredictionsError(
                f"{where}: {shown} is no file under {folder}: {error}"
            ) from error
        if not path.is_file():
            raise PredictionsError(f"{where}: {shown} is no file under {folder}; put it there")
        return path

    def _image(self, place: str, name: str, label: str) -> PIL.Image.Image:
        path = self._file(place, name, label)
        shown = f"{self.path} {place}: {label}" if label else str(path)
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise PredictionsError(f"{shown}: more than {MAX_IMAGE_BYTES} bytes; make it smaller")
        try:
            return images.load(path, max_pixels=MAX_PIXELS, name=shown)
        except image_headers.ImageError as error:
            if label:  # Pillow may repeat the content of the file
                raise PredictionsError(f"{shown} cannot be read as an image; replace it") from None
            raise PredictionsError(str(error)) from error


def digest(path: str | Path) -> str:
    """Return the digest of the file's bytes, without the images that it names."""
    try:
        return "predictions:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise PredictionsError(
            f"--model predictions:{path}: {error.strerror}; name a JSONL file"
        ) from error


def _read(path: Path) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    try:
        found = read_objects(path, max_bytes=MAX_LINE)
    except TextFileError as error:
        raise PredictionsError(f"{error}; mend it") from error
    for where, line in found:
        place = where.removeprefix(f"{path} ")
        row = _row(line, where) | {"place": place}
        if row["id"] in rows:
            first = rows[row["id"]]["place"]
            raise PredictionsError(f"{where}: its id comes twice, first in {first}; keep one")
        rows[row["id"]] = row
    return rows


def _row(row: dict, where: str) -> dict:
    if not isinstance(row.get("id"), str):
        raise PredictionsError(f'{where}: no id; write {{"id": ..., "text": ...}}')
    found = {"id": row["id"], "text": row.get("text", ""), "images": row.get("images", [])}
    names = found["images"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PredictionsError(f"{where}: images is no list of paths; mend it")
    if not all(name.isprintable() and len(name) <= MAX_NAME for name in names):
        raise PredictionsError(
            f"{where}: a name in images is not printable, or over {MAX_NAME} characters; rename it"
        )
    if not isinstance(found["text"], str) or not (found["text"] or names or "text" in row):
        raise PredictionsError(f"{where}: no text and no images; write one of them")
    if len(names) > MAX_IMAGES:
        raise PredictionsError(f"{where}: more than {MAX_IMAGES} images; keep the first ones")
    return found
