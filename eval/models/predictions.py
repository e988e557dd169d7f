"""Reads recorded answers as a model, JSONL of {"id", "text", "images": [paths]}; writes the items.

    export_items -> {"id", "task", "question", "options", "prompt": [parts], "answer_format", ..}
                 -> answers by any program -> Predictions

Paths of answers are relative to the file and must be inside its folder. Items without a line are
failed answers, counted as such; a line without an item is an error, since other items were
answered.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import PIL.Image

from medmax_jax.endpoints import egress
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.models.base import FailedResponse, ModelRequest, Segment
from medmax_jax.eval.records import Item, is_credentialed
from medmax_jax.eval.tasks.items import FAMILIES
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, read_objects
from medmax_jax.models import image_headers, images
from medmax_jax.storage import image_paths
from medmax_jax.storage.folder import Folder

MAX_LINE = 1_000_000  # bytes
MAX_IMAGES = 16  # of an answer
MAX_NAME = 1_024  # characters of an image's path
MAX_IMAGE_BYTES = 20_000_000
MAX_PIXELS = 64_000_000


class PredictionsError(ValueError):
    """Raised for unusable predictions; the message names the line and the fix."""


class Predictions:
    """Returns answers by the item's id. `missing`: the number of items without an answer."""

    no_options = "predictions are texts without likelihoods"

    def __init__(self, path: str | Path, items: Sequence[Item]):
        self.path = Path(path)
        self.name, self.fingerprint = self.path.name, digest(self.path)
        self._rows = _read(self.path)
        item_ids = {item.id for item in items}
        credentialed = any(map(is_credentialed, items))
        unknown_ids = [name for name in self._rows if name not in item_ids]
        if unknown_ids:
            shown = printable(repr(unknown_ids[0]), 80)
            first = f"that of {self._rows[unknown_ids[0]]['place']}" if credentialed else shown
            raise PredictionsError(
                f"{path}: {len(unknown_ids)} ids are not items of this evaluation (first: "
                f"{first}); predict the items of this config, or remove those lines"
            )
        for row in self._rows.values():  # before any file is opened
            for number, name in enumerate(row["images"], start=1):
                self._file(row["place"], name, f"image {number}" if credentialed else "")
        self.missing = len(item_ids) - len(self._rows)
        if self.missing == len(item_ids):
            raise PredictionsError(f"{path} contains no predictions; write one line per item")

    def generate(self, requests: Sequence[ModelRequest]) -> list[list[Segment] | FailedResponse]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: ModelRequest) -> list[Segment] | FailedResponse:
        row = self._rows.get(request.id)
        if row is None:
            return FailedResponse(why=f"no prediction in {self.path.name}")
        credentialed = request.data_class == egress.CREDENTIALED
        return [
            row["text"],
            *(
                self._image(row["place"], name, f"image {number}" if credentialed else "")
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
                f"{where}: {shown} is not a file under {folder}: {error}"
            ) from error
        if not path.is_file():
            raise PredictionsError(
                f"{where}: {shown} is not a file under {folder}; copy it to that folder"
            )
        return path

    def _image(self, place: str, name: str, label: str) -> PIL.Image.Image:
        path = self._file(place, name, label)
        shown = f"{self.path} {place}: {label}" if label else str(path)
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise PredictionsError(f"{shown} is larger than {MAX_IMAGE_BYTES} bytes; shrink it")
        try:
            return images.load(path, max_pixels=MAX_PIXELS, name=shown)
        except image_headers.ImageError as error:
            if label:  # Pillow may repeat the content of the file
                raise PredictionsError(f"{shown} cannot be read as an image; replace it") from None
            raise PredictionsError(str(error)) from error


def export_items(items: Sequence[Item], requests: Iterable[ModelRequest], out: Path) -> None:
    """Write what a program needs to answer the items, without their references, one per line.

    requests: what a model of this process receives; its parts are written in order, with absolute
    paths of the images.
    """
    lines = []
    for item, request in zip(items, requests, strict=True):
        family = FAMILIES[item.family]
        parts = [
            {"image": str(part.absolute())} if isinstance(part, Path) else {"text": part}
            for part in request.parts
        ]
        line = dict(
            id=item.id,
            task=item.task,
            family=item.family,
            question=item.prompt,
            options=text_metrics.options(item.prompt) if item.family == "vqa_mcq" else {},
            images=list(item.images) if family.shows_image else [],
            prompt=parts,
            mode=request.mode,
            answer_format=family.answer_format,
            max_tokens=request.max_tokens,
            data_class=request.data_class,
        )
        lines.append(json.dumps(line) + "\n")
    Folder(out.absolute().parent).write(out.name, [line.encode() for line in lines])


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
        rows_of_file = read_objects(path, max_bytes=MAX_LINE)
    except TextFileError as error:
        raise PredictionsError(f"{error}; fix that line") from error
    for where, line in rows_of_file:
        place = where.removeprefix(f"{path} ")
        row = _row(line, where) | {"place": place}
        if row["id"] in rows:
            first = rows[row["id"]]["place"]
            raise PredictionsError(f"{where}: its id is also that of {first}; keep one of them")
        rows[row["id"]] = row
    return rows


def _row(row: dict, where: str) -> dict:
    if not isinstance(row.get("id"), str):
        raise PredictionsError(
            f'{where}: field \'id\' is missing or not a string; expected {{"id": ..., "text": ...}}'
        )
    prediction = {"id": row["id"], "text": row.get("text", ""), "images": row.get("images", [])}
    names = prediction["images"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PredictionsError(f"{where}: field 'images' is invalid; expected a list of paths")
    if not all(name.isprintable() and len(name) <= MAX_NAME for name in names):
        raise PredictionsError(
            f"{where}: a name in field 'images' is not printable, or longer than {MAX_NAME} "
            "characters; rename the file"
        )
    if not isinstance(prediction["text"], str) or not (
        prediction["text"] or names or "text" in row
    ):
        raise PredictionsError(f"{where}: fields 'text' and 'images' are empty; set one of them")
    if len(names) > MAX_IMAGES:
        raise PredictionsError(
            f"{where}: more than {MAX_IMAGES} images; keep at most {MAX_IMAGES} of them"
        )
    return prediction
