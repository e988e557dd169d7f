# Verbatim: part of the data.
"""`python -m data.prepare check`: check records for corruption, duplicates and eval-set overlap.

It prints one finding per line, tab-separated: level, kind, where, what. An `error` makes the exit
code 1, a `note` only informs:

    error  damage          a record that cannot be read, or whose CRC differs
           schema          a field that is missing or of another kind
           ids             a token outside the vocabulary, or a misplaced control token
           image           not BOI, n codes, EOI; or a code beyond the codebook
           separator       fewer or more separators than its turns need
           written         not as written: digest, index, an id that occurs twice
           shared_codes    an evaluation image with the codes of a training image
           shared_bytes    one whose file has the same bytes
    note   same_document   documents of the same tokens
           same_codes      images of the same codes under several paths
           same_bytes      files of the same bytes under several paths
           near_pictures   images whose pHash differs in at most 15 of 256 bits, under several paths
           changed_file    a file under --images that is not the one that was encoded
           unread_file     one that cannot be read
           shared_look     an evaluation image as near as that to a training image
           shared_text     an evaluation item with 13 consecutive words of training text (GPT-3)

`--strict` treats shared_look and shared_text as errors too.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32, UInt64

from medmax_jax import arguments
from medmax_jax.data.analysis import eval_set, findings, near_duplicates, scan
from medmax_jax.data.image_tokens.encoder import (
    LOG_SECONDS,
    Encoder,
    PrepareError,
    load_encoder,
    log,
)
from medmax_jax.data.records.document import PSEUDO, RecordsError
from medmax_jax.data.records.jsonl import plain_text, to_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models import image_headers
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError
from medmax_jax.storage.folder import file_sha256


def check(
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None = None,
    against: tuple[Path, ...] = (),
    images: Path | None = None,
    eval_images: Path | None = None,
    strict: bool = False,
    out: Any = None,
) -> dict[str, Any]:
    """Read the folder once, compare, print findings to `out` (stdout); return the counts.

    `tokenizer`: that of the records, for text; `encoder`: decodes codes to compare perceptual
    hashes; `images`, `eval_images`: folders of the image files of the records and of `against`.
    """
    records, report = open_records(folder), findings.Findings(strict, out or sys.stdout)
    if against and tokenizer is None:
        raise PrepareError(
            "--against compares text, which requires the tokenizer; set --model to the model "
            "folder of the records"
        )
    items = [item for path in against for item in eval_set.read(Path(path), tokenizer)]
    ngrams = near_duplicates.NgramIndex([item.words for item in items])

    def visit(document: Any, number: int) -> None:
        if items:
            text = plain_text(document, records.layout, tokenizer)
            ngrams.add_document(near_duplicates.normalized_words(text), number)

    columns = scan.scan(records, report, visit)
    namer, sha = findings.DocumentNamer(records, columns), columns.sha.copy()
    owners, hashes, flat = _hash_images(records, columns, sha, (images, encoder), report)
    findings.find_duplicates(columns, sha, namer, report)
    findings.find_near_duplicates(hashes, owners, columns.path, namer, report)
    names = ("documents", "tokens", "text_tokens", "image_tokens", "sha256")
    summary = {n: records.meta[n] for n in (*names, PSEUDO) if n in records.meta}
    summary |= dict(looked_at=len(hashes), flat=flat)
    if items:
        hashed = eval_set.with_image_hashes(items, eval_images, encoder)
        findings.find_shared_images(hashed, columns, sha, (hashes, owners), namer, report)
        findings.find_shared_text(ngrams, items, namer, report)
        summary |= _comparison_counts(hashed, ngrams)
    return summary | report.totals() | _example(records, tokenizer)


def _hash_images(
    records: Records,
    columns: scan.Columns,
    sha: UInt64[np.ndarray, "n"],
    sources: tuple[Path | None, Encoder | None],
    report: findings.Findings,
) -> tuple[Int[np.ndarray, "k"], UInt32[np.ndarray, "k 8"], int]:
    """Return (a document of each image, its hash, how many are flat); fill missing values of `sha`.

    The perceptual hashes are those of decoded codes if there is an encoder, else of files.
    """
    folder, encoder = sources
    result = (np.zeros(0, np.int64), np.zeros((0, near_duplicates.HASH_WORDS), np.uint32), 0)
    if folder is not None:
        paths, first, inverse = np.unique(columns.path, return_index=True, return_inverse=True)
        numbers = first[paths != 0]
        result = _hash_table(numbers, _file_hashes(records, numbers, sha, folder, report))
        result = (*result[:2], result[2] - report.count["unread_file"])
        sha_of_path = np.zeros(len(paths), np.uint64)
        sha_of_path[paths != 0] = sha[numbers]
        sha[:] = np.where(sha == 0, sha_of_path[inverse.reshape(-1)], sha)
    if encoder is not None:
        indices = np.sort(np.unique(columns.codes, return_index=True)[1])
        hashes = near_duplicates.hash_codes(encoder, _image_codes(records, columns, indices))
        result = _hash_table(columns.owner[indices], hashes)
    return result


def _hash_table(
    numbers: Int[np.ndarray, "_"], hashes: Iterable[near_duplicates.PerceptualHash | None]
) -> tuple[Int[np.ndarray, "k"], UInt32[np.ndarray, "k 8"], int]:
    table, hashed = np.zeros((len(numbers), near_duplicates.HASH_WORDS), np.uint32), []
    progress = ItemProgress(len(numbers), "images", log.info, every=LOG_SECONDS)
    for row, image_hash in zip(table, hashes, strict=True):
        hashed.append(image_hash is not None)
        row[:] = 0 if image_hash is None else image_hash
        progress.tick("hashed", 1)
    hashed = np.array(hashed, bool)
    return numbers[hashed].astype(np.int64), table[hashed], int((~hashed).sum())


def _image_codes(
    records: Records, columns: scan.Columns, indices: Int[np.ndarray, "_"]
) -> Iterator[Int[np.ndarray, "K"]]:
    """Yield the codes at these indices of the column."""
    for index in indices:
        images = scan.images_of(records[int(columns.owner[index])], records)
        name = int(columns.codes[index])
        yield next(codes for codes in images if near_duplicates.hash64(codes.tobytes()) == name)


def _file_hashes(
    records: Records,
    numbers: Int[np.ndarray, "_"],
    sha: UInt64[np.ndarray, "n"],
    folder: Path,
    report: findings.Findings,
) -> Iterator[near_duplicates.PerceptualHash | None]:
    """Yield the perceptual hash of each document's file, None without one; record its SHA-256."""
    for number in numbers.tolist():
        document, image_hash = records[number], None
        where = f"document {number}" + (
            "" if has_credentialed(records) else f" ({document.image_path})"
        )
        try:
            digest, image_hash = near_duplicates.hash_file(folder, document.image_path)
            if document.image_sha256 not in ("", digest):
                report("changed_file", where, f"SHA-256 is {digest}, not that of the encoded file")
            elif not document.image_sha256:
                sha[number] = near_duplicates.hash64(digest)
        except image_headers.ImageError as error:
            report("unread_file", where, "unreadable" if has_credentialed(records) else str(error))
        yield image_hash


def _comparison_counts(hashed: tuple, ngrams: near_duplicates.NgramIndex) -> dict[str, Any]:
    items, hashes, _, unread = hashed
    # Verbatim: part of the data.
    counts = dict(
        items=len(items),
        with_codes=sum(bool(item.codes) for item in items),
        with_bytes=sum(bool(item.sha) for item in items),
        with_look=len(hashes),
        unread_pictures=unread,
        under_13_words=int((ngrams.sizes == 0).sum()),
    )
    return dict(compared=counts)


def _example(records: Records, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the first document as text, if it may be shown and can be read."""
    try:
        first = records[0]
    except RecordsError:
        return dict(example=None, text=None)
    if has_credentialed(records):
        return dict(example="credentialed: not shown", text=None)
    text = None if tokenizer is None else to_text(first, records.layout, tokenizer)
    return dict(example=first.id, text=text)


# ---- The command line ----


def add(commands: Any, tiny: Path) -> argparse.ArgumentParser:
    """Add `check`; `tiny` is the model folder that is used if it made the records."""
    checked = commands.add_parser(
        "check", help="check records for corruption, duplicates and overlap with an evaluation set"
    )
    checked.add_argument(
        "--model", type=arguments.folder, help="model folder that wrote the records"
    )
    checked.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="EVAL",
        help="evaluation sets to compare with: folders of records, items.jsonl",
    )  # fmt: skip
    checked.add_argument("--images", type=Path, help="folder of the image files of the records")
    checked.add_argument("--eval_images", type=Path, help="folder of the image files of --against")
    checked.add_argument(
        "--decode", action="store_true",
        help="hash images decoded by the VQGAN of --model instead of image files",
    )  # fmt: skip
    checked.add_argument(
        "--strict", action="store_true",
        help="treat shared text and shared image hashes as errors",
    )  # fmt: skip
    checked.set_defaults(run=_run, tiny=tiny)
    return checked


def _run(args: argparse.Namespace) -> dict[str, Any]:
    records = open_records(args.folder)
    tokenizer = resolve_tokenizer(records, args.model, args.tiny)
    return check(
        args.folder,
        tokenizer=tokenizer,
        encoder=resolve_encoder(records, args.model or args.tiny) if args.decode else None,
        against=tuple(args.against),
        images=args.images,
        eval_images=args.eval_images,
        strict=args.strict,
    )


def resolve_tokenizer(records: Records, model: Path | None, tiny: Path) -> Tokenizer | None:
    """Return that of --model, or the shipped one if it wrote the records, else None (logged).

    Records that do not state their tokenizer are read with the one that was named.
    """
    fingerprint = records.layout.tokenizer
    try:
        tokenizer = Tokenizer.from_file((model or tiny) / "tokenizer.json", records.layout.vocab)
    except TokenizerError as error:
        if model is not None:
            log.warning("text is not available: %s", error)
            return None
        tokenizer = None
    named = model is not None and not fingerprint
    if tokenizer and (tokenizer.fingerprint == fingerprint or named):
        return tokenizer
    log.warning(
        "text is not available: %s did not write these records; set --model",
        model or "the shipped model",
    )
    return None


def encoder_matches(records: Records, model: Path | None, tiny: Path) -> bool:
    """Return whether this VQGAN made the codes; if the records name none, whether it was named."""
    file, fingerprint = (model or tiny) / "vqgan.safetensors", records.layout.vqgan
    if not fingerprint:
        return model is not None and file.is_file()
    return file.is_file() and file_sha256(file) == fingerprint


def resolve_encoder(records: Records, model: Path) -> Encoder:
    """Return the VQGAN of a model folder; raise PrepareError unless it made the records' codes."""
    layout = records.layout
    encoder = load_encoder(model, view=layout.view, answer_view=layout.answer_view)
    same_size = encoder.layout.codes_per_image == layout.codes_per_image
    if not same_size or layout.vqgan not in ("", encoder.layout.vqgan):
        raise PrepareError(
            f"{model}: its VQGAN did not encode the images of {records.folder}; set --model to the "
            "model folder that did"
        )
    return encoder
