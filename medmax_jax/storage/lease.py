"""A lock object under gs:// that ends with its holder: one process writes a folder at a time.

    D/.lease      {"holder": "host:1234", "time": ..}, rewritten every LEASE / 3 seconds

Each write requires the generation that the holder wrote last, so of two processes one succeeds. A
lease that is not rewritten for LEASE seconds, as seen by the clock of the process that waits, is
taken over; its former holder learns of it at its next renewal, and `check` refuses to write as soon
as the last renewal is too old. MEDMAX_LEASE_SECONDS in the environment overrides LEASE.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from medmax_jax.io.text_files import TextFileError, parse_json
from medmax_jax.storage.gcs import (
    MISSING,
    Bucket,
    ConflictError,
    StorageError,
    configured_seconds,
)

LEASE_OBJECT = ".lease"
LEASE = 30.0  # seconds without a renewal after which a holder counts as dead
LEASE_VARIABLE = "MEDMAX_LEASE_SECONDS"
BOOT_ID, PROCESS_IDS = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"  # of Linux


class LeaseError(StorageError):
    """A folder that another process writes to; the message names its holder."""


class Lease:
    """The lease of one object; `held` acquires it."""

    def __init__(self, store: Bucket, name: str, log: Callable[[str], None]) -> None:
        self._store, self._name, self._log = store, name, log
        self._seconds, self._lock = lease_seconds(), threading.Lock()
        self._generation, self._renewed, self._taken_by = MISSING, 0.0, ""
        self._holder = {"holder": f"{platform.node()}:{os.getpid()}", "space": _id_space()}
        self._token = ""

    def acquire(self) -> None:
        """Take the lease, after waiting for a holder that no longer renews it.

        Raises LeaseError where another process renews it.
        """
        seen, since, reported = None, time.monotonic(), False
        while True:
            generation = self._store.version(self._name) or MISSING
            if generation not in (seen, MISSING):
                holder = self._read()
                if seen is not None:
                    raise LeaseError(
                        f"{self._store.path}: in use by {holder.get('holder', 'another process')}, "
                        "which has just renewed its lease; wait for it or use another folder"
                    )
                seen, since = generation, time.monotonic()
                if _has_ended(holder):
                    since -= self._seconds
            waited = time.monotonic() - since
            if generation == MISSING or waited >= self._seconds:
                with contextlib.suppress(ConflictError):
                    return self._write(generation)
                seen = seen or MISSING  # another process was faster
            elif not reported:
                reported = True
                self._log(
                    f"{self._store.path}: waiting up to {self._seconds:.0f} s for the lease of "
                    f"{holder.get('holder', 'another process')}"
                )
            time.sleep(min(1.0, self._seconds / 10))

    def renew(self) -> None:
        """Rewrite the lease; raises LeaseError once another process has taken it over."""
        with self._lock:
            if self._taken_by:
                raise self._lost()
            try:
                self._write(self._generation)
            except ConflictError as error:
                self._taken_by = self._read().get("holder", "another process")
                raise self._lost() from error

    def check(self) -> None:
        """Raise LeaseError unless this process holds the lease, StorageError if that is unknown."""
        if self._taken_by:
            raise self._lost()
        if time.monotonic() - self._renewed > self._seconds / 2:
            self.renew()

    def release(self) -> None:
        """Delete the lease if this process still holds it."""
        with self._lock, contextlib.suppress(ConflictError):
            self._store.delete(self._name, self._generation)

    def _write(self, generation: int) -> None:
        begin, self._token = time.monotonic(), secrets.token_hex(8)
        content = json.dumps(self._holder | {"token": self._token, "time": time.time()}).encode()
        try:
            self._generation = self._store.write(self._name, content, generation)
        except ConflictError:
            if self._read().get("token") != self._token:
                raise
            # The answer to an earlier attempt of this write was lost.
            self._generation = self._store.version(self._name) or MISSING
        self._renewed = begin

    def _read(self) -> dict[str, Any]:
        try:
            return parsed(self._store.read(self._name, 0, None, None).tobytes())
        except StorageError:
            return {}

    def _lost(self) -> LeaseError:
        return LeaseError(
            f"{self._store.path}: {self._taken_by} has taken over this folder, since this process "
            f"had not renewed its lease for {self._seconds:.0f} s; nothing more is written"
        )


@contextlib.contextmanager
def held(
    store: Bucket, name: str, *, log: Callable[[str], None], on_loss: Callable[[], None]
) -> Iterator[Lease]:
    """Hold the lease during the block; a thread renews it and calls `on_loss` when it is lost."""
    lease, end = Lease(store, name, log), threading.Event()
    lease.acquire()

    def renew() -> None:
        while not end.wait(lease_seconds() / 3):
            try:
                lease.renew()
            except LeaseError as error:
                log(f"error: {error}")
                return on_loss()
            except StorageError as error:  # `check` refuses to write while this lasts
                log(f"WARNING: the lease could not be renewed ({error})")

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        end.set()
        thread.join()
        lease.release()


def is_live(content: bytes) -> bool:
    """Return whether a lease was renewed lately, by the clocks of its holder and of this host."""
    renewed = parsed(content).get("time")
    return isinstance(renewed, float) and time.time() - renewed < 2 * lease_seconds()


def parsed(content: bytes) -> dict[str, Any]:
    """Return what a lease states; nothing where it is damaged."""
    try:
        fields = parse_json(content, LEASE_OBJECT)
    except TextFileError:
        return {}
    return fields if isinstance(fields, dict) else {}


def lease_seconds() -> float:
    """Return LEASE, or what the environment states."""
    return configured_seconds(
        LEASE_VARIABLE, LEASE, lambda seconds: 1 <= seconds <= 3600,
        fix="use seconds from 1 to 3600, such as 30",
    )  # fmt: skip


def _id_space() -> str:
    """Return what is equal for the processes among which an id names one; "" where unknown."""
    with contextlib.suppress(OSError), open(BOOT_ID) as file:
        return f"{file.read().strip()} {os.readlink(PROCESS_IDS)}"
    return ""


def _has_ended(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this machine that no longer exists."""
    process = str(holder.get("holder", "")).rpartition(":")[2]
    same = bool(_id_space()) and holder.get("space") == _id_space()
    return same and process.isdecimal() and not process_exists(int(process))


def process_exists(number: int) -> bool:
    """Return whether this machine has a process of that number, of any user."""
    try:
        os.kill(number, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
