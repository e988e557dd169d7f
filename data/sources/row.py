"""Define one row of a source in the schema of the MedMax release, or the reason for its rejection.

    Row(id="SLAKE/train-0000002", text="<image>Is this a CT?<reserved08706>yes", turns=1,
        image="imgs/xmlab1/source.jpg", task="VQA", source="SLAKE", split="train", group="xmlab1")

A row that cannot be used is a RejectedRow: malformed, or left out by a rule that
docs/reference/data_sources.md states. Its reason repeats nothing of the row, so that reasons can be
counted, and printed for any source.
"""

import dataclasses
import functools
import math
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from medmax_jax.data.mixture import CAPTION, GENERATION
from medmax_jax.data.records.row_streams import RowLocation, SourceError
from medmax_jax.io.text_files import LONE_SURROGATE, TextFileError, read_json
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME
from medmax_jax.storage.image_paths import is_inside

RowType = TypeVar("RowType")
SPLITS = ("train", "validation", "test")
MAX_TEXT = 100_000  # characters of one part; the longest released document has 2,048 tokens


class RowError(ValueError):
    """A row that does not follow its format."""


class ExcludedRow(RowError):
    """A valid row that a rule of the rebuild leaves out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The request to a reader. `caption_share`: captioning among captioning and generation."""

    source: str  # a name of data.mixture
    split: str
    seed: int
    caption_share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One document. `image`: its location in the folder, or its bytes; `image_path`: its name."""

    id: str
    text: str
    image: str | bytes | None
    image_path: str
    task: str
    source: str
    split: str
    group: str  # patient, article, video or image: must not be on both sides of a split
    turns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A row that gives no document. `by_rule`: valid, but left out."""

    where: str
    reason: str
    by_rule: bool = False


def collect_rows(
    items: Iterable[tuple[RowLocation, Any]], make: Callable[[RowLocation, dict[str, Any]], RowType]
) -> Iterator[RowType | RejectedRow]:
    """Yield the rows of items, and a RejectedRow for each that `make` rejects."""
    for place, item in items:
        try:
            if isinstance(item, TextFileError):
                raise RowError(item.reason)
            if not isinstance(item, dict):
                raise RowError("not a complete row of its file")
            yield make(place, item)
        except ExcludedRow as error:
            yield RejectedRow(where=str(place), reason=str(error), by_rule=True)
        except RowError as error:
            yield RejectedRow(where=str(place), reason=str(error))


def field_text(item: dict[str, Any], key: str) -> str:
    """Return a field as text; numbers count, as some published answers are numbers; NaN is none."""
    value = item.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"{key}: missing or not text")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{key}: missing or not text")
    return clean(str(value), key)


def clean(text: str, key: str) -> str:
    """Return text allowed in a document: stripped, not empty, without names of control tokens."""
    text = text.strip()
    if not text:
        raise RowError(f"{key}: empty")
    if len(text) > MAX_TEXT:
        raise RowError(f"{key}: more than {MAX_TEXT} characters")
    if IMAGE_NAME in text or SEP_NAME in text:
        raise RowError(f"{key}: contains {IMAGE_NAME} or {SEP_NAME}")
    _check_characters(text, key)
    return text


def field_image_path(item: dict[str, Any], key: str, root: str) -> str:
    """Return a path inside the source's folder; one that leads out of it is rejected."""
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key}: missing or not the path of an image")
    if not is_inside(value.strip()):
        raise RowError(f"{key}: leads out of the folder")
    _check_characters(value, key)
    return str(pathlib.PurePosixPath(root, value.strip()))


def _check_characters(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{key}: {LONE_SURROGATE}") from error


def join_turns(turns: list[tuple[str, str]], *, image: str) -> str:
    """Join questions and answers with separators; `image`: start or end of the question.

    join_turns([("Is it a CT?", "yes"), ("Of what?", "the head")], image="start")
    ->  "<image>Is it a CT?<reserved08706>yes<reserved08706>Of what?<reserved08706>the head"
    """
    (question, answer), *further = turns
    first = question + IMAGE_NAME if image == "end" else IMAGE_NAME + question
    return SEP_NAME.join([first, answer, *(part for turn in further for part in turn)])


def seeded_rng(*names: Any) -> random.Random:
    """Return random numbers that are a function of names: the same in every process and order."""
    return random.Random("/".join(map(str, names)))


def find_root(folder: pathlib.Path, names: tuple[str, ...]) -> str:
    """Return the first of `names` that is a folder in `folder`: archives differ in layout."""
    return next((name for name in names if (folder / name).is_dir()), names[0])


def first_file(folder: pathlib.Path, names: Iterable[str], source: str) -> pathlib.Path:
    """Return the first of `names` that the folder has."""
    names = tuple(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise SourceError(f"{source}: the folder contains none of {', '.join(names)}; check --from")


# ---- Questions for the sources that have images and captions or reports, but no questions ----
#
# prompts.json holds for each kind the wordings that occur in the MedMax release (its figures, demo
# and evaluation) and our own; which the training rows used is not published. {} marks the position
# of the caption or the report.


@functools.cache
def templates(kind: str) -> tuple[str, ...]:
    """Return all wordings of a kind, those of the MedMax release first."""
    table = read_json(pathlib.Path(__file__).parent / "prompts.json")
    return tuple(table[kind]["released"] + table[kind]["ours"])


def choose_template(kind: str, plan: Plan, row_id: str) -> str:
    """Return the wording of one row: a function of seed and id."""
    return seeded_rng(plan.seed, kind, row_id).choice(templates(kind))


def caption_task(
    plan: Plan,
    place: RowLocation,
    caption: str,
    *,
    question: str | None,
    image: str,
    split: str,
    group: str,
) -> Row:
    """Return an image and its caption as captioning or generation, drawn by seed and id.

    `question`: the question that the source itself has for its caption, if any.
    """
    row_id = place.id(plan.source)
    if seeded_rng(plan.seed, "task", row_id).random() < plan.caption_share:
        question = question or choose_template("caption", plan, row_id)
        text, task = join_turns([(question, caption)], image="start"), CAPTION
    else:
        prompt = choose_template("generation", plan, row_id).format(caption)
        text, task = f"{prompt}{SEP_NAME}{IMAGE_NAME}", GENERATION
    return Row(
        id=row_id,
        text=text,
        image=image,
        image_path=image,
        task=task,
        source=plan.source,
        split=split,
        group=group,
        turns=1,
    )
