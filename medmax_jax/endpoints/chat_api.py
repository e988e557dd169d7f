"""One call of an OpenAI-compatible endpoint: POST URL/chat/completions, with the standard library.

    egress check -> key from the environment -> POST -> response

    200                                            Reply, with a problem or none
    400, 413, 422                                  Reply: this request is refused
    408, 429, 5xx, timeout, reset, no JSON         POST again after a wait, as requested or doubled
    other, redirects                               EndpointError: fix the settings

No other module of this project opens a connection to a model, so no caller can omit the check. The
reply is untrusted: bounded in bytes and time, then checked field by field. No redirect is followed
and no proxy is used: the bytes go to the host that was checked. The API key is read when it is
sent; no record, error or log contains it, also where a server echoes it escaped or encoded. Errors
are printable: control characters of a server do not reach a terminal.
"""

import base64
import contextlib
import dataclasses
import email.utils
import functools
import http.client
import json
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medmax_jax.endpoints import egress
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, parse_json

# The content of a message: its text, or a list of parts made by `image_part` and `text_part`.
Messages = Sequence[Mapping[str, Any]]
PATH = "/chat/completions"
REFUSED = (400, 413, 422)  # specific to this request: too long, or filtered
TRANSIENT = (408, 429)  # and all of 5xx
RESERVED_PARAMETERS = {"model", "messages", "stream", "n"}  # parameters that users cannot set
FIRST_WAIT_S = 1.0  # doubled at each retry
RAW_CHARS = 20_000  # of a reply that cannot be parsed, kept for inspection
MAX_TOKENS = 10**9  # a larger count is invalid
BOUNDS = ("max_completion_tokens", "max_tokens")  # names of the maximum number of tokens of a reply
CONNECT_S = 2.0  # seconds until a server that does not listen is reported
MIN_SECRET_CHARS = 6  # a shorter key is a placeholder, and hiding it would change answers
# Errors inside a 200 that are specific to this request, as `code` or `type` of the error object.
REFUSED_CODES = ("content_filter", "content_policy_violation", "context_length_exceeded",
                 "invalid_request_error")  # fmt: skip


class EndpointError(ValueError):
    """An endpoint that cannot be used as configured; the message names it and the fix."""


class TransientError(EndpointError):
    """An endpoint that did not answer this time; the same call may succeed later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model endpoint and how to call it.

    `parameters`: sent unchanged, for example temperature or max_tokens. `listed`: hosts for
    credentialed data (egress.parse_allowed_hosts). `key_env`: name of the environment variable with
    the API key, "" for none. `price_in`, `price_out`: USD per million tokens.
    """

    model: str
    url: str
    parameters: Mapping[str, Any]
    listed: frozenset[str]
    key_env: str
    timeout_s: float
    retries: int
    max_wait_s: float
    max_reply_bytes: int
    price_in: float | None
    price_out: float | None
    takes_cut: bool = False  # whether a text that ends at the token limit is a reply
    quotes_server: bool = True  # whether errors quote the server's text, which may echo a request
    takes_empty: bool = False  # whether an empty text is a reply where the model stopped by itself

    def __post_init__(self):
        egress.parse_address(self.url)
        if not self.model:
            raise EndpointError(f"endpoint {self.url} has no model; use the form MODEL@URL")
        if reserved := RESERVED_PARAMETERS & set(self.parameters):
            raise EndpointError(f"parameters: {sorted(reserved)[0]!r} is reserved; remove it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply of an endpoint.

    `problem` "": the text is complete; otherwise it states why not, and `raw` has the received
    data.
    """

    status: int
    text: str = ""
    finish: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    problem: str = ""
    raw: str = ""


def request_completion(
    endpoint: Endpoint, messages: Messages, data_class: str, *, wait: Callable[[float], bool]
) -> Reply:
    """Return one reply; raise OutgoingError before the first byte where the data may not be sent.

    `wait(seconds)`: waits between retries, true to give up. Raises TransientError when all retries
    are used up, EndpointError when no retry can help.
    """
    address = egress.check(endpoint.url, data_class, listed=endpoint.listed)
    key = _key(endpoint, address)
    if data_class == egress.CREDENTIALED:
        endpoint = dataclasses.replace(endpoint, quotes_server=False)
    parameters = sent_parameters(endpoint.parameters)
    request = {"model": endpoint.model, "messages": list(messages), **parameters}
    body = json.dumps(request).encode()
    for attempt in range(endpoint.retries + 1):
        outcome = _attempt(endpoint, address, key, body)
        if isinstance(outcome, Reply):
            return outcome
        if attempt < endpoint.retries and wait(_pause(outcome, attempt, endpoint)):
            raise TransientError(
                f"{endpoint.model} at {address.name}: stopped while waiting for a retry"
            )
    if outcome.reply:
        return outcome.reply
    raise TransientError(
        f"{endpoint.model} at {address.name}: no reply after {endpoint.retries + 1} attempts "
        f"({outcome.why}); try again later, or with a lower concurrency"
    )


def parse_model_at_url(text: str) -> tuple[str, str]:
    """Return (model, URL) of MODEL@URL, cut at the last @ that a URL follows.

    parse_model_at_url("m@20250929@http://127.0.0.1:8000/v1/")
        ->  ("m@20250929", "http://127.0.0.1:8000/v1")
    """
    match = re.fullmatch(r"(.+)@(https?://.+)", text, re.IGNORECASE | re.DOTALL)
    if not match:
        shown = re.sub(r"://[^/@]*@", "://[hidden]@", printable(text))  # it may contain a password
        raise EndpointError(
            f"endpoint {shown!r}: use the form MODEL@URL, as m@http://127.0.0.1:8000/v1"
        )
    return match[1], match[2].rstrip("/")


def sent_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters as they are sent: a null token limit is omitted."""
    return {k: v for k, v in parameters.items() if v is not None or k not in BOUNDS}


def variable(key_env: str) -> str:
    """Return the name of an environment variable for a message; a key in its place is hidden."""
    is_name = re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", key_env)
    return key_env if is_name else "[hidden: key_env is the NAME of a variable, not a key]"


def check_ready(endpoint: Endpoint) -> None:
    """Raise EndpointError within CONNECT_S seconds unless there is a key and the server listens.

    It opens a connection and sends nothing; the caller calls egress.check first.
    """
    address = egress.parse_address(endpoint.url)
    _key(endpoint, address)
    outcome: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((address.host, address.port), CONNECT_S).close()
        except OSError as error:
            outcome.put(error)
        else:
            outcome.put(None)

    # In a thread: a resolver without a network has longer timeouts of its own.
    threading.Thread(target=connect, daemon=True).start()
    try:
        error = outcome.get(timeout=CONNECT_S)
    except queue.Empty:
        error = TimeoutError(f"no connection within {CONNECT_S:g} s")
    if error is not None:
        raise TransientError(
            f"{endpoint.model} at {address.name}: cannot be reached "
            f"({error.strerror or error}); start the server, or correct the URL"
        ) from error


def text_part(text: str) -> dict[str, Any]:
    """Return text as a part of a message's content, next to images."""
    return {"type": "text", "text": text}


def image_part(png: bytes) -> dict[str, Any]:
    """Return an image as a part of a message's content.

    Its bytes are in the request, and therefore in the cache key.
    """
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def message_size(content: str | Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return (characters of text, number of images) of a message's content."""
    if isinstance(content, str):
        return len(content), 0
    texts = [len(part["text"]) for part in content if part["type"] == "text"]
    return sum(texts), len(content) - len(texts)


def cost(endpoint: Endpoint, tokens_in: int, tokens_out: int) -> float | None:
    """Return the cost in USD, or None without prices."""
    if endpoint.price_in is None or endpoint.price_out is None:
        return None
    return (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Retry:
    """A failed attempt that should be repeated.

    `after_s`: seconds to wait, as the server requested. `reply`: the result if no better one
    follows.
    """

    why: str
    after_s: float | None = None
    reply: Reply | None = None


def _attempt(endpoint: Endpoint, address: egress.Address, key: str, body: bytes) -> Reply | _Retry:
    try:
        status, headers, data, complete = _post(endpoint, address, key, body)
    except ssl.SSLCertVerificationError as error:
        raise EndpointError(
            f"{address.name}: certificate not trusted ({error.verify_message}); "
            "set SSL_CERT_FILE to the certificate of the signing authority"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        message = _hide(str(error), key) or type(error).__name__
        # An OSError is this machine's own text; any other has the server's status line in it.
        return _Retry(
            why=_short(message) if isinstance(error, OSError) else _quote(endpoint, message)
        )
    if status == 200:
        return _read_reply(endpoint, address, key, data, complete)
    message = _raw(data, key)
    if status in TRANSIENT or status >= 500:
        why = f"status {status}: {_quote(endpoint, message)}"
        return _Retry(why=why, after_s=_retry_after(headers))
    if status in REFUSED:
        problem = f"status {status}: {_quote(endpoint, message)}"
        return Reply(status=status, problem=problem, raw=message)
    if 300 <= status < 400:
        raise EndpointError(
            f"{address.name}: redirects to another URL (status {status}); use the final URL"
        )
    raise EndpointError(
        f"{endpoint.model} at {address.name}{address.path}: status {status}: "
        f"{_quote(endpoint, message)}; check the URL, the model name and the key"
    )


def _post(
    endpoint: Endpoint, address: egress.Address, key: str, body: bytes
) -> tuple[int, http.client.HTTPMessage, bytes, bool]:
    """Return status, headers, body, and whether the body is complete."""
    secure = address.scheme == "https"
    make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    tls = {"context": ssl.create_default_context()} if secure else {}
    connection = make(address.host, address.port, timeout=endpoint.timeout_s, **tls)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    late = threading.Event()
    try:
        connection.connect()
        # The timeout of a socket applies to one read, and a server that sends slowly would never
        # exceed it.
        watchdog = threading.Timer(endpoint.timeout_s, _abort, (connection.sock, late))
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request("POST", address.path.rstrip("/") + PATH, body, headers)
            with connection.getresponse() as response:
                data = _read(response, endpoint.max_reply_bytes)
        finally:
            watchdog.cancel()
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        connection.close()
    if late.is_set():  # even without an error: a body without a length looks complete
        raise TimeoutError(f"more than {endpoint.timeout_s:g} s")
    complete = len(data) <= endpoint.max_reply_bytes
    return response.status, response.headers, data, complete


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """Return the body, or its first bytes when it has more than `limit`."""
    data = bytearray()
    while len(data) <= limit and (piece := response.read1(65_536)):
        data += piece
    if len(data) <= limit and response.length:  # read1 does not report that bytes are missing
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _abort(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it may already be closed
        # Not connection.shutdown: that of TLS removes what the reading thread is using.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _read_reply(
    endpoint: Endpoint, address: egress.Address, key: str, data: bytes, complete: bool
) -> Reply | _Retry:
    raw = _raw(data, key)
    if not complete:
        return Reply(status=200, problem=f"longer than {endpoint.max_reply_bytes} bytes", raw=raw)
    try:
        # Non-finite numbers and lone surrogates are judged where they are used, or not at all.
        body = parse_json(data, "reply", allow_nonfinite=True, allow_lone_surrogates=True)
    except TextFileError:
        return _retry_with_reply("not JSON", raw)
    if (error := _error_in(body)) is not None:
        return _read_error(endpoint, address, key, error, raw)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return _retry_with_reply("no choices with a message", raw)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    reply_fields = dict(
        status=200,
        finish=printable(_hide(str(choice.get("finish_reason") or ""), key), 40),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )
    text = _text_of(content)
    if text is not None and text.strip():
        if reply_fields["finish"] in ("length", "content_filter") and not endpoint.takes_cut:
            problem = f"cut off at the token limit ({_bound_sent(endpoint)})"
            if reply_fields["finish"] == "content_filter":
                problem = "cut off (finish_reason content_filter)"
            return Reply(problem=problem, raw=raw, **reply_fields)
        return Reply(text=_hide(text, key, shortest=MIN_SECRET_CHARS), **reply_fields)
    if endpoint.takes_empty and reply_fields["finish"] == "stop" and text is not None:
        refusal = message.get("refusal")
        refusal = refusal if isinstance(refusal, str) else ""
        return Reply(text=_hide(refusal, key, shortest=MIN_SECRET_CHARS), **reply_fields)
    notes = {"": "", "stop": "", "length": f" ({_bound_sent(endpoint)}; allow more)"}
    note = notes.get(reply_fields["finish"], f" (finish_reason {reply_fields['finish']})")
    return Reply(problem=f"no text in the message{note}", raw=raw, **reply_fields)


def _text_of(content: Any) -> str | None:
    """Return the text of a message's content, a str or a list of parts; None if it is neither.

    [{"type": "thinking", ...}, {"type": "text", "text": "yes"}]  ->  "yes"
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        elif not isinstance(part, dict) or part.get("type") in (None, "text", "output_text"):
            return None
    return "".join(texts)


def _bound_sent(endpoint: Endpoint) -> str:
    """Return the message on a reply that ended at its token limit."""
    sent = sent_parameters(endpoint.parameters)
    bounds = [f"{name} {sent[name]}" for name in BOUNDS if name in sent]
    limits = f"{' and '.join(bounds)} was sent" if bounds else "no max_tokens was sent"
    return f"finish_reason length; {limits}"


def _error_in(body: Any) -> Any:
    """Return the error that a body of status 200 states, or None."""
    if not isinstance(body, dict):
        return None
    if body.get("object") == "error":
        return body
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
        return body.get("error") or choice.get("error") or "finish_reason error"
    return body.get("error") or None


def _read_error(
    endpoint: Endpoint, address: egress.Address, key: str, error: Any, raw: str
) -> Reply | _Retry:
    """Return the result of an error inside a 200, handled like the status that its code states."""
    stated = error if isinstance(error, dict) else {}
    message, code = stated.get("message"), stated.get("code")
    message_text = message if isinstance(message, str) else error
    message_text = message_text if isinstance(message_text, str) else json.dumps(message_text)
    why = f"status 200 with an error: {_quote(endpoint, _hide(message_text, key))}"
    if isinstance(code, str) and re.fullmatch(r"[1-5]\d\d", code):
        code = int(code)
    if type(code) is int and code in REFUSED:
        return Reply(status=code, problem=why, raw=raw)
    if {str(code), str(stated.get("type"))} & set(REFUSED_CODES):
        return Reply(status=REFUSED[0], problem=why, raw=raw)
    if type(code) is int and 400 <= code < 500 and code not in TRANSIENT:
        raise EndpointError(
            f"{endpoint.model} at {address.name}{address.path}: {why} (code {code}); "
            "check the URL, the model name and the key"
        )
    return _Retry(why=why)


def _raw(data: bytes, key: str) -> str:
    """Return the first RAW_CHARS characters of a body without the key, also at their end."""
    max_bytes = 4 * RAW_CHARS + 64 * len(key)  # an escaped character of a key has several bytes
    return _hide(data[:max_bytes].decode(errors="replace"), key)[:RAW_CHARS]


def _retry_with_reply(why: str, raw: str) -> _Retry:
    return _Retry(why=why, reply=Reply(status=200, problem=why, raw=raw))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def _key(endpoint: Endpoint, address: egress.Address) -> str:
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        # Not shown, not even in part; and http.client would show a key with a line break.
        raise EndpointError(
            f"the environment variable {variable(endpoint.key_env)} has no usable key; set it to a "
            "key in plain ASCII without spaces"
        )
    if address.scheme != "https" and not address.loopback:
        raise EndpointError(
            f"a key for {address.name} would be sent unencrypted over http; use https"
        )
    return key


def _hide(text: str, key: str, *, shortest: int = 1) -> str:
    """Return the text without the key, as it is or escaped; keys under `shortest` characters stay.

    _hide('{"k": "\\u0073k-1"}', "sk-1")  ->  '{"k": "[key]"}'
    """
    return _key_pattern(key).sub("[key]", text) if key and len(key) >= shortest else text


@functools.lru_cache(maxsize=8)
def _key_pattern(key: str) -> re.Pattern[str]:
    """Return a pattern for a key in plain text, in hexadecimal, in base64, and escaped.

    The escapes are those of JSON, URL and HTML.
    """
    letters = []
    for letter in key:
        n = ord(letter)
        letters.append(
            rf"(?:\\{{0,8}}{re.escape(letter)}|\\{{1,8}}(?i:u00{n:02x}|x{n:02x}|u\{{0*{n:x}\}})"
            rf"|%(?:25){{0,4}}(?i:{n:02x})|&\#(?:0*{n}|(?i:x0*{n:x}));?)"
        )
    forms = ["".join(letters), f"(?i:{key.encode().hex()})"] + sorted(_base64_of(key))
    return re.compile("|".join(forms))


def _base64_of(key: str) -> set[str]:
    """Return patterns of the key inside base64, whatever precedes and follows it."""
    patterns = set()
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + key.encode()).decode().rstrip("=")
        start = (0, 2, 3)[before]  # characters that depend on the bytes before the key
        end = len(coded) - bool((before + len(key)) % 3)
        if end - start >= 8:
            patterns |= {re.escape(coded[start:end].translate(t)) for t in ({}, {43: "-", 47: "_"})}
    return patterns


def _quote(endpoint: Endpoint, text: str) -> str:
    """Return the server's text for an error, unless it may repeat credentialed data."""
    return _short(text) if endpoint.quotes_server else "its text is not shown for credentialed data"


def _short(text: str) -> str:
    return printable(text.strip()) or "no message"


def _pause(retry: _Retry, attempt: int, endpoint: Endpoint) -> float:
    if retry.after_s is None:
        # Random, so that calls which failed together are not repeated together.
        doubled = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)
        return min(doubled, endpoint.max_wait_s)
    if retry.after_s > endpoint.max_wait_s:
        raise TransientError(
            f"{endpoint.model}: requests a wait of {retry.after_s:.0f} s ({retry.why}), longer "
            f"than max_wait_s {endpoint.max_wait_s:g}; try again later"
        )
    return retry.after_s


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, which is a number of seconds or a date."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
