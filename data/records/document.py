"""Define one training document: its fields, trained tokens, validity checks and bytes.

    tokens   BOS q u e s t i o n BOI c+4 ... EOI SEP a n s w e r EOS

This module uses numpy only and no files: `writer.py` stores documents in folders.
"""

import dataclasses
import hashlib
import struct
import zlib

import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.config import Vocab, view_text
from medmax_jax.io.text_files import parse_object
from medmax_jax.models.vocab import (
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE,
    IMAGE_START,
    PAD,
    SEP,
    check_ids,
    is_image,
)

COLUMNS = ("length", "image", "answers", "answers_image", "release", "release_image")
LABELS = ("source", "task", "image_path")  # names stored as numbers, see reader.Records.names
HEAD = struct.Struct("<4sII")  # magic, CRC-32 of all bytes after it, bytes of the JSON header
MAGIC = b"MMX1"
AS_WRITTEN = dict(allow_lone_surrogates=True, check_integers=False)  # the header, which has a CRC


class RecordsError(ValueError):
    """A document or a folder that cannot be used; the message names it and states the fix."""

    def __init__(self, text: str, kind: str = ""):
        super().__init__(text)
        self.kind = kind  # the kind of problem of a document: schema, ids, image, separator


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """One training document. `turns`: user turns, 0 unknown. `group`: patient or volume.

    `view`, `answer_view`: of its images in prompts and in answers, see Layout.
    """

    tokens: np.ndarray  # int32 [T], BOS first, EOS last
    image_path: str
    task: str
    source: str
    credential: str
    turns: int
    group: str
    id: str
    image_sha256: str = ""  # of the image file; empty if the file was not available
    view: str = "released"
    answer_view: str = "released"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The meaning of a folder's ids. `tokenizer`, `vqgan`: sha256 of the files that made them.

    `view`: of the images in prompts, cropped or padded (models/images.py). `answer_view`: of those
    that are trained as answers, which are all images of a document without SEP.
    """

    vocab: Vocab
    codes_per_image: int
    tokenizer: str
    vqgan: str
    view: str = "released"
    answer_view: str = "released"


def loss_mask(tokens: Int[np.ndarray, "T"], mode: str, turns: int) -> Bool[np.ndarray, "T"]:
    """Return a mask that is True at the tokens whose prediction is trained.

    SEP closes every turn, so the sections between SEPs are question, answer, question, answer...
    A section includes the SEP or EOS that closes it:
        tokens            BOS q1 SEP a1 SEP q2 SEP a2 EOS    (turns=2)
        answers            .  .   .   x   x  .   .   x   x
        release            .  .   .   x   x  x   x   x   x   (all after the first SEP, as in the
                                                              MedMax release)
    `answers` with unknown turns (0) equals `release`. In a document without SEP (pretraining) every
    token except BOS is scored.
    """
    if mode not in ("answers", "release"):
        raise RecordsError(f"mask is {mode!r}; use answers or release")
    is_sep = tokens == SEP
    section = np.cumsum(is_sep) - is_sep  # SEPs strictly before
    if not is_sep.any():
        return np.arange(len(tokens)) > 0
    return section % 2 == 1 if mode == "answers" and turns > 0 else section > 0


def check_document(document: Document, layout: Layout, *, name: str = "") -> None:
    """Raise RecordsError unless the document is valid: ids, ends, image spans, turns.

    `name`: the name of the document in messages, if its id must not be repeated.
    """
    t, where = document.tokens, name or f"document {document.id!r} of {document.source!r}"
    if t.ndim != 1 or t.dtype != np.int32 or len(t) < 3:
        raise RecordsError(
            f"{where}: tokens are {t.dtype}{t.shape}; expected int32 [T] with T >= 3", "schema"
        )
    try:
        check_ids(t, layout.vocab, where=where)
    except ValueError as error:
        raise RecordsError(str(error), "ids") from error
    if t[0] != BOS or t[-1] != EOS:
        raise RecordsError(
            f"{where}: the first token is {t[0]} and the last is {t[-1]}; expected BOS {BOS} and "
            f"EOS {EOS}",
            "ids",
        )
    stray = t[1:-1][np.isin(t[1:-1], (BOS, PAD, EOS, IMAGE))]
    if stray.size:
        raise RecordsError(
            f"{where}: control token {stray[0]} inside the document; create the document again",
            "ids",
        )
    _check_images(t, layout, where)
    _check_views(document, layout, where)
    seps = int((t == SEP).sum())
    if document.turns and seps != 2 * document.turns - 1:
        raise RecordsError(
            f"{where}: turns is {document.turns}, which requires {2 * document.turns - 1} "
            f"separators, but there are {seps}; set turns to 0 if their number is unknown",
            "separator",
        )


def from_bytes(record: bytes, where: str) -> Document:
    """Read a document from its bytes; raise RecordsError, with `where` in it, on corruption."""
    if len(record) < HEAD.size or record[:4] != MAGIC:
        raise RecordsError(
            f"{where}: not a document in this format; the shard is damaged or was written by "
            "another program"
        )
    _, crc, size = HEAD.unpack_from(record)
    if zlib.crc32(record[8:]) != crc:
        raise RecordsError(f"{where}: CRC mismatch: damaged; build the data set again")
    body = record[HEAD.size :]
    try:
        fields = parse_object(body[:size], where, **AS_WRITTEN)
        tokens = np.frombuffer(body[size:], fields["tokens"]).astype(np.int32)
        return Document(**(fields | {"tokens": tokens}))
    except (ValueError, KeyError, TypeError) as error:
        raise RecordsError(
            f"{where}: the header is not that of a document; another program wrote the shard"
        ) from error


def _check_images(t: np.ndarray, layout: Layout, where: str) -> None:
    n, code = layout.codes_per_image, is_image(t, layout.vocab)
    starts, ends = np.flatnonzero(t == BOI), np.flatnonzero(t == EOI)
    complete = len(starts) == len(ends) and (ends - starts == n + 1).all()
    complete = complete and all(code[b + 1 : e].all() for b, e in zip(starts, ends, strict=True))
    if not complete or code.sum() != n * len(starts):
        raise RecordsError(
            f"{where}: {int(code.sum())} image codes with {len(starts)} BOI and {len(ends)} EOI; "
            f"every image must be BOI, {n} codes, EOI (cut off, or encoded with another VQGAN)",
            "image",
        )
    unused = t[(t >= IMAGE_START + layout.vocab.image_codes) & (t < EOI)]
    if unused.size:
        raise RecordsError(
            f"{where}: image token {unused[0]} is outside the codebook of "
            f"{layout.vocab.image_codes} codes; encode with the VQGAN of this vocabulary",
            "image",
        )


def _check_views(document: Document, layout: Layout, where: str) -> None:
    """Raise RecordsError on an image in another view than the folder's; others would be mixed."""
    if view_text(document) != view_text(layout) and (document.tokens == BOI).any():
        raise RecordsError(
            f"{where}: its images have {view_text(document)}, but those of the folder have "
            f"{view_text(layout)}; create all of them with the same views",
            "image",
        )


def pseudonym(text: str | bytes) -> str:
    """Return a short name for text that must not be written: 64 bits of SHA-256."""
    raw = text if isinstance(text, bytes) else text.encode()
    return hashlib.sha256(raw).hexdigest()[:16]
