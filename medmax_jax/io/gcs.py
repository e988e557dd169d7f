"""Access gs://bucket/prefix through TensorStore's KvStore; used through medmax_jax/io/storage.py.

    GCS and TensorStore 0.1                              therefore
    a size is sent with each range, and not passed on    it is found by probing single bytes
    a value is written at once, from copies in memory    an upload has a limit
    a list that is refused (401, 403, 404) looks empty   an empty one is checked by a read
    no request has a timeout, 32 retries are made        `wait`, RETRIES

TENSORSTORE_GCS_HTTP_URL in the environment names another server; each new Bucket reads it.
"""

import collections
import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import UInt8

DEFAULT_TIMEOUT = 60.0  # seconds without an answer after which a server counts as dead
TIMEOUT_VARIABLE = "MEDMAX_STORAGE_TIMEOUT"  # environment variable that overrides DEFAULT_TIMEOUT
SLOWEST = 1 << 20  # bytes per second: a transfer may take one more second for each of these
CHUNK_BYTES, IN_FLIGHT = (
    16 << 20,
    8,
)  # eight streams of GCS saturate the network of a host; 128 MiB in memory
UPLOAD_LIMIT = 2 << 30  # bytes; KvStore.write copies twice: measured, 3.3 times this in memory
LARGEST = 5 << 40  # bytes in one object of GCS
LOCK_OBJECT = ".partial-"  # an object with this prefix marks a folder that is being written
# 8 s in total. TensorStore's own 32 retries of up to 32 s would tolerate a wrong host for 15
# minutes.
RETRIES = {"max_retries": 5, "initial_delay": "250ms", "max_delay": "4s"}
PERMISSION_HINT = (
    "give this account the role Storage Object User, or log in: "
    "gcloud auth application-default login"
)
SPACE = "free some space, or choose another disk"
HINTS = {
    "PERMISSION_DENIED": PERMISSION_HINT,
    "UNAUTHENTICATED": PERMISSION_HINT,
    "RESOURCE_EXHAUSTED": SPACE,
    "NOT_FOUND": "check the bucket and the path",
    "DATA_LOSS": "the stored bytes are damaged; copy the file again",
    "OUT_OF_RANGE": "the file is shorter than it should be; copy it again",
    "ABORTED": "check the network and the host, then try again",
}


class StorageError(RuntimeError):
    """A file that cannot be read or written; the message names the path, the cause and the fix."""


def wait(future: ts.Future | ts.WriteFutures, what: str, nbytes: int = 0) -> Any:
    """Return the future's result.

    Raises StorageError when it fails or takes longer than DEFAULT_TIMEOUT + nbytes / SLOWEST.
    """
    seconds = timeout_seconds() + nbytes / SLOWEST
    try:
        return future.result(timeout=seconds)
    except TimeoutError as e:
        future.cancel()
        raise StorageError(
            f"{what}: no response within {seconds:.3g} s; check the network and the server, or "
            f"increase {TIMEOUT_VARIABLE} (seconds)"
        ) from e
    except (ValueError, IndexError, NotImplementedError) as e:
        # the rest are the headers and the body of the reply
        message = re.split(r" \[\w+='", str(e))[0]
        hint = HINTS.get(message.split(":")[0], "check the bucket and the network")
        raise StorageError(f"{what}: {message}; {hint}") from e


class Bucket:
    """The objects under one gs:// path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seal, self.held_content = (
            "",
            None,
        )  # an object that is to be written last, and its content
        bucket, _, prefix = path.removeprefix("gs://").partition("/")
        self._spec = {"driver": "gcs", "bucket": bucket, "gcs_request_retries": RETRIES}
        self._prefix = prefix + "/" if prefix else ""
        try:
            self._kv = wait(ts.KvStore.open({**self._spec, "path": self._prefix}), path)
        except ValueError as e:
            raise StorageError(f"{path}: {e}; use the form gs://bucket/folder") from e

    def full(self, name: str) -> str:
        """Return the full path, for messages."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """Return the names below, without lock objects."""
        return [name for name in self.objects() if not name.startswith(LOCK_OBJECT)]

    def objects(self) -> list[str]:
        """Return the names below with lock objects, without the empty objects for folders.

        Consoles create an empty object for a folder.
        """
        names = [key.decode() for key in wait(self._kv.list(), self.path)]
        if not names:
            wait(self._start(LOCK_OBJECT, 0, 0), self.path)  # raises if permissions are missing
        return sorted(key for key in names if key and not key.endswith("/"))

    def version(self, name: str) -> bytes | None:
        """Return the object's generation, or None where it does not exist."""
        reply = wait(self._start(name, 0, 0), self.full(name))
        return None if reply.state == "missing" else reply.stamp.generation

    def size(self, name: str) -> int:
        """Return the size of the object in bytes, by about ten rounds of at most 16 probes."""
        low, high, points = 0, LARGEST, [0, *(8**k for k in range(15))]
        while low < high:
            futures = [self._start(name, point, point + 1) for point in points]
            exists = [self._has_byte(name, future) for future in futures]
            low = max(
                (p + 1 for p, found in zip(points, exists, strict=True) if found), default=low
            )
            high = min(
                (p for p, found in zip(points, exists, strict=True) if not found), default=high
            )
            points = sorted({low + (high - low) * k // 16 for k in range(16)})
        return low

    def has_more(self, name: str, nbytes: int) -> bool:
        """Return whether the object has more than `nbytes` bytes, by one probe."""
        return self._has_byte(name, self._start(name, nbytes, nbytes + 1))

    def read(
        self, name: str, start: int, stop: int | None, stamp: bytes | None
    ) -> UInt8[np.ndarray, "n"]:
        """Return the bytes.

        Raises when a piece is of another generation than the stamp or the other pieces.
        """
        if stop is None and (start or self.has_more(name, CHUNK_BYTES)):
            stop = self.size(name)
        if stop is None:  # short: in one request, without its size
            reply = self._read_result(name, self._start(name, 0, None), stamp)
            return np.array(memoryview(reply.value), np.uint8)
        out = np.empty(stop - start, np.uint8)
        # An empty range takes one request too: it shows whether the object exists.
        pieces = (
            (a, min(a + CHUNK_BYTES, stop)) for a in range(start, max(stop, start + 1), CHUNK_BYTES)
        )
        in_flight = collections.deque()
        try:
            while True:
                for piece in itertools.islice(pieces, IN_FLIGHT - len(in_flight)):
                    in_flight.append((*piece, self._start(name, *piece)))
                if not in_flight:
                    return out
                a, b, future = in_flight.popleft()
                reply = self._read_result(name, future, stamp)
                memoryview(out)[a - start : b - start] = reply.value
                stamp = reply.stamp.generation
        finally:
            for _, _, future in in_flight:
                future.cancel()

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator["Upload"]:
        """Collect the content of an object and write it when the block ends without an error."""
        upload = Upload(self.full(name))
        yield upload
        if name == self.seal:
            self.held_content = upload.data
        else:
            self.write(name, upload.data)

    def write(self, name: str, data: bytes | bytearray | None) -> None:
        """Write the object; None deletes it."""
        wait(self._kv.write(name, data), self.full(name), len(data or b""))

    def delete_all(self) -> None:
        """Delete everything below."""
        wait(self._kv.delete_range(ts.KvStore.KeyRange()), self.path)

    def kvstore(self, name: str) -> dict[str, Any]:
        """Return TensorStore's spec of the objects below the name."""
        return {**self._spec, "path": f"{self._prefix}{name}/"}

    def _start(self, name: str, start: int, stop: int | None) -> ts.Future:
        return self._kv.read(name, byte_range=slice(start, stop))

    def _read_result(
        self, name: str, future: ts.Future, stamp: bytes | None
    ) -> ts.KvStore.ReadResult:
        result = wait(future, self.full(name))
        if result.state == "missing":
            raise not_found_error(self.full(name))
        if stamp not in (None, result.stamp.generation):
            raise changed_error(self.full(name))
        return result

    def _has_byte(self, name: str, future: ts.Future) -> bool:
        """Return whether the object has the requested byte."""
        try:
            self._read_result(name, future, None)
        except StorageError as e:
            if str(e.__cause__).startswith("OUT_OF_RANGE"):
                return False
            raise
        return True


class Upload:
    """The content of an object that is being collected."""

    def __init__(self, full: str) -> None:
        self._full, self.data = full, bytearray()

    def write(self, part: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Add the bytes, or raise StorageError at the limit."""
        view = as_bytes(part)
        if len(self.data) + len(view) > UPLOAD_LIMIT:
            raise StorageError(
                f"{self._full}: over {UPLOAD_LIMIT} bytes, but an upload is kept in memory; write "
                "smaller files, or write to a local folder and copy it: gcloud storage cp -r"
            )
        self.data += view


def as_bytes(part: bytes | bytearray | memoryview | np.ndarray) -> memoryview:
    """Return the bytes of the part in C order."""
    if isinstance(part, np.ndarray):  # through a view: bfloat16 has no buffer of its own
        part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return memoryview(part).cast("B")


def not_found_error(full: str) -> StorageError:
    """Return the error for a file that does not exist."""
    where = "bucket or file" if full.startswith("gs://") else "file"
    return StorageError(f"{full}: no such {where}; check the path")


def changed_error(full: str) -> StorageError:
    """Return the error for a file that was replaced."""
    return StorageError(f"{full}: changed while it was read; open it again")


def timeout_seconds() -> float:
    """Return the seconds without a response after which a server or process counts as dead."""
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise StorageError(
            f"{TIMEOUT_VARIABLE}={text}: not a number of seconds; set it to 60, for example"
        )
    return seconds
