"""Scan records once: problems of each document, and hashes that reveal equality, as columns.

    columns   document  path  sha  id    codes  owner        8 bytes each, owner 4: 44 bytes for a
              ------------------------   ------------        document with one image
              one per document           one per image

Columns hold 64 bits of SHA-256; 0 means unknown or absent. A document that is invalid is reported
and has 0 in the columns, so any document compared later can be read.
"""

import dataclasses
import hashlib
import re
from array import array
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int, UInt64

from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.image_tokens.encoder import LOG_SECONDS, log
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import (
    COLUMNS,
    PSEUDO,
    Document,
    RecordsError,
    check_document,
    from_bytes,
)
from medmax_jax.data.records.reader import Records
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models.vocab import BOI, IMAGE_START

READ = 256  # records at once
ReportFinding = Callable[[str, str, str], None]  # kind, where, what


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """Hashes of the documents and images of a folder, by number of the document."""

    document: UInt64[np.ndarray, "n"]  # its tokens
    path: UInt64[np.ndarray, "n"]  # its image_path
    sha: UInt64[np.ndarray, "n"]  # bytes of its image file
    name: UInt64[np.ndarray, "n"]  # its id
    codes: UInt64[np.ndarray, "m"]
    owner: Int[np.ndarray, "m"]  # the document that contains an image


def scan(
    records: Records, report: ReportFinding, visit: Callable[[Document, int], None]
) -> Columns:
    """Read every record; report problems, and call `visit` on each valid document."""
    columns = {name: array("Q") for name in ("document", "path", "sha", "name")}
    codes, owner = array("Q"), array("i")
    digest, wrong, number = hashlib.sha256(), 0, 0
    progress = ItemProgress(len(records), "documents", log.info, every=LOG_SECONDS)
    labels = _Labels(records)
    for raw in _raw_records(records, report):
        if raw is not None:
            digest.update(raw)
        document = None if raw is None else _valid_document(raw, records, number, report)
        if document is None:
            for column in columns.values():
                column.append(0)
        else:
            row = _names(document)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            images = images_of(document, records)
            for name in sorted({near_duplicates.hash64(image.tobytes()) for image in images}):
                codes.append(name)
                owner.append(number)
            wrong += not labels.agree(document, number, row[1])
            visit(document, number)
        number += 1
        progress.tick("read", 1)
    if digest.hexdigest() != records.fingerprint:
        what = "SHA-256 is not that of the documents that were written; build the data set again"
        report("written", "all documents", what)
    if wrong:
        what = f"the counts or names of {wrong} documents differ from the index"
        report("written", "index.npy", what)
    table = {name: np.frombuffer(column, np.uint64) for name, column in columns.items()}
    return Columns(**table, codes=_array(codes, np.uint64), owner=_array(owner, np.int32))


def images_of(document: Document, records: Records) -> list[Int[np.ndarray, "K"]]:
    """Return the codes of each image, uint16 in raster order, of a valid document."""
    t, n = document.tokens, records.layout.codes_per_image
    return [(t[b + 1 : b + 1 + n] - IMAGE_START).astype("<u2") for b in np.flatnonzero(t == BOI)]


def shard_of(records: Records, document: int) -> tuple[str, int]:
    """Return (file, record in it) of a document's number."""
    ends = np.cumsum([shard["documents"] for shard in records.meta["shards"]])
    shard = int(np.searchsorted(ends, document, side="right"))
    facts = records.meta["shards"][shard]
    return facts["file"], document - int(ends[shard]) + facts["documents"]


class _Labels:
    """Checks whether the index agrees with the documents."""

    def __init__(self, records: Records):
        self._records = records
        self._names = {label: records.names(label) for label in ("source", "task")}
        self._path = np.zeros(int(records.index["image_path"].max(initial=-1)) + 1, np.uint64)

    def agree(self, document: Document, number: int, path: int) -> bool:
        """Check counts, source, task, and that one path has one image number."""
        index = self._records.index
        row = writer.token_counts(document, self._records.layout.vocab)
        if row != [int(index[name][number]) for name in COLUMNS]:
            return False
        if int(index[PSEUDO][number]) != document.pseudo:
            return False
        for label, names in self._names.items():
            if names[index[label][number]] != getattr(document, label):
                return False
        image = int(index["image_path"][number])
        if image < 0 or not path:
            return image < 0 and not path
        previous, self._path[image] = int(self._path[image]), path
        return previous in (0, path)


def _names(document: Document) -> tuple[int, int, int, int]:
    path, sha = document.image_path, document.image_sha256
    return (
        near_duplicates.hash64(document.tokens.tobytes()),
        near_duplicates.hash64(path.encode()) if path else 0,
        near_duplicates.hash64(sha) if sha else 0,
        near_duplicates.hash64(document.id.encode()),
    )


def _raw_records(records: Records, report: ReportFinding) -> Iterator[bytes | None]:
    """Yield the bytes of each record in order; None for one that cannot be read."""
    for shard, facts in enumerate(records.meta["shards"]):
        for start in range(0, facts["documents"], READ):
            local = list(range(start, min(start + READ, facts["documents"])))
            try:
                yield from records.raw(shard, local)
            except RecordsError:
                yield from _one_by_one(records, shard, local, report)


def _one_by_one(
    records: Records, shard: int, local: list[int], report: ReportFinding
) -> Iterator[bytes | None]:
    for record in local:
        try:
            raw = records.raw(shard, [record])[0]
        except RecordsError:
            file = records.meta["shards"][shard]["file"]
            report("damage", f"{file}, record {record}", "cannot be read; build the data set again")
            raw = None
        yield raw


def _valid_document(
    raw: bytes, records: Records, number: int, report: ReportFinding
) -> Document | None:
    """Return the document, or None if it is invalid, which is reported without its text."""
    file, record = shard_of(records, number)
    where = f"document {number}, {file}, record {record}"
    try:
        document = from_bytes(raw, "it")
    except RecordsError as error:
        report("damage", where, str(error).removeprefix("it: "))
        return None
    except (ValueError, KeyError, TypeError):  # complete, but not written by to_bytes
        report("schema", where, "fields of another format; build the data set again")
        return None
    try:
        _check_fields(document)
        check_document(document, records.layout)
    except RecordsError as error:
        name = f"document {document.id!r} of {document.source!r}: "  # an id may be credentialed
        report(error.kind, where, str(error).removeprefix(name))
        return None
    return document


def _check_fields(document: Document) -> None:
    """Raise RecordsError unless the texts of a document follow the schema."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            raise RecordsError(text, "schema")

    for name in ("task", "source", "credential", "id"):
        value = getattr(document, name)
        require(isinstance(value, str) and value != "", f"{name} is empty or not text")
    require(document.credential.lower() in ("yes", "no"), "credential is neither yes nor no")
    turns, sha = document.turns, document.image_sha256
    require(isinstance(turns, int) and turns >= 0, "turns is not an integer of 0 (unknown) or more")
    require(bool(re.fullmatch("([0-9a-f]{64})?", sha)), "image_sha256 is neither SHA-256 nor empty")


def _array(column: array, kind: type) -> np.ndarray:
    return np.frombuffer(column, kind) if column else np.zeros(0, kind)
