"""Tests of records on gs://: staged once per host, checked by hash; killed processes."""

import contextlib
import http.server
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import micro_run
import pytest
from gs_server import fixture_gs, fixture_server, use_server  # noqa: F401

from medmax_jax import train
from medmax_jax.data import loader
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.reader import open_records
from medmax_jax.storage import gcs, workdir
from medmax_jax.storage.folder import Folder, StorageError

ROOT = pathlib.Path(__file__).parents[2]
CHILD = """
import sys
sys.path.insert(0, ".")
from medmax_jax.data.records.staging import stage_to_disk
from medmax_jax.storage.gcs import StorageError

try:
    print("copy", stage_to_disk(sys.argv[1]), flush=True)
except StorageError as error:
    print(error, flush=True)
"""


@pytest.fixture
def stage(tmp_path, monkeypatch) -> pathlib.Path:
    """Return the staging folder of this test."""
    monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / "stage"))
    return tmp_path / "stage"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> pathlib.Path:
    return pathlib.Path(micro_run.write(tmp_path_factory.mktemp("records") / "r", count=40))


@pytest.fixture
def remote(local, gs) -> str:
    """Return the same records on gs://."""
    upload(local, gs)
    return gs


def upload(local: pathlib.Path, gs: str) -> None:
    for path in local.iterdir():
        Folder(gs).write(path.name, [path.read_bytes()])


@contextlib.contextmanager
def stopping(server: str, answers: int):
    """Run a server that forwards `answers` requests for shards and does not answer the rest.

    Yields the URL and an event that is set when the first one waits.
    """
    remaining, waits, over = iter(range(answers)), threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if ".array_record" in self.path and next(remaining, None) is None:
                waits.set()
                over.wait(60)
                self.close_connection = True
                return
            kept = ("range", "authorization")
            headers_sent = {n: v for n, v in self.headers.items() if n.lower() in kept}
            request = urllib.request.Request(server + self.path, headers=headers_sent)
            try:
                with urllib.request.urlopen(request) as reply:
                    status, headers, body = reply.status, reply.headers, reply.read()
            except urllib.error.HTTPError as error:
                status, headers, body = error.code, error.headers, error.read()
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # clients that are killed break their connections

    with Server(("127.0.0.1", 0), Handler) as between:
        thread = threading.Thread(target=between.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{between.server_port}", waits
        finally:
            over.set()
            between.shutdown()
            thread.join()


def child(remote: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, remote], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip


def settings(folder: str | pathlib.Path):
    return micro_run.run(data__train=str(folder), data__validation=str(folder), train__steps=3)


def test_staged_records_equal_local_records(local, remote, stage, capsys):
    run, records = settings(local), open_records(remote)
    assert f"{remote}: copying 4 files to {records.folder}" in capsys.readouterr().err
    assert records.folder.parent == stage and records.fingerprint == open_records(local).fingerprint
    assert {p.name: p.read_bytes() for p in records.folder.iterdir()} == {
        p.name: p.read_bytes() for p in local.iterdir()
    }
    remote_batches, local_batches = (
        loader.train_batches(run, remote),
        loader.train_batches(run, str(local)),
    )
    assert remote_batches.plan == local_batches.plan
    for step in range(3):
        assert (remote_batches.batch(step).ids == local_batches.batch(step).ids).all()
    assert capsys.readouterr().err == ""  # the copy was there
    assert (
        stat.S_IMODE(stage.stat().st_mode) == stat.S_IMODE(records.folder.stat().st_mode) == 0o700
    )
    assert {stat.S_IMODE(p.stat().st_mode) for p in records.folder.iterdir()} == {0o600}


def test_run_on_staged_records_equals_run_on_local_records(local, remote, stage, tmp_path):
    losses = [
        train.run(settings(folder), tmp_path / name)["loss"]
        for name, folder in (("local", local), ("gs", remote))
    ]
    assert losses[0] == losses[1]
    log = (tmp_path / "gs" / "train.log").read_text()
    assert loader.train_batches(settings(local), str(local)).plan[:12] in log


def test_other_records_at_the_same_path_get_another_copy(remote, stage, tmp_path):
    first = open_records(remote)
    micro_run.write(tmp_path / "other", count=40, seed=7)
    upload(tmp_path / "other", remote)
    second = open_records(remote)
    assert first.folder != second.folder and first.fingerprint != second.fingerprint
    assert second.fingerprint == open_records(tmp_path / "other").fingerprint


def test_copy_with_a_missing_file_is_staged_again(remote, stage, capsys):
    """The system may clean its temporary folder."""
    records = open_records(remote)
    for name in ("00001-of-00003.array_record", "index.npy", "dataset.json"):
        (records.folder / name).unlink()
        assert len(list(open_records(remote))) == 40
    assert capsys.readouterr().err.count(f"{remote}: copying 4 files to {records.folder}") == 4


def test_two_processes_stage_once(remote, stage):
    pair = [child(remote) for _ in range(2)]
    outputs = [p.communicate(timeout=60) for p in pair]
    assert outputs[0][0] == outputs[1][0] and outputs[0][0].startswith(f"copy {stage}")
    assert sum("copying 4 files to" in errors for _, errors in outputs) == 1


def test_killed_process_leaves_no_copy_that_is_used(remote, stage, server):
    with stopping(server, answers=1) as (url, waits):
        process = child(remote, STORAGE_EMULATOR_HOST=url)
        assert waits.wait(30)
        while not (parts := [p for p in stage.glob("*.partial/*") if p.stat().st_size]):
            time.sleep(0.01)  # the first shard, or the index, is on its way to the disk
        assert not list(stage.glob("*/dataset.json")) and parts
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(stage.glob("*.partial"))
    records = open_records(remote)
    assert len(list(records)) == 40 and not list(stage.glob("*.partial"))


def test_server_that_stops_responding_is_reported(remote, stage, server, monkeypatch):
    monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "3")
    with stopping(server, answers=1) as (url, _):
        use_server(monkeypatch, url)
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"gs://.*array_record: no response within 3\S* s; check"
        ):
            open_records(remote)
        assert time.monotonic() - start < 20
    assert not list(stage.glob("*.partial")) and not list(stage.glob("*/dataset.json"))


def test_waiting_for_a_stuck_process_is_reported(remote, stage, server, monkeypatch):
    with stopping(server, answers=0) as (url, waits):
        process = child(remote, STORAGE_EMULATOR_HOST=url)
        assert waits.wait(30)
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setenv(gcs.TIMEOUT_VARIABLE, "3")
        with pytest.raises(
            StorageError, match="another process is copying it and has written nothing"
        ):
            open_records(remote)
        process.kill()
        process.communicate()
    monkeypatch.delenv(gcs.TIMEOUT_VARIABLE)
    assert len(open_records(remote)) == 40  # its lock died with it


def test_damaged_file_is_reported_by_name(local, remote, stage):
    name = "00001-of-00003.array_record"
    original = (local / name).read_bytes()
    flipped = bytearray(original)
    flipped[len(original) // 2] ^= 1
    Folder(remote).write(name, [flipped])
    with pytest.raises(RecordsError, match=rf"{remote}/{name}: SHA-256 is .*upload the folder"):
        open_records(remote)
    Folder(remote).write(name, [original[:-1]])
    with pytest.raises(StorageError, match=rf"{remote}/{name}: .*copy it again"):
        open_records(remote)
    Folder(remote).delete(name)
    with pytest.raises(StorageError, match=rf"{remote}/{name}: no such bucket or file"):
        open_records(remote)
    Folder(remote).write(name, [original])
    Folder(remote).write("index.npy", [b"\0" * 1_000])
    with pytest.raises(RecordsError, match=rf"{remote}/index.npy: SHA-256 is"):
        open_records(remote)
    assert not list(stage.glob("*.partial")) and not list(stage.glob("*/dataset.json"))


@pytest.mark.parametrize(
    "meta", [b"{", b"[]", b"{}", b'{"shards": [{"file": "a", "bytes": 1}], "index_sha256": "x"}']
)
def test_invalid_dataset_json_is_rejected(gs, stage, meta):
    Folder(gs).write("dataset.json", [meta])
    with pytest.raises(RecordsError, match="dataset.json: damaged, or written before shards had"):
        open_records(gs)


def test_names_that_leave_the_folder_are_rejected(remote, stage, local):
    meta = (local / "dataset.json").read_text().replace("00001-of", "../00001-of")
    Folder(remote).write("dataset.json", [meta.encode()])
    with pytest.raises(StorageError, match="is not a name inside this folder"):
        open_records(remote)
    assert not list(stage.parent.glob("00001*"))


def test_missing_records_and_unwritable_staging_folder(gs, remote, tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="nowhere/dataset.json: no such bucket or file"):
        open_records("gs://bucket/nowhere")
    with pytest.raises(StorageError, match="a slash of gs://: use str"):
        open_records(pathlib.Path("gs://bucket/nowhere"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / "file" / "stage"))
    with pytest.raises(
        StorageError, match="cannot be created .*set MEDMAX_STAGE to another folder"
    ):
        open_records(remote)
    monkeypatch.delenv(workdir.STAGE_VARIABLE)
    monkeypatch.setattr(workdir.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "else").mkdir()
    (tmp_path / f"medmax_jax_{os.getuid()}").symlink_to(tmp_path / "else")  # by another user
    with pytest.raises(
        StorageError, match="not a folder that this user owns; set MEDMAX_STAGE to one"
    ):
        open_records(remote)
    (tmp_path / f"medmax_jax_{os.getuid()}").unlink()
    assert open_records(remote).folder.parent == tmp_path / f"medmax_jax_{os.getuid()}"
    shutil.rmtree(tmp_path / f"medmax_jax_{os.getuid()}")
