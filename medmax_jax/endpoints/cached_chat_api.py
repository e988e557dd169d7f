"""Concurrent calls of an endpoint: each reply is on the disk before its use, no call is repeated.

    requests -> in the cache? -> reply
                  no -> thread pool -> request_completion -> calls.jsonl, fsync -> reply

The cache key is SHA-256 of (url, model, messages, parameters): a run that was killed repeats at
most the calls that were in flight. Two equal requests are one call.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medmax_jax.endpoints.chat_api import (
    Endpoint,
    EndpointError,
    Messages,
    Reply,
    TransientError,
    message_size,
    request_completion,
)
from medmax_jax.io.journal import Journal, parse_jsonl

# consecutive calls without a reply, after which the endpoint is considered down or misconfigured
MAX_SILENT = 10
POLL_S = 0.2  # seconds until a signal is noticed
CHARS_PER_TOKEN = 4  # approximate, for English; only estimates use it
# between the 85 and the roughly 1,500 tokens that vision endpoints count
TOKENS_PER_IMAGE = 1_000
TOKENS_PER_MESSAGE = 8  # role and separators, approximate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One request for the record `id`, with the data class of its content."""

    id: str
    messages: Messages
    data_class: str


class Cache:
    """Replies by cache key, in a journal."""

    def __init__(self, journal: Journal):
        self._journal, self._replies, self._lock = journal, {}, threading.Lock()
        self.new_calls = 0  # calls of this run that were answered
        names = {field.name for field in dataclasses.fields(Reply)}
        for row in journal.rows:
            if not names < set(row) or not isinstance(row.get("key"), str):
                raise EndpointError(
                    f"{journal.path}: a line is not a reply; use another cache file"
                )
            self._replies[row["key"]] = Reply(**{name: row[name] for name in names})
        self.answered = any(not reply.problem for reply in self._replies.values())

    def get(self, key: str) -> Reply | None:
        """Return the reply, or None if there is none."""
        return self._replies.get(key)

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Store a reply; it is on the disk when this returns."""
        self._journal.append({"key": key, "model": model} | dataclasses.asdict(reply))
        with self._lock:
            self._replies[key] = reply
            self.new_calls += 1
            self.answered |= not reply.problem


def known_replies(path: Path) -> Cache | None:
    """Return the replies so far, for reading only: an estimate locks and repairs nothing."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return Cache(Journal(path, -1, parse_jsonl(data[: data.rfind(b"\n") + 1], path)))


def cache_key(endpoint: Endpoint, messages: Messages) -> str:
    """Return a digest of everything that a reply depends on."""
    facts = [endpoint.url, endpoint.model, list(messages), dict(endpoint.parameters)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def complete_all(
    endpoint: Endpoint,
    requests: Iterable[ChatRequest],
    cache: Cache,
    *,
    concurrency: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[ChatRequest, Reply | TransientError]]:
    """Yield each request with its reply, in order of completion.

    A request that was not answered this time is yielded with a TransientError. When `stopped()`
    becomes true no further call starts, and the replies of those in flight are still collected,
    because they are paid for. Raises EndpointError when an endpoint refuses everything or is down.
    """
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        in_flight = _InFlight(endpoint, cache, pool, stopped)
        try:
            for request in requests:
                key = cache_key(endpoint, request.messages)
                if (reply := cache.get(key)) is not None:
                    yield request, reply
                elif not in_flight.is_duplicate(request, key):
                    yield from in_flight.wait_for_replies(concurrency - 1)
                    if stopped():
                        break
                    in_flight.start(request, key)
            yield from in_flight.wait_for_replies(0)
            yield from in_flight.failed_requests()
        finally:
            in_flight.halt.set()  # the pool waits for its threads: they must not start a retry


def estimate(
    endpoint: Endpoint, requests: Iterable[ChatRequest], cache: Cache | None, *, tokens_out: int
) -> dict[str, Any]:
    """Return the number of calls and the approximate number of tokens.

    The estimate uses CHARS_PER_TOKEN and `tokens_out` per reply.
    """
    calls = tokens_in = 0
    seen: set[str] = set()
    for request in requests:
        key = cache_key(endpoint, request.messages)
        if key in seen or (cache is not None and cache.get(key) is not None):
            continue
        seen.add(key)
        calls += 1
        for message in request.messages:
            chars, images = message_size(message["content"])
            tokens_in += chars // CHARS_PER_TOKEN + TOKENS_PER_MESSAGE
            tokens_in += images * TOKENS_PER_IMAGE
    return dict(calls=calls, tokens_in=tokens_in, tokens_out=calls * tokens_out)


class _InFlight:
    """The calls in flight; `doubtful` are unusable replies while no usable one has arrived.

    As long as no reply was ever usable, the settings are the likely cause and not the records, so a
    doubtful reply counts against its record only once another record had a usable one.
    """

    def __init__(self, endpoint: Endpoint, cache: Cache, pool: Any, stopped: Callable[[], bool]):
        self.endpoint, self.cache, self.pool, self.stopped = endpoint, cache, pool, stopped
        self.halt, self.silent = threading.Event(), 0
        self.calls: dict[concurrent.futures.Future, tuple[str, list[ChatRequest]]] = {}
        self.by_key: dict[str, concurrent.futures.Future] = {}
        self.doubtful: list[tuple[str, list[ChatRequest], Reply]] = []

    def is_duplicate(self, request: ChatRequest, key: str) -> bool:
        """Return whether an equal request is in flight; if so, add this one to it."""
        if joined := key in self.by_key:
            self.calls[self.by_key[key]][1].append(request)
        return joined

    def start(self, request: ChatRequest, key: str) -> None:
        self.by_key[key] = future = self.pool.submit(self._call, request, key)
        self.calls[future] = (key, [request])

    def wait_for_replies(
        self, max_in_flight: int
    ) -> Iterator[tuple[ChatRequest, Reply | TransientError]]:
        """Yield the replies that arrived; wait until at most `max_in_flight` calls remain."""
        while len(self.calls) > max_in_flight:
            if self.stopped():
                self.halt.set()
            done, _ = concurrent.futures.wait(
                self.calls, POLL_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                key, requests = self.calls.pop(future)
                del self.by_key[key]
                yield from self._handle_outcome(key, requests, _result(future))

    def failed_requests(self) -> Iterator[tuple[ChatRequest, TransientError]]:
        """Yield the doubtful requests, when no usable reply arrived until the end."""
        for _, requests, reply in self.doubtful:
            yield from (
                (request, TransientError(f"{self.endpoint.model}: {reply.problem}"))
                for request in requests
            )

    def _handle_outcome(
        self, key: str, requests: list[ChatRequest], outcome: Reply | TransientError
    ):
        good = isinstance(outcome, Reply) and (not outcome.problem or self.cache.answered)
        self.silent = 0 if good else self.silent + 1
        if not good and isinstance(outcome, Reply):
            self.doubtful.append((key, requests, outcome))
        else:
            if good and self.cache.get(key) is None:  # it was doubtful when it arrived
                self.cache.put(key, self.endpoint.model, outcome)
            yield from ((request, outcome) for request in requests)
        if good:
            for key, requests, reply in self.doubtful:
                self.cache.put(key, self.endpoint.model, reply)
                yield from ((request, reply) for request in requests)
            self.doubtful = []
        if self.silent >= MAX_SILENT and not self.halt.is_set():
            reason = getattr(outcome, "problem", outcome)
            raise EndpointError(
                f"{self.endpoint.model} at {self.endpoint.url}: {self.silent} calls in a row had "
                f"no usable reply; check the endpoint and its parameters. Last error: {reason}"
            )

    def _call(self, request: ChatRequest, key: str) -> Reply:
        if self.halt.is_set():
            raise TransientError("stopped before the request was sent")
        reply = request_completion(
            self.endpoint, request.messages, request.data_class, wait=self.halt.wait
        )
        if not reply.problem or self.cache.answered:
            self.cache.put(key, self.endpoint.model, reply)
        return reply


def _result(future: concurrent.futures.Future) -> Reply | TransientError:
    try:
        return future.result()
    except TransientError as error:
        return error
