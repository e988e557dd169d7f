"""Read files of rows as streams within size limits: JSON arrays, JSON lines, CSV, Parquet.

PubMedVision alone is one JSON array of 700 MB, so an array is decoded item by item. A row is
returned as its value, with None for NaN; as a TextFileError if it is not accepted JSON; and as None
if a row of CSV has a different width.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from medmax_jax.io import text_files
from medmax_jax.io.csv_files import csv_table
from medmax_jax.io.text_files import TextFileError


class SourceError(ValueError):
    """A source that cannot be read at all; the message names the file and states the fix."""


CHUNK = 2**20  # characters read at once
MAX_ITEM = 2**22  # characters of one item or line; the longest published ones have a few thousand
BATCH = 32  # rows of Parquet that are decoded at once; each may carry its images


@dataclasses.dataclass(frozen=True)
class RowLocation:
    """The location of a row: the n-th of a file, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"

    def id(self, source: str) -> str:
        """Return an id that holds no text of the source: "SLAKE/train-0000002"."""
        return f"{source}/{pathlib.PurePath(self.file).name.split('.')[0]}-{self.number:07d}"


def json_array(path: pathlib.Path) -> Iterator[tuple[RowLocation, Any]]:
    """Yield the items of a file that is one JSON array; corruption ends it with a SourceError."""
    with _source_errors(), text_files.open_binary(path) as file:
        items = text_files.array_items(file, path.name, max_chars=MAX_ITEM, chunk_chars=CHUNK)
        for n, item in items:
            yield RowLocation(path.name, n), item


def json_lines(path: pathlib.Path) -> Iterator[tuple[RowLocation, Any]]:
    """Yield one JSON value per line, or the items of one array."""
    with _source_errors(), text_files.open_binary(path) as file:
        is_array = text_files.starts_array(file)
        for n, line in () if is_array else text_files.lines(file, path.name, max_bytes=MAX_ITEM):
            try:
                yield RowLocation(path.name, n), text_files.parse_row(line, path.name)
            except TextFileError as error:
                yield RowLocation(path.name, n), error
    if is_array:
        yield from json_array(path)


def csv_rows(
    path: pathlib.Path,
    columns: tuple[str, ...],
    *,
    delimiter: str = ",",
    max_chars: int | None = None,
) -> Iterator[tuple[RowLocation, Any]]:
    """Yield the rows of a CSV file with a header; a row of another width is returned as None.

    max_chars: of one line, MAX_ITEM by default; a longer one raises SourceError.
    """
    max_chars = max_chars or MAX_ITEM
    with (
        _source_errors(),
        text_files.open_binary(path) as file,
        csv_table(file, path.name, max_chars=max_chars, delimiter=delimiter) as (header, rows),
    ):
        if missing := [c for c in columns if c not in header]:
            raise SourceError(
                f"{path.name}: columns {', '.join(missing)} are missing; use the file as published"
            )
        for n, row in rows:
            fits = len(row) == len(header)
            yield RowLocation(path.name, n), dict(zip(header, row, strict=True)) if fits else None


def parquet_rows(
    paths: Iterable[pathlib.Path], columns: Iterable[str], name: str, *, batch: int = BATCH
) -> Iterator[tuple[RowLocation, dict[str, Any]]]:
    """Yield the rows of Parquet files, counted through all of them under one name.

    Only `columns` are read, `batch` rows at once. A file without one of them raises SourceError.
    """
    import pyarrow  # here: the import is slow, and other formats do not need it
    import pyarrow.parquet

    columns, number = list(columns), 0
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if missing := set(columns) - set(file.schema_arrow.names):
                    raise SourceError(
                        f"{path.name}: columns {sorted(missing)} are missing; use the file as "
                        "published"
                    )
                for rows in file.iter_batches(batch_size=batch, columns=columns):
                    for row in rows.to_pylist():
                        number += 1
                        yield RowLocation(name, number), row
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            raise SourceError(
                f"{path.name}: damaged ({type(error).__name__}); download it again"
            ) from error


@contextlib.contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except TextFileError as error:
        raise SourceError(str(error)) from error
