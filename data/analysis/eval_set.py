"""Read an evaluation set for comparison with training data: text, codes, bytes and hashes of items.

folder of records                          every document is an item
items.jsonl {prompt, answer, image_path}   the output of `import` for the published parquet
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

from medmax_jax.data.analysis import near_duplicates
from medmax_jax.data.analysis.near_duplicates import normalized_words
from medmax_jax.data.analysis.scan import images_of
from medmax_jax.data.image_tokens.encoder import Encoder
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.jsonl import plain_text
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.endpoints import egress
from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models import image_headers
from medmax_jax.models.tokenizer import IMAGE_NAME, Tokenizer

MAX_LINE = 1 << 22  # characters: a prompt and an answer of eval_rows.MAX_TEXT each, with a margin


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvalItem:
    """One item; `path` is its image's, codes and sha are empty if unknown."""

    name: str
    words: tuple[str, ...]
    path: str
    codes: tuple[np.ndarray, ...]
    sha: str


def read(path: Path, tokenizer: Tokenizer) -> list[EvalItem]:
    """Read the items of a folder of records or of an items.jsonl."""
    if path.is_dir():
        return list(_of_records(open_records(path), tokenizer))
    try:
        rows = text_files.read_objects(path, max_bytes=MAX_LINE)
    except TextFileError as error:
        raise RecordsError(
            f"{error}: cannot be read; use a folder of records or an items.jsonl"
        ) from error
    return [_of_row(row, path, place.removeprefix(f"{path} ")) for place, row in rows]


def with_image_hashes(
    items: list[EvalItem], folder: Path | None, encoder: Encoder | None
) -> tuple[list[EvalItem], UInt32[np.ndarray, "k 8"], Int[np.ndarray, "k"], int]:
    """Return (items, perceptual hashes, the item of each hash, number of unreadable images).

    With a folder, bytes and hashes are those of the files there. With an encoder, hashes are those
    of decoded codes, and the file of an item without codes is encoded.
    """
    files = _hash_files(items, folder)
    unread = sum(bool(item.path) and item.path not in files for item in items) * bool(folder)
    items = [dataclasses.replace(i, sha=files[i.path][0]) if i.path in files else i for i in items]
    if encoder is None:
        table = [(n, files[i.path][1]) for n, i in enumerate(items) if i.path in files]
    else:
        items = _with_codes(items, folder, encoder)
        codes = {near_duplicates.code_hash(c): c for item in items for c in item.codes}
        hashes = dict(zip(codes, near_duplicates.hash_codes(encoder, codes.values()), strict=True))
        table = [
            (n, hashes[near_duplicates.code_hash(c)]) for n, i in enumerate(items) for c in i.codes
        ]
    table = [(n, image_hash) for n, image_hash in table if image_hash is not None]
    rows = np.array([image_hash for _, image_hash in table], np.uint32)
    owners = np.array([n for n, _ in table], np.int64)
    return items, rows.reshape(-1, near_duplicates.HASH_WORDS), owners, unread


def _hash_files(
    items: list[EvalItem], folder: Path | None
) -> dict[str, tuple[str, near_duplicates.PerceptualHash | None]]:
    """Return path -> (SHA-256, perceptual hash) of the files that can be read."""
    hashes = {}
    for path in sorted({item.path for item in items if item.path and folder is not None}):
        with contextlib.suppress(image_headers.ImageError):  # counted by the caller
            hashes[path] = near_duplicates.hash_file(folder, path)
    return hashes


def _with_codes(items: list[EvalItem], folder: Path | None, encoder: Encoder) -> list[EvalItem]:
    """Return items with the codes of their files; an item whose file is unreadable has none."""
    codes = {}
    if folder is not None:
        paths = sorted({item.path for item in items if item.sha and item.path and not item.codes})
        files = [folder / path for path in paths]
        codes = dict(zip(paths, near_duplicates.encode_files(encoder, files), strict=True))
    return [
        dataclasses.replace(i, codes=codes[i.path]) if not i.codes and i.path in codes else i
        for i in items
    ]


def _of_records(records: Records, tokenizer: Tokenizer) -> Iterator[EvalItem]:
    for n, d in enumerate(records):
        text = plain_text(d, records.layout, tokenizer)
        yield EvalItem(
            name=f"document {n}" if has_credentialed(records) else d.id,
            words=tuple(normalized_words(text)),
            path=d.image_path,
            codes=tuple(images_of(d, records)),
            sha=d.image_sha256,
        )


def _of_row(row: dict[str, Any], file: Path, place: str) -> EvalItem:
    prompt, answer, path = row.get("prompt"), row.get("answer"), row.get("image_path") or ""
    valid = all(type(part) in (str, int, float) for part in (prompt, answer))
    if not valid or not isinstance(path, str):
        raise RecordsError(
            f"{file}, {place}: not an item with prompt, answer and image_path; create the file "
            "with data.prepare import"
        )
    text = f"{prompt}\n{answer}".replace(IMAGE_NAME, "\n")
    secret = egress.data_class_of(row, place, default=egress.LICENCE_BOUND)
    name = place if secret == egress.CREDENTIALED else str(row.get("id") or place)
    return EvalItem(name=name, words=tuple(normalized_words(text)), path=path, codes=(), sha="")
