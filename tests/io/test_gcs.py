"""gs:// on a real fake-gcs-server: chunks, sizes, limits; servers that refuse, hang or die."""

import concurrent.futures
import contextlib
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts
from gs_server import (  # noqa: F401
    answering,
    fake_gcs,
    fixture_gs,
    fixture_server,
    free_port,
    silent,
    use_server,
    zarr,
)

from medmax_jax.io import gcs, storage
from medmax_jax.io.atomic_folder import atomic_folder
from medmax_jax.io.storage import Folder, StorageError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("nbytes", [0, 1, 2, 8, 9, 99, 100, 101, 4096, 12_345])
def test_sizes_and_chunked_reads(gs, nbytes, monkeypatch):
    monkeypatch.setattr(gcs, "CHUNK_BYTES", 100)
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    folder = Folder(gs)
    folder.write("w", [data])
    assert folder.size("w") == nbytes
    np.testing.assert_array_equal(folder.read("w"), data)
    np.testing.assert_array_equal(folder.read("w", nbytes // 3, nbytes), data[nbytes // 3 :])


def test_chunks_of_two_writes_are_not_mixed(gs, monkeypatch):
    monkeypatch.setattr(gcs, "CHUNK_BYTES", 10)
    folder = Folder(gs)
    folder.write("w", [b"a" * 1000])
    start, count = gcs.Bucket._start, iter(range(1000))

    def replace_meanwhile(self, *piece):
        if next(count) == 20:
            Folder(gs).write("w", [b"b" * 1000])
        return start(self, *piece)

    monkeypatch.setattr(gcs.Bucket, "_start", replace_meanwhile)
    with pytest.raises(StorageError, match="7b/w: changed while it was read"):
        folder.read("w", 0, 1000)


def test_upload_size_is_limited(gs, monkeypatch):
    store = ts.KvStore.open(Folder(gs).kvstore("x")).result()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        store.write("w", iter([b"a", b"b"]))
    monkeypatch.setattr(gcs, "UPLOAD_LIMIT", 10)
    folder = Folder(gs)
    folder.write("w", [b"12345", b"67890"])
    with pytest.raises(StorageError, match=r"7b/v: over 10 bytes.*copy it: gcloud storage cp -r"):
        folder.write("v", [b"12345", b"67890", b"1"])
    assert folder.names() == ["w"]


def test_missing_bucket_is_reported(gs):
    folder = Folder("gs://other/7b")
    with pytest.raises(StorageError, match=r"other/7b/w: no such bucket or file; check the path"):
        folder.read("w")
    with pytest.raises(StorageError, match=r"other/7b/w: NOT_FOUND.*; check the bucket and"):
        folder.write("w", [b"1"])
    with (
        pytest.raises(StorageError, match=r"gs://other/7b/.*NOT_FOUND"),
        atomic_folder("gs://other/7b", bytes_needed=0, seal="s"),
    ):
        pytest.fail("must not begin")


def every_call(folder):
    """Each kind of request, by name."""
    array = zarr(folder.kvstore("a"))
    yield "names", folder.names
    yield "has", lambda: folder.has("w")
    yield "size", lambda: folder.size("w")
    yield "json", lambda: folder.json("w")
    yield "range", lambda: folder.read("w", 0, 100)
    yield "file", lambda: folder.file("w")
    yield "write", lambda: folder.write("w", [b"1"])
    yield "array", lambda: storage.wait(ts.open(array), f"{folder.path}/a")
    yield "new", lambda: atomic_folder(folder.path, bytes_needed=0, seal="s").__enter__()


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (401, "PERMISSION_DENIED: .*me@x has no access; give this account the role"),
        (403, "PERMISSION_DENIED: .*me@x has no access; give this account the role"),
        (503, "ABORTED: .*All 2 retry attempts failed.*; check the network and the host"),
    ],
)
def test_refused_requests_are_reported(monkeypatch, status, match):
    monkeypatch.setattr(gcs, "RETRIES", {"max_retries": 2, "initial_delay": "10ms"})
    with answering(status) as url:
        use_server(monkeypatch, url)
        for _, call in every_call(Folder("gs://bucket/7b")):
            with pytest.raises(StorageError, match=rf"gs://bucket/7b.*{match}"):
                call()


def test_unresponsive_server_times_out(monkeypatch):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "0.3")
    with silent() as url:
        use_server(monkeypatch, url)
        for name, call in every_call(Folder("gs://bucket/7b")):
            start = time.monotonic()
            with pytest.raises(
                StorageError, match=r"gs://bucket/7b.*: no response within 0.3 s; check"
            ):
                call()
            assert time.monotonic() - start < 2, name
        with pytest.raises(
            StorageError, match=r"7b/w: no response within 0.8 s"
        ):  # more for more bytes
            Folder("gs://bucket/7b").write("w", [bytes(gcs.SLOWEST // 2)])


def test_refused_connections_are_retried_and_reported(monkeypatch):
    """With the retries as they are."""
    use_server(monkeypatch, f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(call) for _, call in every_call(Folder("gs://bucket/7b"))]
    assert 5 < time.monotonic() - start < 20
    for call in calls:
        with pytest.raises(StorageError, match="Could not connect.*; check the network"):
            call.result()


def test_server_failure_during_a_folder_write(tmp_path, monkeypatch):
    monkeypatch.setattr(gcs, "RETRIES", {"max_retries": 1, "initial_delay": "10ms"})
    with contextlib.ExitStack() as stack:
        use_server(monkeypatch, stack.enter_context(fake_gcs(tmp_path)))
        with (
            pytest.raises(StorageError, match="7b/v: ABORTED.*Could not connect") as caught,
            atomic_folder("gs://bucket/7b", bytes_needed=0, seal="s") as new,
        ):
            new.write("w", [b"1"])
            stack.close()
            new.write("v", [b"1"])
    assert "files remain" in caught.value.__notes__[0] and "rm -r gs" in caught.value.__notes__[0]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_invalid_timeout_is_rejected(gs, monkeypatch, text):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, text)
    with pytest.raises(StorageError, match=f"MEDMAX_STORAGE_TIMEOUT={text}: not a number of sec"):
        Folder(gs).names()


def test_program_exits_when_the_server_is_unresponsive():
    code = (
        "from medmax_jax.io.storage import Folder, StorageError\n"
        "try:\n    Folder('gs://bucket/7b').read('w', 0, 10)\n"
        "except StorageError as e:\n    print(e)"
    )
    with silent() as url:
        environment = {**os.environ, "TENSORSTORE_GCS_HTTP_URL": url, gcs.TIMEOUT_VARIABLE: "1"}
        environment["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "token"
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 0 and "no response within 1 s" in ended.stdout, ended.stderr
