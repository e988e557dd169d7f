"""Reads the rows of a prediction file of another program: CSV, TSV, XLSX, JSON Lines, a JSON array.

read_table("r.csv") -> Table(columns=("id", "answer"), rows=[("row 1", {"id": "7", ..})], ..)

A row that cannot be read is listed in `malformed` by its place and reason, also a truncated last
one; the others are kept. Pickles are refused: reading one would execute it.
"""

import dataclasses
import math
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openpyxl

from medmax_jax.io import text_files
from medmax_jax.io.csv_files import csv_table
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError

MAX_BYTES = 512 << 20  # of a file, and of what an XLSX file unpacks to
MAX_ROWS = 1_000_000
MAX_LINE = 16 << 20  # bytes of a row: samples of lmms-eval hold the complete prompt
MAX_COLUMNS = 1_000
DELIMITERS = (";", "\t", ",")  # Excel writes ";" where the decimal mark is a comma
MAX_CELL = 32_767  # characters: the limit of a cell of XLSX, at which other programs cut off
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".npy", ".joblib")
Row = tuple[str, dict[str, Any]]  # place, column -> value


class PredictionFileError(ValueError):
    """Raised for a file that is no readable prediction file; names the file and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Holds the rows of a file. `malformed`: place and reason of each row that was left out."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    malformed: list[str]


def read_table(path: Path) -> Table:
    """Read all rows of a file, by the end of its name; raise PredictionFileError."""
    ending = path.suffix.lower()
    if ending in PICKLES:
        raise PredictionFileError(
            f"{path}: a pickle can execute code when it is read, so it is refused; save the "
            "predictions as .xlsx, .tsv or .json with the program that wrote them"
        )
    if ending not in READERS:
        raise PredictionFileError(
            f"{path}: the name does not end in {', '.join(READERS)}; name a prediction file"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PredictionFileError(f"{path}: more than {MAX_BYTES:,} bytes; split the file")
        rows, malformed = _sorted_out(rows_of(path), path)
    except OSError as error:
        raise PredictionFileError(f"{path}: {error.strerror or error}; name a file") from error
    except TextFileError as error:
        raise PredictionFileError(str(error)) from error
    columns = dict.fromkeys(name for _, row in rows for name in row)
    return Table(path=path, columns=tuple(columns), rows=rows, malformed=malformed)


def rows_of(path: Path) -> Iterator[Row | str]:
    """Yield each row of a file, or the place and the reason of one that cannot be read.

    Raises TextFileError where nothing that follows can be read.
    """
    return READERS[path.suffix.lower()](path)


def cell_text(value: Any) -> str:
    """Return a cell as text: None and NaN are "", 3.0 is "3", True is "True"."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def cell_number(value: Any) -> float | None:
    """Return a cell as a finite number: True and "True" are 1, "0.5" is 0.5; None for others."""
    if isinstance(value, bool | int | float):
        return float(value) if math.isfinite(value) else None
    text = cell_text(value).strip().lower()
    if text in ("true", "false"):
        return float(text == "true")
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _sorted_out(items: Iterable[Row | str], path: Path) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    malformed: list[str] = []
    try:
        for item in items:
            if isinstance(item, str):
                malformed.append(item.replace(f"{path} ", "", 1))
            else:
                rows.append(item)
            if len(rows) + len(malformed) > MAX_ROWS:
                raise PredictionFileError(f"{path}: more than {MAX_ROWS:,} rows; split the file")
    except TextFileError as error:
        if not rows:
            raise
        text = str(error).replace(f"{path}, ", "", 1).replace(f"{path}: ", "", 1)
        malformed.append(f"{text}; nothing after it was read")
    return rows, malformed


def _delimited(path: Path, delimiter: str) -> Iterator[Row | str]:
    with (
        text_files.open_binary(path) as file,
        csv_table(file, path, max_chars=MAX_LINE, delimiter=delimiter) as (header, rows),
    ):
        _check_columns(header, path)
        if other := [mark for mark in DELIMITERS if len(header) == 1 and mark in header[0]]:
            raise PredictionFileError(
                f"{path}: its columns are separated by {other[0]!r}, those of a {path.suffix} file "
                f"by {delimiter!r}; save it with these, or as .xlsx"
            )
        for number, fields in rows:
            if len(fields) == len(header):
                yield f"row {number}", dict(zip(header, fields, strict=True))
            else:
                yield f"row {number}: {len(fields)} fields, but the header has {len(header)}"


def _json(path: Path) -> Iterator[Row | str]:
    """Yield rows of JSON Lines or of an array: MedEvalKit writes some results.json as lines."""
    with text_files.open_binary(path) as file:
        if text_files.starts_array(file):
            yield from _items(file, path)
            return
        for number, line in text_files.lines(file, path, max_bytes=MAX_LINE):
            try:
                value = text_files.parse_row(line, f"{path} line {number}")
            except TextFileError as error:
                yield str(error)
                continue
            yield _object(value, f"line {number}")


def _items(file: Any, path: Path) -> Iterator[Row | str]:
    for number, item in text_files.array_items(file, path, max_chars=MAX_LINE):
        if isinstance(item, TextFileError):
            yield str(item)
        else:
            yield _object(item, f"item {number}")


def _object(value: Any, place: str) -> Row | str:
    if not isinstance(value, dict):
        return f"{place}: a JSON {type(value).__name__}; expected an object"
    return place, value


def _xlsx(path: Path) -> Iterator[Row | str]:
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and extensions, which are not read
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            try:
                yield from _sheet(book.worksheets[0], path)
            finally:
                book.close()
    except (PredictionFileError, TextFileError):
        raise
    except Exception as error:  # zipfile and openpyxl raise many kinds on damaged files
        raise PredictionFileError(
            f"{path}: damaged or not an XLSX file ({printable(error, 80)}); copy it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise where the parts of the file unpack to too much, or one of them declares entities."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > MAX_BYTES:
            raise PredictionFileError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes")
        for part in parts:
            with archive.open(part) as file:
                if b"<!DOCTYPE" in file.read(1_024).upper():
                    raise PredictionFileError(f"{path}: {part.filename!r} declares XML entities")


def _sheet(sheet: Any, path: Path) -> Iterator[Row | str]:
    sheet.reset_dimensions()  # those that the file states could pad each row to 16,384 cells
    rows = sheet.iter_rows(values_only=True)
    header = [cell_text(name) for name in next(rows, ())]
    while header and not header[-1]:
        header.pop()
    _check_columns(header, path)
    for number, cells in enumerate(rows, start=1):
        if all(cell is None for cell in cells):
            continue
        if any(cell is not None for cell in cells[len(header) :]):
            yield f"row {number}: more cells than the header has"
            continue
        values = list(cells[: len(header)]) + [None] * (len(header) - len(cells))
        yield f"row {number}", dict(zip(header, values, strict=True))


def _check_columns(header: list[str], path: Path) -> None:
    named = [name for name in header if name.strip()]
    if not named:
        raise PredictionFileError(f"{path}: the first row has no names of columns")
    if len(header) > MAX_COLUMNS:
        raise PredictionFileError(f"{path}: more than {MAX_COLUMNS:,} columns")
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise PredictionFileError(f"{path}: column {printable(repr(twice[0]), 60)} occurs twice")


READERS: Mapping[str, Callable[[Path], Iterator[Row | str]]] = {
    ".csv": lambda path: _delimited(path, ","),
    ".tsv": lambda path: _delimited(path, "\t"),
    ".xlsx": _xlsx,
    ".jsonl": _json,
    ".json": _json,
}
