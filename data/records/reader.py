"""Read a folder of records in any order and detect corruption; writer.py writes one.

    folder/00000-of-00003.array_record   one document per record, see document.py
    folder/index.npy                     int32 [documents, COLUMNS and LABELS]: counts, and names
                                         by number; then PSEUDO, if any document is one
    folder/dataset.json                  counts, vocabulary, image size, fingerprints; written last

A folder without dataset.json is not finished. ArrayRecord reads a truncated shard as empty records
without an error, so sizes are checked when a folder opens and every record carries its own CRC.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from medmax_jax.config import VIEWS, ConfigError, build
from medmax_jax.data.records.document import (
    COLUMNS,
    LABELS,
    PSEUDO,
    Document,
    Layout,
    RecordsError,
    check_document,
    from_bytes,
)
from medmax_jax.data.records.staging import INDEX, META, stage_to_disk
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError, read_json

FORMAT = 2


def open_records(folder: str | os.PathLike) -> "Records":
    """Open a finished folder as a sequence of Documents; raise RecordsError if it is incomplete.

    A folder on gs:// is copied to this host first (staging.py), which may raise a StorageError.
    """
    return Records(stage_to_disk(folder))


class Records(Sequence):
    """Random access to a folder's documents. `index[column]`: int32 [documents].

    The columns are COLUMNS, LABELS and PSEUDO, which is 0 in a folder without such documents.
    """

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
        for start in range(0, len(self), 256):  # records per read
            yield from self.read(range(start, min(start + 256, len(self))))

    def read(self, indices: Iterable[int]) -> list[Document]:
        """Return documents by number, in the given order, with one read per shard touched."""
        numbers = np.asarray(list(indices), np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"document {numbers} of {len(self)} in {self.folder}")
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        documents: dict[int, Document] = {}
        for shard in np.unique(shard_of):
            positions = np.flatnonzero(shard_of == shard)
            local = (numbers[positions] - self._starts[shard]).tolist()
            for n, document in zip(positions, self._read_shard(int(shard), local), strict=True):
                documents[int(n)] = document
        return [documents[i] for i in range(len(numbers))]

    def names(self, label: str) -> list[str]:
        """Return the names that the numbers of index["source"] or index["task"] refer to."""
        return sorted(self.meta[f"{label}s"])

    def _read_shard(self, shard: int, local: list[int]) -> list[Document]:
        path = self.folder / self.meta["shards"][shard]["file"]
        raw = self.raw(shard, local)
        documents = [from_bytes(r, f"{path}, record {n}") for n, r in zip(local, raw, strict=True)]
        for document in documents:
            check_document(document, self.layout)
        return documents

    def raw(self, shard: int, local: list[int]) -> list[bytes]:
        """Return the unparsed bytes of some records of a shard; raise RecordsError if corrupt."""
        path = self.folder / self.meta["shards"][shard]["file"]
        try:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path))
            raw = self._readers[shard].read(local)
            if len(raw) != len(local):
                raise ValueError(f"{len(raw)} of {len(local)} records")
        except (RuntimeError, ValueError) as error:
            raise RecordsError(
                f"{path}: damaged ({error}); build the data set again from its source"
            ) from error
        return raw


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise RecordsError(
            f"{folder}: no such folder; create it, see python -m data.prepare --help"
        )
    if not (folder / META).exists():
        raise RecordsError(
            f"{folder}: no {META}, so it was never finished; run its data.prepare command again"
        )
    try:
        meta = read_json(folder / META)
    except TextFileError as error:
        raise RecordsError(f"{error}: damaged; build the data set again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise RecordsError(f"{folder / META}: not of format {FORMAT}; build the data set again")
    if wrong := _wrong_field(meta):
        raise RecordsError(
            f"{folder / META}: field {wrong} is missing or invalid: damaged; build the data set "
            "again"
        )
    return meta


def _wrong_field(meta: dict[str, Any]) -> str:
    """Return the first required field that is not of its type; "" if all are valid."""
    types = dict(sha256=str, index_sha256=str, shards=list, documents=int, tokens=int, notes=dict)
    types |= dict.fromkeys(("sources", "tasks", "credentials"), dict)
    for name, expected in types.items():
        if type(meta.get(name)) is not expected:
            return name
    pseudo = meta.get(PSEUDO, 1)  # left out if there are none
    if type(pseudo) is not int or not 0 < pseudo <= max(meta["documents"], 1):
        return PSEUDO
    for number, shard in enumerate(meta["shards"]):
        shard_types = dict(file=str, documents=int, bytes=int)
        if not isinstance(shard, dict):
            return f"shards[{number}]"
        for name, expected in shard_types.items():
            if type(shard.get(name)) is not expected or expected is int and shard[name] < 0:
                return f"shards[{number}].{name}"
        if Path(shard["file"]).name != shard["file"] or not shard["file"].isprintable():
            return f"shards[{number}].file"
    return ""


def _layout(meta: dict[str, Any], folder: Path) -> Layout:
    try:
        layout = build(Layout, meta["layout"])
        for name in ("view", "answer_view"):
            if (view := getattr(layout, name)) not in VIEWS:
                raise ConfigError(f"{name} is {view!r}, not one of {', '.join(VIEWS)}")
        return layout
    except (ConfigError, KeyError) as error:
        raise RecordsError(
            f"{folder / META}: field layout is missing or invalid ({printable(error)}); build the "
            "data set again"
        ) from error


def _read_index(folder: Path, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    path, digest = folder / INDEX, ""
    if path.exists():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != meta["index_sha256"]:
        raise RecordsError(f"{path}: missing or damaged; build the data set again")
    table = np.load(path, mmap_mode="r", allow_pickle=False)  # unused columns stay on disk
    names = (*COLUMNS, *LABELS, *([PSEUDO] if PSEUDO in meta else []))
    if table.shape != (sum(s["documents"] for s in meta["shards"]), len(names)):
        raise RecordsError(
            f"{path}: shape is {table.shape}, which does not match {META}; build the data set again"
        )
    index = {n: np.asarray(c) for n, c in zip(names, table.T, strict=True)}
    index.setdefault(PSEUDO, np.broadcast_to(np.int32(0), len(table)))  # takes no memory
    if int(index[PSEUDO].sum()) != meta.get(PSEUDO, 0):
        raise RecordsError(
            f"{path}: {index[PSEUDO].sum()} documents are pseudo, but {META} states "
            f"{meta.get(PSEUDO, 0)}; build the data set again"
        )
    return index


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / shard["file"]
    size = path.stat().st_size if path.exists() else 0
    if size != shard["bytes"]:
        raise RecordsError(
            f"{path}: size is {size} bytes, but {shard['bytes']} were written: cut off or copied "
            "in part; copy it again or build the data set again"
        )
