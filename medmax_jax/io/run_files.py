"""Writes and reads the files that a run does not depend on: its log and its metrics.

    metrics.jsonl    {"kind": "train", "step": 120, "loss": 3.21, ...}, one line per report
    train.log        the lines that stdout shows

Neither contains anything that training resumes from, so damage in them, or a disk that they cannot
be written to, is a warning and never ends a run whose checkpoints are valid.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, TextIO

from medmax_jax.io.text_files import MAX_JSON_BYTES, TextFileError, parse_object, read_bytes

Warn = Callable[[str], None]


class LogFile:
    """Appends lines to a text file; a failed write causes a single warning."""

    def __init__(self, path: str | os.PathLike, warn: Warn) -> None:
        self._path, self._warn, self._file = path, warn, None
        try:
            self._file: TextIO | None = open(path, "a", buffering=1, encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def write(self, line: str) -> None:
        """Add a line, without its line end."""
        if self._file is not None:
            try:
                self._file.write(line + "\n")
            except OSError as error:  # a retry later could leave incomplete lines
                self._give_up(error)

    def close(self) -> None:
        """Close the file; lines that could not be written to a full disk are lost."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)
            self._file = None

    def _give_up(self, error: OSError) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # an earlier failed write fails again
                self._file.close()
        self._file = None
        self._warn(
            f"WARNING: cannot write {self._path} ({error.strerror or error}); the run continues "
            "without it"
        )


def read_metrics(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """Return (the rows of a metrics.jsonl, how many of its lines are damaged).

    A row has a step, which is an integer, a kind, which is text, and numbers or null. A last line
    without a line end does not count as damaged: the process ended while writing it. A missing file
    has no rows.

    Raises:
        TextFileError: The file exists and cannot be read at all.
    """
    lines, damaged = metrics_lines(path)
    return [row for row, _ in lines], damaged


def metrics_lines(path: str | os.PathLike) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
    """Return what read_metrics returns, each row with its line."""
    if not os.path.lexists(path):
        return [], 0
    *complete, partial = read_bytes(path, max_bytes=4 * MAX_JSON_BYTES).split(b"\n")
    parsed = [(_metrics_row(line), line) for line in complete if line.strip()]
    valid = [(row, line) for row, line in parsed if row is not None]
    damaged = len(parsed) - len(valid)
    if (row := _metrics_row(partial)) is not None:
        valid.append((row, partial))
    return valid, damaged


def damage_warning(path: str | os.PathLike, damaged: int) -> str:
    """Return the log line about the lines that read_metrics leaves out."""
    lines = "1 unreadable line" if damaged == 1 else f"{damaged} unreadable lines"
    return f"WARNING: {path}: skipped {lines}"


def _metrics_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_object(line, "row", allow_nonfinite=True)
    except TextFileError:
        return None
    numbers = [value for name, value in row.items() if name != "kind"]
    valid = all(value is None or type(value) in (int, float) for value in numbers)
    return row if valid and type(row.get("step")) is int and type(row.get("kind")) is str else None
