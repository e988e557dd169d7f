"""Files of rows as streams: JSON arrays, JSON lines, CSV, gzipped or not, with bounds.

PubMedVision alone is one JSON array of 700 MB, so an array is decoded item by item.
"""

import csv
import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import IO, Any

from data.sources.row import Place, SourceError

CHUNK = 2**20  # characters read at once
MAX_ITEM = 2**22  # characters of one item or line; the longest published ones have some thousands


def json_array(path: pathlib.Path) -> Iterator[tuple[Place, Any]]:
    """Items of a file that is one JSON array; damage ends it with a SourceError."""
    decoder, n = json.JSONDecoder(), 0
    with open(path, encoding="utf-8-sig") as file:
        text = _more(file, "", path).lstrip()
        if not text.startswith("["):
            raise SourceError(f"{path.name}: not a JSON array; give the file as it is published")
        text = text[1:]
        while True:
            text = text.lstrip()
            if text.startswith("]"):
                return
            if n and text.startswith(","):
                text = text[1:].lstrip()
            item, end = _item(decoder, text)
            while end is None or not text[end:].lstrip():  # a number could go on
                if len(text) > MAX_ITEM or len(text) == len(text := _more(file, text, path)):
                    raise SourceError(
                        f"{path.name}: damaged or cut off after item {n}, or an item of more than "
                        f"{MAX_ITEM} characters; get the file again"
                    )
                item, end = _item(decoder, text.lstrip())
                text = text.lstrip()
            n, text = n + 1, text[end:]
            if text.lstrip()[:1] not in (",", "]"):
                raise SourceError(f"{path.name}: damaged after item {n}; get the file again")
            yield Place(path.name, n), item


def json_lines(path: pathlib.Path) -> Iterator[tuple[Place, Any]]:
    """One JSON value a line; a line that is none comes as None."""
    with open(path, "rb") as file:
        n = 0
        while line := file.readline(MAX_ITEM + 1):
            n += 1
            if len(line) > MAX_ITEM:
                raise SourceError(f"{path.name}: line {n} has more than {MAX_ITEM} bytes")
            if line.strip():
                try:
                    yield Place(path.name, n), json.loads(line)
                except (ValueError, RecursionError):
                    yield Place(path.name, n), None


def csv_rows(path: pathlib.Path, columns: tuple[str, ...]) -> Iterator[tuple[Place, Any]]:
    """Rows of a CSV file with a header; a row of another width comes as None."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_bounded(file, path), strict=True)
            header = next(rows, [])
            if lacking := [c for c in columns if c not in header]:
                raise SourceError(
                    f"{path.name}: lacks the columns {', '.join(lacking)}; "
                    "give the file as it is published"
                )
            for n, row in enumerate(rows, 1):
                whole = len(row) == len(header)
                yield Place(path.name, n), dict(zip(header, row, strict=True)) if whole else None
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise SourceError(f"{path.name}: damaged ({type(error).__name__}); get it again") from error


def _item(decoder: json.JSONDecoder, text: str) -> tuple[Any, int | None]:
    try:
        return decoder.raw_decode(text)
    except (ValueError, RecursionError):
        return None, None


def _more(file: IO[str], text: str, path: pathlib.Path) -> str:
    try:
        return text + file.read(CHUNK)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name}: not UTF-8; get the file again") from error


def _bounded(file: IO[str], path: pathlib.Path) -> Iterator[str]:
    while line := file.readline(MAX_ITEM + 1):
        if len(line) > MAX_ITEM:
            raise SourceError(f"{path.name}: a line has more than {MAX_ITEM} characters")
        yield line
