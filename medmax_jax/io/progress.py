"""Progress logs of long work: amount done, rate and remaining time, one line at a time."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

SECONDS = 5.0  # between two lines
QUIET_SECONDS = 10.0  # without a line, after which `waiting` logs one


@contextlib.contextmanager
def waiting(
    what: str, log: Callable[[str], None], *, every: float = QUIET_SECONDS
) -> Iterator[Callable[[str], None]]:
    """Log "`what`: 20 s" whenever nothing was logged for `every` seconds.

    Yields the log to use in the block. For work that cannot report how much of it is done: a
    compilation, a load, the sync of a disk.
    """
    start, ended = time.monotonic(), threading.Event()
    last = [start]

    def log_in_block(line: str) -> None:
        last[0] = time.monotonic()
        log(line)

    def watch() -> None:
        while not ended.wait(max(last[0] + every - time.monotonic(), every / 20)):
            if time.monotonic() - last[0] >= every:
                log_in_block(f"{what}: {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield log_in_block
    finally:
        ended.set()
        thread.join()


class ByteProgress:
    """Logs progress in bytes, one line every few seconds."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self._total, self._log = total, log
        self._start = self._last = time.monotonic()
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            left = max(self._total - self._done, 0) / rate
            self._log(
                f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, "
                f"{int(left) // 60}:{int(left) % 60:02} left"
            )

    def done(self, what: str) -> None:
        """Log the last line."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._log(
            f"{what}: {self._done / 1e9:.3f} GB in {seconds:.1f} s, "
            f"{self._done / seconds / 1e6:,.0f} MB/s"
        )


class ItemProgress:
    """Logs progress in items: at most one line per `every` seconds, and one at the end."""

    def __init__(self, total: int, unit: str, log: Callable[[str], None], *, every: float):
        self._total, self._unit, self._log, self._every = total, unit, log, every
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def tick(self, what: str, count: int) -> None:
        """Count `count` more items as done; `what` names the work."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= self._every or self._done == self._total:
            self._last = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate
            self._log(
                f"{what}: {self._done} of {self._total} {self._unit}, {rate:.1f} per second, "
                f"{left:.0f} s left"
            )
