"""Create a checkpoint folder atomically, on a local disk or under gs://.

local     path.partial, fsync, rename; a lock file next to it ensures a single writer
gs://     has no rename: written in place, but the commit file (`seal`), which every reader
          requires, is held back and written last; a lock object .partial-.. ensures a single writer
"""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from medmax_jax.storage.folder import (
    Folder,
    StorageError,
    check_name,
    fsync_folder,
    os_errors,
    raise_storage_error,
)
from medmax_jax.storage.gcs import LOCK_OBJECT, PERMISSION_HINT, SPACE, Bucket


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, bytes_needed: int, seal: str) -> Iterator[Folder]:
    """Create a folder atomically: it appears at the end of the block, if the block did not raise.

    `seal` is the commit file, without which no reader accepts the folder; the block must write it.
    A path that contains files, a path that another process is writing, and a local disk with too
    little space are refused. A leftover of a killed run is removed from a disk; on gs:// it looks
    like an active run, so the error names it. Afterwards the folder is Folder(path); the object
    that the block received is no longer valid.
    """
    folder = Folder(path)
    check_name(folder.path, seal)
    if folder.remote:
        with _sealed(folder.store, seal):
            yield folder
    else:
        with _on_disk(folder.path, bytes_needed, seal) as unfinished:
            yield unfinished


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Restrict files that the block creates to their owner from creation on: 0700 and 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def private_folder(path: str | os.PathLike) -> Iterator[None]:
    """Make `path` and all that the block creates accessible to its owner only: 0700 and 0600.

    An existing folder is closed to others before anything is written into it.
    """
    with private_umask():
        with os_errors(str(path)):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o700)
        yield


@contextlib.contextmanager
def _on_disk(path: str, bytes_needed: int, seal: str) -> Iterator[Folder]:
    path = os.path.realpath(path)  # a link to an empty folder continues to point to it
    above, partial = os.path.dirname(path), path + ".partial"
    _check_vacant(path)
    if not os.path.lexists(partial):
        check_space(path, bytes_needed)
    with os_errors(above):
        os.makedirs(above, exist_ok=True)
    with _locked(partial + ".lock", path):
        _check_vacant(path)  # again: another writer may have finished just now
        try:
            with os_errors(partial):
                if os.path.lexists(partial):
                    shutil.rmtree(partial)  # left by a killed run
                check_space(path, bytes_needed)
                os.mkdir(partial)
            unfinished = Folder(partial)
            yield unfinished
            if not unfinished.has(seal):
                raise _unsealed(path, seal)
            with os_errors(path):
                _sync_below(partial)
                os.replace(partial, path)
                fsync_folder(above)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _sealed(store: Bucket, seal: str) -> Iterator[None]:
    """Hold the commit file back and write it after the block; delete everything on an error."""
    lock_object = LOCK_OBJECT + secrets.token_hex(8)
    store.write(lock_object, b"")
    try:
        _check_alone(store, lock_object, seal)
    except BaseException:
        with contextlib.suppress(StorageError):
            store.delete(lock_object)
        raise
    store.seal, store.held_content = seal, None
    try:
        yield
        if store.held_content is None:
            raise _unsealed(store.path, seal)
        store.delete(lock_object)
        store.write(seal, store.held_content)
    except BaseException as e:
        try:
            store.delete_all()
        except StorageError as cleanup_error:
            e.add_note(
                f"some files remain ({cleanup_error}); delete them: "
                f"gcloud storage rm -r {store.path}"
            )
        raise
    finally:
        store.seal, store.held_content = "", None


def _check_alone(store: Bucket, lock_object: str, seal: str) -> None:
    """Raise StorageError unless this is the only writer.

    Each writer creates its lock object before it lists the folder, so of two concurrent writers at
    most one finds itself alone.
    """
    objects = store.generations()
    if lock_object not in objects:
        raise StorageError(f"{store.path}: cannot list its own files; {PERMISSION_HINT}")
    if others := [name for name in objects if name != lock_object]:
        why = "" if seal in others else f" but no {seal}: a run was killed or is still writing"
        raise StorageError(
            f"{store.path}: not empty, contains {others[0]}{why}; choose another path, or delete "
            f"it: gcloud storage rm -r {store.path}"
        )


def _unsealed(path: str, seal: str) -> StorageError:
    """Return the error for a new folder that lacks its commit file."""
    return StorageError(f"{path}: {seal} was not written; write it inside the block")


def _check_vacant(path: str) -> None:
    with os_errors(path):
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise StorageError(f"{path}: exists and is not empty; choose another path or delete it")


def check_space(path: str, bytes_needed: int, *, fix: str = SPACE) -> None:
    """Raise StorageError, which ends in `fix`, where the disk of a new folder is too small."""
    above = os.path.dirname(path)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    if (free := shutil.disk_usage(above).free) < bytes_needed:
        raise StorageError(f"{path}: needs {bytes_needed} bytes, but only {free} are free; {fix}")


@contextlib.contextmanager
def _locked(lock: str, path: str) -> Iterator[None]:
    """Hold the lock file during the block; the kernel releases it when the process dies."""
    with contextlib.ExitStack() as stack:
        descriptor = None
        # otherwise its previous holder has just removed it
        while descriptor is None or not _is_at(descriptor, lock):
            with os_errors(lock):
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise StorageError(
                        f"{path}: another process is writing it; wait or choose another path"
                    ) from e
        stack.callback(pathlib.Path(lock).unlink, missing_ok=True)
        yield


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_below(path: str) -> None:
    for folder, _, files in os.walk(path, onerror=raise_storage_error):
        for name in [*files, "."]:
            fsync_folder(os.path.join(folder, name))
