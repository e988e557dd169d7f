"""Convert images to VQGAN codes at scale: any number of processes, restartable at any point.

    list of images --sha256 of each file--> unique images --VQGAN--> shards of codes

    D/plan.json                      what is tokenized, with which VQGAN; a folder has one plan
    D/digests/00003.npy              sha256 of the files of slice 3, zeros if one cannot be read
    D/codes/00003-5f0c.array_record  one image per record: its sha256, its codes (store_reader.py)
    D/codes/00003.json               names that file, the count, and the images that no decoder
                                     accepted; written last
    D/dataset.json                   counts; written when every shard exists
    D/index.npy                      for each image of the list: its record, or -1

A slice or a shard is a function of the plan and is written atomically and once: a second process
that made the same one discards its own. So processes need not communicate: process i of n makes
those numbered i, i + n, .., then those that others have left undone for a while, and a process that
finds everything complete writes the final files. Codes are equal bit for bit on the same kind and
number of devices; on others, a different order of summation may decide between two rows of the
codebook that are equally near. Identical files are encoded once. A folder of credentialed images is
readable by its owner only and contains no file names.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt8

from medmax_jax.data.image_tokens import dicom
from medmax_jax.data.image_tokens.batch_encoder import PRECISIONS, BatchEncoder
from medmax_jax.data.image_tokens.encoder import (
    BATCH,
    LOG_SECONDS,
    Encoder,
    PrepareError,
    load_encoder,
    log,
    open_image,
)
from medmax_jax.data.image_tokens.store_reader import digest_of, shard_file, to_bytes
from medmax_jax.data.records.document import pseudonym
from medmax_jax.data.records.row_streams import json_lines
from medmax_jax.endpoints import egress
from medmax_jax.io import image_paths
from medmax_jax.io.atomic_folder import private_folder
from medmax_jax.io.image_paths import is_inside
from medmax_jax.io.progress import ItemProgress
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.models import images

FORMAT = 2
SLICE = 4_096  # files hashed by one process at a time
NOT_FOUND = "no such file, or it may not be read"
TAKEOVER_SECONDS = 60.0  # seconds without progress until another process's part is made here too
_OPTIONS = "group_size:1,zstd:3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of a folder; two processes with different plans must not write to one."""

    pictures: str  # sha256 of the list
    count: int  # of the list
    vqgan: str  # sha256 of the weights
    codes_per_image: int
    precision: str  # highest | bfloat16
    shard_size: int  # images
    batch: int  # of one device
    credentialed: bool  # no file name is written or logged, and only the owner may read
    burned_in: bool  # DICOM files whose header states that they show text are accepted
    format: int = FORMAT


def tokenize(
    out: str | Path,
    paths: Sequence[str],
    *,
    folder: str | Path,
    encoder: Encoder,
    precision: str,
    shard_size: int,
    batch: int,
    max_bad: float,
    process: int = 0,
    processes: int = 1,
    credentialed: bool = False,
    burned_in: bool = False,
) -> dict[str, Any]:
    """Compute the codes of the images `folder`/path; return dataset.json when all are done.

    `batch`: images that a device encodes at once; the plan contains it, since codes depend on it
    slightly (batch_encoder.py). If more than the share `max_bad` of images cannot be read, the work
    stops. `credentialed`, `burned_in`: see Plan. Raises PrepareError. The same call resumes where
    it was stopped, with any number of processes.
    """
    if not paths or len(set(paths)) != len(paths):
        raise PrepareError(f"{len(paths)} pictures, {len(set(paths))} different; list each once")
    if not 0 <= process < processes:
        raise PrepareError(f"process {process} of {processes}; use 0 .. {processes - 1}")
    if min(shard_size, batch) < 1 or not 0 <= max_bad <= 1:
        raise PrepareError(
            f"shard_size {shard_size}, batch {batch}, max_bad {max_bad}; use 1 or more pictures, "
            "and a share from 0 to 1"
        )
    encode = BatchEncoder(encoder, precision=precision, batch=batch)
    plan = Plan(
        pictures=hashlib.sha256("\n".join(paths).encode()).hexdigest(), count=len(paths),
        vqgan=encoder.layout.vqgan, codes_per_image=encoder.layout.codes_per_image,
        precision=precision, shard_size=shard_size, batch=batch, credentialed=credentialed,
        burned_in=burned_in,
    )  # fmt: skip
    work = _TokenizeJob(Path(out), plan, paths, Path(folder), max_bad, encoder.vq_config.image_size)
    headers = credentialed or any(path.lower().endswith(".dcm") for path in paths)
    with private_folder(out) if credentialed else contextlib.nullcontext():
        with dicom.silence() if headers else contextlib.nullcontext():
            return _all(work, encode, (process, processes))


def _all(work: "_TokenizeJob", encode: BatchEncoder, turn: tuple[int, int]) -> dict[str, Any]:
    work.claim()
    if not work.finished():
        _in_turns(work.slices, turn, work.digest_file, work.hash_slice, "slices hashed")
        unique = work.unique()
        work.check()
        shards = range(-(-len(unique) // work.plan.shard_size))
        make = lambda n: work.encode_shard(n, unique, encode)  # noqa: E731
        _in_turns(shards, turn, work.shard_file, make, "shards of codes")
        work.seal(unique)
    return work.finished()


class _TokenizeJob:
    """The files of one folder."""

    def __init__(
        self, out: Path, plan: Plan, paths: Sequence[str], folder: Path, max_bad: float, size: int
    ):
        self.out, self.plan, self.paths, self.folder = out, plan, paths, folder
        self.max_bad, self.size = max_bad, size
        self.slices = range(-(-len(paths) // SLICE))

    def claim(self) -> None:
        """Write the plan, or check that the folder has the same one."""
        for name in ("digests", "codes"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        wanted = dataclasses.asdict(self.plan)
        if not (self.out / "plan.json").exists():
            _write(self.out / "plan.json", json.dumps(wanted, indent=1).encode())
        have = _read(self.out / "plan.json")
        for name, value in wanted.items():
            if have.get(name) != value:
                raise PrepareError(
                    f"{self.out} holds codes with {name} {have.get(name)!r}, this command has "
                    f"{value!r}; name another --out"
                )

    def finished(self) -> dict[str, Any] | None:
        path = self.out / "dataset.json"
        return _read(path) if path.exists() else None

    def digest_file(self, n: int) -> Path:
        return self.out / "digests" / f"{n:05d}.npy"

    def shard_file(self, n: int) -> Path:
        return self.out / "codes" / f"{n:05d}.json"

    def hash_slice(self, n: int) -> None:
        """Write the sha256 of each file of a slice; zeros for one that cannot be opened."""
        names = self.paths[n * SLICE : (n + 1) * SLICE]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = list(pool.map(self._digest, names))
        _save(self.digest_file(n), np.stack(found))

    def unique(self) -> np.ndarray:
        """Return the images that are encoded: the first of each content, in list order."""
        digests = self.digests
        rows = np.ascontiguousarray(digests).view("V32")[:, 0]
        first = np.sort(np.unique(rows, return_index=True)[1])
        return first[digests[first].any(axis=1)]

    @functools.cached_property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        return np.concatenate([np.load(self.digest_file(n)) for n in self.slices])

    def encode_shard(self, n: int, unique: np.ndarray, encode: BatchEncoder) -> None:
        """Write the codes of a shard, then the JSON that marks it as complete."""
        numbers = unique[n * self.plan.shard_size : (n + 1) * self.plan.shard_size]
        bad, count = {}, 0
        clock = ItemProgress(len(numbers), "pictures", log.info, every=LOG_SECONDS)
        path = self.out / "codes" / f"{n:05d}-{secrets.token_hex(4)}.array_record"
        try:
            with _records(path) as writer:
                for number, codes in zip(numbers, encode(self._pictures(numbers)), strict=True):
                    if isinstance(codes, str):
                        bad[self.name(number)] = codes
                        codes = np.zeros(0, np.uint16)  # keeps its position; the index has -1
                    writer.write(to_bytes(self.digests[number], codes))
                    count += 1
                    clock.tick(f"shard {n}", 1)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if self.shard_file(n).exists():  # another process finished first
            return path.unlink(missing_ok=True)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        facts = dict(file=path.name, records=count, bytes=path.stat().st_size, unreadable=bad)
        facts["agreement"] = encode.agreement
        _write(self.shard_file(n), json.dumps(facts, ensure_ascii=False, indent=0).encode())
        self.check()

    def seal(self, unique: np.ndarray) -> None:
        """Write index and counts; every process computes the same ones."""
        digests, shards = self.digests, -(-len(unique) // self.plan.shard_size)
        facts = [shard_file(self.shard_file(n))[1] for n in range(shards)]
        bad = {name: why for each in facts for name, why in each["unreadable"].items()}
        place = {digests[number].tobytes(): i for i, number in enumerate(unique)}
        why = {digests[n].tobytes(): bad[self.name(n)] for n in unique if self.name(n) in bad}
        keys = [row.tobytes() for row in digests]
        index = np.array([-1 if k in why else place.get(k, -1) for k in keys], np.int64)
        reasons = {self.name(n): why.get(keys[n], NOT_FOUND) for n in np.flatnonzero(index < 0)}
        self._bound(len(reasons), reasons)
        agreed = [each["agreement"] for each in facts if each.get("agreement") is not None]
        _save(self.out / "index.npy", index)
        meta = dict(
            plan=dataclasses.asdict(self.plan),
            pictures=len(index),
            unique=len(unique),
            unreadable=len(reasons),
            reasons=reasons,
            agreement=min(agreed, default=None),  # of bfloat16 codes, the minimum of all processes
        )
        _write(self.out / "dataset.json", json.dumps(meta, ensure_ascii=False, indent=1).encode())
        named = {each["file"] for each in facts}
        for path in (self.out / "codes").glob("*.array_record"):
            if path.name not in named:  # of a process that was killed, or that finished second
                path.unlink(missing_ok=True)

    def name(self, number: int) -> str:
        """Return the name of the image in messages."""
        path = self.paths[number]
        return pseudonym(path) if self.plan.credentialed else path

    def _digest(self, path: str) -> UInt8[np.ndarray, "32"]:
        try:
            found = digest_of(self._file(path))
        except OSError:
            found = bytes(32)
        return np.frombuffer(found, np.uint8)

    def _file(self, path: str) -> Path:
        label = pseudonym(path) if self.plan.credentialed else ""
        try:
            return image_paths.resolve(self.folder, path, label=label)
        except image_paths.ImagePathError as error:
            raise PrepareError(str(error)) from error

    def _pictures(self, numbers: np.ndarray) -> Iterator[Callable[[], np.ndarray]]:
        for number in numbers:
            yield functools.partial(self._pixels, int(number))

    def _pixels(self, number: int) -> np.ndarray:
        path, name = self.paths[number], self.name(number)
        if (self._digest(path) != self.digests[number]).any():
            raise PrepareError(
                f"{name}: changed since it was hashed; leave the pictures as they are, and name "
                "another --out"
            )
        picture = open_image(
            self._file(path), name=name, burned_in=self.plan.burned_in,
            secret=self.plan.credentialed,
        )  # fmt: skip
        return images.preprocess(picture, self.size)

    def check(self) -> None:
        """Raise PrepareError if too many images so far could not be read."""
        facts = [shard_file(p)[1] for p in (self.out / "codes").glob("*.json")]
        bad = {name: why for each in facts for name, why in each["unreadable"].items()}
        gone = np.flatnonzero(~self.digests.any(axis=1))
        count = len(bad) + len(gone)
        self._bound(count, bad | {self.name(n): NOT_FOUND for n in gone[:1]})

    def _bound(self, count: int, bad: dict[str, str]) -> None:
        if count > self.max_bad * len(self.paths):
            first = next(iter(bad.items()))
            raise PrepareError(
                f"{count} of {len(self.paths)} pictures cannot be read, --max_bad allows the share "
                f"{self.max_bad}; the first: {first[0]}: {first[1]}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except TextFileError as error:
        raise PrepareError(f"{error}; name another --out") from error


def _in_turns(
    numbers: range,
    turn: tuple[int, int],
    file: Callable[[int], Path],
    make: Callable[[int], None],
    what: str,
) -> None:
    """Make what is missing: this process's own parts first, then parts that others left undone."""
    process, processes = turn
    start, made = time.monotonic(), 0
    for number in numbers[process::processes]:
        if not file(number).exists():
            make(number)
            made += 1
        there = sum(file(n).exists() for n in numbers)
        rate = made / max(time.monotonic() - start, 1e-9)
        eta = f"{(len(numbers) - there) / rate / processes:.0f} s left" if rate else "found there"
        log.info("%d/%d %s, %s", there, len(numbers), what, eta)
    last, seen = time.monotonic(), -1
    while missing := [n for n in numbers if not file(n).exists()]:
        if len(missing) != seen:
            last, seen = time.monotonic(), len(missing)
        elif time.monotonic() - last > TAKEOVER_SECONDS:
            log.info(
                "%s: %d has had no news for %.0f s: made here", what, missing[0], TAKEOVER_SECONDS
            )
            make(missing[0])
        else:
            time.sleep(0.2)


@contextlib.contextmanager
def _records(path: Path) -> Iterator[array_record_module.ArrayRecordWriter]:
    writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    try:
        yield writer
    finally:
        try:
            writer.close()
        except RuntimeError as error:  # it reports a full disk here, not when it writes
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> PrepareError:
    return PrepareError(f"{path}: cannot be written ({error}); make room, then the same command")


def _save(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    _write(path, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically, also across a power cut; keep an existing one: others read it."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    try:
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        partial.unlink()
    except OSError:  # a file system without links
        os.replace(partial, path)


# ---- The command line of `python -m data.prepare tokenize` ----


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m data.prepare tokenize`."""
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument(
        "--list", type=Path, help="JSONL with image_path; without: every picture of the folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", type=Path, required=True, help="model folder, for its VQGAN")
    parser.add_argument("--precision", choices=PRECISIONS, default="highest")
    parser.add_argument("--shard_size", type=int, default=SLICE, help="pictures")
    parser.add_argument("--batch", type=int, default=BATCH, help="of pictures on a device")
    parser.add_argument("--max_bad", type=float, default=0.01, metavar="SHARE")
    parser.add_argument("--process", type=int, default=0, help="number of this process")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument(
        "--credentialed", action="store_true", help="private files, and no name of a picture"
    )
    parser.add_argument(
        "--burned_in", action="store_true", help="take DICOM files that say they show text"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    names = ("precision", "shard_size", "batch", "max_bad", "process", "processes")
    names += ("credentialed", "burned_in")
    paths = _listed(args.images, args.list, credentialed=args.credentialed)
    meta = tokenize(
        args.out, paths, folder=args.images,
        encoder=load_encoder(args.model), **{name: getattr(args, name) for name in names},
    )  # fmt: skip
    return {n: meta[n] for n in ("pictures", "unique", "unreadable", "agreement")}


def _listed(folder: Path, listing: Path | None, *, credentialed: bool) -> list[str]:
    """Return the images by path, each once: of a JSONL of rows, or all files with image suffix."""
    for path, there in ((folder, folder.is_dir()), (listing, not listing or listing.is_file())):
        if not there:
            raise PrepareError(f"{path}: not there; check --images and --list")
    if listing is None:
        suffixes = (*images.SUFFIXES, ".dcm")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        return sorted(str(p.relative_to(folder)) for p in found)
    paths: dict[str, None] = {}
    for place, row in json_lines(listing):
        if isinstance(row, dict) and not credentialed:
            # The class of a row that states none is unknown: the flag decides.
            stated = egress.data_class_of(row, str(place), default=egress.LICENCE_BOUND)
            if stated == egress.CREDENTIALED:
                raise PrepareError(f"{place}: is credentialed; add --credentialed")
        path = row.get("image_path", "") if isinstance(row, dict) else None
        if path is None or path and not is_inside(path):
            shown = "" if credentialed else f" {path!r},"
            raise PrepareError(f"{place}: image_path is{shown} no name of a file below --images")
        paths |= {path: None} if path else {}
    return list(paths)
