"""Decide which documents of an epoch are trained without their condition, as guidance streams.

    data.condition_dropout   the condition before the answer's last image has
                             text and images    no image         (see models/guidance_streams.py)
    text                     image-only         unconditional    BOS [BOI p p EOI] BOI c c
    image                    text-only          unchanged        BOS text SEP BOI c c
    all                      unconditional      unconditional    BOS BOI c c

Without an image, decoding has no image-only stream and uses the unconditional one; the same rule is
applied here. Only the codes of that image are scored, because decoding guides nothing else. A
document without a scored image is never changed.

The draw is a function of (data.seed, epoch, number of the document) alone. A stream is shorter than
its document, so an epoch is packed with the lengths of its own streams: rows stay as full as
without dropout, and the plan of any epoch is still computed before its first step.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.config import ConditionDropout, Data, check_condition_dropout
from medmax_jax.data.packing.pack import PackError, Plan, raw_draws
from medmax_jax.data.records.document import Document, RecordsError, loss_mask
from medmax_jax.data.records.reader import Records
from medmax_jax.models.guidance_streams import (
    FULL,
    IMAGE_ONLY,
    STREAMS,
    TEXT_ONLY,
    UNCONDITIONAL,
    guidance_stream,
)
from medmax_jax.models.vocab import BOI, is_image

_DRAWS = 5 << 40  # the stream of random numbers; mixing.py has the others


@dataclasses.dataclass(frozen=True, eq=False)
class EpochStreams:
    """The stream that each document of the records is trained as, and its length."""

    stream: np.ndarray  # uint8 [documents of the records]
    length: np.ndarray  # int32


def parse(text: str) -> ConditionDropout:
    """Return the probabilities of "text=0.05, all=0.05"; those that are not named are 0."""
    values = dataclasses.asdict(ConditionDropout.off())
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            probability = float(number) if name in values else None
        except ValueError:
            probability = None
        if probability is None:
            raise PackError(
                f"condition dropout is {text!r}: {part!r} is invalid; write name=probability pairs "
                "with the names text, image and all, such as 'text=0.05, all=0.05'"
            )
        values[name] = probability
    dropout = ConditionDropout(**values)
    check_condition_dropout(dropout)
    return dropout


def stream_counts(plan: Plan) -> dict[str, int]:
    """Return how many documents of an epoch are trained as each stream."""
    return dict(zip(STREAMS, np.bincount(plan.streams, minlength=4).tolist(), strict=True))


def streams_by_epoch(
    records: Records, data: Data, documents: Int[np.ndarray, "n"]
) -> Callable[[int], EpochStreams]:
    """Return the streams of an epoch, of the `documents` that a run may draw."""
    lengths = records.index["length"]
    if data.condition_dropout == ConditionDropout.off():
        complete = EpochStreams(np.zeros(len(lengths), np.uint8), lengths)
        return lambda epoch: complete
    return functools.lru_cache(2)(lambda epoch: _streams(records, data, documents, epoch))


def trained_tokens(
    document: Document, stream: int, records: Records, mask: str
) -> tuple[Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """Return the tokens of a document as a stream, and which of them are scored.

    `mask`: config.data.mask.
    """
    vocab, codes = records.layout.vocab, records.layout.codes_per_image
    if stream == FULL:
        return document.tokens, loss_mask(document.tokens, mask, document.turns)
    opened = _last_scored_image(document, records, mask)
    tokens = guidance_stream(document.tokens[: opened + 1 + codes], opened, stream, vocab)
    return tokens, np.arange(len(tokens)) >= len(tokens) - codes


def _streams(
    records: Records, data: Data, documents: Int[np.ndarray, "n"], epoch: int
) -> EpochStreams:
    stream, length = np.zeros(len(records), np.uint8), records.index["length"].copy()
    has_answer = records.index[f"{data.mask}_image"][documents] > 0
    drawn = _draw(len(records), data, epoch)[documents]
    dropped = documents[has_answer & (drawn != FULL)]
    stream[dropped] = drawn[has_answer & (drawn != FULL)]
    codes = records.layout.codes_per_image
    # The single image of a document is the one to generate: nothing has to be read.
    single = dropped[records.index["image"][dropped] == codes]
    _drop_without_image(stream, single)
    several = np.setdiff1d(dropped, single)
    several = several[stream[several] != UNCONDITIONAL]
    for start in range(0, len(several), 1_024):  # documents in memory at once
        numbers = several[start : start + 1_024]
        for number, document in zip(numbers, records.read(numbers), strict=True):
            opened = _last_scored_image(document, records, data.mask)
            if not is_image(document.tokens[:opened], records.layout.vocab).any():
                _drop_without_image(stream, number)
            if stream[number] in (IMAGE_ONLY, TEXT_ONLY):
                tokens, _ = trained_tokens(document, int(stream[number]), records, data.mask)
                length[number] = len(tokens)
    length[stream == UNCONDITIONAL] = 2 + codes
    return EpochStreams(stream, length)


def _drop_without_image(stream: np.ndarray, documents: np.ndarray) -> None:
    """Set the streams of documents in whose condition there is no image."""
    rule = np.array([FULL, UNCONDITIONAL, UNCONDITIONAL, FULL], np.uint8)  # by the stream drawn
    stream[documents] = rule[stream[documents]]


def _draw(count: int, data: Data, epoch: int) -> np.ndarray:
    """Return the stream drawn for each document, were there text and images in its condition."""
    uniform = (raw_draws(count, data.seed, epoch, _DRAWS) >> np.uint64(11)) * 2.0**-53
    dropout = data.condition_dropout
    ends = np.cumsum([dropout.text, dropout.image, dropout.all])
    choices = np.array([IMAGE_ONLY, TEXT_ONLY, UNCONDITIONAL, FULL], np.uint8)
    return choices[np.searchsorted(ends, uniform, side="right")]


def _last_scored_image(document: Document, records: Records, mask: str) -> int:
    """Return the index of the BOI of the last image whose codes are scored."""
    tokens = document.tokens
    scored = loss_mask(tokens, mask, document.turns) & is_image(tokens, records.layout.vocab)
    if not scored.any():
        raise RecordsError(
            f"a plan has a document without an image to generate as a stream without its condition "
            f"(data.mask {mask!r}); it was made from other records: create it again"
        )
    return int(np.flatnonzero(tokens[: np.flatnonzero(scored)[-1]] == BOI)[-1])
