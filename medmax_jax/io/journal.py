"""An append-only JSONL file that survives a kill: a line is on the disk before its use.

One process writes it, from any of its threads. A last line that a crash truncated is removed when
the file is opened again; damage elsewhere is an error, because the lost replies were paid for.
"""

import contextlib
import fcntl
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError


class JournalError(ValueError):
    """A journal that cannot be used; the message names the file, the line and the fix."""


class Journal:
    """The lines of a file as `rows`, and `append`; `open_journal` creates it."""

    def __init__(self, path: Path, descriptor: int, rows: list[dict[str, Any]]):
        self.path, self.rows = path, rows
        self._descriptor, self._lock = descriptor, threading.Lock()

    def append(self, *rows: dict[str, Any]) -> None:
        """Add lines; they are on the disk when this returns."""
        # ASCII: a reply may contain a lone surrogate, which UTF-8 cannot encode.
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with self._lock:
            before = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
                os.fsync(self._descriptor)
            except OSError as error:
                # otherwise the next line would be joined to half of this one
                os.ftruncate(self._descriptor, before)
                raise JournalError(
                    f"cannot write {self.path} ({error.strerror}); free disk space and run the "
                    "same command again"
                ) from error
            self.rows += rows


@contextlib.contextmanager
def open_journal(path: str | os.PathLike) -> Iterator[Journal]:
    """Open the journal at `path`, created if missing and locked by this process during the block.

    Credentialed content requires `private_umask` around it, as around all files next to it.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise JournalError(f"cannot open {path} ({error.strerror}); use another folder") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{path}: another process is writing it; wait for it, or use another folder"
            ) from error
        data = path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete != len(data):
            os.ftruncate(descriptor, complete)
        yield Journal(path, descriptor, parse_jsonl(data[:complete], path))
    finally:
        os.close(descriptor)


def parse_jsonl(data: bytes, where: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the objects of JSONL bytes; raise JournalError at a line that is not an object."""
    try:
        # As `append` wrote them: a number may be NaN, a reply may contain a lone surrogate.
        rows = text_files.parse_jsonl(data, where, allow_nonfinite=True, allow_lone_surrogates=True)
    except TextFileError as error:
        raise JournalError(f"{error}; delete that line") from error
    return [row for _, row in rows]


def read_jsonl(path: str | Path, fields: Sequence[str] = ("id",)) -> list[dict[str, Any]]:
    """Return the records of a file, each with `fields`; a truncated last line is ignored."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    return checked(parse_jsonl(data[: data.rfind(b"\n") + 1], path), fields, path)


def checked(rows: list[dict[str, Any]], fields: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Return the rows if each has the fields and an id that is text; else raise JournalError."""
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in fields if name not in row]:
            raise JournalError(
                f"{path} row {number}: damaged: field {missing[0]!r} is missing; delete that line"
            )
        if not isinstance(row["id"], str):
            raise JournalError(
                f"{path} row {number}: damaged: field 'id' is not a string; delete that line"
            )
    return rows


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts, atomically; raise JournalError where it cannot be written.

    The partial file has a unique name, because the parts of an evaluation (--shard) write
    concurrently.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        # A lone surrogate, which UTF-8 cannot encode, becomes \udc80: an escape that JSON reads.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines([text] if isinstance(text, str) else text)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise JournalError(
            f"cannot write {path} ({error.strerror}); free disk space or change its "
            "permissions, then run the same command again"
        ) from error
