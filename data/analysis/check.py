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
           shared_look     an evaluation image that near to a training image
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

from medmax_jax.data.analysis import eval_set, findings, near_duplicates, scan
from medmax_jax.data.image_tokens.encoder import (
    LOG_SECONDS,
    Encoder,
    PrepareError,
    load_encoder,
    log,
)
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.jsonl import plain_text, to_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.io.progress import ItemProgress
from medmax_jax.io.storage import file_sha256
from medmax_jax.models import image_headers
from medmax_jax.models.tokenizer import Tokenizer, TokenizerError


def check(
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None,
    encoder: Encoder | None = None,
    against: tuple[Path, ...] = (),
    pictures: Path | None = None,
    held_pictures: Path | None = None,
    strict: bool = False,
    out: Any = None,
) -> dict[str, Any]:
    """Read the folder once, compare, print findings to `out` (stdout); return the counts.

    `tokenizer`: that of the records, for text; `encoder`: decodes codes to compare perceptual
    hashes; `pictures`, `held_pictures`: folders of the image files of the records and of `against`.
    """
    found, tell = open_records(folder), findings.Findings(strict, out or sys.stdout)
    if against and tokenizer is None:
        raise PrepareError("--against compares words; name the records' model folder with --model")
    items = [item for each in against for item in eval_set.read(Path(each), tokenizer)]
    grams = near_duplicates.NgramIndex([item.words for item in items])

    def see(document: Any, number: int) -> None:
        if items:
            grams.add_document(
                near_duplicates.normalized_words(plain_text(document, found.layout, tokenizer)),
                number,
            )

    columns = scan.scan(found, tell, see)
    told, sha = findings.DocumentNamer(found, columns), columns.sha.copy()
    shown, looks_of, flat = _look(found, columns, sha, (pictures, encoder), tell)
    findings.find_duplicates(columns, sha, told, tell)
    findings.find_near_duplicates(looks_of, shown, columns.path, told, tell)
    names = ("documents", "tokens", "text_tokens", "image_tokens", "sha256")
    summary = {n: found.meta[n] for n in names} | dict(looked_at=len(looks_of), flat=flat)
    if items:
        held = eval_set.with_image_hashes(items, held_pictures, encoder)
        findings.find_shared_images(held, columns, sha, (looks_of, shown), told, tell)
        findings.find_shared_text(grams, items, told, tell)
        summary |= _compared(held, grams)
    return summary | tell.totals() | _example(found, tokenizer)


def _look(
    found: Records,
    columns: scan.Columns,
    sha: UInt64[np.ndarray, "n"],
    sides: tuple[Path | None, Encoder | None],
    tell: findings.Findings,
) -> tuple[Int[np.ndarray, "k"], UInt32[np.ndarray, "k 8"], int]:
    """Return (a document of each image, its hash, how many are flat); fill missing values of `sha`.

    The perceptual hashes are those of decoded codes if there is an encoder, else of files.
    """
    pictures, encoder = sides
    seen = (np.zeros(0, np.int64), np.zeros((0, near_duplicates.HASH_WORDS), np.uint32), 0)
    if pictures is not None:
        known, first, place = np.unique(columns.path, return_index=True, return_inverse=True)
        numbers = first[known != 0]
        seen = _table(numbers, _files(found, numbers, sha, pictures, tell))
        seen = (*seen[:2], seen[2] - tell.count["unread_file"])
        of_path = np.zeros(len(known), np.uint64)
        of_path[known != 0] = sha[numbers]
        sha[:] = np.where(sha == 0, of_path[place.reshape(-1)], sha)
    if encoder is not None:
        places = np.sort(np.unique(columns.codes, return_index=True)[1])
        hashes = near_duplicates.hash_codes(encoder, _images(found, columns, places))
        seen = _table(columns.owner[places], hashes)
    return seen


def _table(
    numbers: Int[np.ndarray, "_"], hashes: Iterable[near_duplicates.Look | None]
) -> tuple[Int[np.ndarray, "k"], UInt32[np.ndarray, "k 8"], int]:
    table, has = np.zeros((len(numbers), near_duplicates.HASH_WORDS), np.uint32), []
    progress = ItemProgress(len(numbers), "pictures", log.info, every=LOG_SECONDS)
    for row, look in zip(table, hashes, strict=True):
        has.append(look is not None)
        row[:] = 0 if look is None else look
        progress.tick("looked at", 1)
    has = np.array(has, bool)
    return numbers[has].astype(np.int64), table[has], int((~has).sum())


def _images(
    found: Records, columns: scan.Columns, places: Int[np.ndarray, "_"]
) -> Iterator[Int[np.ndarray, "K"]]:
    """Yield the codes at these indices of the column."""
    for place in places:
        images_of = scan.images_of(found[int(columns.owner[place])], found)
        yield next(
            c for c in images_of if near_duplicates.hash64(c.tobytes()) == int(columns.codes[place])
        )


def _files(
    found: Records,
    numbers: Int[np.ndarray, "_"],
    sha: UInt64[np.ndarray, "n"],
    pictures: Path,
    tell: findings.Findings,
) -> Iterator[near_duplicates.Look | None]:
    """Yield the perceptual hash of each document's file, None without one; record its SHA-256."""
    for number in numbers.tolist():
        document, look = found[number], None
        where = f"document {number}" + (
            "" if has_credentialed(found) else f" ({document.image_path})"
        )
        try:
            digest, look = near_duplicates.hash_file(pictures, document.image_path)
            if document.image_sha256 not in ("", digest):
                tell("changed_file", where, f"has SHA-256 {digest}, encoded was another")
            elif not document.image_sha256:
                sha[number] = near_duplicates.hash64(digest)
        except image_headers.ImageError as error:
            tell("unread_file", where, "unreadable" if has_credentialed(found) else str(error))
        yield look


def _compared(held: tuple, grams: near_duplicates.NgramIndex) -> dict[str, Any]:
    items, looks_of, _, unread = held
    return dict(
        compared=dict(
            items=len(items),
            with_codes=sum(bool(item.codes) for item in items),
            with_bytes=sum(bool(item.sha) for item in items),
            with_look=len(looks_of),
            unread_pictures=unread,
            under_13_words=int((grams.sizes == 0).sum()),
        )
    )


def _example(found: Records, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the first document as text, if it may be shown and can be read."""
    try:
        first = found[0]
    except RecordsError:
        return dict(example=None, text=None)
    if has_credentialed(found):
        return dict(example="credentialed: not shown", text=None)
    text = None if tokenizer is None else to_text(first, found.layout, tokenizer)
    return dict(example=first.id, text=text)


# ---- The command line ----


def add(commands: Any, tiny: Path) -> argparse.ArgumentParser:
    """Add `check`; `tiny` is the model folder that is used if it made the records."""
    checked = commands.add_parser("check", help="every record, what comes twice, what leaks")
    checked.add_argument("--model", type=Path, help="model folder that wrote the records")
    checked.add_argument(
        "--against", type=Path, nargs="+", default=[], metavar="EVAL",
        help="evaluation set to compare with: folders of records, items.jsonl",
    )  # fmt: skip
    checked.add_argument("--images", type=Path, help="folder of the records' image files")
    checked.add_argument("--eval_images", type=Path, help="folder of those of --against")
    checked.add_argument(
        "--decode", action="store_true",
        help="looks of codes through the VQGAN of --model, instead of image files",
    )  # fmt: skip
    checked.add_argument(
        "--strict", action="store_true", help="shared words and looks are errors too"
    )
    checked.set_defaults(run=_run, tiny=tiny)
    return checked


def _run(args: argparse.Namespace) -> dict[str, Any]:
    found = open_records(args.folder)
    tokenizer = resolve_tokenizer(found, args.model, args.tiny)
    return check(
        args.folder,
        tokenizer=tokenizer,
        encoder=resolve_encoder(found, args.model or args.tiny) if args.decode else None,
        against=tuple(args.against),
        pictures=args.images,
        held_pictures=args.eval_images,
        strict=args.strict,
    )


def resolve_tokenizer(found: Records, model: Path | None, tiny: Path) -> Tokenizer | None:
    """Return that of --model, or the shipped one if it wrote the records, else None (logged).

    Records that do not state their tokenizer are read with the one that was named.
    """
    wrote = found.layout.tokenizer
    try:
        read = Tokenizer.from_file((model or tiny) / "tokenizer.json", found.layout.vocab)
    except TokenizerError as error:
        if model is not None:
            log.warning("no text: %s", error)
            return None
        read = None
    if read and (read.fingerprint == wrote or (model is not None and not wrote)):
        return read
    log.warning("no text: %s did not write these records; name --model", model or "the shipped one")
    return None


def encoder_matches(found: Records, model: Path | None, tiny: Path) -> bool:
    """Return whether this VQGAN made the codes; if the records name none, whether it was named."""
    file, wrote = (model or tiny) / "vqgan.safetensors", found.layout.vqgan
    if not wrote:
        return model is not None and file.is_file()
    return file.is_file() and file_sha256(file) == wrote


def resolve_encoder(found: Records, model: Path) -> Encoder:
    """Return the VQGAN of a model folder; raise PrepareError unless it made the records' codes."""
    encoder, layout = load_encoder(model), found.layout
    alike = encoder.layout.codes_per_image == layout.codes_per_image
    if not alike or layout.vqgan not in ("", encoder.layout.vqgan):
        raise PrepareError(
            f"{model}: its VQGAN did not make the codes of {found.folder}; name that one's folder "
            "with --model"
        )
    return encoder
