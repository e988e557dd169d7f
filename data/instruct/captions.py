"""Read captioned images and their scores: the JSONL files that the curation starts from.

    {"id": "PMC1_f2", "caption": "CT of ...", "images": ["PMC1_f2.jpg"], "source": "PMC-OA",
     "data_class": "licence-bound", "group": "PMC1"}
    {"id": "PMC1_f2", "score": 0.31}

`image_path` with one name may replace `images`, `credential` may replace `data_class` (see
egress.data_class_of). `group` is what a split must keep together, a patient or an article; it
defaults to the id.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import egress
from medmax_jax.io.errors import printable
from medmax_jax.io.image_paths import is_inside
from medmax_jax.io.text_files import TextFileError, read_objects


class CaptionsError(ValueError):
    """A file of captions or scores that cannot be used; the message names the row and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One captioned image. `images`: files below the folder of images."""

    id: str
    caption: str
    images: tuple[str, ...]
    source: str
    group: str
    data_class: str


def read_rows(path: str | Path) -> list[Row]:
    """Return the captions of a file, each checked; raise CaptionsError or OutgoingError."""
    rows = [_row(found, f"{path} row {n}") for n, found in enumerate(_jsonl(path), start=1)]
    if not rows:
        raise CaptionsError(f"{path}: has no rows; name a file of captions")
    seen: set[str] = set()
    for n, row in enumerate(rows, start=1):
        if row.id in seen:
            shown = printable(repr(row.id), 80)
            shown = f"of row {n}" if row.data_class == egress.CREDENTIALED else shown
            raise CaptionsError(f"{path}: id {shown} comes twice; ids must differ")
        seen.add(row.id)
    return rows


def read_scores(path: str | Path, *, secret: bool = False) -> dict[str, float | None]:
    """Return scores by id; null if an image has none. `secret`: messages repeat no value."""
    scores: dict[str, float | None] = {}
    for n, row in enumerate(_jsonl(path, allow_nonfinite=True), start=1):
        name, score = row.get("id"), row.get("score", "")
        number = type(score) in (int, float) and math.isfinite(score)
        if not isinstance(name, str) or name in scores or not (number or score is None):
            shown = printable(f"id {name!r}, score {score!r}", 120)
            shown = "id or score is wrong" if secret else shown
            raise CaptionsError(
                f"{path} row {n}: {shown}; need an id that comes once and a finite number, or null "
                "where there is no score"
            )
        scores[name] = score
    return scores


def _jsonl(path: str | Path, **rules: bool) -> list[dict[str, Any]]:
    try:
        return [row for _, row in read_objects(path, **rules)]
    except TextFileError as error:
        raise CaptionsError(f"{error}: cannot be read; mend it") from error


def _row(found: dict[str, Any], where: str) -> Row:
    data_class = egress.data_class_of(found, where)
    for name in ("id", "caption", "source"):
        if not isinstance(found.get(name), str) or not (found[name] or name == "caption"):
            shown = egress.describe(found, name)
            raise CaptionsError(f"{where}: {name} is {shown}; give it a text")
    one = [found["image_path"]] if "image_path" in found else None
    images = found.get("images", one)
    if not isinstance(images, list) or not images:
        shown = egress.describe(found, "images")
        raise CaptionsError(f"{where}: images is {shown}; give it a list of file names")
    for number, name in enumerate(images, start=1):
        if not is_inside(name):
            shown = printable(repr(name), 80)
            shown = shown if data_class != egress.CREDENTIALED else str(number)
            raise CaptionsError(f"{where}: picture {shown} is no file name below --images")
    group = found.get("group", found["id"])
    if not isinstance(group, str):
        shown = egress.describe(found, "group")
        raise CaptionsError(f"{where}: group is {shown}; give it a text")
    return Row(
        id=found["id"],
        caption=found["caption"],
        images=tuple(images),
        source=found["source"],
        group=group,
        data_class=data_class,
    )
