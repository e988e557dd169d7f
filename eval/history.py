"""history.jsonl: what was asked, recorded and asked again, over all starts of a workdir.

    {"event": "start", "file": "records.jsonl", "recorded": 32, "left": 68}
    {"event": "asking", "count": 32}     {"event": "stop", "recorded": 32, "seconds": 4.1}

A line is one write, so that several processes may add to the file. Who is killed leaves no stop:
what it was asking and did not record is asked again, and `totals` counts that.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from medmax_jax.io.text_files import TextFileError, parse_object

NAME = "history.jsonl"


class Log:
    """One run's lines on one file of records."""

    def __init__(self, folder: Path, file: str, recorded: int, left: int):
        self._path, self._file = folder / NAME, file
        self._recorded, self._start = 0, time.monotonic()
        self._add("start", had=recorded, left=left)

    def asking(self, count: int) -> None:
        """`count` items are about to be given to the model."""
        self._add("asking", count=count)

    def recorded(self, count: int) -> None:
        """`count` more are on the disk."""
        self._recorded += count

    def stop(self) -> None:
        """The last line, when the run ends on its own feet."""
        seconds = round(time.monotonic() - self._start, 3)
        self._add("stop", recorded=self._recorded, seconds=seconds)

    def _add(self, event: str, **more: Any) -> None:
        line = {"event": event, "file": self._file, "time": round(time.time(), 3)} | more
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; None for a line that has not what `totals` reads."""
    try:
        row = parse_object(line, NAME, allow_nonfinite=True)
    except TextFileError:
        return None
    numbers = [row.get(name, 0) for name in ("count", "had", "seconds")]
    names = all(isinstance(row.get(name), str) for name in ("file", "event"))
    had = row.get("event") != "start" or "had" in row
    return row if names and had and all(type(n) in (int, float) for n in numbers) else None


def totals(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> {starts, asked, recorded, repeated, seconds}; repeated: at most, by windows."""
    found: dict[str, dict[str, Any]] = {}
    path = folder / NAME
    for line in path.read_bytes().splitlines() if path.exists() else ():
        row = _event(line)
        if row is None:  # half a line of a full disk
            continue
        one = found.setdefault(
            row["file"], dict(starts=0, asked=0, recorded=0, repeated=0, seconds=0.0)
        )
        if row["event"] == "start":
            one["starts"] += 1
            one["repeated"] = one["asked"] - row["had"]
        one["asked"] += row.get("count", 0)
        one["seconds"] += row.get("seconds", 0.0)
    for file, one in found.items():
        records = folder / file
        lines = records.read_bytes().count(b"\n") if records.exists() else 0
        one["recorded"] = lines
        one["seconds"] = round(one["seconds"], 3)
    return found
