"""The folder that a program writes: a local one, or a local copy of a gs:// prefix.

    with workdir.opened("gs://bucket/run") as work:
        work.folder     local files, which programs read, append to and replace as usual
        work.flush()    what was written before is in the bucket when this returns
        work.url("checkpoints")    for what is written there directly (Orbax, compiled programs)

Of gs://, one process holds a lease (lease.py). Its local copy starts with what is in the bucket. A
thread uploads changed files, in the order of their changes, every SYNC seconds and at the end, so a
machine that is lost loses at most the work of SYNC seconds and one upload; the same command repeats
it on any machine. Each upload requires the generation that this process knows, and stores the
SHA-256 of the file, which is checked when it is read. For a local path nothing differs from a plain
folder.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from medmax_jax.io.progress import log_to_stderr
from medmax_jax.storage import lease
from medmax_jax.storage.atomic_folder import private_umask
from medmax_jax.storage.folder import Folder, StoredFile
from medmax_jax.storage.gcs import (
    LOCK_OBJECT,
    MISSING,
    ConflictError,
    StorageError,
    configured_seconds,
)

SYNC = 30.0  # seconds between two uploads of changed files
SYNC_VARIABLE = "MEDMAX_SYNC_SECONDS"
STAGE_VARIABLE = "MEDMAX_STAGE"  # environment variable: the folder of local copies
UNFINISHED = ("*.partial", "*.partial/*", "*.tmp", f"{LOCK_OBJECT}*")
UNFINISHED += (".lock", "*/.lock", "*.runner.lock", "*/.started")  # of local processes
LOGS = re.compile(r"\.(jsonl|log|sha256)$|(^|/)events\.out\.")  # append-only
UNFINISHED_MARK = f"{LOCK_OBJECT}workdir"  # an object of a fresh folder that is not complete
IN_MEMORY = 64 << 20  # bytes of a file that is hashed and uploaded from one copy of it


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A folder that a program writes."""

    path: str  # as given
    folder: Path
    flush: Callable[[], None] = lambda: None
    refresh: Callable[[], None] = lambda: None  # fetches what other processes have written since
    check: Callable[[], None] = lambda: None  # raises LeaseError before a direct write to the path

    def url(self, name: str) -> str:
        """Return the path of a file or folder below, local or gs://."""
        return f"{self.path.rstrip('/')}/{name}"


@contextlib.contextmanager
def opened(
    path: str | os.PathLike,
    *,
    mode: Literal["write", "read", "empty"] = "write",
    skip: Sequence[str] = (),
    writer: str = "",
    fresh: bool = False,
    log: Callable[[str], None] = log_to_stderr,
) -> Iterator[Workdir]:
    """Open a workdir during the block, created if missing.

    Args:
        path: a local folder, or gs://bucket/folder.
        mode: of gs://. read: a copy that is not uploaded, without a lease. empty: a folder that is
            not uploaded either, for all processes of a run but the first.
        skip: patterns of names that are not copied between the bucket and this machine.
        writer: distinguishes processes that share the folder and write different files.
        fresh: for a folder that is written at once: a finished one on gs:// is refused, and what a
            killed process left is deleted.
        log: takes lines about the bucket.

    Raises:
        StorageError: the bucket cannot be used, or another process writes to the folder.
    """
    text = os.fspath(path)
    if not text.startswith("gs://"):
        if mode == "write":
            Path(text).mkdir(parents=True, exist_ok=True)
        yield Workdir(os.path.abspath(text), Path(text))
        return
    sync_seconds()  # raises before anything is created
    remote, skip = Folder(text), (*UNFINISHED, f"{lease.LEASE_OBJECT}*", *skip)
    local = _local_folder(remote.path, f"{mode} {writer}")
    if mode == "write":
        with _written(remote, local, skip, writer=writer, fresh=fresh, log=log) as work:
            yield work
        return
    try:
        if mode == "read":
            _Copy(remote, local, None, skip, log).download()
        yield Workdir(remote.path, local)
    finally:
        shutil.rmtree(local.parent, ignore_errors=True)


@contextlib.contextmanager
def _written(
    remote: Folder,
    local: Path,
    skip: Sequence[str],
    *,
    writer: str,
    fresh: bool,
    log: Callable[[str], None],
) -> Iterator[Workdir]:
    """Hold the lease of a folder, and upload what the block changes in its local copy."""
    name = f"{lease.LEASE_OBJECT}-{writer}" if writer else lease.LEASE_OBJECT
    with lease.held(remote.store, name, log=log, on_loss=_end_process) as held:
        copy = _Copy(remote, local, held, skip, log)
        if fresh:
            _claim(remote)
        else:
            copy.download()
        end = threading.Event()
        thread = threading.Thread(target=copy.upload_until, args=(end,), name="upload", daemon=True)
        thread.start()
        try:
            yield Workdir(remote.path, local, copy.upload, copy.download, held.check)
        finally:
            end.set()
            thread.join()
            copy.upload()  # where it fails, the local files stay
        if fresh:
            remote.store.delete(UNFINISHED_MARK)
            log(f"{remote.path}: written")
        shutil.rmtree(local.parent, ignore_errors=True)


class _Copy:
    """A local copy of a folder in a bucket, which this process alone changes."""

    def __init__(
        self,
        remote: Folder,
        local: Path,
        held: lease.Lease | None,  # None: nothing is uploaded
        skip: Sequence[str],
        log: Callable[[str], None],
    ) -> None:
        self._remote, self._local, self._lease, self._log = remote, local, held, log
        self._skip = _pattern(skip)
        self._known: dict[str, tuple[tuple[int, ...], StoredFile]] = {}
        self._lock = threading.Lock()

    def download(self) -> None:
        """Fetch all files that are new or have changed; raise StorageError for a damaged one."""
        with self._lock:
            stored = self._remote.store.generations().items()
            names = [
                name for name, generation in stored
                if not self._skip.match(name) and self._state(name)[1].generation != generation
            ]  # fmt: skip
            for done, name in enumerate(names, start=1):
                found = self._remote.download(name, self._local / name)
                self._known[name] = _status(self._local / name), found
                if done % 100 == 0 or done == len(names):
                    self._log(f"{self._remote.path}: fetched {done} of {len(names)} files")

    def upload(self) -> None:
        """Upload what has changed since the last call; delete what was deleted."""
        try:
            with self._lock:
                self._upload_changes()
        except StorageError as error:
            kept = f"{error}; what was not uploaded is in {self._local}"
            raise type(error)(kept) from error

    def _upload_changes(self) -> None:
        found = dict(self._scan())
        changed = [n for n, status in found.items() if self._state(n)[0] != status]
        # In the order of their changes: what a file relies on is in the bucket before it. A log has
        # also changed before its last change, so one that is there already comes first.
        grown = {name for name in changed if name in self._known and LOGS.search(name)}
        for name in sorted(changed, key=lambda n: (n not in grown, found[n][1])):
            self._lease.check()
            with contextlib.suppress(FileNotFoundError):  # replaced or deleted meanwhile
                self._known[name] = found[name], self._write(name)
        for name in [n for n in self._known if n not in found]:
            self._lease.check()
            self._remote.store.delete(name, self._known.pop(name)[1].generation)

    def upload_until(self, end: threading.Event) -> None:
        """Upload changes until the event; a failure is reported, and the next round repeats it."""
        pause = sync_seconds()
        while not end.wait(pause):
            begin = time.monotonic()
            try:
                self.upload()
            except lease.LeaseError:
                return  # its own thread reports it
            except StorageError as error:
                self._log(f"WARNING: not uploaded yet: {error}")
            # A file that grows is uploaded as a whole: at most a tenth of the time is spent so.
            pause = max(sync_seconds(), 10 * (time.monotonic() - begin))

    def _scan(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for path in self._local.rglob("*"):
            name = path.relative_to(self._local).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if not self._skip.match(name) and stat.S_ISREG(path.stat().st_mode):
                    yield name, _status(path)

    def _state(self, name: str) -> tuple[tuple[int, ...], StoredFile]:
        return self._known.get(name, ((), StoredFile(MISSING, "")))

    def _write(self, name: str) -> StoredFile:
        path, before = self._local / name, self._state(name)[1]
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if size <= IN_MEMORY else None
            if content is None:
                for start in range(0, size, IN_MEMORY):
                    digest.update(file.read(min(IN_MEMORY, size - start)))
            else:
                digest.update(content)
        sha256 = digest.hexdigest()
        if before.sha256 == sha256:
            return before
        try:
            generation = self._remote.store.write(
                name, path if content is None else content, before.generation,
                sha256=sha256, size=size,
            )  # fmt: skip
        except ConflictError as error:
            stored = self._remote.stored(name)
            if stored is None or stored.sha256 != sha256:
                raise StorageError(f"{error}; use another folder for this process") from error
            return stored  # the answer to an upload was lost, or another writer wrote the same
        return StoredFile(generation, sha256)


def _claim(remote: Folder) -> None:
    """Mark a folder as unfinished, without what a killed process left in it."""
    names = set(remote.store.generations())
    if names - {lease.LEASE_OBJECT} and UNFINISHED_MARK not in names:
        raise StorageError(
            f"{remote.path}: exists and is not empty; choose another path, or delete it: "
            f"gcloud storage rm -r {remote.path}"
        )
    remote.store.write(UNFINISHED_MARK, b"")
    for name in names - {lease.LEASE_OBJECT, UNFINISHED_MARK}:
        remote.store.delete(name)


def local_copy(path: str, *, skip: Sequence[str] = (), only: str = "") -> Path:
    """Return a local folder, or a local copy of one on gs://.

    skip: patterns of names that are not copied. only: the one name that is copied. The copy
    is made once for each state of the folder, and may be deleted at any time.
    """
    if not path.startswith("gs://"):
        return Path(path)
    remote, skipped = Folder(path), _pattern((*UNFINISHED, f"{lease.LEASE_OBJECT}*", *skip))
    stored = {n: g for n, g in remote.store.generations().items() if not skipped.match(n)}
    stored = {n: g for n, g in stored.items() if only in ("", n)}
    key = f"{remote.path}/{only}"
    own, state = (hashlib.sha256(str(x).encode()).hexdigest()[:16] for x in (key, stored))
    parent = staging_folder() / "copies"
    copy = parent / f"{own}-{state}"
    if not copy.is_dir():
        for old in parent.glob(f"{own}-*"):
            shutil.rmtree(old, ignore_errors=True)
        with private_umask(), contextlib.ExitStack() as stack:
            parent.mkdir(exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=parent, prefix="partial-")
            partial = Path(stack.enter_context(temporary)) / "copy"
            partial.mkdir()
            for name in stored:
                remote.download(name, partial / name)
            try:
                partial.rename(copy)
            except OSError:
                if not copy.is_dir():  # else another process was faster
                    raise
    return copy


def local_file(path: str) -> Path:
    """Return a local file, or a local copy of one on gs://."""
    if not path.startswith("gs://"):
        return Path(path)
    folder, _, name = path.rpartition("/")
    return local_copy(folder, only=name) / name


def staging_folder() -> Path:
    """Return the folder of local copies, which belongs to this user; see STAGE_VARIABLE."""
    configured = os.environ.get(STAGE_VARIABLE)
    folder = Path(configured or Path(tempfile.gettempdir(), f"medmax_jax_{os.getuid()}"))
    try:
        with private_umask():
            folder.mkdir(parents=True, exist_ok=True)
        # any user may write to a temporary folder
        status = folder.stat() if configured else folder.lstat()
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be created ({error.strerror}); set {STAGE_VARIABLE} to another "
            "folder"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or not (configured or status.st_uid == os.getuid()):
        raise StorageError(
            f"{folder}: not a folder that this user owns; set {STAGE_VARIABLE} to one"
        )
    return folder.resolve()  # atomic_folder writes next to its target


def sync_seconds() -> float:
    """Return SYNC, or what the environment states."""
    return configured_seconds(
        SYNC_VARIABLE, SYNC, lambda seconds: 0.1 <= seconds <= 3600,
        fix="use seconds from 0.1 to 3600, such as 30",
    )  # fmt: skip


def _local_folder(path: str, purpose: str) -> Path:
    """Return a new folder of this process; remove those that ended processes left for the path."""
    name = hashlib.sha256(f"{path} {purpose}".encode()).hexdigest()[:16]
    parent = staging_folder() / "workdirs"
    for left in parent.glob(f"{name}-*"):
        if not lease.process_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    local = parent / f"{name}-{os.getpid()}" / path.rpartition("/")[2]
    shutil.rmtree(local.parent, ignore_errors=True)
    with private_umask():
        local.mkdir(parents=True)
    return local


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(name) for name in names))


def _status(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _end_process() -> None:
    """End this process as a preemption would: programs stop at the next step, without writing."""
    os.kill(os.getpid(), signal.SIGTERM)
