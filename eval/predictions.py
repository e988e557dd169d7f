"""Answers that are there already, as a model: JSONL of {"id", "text", "images": [paths]}.

Paths are relative to the file and stay under its folder. Items without a line are failed answers,
counted as such; a line without an item is an error, since it says that other items were answered.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from eval.models import Ask, Failed, Segment
from eval.tasks import Item
from medmax_jax import images

MAX_LINE = 1_000_000  # bytes
MAX_IMAGES = 16  # of an answer
MAX_IMAGE_BYTES = 20_000_000
MAX_PIXELS = 64_000_000


class PredictionsError(ValueError):
    """Predictions that cannot be used; the message names the line and the mend."""


class Predictions:
    """Answers by the item's id. `missing`: how many items have none."""

    no_options = "predictions are texts; nobody told their likelihoods"

    def __init__(self, path: str | Path, items: Sequence[Item]):
        self.path = Path(path)
        self.name, self.fingerprint = self.path.name, digest(self.path)
        self._rows = _read(self.path)
        known = {item.id for item in items}
        strange = [name for name in self._rows if name not in known]
        if strange:
            raise PredictionsError(
                f"{path}: {len(strange)} ids are no items of this evaluation, the first is "
                f"{strange[0]!r}; predict the items of this config, or leave those lines out"
            )
        self.missing = len(known) - len(self._rows)
        if self.missing == len(known):
            raise PredictionsError(f"{path}: has no predictions; write a line for each item")

    def generate(self, asks: Sequence[Ask]) -> list[list[Segment] | Failed]:
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: Ask) -> list[Segment] | Failed:
        row = self._rows.get(ask.id)
        if row is None:
            return Failed(why=f"no prediction in {self.path.name}")
        return [row["text"], *(self._image(ask.id, name) for name in row["images"])]

    def _image(self, where: str, name: str) -> PIL.Image.Image:
        folder = self.path.parent.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise PredictionsError(
                f"{self.path}: {where}: image {name!r} is no file under {folder}; put it there"
            )
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise PredictionsError(f"{path}: more than {MAX_IMAGE_BYTES} bytes; make it smaller")
        try:
            return images.load(path, max_pixels=MAX_PIXELS)
        except images.ImageError as error:
            raise PredictionsError(str(error)) from error


def digest(path: str | Path) -> str:
    """Of the file's bytes; the pictures that it names are not in it."""
    try:
        return "predictions:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise PredictionsError(
            f"--model predictions:{path}: {error.strerror}; name a JSONL file"
        ) from error


def _read(path: Path) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path} line {number}"
            if len(line) > MAX_LINE:
                raise PredictionsError(f"{where}: longer than {MAX_LINE} bytes; shorten it")
            if not line.strip():
                continue
            row = _row(line, where)
            if row["id"] in rows:
                raise PredictionsError(f"{where}: id {row['id']!r} comes twice; keep one")
            rows[row["id"]] = row
    return rows


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{where}: not JSON ({error}); mend it") from error
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise PredictionsError(f'{where}: no id; write {{"id": ..., "text": ...}}')
    found = {"id": row["id"], "text": row.get("text", ""), "images": row.get("images", [])}
    names = found["images"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PredictionsError(f"{where}: images is no list of paths; mend it")
    if not isinstance(found["text"], str) or not (found["text"] or names or "text" in row):
        raise PredictionsError(f"{where}: no text and no images; write one of them")
    if len(names) > MAX_IMAGES:
        raise PredictionsError(f"{where}: more than {MAX_IMAGES} images; keep the first ones")
    return found
