"""Workdirs under gs://, on a real fake-gcs-server: leases, uploads, kills, damage."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from gs_server import fixture_gs, fixture_server  # noqa: F401

from medmax_jax.storage import gcs, lease, workdir
from medmax_jax.storage.folder import Folder
from medmax_jax.storage.gcs import Bucket, StorageError
from medmax_jax.storage.lease import LeaseError

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import sys, time
from medmax_jax.storage import workdir
with workdir.opened(sys.argv[1]) as work:
    for n in range(10_000):
        with open(work.folder / "metrics.jsonl", "a") as file:
            file.write('{"n": %d}\\n' % n)
        (work.folder / "state.tmp").write_text(str(n))
        (work.folder / "state.tmp").replace(work.folder / "state.json")
        print(n, flush=True)
        time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch, tmp_path):
    monkeypatch.setenv(lease.LEASE_VARIABLE, "1")
    monkeypatch.setenv(workdir.SYNC_VARIABLE, "0.1")
    monkeypatch.setenv(workdir.STAGE_VARIABLE, str(tmp_path / "stage"))


def holder(path: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], cwd=ROOT, text=True, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def text(path: str, name: str) -> str:
    return Folder(path).read(name).tobytes().decode()


def test_files_are_in_the_bucket_and_come_back(gs, tmp_path):
    with workdir.opened(gs) as work:
        assert work.path == gs and work.url("a/b") == f"{gs}/a/b"
        (work.folder / "a").mkdir()
        (work.folder / "a" / "b").write_text("1")
        (work.folder / "log.jsonl").write_text("1\n")
        (work.folder / "x.partial").write_text("unfinished")
        work.flush()
        assert Folder(gs).names() == [".lease", "a/b", "log.jsonl"]
        with open(work.folder / "log.jsonl", "a") as file:
            file.write("2\n")
        (work.folder / "a" / "b").unlink()
    assert Folder(gs).names() == ["log.jsonl"] and text(gs, "log.jsonl") == "1\n2\n"
    assert not list((tmp_path / "stage" / "workdirs").glob("*"))  # the local copy is gone
    with workdir.opened(gs) as work:
        assert (work.folder / "log.jsonl").read_text() == "1\n2\n"
        (work.folder / "log.jsonl").unlink()
    assert Folder(gs).names() == []


def test_a_local_path_is_a_plain_folder(tmp_path):
    with workdir.opened(tmp_path / "new") as work:
        work.flush()
        work.check()
        assert work.folder == tmp_path / "new" and work.url("a") == f"{tmp_path}/new/a"
    assert list((tmp_path / "new").iterdir()) == []


def test_changes_are_uploaded_in_their_order(gs, monkeypatch):
    uploads, write = [], Bucket.write

    def note(self, name, *args, **kwargs):
        uploads.append(name)
        return write(self, name, *args, **kwargs)

    monkeypatch.setenv(workdir.SYNC_VARIABLE, "600")
    monkeypatch.setattr(Bucket, "write", note)
    with workdir.opened(gs) as work:
        for name in ("run.json", "z.jsonl", "b", "a"):
            (work.folder / name).write_text("1")
            time.sleep(0.01)
        work.flush()
        (work.folder / "a").write_text("2")
        with open(work.folder / "z.jsonl", "a") as log:
            log.write("2")  # last, but "a" may rely on what was in it before
        (work.folder / "b").touch()  # the same content
        work.flush()
    names = [name for name in uploads if name != ".lease"]
    assert names == ["run.json", "z.jsonl", "b", "a", "z.jsonl", "a"]


def test_modes_that_do_not_upload(gs):
    Folder(gs).write("a", [b"1"])
    for mode, names in (("read", ["a"]), ("empty", [])):
        with workdir.opened(gs, mode=mode) as work:
            assert [p.name for p in work.folder.iterdir()] == names
            (work.folder / "b").write_text("2")
    assert Folder(gs).names() == ["a"]


def test_patterns_are_left_in_the_bucket(gs):
    Folder(gs).write("run/state/big", [b"1"])
    with workdir.opened(gs, skip=("*/state/*",)) as work:
        assert list(work.folder.iterdir()) == []
        (work.folder / "run" / "state").mkdir(parents=True)
        (work.folder / "run" / "state" / "more").write_text("1")
    assert Folder(gs).names() == ["run/state/big"]


def test_a_second_writer_is_refused(gs):
    with workdir.opened(gs), pytest.raises(LeaseError, match=rf"{gs}: in use by .*:{os.getpid()}"):
        with workdir.opened(gs):
            pytest.fail("must not begin")
    with workdir.opened(gs, writer="0"), workdir.opened(gs, writer="1"):
        pass  # they write different files


def test_two_processes_that_start_together_are_one_writer(gs, tmp_path):
    both = [holder(gs, MEDMAX_STAGE=str(tmp_path / str(n))) for n in range(2)]
    try:
        deadline = time.monotonic() + 60
        while all(p.poll() is None for p in both) and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = [p for p in both if p.poll() is not None]
        assert len(refused) == 1 and "in use by" in refused[0].stderr.read()
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_killed_holder_is_followed_without_a_wait(gs):
    process = holder(gs)
    while process.stdout.readline() != "20\n":
        pass
    process.kill()
    process.communicate()
    lines = []
    with workdir.opened(gs, log=lines.append) as work:
        rows = (work.folder / "metrics.jsonl").read_text().splitlines()
        state = int((work.folder / "state.json").read_text())
        assert len(rows) >= state  # the log is never behind what was written later
    assert not any("waiting" in line for line in lines)


def test_a_holder_of_another_machine_is_waited_for(gs, monkeypatch):
    Bucket(gs).write(".lease", b'{"holder": "host-9:77", "token": "x", "space": "other"}')
    lines, begin = [], time.monotonic()
    with workdir.opened(gs, log=lines.append):
        assert time.monotonic() - begin >= 1
    assert lines[0] == f"{gs}: waiting up to 1 s for the lease of host-9:77"


def test_a_lost_lease_stops_the_loser_before_it_writes(gs):
    """A process that was suspended longer than its lease."""
    process = holder(gs)
    while process.stdout.readline() != "5\n":
        pass
    process.send_signal(signal.SIGSTOP)
    with workdir.opened(gs) as work:  # takes over
        (work.folder / "state.json").write_text("winner")
        work.flush()
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and "has taken over this folder" in errors, errors
    assert text(gs, "state.json") == "winner"


def test_a_flipped_bit_is_reported(gs):
    with workdir.opened(gs) as work:
        (work.folder / "records.jsonl").write_text('{"id": "a"}\n')
    stored = Folder(gs).stored("records.jsonl")
    content = bytearray(Folder(gs).read("records.jsonl").tobytes())
    for bit in range(0, 8 * len(content), 5):
        content[bit // 8] ^= 1 << bit % 8
        Bucket(gs).write("records.jsonl", bytes(content), sha256=stored.sha256)
        with pytest.raises(StorageError, match="records.jsonl: damaged: its SHA-256 is"):
            with workdir.opened(gs):
                pytest.fail("must not begin")
        content[bit // 8] ^= 1 << bit % 8


def test_a_file_that_another_process_changed_is_not_overwritten(gs):
    with pytest.raises(StorageError, match="a: changed by another .*not uploaded is in") as caught:
        with workdir.opened(gs) as work:
            (work.folder / "a").write_text("1")
            work.flush()
            Bucket(gs).write("a", b"theirs")
            (work.folder / "a").write_text("2")
    assert text(gs, "a") == "theirs"
    kept = pathlib.Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "a").read_text() == "2"


def test_a_folder_that_is_written_at_once(gs):
    with contextlib.suppress(KeyError), workdir.opened(gs, fresh=True) as work:
        (work.folder / "shard").write_text("1")
        work.flush()
        raise KeyError  # as if killed before its end
    Folder(gs).write(workdir.UNFINISHED_MARK, [b""])
    with workdir.opened(gs, fresh=True) as work:
        assert Folder(gs).names() == [".lease"] and list(work.folder.iterdir()) == []
        (work.folder / "dataset.json").write_text("{}")
    assert list(Bucket(gs).generations()) == ["dataset.json"]
    with pytest.raises(StorageError, match="exists and is not empty.*gcloud storage rm -r"):
        with workdir.opened(gs, fresh=True):
            pytest.fail("must not begin")


@pytest.mark.parametrize("name", [lease.LEASE_VARIABLE, workdir.SYNC_VARIABLE])
def test_invalid_seconds_are_rejected(gs, monkeypatch, name):
    monkeypatch.setenv(name, "soon")
    with pytest.raises(StorageError, match=f"{name}=soon: use seconds from"):
        with workdir.opened(gs):
            pytest.fail("must not begin")


def test_a_lease_survives_an_answer_that_got_lost(gs):
    held = lease.Lease(Bucket(gs), ".lease", print)
    write = held._store.write

    def lose_the_answer(*args):
        write(*args)
        raise gcs.ConflictError("the retry found a newer generation")

    held._store.write = lose_the_answer
    held.acquire()
    held.renew()
    held._store.write = write
    held.renew()
    held.release()
    assert Folder(gs).names() == []


def test_uploads_in_the_background(gs):
    with workdir.opened(gs) as work:
        (work.folder / "log.jsonl").write_text("1\n")
        deadline = time.monotonic() + 20
        while "log.jsonl" not in Folder(gs).names() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert text(gs, "log.jsonl") == "1\n"
    assert threading.active_count() < 20
