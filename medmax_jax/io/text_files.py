"""Read text, JSON and JSON Lines that another program wrote, within stated bounds.

Every reader of a file from elsewhere uses this module, so that the bounds, the byte order mark,
gzip and the form of the errors are the same everywhere. A file that exceeds a bound raises a
TextFileError of one printable line that names the file, the problem and the fix; RecursionError,
MemoryError and UnicodeDecodeError do not leave this module. CSV: csv_files.py.

    complete file   read_bytes  read_text  read_json  read_objects
    text in memory  parse_json  parse_object  parse_jsonl
    stream          open_binary -> lines, array_items
"""

import codecs
import contextlib
import functools
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from json.decoder import WHITESPACE
from typing import Any, BinaryIO

from medmax_jax.io.errors import MAX_MESSAGE_CHARS, printable

MAX_JSON_BYTES = 256 << 20  # the weight index of the largest published checkpoints has a few MB
MAX_LINE_BYTES = 4 << 20  # one row of JSON Lines or CSV
MAX_JSON_DEPTH = 64  # tokenizer.json, the deepest file of a checkpoint, has 8 levels
MAX_GZIP_RATIO = 200  # text is compressed by 3 to 30; gzip can express 1,032
# bytes before the ratio is checked: a small file may repeat one row many times
GZIP_GRACE = 64 << 20
CHUNK_CHARS = 1 << 20

# The problem, in terms that repeat nothing of the file: reasons are counted and may be printed for
# credentialed rows.
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object"
NOT_UTF8 = "not UTF-8"
KEY_TWICE = "a key occurs twice"
TOO_DEEP = f"nested over {MAX_JSON_DEPTH} levels"
TOO_LONG = "line too long"
NOT_FINITE = "a number that is not finite"
BIG_INTEGER = "an integer beyond 64 bits"
LONE_SURROGATE = "a lone surrogate, which is half a character"

GZIP, _BOM = b"\x1f\x8b", b"\xef\xbb\xbf"  # the first bytes of such files
_INT64, _UINT64 = -(2**63), 2**64
_ARTICLED = {
    list: "an array", str: "a string", int: "a number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


class TextFileError(ValueError):
    """A file that cannot be read; the message names the file, the problem and the fix.

    `reason` is one of the constants above, or empty for a problem of the file as a whole.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(printable(message, 2 * MAX_MESSAGE_CHARS))
        self.reason = reason


class _Refused(ValueError):
    """Raised inside the JSON scanner by JSON that is well-formed and not accepted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


# ---- complete files


def read_bytes(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file, unpacked and without byte order mark; raise TextFileError.

    At most `max_bytes` are kept in memory, also of a gzip file, a pipe or a file that grows.
    """
    parts, left = [], max_bytes + 1
    with open_binary(path) as file:
        while left and (part := file.read(min(left, CHUNK_CHARS))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise TextFileError(f"{path}: more than {max_bytes:,} bytes; not the expected file")
    return b"".join(parts)


def read_text(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the content of a UTF-8 file without its byte order mark; raise TextFileError."""
    return decode(read_bytes(path, max_bytes=max_bytes), path)


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value of a JSON file; raise TextFileError."""
    return parse_json(read_bytes(path, max_bytes=max_bytes), path)


def read_json_object(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the value of a JSON file that is an object; raise TextFileError otherwise."""
    return _as_object(read_json(path, max_bytes=max_bytes), path)


def read_objects(
    path: str | os.PathLike, *, max_bytes: int = MAX_LINE_BYTES, allow_nonfinite: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, object) of each row of JSON Lines, or of one JSON array; raise TextFileError.

    read_objects("q.jsonl") == [("q.jsonl line 1", {"prompt": "Is it a CT?"})]
    `max_bytes` bounds one row.
    """
    rows = []
    with open_binary(path) as file:
        if starts_array(file):
            nonfinite = "keep" if allow_nonfinite else "refuse"
            items = array_items(file, path, max_chars=max_bytes, nonfinite=nonfinite)
            for number, item in items:
                if isinstance(item, TextFileError):
                    raise item
                rows.append((f"{path} item {number}", _as_object(item, f"{path} item {number}")))
            return rows
        for number, line in lines(file, path, max_bytes=max_bytes):
            place = f"{path} line {number}"
            rows.append((place, parse_object(line, place, allow_nonfinite=allow_nonfinite)))
    return rows


# ---- text in memory


def decode(data: bytes, where: object) -> str:
    """Return UTF-8 bytes as text without a byte order mark; raise TextFileError naming `where`."""
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = " (the file starts like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise TextFileError(
            f"{where}: byte {error.start} is not UTF-8{utf16}; save the file as UTF-8", NOT_UTF8
        ) from error


def parse_json(
    data: bytes | str,
    where: object,
    *,
    allow_nonfinite: bool = False,
    allow_lone_surrogates: bool = False,
    check_integers: bool = True,
) -> Any:
    """Return the value of JSON text; raise TextFileError naming `where`.

    In addition to malformed JSON these are refused: more than MAX_JSON_DEPTH levels, a key that
    occurs twice in one object, a lone surrogate ("\\ud83d" alone), an integer beyond 64 bits, and
    NaN or infinity, also written as 1e999.

    Args:
        data: The text, or its bytes in UTF-8.
        where: The file or row, for the message.
        allow_nonfinite: Convert NaN and infinity to floats, as json.loads does.
        allow_lone_surrogates: For JSON in ASCII that this project wrote from external text.
        check_integers: False where the caller checks each one: the check costs 0.1 us per integer.
    """
    text = decode(data, where) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    decoder = _decoder("keep" if allow_nonfinite else "refuse", check_integers)
    return _parsed(decoder, text, where, allow_lone_surrogates)


def parse_object(line: bytes | str, where: object, **rules: bool) -> dict[str, Any]:
    """Return the JSON object of one line; raise TextFileError at anything else.

    `rules`: the keyword arguments of parse_json.
    """
    if len(line) > MAX_LINE_BYTES:
        raise TextFileError(f"{where}: over {MAX_LINE_BYTES:,} bytes in one line", TOO_LONG)
    return _as_object(parse_json(line, where, **rules), where)


def parse_jsonl(
    data: bytes,
    where: object,
    *,
    allow_nonfinite: bool = False,
    allow_lone_surrogates: bool = False,
) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number from 1, object) of each non-empty line; raise TextFileError."""
    rules = dict(allow_nonfinite=allow_nonfinite, allow_lone_surrogates=allow_lone_surrogates)
    rows = []
    for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), start=1):
        if line.strip():
            rows.append((number, parse_object(line, f"{where} line {number}", **rules)))
    return rows


def parse_row(line: bytes, where: object) -> Any:
    """Return the JSON value of a row of a source, with null for NaN; raise TextFileError.

    pandas writes NaN where a table has no value, so it has the meaning of null there.
    """
    return _parsed(_decoder("null", True), decode(line, where), where, False)


# ---- streams


@contextlib.contextmanager
def open_binary(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file after its byte order mark; a gzip file is unpacked, whatever its name."""
    try:
        with open(path, "rb", buffering=1 << 16) as raw:
            file = raw
            if raw.peek(2)[:2] == GZIP:
                file = io.BufferedReader(_Gunzip(raw, path), 1 << 16)
            if file.peek(3)[:3] == _BOM:
                file.read(3)
            yield file
    except OSError as error:
        raise TextFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def starts_array(file: BinaryIO) -> bool:
    """Return whether the first character that is not white space opens a JSON array."""
    return file.peek(1).removeprefix(_BOM).lstrip()[:1] == b"["


def lines(
    file: BinaryIO, where: object, *, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of the lines that are not blank; raise TextFileError."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if len(line) > max_bytes:
            raise TextFileError(f"{where}: line {number} has more than {max_bytes} bytes", TOO_LONG)
        if not line.isspace():
            yield number, line


def array_items(
    file: BinaryIO,
    where: object,
    *,
    max_chars: int = MAX_LINE_BYTES,
    chunk_chars: int = CHUNK_CHARS,
    nonfinite: str = "null",
) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, item) of a file that is one JSON array, in bounded memory.

    `nonfinite`: how NaN and infinity are handled, "null" as in parse_row, "keep" or "refuse". An
    item that is valid JSON but not accepted is yielded as a TextFileError; damage, after which no
    item can be found, raises one.
    """
    decoder = _decoder(nonfinite, True)
    reader, number = _ArrayReader(file, where, max_chars, chunk_chars, decoder), 0
    if reader.next_char() != "[":
        raise TextFileError(f"{where}: not a JSON array; use the file as it is published")
    reader.at += 1
    while (char := reader.next_char()) != "]":
        if number:
            if char != ",":
                raise reader.damaged(number)
            reader.at += 1
            reader.next_char()
        yield number + 1, reader.item(number)
        number += 1
    reader.at += 1
    if reader.next_char():
        raise TextFileError(
            f"{where}: text after the end of the array; the file must contain one array"
        )


# ---- implementation


@functools.cache
def _decoder(numbers: str, check_integers: bool) -> json.JSONDecoder:
    """Return a decoder; `numbers` is the handling of non-finite numbers: refuse, keep, or null."""
    hooks: dict[str, Any] = dict(object_pairs_hook=_unique_keys)
    if numbers == "refuse":
        hooks |= dict(parse_constant=_refuse_constant, parse_float=_finite)
    elif numbers == "null":
        hooks |= dict(parse_constant=lambda _: None, parse_float=_finite_or_none)
    if check_integers:
        hooks["parse_int"] = _integer
    return json.JSONDecoder(**hooks)


def _parsed(decoder: json.JSONDecoder, text: str, where: object, surrogates: bool) -> Any:
    try:
        value = decoder.decode(text)
    except _Refused as error:
        raise TextFileError(f"{where}: {error}", error.reason) from error
    except RecursionError as error:
        raise TextFileError(f"{where}: not JSON ({TOO_DEEP})", TOO_DEEP) from error
    except MemoryError as error:
        raise TextFileError(f"{where}: does not fit into memory") from error
    except ValueError as error:  # also an integer of more than 4,300 digits
        raise TextFileError(f"{where}: not JSON ({printable(error)})", NOT_JSON) from error
    if problem := _deep_problem(text, 0, len(text), value, surrogates=surrogates):
        raise TextFileError(f"{where}: {problem}", problem)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(KEY_TWICE, repr(printable(twice, 60)))
    return unique


def _refuse_constant(name: str) -> None:
    raise _Refused(NOT_FINITE, name)


def _finite(digits: str) -> float:
    if math.isfinite(value := float(digits)):
        return value
    raise _Refused(NOT_FINITE, printable(digits, 60))


def _finite_or_none(digits: str) -> float | None:
    return value if math.isfinite(value := float(digits)) else None


def _integer(digits: str) -> int:
    if len(digits) > 20 or not _INT64 <= (value := int(digits)) < _UINT64:
        raise _Refused(BIG_INTEGER, f"{len(digits)} digits")
    return value


def _as_object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TextFileError(f"{where}: not a JSON object but {_ARTICLED[type(value)]}", NOT_OBJECT)
    return value


def _deep_problem(text: str, start: int, end: int, value: Any, *, surrogates: bool) -> str:
    """Return TOO_DEEP, LONE_SURROGATE or "".

    The value is walked only where its text requires it.
    """
    many = MAX_JSON_DEPTH // 2
    if _has_over(many, "[", text, start, end) or _has_over(many, "{", text, start, end):
        if _is_deep(value):
            return TOO_DEEP
    if surrogates or text.find("\\", start, end) < 0:
        return ""
    # Valid UTF-8 has no surrogates, so they can only come from an escape.
    escaped = text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0
    return LONE_SURROGATE if escaped and _has_surrogate(value) else ""


def _has_over(limit: int, char: str, text: str, start: int, end: int) -> bool:
    """Return whether text[start:end] has `char` more than `limit` times.

    str.count takes ten times as long.
    """
    for _ in range(limit + 1):
        start = text.find(char, start, end) + 1
        if not start:
            return False
    return True


def _below(level: Iterable[Any]) -> list[Any]:
    below: list[Any] = []
    for item in level:
        if isinstance(item, dict):
            below += item.values()
        elif isinstance(item, list):
            below += item
    return below


def _is_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level:
        level, depth = _below(level), depth + 1
        if depth > MAX_JSON_DEPTH:
            return True
    return False


def _has_surrogate(value: Any) -> bool:
    level = [value]
    while level:
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            return True
        level = _below(level)
    return False


class _Gunzip(io.RawIOBase):
    """The content of a gzip file, with a bound on its uncompressed size."""

    def __init__(self, raw: BinaryIO, path: object) -> None:
        self._raw, self._path, self._returned = raw, path, 0
        self._zip = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._zip.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TextFileError(
                f"{self._path}: damaged or truncated gzip file ({error}); copy it again"
            ) from error
        self._returned += len(data)
        if self._returned > GZIP_GRACE + MAX_GZIP_RATIO * self._raw.tell():
            raise TextFileError(
                f"{self._path}: expands to more than {MAX_GZIP_RATIO} times its size; if you trust "
                "it, unpack it with gunzip"
            )
        buffer[: len(data)] = data
        return len(data)


class _ArrayReader:
    """The text of a JSON array, one chunk at a time, and a position in it."""

    def __init__(
        self,
        file: BinaryIO,
        where: object,
        max_chars: int,
        chunk_chars: int,
        decoder: json.JSONDecoder,
    ) -> None:
        self._file, self._json = file, decoder
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._where, self._max_chars, self._chunk = where, max_chars, chunk_chars
        self._text, self.at = "", 0

    def next_char(self) -> str:
        """Skip white space; return the character there, or "" at the end of the file."""
        while True:
            self.at = WHITESPACE.match(self._text, self.at).end()
            if self.at < len(self._text) or not self._read_chunk():
                return self._text[self.at : self.at + 1]

    def item(self, number: int) -> Any:
        """Return the item at the position and advance behind it; `number` items precede it."""
        while True:
            value, end = self._decoded()
            # Only the next character shows that an item is complete: a chunk may end after the 12
            # of 12.5.
            after = len(self._text) if end is None else WHITESPACE.match(self._text, end).end()
            if self._text[after : after + 1] in (",", "]") and after < len(self._text):
                break
            if len(self._text) - self.at > self._max_chars or not self._read_chunk():
                raise self.damaged(number) if end is not None else self._cut_off(number)
        problem = _deep_problem(self._text, self.at, end, value, surrogates=False)
        self.at = after
        place = f"{self._where} item {number + 1}"
        if isinstance(value, _Refused):
            return TextFileError(f"{place}: {value}", value.reason)
        return TextFileError(f"{place}: {problem}", problem) if problem else value

    def damaged(self, number: int) -> TextFileError:
        return TextFileError(f"{self._where}: damaged after item {number}; download the file again")

    def _cut_off(self, number: int) -> TextFileError:
        return TextFileError(
            f"{self._where}: damaged or truncated after item {number}, or an item of more than "
            f"{self._max_chars} characters; download the file again"
        )

    def _decoded(self) -> tuple[Any, int | None]:
        """Return the item and its end; the end is None where the item is incomplete."""
        try:
            return self._json.raw_decode(self._text, self.at)
        except _Refused as error:
            with contextlib.suppress(ValueError, RecursionError):
                return error, json.JSONDecoder().raw_decode(self._text, self.at)[1]
        except (ValueError, RecursionError):
            pass
        return None, None

    def _read_chunk(self) -> bool:
        """Read a chunk and drop what was read before the position; return False at the end."""
        try:
            data = self._file.read(self._chunk)
            part = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise TextFileError(
                f"{self._where}: damaged or not UTF-8; save the file as UTF-8", NOT_UTF8
            ) from error
        self._text, self.at = self._text[self.at :] + part, 0
        return bool(data)
