"""Files of a checkpoint on a disk and on a real fake-gcs-server, and their failures."""

import os
import pathlib

import ml_dtypes
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

from medmax_jax.storage import folder as folder_module
from medmax_jax.storage.atomic_folder import atomic_folder
from medmax_jax.storage.folder import Folder, StorageError

GIB = 1 << 30


# ---- reads and writes, both kinds ----


def test_written_files_are_read_back(path):
    folder = Folder(path)
    assert folder.names() == [] and not folder.has("a/b.bin")
    data = np.arange(24, dtype=np.float32).reshape(4, 6)
    half = data.astype(ml_dtypes.bfloat16)
    folder.write("a/b.bin", (part for part in [b"head", data.T, memoryview(data), half]))
    folder.write("config.json", [b'{"a": ', bytearray(b"1}")])
    folder.write("empty", [])
    expected = b"head" + data.T.tobytes() + data.tobytes() + half.tobytes()
    assert folder.names() == ["a/b.bin", "config.json", "empty"]
    assert folder.has("a/b.bin") and not folder.has("a")
    assert folder.size("a/b.bin") == len(expected) and folder.size("empty") == 0
    assert folder.json("config.json") == {"a": 1}
    assert folder.read("a/b.bin").tobytes() == expected
    assert folder.read("empty").tobytes() == folder.read("config.json", 3, 3).tobytes() == b""
    assert folder.read("a/b.bin", 7).tobytes() == expected[7:]
    part = folder.read("a/b.bin", 2, 9)
    part[:] = 0  # memory of its own
    assert folder.read("a/b.bin", 2, 9).tobytes() == expected[2:9]
    file = folder.file("a/b.bin")
    assert (file.name, file.size) == (f"{path}/a/b.bin", len(expected))
    assert file.read(4, 100).tobytes() == expected[4:100] and file.read(0).tobytes() == expected
    folder.write("config.json", [b"[]"])  # replaces
    assert folder.json("config.json") == []


def test_missing_and_invalid_files_are_reported(path):
    folder = Folder(path)
    folder.write("short.json", [b'{"a": 1'])
    folder.write("latin.json", ['"\u00e9"'.encode("latin-1")])
    folder.write("deep.json", [b"[" * 100_000])
    for call in (folder.size, folder.read, folder.json, folder.file):
        with pytest.raises(StorageError, match=r"7b/no\.json: no such .*file; check the path"):
            call("no.json")
    problems = dict(
        short="not JSON", latin="byte 1 is not UTF-8", deep="not JSON .nested over 64 levels"
    )
    for name, problem in problems.items():
        with pytest.raises(StorageError, match=rf"7b/{name}\.json: {problem}.*copy it again"):
            folder.json(f"{name}.json")
    with pytest.raises(StorageError, match=r"7b/short\.json: .* copy it again"):
        folder.read("short.json", 3, 50)
    for start, stop in ((-1, 3), (3, 2)):
        with pytest.raises(StorageError, match=r"short\.json: invalid range"):
            folder.file("short.json").read(start, stop)


def test_json_has_a_limit(path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_JSON_BYTES", 10)
    folder = Folder(path)
    folder.write("a.json", [b"[12345678]"])
    folder.write("b.json", [b"[123456789]"])
    assert folder.json("a.json") == [12345678]
    with pytest.raises(StorageError, match=r"b\.json: more than 10 bytes"):
        folder.json("b.json")


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a\\b", "a\n"])
def test_names_outside_the_folder_are_rejected(path, name):
    folder = Folder(path)
    calls = [folder.has, folder.size, folder.read, folder.json, folder.file, folder.kvstore]
    calls += [folder.stream, lambda n: folder.write(n, [b"x"])]
    for call in calls:
        with pytest.raises(StorageError, match="is not a name inside this folder; use one like"):
            call(name)
    with (
        pytest.raises(StorageError, match="not a name"),
        atomic_folder(path, bytes_needed=0, seal=name),
    ):
        pass


def test_paths_must_be_local_or_gs():
    for path in ("", "s3://bucket/x", "https://host/x", pathlib.Path("gs://bucket/x")):
        with pytest.raises(StorageError, match="neither a local path nor gs://bucket/folder"):
            Folder(path)
    for path in ("gs://", "gs://b_/x", "gs://BUCKET/x"):
        with pytest.raises(StorageError, match="use the form gs://bucket/folder"):
            Folder(path)
    with pytest.raises(StorageError, match="is not a name"):
        Folder("gs://bucket/a/../b")
    assert Folder("gs://bucket/a/").path == "gs://bucket/a"
    assert Folder("gs://bucket/").path == "gs://bucket"
    assert Folder("a/../b/").path == os.path.abspath("b")


def test_file_replaced_between_reads_raises(path):
    folder = Folder(path)
    folder.write("w", [b"a" * 100])
    file = folder.file("w")
    assert file.read(0, 50).tobytes() == b"a" * 50
    folder.write("w", [b"b" * 100])
    with pytest.raises(StorageError, match=r"7b/w: changed while it was read; open it again"):
        file.read(50, 100)


def test_failed_stream_writes_nothing(path):
    folder = Folder(path)
    folder.write("w", [b"old"])
    with pytest.raises(KeyError), folder.stream("w") as out:
        out.write(b"new")
        raise KeyError
    with pytest.raises(KeyError), folder.stream("v") as out:
        raise KeyError
    assert folder.names() == ["w"] and folder.read("w").tobytes() == b"old"


def test_tensorstore_arrays(path):
    folder = Folder(path)
    write_array(folder, "arrays/q")
    np.testing.assert_array_equal(read_array(Folder(path), "arrays/q"), ARRAY)
    assert folder.names() == ["arrays/q/c/0/0", "arrays/q/c/1/0", "arrays/q/zarr.json"]
    shard = folder.read("arrays/q/c/1/0")
    shard[5] ^= 1
    folder.write("arrays/q/c/1/0", [shard])
    with pytest.raises(StorageError, match=r"7b: DATA_LOSS.*c/1/0.*; the stored bytes are damaged"):
        read_array(Folder(path), "arrays/q")
    with pytest.raises(StorageError, match=r"7b: NOT_FOUND.*arrays/k/zarr.json"):
        read_array(Folder(path), "arrays/k")


# ---- a disk ----


def test_links_are_followed(tmp_path):
    """A snapshot of Hugging Face's cache is links to ../../blobs; names cannot leave, links may."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("[1]")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "loop").symlink_to("loop")
    (snapshot / "nowhere").symlink_to("nothing")
    folder = Folder(snapshot)
    assert folder.json("config.json") == [1] and folder.file("config.json").size == 3
    with pytest.raises(StorageError, match="loop: "):
        folder.has("loop")
    assert not folder.has("nowhere")
    assert folder.names() == ["config.json", "loop", "nowhere"]
    (tmp_path / "link").symlink_to(snapshot)
    assert Folder(tmp_path / "link").json("config.json") == [1]


def test_pipes_and_folders_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "file/below"):
        with pytest.raises(StorageError, match="no such file"):
            Folder(tmp_path).read(name)
    with pytest.raises(StorageError, match="not a folder; use the folder"):
        Folder(tmp_path / "file").names()
    with pytest.raises(StorageError, match=r"x{300}: File name too long"):
        Folder(tmp_path).has("x" * 300)
    with pytest.raises(StorageError, match=r"folder: Is a directory"):
        Folder(tmp_path).write("folder", [b"x"])
    with pytest.raises(StorageError, match=r"below: File exists"):
        Folder(tmp_path).write("file/below", [b"x"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_short_reads_are_continued(tmp_path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: preadv(file, [to[0][:1000]], at))
    data = np.random.default_rng(0).integers(0, 256, 4321, np.uint8)
    Folder(tmp_path).write("w", [data])
    np.testing.assert_array_equal(Folder(tmp_path).read("w", 7, 4300), data[7:4300])


@pytest.mark.slow
def test_reads_larger_than_one_system_call(tmp_path):
    with open(tmp_path / "w", "wb") as file:
        file.truncate(2 * GIB + 100)  # sparse
        file.seek(2 * GIB + 50)
        file.write(b"end")
    read = Folder(tmp_path).read("w", 10)
    assert read.size == 2 * GIB + 90 and read[2 * GIB + 40 :][:3].tobytes() == b"end"


def test_full_disk_leaves_no_partial_file(small_disk):
    folder = Folder(small_disk)
    folder.write("w", [b"old"])
    full = r"disk/w: No space left on device; free some space, or choose another disk"
    for parts in ([bytes(1000)] * 2000, [bytes(2_000_000)]):
        with pytest.raises(StorageError, match=full):
            folder.write("w", parts)
    assert folder.names() == ["w"] and folder.read("w").tobytes() == b"old"
