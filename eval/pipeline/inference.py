"""Runs a model on every item once, stores each answer on disk, and resumes after interruptions.

    items -> by family, in windows -> answers -> records.jsonl, one line per item, fsync per batch
                                                 records_images/*.png
             one part (--shard)     -> records.shard_0_of_4.jsonl -> read by all later runs

A record holds the item, the answer, how the answer was parsed where no judge is needed, and for
images their codes and the predicted modality. One process writes a file; a second one stops
with an error until the first one has ended.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax import cli
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import per_record, release
from medmax_jax.eval.models import base
from medmax_jax.eval.models.base import ModalityClassifier
from medmax_jax.eval.pipeline import perturbation
from medmax_jax.eval.records import (
    REQUIRED,
    EvalRecord,
    Item,
    is_credentialed,
    item_name,
    read_records,
)
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks.families import FAMILIES, MODES
from medmax_jax.eval.tasks.selection import WHOLE, Shard
from medmax_jax.io import journal as io_journal
from medmax_jax.io.journal import Journal, open_journal
from medmax_jax.io.progress import ItemProgress, report_waits
from medmax_jax.io.text_files import TextFileError, parse_object

FLUSH = 32  # answers that are written together
Progress = Callable[[str], None]


def run_items(
    model: base.Model,
    items: Sequence[Item],
    *,
    mode: str,
    images_folder: str | Path,
    out: str | Path,
    progress: Progress,
    classify_modality: ModalityClassifier | None = None,
    window: int = 256,
    prompt: str = "sft",
    shard: Shard = WHOLE,
    facts: dict[str, str] | None = None,
    perturbed: Path | None = None,
) -> list[EvalRecord]:
    """Return one record per item, in their order; `out` is the JSONL file that is appended to.

    Existing records in `out` are kept.

    mode: of generation, paper or strict. prompt: the wording of the MedMax release. progress:
    called with a line of text after each batch, when its records are on disk; it may raise to stop.
    classify_modality: predicts the modality of a generated image; with None the record has None.
    window: items that a model receives at once. shard: runs and returns that part alone. facts:
    fingerprints that every record has; a record with others belongs to another run and raises.
    perturbed: the folder of perturbed images; None: the images are shown as they are.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    per_record.check_names(shard_files(out))
    items = [item for n, item in enumerate(items) if n % shard.count == shard.index]
    runner = _ItemRunner(
        model, mode, prompt, Path(images_folder), out, classify_modality, facts or {}, perturbed
    )
    with _other_shards(out, shard) as other_records, open_journal(shard.file(out)) as journal:
        own_records = _records(journal.rows, journal.path)
        records_by_id = {record.id: record for record in (*other_records, *own_records)}
        for number, item in enumerate(items, start=1):
            name = item_name(item, number)
            _check_same(item, records_by_id.get(item.id), runner.facts, f"{out}: item {name}")
        todo = [item for item in items if item.id not in records_by_id]
        history = shard.file(out.with_name(NAME))
        log = ProgressLog(history, shard.file(out).name, len(journal.rows), len(todo))
        item_progress = ItemProgress(len(todo), "items", progress, every=0.0)
        try:
            for family, window_items in _windows(todo, window):
                log.started(len(window_items))
                waiting = f"{family}: waiting for answers (a native model compiles first)"
                for records in report_waits(runner.batches(window_items), waiting, progress):
                    journal.append(*(record.to_json() for record in records))
                    records_by_id |= {record.id: record for record in records}
                    log.finished(len(records))
                    item_progress.tick(family, len(records))
        finally:
            log.stop()
    check_complete(items, records_by_id, model, progress)
    return [records_by_id[item.id] for item in items]


def check_complete(
    items: Sequence[Item],
    records_by_id: Mapping[str, Any],
    model: base.Model,
    progress: Progress,
) -> None:
    """Raise Interrupted if items had no reply, so that the same command requests them again."""
    missing = [
        item_name(item, number)
        for number, item in enumerate(items, start=1)
        if item.id not in records_by_id
    ]
    if missing:
        message = (
            f"{len(missing)} of {len(items)} items had no reply in this run (first: {missing[0]})"
            f"{base.last_error(model)}; rerun the same command to request them again"
        )
        progress(message)  # which may raise to stop
        raise cli.Interrupted(message)


@dataclasses.dataclass
class _ItemRunner:
    """Sends items to a model and formats the records to write."""

    model: base.Model
    mode: str
    prompt: str
    folder: Path
    out: Path
    classify_modality: ModalityClassifier | None
    facts: dict[str, str]
    perturbed: Path | None

    def batches(self, items: Sequence[Item]):
        """Yield lists of records in the order in which the model completes its answers."""
        requests = [
            make_request(item, self.folder, self.mode, self.prompt, perturbed=self.perturbed)
            for item in items
        ]
        for batch, seconds in _timed(answer_batches(self.model, requests)):
            seconds_per_item = round(seconds / len(batch), 4)
            yield [self.record(items[index], answer, seconds_per_item) for index, answer in batch]

    def record(self, item: Item, answer, seconds: float) -> EvalRecord:
        if isinstance(answer, base.FailedResponse):
            texts, generated, codes, error = [], [], [], answer.why
        else:
            texts, generated, codes = base.split_segments(answer, where=item_label(item))
            error = ""
        predicted_modality = None
        if self.classify_modality is not None and FAMILIES[item.family].mode != "text":
            # An answer without an image has no predicted modality.
            predicted_modality = (
                self.classify_modality(codes[0], np.asarray(generated[0])) if generated else ""
            )
        text = " ".join(text.strip() for text in texts).strip()
        return EvalRecord.of(
            item,
            text=text,
            generated=tuple(self._save_images(item, generated)),
            codes=[image_codes.tolist() for image_codes in codes if image_codes is not None],
            predicted_modality=predicted_modality,
            **release.parse_and_judge(item.family, text, item.answer, item.prompt),
            error=error,
            seconds=seconds,
            **self.facts,
        )

    def _save_images(self, item: Item, generated) -> list[str]:
        folder, names = self.out.with_name(f"{self.out.stem}_images"), []
        for number, image in enumerate(generated):
            folder.mkdir(exist_ok=True)
            safe = re.sub(r"[^\w.-]+", "_", item.id)
            path = folder / f"{safe}_{number}.png"
            partial = path.with_suffix(".partial")
            try:
                image.save(partial, "PNG")
                partial.replace(path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise EvalError(
                    f"cannot write {path} ({error.strerror}); free disk space and rerun the same "
                    "command"
                ) from error
            names.append(f"{folder.name}/{path.name}")
        return names


def make_request(
    item: Item,
    folder: Path,
    mode: str,
    prompt: str = "sft",
    *,
    perturbed: Path | None = None,
) -> base.ModelRequest:
    """Return the request that a model receives for an item; raise EvalError on another mode.

    perturbed: the folder into which perturbed images are written, see perturbation.py.
    """
    if mode not in MODES:
        raise EvalError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    family = FAMILIES[item.family]
    parts = task_items.prompt_parts(item, folder, prompt)
    if perturbed is not None:
        parts = perturbation.perturbed_parts(parts, item.id, perturbed)
    return base.ModelRequest(
        id=item.id,
        parts=parts,
        mode=family.mode,
        max_tokens=family.tokens[mode],
        data_class=item.data_class,
        end_of_turn=task_items.uses_end_of_turn(item.family, prompt),
    )


def _windows(todo: Sequence[Item], window: int):
    for family in FAMILIES:
        part = [item for item in todo if item.family == family]
        for start in range(0, len(part), window):
            yield family, part[start : start + window]


def shard_files(out: Path) -> list[Path]:
    """Return the file of the complete run, which may be missing, and the shard files that exist."""
    return [out, *sorted(out.parent.glob(f"{out.stem}.shard_*_of_*.jsonl"))]


@contextlib.contextmanager
def _other_shards(out: Path, shard: Shard):
    """Yield records of the other files of this name; the complete run ignores locked shards."""
    own = shard.file(out)
    with contextlib.ExitStack() as stack:
        records: list[EvalRecord] = []
        for path in shard_files(out):
            if path == own or not path.exists():
                continue
            if shard.count == 1:
                journal: Journal = stack.enter_context(open_journal(path))
                records += _records(journal.rows, path)
            else:
                records += read_records(path)
        yield records


def _records(rows: list[dict[str, Any]], path: Path) -> list[EvalRecord]:
    return [EvalRecord.from_json(row) for row in io_journal.checked(rows, REQUIRED, path)]


def _timed(batches):
    before = time.monotonic()
    for batch in batches:
        yield batch, time.monotonic() - before
        before = time.monotonic()


def answer_batches(model: base.Model, requests: Sequence[base.ModelRequest]):
    """Yield lists of (index, segments) as the model completes them."""
    stream = getattr(model, "stream", None)
    if stream is None:
        answers = model.generate(list(requests))
        if not isinstance(answers, Sequence):
            raise EvalError(
                f"generate() returned {type(answers).__name__}; it must return a list with one "
                "answer per request"
            )
        if len(answers) != len(requests):
            raise EvalError(
                f"generate() returned {len(answers)} answers to {len(requests)} requests; it must "
                "return one per request"
            )
        yield list(enumerate(answers))
        return
    batch: list = []
    for result in stream(requests):
        batch.append(result)
        if len(batch) == FLUSH:
            yield batch
            batch = []
    if batch:
        yield batch


def item_label(item: Item) -> str:
    """Return an item's name in messages about its answer."""
    return "a credentialed item" if is_credentialed(item) else f"item {item.id}"


def _check_same(item: Item, record: EvalRecord | None, facts: dict[str, str], where: str) -> None:
    if record is None:
        return
    if not record.is_of(item):
        raise EvalError(
            f"{where} differs from the item that was answered before; use a new workdir for other "
            "items"
        )
    for name, value in facts.items():
        recorded = getattr(record, name)
        if recorded != value:
            raise EvalError(
                f"{where} has {name} {recorded!r}, but this run has {value!r}: the record belongs "
                "to another run; use a new workdir"
            )


# ---- history.jsonl: requests, records and repeated requests over all starts of a workdir ----
#
#     {"event": "start", "file": "records.jsonl", "had": 32, "left": 68}
#     {"event": "asking", "count": 32}     {"event": "stop", "recorded": 32, "seconds": 4.1}
#
# Each shard has a file of its own. A killed process writes no stop: its requests without a record
# are repeated, and `totals` counts them.

NAME = "history.jsonl"


class ProgressLog:
    """Writes the events of one run for one file of records."""

    def __init__(self, path: Path, file: str, recorded: int, left: int):
        self._path, self._file = path, file
        self._recorded, self._start = 0, time.monotonic()
        self._add("start", had=recorded, left=left)

    def started(self, count: int) -> None:
        """Log that `count` items are about to be given to the model."""
        self._add("asking", count=count)

    def finished(self, count: int) -> None:
        """Log that `count` more records are on disk."""
        self._recorded += count

    def stop(self) -> None:
        """Write the last line of a run that ends normally."""
        seconds = round(time.monotonic() - self._start, 3)
        self._add("stop", recorded=self._recorded, seconds=seconds)

    def _add(self, event: str, **fields: Any) -> None:
        line = {"event": event, "file": self._file, "time": round(time.time(), 3)} | fields
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; None for a line without the fields that `totals` reads."""
    try:
        row = parse_object(line, NAME, allow_nonfinite=True)
    except TextFileError:
        return None
    values = [row.get(name, 0) for name in ("count", "had", "seconds")]
    names = all(isinstance(row.get(name), str) for name in ("file", "event"))
    had = row.get("event") != "start" or "had" in row
    return row if names and had and all(type(n) in (int, float) for n in values) else None


def totals(folder: Path) -> dict[str, dict[str, Any]]:
    """Return file -> {starts, asked, recorded, repeated, seconds}.

    repeated: an upper bound, counted by windows.
    """
    by_file: dict[str, dict[str, Any]] = {}
    files = [path for path in shard_files(folder / NAME) if path.exists()]
    for line in (line for path in files for line in path.read_bytes().splitlines()):
        row = _event(line)
        if row is None:  # a partial line, from a full disk
            continue
        counts = by_file.setdefault(
            row["file"], dict(starts=0, asked=0, recorded=0, repeated=0, seconds=0.0)
        )
        if row["event"] == "start":
            counts["starts"] += 1
            counts["repeated"] = counts["asked"] - row["had"]
        counts["asked"] += row.get("count", 0)
        counts["seconds"] += row.get("seconds", 0.0)
    for file, counts in by_file.items():
        records = folder / file
        lines = records.read_bytes().count(b"\n") if records.exists() else 0
        counts["recorded"] = lines
        counts["seconds"] = round(counts["seconds"], 3)
    return by_file
