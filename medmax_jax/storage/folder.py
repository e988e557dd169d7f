"""The files of a checkpoint, under a local folder or under gs://bucket/prefix.

    call              local                            gs:// (medmax_jax/storage/gcs.py)
    read, file        pread                            ranges of 16 MiB, eight in flight
    write, stream     name.partial, fsync, rename      a resumable upload in parts of 16 MiB

Every failure is a StorageError, in bounded time: a server that does not respond for 60 s counts as
dead (MEDMAX_STORAGE_TIMEOUT in the environment, in seconds, overrides it); refused connections and
overload are retried for as long. Names have the form "a/b.json": they cannot leave the folder.
Symbolic links on a disk are followed, because Hugging Face's cache requires it.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from medmax_jax.io.settings_files import MAX_JSON_BYTES, parse_settings
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage.gcs import (
    CHUNK_BYTES,
    SPACE,
    Bucket,
    StorageError,
    StoredFile,
    Upload,
    as_bytes,
    changed_error,
    not_found_error,
    wait,
)

__all__ = ["ByteFile", "Folder", "StorageError", "StoredFile", "wait"]

DOWNLOAD_BYTES = 8 * CHUNK_BYTES  # in memory at a time
HINTS = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EACCES: "check the owner and the permissions of the folder",
    errno.EROFS: "choose a writable disk",
}


class Folder:
    """Files under a local folder or a gs:// prefix, which need not exist yet."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = _normal(os.fspath(path))
        self.remote = self.path.startswith("gs://")
        self.store = Bucket(self.path) if self.remote else _Disk(self.path)

    def names(self) -> list[str]:
        """Return all files below, sorted, or [] if there are none.

        Links to folders are not followed.
        """
        return self.store.names()

    def children(self) -> list[str]:
        """Return the names directly below, of files and of folders, sorted."""
        return self.store.children()

    def exists(self) -> bool:
        """Return whether there is a file below, or a local folder."""
        return os.path.isdir(self.path) if not self.remote else bool(self.names())

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        self.store.delete(check_name(self.path, name))

    def remove(self) -> None:
        """Delete everything below, and a local folder itself."""
        self.store.delete_all()

    def move_to(self, target: "Folder") -> None:
        """Move everything to another folder of the same disk or bucket, which must not exist."""
        self.store.move_all(target.store)

    def has(self, name: str) -> bool:
        """Return whether the file exists."""
        return self.store.version(check_name(self.path, name)) is not None

    def size(self, name: str) -> int:
        """Return the size of the file in bytes; on gs:// this takes about ten round trips."""
        return self.store.size(check_name(self.path, name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "n"]:
        """Return exactly these bytes, in newly allocated memory."""
        _check_range(self.store.full(check_name(self.path, name)), start, stop)
        return self.store.read(name, start, stop, None)

    def json(self, name: str, *, allow_nonfinite: bool = False) -> Any:
        """Return the value of a JSON file, within the bounds of parse_settings."""
        full = self.store.full(check_name(self.path, name))
        if self.store.has_more(name, MAX_JSON_BYTES):
            raise StorageError(
                f"{full}: more than {MAX_JSON_BYTES} bytes; not a JSON file of a checkpoint"
            )
        try:
            data = self.read(name).tobytes()
            return parse_settings(data, full, allow_nonfinite=allow_nonfinite)
        except TextFileError as e:
            raise StorageError(f"{e}; copy it again") from e

    def file(self, name: str) -> "ByteFile":
        """Return the file for range reads."""
        return ByteFile(self.store, check_name(self.path, name))

    def stored(self, name: str) -> StoredFile | None:
        """Return the generation and the SHA-256 of an object that `download` can check."""
        return self.store.stored(check_name(self.path, name))

    def download(self, name: str, target: Path) -> StoredFile:
        """Copy a file to a local one; raise StorageError where its stored SHA-256 differs."""
        stored, file = self.stored(name), self.file(name)
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with os_errors(str(target)), open(target, "wb") as out:
            for start in range(0, file.size, DOWNLOAD_BYTES):
                part = file.read(start, min(start + DOWNLOAD_BYTES, file.size))
                digest.update(part)
                out.write(part)
        if stored is None or stored.sha256 not in ("", digest.hexdigest()):
            raise StorageError(
                f"{file.name}: damaged: its SHA-256 is {digest.hexdigest()}, but "
                f"{stored and stored.sha256} was uploaded; restore it, or delete it to start again"
            )
        return StoredFile(stored.generation, digest.hexdigest())

    def write(
        self, name: str, parts: Iterable[bytes | bytearray | memoryview | np.ndarray]
    ) -> None:
        """Write the parts as one file, atomically; an existing file is replaced."""
        with self.stream(name) as out:
            for part in parts:
                out.write(part)

    def stream(self, name: str) -> contextlib.AbstractContextManager["_FileWriter | Upload"]:
        """Write piece by piece: `with folder.stream(name) as out: out.write(part)`."""
        return self.store.stream(check_name(self.path, name))

    def kvstore(self, name: str) -> dict[str, Any]:
        """Return TensorStore's spec of a sub-folder, retries included; `wait` for what it opens."""
        return self.store.kvstore(check_name(self.path, name))


class ByteFile:
    """One file for range reads; a read after the file was replaced raises StorageError."""

    def __init__(self, store: "_Disk | Bucket", name: str) -> None:
        self.name = store.full(name)
        self.store, self._name, self._stamp = store, name, store.version(name)
        if self._stamp is None:
            raise not_found_error(self.name)

    @functools.cached_property
    def size(self) -> int:
        """Return the size of the file in bytes; it is requested only once."""
        return self.store.size(self._name)

    def read(self, start: int, stop: int | None = None) -> UInt8[np.ndarray, "n"]:
        """Return exactly these bytes, in newly allocated memory."""
        _check_range(self.name, start, stop)
        return self.store.read(self._name, start, stop, self._stamp)

    def digest(self, kind: str) -> str:
        """Return the hex digest of the file, in bounded memory; `kind` is sha256 or md5."""
        digest = hashlib.new(kind, usedforsecurity=False)
        for start in range(0, self.size, CHUNK_BYTES):
            digest.update(self.read(start, min(start + CHUNK_BYTES, self.size)))
        return digest.hexdigest()


class _Disk:
    """A local folder with the methods of Bucket."""

    def __init__(self, path: str) -> None:
        self.path = path

    def full(self, name: str) -> str:
        return os.path.join(self.path, name)

    def names(self) -> list[str]:
        if not os.path.lexists(self.path):
            return []
        if not os.path.isdir(self.path):
            raise StorageError(f"{self.path}: not a folder; use the folder that contains the files")
        names = []
        with os_errors(self.path):
            for folder, _, files in os.walk(self.path, onerror=raise_storage_error):
                names += [os.path.relpath(os.path.join(folder, f), self.path) for f in files]
        return sorted(names)

    def children(self) -> list[str]:
        with os_errors(self.path):
            return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []

    def delete(self, name: str) -> None:
        with os_errors(self.full(name)), contextlib.suppress(FileNotFoundError):
            os.unlink(self.full(name))

    def delete_all(self) -> None:
        with os_errors(self.path), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    def move_all(self, target: "_Disk") -> None:
        with os_errors(self.path):
            os.rename(self.path, target.path)

    def version(self, name: str) -> tuple[int, ...] | None:
        with os_errors(self.full(name)):
            try:
                status = os.stat(self.full(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _stamp(status) if stat.S_ISREG(status.st_mode) else None  # a pipe would block

    def size(self, name: str) -> int:
        stamp = self.version(name)
        if stamp is None:
            raise not_found_error(self.full(name))
        return stamp[0]

    def has_more(self, name: str, nbytes: int) -> bool:
        return self.size(name) > nbytes

    def read(
        self, name: str, start: int, stop: int | None, stamp: tuple[int, ...] | None
    ) -> UInt8[np.ndarray, "n"]:
        full, size = self.full(name), self.size(name)
        stop = size if stop is None else stop
        if not start <= stop <= size:
            raise StorageError(
                f"{full}: bytes {start} to {stop} are not in its {size} bytes; copy it again"
            )
        out = np.empty(stop - start, np.uint8)
        rest = memoryview(out)
        with os_errors(full), open(self.full(name), "rb", buffering=0) as file:
            if stamp not in (None, _stamp(os.fstat(file.fileno()))):
                raise changed_error(full)
            while rest:  # Linux returns at most 2 GiB per call
                count = os.preadv(file.fileno(), [rest], stop - len(rest))
                if not count:
                    raise changed_error(full)
                rest = rest[count:]
        return out

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator["_FileWriter"]:
        full = self.full(name)
        partial = full + ".partial"
        with os_errors(full):
            os.makedirs(os.path.dirname(full), exist_ok=True)
            raw = open(partial, "wb", buffering=0)
        try:
            with raw:
                yield _FileWriter(full, raw)
                with os_errors(full):
                    os.fsync(raw.fileno())
            with os_errors(full):
                os.replace(partial, full)
                fsync_folder(os.path.dirname(full))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise

    def kvstore(self, name: str) -> dict[str, Any]:
        return {"driver": "file", "path": self.full(name) + "/"}


class _FileWriter:
    """A local file that is being written.

    It is unbuffered, so that a full disk is detected immediately.
    """

    def __init__(self, full: str, raw: io.FileIO) -> None:
        self._full, self._raw = full, raw

    def write(self, part: bytes | bytearray | memoryview | np.ndarray) -> None:
        rest = as_bytes(part)
        with os_errors(self._full):
            while rest:
                rest = rest[self._raw.write(rest) :]


def _normal(path: str) -> str:
    if path.startswith("gs://"):
        bucket, _, prefix = path.removeprefix("gs://").rstrip("/").partition("/")
        return f"gs://{bucket}/{check_name(path, prefix)}" if prefix else f"gs://{bucket}"
    if not path or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path):
        raise StorageError(
            f"{path!r}: neither a local path nor gs://bucket/folder; mount or copy the folder "
            "(pathlib.Path drops a slash of gs://: use str)"
        )
    return os.path.abspath(path)


def check_name(path: str, name: str) -> str:
    """Return the name if it stays below the path; otherwise raise StorageError."""
    if "\\" in name or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
        raise StorageError(
            f"{path}: {name!r} is not a name inside this folder; use one like 'a/b.json'"
        )
    return name


def _check_range(full: str, start: int, stop: int | None) -> None:
    if start < 0 or (stop is not None and stop < start):
        raise StorageError(f"{full}: invalid range {start} to {stop}; use 0 <= start <= stop")


def fsync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def raise_storage_error(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        hint = HINTS.get(e.errno, "check the path and the disk")
        raise StorageError(f"{path}: {e.strerror or e}; {hint}") from e


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file: an image, a shard, weights."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
