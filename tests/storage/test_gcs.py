"""gs:// on a real fake-gcs-server: chunks, sizes, limits; servers that refuse, hang or die."""

import concurrent.futures
import contextlib
import datetime
import os
import pathlib
import subprocess
import sys
import time

import google.cloud.storage
import google.oauth2.credentials
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
    sparse,
    use_server,
    variables_of,
    zarr,
)

from medmax_jax.storage import gcs
from medmax_jax.storage.atomic_folder import atomic_folder
from medmax_jax.storage.folder import Folder, StorageError

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
    fetch, count = gcs.Bucket._fetch, iter(range(1000))

    def replace_meanwhile(self, *piece):
        if next(count) == 20:
            Folder(gs).write("w", [b"b" * 1000])
        return fetch(self, *piece)

    monkeypatch.setattr(gcs.Bucket, "_fetch", replace_meanwhile)
    with pytest.raises(StorageError, match="7b/w: changed while it was read"):
        folder.read("w", 0, 1000)


def test_large_objects_are_written_in_parts(gs, monkeypatch):
    monkeypatch.setattr(gcs, "PART_BYTES", 1 << 18)
    data = np.random.default_rng(0).integers(0, 256, (1 << 20) + 7, np.uint8)
    folder = Folder(gs)
    folder.write("w", [data[:999_999], data[999_999:]])
    np.testing.assert_array_equal(folder.read("w"), data)
    with pytest.raises(KeyError), folder.stream("w") as out:  # noqa: PT012
        out.write(data)
        raise KeyError
    np.testing.assert_array_equal(folder.read("w"), data)  # the unfinished upload is no object


@pytest.mark.slow
def test_an_object_of_5_gib_passes_in_little_memory():
    size = 5 << 30
    code = (
        "import resource\n"
        "from medmax_jax.storage.folder import Folder\n"
        "folder, part = Folder('gs://bucket/7b'), bytes(64 << 20)\n"
        f"folder.write('w', (part for _ in range({size} // len(part))))\n"
        f"assert folder.size('w') == {size}\n"
        "print(folder.file('w').digest('sha256'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    with sparse(size) as (url, uploads):
        environment = os.environ | variables_of(url)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, timeout=900,
            stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    digest, kib = done.stdout.split()
    assert uploads == [size] and int(kib) < 600 << 10
    assert digest == "7f06c62352aebd8125b2a1841e2b9e1ffcbed602f381c3dcb3200200e383d1d5"


def test_a_write_can_require_a_generation(gs):
    store = gcs.Bucket(gs)
    first = store.write("w", b"1", gcs.MISSING, sha256="x")
    assert store.stored("w") == (first, "x") and store.stored("v") is None
    with pytest.raises(gcs.ConflictError, match="7b/w: changed by another process"):
        store.write("w", b"2", gcs.MISSING)
    second = store.write("w", b"2", first)
    with pytest.raises(gcs.ConflictError, match="changed by another process"):
        store.write("w", b"3", first)
    assert store.read("w", 0, None, second).tobytes() == b"2"
    with pytest.raises(StorageError, match="7b/w: changed while it was read"):
        store.read("w", 0, None, first)


def test_everything_below_moves_and_is_deleted(gs):
    folder = Folder(f"{gs}/300")
    for name in ("a", "b/c", "b/d"):
        folder.write(name, [name.encode()])
    assert Folder(gs).children() == ["300"] and folder.children() == ["a", "b"]
    folder.move_to(Folder(f"{gs}/damaged"))
    assert not folder.exists() and Folder(f"{gs}/damaged").names() == ["a", "b/c", "b/d"]
    assert Folder(f"{gs}/damaged").read("b/c").tobytes() == b"b/c"
    Folder(gs).remove()
    assert Folder(gs).names() == []


def test_missing_bucket_is_reported(gs):
    folder = Folder("gs://other/7b")
    for call in (lambda: folder.read("w"), lambda: folder.write("w", [b"1"]), folder.names):
        with pytest.raises(StorageError, match=r"other/7b.*: no such bucket or file; check the"):
            call()
    with (
        pytest.raises(StorageError, match=r"gs://other/7b/.*no such bucket"),
        atomic_folder("gs://other/7b", bytes_needed=0, seal="s"),
    ):
        pytest.fail("must not begin")


def expired_client(url):
    """The client of a user whose login has expired."""
    return google.cloud.storage.Client(
        project="p",
        credentials=google.oauth2.credentials.Credentials(
            "old", refresh_token="revoked", token_uri=url, client_id="c", client_secret="s",
            expiry=datetime.datetime(2020, 1, 1),
        ),
    )  # fmt: skip


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
    yield "array", lambda: gcs.wait(ts.open(array), f"{folder.path}/a")
    yield "new", lambda: atomic_folder(folder.path, bytes_needed=0, seal="s").__enter__()


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (401, "credentials|PERMISSION_DENIED.*me@x has no access.*; give this account the role"),
        (403, "PERMISSION_DENIED: .*me@x has no access; give this account the role"),
        (503, "ABORTED: .*; check the network and the host"),
    ],
)
def test_refused_requests_are_reported(monkeypatch, status, match):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "0.5")
    monkeypatch.setattr(gcs, "TENSORSTORE_RETRIES", {"max_retries": 2, "initial_delay": "10ms"})
    with answering(status) as url:
        use_server(monkeypatch, url)
        for _, call in every_call(Folder("gs://bucket/7b")):
            with pytest.raises(StorageError, match=rf"gs://bucket/7b.*({match})"):
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


def test_refused_connections_are_retried_and_reported(monkeypatch):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "3")
    use_server(monkeypatch, f"http://127.0.0.1:{free_port()}")
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(call) for _, call in every_call(Folder("gs://bucket/7b"))]
    assert 2 < time.monotonic() - start < 20
    for call in calls:
        with pytest.raises(StorageError, match="(?i)could not connect.*|no response within 3 s"):
            call.result()


def test_server_failure_during_a_folder_write(tmp_path, monkeypatch):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "0.5")
    with contextlib.ExitStack() as stack:
        use_server(monkeypatch, stack.enter_context(fake_gcs(tmp_path)))
        with (
            pytest.raises(StorageError, match="7b/v: could not connect") as caught,
            atomic_folder("gs://bucket/7b", bytes_needed=0, seal="s") as new,
        ):
            new.write("w", [b"1"])
            stack.close()
            new.write("v", [b"1"])
    assert "files remain" in caught.value.__notes__[0] and "rm -r gs" in caught.value.__notes__[0]


def test_expired_credentials_are_reported(gs, monkeypatch):
    """A service account whose key the token server does not accept."""
    with answering(400) as url:
        monkeypatch.delenv("STORAGE_EMULATOR_HOST")
        monkeypatch.setattr(gcs, "_client", lambda: expired_client(url))
        with pytest.raises(StorageError, match=r"7b.*no valid credentials.*gcloud auth applicat"):
            Folder(gs).names()


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_invalid_timeout_is_rejected(gs, monkeypatch, text):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, text)
    with pytest.raises(StorageError, match=f"MEDMAX_STORAGE_TIMEOUT={text}: not a number of sec"):
        Folder(gs).names()


def test_program_exits_when_the_server_is_unresponsive():
    code = (
        "from medmax_jax.storage.folder import Folder, StorageError\n"
        "try:\n    Folder('gs://bucket/7b').read('w', 0, 10)\n"
        "except StorageError as e:\n    print(e)"
    )
    with silent() as url:
        environment = {**os.environ, "STORAGE_EMULATOR_HOST": url, gcs.TIMEOUT_VARIABLE: "1"}
        ended = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert ended.returncode == 0 and "no response within 1 s" in ended.stdout, ended.stderr
