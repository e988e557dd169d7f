"""How far a pass over many bytes is."""

import time
from collections.abc import Callable

SECONDS = 5.0  # between two lines


class Progress:
    """A line every few seconds: how much, how fast, how long still."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self._total, self._say = total, say
        self._start = self._last = time.monotonic()
        self._done = 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            rate = self._done / (now - self._start)
            left = max(self._total - self._done, 0) / rate
            self._say(
                f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, "
                f"{int(left) // 60}:{int(left) % 60:02} left"
            )

    def done(self, what: str) -> None:
        """The last line."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._say(
            f"{what}: {self._done / 1e9:.3f} GB in {seconds:.1f} s, "
            f"{self._done / seconds / 1e6:,.0f} MB/s"
        )
