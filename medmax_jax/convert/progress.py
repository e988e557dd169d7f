"""How far a conversion is, and how the next tensor is read while one is written."""

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

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


@contextlib.contextmanager
def ahead(calls: Iterable[Callable[[], np.ndarray]]) -> Iterator[list[Callable[[], np.ndarray]]]:
    """The same calls, to be made in order; while one's result is used the next one runs already.

    Reading, checksums and copies leave the interpreter's lock, so a second core does them.
    """
    calls = list(calls)
    futures: dict[int, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(1) as worker:

        def result(i: int) -> np.ndarray:
            for k in (i, i + 1):
                if k < len(calls) and k not in futures:
                    futures[k] = worker.submit(calls[k])
            return futures.pop(i).result()

        try:
            yield [functools.partial(result, i) for i in range(len(calls))]
        finally:
            worker.shutdown(wait=True, cancel_futures=True)
