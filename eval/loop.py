"""Asks a model every item once and keeps each answer on disk: killed, it goes on where it was.

    items -> by family, in windows -> answers -> records.jsonl, one line an item, fsync a batch
                                                 records_images/*.png
             a part of them (--shard) -> records.shard_0_of_4.jsonl -> read by all later runs

A record holds the item, the answer, how it was read where no judge is needed, and for pictures
their codes and what they look like. One process writes a file: a second one is told to wait.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.journal import Journal, JournalError, open_journal, parse
from eval import history, models, reading, tasks
from medmax_jax import cli
from medmax_jax.progress import Items

FLUSH = 32  # answers that are written down together
Progress = Callable[[str], None]
Looks = Callable[[np.ndarray, np.ndarray], str]  # (codes, pixels) of a drawn picture -> modality


class EvalError(ValueError):
    """An evaluation that cannot go on; the message names the file or item and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `count`: every count-th item."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> "Shard":
        """Of "i/n"; "" is the whole."""
        if not text:
            return WHOLE
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or int(found[1]) >= int(found[2]):
            raise EvalError(f"--shard is {text!r}; write i/n with i from 0 to n - 1, like 0/4")
        return cls(index=int(found[1]), count=int(found[2]))

    def file(self, out: Path) -> Path:
        """Where this part's records go."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}.shard_{self.index}_of_{self.count}.jsonl")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(index=0, count=1)
# What every record has that a score, a page or a comparison is made of.
RECORD = ("id", "task", "family", "prompt", "answer", "image", "group", "text")


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
    prompt: str = "sft",
    shard: Shard = WHOLE,
    facts: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One record an item, in their order. `out`: JSONL that is appended to; what it has is kept.

    mode: of generation, paper or strict. prompt: the release's wording. progress: called with a
    line of text after each batch, when its records are on disk; it may raise to stop. looks: which
    modality a drawn picture looks like; None leaves `looks_like` open. window: items that a model
    is given at once. shard: asks and returns that part alone. facts: fingerprints that every record
    has; one with others belongs to another run, which raises.
    """
    if mode not in tasks.MODES:
        raise EvalError(f"mode is {mode!r}; use one of {', '.join(tasks.MODES)}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    items = [item for n, item in enumerate(items) if n % shard.count == shard.index]
    run = _Asking(model, mode, prompt, Path(images_folder), out, looks, facts or {})
    with _others(out, shard) as others, open_journal(shard.file(out)) as journal:
        own = checked(journal.rows, ("id",), journal.path)
        known = {record["id"]: record for record in (*others, *own)}
        for number, item in enumerate(items, start=1):
            name = tasks.item_name(item, number)
            _check_same(item, known.get(item.id), run.facts, f"{out}: item {name}")
        todo = [item for item in items if item.id not in known]
        log = history.Log(out.parent, shard.file(out).name, len(journal.rows), len(todo))
        clock = Items(len(todo), "items", progress, every=0.0)
        try:
            for family, some in _windows(todo, window):
                log.asking(len(some))
                for records in run.batches(some):
                    journal.append(*records)
                    known |= {record["id"]: record for record in records}
                    log.recorded(len(records))
                    clock.tick(family, len(records))
        finally:
            log.stop()
    lost = [
        tasks.item_name(item, number)
        for number, item in enumerate(items, start=1)
        if item.id not in known
    ]
    if lost:
        why = (
            f"{len(lost)} of {len(items)} items had no reply this time, the first is {lost[0]}"
            f"{models.last_error(model)}; the same command asks for these again"
        )
        progress(why)  # which may raise to stop
        raise cli.Interrupted(why)
    return [known[item.id] for item in items]


@dataclasses.dataclass
class _Asking:
    """How items are asked and what is written down."""

    model: models.Model
    mode: str
    prompt: str
    folder: Path
    out: Path
    looks: Looks | None
    facts: dict[str, str]

    def batches(self, items: Sequence[tasks.Item]):
        """Lists of records, as the model gets its answers ready."""
        asks = [ask(item, self.folder, self.mode, self.prompt) for item in items]
        for batch, seconds in _timed(_batches(self.model, asks)):
            each = round(seconds / len(batch), 4)
            yield [self.record(items[i], found) | {"seconds": each} for i, found in batch]

    def record(self, item: tasks.Item, found) -> dict[str, Any]:
        if isinstance(found, models.Failed):
            texts, pictures, codes, error = [], [], [], found.why
        else:
            texts, pictures, codes = models.split(found, where=_shown(item))
            error = ""
        looks_like = None
        if self.looks is not None and tasks.FAMILIES[item.family].mode != "text":
            # nothing drawn looks like nothing
            looks_like = self.looks(codes[0], np.asarray(pictures[0])) if pictures else ""
        text = " ".join(text.strip() for text in texts).strip()
        said = dict(
            text=text,
            images=self.saved(item, pictures),
            codes=[one.tolist() for one in codes if one is not None],
            looks_like=looks_like,
        )
        read = reading.read(item.family, text, item.answer, item.prompt)
        failed = {"error": error} if error else {}
        return asked_of(item) | said | read | failed | self.facts

    def saved(self, item: tasks.Item, pictures) -> list[str]:
        folder, names = self.out.with_name(f"{self.out.stem}_images"), []
        for number, picture in enumerate(pictures):
            folder.mkdir(exist_ok=True)
            safe = re.sub(r"[^\w.-]+", "_", item.id)
            path = folder / f"{safe}_{number}.png"
            partial = path.with_suffix(".partial")
            try:
                picture.save(partial, "PNG")
                partial.replace(path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise EvalError(
                    f"{path}: cannot be written ({error.strerror}); make room and go on"
                ) from error
            names.append(f"{folder.name}/{path.name}")
        return names


def ask(item: tasks.Item, folder: Path, mode: str, prompt: str = "sft") -> models.Ask:
    """What a model is asked about an item."""
    family = tasks.FAMILIES[item.family]
    return models.Ask(
        id=item.id,
        parts=tasks.parts(item, folder, prompt),
        mode=family.mode,
        max_tokens=family.tokens[mode],
        data_class=item.data_class,
        end_of_turn=tasks.ends_turn(item.family, prompt),
    )


def read(path: str | Path, fields: Sequence[str] = ("id",)) -> list[dict[str, Any]]:
    """The records of a file, each with `fields`; a last line that a crash cut short is none."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    try:
        return checked(parse(data[: data.rfind(b"\n") + 1], path), fields, path)
    except JournalError as error:
        raise EvalError(str(error)) from error


def checked(rows: list[dict[str, Any]], fields: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """The rows, where each has the fields and an id that is text; raises EvalError."""
    for number, row in enumerate(rows, start=1):
        if lacking := [name for name in fields if name not in row]:
            raise EvalError(f"{path} row {number}: no {lacking[0]}: damaged; delete that line")
        if not isinstance(row["id"], str):
            raise EvalError(f"{path} row {number}: id is no text: damaged; delete that line")
    return rows


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file that is there whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of the workdir atomically; raise EvalError where it cannot be written.

    The partial file has a name of its own: the parts of an evaluation (--shard) write at once.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise EvalError(
            f"{path}: cannot be written ({error.strerror}); free disk space or change its "
            "permissions, then give the same command again"
        ) from error


def _windows(todo: Sequence[tasks.Item], window: int):
    for family in tasks.FAMILIES:
        part = [item for item in todo if item.family == family]
        for start in range(0, len(part), window):
            yield family, part[start : start + window]


def files(out: Path) -> list[Path]:
    """The whole's file, which need not exist, and those of parts that do."""
    return [out, *sorted(out.parent.glob(f"{out.stem}.shard_*_of_*.jsonl"))]


@contextlib.contextmanager
def _others(out: Path, shard: Shard):
    """Records in the other files of the same name; the whole waits for no part that is writing."""
    own = shard.file(out)
    with contextlib.ExitStack() as stack:
        rows: list[dict[str, Any]] = []
        for path in files(out):
            if path == own or not path.exists():
                continue
            if shard.count == 1:
                journal: Journal = stack.enter_context(open_journal(path))
                rows += checked(journal.rows, ("id",), path)
            else:
                rows += read(path)
        yield rows


def _timed(batches):
    before = time.monotonic()
    for batch in batches:
        yield batch, time.monotonic() - before
        before = time.monotonic()


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


def _shown(item: tasks.Item) -> str:
    return "a credentialed item" if tasks.is_credentialed(item) else f"item {item.id}"


def asked_of(item: tasks.Item) -> dict[str, Any]:
    """The half of a record that is known before the answer."""
    return json.loads(json.dumps(tasks.item_fields(item)))


def _check_same(
    item: tasks.Item, record: dict[str, Any] | None, facts: dict[str, str], where: str
) -> None:
    if record is None:
        return
    asked = asked_of(item)
    if {name: record.get(name) for name in asked} != asked:
        raise EvalError(
            f"{where} was another question when it was answered; use a fresh workdir for other "
            "items"
        )
    for name, value in facts.items():
        if record.get(name) != value:
            raise EvalError(
                f"{where} has {name} {record.get(name)!r} and this run {value!r}: a record of "
                "another run; use a fresh workdir"
            )
