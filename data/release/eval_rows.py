"""Convert the published evaluation parquet to items.jsonl, read by eval.run's config.questions.

    task_name, question_type, prompt, answer, image_path  ->  the same and an id, one JSON per line

Rows are read batch by batch. A row of a task or question type that the suite does not have is not
guessed at: all such rows are listed, and nothing is written. The answer of visual_chat is a
dictionary as text; it is checked by chat_answers.py and remains text. The data set is gated, so the
file is 0600.
"""

import collections
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medmax_jax.data.mixture import RELEASED_ROWS, RELEASED_TOGETHER
from medmax_jax.data.release import chat_answers
from medmax_jax.data.release.train_rows import PublishedError
from medmax_jax.io.progress import ByteProgress
from medmax_jax.storage.atomic_folder import private_umask
from medmax_jax.storage.folder import Folder, StorageError, check_name

COLUMNS = ("task_name", "question_type", "prompt", "answer", "image_path")
YES_NO, LETTER = ("closed", "open"), ("mcq",)
SOURCES = ("pmc_oa", "quilt", "report")
QUESTION_TYPES: Mapping[
    str, Sequence[str] | None
] = {  # task_name -> question_type; None: any, or none
    "vqa_rad": YES_NO,
    "slake": YES_NO,
    "pathvqa": YES_NO,
    "quilt_vqa": YES_NO,
    "pmc_vqa": LETTER,
    "omnimed_vqa": LETTER,
    "path_mmu": LETTER,
    "probmed": ("closed",),
    "mm_out": None,
    "visual_chat": ("conversation", "detailed_description"),
    "image_captioning": SOURCES,
    "image_generation": SOURCES,
}
BLANK = {("image_generation", "answer")}  # its caption is the prompt
BATCH = 256  # rows
MAX_ROWS = 1_000_000  # 9.47k are published
MAX_TEXT = 1 << 20  # characters of a column
MAX_GROUP = 1 << 30  # bytes of a row group, which the reader may hold at once
SHOWN = 20  # kinds of bad rows in an error


def import_items(
    path: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str],
    allow_counts: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the rows of `tasks`, [] for all, as JSONL; the file is written atomically.

    `allow_counts`: continue with other numbers of rows than are published, and report them.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    if unknown := [t for t in tasks if t not in QUESTION_TYPES]:
        raise PublishedError(
            f"--tasks has {unknown[0]!r}; use names from {', '.join(QUESTION_TYPES)}"
        )
    if os.path.lexists(out):
        raise PublishedError(f"{out}: exists; use another --out, or delete it")
    kept: collections.Counter[str] = collections.Counter()
    bad: dict[str, list[int]] = {}
    with private_umask(), Folder(out.parent).stream(out.name) as file:
        for number, row in _rows(path, say):
            if problem := _problem(row):
                count, first = bad.get(problem, (0, number))
                bad[problem] = [count + 1, first]
            elif not tasks or row["task_name"] in tasks:
                kept[row["task_name"]] += 1
                # ASCII, since eval/run.py would split a string at the line ends of Unicode
                file.write(json.dumps(_item(number, row)).encode() + b"\n")
        _check(path, bad, kept)
        other = _other_counts(kept, tasks)
        if other and not allow_counts:
            raise PublishedError(
                f"{path}: {'; '.join(other)}; download the file again, or accept it with "
                "--allow_counts"
            )
    return dict(
        items=str(out),
        rows=kept.total(),
        tasks=dict(sorted(kept.items())),
        other_counts=other,
    )


def _other_counts(kept: collections.Counter[str], tasks: Sequence[str]) -> list[str]:
    """Return where the numbers of rows differ from the public ones."""
    (low, high), (pair, together) = RELEASED_ROWS, RELEASED_TOGETHER
    differences = []
    if not tasks and not low <= kept.total() <= high:
        differences.append(f"{kept.total()} rows, but {low} to {high} are published")
    count = sum(kept[name] for name in pair)
    if (not tasks or set(pair) <= set(tasks)) and count != together:
        differences.append(f"{count} rows of {' and '.join(pair)}, but {together} are published")
    return differences


def _rows(path: Path, say: Callable[[str], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 0, the five columns) of each row."""
    if not path.is_file():
        raise PublishedError(f"{path}: no such file; set --from to the published parquet")
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(path, file)
            rows = file.metadata.num_rows
            progress, number = ByteProgress(path.stat().st_size, say), 0
            for batch in file.iter_batches(batch_size=BATCH, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
                progress(path.stat().st_size * batch.num_rows // rows)
            progress.done(f"{number} rows of {path.name}")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise PublishedError(
            f"{path}: not a parquet file, or damaged ({str(error)[:200]}); copy it again"
        ) from error


def _check_schema(path: Path, file: pq.ParquetFile) -> None:
    schema, meta = file.schema_arrow, file.metadata
    for name in COLUMNS:
        if name not in schema.names:
            raise PublishedError(
                f"{path}: column {name} is missing; the published file has {', '.join(COLUMNS)}"
            )
        dtype = schema.field(name).type
        dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
        if not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
            raise PublishedError(f"{path}: column {name} is {dtype}; expected text")
    groups = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    if meta.num_rows > MAX_ROWS or max(groups, default=0) > MAX_GROUP:
        raise PublishedError(
            f"{path}: {meta.num_rows} rows, in groups of up to {max(groups)} bytes; the limits are "
            f"{MAX_ROWS} and {MAX_GROUP}; split it into several files"
        )


def _problem(row: dict[str, Any]) -> str:
    """Return why the row is not an item, or ''."""
    task, kind = row["task_name"], row["question_type"]
    types = QUESTION_TYPES.get(task, ())
    if types is not None and kind not in types:
        return f"unknown {str(task)[:40]} / {str(kind)[:40]}"
    for name in ("prompt", "answer", "image_path"):
        value = row[name]
        if not value and (task, name) not in BLANK:
            return f"{task}: {name} is missing"
        if value and len(value) > MAX_TEXT:
            return f"{task}: {name} has more than {MAX_TEXT} characters"
    try:
        check_name("image_path", row["image_path"].removeprefix("./"))
        if task == "visual_chat":
            chat_answers.read(row["answer"])
    except StorageError:
        return f"{task}: image_path leaves its folder"
    except chat_answers.ChatAnswerError as error:
        return f"{task}: {error}"
    return ""


def _item(number: int, row: dict[str, Any]) -> dict[str, str]:
    item = {name: row[name] or "" for name in COLUMNS}
    item["image_path"] = item["image_path"].removeprefix("./")
    return item | {"id": f"{row['task_name']}-{number:06d}"}


def _check(path: Path, bad: dict[str, list[int]], kept: collections.Counter[str]) -> None:
    if bad:
        kinds = [f"{why} ({n} rows, first {first})" for why, (n, first) in sorted(bad.items())]
        rest = f", and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
        raise PublishedError(
            f"{path}: rows that no task of the suite accepts: {', '.join(kinds[:SHOWN])}{rest}; "
            "remove them from the file, or add their task to data/release/eval_rows.py"
        )
    if not kept:
        raise PublishedError(f"{path}: no row of the requested tasks; check --tasks")
