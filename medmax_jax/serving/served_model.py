"""One served name in the engine thread: its engine, its requests, and how they end.

add -> queue -> row, a chunk of 16 tokens per step -> events
    fail        at any point: cancelled by the client, late, or lost with the engine
    scoring     between two steps, where a slot is free; until then no request gets a row
"""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medmax_jax.generation import engine, scheduler
from medmax_jax.generation.model_bundle import ModelBundle
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import vocab as ids
from medmax_jax.serving import tickets
from medmax_jax.serving.answer_events import AnswerEvents, token_logprobs
from medmax_jax.serving.metrics import Metrics
from medmax_jax.serving.tickets import Failed, Finished, ImageDone, Ticket

# Prompt, options, and a function that receives the likelihoods or the failure.
Scoring = tuple[np.ndarray, Sequence[np.ndarray], Callable[[Any], None]]
REMEMBERED = 0.2  # weight of the newest duration in the mean


@dataclasses.dataclass(kw_only=True)
class TokenCounts:
    """Totals, and when they were counted."""

    tokens: int = 0
    requests: int = 0
    time: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request that was accepted and has not ended."""

    ticket: Ticket
    queued: scheduler.QueuedRequest
    events: AnswerEvents
    begin: float
    deadline: float
    tokens: int = 0  # generated so far
    scored: bool = False  # complete, and waits for the likelihoods of its tokens


class ServedModel:
    """A model, its engine and its requests; only the engine thread uses it."""

    def __init__(
        self,
        name: str,
        bundle: ModelBundle,
        e: engine.Engine,
        metrics: Metrics,
        leave_queue: Callable[[int], None],
    ) -> None:
        """Create it without requests; `leave_queue` receives the indices that wait no more."""
        self.name, self.bundle, self.engine, self.metrics = name, bundle, e, metrics
        self._leave_queue = leave_queue
        self.batch = scheduler.open_batch(e)
        self.open_requests: dict[int, OpenRequest] = {}
        self.scoring: deque[Scoring] = deque()
        self.counts, self.mean_seconds = TokenCounts(), 0.0

    @property
    def running(self) -> int:
        """Return the number of rows in use."""
        return sum(request is not None for request in self.batch.running)

    @property
    def busy(self) -> bool:
        """Return whether there is work."""
        return bool(self.open_requests or self.scoring)

    def add(self, ticket: Ticket, queued: scheduler.QueuedRequest, deadline: float) -> None:
        """Put an accepted request into the queue."""
        self.open_requests[ticket.index] = OpenRequest(
            ticket=ticket, queued=queued, deadline=deadline, begin=time.monotonic(),
            events=AnswerEvents(self.bundle, ticket.request.stop),
        )  # fmt: skip
        try:
            scheduler.add(self.batch, queued)
        except GenerateError as error:  # it cannot run together with those before it
            self.fail(ticket.index, Failed(tickets.ENGINE, str(error)))
            return
        self.metrics.prompt_tokens.labels(self.name).inc(len(queued.request.tokens))

    def step(self) -> None:
        """Score options where a slot is free, then decode one chunk of all rows."""
        free = bool(self.engine.slot_table.free.any())
        if self.scoring and free:
            self._score(*self.scoring.popleft())
        admit = free or not self.scoring  # else the next slot that is released is for scoring
        if self.running or (admit and self.batch.queue):
            try:
                with engine.exclusive_use(self.engine):
                    outputs = scheduler.step(self.batch, admit=admit)
            except Exception as error:  # noqa: BLE001  it ends the affected requests only
                self._recover(error)
            else:
                for request in filter(None, self.batch.running):
                    self._leave_queue(request.index)
                for output in outputs:
                    self._deliver(self.open_requests[output.index], output)
        self._measure()

    def fail(self, index: int, failed: Failed) -> None:
        """End a request before it is complete; one that has ended is left as it is."""
        if index in self.open_requests:
            scheduler.cancel(self.batch, index)
            self._end(self.open_requests[index], failed)

    def fail_late(self) -> None:
        """End the requests whose time is over."""
        now = time.monotonic()
        for index, request in list(self.open_requests.items()):
            if now > request.deadline:
                allowed = request.deadline - request.begin
                self.fail(index, Failed(tickets.TIME, f"no answer within {allowed:,.0f} seconds"))

    def fail_everything(self, failed: Failed) -> None:
        """End all requests."""
        for index in list(self.open_requests):
            self.fail(index, failed)
        while self.scoring:
            self.scoring.popleft()[2](GenerateError(failed.message))

    def _deliver(self, request: OpenRequest, output: scheduler.RequestOutput) -> None:
        """Pass on what is new in an answer, and end it where it is complete."""
        labels = self.metrics.generated_tokens.labels(self.name)
        labels.inc(len(output.tokens) - request.tokens)
        self.counts.tokens += len(output.tokens) - request.tokens
        if not request.tokens:
            self.metrics.first_token.labels(self.name).observe(time.monotonic() - request.begin)
        request.tokens = len(output.tokens)
        try:
            for event in request.events.update(output.tokens, output.done):
                if isinstance(event, ImageDone):
                    self.metrics.images.labels(self.name).inc()
                _send(request.ticket, event)
        except Exception as error:  # noqa: BLE001  of decoding an image: only this request's
            self.fail(output.index, Failed(tickets.ENGINE, _message(error)))
            return
        if output.done or request.events.stopped:
            scheduler.cancel(self.batch, output.index)  # a stopped one still has its row
            self._finish(request, output.tokens)

    def _finish(self, request: OpenRequest, tokens: np.ndarray) -> None:
        """End a complete answer, after scoring its tokens where logprobs are requested."""
        whole = request.ticket.request.mode == "image" or tokens[-1] in (ids.EOS, ids.BOI)
        finished = Finished(
            reason="stop" if whole or request.events.stopped else "length",
            prompt_tokens=len(request.queued.request.tokens),
            completion_tokens=len(tokens),
            logprobs=None,
        )
        if not request.ticket.request.logprobs:
            self._end(request, finished)
            return

        def scored(scores: Any) -> None:
            if request.ticket.index not in self.open_requests:
                return  # cancelled meanwhile
            if isinstance(scores, Exception):
                self._end(request, Failed(tickets.ENGINE, _message(scores)))
                return
            ((likelihoods, _),) = scores
            logprobs = token_logprobs(
                self.bundle, tokens, likelihoods, request.events.stopped_length
            )
            self._end(request, dataclasses.replace(finished, logprobs=logprobs))

        request.scored = True
        self.scoring.append((request.queued.request.tokens, [tokens], scored))

    def _end(self, request: OpenRequest, event: Finished | Failed) -> None:
        del self.open_requests[request.ticket.index]
        seconds = time.monotonic() - request.begin
        outcome = event.reason if isinstance(event, Finished) else event.kind
        self.metrics.requests.labels(self.name, outcome).inc()
        self.metrics.duration.labels(self.name).observe(seconds)
        self.mean_seconds += REMEMBERED * (seconds - self.mean_seconds)
        self.counts.requests += 1
        self._leave_queue(request.ticket.index)
        _send(request.ticket, event)

    def _score(self, prompt: np.ndarray, options: Sequence[np.ndarray], done: Any) -> None:
        try:
            (scores,) = engine.score_options(self.engine, [prompt], [options])
        except Exception as error:  # noqa: BLE001  it belongs to the caller
            if self.engine.cache is None:  # the rows were lost with it
                self._recover(error)
            done(error)
        else:
            done(scores)

    def _recover(self, error: Exception) -> None:
        """End the requests that a failed engine had in its rows; the queue continues.

        If it had none, the first request of the queue could not be started.
        """
        waiting = self.batch.queue
        self.batch = scheduler.open_batch(self.engine)
        kept = {queued.index for queued in waiting}
        lost = [i for i, r in self.open_requests.items() if i not in kept and not r.scored]
        if not lost and waiting:
            lost = [waiting.popleft().index]
        self.batch.queue = waiting
        for index in lost:
            self._end(self.open_requests[index], Failed(tickets.ENGINE, _message(error)))

    def _measure(self) -> None:
        rows, sizes = self.batch.rows, self.engine.sizes
        filled = int(rows.positions[(rows.slots >= 0) & ~rows.done[:, None]].sum())
        capacity = sizes.num_slots * sizes.cache_length
        self.metrics.running.labels(self.name).set(self.running)
        self.metrics.waiting.labels(self.name).set(len(self.batch.queue))
        self.metrics.slots_used.labels(self.name).set(int((~self.engine.slot_table.free).sum()))
        self.metrics.cache_usage.labels(self.name).set(filled / capacity)


def _send(ticket: Ticket, event: tickets.Event) -> None:
    """Deliver an event; a receiver that fails must not end the engine thread."""
    try:
        ticket.deliver(event)
    except Exception:  # noqa: BLE001
        logging.exception("the receiver of request %d failed", ticket.index)


def _message(error: Exception) -> str:
    """Return the message for a client: that of an expected error, else only its type."""
    if isinstance(error, GenerateError):
        return str(error)
    return f"the engine failed ({type(error).__name__}); see the log of the server"
