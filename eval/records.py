"""Defines an item of the suite, and the record of its answer: one line of records.jsonl.

    Item(id="q1", task="slake_closed", family="vqa_closed", prompt="Is it a CT?", answer="yes", ..)
    EvalRecord(<the fields of the item>, text="Yes.", parsed="yes", strict="right", ..)
    {"id": "q1", "task": "slake_closed", .., "text": "Yes.", "images": [], "codes": [], ..}

A record is an item with an answer, so a function of items also accepts records. JSON is read and
written here only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from medmax_jax.endpoints import egress
from medmax_jax.io import journal

# The fields of every line from which a score, a page or a comparison is computed.
REQUIRED = ("id", "task", "family", "prompt", "answer", "image", "group", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Holds one question. `image`: shown, or the reference to generate, of a `modality`.

    task: its row in the tables, as in eval/tasks/catalog.py. slices: (name, value) pairs by which
    scores are also grouped. context: the description of the image for a judge. data_class: the
    class that medmax_jax/endpoints/egress.py checks before anything leaves the machine. released:
    (name, value) of the row that only the release's scoring uses, and the position of its image.
    further_images: those after the first, of a question about several images.
    """

    id: str
    task: str
    family: str
    prompt: str
    answer: str
    image: str
    group: str
    template: str
    facts: tuple[str, ...]  # facts that a caption should state; () where the rows have none
    modality: str
    slices: tuple[tuple[str, str], ...]
    context: str
    data_class: str
    released: tuple[tuple[str, str], ...] = ()
    further_images: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """Return all images, in order; () for a generation task without a reference image."""
        return (self.image, *self.further_images) if self.image else ()

    def item_fields(self) -> dict[str, Any]:
        """Return the item's fields as stored in files; `further_images` only if present."""
        values = {name: _stored(getattr(self, name)) for name in _ITEM}
        return {k: v for k, v in values.items() if v or k != "further_images"}


_ITEM = tuple(field.name for field in dataclasses.fields(Item))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord(Item):
    """Holds an item with the answer of a model.

    generated: files of the images in the answer, relative to the workdir, and `codes` of each where
    the model provides them. predicted_modality: of the first, "" for none, None where it was not
    classified. parsed, strict, paper: of closed and multiple choice answers only, what is stated,
    right, wrong or unparsed, and right or not by the MedMax release. error: why there is no answer.
    seconds: of the answer. model, data, config: fingerprints of what it depends on.
    """

    text: str
    generated: tuple[str, ...] = ()
    codes: Sequence[Sequence[int]] = ()
    predicted_modality: str | None = None
    parsed: str | None = None
    strict: str = ""
    paper: bool | None = None
    error: str = ""
    seconds: float | None = None
    model: str = ""
    data: str = ""
    config: str = ""

    @classmethod
    def of(cls, item: Item, **answer: Any) -> Self:
        """Return the record of an item."""
        return cls(**{name: getattr(item, name) for name in _ITEM}, **answer)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Return the record of a line that has at least REQUIRED; fields of others are ignored."""
        known = {name: row[name] for name in _RECORD if name in row}
        tuples = {name: _tuples(known.get(name) or ()) for name in _TUPLES}
        return cls(**_ABSENT | known | tuples | {"generated": tuple(row.get("images") or ())})

    def is_of(self, item: Item) -> bool:
        """Return whether this is a record of exactly this item."""
        return all(getattr(self, name) == getattr(item, name) for name in _ITEM)

    def to_json(self) -> dict[str, Any]:
        """Return the line of records.jsonl; what does not apply is absent."""
        row = self.item_fields() | {
            "text": self.text,
            "images": list(self.generated),
            "codes": list(self.codes),
            "predicted_modality": self.predicted_modality,
        }
        if self.strict:
            row |= {"parsed": self.parsed, "strict": self.strict, "paper": self.paper}
        names = ("error", "model", "data", "config")
        row |= {name: getattr(self, name) for name in names if getattr(self, name)}
        return row | ({} if self.seconds is None else {"seconds": self.seconds})


_RECORD = tuple(field.name for field in dataclasses.fields(EvalRecord) if field.name != "generated")
_TUPLES = ("facts", "slices", "released", "further_images")
_ABSENT = dict(template="", modality="", context="", data_class=egress.LICENCE_BOUND)


def is_credentialed(item: Item) -> bool:
    """Return whether the item must not be repeated or sent to a host that is not listed."""
    return item.data_class == egress.CREDENTIALED


def item_name(item: Item, number: int) -> str:
    """Return an item's name in messages: its id, or for a credentialed one its number from 1."""
    return f"number {number}" if is_credentialed(item) else item.id


def read_records(path: str | Path) -> list[EvalRecord]:
    """Return the records of a file; a truncated last line is ignored.

    Raises JournalError for a line that is not a record.
    """
    return [EvalRecord.from_json(row) for row in journal.read_jsonl(path, REQUIRED)]


def _stored(value: Any) -> Any:
    return list(map(_stored, value)) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
