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

from medmax_jax import arguments
from medmax_jax.config import VIEWS
from medmax_jax.data.image_tokens import dicom
from medmax_jax.data.image_tokens.batch_encoder import PRECISIONS, BatchEncoder
from medmax_jax.data.image_tokens.encoder import (
    BATCH,
    ENCODING,
    LOG_SECONDS,
    Encoder,
    PrepareError,
    load_encoder,
    log,
    open_image,
)
from medmax_jax.data.image_tokens.store_reader import (
    digest_of,
    shard_file,
    to_bytes,
    view_of,
)
from medmax_jax.data.records.document import pseudonym
from medmax_jax.data.records.row_streams import json_lines
from medmax_jax.endpoints import egress
from medmax_jax.io.progress import ItemProgress, report_waits
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.models import images
from medmax_jax.storage import image_paths
from medmax_jax.storage.atomic_folder import private_folder
from medmax_jax.storage.image_paths import is_inside

FORMAT = 2
SLICE = 4_096  # files hashed by one process at a time
NOT_FOUND = "no such file, or no permission to read it"
TAKEOVER_SECONDS = 60.0  # seconds without progress until another process's part is made here too
_OPTIONS = "group_size:1,zstd:3"
# Verbatim: part of the data.
LIST_KEY = "pictures"  # of plan.json: the sha256 of the list of images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of a folder; two processes with different plans must not write to one."""

    # Verbatim: part of the data.
    pictures: str  # sha256 of the list
    count: int  # of the list
    vqgan: str  # sha256 of the weights
    codes_per_image: int
    view: str  # released | pad, see models/images.py; a plan without it has the first
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

    The images have the view of prompts that `encoder` states.

    `batch`: images that a device encodes at once; the plan contains it, since codes depend on it
    slightly (batch_encoder.py). If more than the share `max_bad` of images cannot be read, the work
    stops. `credentialed`, `burned_in`: see Plan. Raises PrepareError. The same call resumes where
    it was stopped, with any number of processes.
    """
    if not paths or len(set(paths)) != len(paths):
        raise PrepareError(
            f"the list has {len(paths)} images, {len(set(paths))} of them different; list one or "
            "more, each once"
        )
    if not 0 <= process < processes:
        raise PrepareError(
            f"process is {process} of {processes}; use a number from 0 to {processes - 1}"
        )
    if min(shard_size, batch) < 1 or not 0 <= max_bad <= 1:
        raise PrepareError(
            f"shard_size is {shard_size}, batch is {batch}, max_bad is {max_bad}; use 1 or more "
            "images for the first two, and a share from 0 to 1"
        )
    encode = BatchEncoder(encoder, precision=precision, batch=batch)
    # Verbatim: part of the data.
    plan = Plan(
        pictures=hashlib.sha256("\n".join(paths).encode()).hexdigest(), count=len(paths),
        vqgan=encoder.layout.vqgan, codes_per_image=encoder.layout.codes_per_image,
        view=encoder.layout.view, precision=precision, shard_size=shard_size, batch=batch,
        credentialed=credentialed, burned_in=burned_in,
    )  # fmt: skip
    work = _TokenizeJob(Path(out), plan, paths, Path(folder), max_bad, encoder.vq_config.image_size)
    headers = credentialed or any(path.lower().endswith(".dcm") for path in paths)
    with private_folder(out) if credentialed else contextlib.nullcontext():
        with dicom.silence() if headers else contextlib.nullcontext():
            return _run_job(work, encode, (process, processes))


def _run_job(work: "_TokenizeJob", encode: BatchEncoder, turn: tuple[int, int]) -> dict[str, Any]:
    work.write_plan()
    if not work.finished():
        _share_work(work.slices, turn, work.digest_file, work.hash_slice, "slices hashed")
        unique = work.unique()
        work.check()
        shards = range(-(-len(unique) // work.plan.shard_size))
        make = lambda n: work.encode_shard(n, unique, encode)  # noqa: E731
        _share_work(shards, turn, work.shard_file, make, "shards of codes")
        work.write_index(unique)
    return work.finished()


class _TokenizeJob:
    """The files of one folder."""

    def __init__(
        self, out: Path, plan: Plan, paths: Sequence[str], folder: Path, max_bad: float, size: int
    ):
        self.out, self.plan, self.paths, self.folder = out, plan, paths, folder
        self.max_bad, self.size = max_bad, size
        self.slices = range(-(-len(paths) // SLICE))

    def write_plan(self) -> None:
        """Write the plan, or check that the folder has the same one."""
        for name in ("digests", "codes"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        plan = dataclasses.asdict(self.plan)
        if not (self.out / "plan.json").exists():
            _write(self.out / "plan.json", json.dumps(plan, indent=1).encode())
        stored = _read(self.out / "plan.json")
        stored["view"] = view_of(stored)
        for name, value in plan.items():
            if stored.get(name) != value:
                found = f"{name} {stored.get(name)!r}, not with {value!r}"
                found = "another list of images" if name == LIST_KEY else found
                raise PrepareError(f"{self.out} was started with {found}; use another --out")

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
            digests = list(pool.map(self._digest, names))
        _save(self.digest_file(n), np.stack(digests))

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
        unreadable, count = {}, 0
        progress = ItemProgress(len(numbers), "images", log.info, every=LOG_SECONDS)
        path = self.out / "codes" / f"{n:05d}-{secrets.token_hex(4)}.array_record"
        try:
            with _records(path) as writer:
                encoded = report_waits(encode(self._loaders(numbers)), ENCODING, log.info)
                for number, codes in zip(numbers, encoded, strict=True):
                    if isinstance(codes, str):
                        unreadable[self.name(number)] = codes
                        codes = np.zeros(0, np.uint16)  # keeps its position; the index has -1
                    writer.write(to_bytes(self.digests[number], codes))
                    count += 1
                    progress.tick(f"shard {n}", 1)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        if self.shard_file(n).exists():  # another process finished first
            return path.unlink(missing_ok=True)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        facts = dict(file=path.name, records=count, bytes=path.stat().st_size)
        facts |= dict(unreadable=unreadable, agreement=encode.agreement)
        _write(self.shard_file(n), json.dumps(facts, ensure_ascii=False, indent=0).encode())
        self.check()

    def write_index(self, unique: np.ndarray) -> None:
        """Write index and counts; every process computes the same ones."""
        digests, shards = self.digests, -(-len(unique) // self.plan.shard_size)
        facts = [shard_file(self.shard_file(n))[1] for n in range(shards)]
        bad = {name: reason for f in facts for name, reason in f["unreadable"].items()}
        record = {digests[number].tobytes(): i for i, number in enumerate(unique)}
        why = {digests[n].tobytes(): bad[self.name(n)] for n in unique if self.name(n) in bad}
        keys = [row.tobytes() for row in digests]
        index = np.array([-1 if k in why else record.get(k, -1) for k in keys], np.int64)
        reasons = {self.name(n): why.get(keys[n], NOT_FOUND) for n in np.flatnonzero(index < 0)}
        self._check_share(len(reasons), reasons)
        agreements = [f["agreement"] for f in facts if f.get("agreement") is not None]
        _save(self.out / "index.npy", index)
        # Verbatim: part of the data.
        meta = dict(
            plan=dataclasses.asdict(self.plan),
            pictures=len(index),
            unique=len(unique),
            unreadable=len(reasons),
            reasons=reasons,
            agreement=min(
                agreements, default=None
            ),  # of bfloat16 codes, the minimum of all processes
        )
        _write(self.out / "dataset.json", json.dumps(meta, ensure_ascii=False, indent=1).encode())
        named = {f["file"] for f in facts}
        for path in (self.out / "codes").glob("*.array_record"):
            if path.name not in named:  # of a process that was killed, or that finished second
                path.unlink(missing_ok=True)

    def name(self, number: int) -> str:
        """Return the name of the image in messages."""
        path = self.paths[number]
        return pseudonym(path) if self.plan.credentialed else path

    def _digest(self, path: str) -> UInt8[np.ndarray, "32"]:
        try:
            digest = digest_of(self._file(path))
        except OSError:
            digest = bytes(32)
        return np.frombuffer(digest, np.uint8)

    def _file(self, path: str) -> Path:
        label = pseudonym(path) if self.plan.credentialed else ""
        try:
            return image_paths.resolve(self.folder, path, label=label)
        except image_paths.ImagePathError as error:
            raise PrepareError(str(error)) from error

    def _loaders(self, numbers: np.ndarray) -> Iterator[Callable[[], np.ndarray]]:
        for number in numbers:
            yield functools.partial(self._pixels, int(number))

    def _pixels(self, number: int) -> np.ndarray:
        path, name = self.paths[number], self.name(number)
        if (self._digest(path) != self.digests[number]).any():
            raise PrepareError(
                f"{name}: changed since it was hashed; do not change images during the run, and "
                "use another --out"
            )
        image = open_image(
            self._file(path), name=name, burned_in=self.plan.burned_in,
            secret=self.plan.credentialed,
        )  # fmt: skip
        return images.preprocess(image, self.size, self.plan.view)

    def check(self) -> None:
        """Raise PrepareError if too many images so far could not be read."""
        facts = [shard_file(p)[1] for p in (self.out / "codes").glob("*.json")]
        bad = {name: reason for f in facts for name, reason in f["unreadable"].items()}
        missing = np.flatnonzero(~self.digests.any(axis=1))
        count = len(bad) + len(missing)
        self._check_share(count, bad | {self.name(n): NOT_FOUND for n in missing[:1]})

    def _check_share(self, count: int, bad: dict[str, str]) -> None:
        if count > self.max_bad * len(self.paths):
            first = next(iter(bad.items()))
            raise PrepareError(
                f"{count} of {len(self.paths)} images cannot be read, but --max_bad allows only "
                f"the share {self.max_bad}; the first: {first[0]}: {first[1]}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except TextFileError as error:
        raise PrepareError(f"{error}; use another --out") from error


def _share_work(
    numbers: range,
    turn: tuple[int, int],
    file: Callable[[int], Path],
    make: Callable[[int], None],
    what: str,
) -> None:
    """Make what is missing: this process's own parts first, then parts that others left undone."""
    process, processes = turn
    start, created = time.monotonic(), 0
    for number in numbers[process::processes]:
        if not file(number).exists():
            make(number)
            created += 1
        done = sum(file(n).exists() for n in numbers)
        rate = created / max(time.monotonic() - start, 1e-9)
        eta = f"{(len(numbers) - done) / rate / processes:.0f} s left" if rate else "already done"
        log.info("%d/%d %s, %s", done, len(numbers), what, eta)
    last, last_count = time.monotonic(), -1
    while missing := [n for n in numbers if not file(n).exists()]:
        if len(missing) != last_count:
            last, last_count = time.monotonic(), len(missing)
        elif time.monotonic() - last > TAKEOVER_SECONDS:
            log.info(
                "%s: no progress of other processes for %.0f s; taking over number %d",
                what, TAKEOVER_SECONDS, missing[0],
            )  # fmt: skip
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
    return PrepareError(
        f"{path}: cannot be written ({error}); free disk space and rerun the same command"
    )


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
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument(
        "--list", type=Path, help="JSONL with image_path; default: every image of the folder"
    )
    parser.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    parser.add_argument(
        "--model", type=arguments.folder, required=True, help="model folder that contains the VQGAN"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="highest", help="precision of the encoder"
    )
    parser.add_argument(
        "--view", choices=VIEWS, default="", help="view of the images; default: the model's"
    )
    parser.add_argument("--shard_size", type=int, default=SLICE, help="images per shard")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per batch and device")
    parser.add_argument(
        "--max_bad", type=float, default=0.01, metavar="SHARE",
        help="stop if more than this share of images cannot be read",
    )  # fmt: skip
    parser.add_argument("--process", type=int, default=0, help="number of this process, from 0")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes that share the work"
    )
    parser.add_argument(
        "--credentialed", action="store_true",
        help="make files readable by their owner only, and write no image names",
    )  # fmt: skip
    parser.add_argument(
        "--burned_in", action="store_true",
        help="accept DICOM files whose header states that text is burned into the pixels",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    paths = _list_images(args.images, args.list, credentialed=args.credentialed)
    meta = tokenize(
        args.out,
        paths,
        folder=args.images,
        encoder=load_encoder(args.model, view=args.view),
        precision=args.precision,
        shard_size=args.shard_size,
        batch=args.batch,
        max_bad=args.max_bad,
        process=args.process,
        processes=args.processes,
        credentialed=args.credentialed,
        burned_in=args.burned_in,
    )
    # Verbatim: part of the data.
    return {n: meta[n] for n in ("pictures", "unique", "unreadable", "agreement")}


def _list_images(folder: Path, listing: Path | None, *, credentialed: bool) -> list[str]:
    """Return the images by path, each once: of a JSONL of rows, or all files with image suffix."""
    for path, exists in ((folder, folder.is_dir()), (listing, not listing or listing.is_file())):
        if not exists:
            raise PrepareError(f"{path}: does not exist; check --images and --list")
    if listing is None:
        suffixes = (*images.SUFFIXES, ".dcm")
        files = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        return sorted(str(p.relative_to(folder)) for p in files)
    paths: dict[str, None] = {}
    for place, row in json_lines(listing):
        if isinstance(row, dict) and not credentialed:
            # The class of a row that states none is unknown: the flag decides.
            stated = egress.data_class_of(row, str(place), default=egress.LICENCE_BOUND)
            if stated == egress.CREDENTIALED:
                raise PrepareError(f"{place}: the row is credentialed; add --credentialed")
        path = row.get("image_path", "") if isinstance(row, dict) else None
        if path is None or path and not is_inside(path):
            value = "" if credentialed else f" {path!r}"
            raise PrepareError(
                f"{place}: image_path{value} is invalid; expected the path of a file below --images"
            )
        paths |= {path: None} if path else {}
    return list(paths)
