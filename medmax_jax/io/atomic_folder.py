"""A folder of a checkpoint that appears whole or not at all, on a disk or under gs://.

local     path.partial, fsync, rename; one writer by a lock file beside it
gs://     no rename exists there: in place, but the seal, a file that every reader asks for, is
          held back and written last; one writer by a claim, an object .partial-..
"""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from medmax_jax.io.gcs import LOCK_OBJECT, PERMISSION_HINT, SPACE, Bucket
from medmax_jax.io.storage import (
    Folder,
    StorageError,
    check_name,
    fsync_folder,
    os_errors,
    raise_storage_error,
)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, bytes_needed: int, seal: str) -> Iterator[Folder]:
    """A folder that appears whole or not at all: at the end of the block, if it did not raise.

    `seal` is the file without which no reader takes the folder; the block must write it. Refuses
    a path with files in it, one that another process is writing, and too small a local disk. A
    leftover of a killed run is removed from a disk; on gs:// it looks like a run, so it is named.
    Afterwards the folder is Folder(path); what the block was given is at an end.
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
    """What the block creates is for its owner alone from the first moment: 0700 and 0600."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def private_folder(path: str | os.PathLike) -> Iterator[None]:
    """Make `path`, and all that the block creates, accessible to its owner alone: 0700 and 0600.

    A folder that is there is closed to others before anything is written into it.
    """
    with private_umask():
        with os_errors(str(path)):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o700)
        yield


@contextlib.contextmanager
def _on_disk(path: str, bytes_needed: int, seal: str) -> Iterator[Folder]:
    path = os.path.realpath(path)  # a link to an empty folder goes on pointing at it
    above, partial = os.path.dirname(path), path + ".partial"
    _check_vacant(path)
    if not os.path.lexists(partial):
        _check_space(path, bytes_needed)
    with os_errors(above):
        os.makedirs(above, exist_ok=True)
    with _locked(partial + ".lock", path):
        _check_vacant(path)  # again: its former writer may just have finished
        try:
            with os_errors(partial):
                if os.path.lexists(partial):
                    shutil.rmtree(partial)  # of a killed run
                _check_space(path, bytes_needed)
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
    """Holds the seal back while the block runs, writes it last; deletes everything if it raises."""
    claim = LOCK_OBJECT + secrets.token_hex(8)
    store.write(claim, b"")
    try:
        _check_alone(store, claim, seal)
    except BaseException:
        with contextlib.suppress(StorageError):
            store.write(claim, None)
        raise
    store.seal, store.held = seal, None
    try:
        yield
        if store.held is None:
            raise _unsealed(store.path, seal)
        store.write(claim, None)
        store.write(seal, store.held)
    except BaseException as e:
        try:
            store.delete_all()
        except StorageError as more:
            e.add_note(f"files remain ({more}); delete them: gcloud storage rm -r {store.path}")
        raise
    finally:
        store.seal, store.held = "", None


def _check_alone(store: Bucket, claim: str, seal: str) -> None:
    """As each claims before it lists, of two writers at once one at most finds itself alone."""
    found = store.objects()
    if claim not in found:
        raise StorageError(f"{store.path}: cannot list what it wrote; {PERMISSION_HINT}")
    if others := [name for name in found if name != claim]:
        why = "" if seal in others else f" but no {seal}: a run died here, or is still writing"
        raise StorageError(
            f"{store.path}: not empty, has {others[0]}{why}; choose another path, or delete it: "
            f"gcloud storage rm -r {store.path}"
        )


def _unsealed(path: str, seal: str) -> StorageError:
    """The error of a new folder that lacks what readers look for."""
    return StorageError(f"{path}: finished without {seal}; write it in the block")


def _check_vacant(path: str) -> None:
    with os_errors(path):
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            raise StorageError(f"{path}: exists, not empty; choose another path, or delete it")


def _check_space(path: str, bytes_needed: int) -> None:
    above = os.path.dirname(path)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    if (free := shutil.disk_usage(above).free) < bytes_needed:
        raise StorageError(f"{path}: needs {bytes_needed} bytes, {free} are free; {SPACE}")


@contextlib.contextmanager
def _locked(lock: str, path: str) -> Iterator[None]:
    """Holds the lock file while the block runs; the kernel frees it when the process dies."""
    with contextlib.ExitStack() as stack:
        mine = None
        while mine is None or not _is_at(mine, lock):  # else its last holder has just removed it
            with os_errors(lock):
                mine = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, mine)
                try:
                    fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise StorageError(
                        f"{path}: another process is writing it; wait, or choose another path"
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
