"""Progress logs of long work: amount done, rate and remaining time, one line at a time."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS = 5.0  # between two lines
_Item = TypeVar("_Item")


def log_to_stderr(line: str) -> None:
    """Print a line to stderr, since stdout may be JSON."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def report_waiting(
    what: str, log: Callable[[str], None], *, every: float = SECONDS
) -> Iterator[Callable[[], None]]:
    """Log `what` and the seconds so far, from a thread, while the block takes long.

    It is for calls that report nothing themselves, like a compilation. The block gets a function
    that starts the wait again; a wait that is shorter than `every` logs nothing.
    """
    begin, ended = time.monotonic(), threading.Event()

    def restart() -> None:
        nonlocal begin
        begin = time.monotonic()

    def report() -> None:
        while not ended.wait(every):
            if (seconds := time.monotonic() - begin) >= every:
                # A `log` may raise to stop the work, which it can do in the caller's thread only.
                with contextlib.suppress(Exception):
                    log(f"{what}: {seconds:.0f} s")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield restart
    finally:
        ended.set()
        thread.join()


def report_waits(items: Iterable[_Item], what: str, log: Callable[[str], None]) -> Iterator[_Item]:
    """Yield the items; report a long wait for one of them, as `report_waiting` does."""
    with report_waiting(what, log) as restart:
        for item in items:
            restart()
            yield item


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
