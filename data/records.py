"""Documents on disk: a folder of ArrayRecord shards that says what it holds and notices damage.

    folder/00000-of-00003.array_record   one document a record, as documents.py writes it
    folder/index.npy                     int32 [documents, columns of COLUMNS]: lengths and counts
    folder/dataset.json                  counts, vocabulary, image size, fingerprints; written last

A folder without dataset.json is not finished. ArrayRecord reads a truncated shard as empty records
and says nothing, so sizes are checked when a folder opens and every record carries its own CRC.
"""

import collections
import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data.documents import (
    COLUMNS,
    Document,
    Layout,
    RecordsError,
    check_document,
    counts,
    from_bytes,
    to_bytes,
)
from medmax_jax.config import ConfigError, build

FORMAT = 1
META, INDEX = "dataset.json", "index.npy"
_OPTIONS = "group_size:1,zstd:3"  # group_size 1: the only one with fast random access


def write(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    *,
    shard_size: int,
    layout: Layout,
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Writes a folder of records and returns its dataset.json; `notes` stand in it as given.

    The folder appears finished or not at all: shards carry a temporary name until the last
    document is written, and dataset.json comes last.
    """
    folder = _new_folder(folder)
    count, rows, digest, ids = _Counter(), array("i"), hashlib.sha256(), set()
    parts = _Parts(folder, shard_size)
    try:
        for document in documents:
            check_document(document, layout)
            if document.id in ids:
                raise RecordsError(f"document id {document.id!r} comes twice; ids must differ")
            ids.add(document.id)
            record = to_bytes(document)
            digest.update(record)
            parts.add(record)
            rows.extend(counts(document, layout.vocab))
            count.add(document)
        if not rows:
            raise RecordsError(f"{folder}: no documents to write; look at the source and filters")
        shards = parts.finish()
    except BaseException:
        parts.abandon()
        raise
    index = np.frombuffer(rows, np.int32).reshape(-1, len(COLUMNS))
    np.save(folder / INDEX, index)
    meta = _meta(index, count, layout, digest, shards, notes)
    meta["index_sha256"] = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    partial = folder / (META + ".partial")
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(partial, folder / META)
    return meta


def open_records(folder: str | os.PathLike) -> "Records":
    """A finished folder, as a sequence of Documents; raises RecordsError when it is not whole."""
    return Records(Path(folder))


class Records(Sequence):
    """Random access to a folder's documents. `index[column]`: int32 [documents], see COLUMNS."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = _read_meta(folder)
        self.layout = _layout(self.meta, folder)
        self.fingerprint: str = self.meta["sha256"]
        self.index = _read_index(folder, self.meta)
        self._starts = np.cumsum([0] + [s["documents"] for s in self.meta["shards"]])
        self._readers: dict[int, Any] = {}
        for shard in self.meta["shards"]:
            _check_shard(folder, shard)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Document:
        return self.read([i])[0]

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self), 256):  # records a read
            yield from self.read(range(start, min(start + 256, len(self))))

    def read(self, indices: Iterable[int]) -> list[Document]:
        """Documents by number, in the given order; one read per shard touched."""
        wanted = np.asarray(list(indices), np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"document {wanted} of {len(self)} in {self.folder}")
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        found: dict[int, Document] = {}
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            local = (wanted[places] - self._starts[shard]).tolist()
            for place, document in zip(places, self._read_shard(int(shard), local), strict=True):
                found[int(place)] = document
        return [found[i] for i in range(len(wanted))]

    def scored_counts(self, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """(text, image) tokens that `mode` scores, per document."""
        image = self.index[f"{mode}_image"]
        return self.index[mode] - image, image

    def _read_shard(self, shard: int, local: list[int]) -> list[Document]:
        path = self.folder / self.meta["shards"][shard]["file"]
        try:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path))
            raw = self._readers[shard].read(local)
            if len(raw) != len(local):
                raise ValueError(f"{len(raw)} of {len(local)} records")
        except (RuntimeError, ValueError) as error:
            raise RecordsError(
                f"{path}: damaged ({error}); make the data set again from its source"
            ) from error
        documents = [from_bytes(r, f"{path}, record {n}") for n, r in zip(local, raw, strict=True)]
        for document in documents:
            check_document(document, self.layout)
        return documents


class _Counter:
    """Documents by task, source and credential, and how many groups."""

    def __init__(self):
        self.by = {name: collections.Counter() for name in ("task", "source", "credential")}
        self.groups: set[str] = set()

    def add(self, document: Document) -> None:
        for name, counter in self.by.items():
            counter[getattr(document, name)] += 1
        self.groups.add(document.group)


class _Parts:
    """Shards being written under temporary names; `finish` gives them their own."""

    def __init__(self, folder: Path, shard_size: int):
        if shard_size < 1:
            raise RecordsError(f"shard_size is {shard_size}; need at least 1 document a shard")
        self.folder, self.shard_size = folder, shard_size
        self.documents: list[int] = []
        self._writer: Any = None

    def add(self, record: bytes) -> None:
        if self._writer is None or self.documents[-1] == self.shard_size:
            self._close()
            path = str(self._path(len(self.documents)))
            self._writer = array_record_module.ArrayRecordWriter(path, _OPTIONS)
            self.documents.append(0)
        self._writer.write(record)
        self.documents[-1] += 1

    def finish(self) -> list[dict[str, Any]]:
        self._close()
        shards = []
        for n, documents in enumerate(self.documents):
            path = self.folder / f"{n:05d}-of-{len(self.documents):05d}.array_record"
            os.replace(self._path(n), path)
            shards.append(dict(file=path.name, documents=documents, bytes=path.stat().st_size))
        return shards

    def abandon(self) -> None:
        self._close()
        for n in range(len(self.documents)):
            self._path(n).unlink(missing_ok=True)

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:05d}.partial"

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _new_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if (folder / META).exists():
        raise RecordsError(
            f"{folder}: already holds a finished data set; remove it or name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in [*folder.glob("*.partial"), *folder.glob("*.array_record")]:
            left.unlink()  # of a run that was killed
        (folder / "0.partial").write_bytes(b"")
        (folder / "0.partial").unlink()
    except OSError as error:
        raise RecordsError(
            f"{folder}: cannot be written ({error.strerror}); name a folder that can"
        ) from error
    return folder


def _meta(index, count, layout, digest, shards, notes) -> dict[str, Any]:
    total = dict(zip(COLUMNS, index.astype(np.int64).sum(0).tolist(), strict=True))
    return dict(
        format=FORMAT,
        documents=len(index),
        groups=len(count.groups),
        tokens=total["length"],
        text_tokens=total["length"] - total["image"],
        image_tokens=total["image"],
        longest=int(index[:, 0].max()),
        scored={m: total[m] for m in ("answers", "release")},
        tasks=dict(sorted(count.by["task"].items())),
        sources=dict(sorted(count.by["source"].items())),
        credentials=dict(sorted(count.by["credential"].items())),
        layout=dataclasses.asdict(layout),
        sha256=digest.hexdigest(),
        shards=shards,
        notes=notes,
    )


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RecordsError(f"{folder}: no such folder; make it: python -m data.prepare --help")
    try:
        meta = json.loads((folder / META).read_text())
    except FileNotFoundError as error:
        raise RecordsError(
            f"{folder}: no {META}, so it was never finished; run its data.prepare command again"
        ) from error
    except ValueError as error:
        raise RecordsError(
            f"{folder / META}: damaged ({error}); make the data set again"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise RecordsError(f"{folder / META}: not of format {FORMAT}; make the data set again")
    return meta


def _layout(meta: dict[str, Any], folder: Path) -> Layout:
    try:
        return build(Layout, meta["layout"])
    except (ConfigError, KeyError) as error:
        raise RecordsError(f"{folder / META}: no usable layout ({error})") from error


def _read_index(folder: Path, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    path = folder / INDEX
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != meta["index_sha256"]:
        raise RecordsError(f"{path}: missing or damaged; make the data set again")
    table = np.load(path, allow_pickle=False)
    return dict(zip(COLUMNS, table.T.copy(), strict=True))


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / shard["file"]
    size = path.stat().st_size if path.exists() else 0
    if size != shard["bytes"]:
        raise RecordsError(
            f"{path}: {size} bytes, but {shard['bytes']} were written: cut off or copied in part; "
            "copy it again or make the data set again"
        )
