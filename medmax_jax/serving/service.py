"""The engine service: one thread that answers requests to several models on one device.

    service = Service({"base": g, "mine": with_adapter(g, ...)}, sizes, Limits(...), log=print)
    prompt = service.prompt([["A CT?", image]])
    ticket = service.submit(GenerationRequest(model="mine", prompt=prompt, sample=..., mode="text"))
    for event in ticket: ...
    service.close(drain_s=30)

    callers' threads   submit, cancel, prompt, score, encode, decode   -> inbox
    engine thread      inbox -> one chunk of each model that has requests -> events -> inbox ...

Each served name has an engine with rows and a KV cache of its own; all use the same arrays of the
base. Requests are added, cancelled and stopped between two chunks of 16 tokens. An event is
delivered in the engine thread and never waits for its receiver. A failure of an engine, such as
out of memory, ends the requests that were in its rows; the queue and the other engines continue.
"""

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import PIL.Image
from jaxtyping import Int

from medmax_jax.generation import api, engine, model_bundle, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.engine import EngineSizes
from medmax_jax.generation.model_bundle import ModelBundle
from medmax_jax.generation.requests import GenerateError
from medmax_jax.serving import prompts, tickets
from medmax_jax.serving.metrics import Metrics, make_metrics
from medmax_jax.serving.served_model import ServedModel, TokenCounts
from medmax_jax.serving.tickets import (
    Event,
    Failed,
    GenerationRequest,
    QueueFullError,
    ServiceClosedError,
    Ticket,
)

LOG_EVERY_S = 10.0  # between two lines of progress, while requests run
IDLE_S = 0.5  # between two checks of deadlines while nothing runs
MAX_RETRY_AFTER_S = 60
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of a service."""

    queue: int  # requests that wait, over all models
    request_s: float  # seconds from submission to the end of an answer


class Service:
    """Models that are served by one thread; its methods may be called from any thread."""

    def __init__(
        self,
        bundles: Mapping[str, ModelBundle],
        sizes: EngineSizes,
        limits: Limits,
        *,
        log: Callable[[str], None],
    ) -> None:
        """Allocate an engine for each name, and start the thread.

        Args:
            bundles: the models by name. All have the tokenizer and the VQGAN of the first one.
            sizes: of each engine.
            limits: the bounds.
            log: receives a line about what runs, every ten seconds.
        """
        self.bundle = next(iter(bundles.values()))
        self.sizes, self.limits = sizes, limits
        self.metrics: Metrics = make_metrics()
        self._log, self._numbers = log, itertools.count()
        codes = self.bundle.vq_config.codes_per_image
        self._models = {
            name: ServedModel(
                name, g, engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes),
                self.metrics, self._leave_queue,
            )
            for name, g in bundles.items()
        }  # fmt: skip
        self._codes = prompts.CodeCache(lambda images: self.encode(images).result())
        self._lock = threading.Lock()  # of the two below, and of putting work into the inbox
        self._waiting: set[int] = set()  # accepted, not in a row yet
        self._closing = False
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """Return the names that are served, the base first."""
        return list(self._models)

    @property
    def alive(self) -> bool:
        """Return whether the thread runs and accepts requests."""
        return self._thread.is_alive() and not self._closing

    def prompt(self, turns: Sequence[Sequence[prompts.Part]]) -> Int[np.ndarray, "_"]:
        """Return the tokens of a conversation whose last turn is to be answered.

        Raises GenerateError or TokenizerError on text that is no prompt, or that does not fit.
        """
        prompts.check_turns(self.bundle, turns)
        images = [p for turn in turns for p in turn if isinstance(p, PIL.Image.Image)]
        codes = iter(self._codes.codes(images))
        encoded = [
            [next(codes) if isinstance(p, PIL.Image.Image) else p for p in turn] for turn in turns
        ]
        return prompts.prompt_of_turns(self.bundle, encoded)

    def submit(
        self, request: GenerationRequest, deliver: Callable[[Event], None] | None = None
    ) -> Ticket:
        """Accept a request, or raise.

        `deliver` receives each event in the engine thread and must return at once; without it, the
        ticket is iterated over. Raises KeyError for a model that is not served, GenerateError for
        an invalid request, QueueFullError or ServiceClosedError.
        """
        served = self._models[request.model]
        number = next(self._numbers)
        queued = self._queued(served.bundle, request, number)
        ticket = Ticket(number, request, deliver, self._cancel)
        deadline = time.monotonic() + self.limits.request_s
        with self._lock:
            if len(self._waiting) >= self.limits.queue:
                self.metrics.refused.labels("queue").inc()
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, and the queue holds "
                    f"{self.limits.queue}; try again later",
                    self._retry_after(),
                )
            self._post(lambda: served.add(ticket, queued, deadline))
            self._waiting.add(number)
        return ticket

    def score(
        self, model: str, prompt: Int[np.ndarray, "_"], options: Sequence[str]
    ) -> Future[list[api.Score]]:
        """Return the likelihood of each text as the continuation of a prompt.

        Raises KeyError or GenerateError as `submit`; a failure of the engine is the future's.
        """
        served = self._models[model]
        encoded = api.encode_options(served.bundle, options, "the prompt")
        longest = len(prompt) + max(map(len, encoded))
        if longest > self.sizes.cache_length:
            raise GenerateError(
                f"the prompt and an option have {longest} tokens, but a cache slot holds "
                f"{self.sizes.cache_length}; shorten them"
            )
        future: Future[list[api.Score]] = Future()

        def done(scores: Sequence[tuple[np.ndarray, np.ndarray]] | Exception) -> None:
            if isinstance(scores, Exception):
                future.set_exception(scores)
                return
            future.set_result([api.make_score(x, best) for x, best in scores])

        with self._lock:
            self._post(lambda: served.scoring.append((prompt, encoded, done)))
        return future

    def encode(self, images: Sequence[PIL.Image.Image]) -> Future[list[prompts.Codes]]:
        """Return the VQ codes of images."""
        return self._call(lambda: model_bundle.encode(self.bundle, images))

    def decode(self, codes: Sequence[prompts.Codes]) -> Future[list[PIL.Image.Image]]:
        """Return the images of VQ codes."""
        return self._call(lambda: model_bundle.decode(self.bundle, codes))

    def close(self, *, drain_s: float) -> None:
        """Accept nothing new, finish what was accepted within `drain_s` seconds, and stop."""
        with self._lock:
            self._closing = True
        self._inbox.put(lambda: None)  # ends a wait
        self._thread.join(drain_s)
        self._inbox.put(self._fail_all)
        self._thread.join()

    def _queued(
        self, g: ModelBundle, request: GenerationRequest, number: int
    ) -> scheduler.QueuedRequest:
        """Return the request as the scheduler takes it; raise GenerateError on an invalid one."""
        codes, sample = g.vq_config.codes_per_image, request.sample
        settings = sampling_params.resolve(
            sample, g.vocab, mode=request.mode, codes=codes, barred=g.tokenizer.barred
        )
        if request.mode != "text":
            model_bundle.check_decoder(g)
        (made,) = prompt_requests.make_requests(
            [request.prompt], sample, g.vocab, mode=request.mode, codes=codes,
            names=[request.name] if request.name else None, context=g.config.context_length,
        )  # fmt: skip
        scheduler.check_sizes(self.sizes, made, settings)
        return scheduler.QueuedRequest(
            index=number, request=made, settings=settings, seed=sample.seed
        )

    def _call(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """Return the result of a function that the engine thread calls between two chunks."""
        future: Future[_Result] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001  it belongs to the caller
                future.set_exception(error)

        with self._lock:
            self._post(work)
        return future

    def _post(self, work: Callable[[], None]) -> None:
        """Pass work to the engine thread, which does all of it before it ends; under the lock."""
        if not self.alive:
            self.metrics.refused.labels("closed").inc()
            raise ServiceClosedError("the server is shutting down and accepts no request")
        self._inbox.put(work)

    def _leave_queue(self, index: int) -> None:
        with self._lock:
            self._waiting.discard(index)

    def _cancel(self, ticket: Ticket) -> None:
        failed = Failed(tickets.CANCELLED, "the client cancelled the request")
        self._inbox.put(lambda: self._models[ticket.request.model].fail(ticket.index, failed))

    def _retry_after(self) -> int:
        """Return the seconds after which a place in the queue is probably free."""
        longest = max(served.mean_seconds for served in self._models.values())
        return int(min(max(1.0, longest / max(1, self.sizes.batch_size)), MAX_RETRY_AFTER_S))

    # ---- The engine thread ----

    def _run(self) -> None:
        try:
            progress = TokenCounts()
            while True:
                self._take_messages()
                for served in self._models.values():
                    served.fail_late()
                    served.step()
                progress = self._report(progress)
                if self._closing and not any(s.busy for s in self._models.values()):
                    if self._inbox.empty():
                        return
        except BaseException:
            logging.exception("the engine thread failed")
            raise
        finally:
            with self._lock:
                self._closing = True
            while not self._inbox.empty():  # callers wait for their results
                self._inbox.get_nowait()()
            self._fail_all()

    def _take_messages(self) -> None:
        """Do what callers asked for; wait for it while nothing else is to be done."""
        try:
            if not any(served.busy for served in self._models.values()) and not self._closing:
                self._inbox.get(timeout=IDLE_S)()
            for _ in range(self._inbox.qsize()):  # what arrives meanwhile comes after a chunk
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _report(self, before: TokenCounts) -> TokenCounts:
        """Log what runs, every ten seconds in which something was generated."""
        counts = [served.counts for served in self._models.values()]
        now = TokenCounts(
            tokens=sum(c.tokens for c in counts), requests=sum(c.requests for c in counts)
        )
        seconds = now.time - before.time
        if seconds < LOG_EVERY_S:
            return before
        if now.tokens > before.tokens:
            running = sum(served.running for served in self._models.values())
            waiting = sum(len(served.batch.queue) for served in self._models.values())
            self._log(
                f"requests: {running} running, {waiting} waiting, {now.requests} done; "
                f"{(now.tokens - before.tokens) / seconds:,.1f} tokens/s"
            )
        return now

    def _fail_all(self) -> None:
        failed = Failed(tickets.CLOSED, "the server shut down before the answer was complete")
        for served in self._models.values():
            served.fail_everything(failed)
