"""Copy records on gs:// to a disk of this host, once, and check them by hash.

    gs://bucket/folder/dataset.json   read at every start; its SHA-256 names the copy
    shards and index                  copied only if the copy does not exist; their SHA-256 are
                                      stored in dataset.json, and the copy is renamed when all agree

Processes of a host take turns with a lock that ends with its holder; a later process finds the
copy. Copies are stored in MEDMAX_STAGE, by default a folder of the user's own below the system's
temporary folder. Only their owner can read them. They may be deleted when no process reads them.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from medmax_jax.data.records.document import RecordsError
from medmax_jax.io.progress import ByteProgress, log_to_stderr
from medmax_jax.io.text_files import parse_json
from medmax_jax.storage import hub
from medmax_jax.storage.atomic_folder import atomic_folder, private_umask
from medmax_jax.storage.folder import Folder, StorageError
from medmax_jax.storage.gcs import CHUNK_BYTES, TIMEOUT_VARIABLE, timeout_seconds
from medmax_jax.storage.workdir import staging_folder

META, INDEX = "dataset.json", "index.npy"
STREAMS = 8  # files in transfer at once: one GCS stream does not fill a host's network


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


def stage_to_disk(folder: str | os.PathLike) -> Path:
    """Return the folder, or the local copy of one on gs:// or the hub.

    Raises StorageError or RecordsError.
    """
    folder = hub.locate(folder)
    source = Folder(folder)
    if not source.remote:
        return Path(folder)
    meta = source.read(META).tobytes()
    shards, index_sha256 = _parse_meta(source, meta)
    copy = staging_folder() / hashlib.sha256(meta).hexdigest()[:16]
    if not _is_complete(copy, shards):
        with _host_lock(copy):
            if not _is_complete(copy, shards):  # else the previous holder has just made it
                shutil.rmtree(copy, ignore_errors=True)  # temporary folders lose old files
                files = [*shards, _File(INDEX, source.size(INDEX), index_sha256)]
                _copy(source, meta, files, copy)
    return copy


def _is_complete(copy: Path, shards: list[_File]) -> bool:
    """Return whether a copy has all its files; their content has its own checks."""
    expected = {file.name: file.size for file in shards}
    sizes = {p.name: p.stat().st_size for p in copy.glob("*")}
    return {META, INDEX} <= sizes.keys() and expected.items() <= sizes.items()


def _copy(source: Folder, meta: bytes, files: list[_File], copy: Path) -> None:
    total = sum(file.size for file in files)
    log_to_stderr(f"{source.path}: copying {len(files)} files to {copy}")
    progress = ByteProgress(total, log_to_stderr)
    pool = concurrent.futures.ThreadPoolExecutor(STREAMS)
    with private_umask(), atomic_folder(copy, bytes_needed=total + len(meta), seal=META) as new:
        try:
            for nbytes in pool.map(lambda file: _fetch(source, new, file), files):
                progress(nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
        new.write(META, [meta])
    progress.done(str(copy))


def _parse_meta(source: Folder, meta: bytes) -> tuple[list[_File], str]:
    """Return the shards, and the SHA-256 of the index, from a dataset.json."""
    try:
        fields = parse_json(meta, META)
        shards = [_File(s["file"], int(s["bytes"]), str(s["sha256"])) for s in fields["shards"]]
        return shards, str(fields["index_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordsError(
            f"{source.path}/{META}: damaged, or written before shards had hashes "
            f"({type(error).__name__}: {error}); build the data set again"
        ) from error


def _fetch(source: Folder, new: Folder, file: _File) -> int:
    digest, stored = hashlib.sha256(), source.file(file.name)
    with new.stream(file.name) as out:
        for start in range(0, file.size, CHUNK_BYTES):
            part = stored.read(start, min(start + CHUNK_BYTES, file.size))
            digest.update(part)
            out.write(part)
    if digest.hexdigest() != file.sha256:
        raise RecordsError(
            f"{source.path}/{file.name}: SHA-256 is {digest.hexdigest()}, but {META} states "
            f"{file.sha256}: damaged, or from another data set; upload the folder again"
        )
    return file.size


@contextlib.contextmanager
def _host_lock(copy: Path) -> Iterator[None]:
    """Hold the host's lock on a copy; the kernel frees it when the process dies."""
    partial, limit = copy.with_name(f"{copy.name}.partial"), timeout_seconds()
    with private_umask():
        lock = open(f"{copy}.lock", "w")
    with lock:
        last_size, since = -1, time.monotonic()
        while not _try_lock(lock.fileno()):
            if (size := _folder_size(partial)) != last_size:
                last_size, since = size, time.monotonic()
            elif time.monotonic() - since > limit:
                raise StorageError(
                    f"{partial}: another process is copying it and has written nothing for "
                    f"{limit:.3g} s; end that process, or increase {TIMEOUT_VARIABLE} (seconds)"
                )
            time.sleep(0.1)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _folder_size(folder: Path) -> int:
    """Return the size of all existing files; some may be deleted in the meantime."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
