"""Asks a model every item once and keeps each answer on disk: interrupted, it goes on where it was.

    items -> by task, in batches -> answers -> records.jsonl, one line an item, flushed each batch
                                               records_images/*.png

A record holds the item, the answer, and for pictures their codes and what they look like.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import models, tasks
from medmax_jax.progress import Items

FLUSH = 32  # answers that are written down together
Progress = Callable[[str], None]
Looks = Callable[[np.ndarray, np.ndarray], str]  # (codes, pixels) of a drawn picture -> modality


class EvalError(ValueError):
    """An evaluation that cannot go on; the message names the file or item and the mend."""


def evaluate(
    model: models.Model,
    items: Sequence[tasks.Item],
    *,
    mode: str,
    images_folder: str | Path,
    out: str | Path,
    progress: Progress,
    looks: Looks | None = None,
    window: int = 256,
) -> list[dict[str, Any]]:
    """One record an item, in their order. `out`: JSONL that is appended to; what it has is kept.

    mode: of generation, paper or strict. progress: called with a line of text after each batch,
    when its records are on disk; it may raise to stop. looks: which modality a drawn picture looks
    like; None leaves `looks_like` open. window: items that a model is given at once.
    """
    if mode not in tasks.MODES:
        raise EvalError(f"mode is {mode!r}; use one of {', '.join(tasks.MODES)}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {record["id"]: record for record in read(out)}
    for item in items:
        _check_same(item, known.get(item.id), out)
    todo = [item for item in items if item.id not in known]
    clock = Items(len(todo), "items", progress, every=0.0)
    with open(out, "a", encoding="utf-8") as file:
        for family in tasks.FAMILIES:
            part = [item for item in todo if item.family == family]
            for start in range(0, len(part), window):
                some = part[start : start + window]
                asks = [ask(item, Path(images_folder), mode) for item in some]
                for batch in _batches(model, asks):
                    records = [_record(some[i], answer, out, looks) for i, answer in batch]
                    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
                    file.write("".join(lines))
                    file.flush()
                    known |= {record["id"]: record for record in records}
                    clock.tick(family, len(batch))
    return [known[item.id] for item in items]


def ask(item: tasks.Item, folder: Path, mode: str) -> models.Ask:
    """What a model is asked about an item."""
    family = tasks.FAMILIES[item.family]
    return models.Ask(
        id=item.id,
        parts=tasks.parts(item, folder),
        mode=family.mode,
        max_tokens=family.tokens[mode],
        data_class=item.data_class,
    )


def read(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a crash cut short is taken off it."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise EvalError(f"{path} line {number}: not JSON; delete that line") from error
    return records


def _batches(model: models.Model, asks: Sequence[models.Ask]):
    """Lists of (index, segments), as the model gets them ready."""
    stream = getattr(model, "stream", None)
    if stream is None:
        found = model.generate(asks)
        if len(found) != len(asks):
            raise EvalError(f"the model gave {len(found)} answers to {len(asks)} asks")
        yield list(enumerate(found))
        return
    batch: list = []
    for one in stream(asks):
        batch.append(one)
        if len(batch) == FLUSH:
            yield batch
            batch = []
    if batch:
        yield batch


def _record(item: tasks.Item, answer, out: Path, looks: Looks | None) -> dict[str, Any]:
    texts, pictures, codes = models.split(answer, where=f"item {item.id}")
    folder = out.with_name(f"{out.stem}_images")
    names = []
    for number, picture in enumerate(pictures):
        folder.mkdir(exist_ok=True)
        safe = re.sub(r"[^\w.-]+", "_", item.id)
        path = folder / f"{safe}_{number}.png"
        picture.save(path)
        names.append(f"{folder.name}/{path.name}")
    looks_like = None
    if looks is not None and tasks.FAMILIES[item.family].mode != "text":
        # nothing drawn looks like nothing
        looks_like = looks(codes[0], np.asarray(pictures[0])) if pictures else ""
    return _asked_of(item) | dict(
        text=" ".join(text.strip() for text in texts).strip(),
        images=names,
        codes=[one.tolist() for one in codes if one is not None],
        looks_like=looks_like,
    )


def _asked_of(item: tasks.Item) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(item)))


def _check_same(item: tasks.Item, record: dict[str, Any] | None, out: Path) -> None:
    asked = _asked_of(item)
    if record is not None and {name: record.get(name) for name in asked} != asked:
        raise EvalError(
            f"{out}: item {item.id} was another question when it was answered; "
            "use a fresh workdir for other items"
        )
