"""Reads text, JSON and JSON Lines that another program wrote, within stated bounds.

Every reader of a file from elsewhere goes through this module, so that the bounds, the byte order
mark and the form of the errors are the same everywhere. A file that breaks a bound raises a
TextFileError of one printable line that names the file, the problem and the fix; RecursionError,
MemoryError and UnicodeDecodeError do not leave this module.
"""

import json
import logging
import math
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

MAX_JSON_BYTES = 256 << 20  # the weight index of the largest published checkpoints has a few MB
MAX_LINE_BYTES = 4 << 20  # one row of JSON Lines or CSV
MAX_JSON_DEPTH = 64  # tokenizer.json, the deepest file of a checkpoint, has 8 levels
MAX_MESSAGE_CHARS = 300

_BOM = b"\xef\xbb\xbf"


class TextFileError(ValueError):
    """A file that cannot be read; the message names the file, the problem and the fix."""


def read_bytes(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file without its byte order mark; raise TextFileError.

    The size is checked before anything is read, and again while reading: a pipe or a growing file
    states no size.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise TextFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > max_bytes:
        raise TextFileError(f"{path}: over {max_bytes:,} bytes; this is not the expected file")
    return data.removeprefix(_BOM)


def read_text(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the content of a UTF-8 file without its byte order mark; raise TextFileError."""
    return decode(read_bytes(path, max_bytes=max_bytes), path)


def decode(data: bytes, where: object) -> str:
    """Return UTF-8 bytes as text without a byte order mark; raise TextFileError naming `where`."""
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextFileError(
            f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value of a JSON file; raise TextFileError."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), path)


def parse_json(data: bytes | str, where: object, *, allow_nonfinite: bool = False) -> Any:
    """Return the value of JSON text; raise TextFileError naming `where`.

    Refused besides malformed JSON: more than MAX_JSON_DEPTH levels, a key that occurs twice in one
    object, and NaN or infinity (unless `allow_nonfinite`), also written as 1e999.
    """
    text = decode(data, where) if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise TextFileError(f"{where}: nested over {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise TextFileError(f"{where}: not JSON ({printable(error)})") from error
    _check_depth_and_numbers(value, where, allow_nonfinite=allow_nonfinite)
    return value


def parse_jsonl(
    data: bytes, where: object, *, allow_nonfinite: bool = False
) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number from 1, object) of each non-empty line; raise TextFileError."""
    rows = []
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), start=1):
        if line.strip():
            place = f"{where} line {number}"
            rows.append((number, parse_object(line, place, allow_nonfinite=allow_nonfinite)))
    return rows


def parse_object(line: bytes, where: object, *, allow_nonfinite: bool = False) -> dict[str, Any]:
    """Return the JSON object of one line; raise TextFileError at anything else."""
    if len(line) > MAX_LINE_BYTES:
        raise TextFileError(f"{where}: over {MAX_LINE_BYTES:,} bytes in one line")
    row = parse_json(line, where, allow_nonfinite=allow_nonfinite)
    if not isinstance(row, dict):
        raise TextFileError(f"{where}: a JSON {type(row).__name__}, expected an object")
    return row


def printable(value: object, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    r"""Return text from elsewhere as one line without control characters, cut to `max_chars`.

    printable("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    """
    text = str(value)
    if len(text) > max_chars:
        text = text[: max_chars - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_text(text: str) -> str:
    r"""Return text of a model or a server for a terminal: lines and tabs stay, controls do not.

    Escape sequences, other control characters, overrides of the writing direction and halves of
    characters become escapes; spaces of all kinds and joiners, which scripts need, stay.

    printable_text("a\x1b[2J\tb\nc") == "a\\x1b[2J\tb\nc"
    """
    kept = "\n\t\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in text.replace("\r\n", "\n")
    )


class PrintableFormatter(logging.Formatter):
    """Formats log lines for a terminal: `printable_text` of each."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable_text(super().format(record))


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {printable(twice, 60)!r} occurs twice")
    return found


def _check_depth_and_numbers(value: Any, where: object, *, allow_nonfinite: bool) -> None:
    """Raise TextFileError at too many levels or a number that is not finite, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise TextFileError(f"{where}: nested over {MAX_JSON_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, float) and not allow_nonfinite and not math.isfinite(item):
                raise TextFileError(f"{where}: holds {item}, which is not a JSON number")
        level = below
