"""Runs an OpenAI-compatible vision endpoint as a model: guarded, cached, paced and priced calls.

    ModelRequest -> PNG without metadata, as a data URL, and text
    -> medmax_jax/endpoints/cached_chat_api.py -> [text]
           permanently refused (400, filtered)  -> FailedResponse
           no reply in this run                 -> not answered

It generates no images and returns no likelihoods: `modes` excludes images, and there is no
`score_options`.
"""

import dataclasses
import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import (
    BOUNDS,
    Endpoint,
    Reply,
    TransientError,
    cost,
    image_part,
    message_size,
    parse_model_at_url,
    text_part,
)
from medmax_jax.eval.config import Service
from medmax_jax.eval.models.base import FailedResponse, ModelRequest, Segment
from medmax_jax.io.text_files import TextFileError, parse_json
from medmax_jax.models import image_headers, images

MAX_PIXELS = 64_000_000
NO_PICTURES = "a chat endpoint writes words and draws no pictures"
NO_LIKELIHOODS = "a chat endpoint tells no likelihoods of given options"


class ServiceError(ValueError):
    """Raised for unusable endpoint settings; the message names the field and the fix."""


@dataclasses.dataclass
class Usage:
    """Counts the calls of this start; `usd` is None without prices."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float | None = None


def make_endpoint(where: str, service: Service, *, field: str) -> Endpoint:
    """Return the endpoint of NAME@URL. `field`: of the config, for errors."""
    name, url = parse_model_at_url(where)
    try:
        parameters = parse_json(service.parameters, f"config.{field}.parameters")
    except TextFileError as error:
        raise ServiceError(str(error)) from error
    if not isinstance(parameters, dict):
        raise ServiceError(f"config.{field}.parameters is {service.parameters}; write an object")
    if service.max_usd is not None and None in (service.price_in, service.price_out):
        raise ServiceError(f"config.{field}.max_usd needs price_in and price_out; give both")
    return Endpoint(
        model=name,
        url=url,
        parameters=parameters,
        listed=egress.parse_allowed_hosts(service.credentialed_hosts),
        key_env=service.key_env,
        timeout_s=service.timeout_s,
        retries=service.retries,
        max_wait_s=service.max_wait_s,
        max_reply_bytes=service.max_reply_bytes,
        price_in=service.price_in,
        price_out=service.price_out,
        takes_cut=True,  # an answer of 16 tokens may be cut at its bound, and is an answer
        takes_empty=True,  # like an empty answer of a local model: no option chosen
    )


class EndpointModel:
    """Answers through the cache of one workdir. `stopped`: no call begins once it is true."""

    modes = ("text", "mixed")
    no_options = NO_LIKELIHOODS

    def __init__(
        self,
        endpoint: Endpoint,
        service: Service,
        cache: cached_chat_api.Cache,
        stopped: Callable[[], bool],
    ):
        self.endpoint, self.service, self.cache = endpoint, service, cache
        self.name, self.fingerprint = endpoint.model, fingerprint(endpoint)
        self.spent, self.last_error = Usage(usd=cost(endpoint, 0, 0)), ""
        self._user_stopped, self._begun = stopped, 0.0

    def generate(self, asks: Sequence[ModelRequest]) -> list[list[Segment] | FailedResponse]:
        """Return all answers, or raise for a request that had no reply."""
        found = dict(self.stream(asks))
        if len(found) < len(asks):
            raise TransientError(f"{len(asks) - len(found)} asks had no reply: {self.last_error}")
        return [found[index] for index in range(len(asks))]

    def stream(
        self, asks: Sequence[ModelRequest]
    ) -> Iterator[tuple[int, list[Segment] | FailedResponse]]:
        """Yield the answers to requests of one bound as they arrive.

        Requests without a reply in this run are not yielded.
        """
        if not asks:
            return
        if len({ask.max_tokens for ask in asks}) > 1:
            raise ValueError("asks of several bounds at once; ask for one at a time")
        endpoint = with_max_tokens(self.endpoint, asks[0].max_tokens)
        new: set[str] = set()
        found = cached_chat_api.complete_all(
            endpoint,
            self._paced(asks, endpoint, new),
            self.cache,
            concurrency=self.service.concurrency,
            stopped=self.stopped,
        )
        for one, reply in found:
            if isinstance(reply, TransientError):
                secret = one.data_class == egress.CREDENTIALED
                # A server's reply may repeat the question.
                self.last_error = "no reply from the endpoint" if secret else str(reply)
                continue
            key = cached_chat_api.cache_key(endpoint, one.messages)
            if key in new:
                new.discard(key)
                self._pay(one, reply)
            yield int(one.id), FailedResponse(why=reply.problem) if reply.problem else [reply.text]

    def stopped(self) -> bool:
        """Return whether the user stopped it, or the budget is spent."""
        most = self.service.max_usd
        if most is not None and self.spent.usd >= most:
            self.last_error = f"max_usd {most:g} is spent"
            return True
        return self._user_stopped()

    def _paced(self, asks: Sequence[ModelRequest], endpoint: Endpoint, new: set[str]):
        """Yield cached replies at once, and make calls no faster than per_minute."""
        for index, ask in enumerate(asks):
            one = message(ask, str(index))
            key = cached_chat_api.cache_key(endpoint, one.messages)
            if self.cache.get(key) is None and key not in new:
                new.add(key)
                self._wait()
            yield one

    def _wait(self) -> None:
        if not self.service.per_minute:
            return
        pause = self._begun + 60 / self.service.per_minute - time.monotonic()
        while pause > 0 and not self.stopped():
            time.sleep(min(pause, cached_chat_api.POLL_S))
            pause = self._begun + 60 / self.service.per_minute - time.monotonic()
        self._begun = time.monotonic()

    def _pay(self, one: cached_chat_api.ChatRequest, reply: Reply) -> None:
        """Add the cost of a reply; estimate tokens where a server does not report them."""
        spent, each = self.spent, cached_chat_api.CHARS_PER_TOKEN
        chars, pictures = message_size(one.messages[0]["content"])
        about = chars // each + pictures * cached_chat_api.TOKENS_PER_IMAGE
        spent.calls += 1
        spent.tokens_in += about if reply.tokens_in is None else reply.tokens_in
        spent.tokens_out += (
            len(reply.text) // each if reply.tokens_out is None else reply.tokens_out
        )
        spent.usd = cost(self.endpoint, spent.tokens_in, spent.tokens_out)


def fingerprint(endpoint: Endpoint) -> str:
    """Return a fingerprint of the address, the name and the parameters.

    The weights behind the endpoint are unknown.
    """
    facts = [endpoint.url, endpoint.model, dict(endpoint.parameters)]
    return "endpoint:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def with_max_tokens(endpoint: Endpoint, max_tokens: int) -> Endpoint:
    """Return the endpoint with the bound of a family, unless the user set one, which is sent as is.

    {"temperature": 0}          ->  {"temperature": 0, "max_tokens": 16}
    {"max_completion_tokens": 2048} and {"max_tokens": None} stay; the latter sends no bound.
    """
    if set(BOUNDS) & set(endpoint.parameters):
        return endpoint
    return dataclasses.replace(
        endpoint, parameters={**endpoint.parameters, "max_tokens": max_tokens}
    )


def reply_bound(endpoint: Endpoint, max_tokens: int) -> int:
    """Return the tokens to price a reply at: the user's own bound, else the family's."""
    own = [v for name in BOUNDS if (v := endpoint.parameters.get(name)) is not None]
    return min((v for v in own if type(v) is int and v > 0), default=max_tokens)


def own_bound(endpoint: Endpoint) -> str:
    """Return the sentence on a bound that the user set; "" where the families' are sent."""
    own = {name: endpoint.parameters[name] for name in BOUNDS if name in endpoint.parameters}
    if not own:
        return ""
    sent = ", ".join(f"{name} {value}" for name, value in own.items() if value is not None)
    if sent:
        return f"{sent} of config.service.parameters is sent in place of each family's bound"
    return (
        "config.service.parameters sets no bound of tokens (null), so none is sent: tokens out and "
        "price are estimates at each family's bound, not limits"
    )


def message(ask: ModelRequest, name: str) -> cached_chat_api.ChatRequest:
    """Return one user message with images and text in order."""
    content = [image_part(png(p)) if isinstance(p, Path) else text_part(p) for p in ask.parts]
    messages = [{"role": "user", "content": content}]
    return cached_chat_api.ChatRequest(id=name, messages=messages, data_class=ask.data_class)


@functools.lru_cache(maxsize=64)
def png(path: Path) -> bytes:
    """Return only an image's pixels as PNG: its metadata does not leave the machine."""
    try:
        pixels = images.load(path, max_pixels=MAX_PIXELS)
    except image_headers.ImageError as error:
        raise ServiceError(str(error)) from error
    file = io.BytesIO()
    pixels.save(file, "PNG")
    return file.getvalue()


def estimate(
    endpoint: Endpoint, asks: Sequence[ModelRequest], cache: cached_chat_api.Cache | None
) -> dict[str, Any]:
    """Return the remaining calls, tokens and USD; opens no connection.

    Raises where data may not be sent.
    """
    total = dict(calls=0, tokens_in=0, tokens_out=0)
    for data_class in {ask.data_class for ask in asks}:
        egress.check(endpoint.url, data_class, listed=endpoint.listed)
    for most in {ask.max_tokens for ask in asks}:
        some = (message(ask, ask.id) for ask in asks if ask.max_tokens == most)
        about = cached_chat_api.estimate(
            with_max_tokens(endpoint, most), some, cache, tokens_out=reply_bound(endpoint, most)
        )
        total = {name: total[name] + about[name] for name in total}
    return total | {"usd": cost(endpoint, total["tokens_in"], total["tokens_out"])}
