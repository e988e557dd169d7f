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
NO_IMAGES = "a chat endpoint generates text and no images"
NO_LIKELIHOODS = "a chat endpoint returns no likelihoods of given options"


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
        raise ServiceError(
            f"config.{field}.parameters is {service.parameters}; expected a JSON object"
        )
    if service.max_usd is not None and None in (service.price_in, service.price_out):
        raise ServiceError(f"config.{field}.max_usd requires price_in and price_out; set both")
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
        self.usage, self.last_error = Usage(usd=cost(endpoint, 0, 0)), ""
        self._user_stopped, self._last_call = stopped, 0.0

    def generate(self, requests: Sequence[ModelRequest]) -> list[list[Segment] | FailedResponse]:
        """Return all answers, or raise for a request that had no reply."""
        answers = dict(self.stream(requests))
        if len(answers) < len(requests):
            missing = len(requests) - len(answers)
            raise TransientError(f"{missing} requests had no reply: {self.last_error}")
        return [answers[index] for index in range(len(requests))]

    def stream(
        self, requests: Sequence[ModelRequest]
    ) -> Iterator[tuple[int, list[Segment] | FailedResponse]]:
        """Yield the answers to requests of one bound as they arrive.

        Requests without a reply in this run are not yielded.
        """
        if not requests:
            return
        if len({request.max_tokens for request in requests}) > 1:
            raise ValueError("requests differ in max_tokens; pass requests of one bound per call")
        endpoint = with_max_tokens(self.endpoint, requests[0].max_tokens)
        new_keys: set[str] = set()
        replies = cached_chat_api.complete_all(
            endpoint,
            self._paced(requests, endpoint, new_keys),
            self.cache,
            concurrency=self.service.concurrency,
            stopped=self.stopped,
        )
        for chat_request, reply in replies:
            if isinstance(reply, TransientError):
                credentialed = chat_request.data_class == egress.CREDENTIALED
                # A server's reply may repeat the question.
                self.last_error = "no reply from the endpoint" if credentialed else str(reply)
                continue
            key = cached_chat_api.cache_key(endpoint, chat_request.messages)
            if key in new_keys:
                new_keys.discard(key)
                self._pay(chat_request, reply)
            failed = FailedResponse(why=reply.problem) if reply.problem else None
            yield int(chat_request.id), failed or [reply.text]

    def stopped(self) -> bool:
        """Return whether the user stopped it, or the budget is spent."""
        limit = self.service.max_usd
        if limit is not None and self.usage.usd >= limit:
            self.last_error = f"max_usd {limit:g} is spent"
            return True
        return self._user_stopped()

    def _paced(self, requests: Sequence[ModelRequest], endpoint: Endpoint, new_keys: set[str]):
        """Yield cached replies at once, and make calls no faster than per_minute."""
        for index, request in enumerate(requests):
            chat_request = message(request, str(index))
            key = cached_chat_api.cache_key(endpoint, chat_request.messages)
            if self.cache.get(key) is None and key not in new_keys:
                new_keys.add(key)
                self._wait()
            yield chat_request

    def _wait(self) -> None:
        if not self.service.per_minute:
            return
        pause = self._last_call + 60 / self.service.per_minute - time.monotonic()
        while pause > 0 and not self.stopped():
            time.sleep(min(pause, cached_chat_api.POLL_S))
            pause = self._last_call + 60 / self.service.per_minute - time.monotonic()
        self._last_call = time.monotonic()

    def _pay(self, chat_request: cached_chat_api.ChatRequest, reply: Reply) -> None:
        """Add the cost of a reply; estimate tokens where a server does not report them."""
        usage, per_token = self.usage, cached_chat_api.CHARS_PER_TOKEN
        chars, image_count = message_size(chat_request.messages[0]["content"])
        estimated = chars // per_token + image_count * cached_chat_api.TOKENS_PER_IMAGE
        usage.calls += 1
        usage.tokens_in += estimated if reply.tokens_in is None else reply.tokens_in
        usage.tokens_out += (
            len(reply.text) // per_token if reply.tokens_out is None else reply.tokens_out
        )
        usage.usd = cost(self.endpoint, usage.tokens_in, usage.tokens_out)


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


def message(request: ModelRequest, name: str) -> cached_chat_api.ChatRequest:
    """Return one user message with images and text in order."""
    content = [image_part(png(p)) if isinstance(p, Path) else text_part(p) for p in request.parts]
    messages = [{"role": "user", "content": content}]
    return cached_chat_api.ChatRequest(id=name, messages=messages, data_class=request.data_class)


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
    endpoint: Endpoint, requests: Sequence[ModelRequest], cache: cached_chat_api.Cache | None
) -> dict[str, Any]:
    """Return the remaining calls, tokens and USD; opens no connection.

    Raises where data may not be sent.
    """
    total = dict(calls=0, tokens_in=0, tokens_out=0)
    for data_class in {request.data_class for request in requests}:
        egress.check(endpoint.url, data_class, listed=endpoint.listed)
    for max_tokens in {request.max_tokens for request in requests}:
        chat_requests = (
            message(request, request.id) for request in requests if request.max_tokens == max_tokens
        )
        part = cached_chat_api.estimate(
            with_max_tokens(endpoint, max_tokens),
            chat_requests,
            cache,
            tokens_out=reply_bound(endpoint, max_tokens),
        )
        total = {name: total[name] + part[name] for name in total}
    return total | {"usd": cost(endpoint, total["tokens_in"], total["tokens_out"])}
