"""Write documents to a folder: shards, an index of counts and names, and a description of both.

reader.py, which opens such a folder, documents its layout.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int

from medmax_jax.config import Vocab
from medmax_jax.data.records.document import (
    COLUMNS,
    HEAD,
    LABELS,
    MAGIC,
    PSEUDO,
    Document,
    Layout,
    RecordsError,
    check_document,
    loss_mask,
)
from medmax_jax.data.records.reader import FORMAT, Records, open_records
from medmax_jax.data.records.staging import INDEX, META
from medmax_jax.endpoints import egress
from medmax_jax.models.vocab import is_image
from medmax_jax.storage.atomic_folder import private_folder
from medmax_jax.storage.folder import file_sha256

__all__ = [
    "LabelColumns",
    "Records",
    "token_counts",
    "has_credentialed",
    "open_records",
    "to_bytes",
    "write",
]
_UNWRITTEN = dict(
    image_sha256="", view="released", answer_view="released", pseudo=False, generator="", scores={}
)
_OPTIONS = "group_size:1,zstd:3"  # group_size 1: the only one with fast random access


def write(
    folder: str | os.PathLike,
    documents: Iterable[Document],
    *,
    shard_size: int,
    layout: Layout,
    notes: dict[str, Any],
) -> dict[str, Any]:
    """Write a folder of records and return its dataset.json, which contains `notes` as given.

    The folder is written atomically: shards have a temporary name until the last document is
    written, and dataset.json comes last. From the first credentialed document on, before any of its
    bytes is written, only the owner can access the folder and its files (0700, 0600).
    """
    with contextlib.ExitStack() as modes:
        return _write(_new_folder(folder), documents, shard_size, layout, notes, modes)


def _write(
    folder: Path,
    documents: Iterable[Document],
    shard_size: int,
    layout: Layout,
    notes: dict[str, Any],
    modes: contextlib.ExitStack,
) -> dict[str, Any]:
    count, labels, rows = _Counter(), LabelColumns(), array("i")
    digest, ids = hashlib.sha256(), set()
    shard_writer, secret = _ShardWriter(folder, shard_size), False
    try:
        for number, document in enumerate(documents):
            label = ""
            if egress.is_credentialed(document.credential):
                label = f"document {number}"  # its id must not be repeated
                if not secret:
                    modes.enter_context(_owner_only(folder))
                    secret = True
            check_document(document, layout, name=label)
            if document.id in ids:
                raise RecordsError(
                    f"{label or f'document id {document.id!r}'} occurs twice; ids must be unique"
                )
            ids.add(document.id)
            record = to_bytes(document)
            digest.update(record)
            shard_writer.add(record)
            rows.extend(token_counts(document, layout.vocab))
            labels.add(document.source, document.task, document.image_path)
            count.add(document)
        if not rows:
            raise RecordsError(f"{folder}: no documents to write; check the source and the filters")
        shards = shard_writer.finish()
    except BaseException:
        shard_writer.discard()
        raise
    table = np.frombuffer(rows, np.int32).reshape(-1, len(COLUMNS))
    index = np.concatenate([table, labels.table()], axis=1)
    if any(count.pseudo):
        index = np.column_stack([index, np.frombuffer(count.pseudo, np.int8).astype(np.int32)])
    np.save(folder / INDEX, np.asfortranarray(index))  # stored by column, as it is read
    meta = _meta(index, count, layout, digest, shards, notes)
    meta["index_sha256"] = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    partial = folder / (META + ".partial")
    partial.write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(partial, folder / META)
    return meta


@contextlib.contextmanager
def _owner_only(folder: Path) -> Iterator[None]:
    """Restrict the folder and its shards of open documents to the owner; new files are private."""
    with private_folder(folder):
        for path in folder.iterdir():
            if path.is_file() and not path.is_symlink():
                path.chmod(0o600)
        yield


def token_counts(document: Document, vocab: Vocab) -> list[int]:
    """Return the document's counts in the order of COLUMNS."""
    t, image = document.tokens, is_image(document.tokens, vocab)
    row = [len(t), int(image.sum())]
    for mode in ("answers", "release"):
        mask = loss_mask(t, mode, document.turns)
        row += [int(mask.sum()), int((mask & image).sum())]
    return row


def to_bytes(document: Document) -> bytes:
    """Return one self-describing record: magic, CRC-32, JSON header, token ids (see `from_bytes`).

    Fields that have their default are left out, so that records written before the fields existed
    keep the same bytes, and the folder keeps its fingerprint.
    """
    dtype = "<u2" if document.tokens.max() < 2**16 else "<i4"
    fields = {f.name: getattr(document, f.name) for f in dataclasses.fields(document)}
    for name, value in _UNWRITTEN.items():
        if fields[name] == value:
            del fields[name]
    header = json.dumps(fields | {"tokens": dtype}, ensure_ascii=False).encode()
    body = header + document.tokens.astype(dtype).tobytes()
    size = struct.pack("<I", len(header))
    return HEAD.pack(MAGIC, zlib.crc32(size + body), len(header)) + body


def has_credentialed(records: Records) -> bool:
    """Return whether any document is credentialed; such a folder is shown only on request."""
    return any(map(egress.is_credentialed, records.meta["credentials"]))


class LabelColumns:
    """Stores source, task and image of each document as indices into the sorted list of all names.

    A document without an image has -1; the images of the others begin at 0.
        ("B", "VQA", "x.png"), ("A", "VQA", "")   ->   [1 0 0], [0 0 -1]
    """

    def __init__(self):
        self._indices: list[dict[str, int]] = [{} for _ in LABELS]  # name -> its first index
        self._columns = array("i")  # in that order, 4 bytes per label, because there are millions

    def add(self, source: str, task: str, image_path: str) -> None:
        for indices, name in zip(self._indices, (source, task, image_path), strict=True):
            self._columns.append(indices.setdefault(name, len(indices)))

    def table(self) -> Int[np.ndarray, "n 3"]:
        """Return the table of all documents that were added."""
        table = np.array(self._columns, np.int32).reshape(-1, len(LABELS))
        for column, indices in zip(table.T, self._indices, strict=True):
            rank = {name: n for n, name in enumerate(sorted(indices))}
            column[:] = np.array([rank[name] for name in indices], np.int32)[column]
        table[:, 2] -= "" in self._indices[2]
        return table


class _Counter:
    """Counts documents by task, source and credential, and groups; `pseudo`: of each document."""

    def __init__(self):
        self.by = {name: collections.Counter() for name in ("task", "source", "credential")}
        self.groups: set[str] = set()
        self.pseudo = array("b")

    def add(self, document: Document) -> None:
        for name, counter in self.by.items():
            counter[getattr(document, name)] += 1
        self.groups.add(document.group)
        self.pseudo.append(document.pseudo)


class _ShardWriter:
    """Writes shards under temporary names; `finish` gives them their final names."""

    def __init__(self, folder: Path, shard_size: int):
        if shard_size < 1:
            raise RecordsError(f"shard_size is {shard_size}; it must be at least 1 document")
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
            size, digest = path.stat().st_size, file_sha256(path)
            fields = dict(documents=documents, bytes=size, sha256=digest)
            shards.append(dict(file=path.name) | fields)
        return shards

    def discard(self) -> None:
        self._close()
        for n in range(len(self.documents)):
            self._path(n).unlink(missing_ok=True)

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:05d}.partial"

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except RuntimeError as error:  # ArrayRecord reports a full disk here, not when it writes
            raise RecordsError(
                f"{self.folder}: cannot be written ({error}); free disk space, or use another "
                "folder"
            ) from error


def _new_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if (folder / META).exists():
        raise RecordsError(
            f"{folder}: already contains a finished data set; delete it or use another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob("*.partial"), *folder.glob("*.array_record")]:
            leftover.unlink()  # left by a run that was killed
        (folder / "0.partial").write_bytes(b"")
        (folder / "0.partial").unlink()
    except OSError as error:
        raise RecordsError(
            f"{folder}: cannot be written ({error.strerror}); use a folder that you may write to"
        ) from error
    return folder


def _meta(index, count, layout, digest, shards, notes) -> dict[str, Any]:
    sums = index[:, : len(COLUMNS)].astype(np.int64).sum(0)  # not LABELS
    total = dict(zip(COLUMNS, sums.tolist(), strict=True))
    pseudo = {PSEUDO: sum(count.pseudo)} if any(count.pseudo) else {}
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
        **pseudo,
        layout=dataclasses.asdict(layout),
        sha256=digest.hexdigest(),
        shards=shards,
        notes=notes,
    )
