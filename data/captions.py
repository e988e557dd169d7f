"""Captioned pictures and their scores, as JSONL that the curation starts from.

    {"id": "PMC1_f2", "caption": "CT of ...", "images": ["PMC1_f2.jpg"], "source": "PMC-OA",
     "data_class": "licence-bound", "group": "PMC1"}
    {"id": "PMC1_f2", "score": 0.31}

`image_path` with one name may stand for `images`, `credential` for `data_class` (see
outgoing.class_of). `group` is what a split must keep together, a patient or an article; the id
where it is not given.
"""

import collections
import dataclasses
import math
from pathlib import Path, PurePosixPath
from typing import Any

from data import outgoing
from data.journal import parse


class CaptionsError(ValueError):
    """A file of captions or scores that cannot be used; the message names the row and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One captioned picture. `images`: files below the folder of pictures."""

    id: str
    caption: str
    images: tuple[str, ...]
    source: str
    group: str
    data_class: str


def read_rows(path: str | Path) -> list[Row]:
    """The captions of a file, each checked; raises CaptionsError or OutgoingError."""
    rows = [_row(found, f"{path} row {n}") for n, found in enumerate(_jsonl(path), start=1)]
    if not rows:
        raise CaptionsError(f"{path}: has no rows; name a file of captions")
    twice = [i for i, n in collections.Counter(row.id for row in rows).items() if n > 1]
    if twice:
        raise CaptionsError(f"{path}: id {twice[0]!r} comes twice; ids must differ")
    return rows


def read_scores(path: str | Path) -> dict[str, float | None]:
    """Scores by id; null where a picture has none."""
    scores: dict[str, float | None] = {}
    for n, row in enumerate(_jsonl(path), start=1):
        name, score = row.get("id"), row.get("score", "")
        number = type(score) in (int, float) and math.isfinite(score)
        if not isinstance(name, str) or name in scores or not (number or score is None):
            raise CaptionsError(
                f"{path} row {n}: id {name!r}, score {score!r}; need an id that comes once and a "
                "finite number, or null where there is no score"
            )
        scores[name] = score
    return scores


def is_inside(name: Any) -> bool:
    """Whether it is the name of a file that cannot lie above its folder."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _jsonl(path: str | Path) -> list[dict[str, Any]]:
    try:
        return parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise CaptionsError(f"{path}: cannot be read ({error.strerror})") from error


def _row(found: dict[str, Any], where: str) -> Row:
    for name in ("id", "caption", "source"):
        if not isinstance(found.get(name), str) or not (found[name] or name == "caption"):
            raise CaptionsError(f"{where}: {name} is {found.get(name)!r}; give it a text")
    one = [found["image_path"]] if "image_path" in found else None
    images = found.get("images", one)
    if not isinstance(images, list) or not images:
        raise CaptionsError(f"{where}: images is {images!r}; give it a list of file names")
    for name in images:
        if not is_inside(name):
            raise CaptionsError(f"{where}: picture {name!r} is no file name below --images")
    group = found.get("group", found["id"])
    if not isinstance(group, str):
        raise CaptionsError(f"{where}: group is {group!r}; give it a text")
    return Row(
        id=found["id"],
        caption=found["caption"],
        images=tuple(images),
        source=found["source"],
        group=group,
        data_class=outgoing.class_of(found, where),
    )
