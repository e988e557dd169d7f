"""One call of an OpenAI-compatible endpoint: POST URL/chat/completions, by the standard library.

    guard -> key from the environment -> POST -> 200                 Reply, with a problem or none
                 ^                               400, 413, 422       Reply: this request is refused
                 +--- wait, as asked or doubled -- 408, 429, 5xx, timeout, reset, no reply in JSON
                                                 other, redirects    EndpointError: mend settings

Nothing else of this project opens a connection to a model, so no caller can forget the guard. What
comes back is untrusted: bounded in bytes and time, then checked field by field. No redirect is
followed and no proxy used: the bytes go to the host that was checked. The API key is read when it
is sent; no record, error or log has it.
"""

import base64
import contextlib
import dataclasses
import email.utils
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data import outgoing

# A message's content: its words, or a list of parts as `image_part` and `text_part` make them.
Messages = Sequence[Mapping[str, Any]]
PATH = "/chat/completions"
REFUSED = (400, 413, 422)  # about this request: too long, or filtered
TRANSIENT = (408, 429)  # and all of 5xx
OURS = {"model", "messages", "stream", "n"}  # parameters that users cannot set
FIRST_WAIT_S = 1.0  # doubled at each retry
RAW_CHARS = 20_000  # of a reply that cannot be read, kept for people to look at
MAX_TOKENS = 10**9  # a count above it is no count


class EndpointError(ValueError):
    """An endpoint that cannot be used as set; the message names it and the mend."""


class NoReply(EndpointError):
    """An endpoint that did not answer this time; the same call may work later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Whom to ask and how. `parameters`: sent as they are, like temperature or max_tokens.

    `listed`: hosts for credentialed data (outgoing.hosts). `key_env`: name of the environment
    variable with the API key, "" for none. `price_in`, `price_out`: USD per million tokens.
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
    takes_cut: bool = False  # whether a text that ends at the most tokens allowed is a reply

    def __post_init__(self):
        outgoing.parse(self.url)
        if not self.model:
            raise EndpointError(f"endpoint {self.url}: has no model; write MODEL@URL")
        if wrong := OURS & set(self.parameters):
            raise EndpointError(f"parameters: {sorted(wrong)[0]!r} is not yours to set; remove it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `problem` "": text is whole; else why not, and `raw` has what came."""

    status: int
    text: str = ""
    finish: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    problem: str = ""
    raw: str = ""


def ask(
    endpoint: Endpoint, messages: Messages, data_class: str, *, wait: Callable[[float], bool]
) -> Reply:
    """One reply; raises OutgoingError before the first byte where the data may not go.

    `wait(seconds)`: waits between retries, true to give up. Raises NoReply when all retries are
    used up, EndpointError when no retry can help.
    """
    address = outgoing.check(endpoint.url, data_class, listed=endpoint.listed)
    key = _key(endpoint, address)
    request = {"model": endpoint.model, "messages": list(messages), **endpoint.parameters}
    body = json.dumps(request).encode()
    for attempt in range(endpoint.retries + 1):
        found = _attempt(endpoint, address, key, body)
        if isinstance(found, Reply):
            return found
        if attempt < endpoint.retries and wait(_pause(found, attempt, endpoint)):
            raise NoReply(f"{endpoint.model} at {address.name}: stopped while waiting to ask again")
    if found.reply:
        return found.reply
    raise NoReply(
        f"{endpoint.model} at {address.name}: no reply after {endpoint.retries + 1} attempts "
        f"({found.why}); try later, or with fewer calls at once"
    )


def text_part(words: str) -> dict[str, Any]:
    """Words beside pictures in a message's content."""
    return {"type": "text", "text": words}


def image_part(png: bytes) -> dict[str, Any]:
    """A picture in a message's content: its bytes go in the request, and so in the cache's key."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def words_of(content: str | Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(characters of words, pictures) of a message's content."""
    if isinstance(content, str):
        return len(content), 0
    texts = [len(part["text"]) for part in content if part["type"] == "text"]
    return sum(texts), len(content) - len(texts)


def cost(endpoint: Endpoint, tokens_in: int, tokens_out: int) -> float | None:
    """USD, or None without prices."""
    if endpoint.price_in is None or endpoint.price_out is None:
        return None
    return (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Again:
    """An attempt worth repeating. `after_s`: as the server asked. `reply`: if none better comes."""

    why: str
    after_s: float | None = None
    reply: Reply | None = None


def _attempt(
    endpoint: Endpoint, address: outgoing.Address, key: str, body: bytes
) -> Reply | _Again:
    try:
        status, headers, data, whole = _post(endpoint, address, key, body)
    except ssl.SSLCertVerificationError as error:
        raise EndpointError(
            f"{address.name}: certificate not trusted ({error.verify_message}); "
            "give SSL_CERT_FILE the authority that signed it"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        return _Again(why=str(error) or type(error).__name__)
    if status == 200:
        return _read_reply(data, whole, endpoint.max_reply_bytes, key, endpoint.takes_cut)
    said = _hide(data.decode(errors="replace"), key)
    if status in TRANSIENT or status >= 500:
        return _Again(why=f"status {status}: {_short(said)}", after_s=_retry_after(headers))
    if status in REFUSED:
        problem = f"status {status}: {_short(said)}"
        return Reply(status=status, problem=problem, raw=said[:RAW_CHARS])
    if 300 <= status < 400:
        raise EndpointError(
            f"{address.name}: redirects elsewhere (status {status}); name the final URL"
        )
    raise EndpointError(
        f"{endpoint.model} at {address.name}{address.path}: status {status}: {_short(said)}; "
        "look at the URL, the model's name and the key"
    )


def _post(
    endpoint: Endpoint, address: outgoing.Address, key: str, body: bytes
) -> tuple[int, http.client.HTTPMessage, bytes, bool]:
    """Status, headers, body, and whether that is all of the body."""
    secure = address.scheme == "https"
    make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    tls = {"context": ssl.create_default_context()} if secure else {}
    connection = make(address.host, address.port, timeout=endpoint.timeout_s, **tls)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    late = threading.Event()
    try:
        connection.connect()
        # The timeout of a socket is of one read, and a server that drips would never meet it.
        watch = threading.Timer(endpoint.timeout_s, _cut, (connection.sock, late))
        watch.daemon = True
        watch.start()
        try:
            connection.request("POST", address.path.rstrip("/") + PATH, body, headers)
            with connection.getresponse() as response:
                data = _read(response, endpoint.max_reply_bytes)
        finally:
            watch.cancel()
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        connection.close()
    if late.is_set():  # even without an error: a body without a length looks whole
        raise TimeoutError(f"more than {endpoint.timeout_s:g} s")
    whole = len(data) <= endpoint.max_reply_bytes
    return response.status, response.headers, data, whole


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """The body, or its first bytes when it has more than `limit`."""
    data = bytearray()
    while len(data) <= limit and (piece := response.read1(65_536)):
        data += piece
    if len(data) <= limit and response.length:  # read1 does not say that bytes are missing
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _cut(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it may just have been closed
        # Not connection.shutdown: that of TLS takes away what the reading thread is using.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _read_reply(data: bytes, whole: bool, limit: int, key: str, takes_cut: bool) -> Reply | _Again:
    raw = _hide(data[: 4 * RAW_CHARS].decode(errors="replace"), key)[:RAW_CHARS]
    if not whole:
        return Reply(status=200, problem=f"longer than {limit} bytes", raw=raw)
    try:
        body = json.loads(data)
        choice = body["choices"][0]
        message = choice["message"]
        message.get("content")
    except (ValueError, RecursionError):
        return _again("not JSON", raw)
    except (KeyError, IndexError, TypeError, AttributeError):
        return _again("no choices with a message", raw)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    facts = dict(
        status=200,
        finish=_hide(str(choice.get("finish_reason") or "")[:40], key),
        tokens_in=_count(usage.get("prompt_tokens")),
        tokens_out=_count(usage.get("completion_tokens")),
    )
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        return Reply(problem="no text in the message", raw=raw, **facts)
    if facts["finish"] == "length" and not takes_cut:
        return Reply(problem="cut off at the most tokens allowed", raw=raw, **facts)
    return Reply(text=_hide(text, key), **facts)


def _again(why: str, raw: str) -> _Again:
    return _Again(why=why, reply=Reply(status=200, problem=why, raw=raw))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None


def _key(endpoint: Endpoint, address: outgoing.Address) -> str:
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        # Not shown, not even in part; and http.client would show one with a line break.
        raise EndpointError(
            f"the environment variable {endpoint.key_env} has no usable key: set it to one, "
            "plain ASCII without spaces"
        )
    if address.scheme != "https" and not address.loopback:
        raise EndpointError(f"a key for {address.name} would be readable over http; use https")
    return key


def _hide(text: str, key: str) -> str:
    return text.replace(key, "[key]") if key else text


def _short(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:300]).strip() or "nothing said"


def _pause(found: _Again, attempt: int, endpoint: Endpoint) -> float:
    if found.after_s is None:
        # Random, so that calls which failed together do not come back together.
        doubled = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.0)
        return min(doubled, endpoint.max_wait_s)
    if found.after_s > endpoint.max_wait_s:
        raise NoReply(
            f"{endpoint.model}: asks to wait {found.after_s:.0f} s ({found.why}), more than "
            f"max_wait_s {endpoint.max_wait_s:g}; try later"
        )
    return found.after_s


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, of a number of them or of a date."""
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
