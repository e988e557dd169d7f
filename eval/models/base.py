"""What answers: any object with `generate(asks) -> one list of segments an ask`.

    Ask(id, parts, mode, max_tokens, data_class)  ->  [Text("yes")]  or  ["yes"], [PIL.Image], ...

A model may also have

    stream(asks)                   (index, segments) as they get ready, in any order
    score_options(asks, options)   log-likelihoods of the words of each option, one list an ask
    name, fingerprint              what records and pages call it; without them, its class
    modes                          of answers that it can write; without it, all of Ask.mode

`Native` is a model folder of this project in the generation engine.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image

from medmax_jax.config import Sample
from medmax_jax.generation import api, model_bundle
from medmax_jax.generation.model_bundle import Image, PromptPart, Text

Looks = Callable[[np.ndarray, np.ndarray], str]  # (codes, pixels) of a drawn picture -> modality

SLOTS_PER_GUIDED_IMAGE = 3  # lanes of a picture: full, image-only, unconditional
Segment = str | PIL.Image.Image | Text | Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """One question to a model. `parts`: pictures' files and words, in order.

    mode: text, image or mixed, what may be written. max_tokens: of text. data_class: whose guard
    it passes before it leaves the machine, see medmax_jax/endpoints/egress.py. end_of_turn: after
    the parts, as
    in fine-tuning; a base model goes on from the last word.
    """

    id: str
    parts: tuple[Path | str, ...]
    mode: str
    max_tokens: int
    data_class: str
    end_of_turn: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailedResponse:
    """In place of segments: the model was asked and refused, and asking again is no help."""

    why: str


def last_error(model: object) -> str:
    """What a model that left asks unanswered says of it, for the end of a sentence."""
    said = getattr(model, "last_error", "")
    return f" ({said})" if said else ""


class Model(Protocol):
    """The least that can be evaluated."""

    def generate(self, asks: Sequence[ModelRequest]) -> Sequence[Sequence[Segment]]: ...


class NativeModel:
    """A model folder in memory; pictures are encoded once, whatever asks about them.

    rows: answers of words at a time. Pictures take up to three lanes of the cache each while they
    are drawn, so a third as many.
    """

    def __init__(
        self, g: model_bundle.ModelBundle, sample: Sample, *, rows: int, name: str, stamp: str
    ):
        self.generator, self.sample, self.rows = g, sample, rows
        self.name, self.fingerprint = name, stamp
        self._codes: dict[Path, np.ndarray] = {}

    def generate(self, asks: Sequence[ModelRequest]) -> list[list[Segment]]:
        found: list[list[Segment]] = [[] for _ in asks]
        for index, segments in self.stream(asks):
            found[index] = segments
        return found

    def stream(self, asks: Sequence[ModelRequest]) -> Iterator[tuple[int, list[Segment]]]:
        """All of one mode and bound, as the loop asks."""
        if not asks:
            return
        kinds = {(ask.mode, ask.max_tokens, ask.end_of_turn) for ask in asks}
        if len(kinds) > 1:
            raise ValueError(f"asks of {sorted(kinds)} at once; ask for one kind at a time")
        ((mode, most, ends),) = kinds
        most = min(most, self.sample.max_gen_len)
        yield from api.as_completed(
            self.generator,
            [self._parts(ask) for ask in self._seen(asks)],
            dataclasses.replace(self.sample, max_gen_len=most),
            mode=mode,
            seed=self.sample.seed,
            names=[ask.id for ask in asks],
            end_of_turn=ends,
            rows=self.rows if mode == "text" else max(1, self.rows // SLOTS_PER_GUIDED_IMAGE),
        )

    def score_options(
        self, asks: Sequence[ModelRequest], options: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Natural logarithms of how likely each option's words are after its prompt."""
        prompts = [self._parts(ask) for ask in self._seen(asks)]
        ends = {ask.end_of_turn for ask in asks}
        if len(ends) > 1:
            raise ValueError("asks with and without an end of turn at once; score one kind a time")
        found = api.score(
            self.generator, prompts, options, end_of_turn=ends != {False}, rows=self.rows
        )
        return [[score.total for score in scores] for scores in found]

    def _seen(self, asks: Sequence[ModelRequest]) -> Sequence[ModelRequest]:
        """The asks, with every picture's codes at hand."""
        shown = [part for ask in asks for part in ask.parts if isinstance(part, Path)]
        new = [path for path in dict.fromkeys(shown) if path not in self._codes]
        codes = model_bundle.encode(self.generator, new)
        self._codes |= dict(zip(new, codes, strict=True))
        return asks

    def _parts(self, ask: ModelRequest) -> list[PromptPart]:
        return [self._codes[part] if isinstance(part, Path) else part for part in ask.parts]


def split_segments(
    segments: Sequence[Segment], *, where: str
) -> tuple[list[str], list[PIL.Image.Image], list[np.ndarray | None]]:
    """The words, the pictures, and the pictures' codes where the model tells them."""
    if isinstance(segments, str | PIL.Image.Image | Text | Image):
        segments = [segments]
    texts, pictures, codes = [], [], []
    for part in segments:
        match part:
            case str():
                texts.append(part)
            case Text():
                texts.append(part.text)
            case Image():
                pictures.append(part.image)
                codes.append(part.codes)
            case PIL.Image.Image():
                pictures.append(part)
                codes.append(None)
            case _:
                raise ValueError(
                    f"{where}: a segment is a {type(part).__name__}; use str or PIL.Image"
                )
    return texts, pictures, codes
