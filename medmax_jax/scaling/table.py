"""Read a CSV of runs as columns of numbers; record excluded rows and which rows are one run.

    run,params,tokens,loss,loss_text,loss_image     header; other columns are ignored
    3f2a91c0de,1200000,5.2e6,3.41,1.72,4.61

`run` is optional: rows that share it are checkpoints of one training run, which the bootstrap draws
together.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_jax.io.csv_files import csv_table
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, open_binary
from medmax_jax.scaling.laws import Columns, Law, ScalingError

_RULE = re.compile(r"\s*([^=<>]+?)\s*(=|<|>)\s*(.+?)\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """n rows; the law predicts `y` from `x`."""

    x: Columns
    y: np.ndarray
    target: str
    runs: np.ndarray  # int [n]: rows of one run share a number
    labels: tuple[str, ...]  # of the rows, for messages
    excluded: tuple[str, ...]  # rows left out, and why
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def part(self, keep: np.ndarray) -> "Table":
        """Return the rows selected by `keep`."""
        return dataclasses.replace(
            self,
            x={name: column[keep] for name, column in self.x.items()},
            y=self.y[keep],
            runs=self.runs[keep],
            labels=tuple(label for label, k in zip(self.labels, keep, strict=True) if k),
        )


def read(
    path: str | Path,
    law: Law,
    *,
    target: str,
    columns: Mapping[str, str],
    exclude: Sequence[str],
) -> Table:
    """Return the rows of a CSV that the law needs. `columns`: law's name -> the table's name."""
    rows, head = _rows(Path(path))
    kept, excluded = _excluded(rows, head, exclude, path)
    names = {name: columns.get(name, name) for name in law.columns}
    for name in (*names.values(), target):
        if name not in head:
            columns = printable(", ".join(head))
            raise ScalingError(
                f"{path}: no column {name!r}; it has {columns}. Select another column "
                "with --target or --map NAME=COLUMN"
            )
    if not kept:
        raise ScalingError(f"{path}: all {len(rows)} rows are excluded; add runs or exclude fewer")
    labels = tuple(_label(number, row) for number, row in kept)
    read_column = {
        name: np.array(
            [
                _number(row, column, label, path, zero=name in law.zeros)
                for (_, row), label in zip(kept, labels, strict=True)
            ]
        )
        for name, column in {**names, "": target}.items()
    }
    y = read_column.pop("")
    runs = [row.get("run") or str(number) for number, row in kept]
    return Table(
        x=read_column,
        y=y,
        target=target,
        runs=np.unique(runs, return_inverse=True)[1],
        labels=labels,
        excluded=excluded,
        notes=_notes(head, target),
    )


def _rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    records = []
    try:
        with open_binary(path) as file, csv_table(file, path) as (head, rows):
            for number, row in rows:
                if len(row) != len(head):
                    raise TextFileError(
                        f"{path}, row {number}: {len(row)} fields under {len(head)} columns; "
                        "write one field per column"
                    )
                records.append(dict(zip(head, row, strict=True)))
    except TextFileError as error:
        raise ScalingError(f"--table: cannot be read as CSV: {error}") from error
    return records, head


def _excluded(
    rows: list[dict[str, str]], head: list[str], rules: Sequence[str], path: object
) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, ...]]:
    """Return ((number, row) of the kept rows, names of the excluded ones)."""
    kept, excluded = list(enumerate(rows, start=1)), []
    for rule in rules:
        match = _RULE.match(rule)
        if not match or match[1] not in head:
            raise ScalingError(
                f"--exclude {rule!r}: use COLUMN=VALUE, COLUMN<NUMBER or COLUMN>NUMBER with a "
                f"column of {path}: {printable(', '.join(head))}"
            )
        matching = [(n, row) for n, row in kept if _hit(row, *match.groups(), rule)]
        excluded += [f"{_label(n, row)} ({rule})" for n, row in matching]
        kept = [each for each in kept if each not in matching]
    return kept, tuple(excluded)


def _hit(row: dict[str, str], column: str, sign: str, value: str, rule: str) -> bool:
    if sign == "=":
        return row[column] == value
    try:
        number, limit = float(row[column] or "nan"), float(value)
    except ValueError as error:
        raise ScalingError(
            f"--exclude {rule!r}: {printable(error, 120)}; < and > compare numbers"
        ) from error
    return number < limit if sign == "<" else number > limit


def _label(number: int, row: dict[str, str]) -> str:
    return f"row {number}" + (f", run {printable(row['run'], 40)}" if row.get("run") else "")


def _number(row: dict[str, str], column: str, label: str, path: object, *, zero: bool) -> float:
    text = (row[column] or "").strip()
    if not text:
        raise ScalingError(
            f"{path}, {label}: {column} is empty; finish the run, or exclude it with --exclude"
        )
    try:
        value = float(text)
    except ValueError as error:
        text = printable(repr(text), 80)
        raise ScalingError(f"{path}, {label}: {column} is {text}, not a number") from error
    text = printable(text, 80)
    if not math.isfinite(value):
        raise ScalingError(
            f"{path}, {label}: {column} is {text}: a diverged run; exclude it with --exclude and "
            "state this next to the law"
        )
    if value < 0 or (value == 0 and not zero):
        raise ScalingError(f"{path}, {label}: {column} is {text}; it must be above 0")
    return value


def _notes(head: list[str], target: str) -> tuple[str, ...]:
    separate = [name for name in ("loss_text", "loss_image") if name in head]
    if target == "loss" and separate:
        return (
            "loss sums text and image targets, which can hide competition between them; fit them "
            f"separately: --target {','.join(separate)}",
        )
    return ()
