"""Folders that are created atomically: full disks, kills, concurrent writers; local and gs://."""

import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from gs_server import (  # noqa: F401
    ARRAY,
    fixture_gs,
    fixture_path,
    fixture_server,
    fixture_small_disk,
    read_array,
    write_array,
)

from medmax_jax.storage import gcs
from medmax_jax.storage.atomic_folder import atomic_folder
from medmax_jax.storage.folder import Folder, StorageError

ROOT = pathlib.Path(__file__).parents[2]


def child(code, *arguments):
    """A Python of its own; the caller reads its lines and ends it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_full_disk_leaves_no_partial_folder(small_disk):
    with (
        pytest.raises(StorageError, match="disk/7b.partial/x: No space left"),
        atomic_folder(small_disk / "7b", bytes_needed=1000, seal="config.json") as new,
    ):
        new.write("config.json", [b"{}"])
        new.write("x", (bytes(1000) for _ in range(2000)))
    assert os.listdir(small_disk) == []
    with (
        pytest.raises(
            StorageError, match="partial: RESOURCE_EXHAUSTED.*No space.*; free some space"
        ),
        atomic_folder(small_disk / "7b", bytes_needed=1000, seal="config.json") as new,
    ):
        new.write("x", [bytes(shutil.disk_usage(small_disk).free)])
        write_array(new, "arrays/q")
    needs = r"disk/a/7b: needs 1048577 bytes, but only 1048576 are free; free some space"
    with (
        pytest.raises(StorageError, match=needs),
        atomic_folder(small_disk / "a/7b", bytes_needed=(1 << 20) + 1, seal="config.json"),
    ):
        pytest.fail("must not begin")
    assert os.listdir(small_disk) == []


def test_folder_appears_atomically(path):
    with atomic_folder(path, bytes_needed=100, seal="config.json") as new:
        new.write("config.json", [b"{}"])
        new.write("a/w", [b"1"])
        write_array(new, "arrays/q")
        assert not Folder(path).has("config.json")
        assert {name.split("/")[0] for name in new.names()} <= {"a", "arrays", "config.json"}
    folder = Folder(path)
    assert folder.json("config.json") == {} and folder.read("a/w").tobytes() == b"1"
    np.testing.assert_array_equal(read_array(folder, "arrays/q"), ARRAY)
    assert len(folder.names()) == 5
    with (
        pytest.raises(StorageError, match=r"7b: .*not empty.*; choose another path,? or delete"),
        atomic_folder(path, bytes_needed=0, seal="config.json"),
    ):
        pytest.fail("must not begin")
    assert len(Folder(path).names()) == 5


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, None])
def test_failed_folder_leaves_nothing(path, error):
    with (
        pytest.raises(
            error or StorageError, match=None if error else "config.json was not written; write"
        ),
        atomic_folder(path, bytes_needed=0, seal="config.json") as new,
    ):
        new.write("a/w", [b"1"])
        write_array(new, "arrays/q")
        if error:
            new.write("config.json", [b"{}"])
            raise error
    assert Folder(path).names() == []
    if not Folder(path).remote:
        assert os.listdir(os.path.dirname(path)) == []
    with atomic_folder(path, bytes_needed=0, seal="config.json") as new:  # and can be tried again
        new.write("config.json", [b"{}"])
    assert Folder(path).names() == ["config.json"]


def test_valid_places_for_a_new_folder(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to("big")
    with atomic_folder(str(tmp_path / "out") + "/", bytes_needed=0, seal="s") as new:
        new.write("s", [b"1"])
    assert (tmp_path / "big/s").read_bytes() == b"1" and (tmp_path / "out").is_symlink()
    (tmp_path / "file").write_text("x")
    for name in ("file", "big", "out"):
        with (
            pytest.raises(StorageError, match="exists and is not empty"),
            atomic_folder(tmp_path / name, bytes_needed=0, seal="s"),
        ):
            pytest.fail("must not begin")
    (tmp_path / "dead.partial").mkdir()
    for name in ("far/7b", "dead"):
        with (
            pytest.raises(
                StorageError, match=rf"{name}: needs {1 << 60} bytes, but only \d+ are free"
            ),
            atomic_folder(tmp_path / name, bytes_needed=1 << 60, seal="s"),
        ):
            pytest.fail("must not begin")
    assert sorted(os.listdir(tmp_path)) == ["big", "file", "out"]


HOLD = """
import sys, time
from medmax_jax.storage.atomic_folder import atomic_folder
with atomic_folder(sys.argv[1], bytes_needed=0, seal="config.json") as new:
    new.write("config.json", [b"{}"])
    with new.stream("model-00001.safetensors") as out:
        out.write(bytes(100_000))
        print("writing", flush=True)
        time.sleep(600)
"""


def test_second_process_waits_until_the_first_is_killed(path):
    def write_folder():
        with atomic_folder(path, bytes_needed=0, seal="config.json") as new:
            new.write("config.json", [b"[2]"])

    with child(HOLD, path) as other:
        try:
            assert other.stdout.readline() == "writing\n"
            with pytest.raises(StorageError, match="another process is writing it|still writing"):
                write_folder()
        finally:
            other.send_signal(signal.SIGKILL)
    assert not Folder(path).has("config.json")
    if Folder(path).remote:  # a dead writer of a bucket cannot be distinguished from a slow one
        with pytest.raises(
            StorageError, match=r"no config.json: a run was killed.*gcloud storage rm -r"
        ):
            write_folder()
        return
    assert os.path.exists(path + ".partial/model-00001.safetensors.partial")  # it was mid-file
    write_folder()
    assert Folder(path).json("config.json") == [2]
    assert os.listdir(os.path.dirname(path)) == ["7b"]


def test_only_one_of_many_concurrent_writers_succeeds(path):
    start = threading.Barrier(8)

    def write_concurrently(number):
        start.wait()
        with (
            contextlib.suppress(StorageError),
            atomic_folder(path, bytes_needed=0, seal="s.json") as new,
        ):
            new.write("a", [b"%d" % number])
            time.sleep(0.05)
            new.write("s.json", [b"%d" % number])
            return number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        winners = {n for n in pool.map(write_concurrently, range(8)) if n is not None}
    folder = Folder(path)
    assert len(winners) <= 1
    if not folder.remote or winners:  # in a bucket all may give way to each other
        assert folder.names() == ["a", "s.json"] and {folder.json("a")} == winners
        assert {folder.json("s.json")} == winners


@pytest.mark.parametrize("other_writer", ["finishes", "continues"])
def test_writer_that_starts_between_the_check_and_the_lock(tmp_path, monkeypatch, other_writer):
    """The lock file that was opened is then one that its holder has removed."""
    flock, open_writers = fcntl.flock, contextlib.ExitStack()

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        with (
            contextlib.suppress(KeyError),
            atomic_folder(tmp_path / "7b", bytes_needed=0, seal="s") as new,
        ):
            new.write("s", [b"1"])
            if other_writer == "continues":
                raise KeyError
        if other_writer == "continues":
            open_writers.enter_context(atomic_folder(tmp_path / "7b", bytes_needed=0, seal="s"))
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    match = "not empty" if other_writer == "finishes" else "another process is writing it"
    with (
        pytest.raises(StorageError, match=match),
        atomic_folder(tmp_path / "7b", bytes_needed=0, seal="s"),
    ):
        pytest.fail("must not begin")
    with contextlib.suppress(
        StorageError
    ):  # a writer that continues has not written the commit file
        open_writers.close()
    assert os.listdir(tmp_path) == (["7b"] if other_writer == "finishes" else [])


def test_lock_objects_are_removed(gs):
    objects = gcs.Bucket(gs).generations
    with atomic_folder(gs, bytes_needed=0, seal="s") as new:
        new.write("a", [b"1"])
        assert [name[:9] for name in objects()] == [gcs.LOCK_OBJECT, "a"]
        with (
            pytest.raises(StorageError, match="not empty, contains .partial-.* still writing"),
            atomic_folder(gs, bytes_needed=0, seal="s"),
        ):
            pytest.fail("must not begin")
        assert [name[:9] for name in objects()] == [gcs.LOCK_OBJECT, "a"]
        new.write("s", [b"1"])
    assert list(objects()) == ["a", "s"]


def test_listing_without_the_own_lock_object_is_an_error(gs, monkeypatch):
    """Of two writers, one must see the other."""
    with monkeypatch.context() as refused:
        refused.setattr(gcs.Bucket, "generations", lambda self: {})
        with (
            pytest.raises(StorageError, match="7b: cannot list its own files; give this account"),
            atomic_folder(gs, bytes_needed=0, seal="s"),
        ):
            pytest.fail("must not begin")
    assert gcs.Bucket(gs).generations() == {}
