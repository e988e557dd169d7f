"""Unpack the published image archives under limits: images.tar.gz.aa to .aq, and slake.tar.gz.

    parts --> one stream, never joined on disk --> gzip --> tar --> OUT/name, image by image

Only regular files with an image suffix are written, under plain relative names. A link, a device,
an unsafe name or a duplicate name stops the work, and so does a limit; other regular files are left
out and counted. A file is written atomically, so an interrupted run resumes: an existing file is
compared, byte by byte, and never overwritten. (gzip's checksum comes at the very end: from a
damaged archive wrong images may have been written, which the next run detects.)
"""

import collections
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import io
import itertools
import os
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.io.progress import ByteProgress
from medmax_jax.models import images
from medmax_jax.storage.folder import StorageError, check_name, os_errors

PARTIAL = ".unpacking.partial"
_READ = 1 << 20  # bytes requested from the unpacked stream at once
_SLACK = 4 << 20  # bytes read ahead, and of headers, beyond the files seen so far
_GLOBALS = 100  # headers that apply to all files; git archive writes one, most programs none
_GRACE = 64 << 20  # bytes before the ratio is meaningful


class ArchiveError(ValueError):
    """An archive that is not unpacked any further; the message names the file and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of an archive. `ratio`: unpacked bytes per byte of the archive."""

    members: int
    member_bytes: int
    total_bytes: int
    ratio: int


LIMITS = Limits(
    members=2_000_000,  # 725K images are published
    member_bytes=256 << 20,
    total_bytes=1 << 40,  # the seventeen parts have 91 GB, and images hardly compress
    ratio=20,
)


def unpack(
    parts: Sequence[str | Path], out: str | Path, *, limits: Limits, say: Callable[[str], None]
) -> dict[str, int]:
    """Write the images of one archive, given as its parts in order; return the counts."""
    parts, out = [Path(p) for p in parts], Path(os.path.abspath(out))
    _check_parts(parts)
    count: collections.Counter[str] = collections.Counter()
    with _locked(out), contextlib.closing(_Parts(parts)) as joined:
        progress = ByteProgress(sum(p.stat().st_size for p in parts), say)
        names: set[bytes] = set()
        with _archive_errors(f"{parts[0]}{' and following' if len(parts) > 1 else ''}"):
            reported = 0
            for member, name, data in _members(joined, out, limits):
                digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
                if digest in names:
                    raise ArchiveError(f"{name!r} occurs twice; the first one is kept")
                names.add(digest)
                count[_write_image(member, name, data, out)] += 1
                progress(joined.given - reported)
                reported = joined.given
    progress.done(f"{out}: {count['written']} images written, {count['there']} already existed")
    return {name: count[name] for name in ("written", "there", "left_out")}


class _Parts(io.RawIOBase):
    """Reads files one after another as one stream. `given`: bytes read so far."""

    def __init__(self, parts: Sequence[Path]):
        self._remaining, self._file, self.given = list(parts), None, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._file is not None or self._remaining:
            if self._file is None:
                self._file = open(self._remaining.pop(0), "rb", buffering=0)
            if nbytes := self._file.readinto(buffer):
                self.given += nbytes
                return nbytes
            self._file.close()
            self._file = None
        return 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Unzipped:
    """Reads the bytes inside the gzip, at most `allowed` of them and none beyond the ratio."""

    def __init__(self, joined: _Parts, limits: Limits):
        self._joined, self._limits = joined, limits
        self._zip = gzip.GzipFile(fileobj=io.BufferedReader(joined, _READ))
        self.given, self.allowed = 0, _SLACK

    def read(self, size: int) -> bytes:
        try:
            data = self._zip.read(size)
        except gzip.BadGzipFile as error:  # an OSError, which would look like an error of the disk
            raise tarfile.ReadError(str(error)) from error
        self.given += len(data)
        if self.given > self.allowed:
            raise ArchiveError(
                f"more than {_SLACK} bytes belong to no file; do not trust this archive"
            )
        if self.given > self._joined.given * self._limits.ratio + _GRACE:
            raise ArchiveError(
                f"unpacks to more than {self._limits.ratio} times its size, which images never do; "
                "if you trust the archive, increase --max_ratio"
            )
        return data


def _members(
    joined: _Parts, out: Path, limits: Limits
) -> Iterator[tuple[tarfile.TarInfo, str, io.BufferedIOBase | None]]:
    """Yield (member, its name, its bytes) of each regular file, in the order of the archive."""
    unzipped, total = _Unzipped(joined, limits), 0
    with tarfile.open(fileobj=unzipped, mode="r|", bufsize=_READ) as tar:
        for number in itertools.count(1):
            if (member := tar.next()) is None:
                break
            tar.members.clear()  # else it holds every member it has seen
            if len(tar.pax_headers) > _GLOBALS:
                raise ArchiveError(
                    f"more than {_GLOBALS} global headers; do not trust this archive"
                )
            total += member.size
            _check_member(member, number, total, limits)
            unzipped.allowed = tar.offset + _SLACK
            name = _safe_name(member, out)
            if member.isdir():
                continue
            yield member, name, tar.extractfile(member)
        _check_end(tar)


def _check_member(member: tarfile.TarInfo, number: int, total: int, limits: Limits) -> None:
    for what, n, limit in (
        ("members", number, limits.members),
        ("member_bytes", member.size, limits.member_bytes),
        ("total_bytes", total, limits.total_bytes),
    ):
        if n > limit:
            raise ArchiveError(
                f"{member.name[:200]!r}: {what} is {n}, above the limit of {limit}; if you trust "
                f"the archive, increase --max_{what}"
            )
    if member.size < 0:
        raise ArchiveError(f"{member.name[:200]!r}: the size is below 0; do not trust this archive")


def _safe_name(member: tarfile.TarInfo, out: Path) -> str:
    """Return the name below OUT; raise for all but plain files and folders inside OUT."""
    label = repr(member.name[:200])
    regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not regular and not member.isdir():
        raise ArchiveError(
            f"{label} is a link or a device, not a regular file; do not trust this archive"
        )
    name = member.name.removeprefix("./")
    if member.isdir() and name in ("", "."):
        return ""
    try:
        check_name("archive", name)
        tarfile.data_filter(member, str(out))  # follows links that are already in OUT
    except (StorageError, tarfile.FilterError) as error:
        raise ArchiveError(
            f"{label} would be written outside {out}; do not trust this archive"
        ) from error
    return name


def _write_image(
    member: tarfile.TarInfo, name: str, data: io.BufferedIOBase | None, out: Path
) -> str:
    """Write one file if it is an image and not there; return which of the three cases it was."""
    last = name.rpartition("/")[2]
    if not last.lower().endswith(images.SUFFIXES) or last.startswith("."):  # ._a.png: macOS's notes
        return "left_out"
    target, partial = out / name, out / PARTIAL
    with os_errors(str(target)):
        if os.path.lexists(target):
            if not _same(target, member.size, data):
                raise ArchiveError(
                    f"{target} exists and is not this archive's file of {member.size} bytes; "
                    "delete it, or use another --out"
                )
            return "there"
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:  # x: never through a link that was placed there
            shutil.copyfileobj(data, file, _READ)
            written = file.tell()
        if written != member.size:
            raise EOFError(f"{name} has {written} of {member.size} bytes")
        os.replace(partial, target)
    return "written"


def _same(target: Path, size: int, data: io.BufferedIOBase) -> bool:
    status = os.lstat(target)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        return False
    with open(target, "rb", buffering=0) as file:
        return all(file.read(len(part)) == part for part in iter(lambda: data.read(_READ), b""))


def _check_end(tar: tarfile.TarFile) -> None:
    """Check the end: tarfile stops at a damaged header too; after a true end are zeros only."""
    rest = 0
    while block := tar.fileobj.read(1 << 16):
        rest += len(block)
        if block.count(0) != len(block):
            raise ArchiveError("damaged header; copy the archive again")
    if rest < tarfile.BLOCKSIZE:
        raise EOFError("no end marker")


def _check_parts(parts: Sequence[Path]) -> None:
    for part in parts:
        if not part.is_file():
            raise ArchiveError(f"{part}: no such file; list the parts, images.tar.gz.a*")
    if len(parts) == 1:
        return
    stem = parts[0].name[:-2]
    letters = [f"{a}{b}" for a in map(chr, range(97, 123)) for b in map(chr, range(97, 123))]
    for part, suffix in zip(parts, letters, strict=False):
        if part.name != stem + suffix or not re.fullmatch(r".*\.", stem):
            raise ArchiveError(
                f"{part}: expected {stem}{suffix}; list every part of one archive in order, "
                "images.tar.gz.a*"
            )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock OUT for this process, and remove what a killed run left."""
    with os_errors(str(out)):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArchiveError(
                f"{out}: another process is unpacking into it; wait until it has finished"
            ) from error
        try:
            with os_errors(str(out / PARTIAL)):
                (out / PARTIAL).unlink(missing_ok=True)
            yield
        finally:
            (out / PARTIAL).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _archive_errors(archive: str) -> Iterator[None]:
    """Convert errors of the stream to messages that name the archive and state what to do."""
    fix = "copy it again and rerun the same command, which resumes"
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{archive}: {error}") from error
    except EOFError as error:
        raise ArchiveError(
            f"{archive}: ends early ({error}): the last part is cut off or missing; {fix}"
        ) from error
    except (zlib.error, tarfile.TarError, RecursionError) as error:
        raise ArchiveError(f"{archive}: damaged, or not a .tar.gz ({error}); {fix}") from error
