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


def scan(found: Records, tell: ReportFinding, see: Callable[[Document, int], None]) -> Columns:
    """Read every record; report problems, and call `see` on each valid document."""
    each = {name: array("Q") for name in ("document", "path", "sha", "name")}
    codes, owner = array("Q"), array("i")
    digest, wrong, number = hashlib.sha256(), 0, 0
    progress, labels = (
        ItemProgress(len(found), "documents", log.info, every=LOG_SECONDS),
        _Labels(found),
    )
    for raw in _raw(found, tell):
        if raw is not None:
            digest.update(raw)
        document = None if raw is None else _whole(raw, found, number, tell)
        if document is None:
            for column in each.values():
                column.append(0)
        else:
            row = _names(document)
            for column, value in zip(each.values(), row, strict=True):
                column.append(value)
            for one in sorted(
                {near_duplicates.hash64(c.tobytes()) for c in images_of(document, found)}
            ):
                codes.append(one)
                owner.append(number)
            wrong += not labels.agree(document, number, row[1])
            see(document, number)
        number += 1
        progress.tick("read", 1)
    if digest.hexdigest() != found.fingerprint:
        tell("written", "all documents", "not the documents that were written; make it again")
    if wrong:
        tell("written", "index.npy", f"{wrong} documents have other counts or names than it says")
    table = {name: np.frombuffer(column, np.uint64) for name, column in each.items()}
    return Columns(**table, codes=_array(codes, np.uint64), owner=_array(owner, np.int32))


def images_of(document: Document, found: Records) -> list[Int[np.ndarray, "K"]]:
    """Return the codes of each image, uint16 in raster order, of a valid document."""
    t, n = document.tokens, found.layout.codes_per_image
    return [(t[b + 1 : b + 1 + n] - IMAGE_START).astype("<u2") for b in np.flatnonzero(t == BOI)]


def shard_of(found: Records, document: int) -> tuple[str, int]:
    """Return (file, record in it) of a document's number."""
    ends = np.cumsum([shard["documents"] for shard in found.meta["shards"]])
    shard = int(np.searchsorted(ends, document, side="right"))
    facts = found.meta["shards"][shard]
    return facts["file"], document - int(ends[shard]) + facts["documents"]


class _Labels:
    """Checks whether the index agrees with the documents."""

    def __init__(self, found: Records):
        self._found = found
        self._names = {label: found.names(label) for label in ("source", "task")}
        self._path = np.zeros(int(found.index["picture"].max(initial=-1)) + 1, np.uint64)

    def agree(self, document: Document, number: int, path: int) -> bool:
        """Check counts, source, task, and that one path has one image number."""
        index = self._found.index
        row = writer.token_counts(document, self._found.layout.vocab)
        if row != [int(index[name][number]) for name in COLUMNS]:
            return False
        for label, names in self._names.items():
            if names[index[label][number]] != getattr(document, label):
                return False
        picture = int(index["picture"][number])
        if picture < 0 or not path:
            return picture < 0 and not path
        known, self._path[picture] = int(self._path[picture]), path
        return known in (0, path)


def _names(document: Document) -> tuple[int, int, int, int]:
    path, sha = document.image_path, document.image_sha256
    return (
        near_duplicates.hash64(document.tokens.tobytes()),
        near_duplicates.hash64(path.encode()) if path else 0,
        near_duplicates.hash64(sha) if sha else 0,
        near_duplicates.hash64(document.id.encode()),
    )


def _raw(found: Records, tell: ReportFinding) -> Iterator[bytes | None]:
    """Yield the bytes of each record in order; None for one that cannot be read."""
    for shard, facts in enumerate(found.meta["shards"]):
        for start in range(0, facts["documents"], READ):
            local = list(range(start, min(start + READ, facts["documents"])))
            try:
                yield from found.raw(shard, local)
            except RecordsError:
                yield from _one_by_one(found, shard, local, tell)


def _one_by_one(
    found: Records, shard: int, local: list[int], tell: ReportFinding
) -> Iterator[bytes | None]:
    for record in local:
        try:
            raw = found.raw(shard, [record])[0]
        except RecordsError:
            file = found.meta["shards"][shard]["file"]
            tell("damage", f"{file}, record {record}", "cannot be read; make the data set again")
            raw = None
        yield raw


def _whole(raw: bytes, found: Records, number: int, tell: ReportFinding) -> Document | None:
    """Return the document, or None if it is invalid, which is reported without its text."""
    file, record = shard_of(found, number)
    where = f"document {number}, {file}, record {record}"
    try:
        document = from_bytes(raw, "it")
    except RecordsError as error:
        tell("damage", where, str(error).removeprefix("it: "))
        return None
    except (ValueError, KeyError, TypeError):  # complete, but not written by to_bytes
        tell("schema", where, "fields of another format; make the data set again")
        return None
    try:
        _check_fields(document)
        check_document(document, found.layout)
    except RecordsError as error:
        name = f"document {document.id!r} of {document.source!r}: "  # an id may be credentialed
        tell(error.kind, where, str(error).removeprefix(name))
        return None
    return document


def _check_fields(document: Document) -> None:
    """Raise RecordsError unless the texts of a document follow the schema."""

    def rule(holds: bool, text: str) -> None:
        if not holds:
            raise RecordsError(text, "schema")

    for name in ("task", "source", "credential", "id"):
        value = getattr(document, name)
        rule(isinstance(value, str) and value != "", f"{name} is no text, or empty")
    rule(document.credential.lower() in ("yes", "no"), "credential is neither yes nor no")
    turns, sha = document.turns, document.image_sha256
    rule(isinstance(turns, int) and turns >= 0, "turns is no number of 0 or more; 0 is unknown")
    rule(bool(re.fullmatch("([0-9a-f]{64})?", sha)), "image_sha256 is no SHA-256, nor empty")


def _array(column: array, kind: type) -> np.ndarray:
    return np.frombuffer(column, kind) if column else np.zeros(0, kind)
