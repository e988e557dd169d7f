"""Read CSV that another program wrote, within stated bounds, and write CSV for spreadsheets.

with open_binary(path) as file, csv_table(file, path) as (header, rows):
    for number, fields in rows: ...
csv_text(["id", "answer"], [["1", "=1+1"]])  ->  "id,answer\n1,'=1+1\n"

Errors of reading name the row.
"""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import KEY_TWICE, MAX_LINE_BYTES, NOT_UTF8, TextFileError

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell of these is run by spreadsheets


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV; a text that a spreadsheet would run as a formula begins with '.

    Numbers are written as they are, and None as an empty field.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_safe_cell, head))
    writer.writerows(map(_safe_cell, row) for row in rows)
    return out.getvalue()


def _safe_cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


@contextlib.contextmanager
def csv_table(
    file: BinaryIO, where: object, *, max_chars: int = MAX_LINE_BYTES, delimiter: str = ","
) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """Yield (header, (row number from 1, fields) of each row that is not blank).

    Raises TextFileError, also while the rows are read, at a header that names a column twice, a
    field of more than `max_chars`, a stray quote, and bytes that are not UTF-8.
    """
    # Python has one limit for all readers of a process, 131,072 by default.
    limit = csv.field_size_limit(max_chars)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        reader = csv.reader(_bounded(text, where, max_chars), strict=True, delimiter=delimiter)
        header = _csv_row(reader, where, 0) or []
        _check_columns(header, where)
        yield header, _csv_rows(reader, where)
    finally:
        csv.field_size_limit(limit)
        text.detach()  # the caller that opened the file closes it


def _bounded(file: io.TextIOWrapper, where: object, max_chars: int) -> Iterator[str]:
    number = 0
    while line := file.readline(max_chars + 1):
        number += 1
        if len(line) > max_chars:
            raise TextFileError(f"{where}: line {number} has more than {max_chars} characters")
        yield line


def _check_columns(header: list[str], where: object) -> None:
    seen: set[str] = set()
    for name in header:
        if name.strip() and name in seen:
            name = repr(printable(name, 60))
            raise TextFileError(
                f"{where}: column {name} occurs twice; rename or remove one", KEY_TWICE
            )
        seen.add(name)


def _csv_rows(reader: Any, where: object) -> Iterator[tuple[int, list[str]]]:
    number = 1
    while (row := _csv_row(reader, where, number)) is not None:
        if row:
            yield number, row
        number += 1


def _csv_row(reader: Any, where: object, number: int) -> list[str] | None:
    """Return the next row, or None at the end; `number` 0 is the header."""
    first = reader.line_num + 1
    try:
        return next(reader, None)
    except UnicodeDecodeError as error:
        raise TextFileError(
            f"{where}: damaged or not UTF-8 after line {reader.line_num}; save it as UTF-8",
            NOT_UTF8,
        ) from error
    except csv.Error as error:
        row = f"row {number}" if number else "the header"
        text = str(error)
        if "expected after" in text:
            text = 'a quote inside a quoted field is not escaped; write it as ""'
        elif "unexpected end" in text:
            text = "a quoted field is not closed; close the quote, or download the file again"
        elif "field limit" in text:
            text = f"a field has over {csv.field_size_limit():,} characters; close its quote"
        raise TextFileError(f"{where}, {row} (line {first}): {text}") from error
