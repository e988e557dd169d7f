"""The next tensor is read while one is written."""

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np


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
