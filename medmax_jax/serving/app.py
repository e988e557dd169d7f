"""The HTTP interface: the routes of the OpenAI interface over one engine service.

    POST /v1/chat/completions    POST /v1/images/generations    GET /v1/models, /v1/models/NAME
    GET  /health                 GET  /metrics

A request is read and bounded, then its images are decoded and encoded in a thread, then its answers
are submitted; the engine never waits for a client. An answer whose client has gone is cancelled.
Every path but /health requires the API key, where there is one.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from medmax_jax.generation.requests import GenerateError
from medmax_jax.serving import api_replies, api_requests
from medmax_jax.serving.api_errors import ApiError, of_exception, of_failure
from medmax_jax.serving.api_replies import Choice, ReplyWriter
from medmax_jax.serving.api_requests import Asked, ReadOptions
from medmax_jax.serving.service import Service
from medmax_jax.serving.tickets import (
    Event,
    Failed,
    Finished,
    ImageDone,
    ServiceError,
    Ticket,
)

BODY_S = 60.0  # seconds until a body is complete
READERS = 16  # requests whose images are decoded and encoded at once
SLACK_S = 60.0  # seconds that a client may take to read a reply, beyond those of the answer
LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppSettings:
    """How a server treats requests."""

    read: ReadOptions
    max_body_bytes: int
    api_key: str  # "": none is required
    local: bool  # only names of this machine are accepted as the host


def make_app(service: Service, settings: AppSettings) -> Starlette:
    """Return the ASGI application of a service."""
    server = _Server(service, settings)
    middleware = [Middleware(_RequireKey, key=settings.api_key)]
    if settings.local:  # a page on another site must not reach the server by a name of its own
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS))
    return Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/images/generations", server.images, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
        ],
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _unexpected,
        },
    )


class _Server:
    """The handlers of the routes."""

    def __init__(self, service: Service, settings: AppSettings) -> None:
        self._service, self._settings = service, settings
        self._readers: anyio.CapacityLimiter | None = None

    async def chat(self, request: Request) -> ASGIApp:
        asked = await self._read(request, api_requests.read_chat)
        answers = self._submit(asked)
        writer = ReplyWriter(asked)
        if asked.stream:
            chunks = _chunks(answers, asked, writer)
            reply = StreamingResponse(chunks, media_type="text/event-stream")
            return _Bounded(reply, answers, self._seconds)
        return await self._complete(request, answers, asked, writer.completion)

    async def images(self, request: Request) -> ASGIApp:
        asked = await self._read(request, api_requests.read_images)
        writer = ReplyWriter(asked)
        return await self._complete(request, self._submit(asked), asked, writer.images)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [*map(self._card, self._service.names)]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._service.names:
            raise ApiError(
                f"the model {name!r} does not exist; use one of {', '.join(self._service.names)}",
                "model", status=404, code="model_not_found",
            )  # fmt: skip
        return JSONResponse(self._card(name))

    async def health(self, _: Request) -> Response:
        alive = self._service.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    @property
    def _seconds(self) -> float:
        return self._service.limits.request_s + SLACK_S

    def _card(self, name: str) -> dict[str, Any]:
        base = self._service.names[0]
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "medmax_jax",
            "parent": None if name == base else base,
            "max_model_len": self._service.sizes.cache_length,
        }

    async def _read(
        self, request: Request, read: Callable[[Service, bytes, ReadOptions], Asked]
    ) -> Asked:
        """Return what a request asks for, read in a thread."""
        if self._readers is None:  # it belongs to the event loop
            self._readers = anyio.CapacityLimiter(READERS)
        data = await _body(request, self._settings.max_body_bytes)
        return await anyio.to_thread.run_sync(
            read, self._service, data, self._settings.read, limiter=self._readers
        )

    def _submit(self, asked: Asked) -> "_Answers":
        try:
            return _Answers(self._service, asked)
        except (GenerateError, ServiceError) as error:
            raise of_exception(error, None) from error

    async def _complete(
        self,
        request: Request,
        answers: "_Answers",
        asked: Asked,
        write: Callable[[Sequence[Choice]], dict[str, Any]],
    ) -> ASGIApp:
        """Return the reply as one object, unless the client goes before it is complete."""
        work = asyncio.ensure_future(_collect(answers, asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            body = await anyio.to_thread.run_sync(write, work.result())  # PNG takes time
            return _Bounded(JSONResponse(body), answers, self._seconds)
        finally:
            work.cancel()
            gone.cancel()
            answers.cancel()


class _Answers:
    """The answers to one request; iterate over it for (choice, event) as they arrive."""

    def __init__(self, service: Service, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

        def receiver(index: int) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return deliver

        try:
            for index, request in enumerate(asked.requests):
                self._tickets.append(service.submit(request, receiver(index)))
        except BaseException:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self._tickets)
        while left:
            index, event = await self._events.get()
            left -= isinstance(event, Finished | Failed)
            yield index, event

    def cancel(self) -> None:
        """End what has not ended."""
        for ticket in self._tickets:
            ticket.cancel()


class _Bounded:
    """A response that ends after some seconds, and cancels its answers when it ends."""

    def __init__(self, response: Response, answers: _Answers, seconds: float) -> None:
        self._response, self._answers, self._seconds = response, answers, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._response(scope, receive, send)
        except TimeoutError:
            logging.getLogger(__name__).warning(
                "a client did not read its reply within %.0f s", self._seconds
            )
        finally:
            self._answers.cancel()


async def _collect(answers: _Answers, asked: Asked) -> list[Choice]:
    """Return the complete answers; raise ApiError where one failed."""
    choices = [Choice(parts=[]) for _ in asked.requests]
    async for index, event in answers:
        if isinstance(event, Failed):
            raise of_failure(event)
        choices[index].add(event)
    return choices


async def _chunks(answers: _Answers, asked: Asked, writer: ReplyWriter) -> AsyncIterator[str]:
    """Yield the server events of a stream; a failure is its last one."""
    choices = [Choice(parts=[]) for _ in asked.requests]
    for index in range(len(choices)):
        yield writer.first_chunk(index)
    async for index, event in answers:
        if isinstance(event, Failed):
            yield api_replies.server_event(of_failure(event).body)
            yield api_replies.DONE
            return
        if isinstance(event, Finished):
            choices[index].add(event)
        if isinstance(event, ImageDone):  # PNG takes time
            yield await anyio.to_thread.run_sync(writer.chunk, index, event)
        else:
            yield writer.chunk(index, event)
    if asked.include_usage:
        yield writer.usage_chunk(choices)
    yield api_replies.DONE


async def _body(request: Request, limit: int) -> bytes:
    """Return the body of a request; raise ApiError where it is no JSON, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also: no other site's page can send this without a question
        raise ApiError(
            f"the Content-Type is {kind or 'missing'}; send application/json", status=415
        )
    stated = request.headers.get("content-length", "0")
    too_large = ApiError(f"the body has more than {limit:,} bytes; send less", status=413)
    if stated.isdecimal() and int(stated) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(
            f"the body was not complete within {BODY_S:g} s", status=408, kind="timeout"
        ) from error
    return bytes(data)


async def _disconnected(request: Request) -> None:
    """Return once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _RequireKey:
    """Refuses requests without the API key; /health needs none."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_to_all = not self._key or scope["type"] != "http" or scope["path"] == "/health"
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if open_to_all or hmac.compare_digest(given, b"Bearer " + self._key):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            status=401, kind="authentication_error", code="invalid_api_key",
        )  # fmt: skip
        await error.response()(scope, receive, send)


async def _api_error(_: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; see docs/guides/serve.md"
    return ApiError(message, status=error.status_code).response()


async def _gone(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nothing reads it


async def _unexpected(_: Request, error: Exception) -> Response:
    message = f"the server failed ({type(error).__name__}); see its log"
    return ApiError(message, status=500, kind="server_error").response()
