"""Access gs://bucket/prefix by Google's client library; used through medmax_jax/storage/folder.py.

google-cloud-storage was chosen because it has what a shared folder needs: writes and reads that
hold for one generation of an object, resumable uploads, and checksums. obstore needs GCS's XML
interface for uploads, gcsfs has no condition on a generation (Orbax uses it for its paths). Arrays
are read and written by TensorStore.

STORAGE_EMULATOR_HOST in the environment names another server (TensorStore:
TENSORSTORE_GCS_HTTP_URL).
"""

import concurrent.futures
import contextlib
import functools
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import UInt8

if TYPE_CHECKING:
    from google.cloud import storage

DEFAULT_TIMEOUT = 60.0  # seconds without an answer after which a server counts as dead
TIMEOUT_VARIABLE = "MEDMAX_STORAGE_TIMEOUT"  # environment variable that overrides DEFAULT_TIMEOUT
SLOWEST = 1 << 20  # bytes per second: a transfer may take one more second for each of these
CHUNK_BYTES = 16 << 20  # of a range that is read
PART_BYTES = 16 << 20  # of a resumable upload; a multiple of 256 KiB
IN_FLIGHT = 8  # ranges: eight streams of GCS saturate the network of a host; 128 MiB in memory
LOCK_OBJECT = ".partial-"  # an object with this prefix marks a folder that is being written
RETRY = {"initial": 0.25, "maximum": 4.0}  # seconds between attempts
SHA256 = "medmax-sha256"  # key of an object's metadata
MISSING = 0  # the generation of an object that does not exist
# TensorStore's own 32 retries of up to 32 s would tolerate a wrong host for 15 minutes.
TENSORSTORE_RETRIES = {"max_retries": 5, "initial_delay": "250ms", "max_delay": "4s"}
PERMISSION_HINT = (
    "give this account the role Storage Object User, or log in: "
    "gcloud auth application-default login"
)
SPACE = "free some space, or choose another disk"
HINTS = {  # of TensorStore's errors, and of those of the client library
    "PERMISSION_DENIED": PERMISSION_HINT,
    "UNAUTHENTICATED": PERMISSION_HINT,
    "RESOURCE_EXHAUSTED": SPACE,
    "NOT_FOUND": "check the bucket and the path",
    "DATA_LOSS": "the stored bytes are damaged; copy the file again",
    "OUT_OF_RANGE": "the file is shorter than it should be; copy it again",
    "ABORTED": "check the network and the host, then try again",
}
CODES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 416: "OUT_OF_RANGE"}


class StoredFile(NamedTuple):
    """What identifies the content of an object."""

    generation: int
    sha256: str  # "" where it was uploaded without one


class StorageError(RuntimeError):
    """A file that cannot be read or written; the message names the path, the cause and the fix."""


class ConflictError(StorageError):
    """An object that has another generation than the one that a write requires."""


def wait(future: ts.Future | ts.WriteFutures, what: str, nbytes: int = 0) -> Any:
    """Return the result of a future of TensorStore.

    Raises StorageError when it fails or takes longer than DEFAULT_TIMEOUT + nbytes / SLOWEST.
    """
    seconds = timeout_seconds() + nbytes / SLOWEST
    try:
        return future.result(timeout=seconds)
    except TimeoutError as e:
        future.cancel()
        raise _unresponsive(what, seconds) from e
    except (ValueError, IndexError, NotImplementedError) as e:
        # the rest are the headers and the body of the reply
        message = re.split(r" \[\w+='", str(e))[0]
        hint = HINTS.get(message.split(":")[0], "check the bucket and the network")
        raise StorageError(f"{what}: {message}; {hint}") from e


class Bucket:
    """The objects under one gs:// path."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Orbax's paths use gcsfs, which would ask for the type of the bucket in every operation,
        # by an interface that needs credentials of its own.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # An object that is to be written last, and its content.
        self.seal, self.held_content = "", None
        self._name, _, prefix = path.removeprefix("gs://").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", self._name):
            raise StorageError(
                f"{path}: {self._name!r} is not the name of a bucket; use the form "
                "gs://bucket/folder"
            )

    def full(self, name: str) -> str:
        """Return the full path, for messages."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """Return the names below, without lock objects."""
        return [name for name in self.generations() if not name.startswith(LOCK_OBJECT)]

    def children(self) -> list[str]:
        """Return the names directly below, of objects and of prefixes."""
        return sorted({name.partition("/")[0] for name in self.names()})

    def generations(self) -> dict[str, int]:
        """Return the generation of each object below, by name, without the empty ones for folders.

        Consoles create an empty object for a folder.
        """
        with _errors(self.path):
            blobs = _client().list_blobs(self._name, prefix=self._prefix, **_options())
            found = {blob.name.removeprefix(self._prefix): blob.generation for blob in blobs}
        return {name: found[name] for name in sorted(found) if name and not name.endswith("/")}

    def version(self, name: str) -> int | None:
        """Return the object's generation, or None where it does not exist."""
        blob = self._stored(name)
        return None if blob is None else blob.generation

    def size(self, name: str) -> int:
        """Return the size of the object in bytes."""
        blob = self._stored(name)
        if blob is None:
            raise not_found_error(self.full(name))
        return blob.size

    def has_more(self, name: str, nbytes: int) -> bool:
        """Return whether the object has more than `nbytes` bytes."""
        return self.size(name) > nbytes

    def read(
        self, name: str, start: int, stop: int | None, stamp: int | None
    ) -> UInt8[np.ndarray, "n"]:
        """Return the bytes of one generation: the stamp, or the present one."""
        if stamp is None or stop is None:  # else no request is needed before that for the bytes
            blob = self._stored(name)
            if blob is None:
                raise not_found_error(self.full(name))
            if stamp not in (None, blob.generation):
                raise changed_error(self.full(name))
            stamp, stop = blob.generation, blob.size if stop is None else stop
            if not start <= stop <= blob.size:
                raise _out_of_range(self.full(name), start, stop)
        out = np.empty(stop - start, np.uint8)
        starts = range(start, stop, CHUNK_BYTES)
        fetch = functools.partial(
            self._fetch, self._blob(name, stamp), memoryview(out), start, stop
        )
        if len(starts) == 1:  # small: no thread
            fetch(start)
            return out
        pool = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT)
        try:
            for _ in pool.map(fetch, starts):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return out

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator["Upload"]:
        """Write an object piece by piece; it appears when the block ends without an error."""
        if name == self.seal:
            held = bytearray()
            yield Upload(self.full(name), held.extend)
            self.held_content = bytes(held)
            return
        writer = self._writer(name)
        try:
            yield Upload(self.full(name), writer.write)
            with _errors(self.full(name)):
                writer.close()
        except BaseException:
            with contextlib.suppress(Exception):  # the upload expires by itself
                writer.terminate()
            raise

    def write(
        self,
        name: str,
        data: bytes | Path,
        generation: int | None = None,
        *,
        sha256: str = "",
        size: int | None = None,
    ) -> int:
        """Write the object from memory or a local file; return its generation.

        Args:
            name: of the object.
            data: the content, or a file that contains it.
            generation: the one that is to be replaced, or MISSING for a new object.
            sha256: is stored with the content, for `stored`.
            size: the bytes of the file that are written, for one that grows.

        Raises:
            ConflictError: the object has another generation.
            StorageError: any other failure.
        """
        blob = self._blob(name)
        blob.metadata = {SHA256: sha256} if sha256 else None
        source = open(data, "rb") if isinstance(data, Path) else io.BytesIO(data)
        with _errors(self.full(name)), source:
            blob.upload_from_file(
                source, size=len(data) if isinstance(data, bytes) else size,
                content_type="application/octet-stream",
                if_generation_match=generation, **_options(),
            )  # fmt: skip
        return blob.generation

    def stored(self, name: str) -> StoredFile | None:
        """Return the object's generation and the SHA-256 that was stored with it."""
        blob = self._stored(name)
        return blob and StoredFile(blob.generation, (blob.metadata or {}).get(SHA256, ""))

    def delete(self, name: str, generation: int | None = None) -> None:
        """Delete the object if it exists, and if it has this generation."""
        from google.api_core.exceptions import NotFound

        with _errors(self.full(name)), contextlib.suppress(NotFound):
            self._blob(name).delete(**_options(), if_generation_match=generation)

    def delete_all(self) -> None:
        """Delete everything below."""
        self._for_each(self.generations(), self.delete)

    def move_all(self, target: "Bucket") -> None:
        """Move everything below to another folder of the same bucket, by copies in the bucket."""

        def move(name: str) -> None:
            with _errors(self.full(name)):
                bucket = _client().bucket(self._name)
                bucket.copy_blob(self._blob(name), bucket, target._prefix + name, **_options())

        names = self.generations()
        self._for_each(names, move)
        self._for_each(names, self.delete)

    def kvstore(self, name: str) -> dict[str, Any]:
        """Return TensorStore's spec of the objects below the name."""
        retries = {"gcs_request_retries": TENSORSTORE_RETRIES}
        path = f"{self._prefix}{name}/"
        return {"driver": "gcs", "bucket": self._name, "path": path} | retries

    def _for_each(self, names: Iterable[str], call: Callable[[str], None]) -> None:
        with concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(call, names):
                pass

    def _blob(self, name: str, generation: int | None = None) -> "storage.Blob":
        with _errors(self.full(name)):
            bucket = _client().bucket(self._name)
            return bucket.blob(self._prefix + name, PART_BYTES, generation=generation)

    def _stored(self, name: str) -> "storage.Blob | None":
        with _errors(self.full(name)):
            bucket = _client().bucket(self._name)
            return bucket.get_blob(self._prefix + name, **_options())

    def _writer(self, name: str) -> io.BufferedIOBase:
        return self._blob(name).open("wb", chunk_size=PART_BYTES, ignore_flush=True, **_options())

    def _fetch(
        self, blob: "storage.Blob", out: memoryview, begin: int, stop: int, start: int
    ) -> None:
        end, full = min(start + CHUNK_BYTES, stop), self.full(blob.name.removeprefix(self._prefix))
        with _errors(full, missing=changed_error):  # the generation of `blob` is requested
            data = blob.download_as_bytes(
                start=start, end=end - 1, raw_download=True, checksum=None, **_options()
            )
        if len(data) != end - start:
            raise _out_of_range(full, start, end)
        out[start - begin : end - begin] = data


class Upload:
    """The content of an object that is being written."""

    def __init__(self, full: str, write: Callable[[memoryview], Any]) -> None:
        self._full, self._write = full, write

    def write(self, part: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Add the bytes."""
        with _errors(self._full):
            self._write(as_bytes(part))


@functools.cache
def _client_of(process: int, server: str) -> "storage.Client":
    # Imported here: it takes half a second, and only gs:// needs it.
    from google.cloud import storage

    del process, server  # a forked process, or another server, needs connections of its own
    logging.getLogger("google.auth").setLevel(logging.ERROR)  # what fails is reported as an error
    return storage.Client()


def _client() -> "storage.Client":
    return _client_of(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", ""))


def _options() -> dict[str, Any]:
    """Return the time limits of a request: of one answer, and of all attempts together."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    seconds = timeout_seconds()
    retry = DEFAULT_RETRY.with_delay(**RETRY).with_timeout(seconds)
    return {"timeout": (min(10.0, seconds), seconds), "retry": retry}


@contextlib.contextmanager
def _errors(full: str, *, missing: Callable[[str], "StorageError"] | None = None) -> Iterator[None]:
    """Turn the errors of the client library into a StorageError that names the path."""
    import requests
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from google.cloud.storage import exceptions as media

    try:
        yield
    except (api.GoogleAPIError, auth.GoogleAuthError, media.InvalidResponse) as e:
        if missing and getattr(e, "code", None) == 404:
            raise missing(full) from e
        raise _explained(full, e.__cause__ if isinstance(e, api.RetryError) else e) from e
    except (requests.RequestException, media.DataCorruption, OSError) as e:
        if isinstance(e, OSError) and e.filename is not None:  # a local file
            raise StorageError(f"{e.filename}: {e.strerror}; check the path and the disk") from e
        raise _explained(full, e) from e


def _explained(full: str, error: BaseException | None) -> StorageError:
    import requests
    from google.auth import exceptions as auth
    from google.cloud.storage import exceptions as media

    if isinstance(error, (requests.Timeout, TimeoutError)):
        return _unresponsive(full, timeout_seconds())
    if isinstance(error, auth.TransportError | requests.RequestException):
        return StorageError(f"{full}: could not connect; {HINTS['ABORTED']}")
    if isinstance(error, auth.GoogleAuthError):
        return StorageError(f"{full}: no valid credentials ({_first_line(error)}); "
                            f"{PERMISSION_HINT}")  # fmt: skip
    if isinstance(error, media.DataCorruption):
        return StorageError(f"{full}: DATA_LOSS: {_first_line(error)}; {HINTS['DATA_LOSS']}")
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None) or 0
    code = int(code)
    if code == 404:
        return not_found_error(full)
    if code == 412:
        return ConflictError(f"{full}: changed by another process since it was read")
    name = CODES.get(code, "ABORTED")
    return StorageError(f"{full}: {name}: {_first_line(error)}; {HINTS[name]}")


def _first_line(error: BaseException | None) -> str:
    """Return what the server says, or the first line of the error's own text."""
    message = getattr(error, "message", None) or str(error)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        message = error.response.json()["error"]["message"]
    return (message.strip().splitlines() or [type(error).__name__])[0][:300]


def _unresponsive(what: str, seconds: float) -> StorageError:
    return StorageError(
        f"{what}: no response within {seconds:.3g} s; check the network and the server, or "
        f"increase {TIMEOUT_VARIABLE} (seconds)"
    )


def as_bytes(part: bytes | bytearray | memoryview | np.ndarray) -> memoryview:
    """Return the bytes of the part in C order."""
    if isinstance(part, np.ndarray):  # through a view: bfloat16 has no buffer of its own
        part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return memoryview(part).cast("B")


def _out_of_range(full: str, start: int, stop: int) -> StorageError:
    return StorageError(f"{full}: no bytes {start} to {stop}; {HINTS['OUT_OF_RANGE']}")


def not_found_error(full: str) -> StorageError:
    """Return the error for a file that does not exist."""
    where = "bucket or file" if full.startswith("gs://") else "file"
    return StorageError(f"{full}: no such {where}; check the path")


def changed_error(full: str) -> StorageError:
    """Return the error for a file that was replaced."""
    return StorageError(f"{full}: changed while it was read; open it again")


def timeout_seconds() -> float:
    """Return the seconds without a response after which a server or process counts as dead."""
    return configured_seconds(
        TIMEOUT_VARIABLE, DEFAULT_TIMEOUT, lambda seconds: 0 < seconds < 86400,
        fix="not a number of seconds; set it to 60, for example",
    )  # fmt: skip


def configured_seconds(
    variable: str, default: float, valid: Callable[[float], bool], *, fix: str
) -> float:
    """Return the seconds that an environment variable states, or the default where it is unset.

    Raises StorageError, which ends in `fix`, for what is no number or not valid.
    """
    text = os.environ.get(variable) or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not valid(seconds):
        raise StorageError(f"{variable}={text}: {fix}")
    return seconds
