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
from medmax_jax.io.text_files import TextFileError, read_objects
from medmax_jax.storage.image_paths import is_inside


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
    rows = [_row(fields, f"{path} row {n}") for n, fields in enumerate(_jsonl(path), start=1)]
    if not rows:
        raise CaptionsError(f"{path}: the file has no rows; use a file of captions")
    seen: set[str] = set()
    for n, row in enumerate(rows, start=1):
        if row.id in seen:
            name = printable(repr(row.id), 80)
            name = f"of row {n}" if row.data_class == egress.CREDENTIALED else name
            raise CaptionsError(f"{path}: id {name} occurs twice; ids must be unique")
        seen.add(row.id)
    return rows


def read_scores(path: str | Path, *, secret: bool = False) -> dict[str, float | None]:
    """Return scores by id; null if an image has none. `secret`: messages repeat no value."""
    scores: dict[str, float | None] = {}
    for n, row in enumerate(_jsonl(path, allow_nonfinite=True), start=1):
        name, score = row.get("id"), row.get("score", "")
        number = type(score) in (int, float) and math.isfinite(score)
        if not isinstance(name, str) or name in scores or not (number or score is None):
            problem = printable(f"id is {name!r}, score is {score!r}", 120)
            problem = "id or score is invalid" if secret else problem
            raise CaptionsError(
                f"{path} row {n}: {problem}; expected a unique id and a finite number, or null if "
                "there is no score"
            )
        scores[name] = score
    return scores


def _jsonl(path: str | Path, *, allow_nonfinite: bool = False) -> list[dict[str, Any]]:
    try:
        return [row for _, row in read_objects(path, allow_nonfinite=allow_nonfinite)]
    except TextFileError as error:
        raise CaptionsError(f"{error}: cannot be read; fix the file") from error


def _row(row: dict[str, Any], where: str) -> Row:
    data_class = egress.data_class_of(row, where)
    for name in ("id", "caption", "source"):
        if not isinstance(row.get(name), str) or not (row[name] or name == "caption"):
            value = egress.describe(row, name)
            raise CaptionsError(f"{where}: field {name!r} is {value}; expected a string")
    image_path = [row["image_path"]] if "image_path" in row else None
    images = row.get("images", image_path)
    if not isinstance(images, list) or not images:
        value = egress.describe(row, "images")
        raise CaptionsError(f"{where}: field 'images' is {value}; expected a list of file names")
    for number, name in enumerate(images, start=1):
        if not is_inside(name):
            label = printable(repr(name), 80)
            label = label if data_class != egress.CREDENTIALED else str(number)
            raise CaptionsError(
                f"{where}: image {label} is not inside the folder; expected the name of a file "
                "below --images"
            )
    group = row.get("group", row["id"])
    if not isinstance(group, str):
        value = egress.describe(row, "group")
        raise CaptionsError(f"{where}: field 'group' is {value}; expected a string")
    return Row(
        id=row["id"],
        caption=row["caption"],
        images=tuple(images),
        source=row["source"],
        group=group,
        data_class=data_class,
    )
