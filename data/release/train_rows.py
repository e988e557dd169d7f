"""Convert the published train.jsonl and validation.jsonl to folders of records, in one stream.

    {"text", "tokens", "image_path", "task", "source", "credential"}  ->  Document

    OUT/                credential no; with quarantine.jsonl: line number and reason of other rows
    OUT-credentialed/   credential yes, if the row has tokens: mode 0700, its files 0600

No row is repaired and none is guessed. Credentialed rows are published without tokens and
image_path: such a row is pending, counted and listed, until a user with access to its image makes
its tokens. An invalid row is quarantined, and more than the share `max_bad` of those stop the work.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from medmax_jax.data.records import staging, writer
from medmax_jax.data.records.document import Document, Layout, RecordsError, check_document
from medmax_jax.io import text_files
from medmax_jax.io.progress import ByteProgress
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError, document_ids, split_segments
from medmax_jax.models.vocab import BOS, EOS, IMAGE, PAD, SEP
from medmax_jax.storage import hub
from medmax_jax.storage.atomic_folder import atomic_folder, private_umask
from medmax_jax.storage.folder import Folder, StorageError, check_name

QUARANTINE = "quarantine.jsonl"
MAX_LINE = 4 << 20  # bytes; a row of 4,096 tokens, the model's context, has about 30 kB
MAX_FIELD = 1_024  # characters of task, source, credential and image_path
MAX_BAD = 0.01  # of the rows
SURE = 1_000  # rows before the share of bad ones is representative of the complete file
WAITING = "credentialed: no tokens"
# to_document checks the content of each column, at less cost than for all values of a row.
AS_PUBLISHED = dict(allow_nonfinite=True, allow_lone_surrogates=True, check_integers=False)


class PublishedError(ValueError):
    """Published files that cannot be used; the message names the file, the reason and the fix."""


class BadRow(ValueError):
    """The reason why one row becomes no document; without its text, which may be credentialed."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowRules:
    """The requirements of a row. `tokenizer`: None, or text and tokens are compared with it."""

    layout: Layout
    separator: bool  # a row without SEP is rejected: nothing in it would be masked
    max_bad: float
    shard_size: int
    tokenizer: Tokenizer | None


def import_rows(
    path: str | Path, out: str | Path, *, rules: RowRules, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write OUT, and OUT-credentialed if such rows have tokens; return the counts.

    Both are written atomically. Memory holds one row, and for all rows what writer.write holds.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    private = out.with_name(out.name + "-credentialed")
    with _opened(path) as file, tempfile.TemporaryFile("w+") as listed:
        rows = _RowReader(file, path, rules, listed, say)
        _check_vacant(out, private, rows.notes)
        documents = rows.documents()
        first = next(documents, None)
        if first is None:
            if not rows.private_lines:
                raise PublishedError(
                    f"{path}: no row becomes a document: {_format_counts(rows.reasons)}"
                )
            _write_credentialed(private, rows)
        else:
            with atomic_folder(out, bytes_needed=rows.size // 3, seal=staging.META) as folder:
                _write(folder, itertools.chain([first], documents), rows, rows.notes)
                if rows.private_lines:
                    _write_credentialed(private, rows)
    folders = [str(f) for f, n in ((out, rows.open), (private, len(rows.private_lines))) if n]
    return dict(folders=folders, documents=rows.open) | rows.summary()


def to_document(row: dict[str, Any], name: str, rules: RowRules) -> Document | None:
    """Return the document of a row, None for a credentialed row without tokens; raise BadRow."""
    text = {key: _text(row, key) for key in ("text", "task", "source", "credential")}
    credential = text["credential"].lower()  # the card writes yes and no, the README YES and NO
    if credential not in ("yes", "no"):
        value = repr(credential) if len(credential) < 10 else "longer"  # it may be a report's text
        raise BadRow("credential", f"is {value}; expected yes or no")
    image = _image_path(row)
    if row.get("tokens") is None:
        if credential == "yes":
            return None
        raise BadRow("tokens missing", "though the row is not credentialed")
    tokens = _tokens(row["tokens"], rules)
    document = Document(
        tokens=tokens,
        image_path=image,
        task=text["task"],
        source=text["source"],
        credential=credential,
        turns=0,
        group=image.rpartition("/")[2] or name,  # without an image a row is a group of its own
        id=name,
    )
    try:
        check_document(document, rules.layout)
    except RecordsError as error:  # ends and control tokens are checked, so it is an image
        raise BadRow("image span", str(error).rpartition(": ")[2]) from error
    return document


def read_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; raise BadRow."""
    if len(line) > MAX_LINE:
        raise BadRow("line too long", f"more than {MAX_LINE} bytes")
    try:
        return text_files.parse_object(line, "row", **AS_PUBLISHED)
    except TextFileError as error:
        if error.reason == text_files.KEY_TWICE:
            raise BadRow("column twice", "a row must have each column once") from error
        if error.reason == text_files.NOT_OBJECT:
            raise BadRow("not JSON", "not an object with the six columns") from error
        if error.reason == text_files.TOO_DEEP:
            raise BadRow("not JSON", error.reason) from error
        cause = error.__cause__
        position = getattr(cause, "pos", getattr(cause, "start", None))
        if position is None:  # an integer of thousands of digits
            raise BadRow("not JSON", "a number has too many digits") from error
        raise BadRow("not JSON", f"at byte or character {position}") from error


def bounded_lines(
    file: IO[bytes], observe: Callable[[bytes], None]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (bytes before it, bytes of it, line); of a line that is too long only the beginning.

    `observe` receives every byte.
    """
    offset = 0
    while line := file.readline(MAX_LINE + 1):
        size, last = len(line), line
        observe(line)
        while not last.endswith(b"\n") and (last := file.readline(MAX_LINE)):
            size += len(last)
            observe(last)
        yield offset, size, line
        offset += size


class _RowReader:
    """Reads the rows of one file: open documents first, then on request the credentialed ones."""

    def __init__(
        self,
        file: IO[bytes],
        path: Path,
        rules: RowRules,
        listed: IO[str],
        say: Callable[[str], None],
    ):
        self.file, self.path, self.rules, self.listed, self.say = file, path, rules, listed, say
        self.size = os.fstat(file.fileno()).st_size
        self.rows, self.open, self.read = 0, 0, 0
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}
        self.private_lines, self.private_offsets = array("q"), array("q")
        self.disagreeing, self.examples = 0, []
        # filled in at the end of the pass; writer.write stores it after the last document
        self.notes: dict[str, Any] = dict(
            maker="published", file=hub.name_of(path), bytes=self.size
        )

    def documents(self) -> Iterator[Document]:
        """Yield the open documents; check the credentialed ones, and record their offsets."""
        progress, digest = ByteProgress(self.size, self.say), hashlib.sha256()
        for number, (offset, size, line) in enumerate(bounded_lines(self.file, digest.update), 1):
            progress(size)
            self.read = offset + size
            if line.isspace():
                continue
            self.rows += 1
            document = self._row(number, line)
            if document is not None and document.credential == "yes":
                self.private_lines.append(number)
                self.private_offsets.append(offset)
            elif document is not None:
                self.open += 1
                yield document
            self._check_share(at_end=False)
        if self.read != self.size or os.fstat(self.file.fileno()).st_size != self.size:
            raise self._changed()
        self._check_share(at_end=True)
        progress.done(f"{self.rows} rows of {self.path.name}")
        self.notes |= dict(sha256=digest.hexdigest(), rows=self.rows) | self.summary()

    def credentialed_documents(self) -> Iterator[Document]:
        """Yield the credentialed documents, after all others were read."""
        for number, offset in zip(self.private_lines, self.private_offsets, strict=True):
            self.file.seek(offset)
            try:
                row = read_row(self.file.readline(MAX_LINE))
                document = to_document(row, self._name(number), self.rules)
            except BadRow as error:
                raise self._changed() from error
            if document is None or document.credential != "yes":
                raise self._changed()
            yield document

    def summary(self) -> dict[str, Any]:
        """Return the counts of the rows that are not open documents."""
        bad = {r: n for r, n in sorted(self.reasons.items()) if r != WAITING}
        checked = self.rules.tokenizer is not None
        return dict(
            credentialed=len(self.private_lines),
            credentialed_without_tokens=self.reasons[WAITING],
            quarantined=sum(bad.values()),
            reasons=bad,
            text_disagrees=self.disagreeing if checked else "not compared",
            text_disagrees_first=self.examples,
        )

    def _row(self, number: int, line: bytes) -> Document | None:
        try:
            row = read_row(line)
            document = to_document(row, self._name(number), self.rules)
        except BadRow as bad:
            if bad.reason == "not JSON" and not line.endswith(b"\n") and len(line) <= MAX_LINE:
                raise PublishedError(
                    f"{self.path}: ends inside line {number}: cut off; copy the file again"
                ) from bad
            self._list(number, bad.reason, bad.detail)
            return None
        if document is None:
            self._list(number, WAITING, "")
        elif self.rules.tokenizer is not None and not _agrees(row["text"], document, self.rules):
            self.disagreeing += 1
            self.examples += [number] if len(self.examples) < 10 else []
        return document

    def _list(self, number: int, reason: str, detail: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, f"line {number} {detail}".strip())
        entry = dict(line=number, reason=reason) | (dict(detail=detail) if detail else {})
        self.listed.write(json.dumps(entry) + "\n")

    def _check_share(self, *, at_end: bool) -> None:
        bad = self.reasons.total() - self.reasons[WAITING]
        if not at_end:
            if self.rows < SURE or not bad:
                return
            # The end is too late to report a wrong file; twice what the complete file may have is
            # certain.
            allowed = 2 * self.rules.max_bad * self.rows * self.size / self.read
        else:
            allowed = self.rules.max_bad * self.rows
        if bad > allowed:
            raise PublishedError(
                f"{self.path}: {bad} of {self.rows} rows are invalid, but --max_bad allows only "
                f"the share {self.rules.max_bad}: {_format_counts(self.summary()['reasons'])}; "
                "the first of each: "
                f"{_format_counts({r: f for r, f in self.first.items() if r != WAITING})}"
            )

    def _changed(self) -> PublishedError:
        return PublishedError(
            f"{self.path}: changed while it was read; do not change the file, and rerun the command"
        )

    def _name(self, number: int) -> str:
        return f"{self.path.stem}-{number:07d}"


def _write(
    folder: Folder, documents: Iterable[Document], rows: _RowReader, notes: dict[str, Any]
) -> None:
    rules = rows.rules
    writer.write(
        folder.path, documents, shard_size=rules.shard_size, layout=rules.layout, notes=notes
    )
    rows.listed.seek(0)
    with folder.stream(QUARANTINE) as out:
        for line in rows.listed:
            out.write(line.encode())


def _write_credentialed(out: Path, rows: _RowReader) -> None:
    notes = rows.notes | dict(only="credentialed")
    if out.exists() and _meta_of(out).get("notes") == notes:
        rows.say(f"{out}: already written from this file")  # a run died between the two folders
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with private_umask(), atomic_folder(out, bytes_needed=0, seal=staging.META) as folder:
        _write(folder, rows.credentialed_documents(), rows, notes)


def _check_vacant(out: Path, private: Path, notes: dict[str, Any]) -> None:
    """Check, before hours of reading, that the folders may be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PublishedError(f"{out}: exists and is not empty; use another --out, or delete it")
    stored = _meta_of(private).get("notes", {}) if private.exists() else notes
    if any(stored.get(key) != notes[key] for key in notes):
        raise PublishedError(
            f"{private}: exists and was written from another file; use another --out"
        )


def _meta_of(folder: Path) -> dict[str, Any]:
    try:
        return writer.open_records(folder).meta
    except RecordsError:
        return {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if not path.is_file():  # a pipe would have no size and could not be read again
        raise PublishedError(f"{path}: no such file; set --from to the published train.jsonl")
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            _check_form(path, file)
            yield file
    except PermissionError as error:
        raise PublishedError(f"{path}: no permission to read it; change its mode") from error


def _check_form(path: Path, file: io.BufferedReader) -> None:
    """Detect two common forms of a download that have no seekable lines."""
    if file.peek(2)[:2] == text_files.GZIP:
        raise PublishedError(f"{path}: the file is compressed; unpack it first: gunzip -k {path}")
    if text_files.starts_array(file):
        raise PublishedError(
            f"{path}: the file is one JSON array; write one row per line first: jq -c '.[]' {path} "
            f"> {path.with_suffix('.jsonl').name}"
        )


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise BadRow(f"column {key}", f"is {type(value).__name__}; expected text that is not empty")
    if key == "text":
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow("column text", "contains an unpaired surrogate") from error
    elif len(value) > MAX_FIELD or not value.isprintable():
        raise BadRow(f"column {key}", f"expected at most {MAX_FIELD} printable characters")
    return value


def _image_path(row: dict[str, Any]) -> str:
    value = row.get("image_path")
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or len(value) > MAX_FIELD:
        raise BadRow("column image_path", f"is {type(value).__name__}; expected short text or none")
    try:
        return check_name("image_path", value.removeprefix("./"))
    except StorageError as error:
        raise BadRow(
            "column image_path", "leaves its folder; expected a path like a/b.png"
        ) from error


def _tokens(value: Any, rules: RowRules) -> np.ndarray:
    if not isinstance(value, list) or set(map(type, value)) != {int}:  # a bool is an int to numpy
        raise BadRow("tokens not integers", "expected a list of ids")
    if min(value) < 0 or max(value) >= rules.layout.vocab.size:
        raise BadRow("token outside the vocabulary", f"expected 0 to {rules.layout.vocab.size - 1}")
    tokens = np.asarray(value, np.int32)
    if len(tokens) < 3 or tokens[0] != BOS or tokens[-1] != EOS:
        raise BadRow("tokens without ends", f"{len(tokens)} ids; expected BOS {BOS} to EOS {EOS}")
    inside = tokens[1:-1]
    if (stray := inside[np.isin(inside, (BOS, PAD, EOS, IMAGE))]).size:
        raise BadRow("control token inside", f"{stray[0]}")
    if rules.separator and not (tokens == SEP).any():
        raise BadRow("no separator", f"no {SEP} ends the question; --no_separator accepts it")
    return tokens


def _agrees(text: str, document: Document, rules: RowRules) -> bool:
    vocab = rules.layout.vocab
    codes = [c for kind, c in split_segments(document.tokens, vocab) if kind == "image"]
    try:
        tokens = document_ids(rules.tokenizer, text, codes[0] if codes else None, vocab)
    except TokenizerError:
        return False
    return np.array_equal(tokens, document.tokens)


def _format_counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n) or "nothing"
