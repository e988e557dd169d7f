"""Pictures to VQGAN codes at scale: any number of processes, killed and started again at any point.

    list of pictures --sha256 of each file--> unique pictures --VQGAN--> shards of codes

    D/plan.json                      what is tokenized, by what; a folder belongs to one plan
    D/digests/00003.npy              sha256 of the files of slice 3, zeros where one cannot be read
    D/codes/00003.array_record       a picture a record: its sha256, its codes
    D/codes/00003.json               how many, and the pictures that no decoder took; written last
    D/dataset.json                   counts; written when every shard stands
    D/index.npy                      for each picture of the list: its record, or -1

A slice or a shard is a function of the plan and appears whole, by a rename, so processes need not
talk: process i of n makes those numbered i, i + n, .., then what the others leave undone for a
while, and who finds everything there writes the end. Codes are equal bit for bit on the same kind
and number of devices; elsewhere a sum in another order may decide between two rows of the codebook
that are equally near. Identical files are encoded once.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt8, UInt16

from data.batch_encoder import PRECISIONS, BatchEncoder
from data.captions import is_inside
from data.codes import Encoder, PrepareError, Progress, load_encoder, log
from medmax_jax import images

FORMAT = 1
SLICE = 4_096  # files hashed by one process at a time
PATIENCE = 60.0  # seconds without news after which another process's part is made here too
_OPTIONS = "group_size:1,zstd:3"
_HEAD = struct.Struct("<4sI32s")  # magic, CRC-32 of the rest, sha256 of the picture's file
_MAGIC = b"MMC1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a folder holds; two processes with different plans must not write to one."""

    pictures: str  # sha256 of the list
    count: int  # of the list
    vqgan: str  # sha256 of the weights
    codes_per_image: int
    precision: str  # highest | bfloat16
    shard_size: int  # pictures
    batch: int  # of one device
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
) -> dict[str, Any]:
    """Codes of the pictures `folder`/path; returns dataset.json when all is done.

    `batch`: pictures that a device encodes at once; it belongs to the plan, since in another shape
    fp32 sums round otherwise, and a latent between two rows of the codebook may take the other one.
    More than the share `max_bad` of pictures that cannot be read stop the work. Raises
    PrepareError; the same call goes on where it was stopped, with any number of processes.
    """
    if precision not in PRECISIONS:
        raise PrepareError(f"precision is {precision!r}; use {' or '.join(PRECISIONS)}")
    if not paths or len(set(paths)) != len(paths):
        raise PrepareError(f"{len(paths)} pictures, {len(set(paths))} different; list each once")
    if not 0 <= process < processes:
        raise PrepareError(f"process {process} of {processes}; use 0 .. {processes - 1}")
    plan = Plan(
        pictures=hashlib.sha256("\n".join(paths).encode()).hexdigest(), count=len(paths),
        vqgan=encoder.layout.vqgan, codes_per_image=encoder.layout.codes_per_image,
        precision=precision, shard_size=shard_size, batch=batch,
    )  # fmt: skip
    work = _Work(Path(out), plan, paths, Path(folder), max_bad)
    work.claim()
    if work.finished():
        return work.finished()
    turn = (process, processes)
    _in_turns(work.slices, turn, work.digest_file, work.hash_slice, "slices hashed")
    unique = work.unique()
    encode = BatchEncoder(encoder, precision, batch)
    shards = range(-(-len(unique) // shard_size))
    make = lambda n: work.encode_shard(n, unique, encode)  # noqa: E731
    _in_turns(shards, turn, work.shard_file, make, "shards of codes")
    return work.seal(unique)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data.prepare tokenize`."""
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument(
        "--list", type=Path, help="JSONL with image_path; without: every picture of the folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", type=Path, required=True, help="model folder, for its VQGAN")
    parser.add_argument("--precision", choices=PRECISIONS, default="highest")
    parser.add_argument("--shard_size", type=int, default=SLICE, help="pictures")
    parser.add_argument("--batch", type=int, default=16, help="pictures a device encodes at once")
    parser.add_argument("--max_bad", type=float, default=0.01, metavar="SHARE")
    parser.add_argument("--process", type=int, default=0, help="number of this process")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    names = ("precision", "shard_size", "batch", "max_bad", "process", "processes")
    meta = tokenize(
        args.out, _listed(args.images, args.list), folder=args.images,
        encoder=load_encoder(args.model), **{name: getattr(args, name) for name in names},
    )  # fmt: skip
    return {n: meta[n] for n in ("pictures", "unique", "unreadable", "agreement")}


def _listed(folder: Path, listing: Path | None) -> list[str]:
    """The pictures by path, each once: of a JSONL of rows, or all files with a picture's suffix."""
    if listing is None:
        found = (p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES)
        return sorted(str(p.relative_to(folder)) for p in found)
    paths: dict[str, None] = {}
    with open(listing, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                path = json.loads(line).get("image_path", "")
            except (ValueError, AttributeError) as error:
                raise PrepareError(
                    f"{listing}, line {number}: not a JSON object ({error})"
                ) from None
            if path and not is_inside(path):
                raise PrepareError(f"{listing}, line {number}: {path!r} leaves the image folder")
            paths |= {path: None} if path else {}
    return list(paths)


def open_codes(folder: str | Path) -> "Codes":
    """The codes of a finished folder; raises PrepareError when it is not whole."""
    return Codes(Path(folder))


class Codes:
    """`codes[i]`: the codes of the i-th picture of the list; None where it could not be read."""

    def __init__(self, folder: Path):
        try:
            self.meta = json.loads((folder / "dataset.json").read_text())
            self.index = np.load(folder / "index.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise PrepareError(
                f"{folder}: not finished ({error}); give its tokenize command again"
            ) from error
        self._folder, self._readers = folder, {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> UInt16[np.ndarray, "K"] | None:
        place = int(self.index[i])
        if place < 0:
            return None
        shard, record = divmod(place, self.meta["plan"]["shard_size"])
        path = self._folder / "codes" / f"{shard:05d}.array_record"
        if shard not in self._readers:
            facts = json.loads(path.with_suffix(".json").read_text())
            if path.stat().st_size != facts["bytes"]:  # ArrayRecord reads a short file as empty
                raise PrepareError(f"{path}: not the {facts['bytes']} bytes written; copy it again")
            self._readers[shard] = array_record_module.ArrayRecordReader(str(path))
        return _from_bytes(self._readers[shard].read([record])[0], f"{path}, record {record}")[1]


class _Work:
    """The files of one folder."""

    def __init__(self, out: Path, plan: Plan, paths: Sequence[str], folder: Path, max_bad: float):
        self.out, self.plan, self.paths, self.folder = out, plan, paths, folder
        self.max_bad = max_bad
        self.slices = range(-(-len(paths) // SLICE))

    def claim(self) -> None:
        """Writes the plan, or checks that the folder has the same one."""
        for name in ("digests", "codes"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        wanted = dataclasses.asdict(self.plan)
        if not (self.out / "plan.json").exists():
            _write(self.out / "plan.json", json.dumps(wanted, indent=1).encode())
        have = json.loads((self.out / "plan.json").read_text())
        for name, value in wanted.items():
            if have.get(name) != value:
                raise PrepareError(
                    f"{self.out} holds codes with {name} {have.get(name)!r}, this command has "
                    f"{value!r}; name another --out"
                )

    def finished(self) -> dict[str, Any] | None:
        path = self.out / "dataset.json"
        return json.loads(path.read_text()) if path.exists() else None

    def digest_file(self, n: int) -> Path:
        return self.out / "digests" / f"{n:05d}.npy"

    def shard_file(self, n: int) -> Path:
        return self.out / "codes" / f"{n:05d}.json"

    def hash_slice(self, n: int) -> None:
        """sha256 of each file of a slice; zeros for one that cannot be opened."""
        names = self.paths[n * SLICE : (n + 1) * SLICE]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = list(pool.map(self._digest, names))
        _save(self.digest_file(n), np.stack(found))

    def unique(self) -> np.ndarray:
        """Numbers of the pictures that are encoded: the first of each content, in list order."""
        digests = self.digests
        rows = np.ascontiguousarray(digests).view("V32")[:, 0]
        first = np.sort(np.unique(rows, return_index=True)[1])
        return first[digests[first].any(axis=1)]

    @functools.cached_property
    def digests(self) -> UInt8[np.ndarray, "n 32"]:
        return np.concatenate([np.load(self.digest_file(n)) for n in self.slices])

    def encode_shard(self, n: int, unique: np.ndarray, encode: BatchEncoder) -> None:
        """Writes the codes of a shard, then the JSON that says it is whole."""
        numbers = unique[n * self.plan.shard_size : (n + 1) * self.plan.shard_size]
        digests, bad, count = self.digests[numbers], {}, 0
        progress = Progress(len(numbers), f"pictures of shard {n}")
        final = self.out / "codes" / f"{n:05d}.array_record"
        partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
        writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
        try:
            for number, digest, codes in zip(
                numbers, digests, encode(self._pictures(numbers)), strict=True
            ):
                if isinstance(codes, str):
                    bad[self.paths[number]] = codes
                    codes = np.zeros(0, np.uint16)  # keeps its place; the index says -1
                writer.write(_to_bytes(digest, codes))
                count += 1
                progress.add(1)
        finally:
            writer.close()
        _rename(partial, final)
        facts = dict(records=count, bytes=final.stat().st_size, unreadable=bad)
        facts["agreement"] = encode.agreement
        _write(self.shard_file(n), json.dumps(facts, ensure_ascii=False, indent=0).encode())
        self._check()

    def seal(self, unique: np.ndarray) -> dict[str, Any]:
        """Index and counts; every process comes to the same."""
        digests, shards = self.digests, -(-len(unique) // self.plan.shard_size)
        facts = [json.loads(self.shard_file(n).read_text()) for n in range(shards)]
        bad = {path: why for each in facts for path, why in each["unreadable"].items()}
        place = {digests[number].tobytes(): i for i, number in enumerate(unique)}
        failed = {digests[i].tobytes() for i, path in enumerate(self.paths) if path in bad}
        keys = [row.tobytes() for row in digests]
        index = np.array([-1 if k in failed else place.get(k, -1) for k in keys], np.int64)
        for path, row in zip(self.paths, digests, strict=True):
            if not row.any():
                bad[path] = "no such file, or it may not be read"
        self._check()
        agreed = [each["agreement"] for each in facts if each["agreement"] is not None]
        _save(self.out / "index.npy", index)
        meta = dict(
            plan=dataclasses.asdict(self.plan),
            pictures=len(index),
            unique=len(unique),
            unreadable=int((index < 0).sum()),
            reasons=bad,
            agreement=min(agreed, default=None),  # of bfloat16 codes, the least of all processes
        )
        _write(self.out / "dataset.json", json.dumps(meta, ensure_ascii=False, indent=1).encode())
        return meta

    def _digest(self, name: str) -> UInt8[np.ndarray, "32"]:
        try:
            with open(self.folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").digest()
        except OSError:
            found = bytes(32)
        return np.frombuffer(found, np.uint8)

    def _pictures(self, numbers: np.ndarray) -> Iterator[Callable[[], Any]]:
        for number in numbers:
            yield lambda path=self.folder / self.paths[number]: images.load(
                path, max_pixels=images.MAX_PIXELS
            )

    def _check(self) -> None:
        """Raises PrepareError when too many pictures so far could not be read."""
        facts = [json.loads(p.read_text()) for p in (self.out / "codes").glob("*.json")]
        bad = {path: why for each in facts for path, why in each["unreadable"].items()}
        gone = int((~self.digests.any(axis=1)).sum())
        if len(bad) + gone > self.max_bad * len(self.paths):
            first = next(iter(bad.items()), ("a file", "no such file, or it may not be read"))
            raise PrepareError(
                f"{len(bad) + gone} of {len(self.paths)} pictures cannot be read, --max_bad allows "
                f"the share {self.max_bad}; the first: {first[0]}: {first[1]}"
            )


def _in_turns(
    numbers: range,
    turn: tuple[int, int],
    file: Callable[[int], Path],
    make: Callable[[int], None],
    what: str,
) -> None:
    """Makes what is missing: this process's own first, then what others seem to have left."""
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
        elif time.monotonic() - last > PATIENCE:
            log.info("%s: %d has had no news for %.0f s: made here", what, missing[0], PATIENCE)
            make(missing[0])
        else:
            time.sleep(0.2)


def _to_bytes(digest: UInt8[np.ndarray, "32"], codes: UInt16[np.ndarray, "K"]) -> bytes:
    body = digest.tobytes() + codes.astype("<u2").tobytes()
    return _HEAD.pack(_MAGIC, zlib.crc32(body), digest.tobytes()) + body[32:]


def _from_bytes(record: bytes, where: str) -> tuple[bytes, UInt16[np.ndarray, "K"]]:
    if len(record) < _HEAD.size or record[:4] != _MAGIC:
        raise PrepareError(f"{where}: no codes of this format; the shard is damaged or foreign")
    _, crc, digest = _HEAD.unpack_from(record)
    if zlib.crc32(record[8:]) != crc:
        raise PrepareError(f"{where}: CRC differs; delete the shard and tokenize again")
    return digest, np.frombuffer(record[_HEAD.size :], "<u2").astype(np.uint16)


def _save(path: Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    _write(path, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    _rename(partial, path)


def _rename(partial: Path, path: Path) -> None:
    """Whole or not at all, also after a power cut."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
