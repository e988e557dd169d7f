"""A real HTTP server on 127.0.0.1 that speaks as an OpenAI-compatible endpoint, well or badly."""

import contextlib
import http.server
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable

import pytest

from medmax_jax.endpoints import chat_api
from medmax_jax.endpoints.chat_api import Endpoint

QUESTION = "How does a meningioma look on a scan of the head?"
# Verbatim: part of the data.
ANSWER = (
    "#### a) Overview\nA meningioma grows from the coverings of the brain and is mostly benign. "
    "It is well bounded and pushes the brain aside instead of growing into it.\n"
    "#### b) Visual Context\n<image>\nThe picture shows a bright mass beside the skull.\n"
    "#### c) Key Components\n- Site: along the dura\n- Behaviour: slow growth"
)
KEEP = json.dumps({"keep": True, "reason": "names a finding"})
WRITTEN = json.dumps({"question": QUESTION, "answer": ANSWER})


def completion(text: str | None, *, finish: str = "stop", usage: bool = True) -> bytes:
    """The body of a good reply: 100 tokens in, 10 out."""
    choice = {"index": 0, "finish_reason": finish}
    choice["message"] = {"role": "assistant", "content": text}
    body = {"object": "chat.completion", "choices": [choice]}
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(body).encode()


def good(request: dict) -> bytes:
    """What a model that obeys writes: a verdict to the filter's prompt, else an instruction."""
    is_filter = "You decide" in request["messages"][0]["content"]
    return completion(KEEP if is_filter else WRITTEN)


class LLM:
    """What the server saw, and what it does next.

    `behave(request, n)`: the n-th answer (from 0) to this very request: bytes for a good one, or
    something of `Handler.act`.
    """

    def __init__(self, behave: Callable[[dict, int], object]):
        self.behave = behave
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.connections = 0
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def asked(self, request: dict) -> int:
        """How often this was asked before."""
        return self.requests.count(request)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):  # noqa: N802
        llm = self.server.llm
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions", self.path
        with llm.lock:
            n = llm.asked(request)
            llm.requests.append(request)
            llm.keys.append(self.headers.get("Authorization"))
            llm.times.append(time.monotonic())
            llm.at_once += 1
            llm.most_at_once = max(llm.most_at_once, llm.at_once)
        try:
            with contextlib.suppress(ConnectionError):  # the client may be dead or tired
                self.act(llm.behave(request, n))
        finally:
            with llm.lock:
                llm.at_once -= 1

    def act(self, what):
        match what:
            case bytes():
                self.answer(200, what)
            case int():
                self.answer(what, b'{"error": {"message": "no"}}')
            case ("status", status, headers):
                self.answer(status, b"{}", headers)
            case ("says", status, body):
                self.answer(status, body)
            case "reset":
                linger = struct.pack("ii", 1, 0)  # RST instead of FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            case ("raw", data):  # in place of a status line, headers and body
                self.wfile.write(data)
                self.close_connection = True
            case ("cut", data):
                self.begin(len(data))
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            case ("huge", size):
                self.begin(size)
                for _ in range(size // 65_536):
                    self.wfile.write(b"x" * 65_536)
            case ("slow", seconds):
                time.sleep(seconds)
                self.close_connection = True
            case ("drip", seconds):
                self.begin(1_000)
                self.drip(b" ", seconds)
            case ("drip headers", seconds):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                self.drip(b"X: y\r\n", seconds)
            case ("drip, no length", seconds):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + completion("half"))
                self.drip(b" ", seconds)

    def begin(self, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def drip(self, piece, seconds):
        for _ in range(int(seconds / 0.05)):
            self.wfile.write(piece)
            time.sleep(0.05)
        self.close_connection = True

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def process_request(self, request, client_address):
        self.llm.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        pass  # a killed client


@contextlib.contextmanager
def serving(
    behave: Callable[[dict, int], object] = lambda request, n: good(request),
    tls: ssl.SSLContext | None = None,
):
    """An LLM under `llm.url` while the block runs; over https with `tls`."""
    llm = LLM(behave)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.llm = llm
        llm.url = f"http://127.0.0.1:{server.server_port}/v1"
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
            llm.url = llm.url.replace("http://", "https://")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield llm
        finally:
            server.shutdown()
            thread.join()


def replies(*answers: object) -> Callable[[dict, int], object]:
    """Behaviour: the answers in turn to each request, the last one for ever."""
    return lambda request, n: answers[min(n, len(answers) - 1)]


def free_url() -> str:
    """An address without a server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def at(url: str, **changes) -> Endpoint:
    """The endpoint `m` there."""
    settings = dict(model="m", url=url, parameters={"temperature": 0}, listed=frozenset())
    settings |= dict(key_env="", timeout_s=5.0, retries=2, max_wait_s=5.0, max_reply_bytes=100_000)
    return Endpoint(**(settings | dict(price_in=None, price_out=None) | changes))


# ---- fixtures ----


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Waits before retries that suit a server on this machine."""
    monkeypatch.setattr(chat_api, "FIRST_WAIT_S", 0.01)
