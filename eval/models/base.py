"""Defines the model interface: any object with `generate(requests)`, one result per request.

    ModelRequest(id, parts, mode, max_tokens, data_class)  ->  [Text("yes")] or ["yes"], [PIL.Image]

A model may also have

    stream(requests)                   (index, segments) as they complete, in any order
    score_options(requests, options)   log-likelihoods of each option's text, one list per request
    name, fingerprint                  its name in records and pages; default: its class
    modes                              of answers that it can write; default: all of
                                       ModelRequest.mode

`NativeModel` runs a model folder of this project in the generation engine.
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

ModalityClassifier = Callable[
    [np.ndarray, np.ndarray], str
]  # (codes, pixels) of a generated image -> modality

SLOTS_PER_GUIDED_IMAGE = 3  # KV-cache slots of an image: full, image-only, unconditional
Segment = str | PIL.Image.Image | Text | Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """Describes one request to a model. `parts`: image files and text, in order.

    mode: text, image or mixed, what may be generated. max_tokens: of text. data_class: the class of
    data that a guard checks before it leaves the machine, see medmax_jax/endpoints/egress.py.
    end_of_turn: after the parts, as in fine-tuning; a base model continues from the last token.
    """

    id: str
    parts: tuple[Path | str, ...]
    mode: str
    max_tokens: int
    data_class: str
    end_of_turn: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailedResponse:
    """Takes the place of segments where the model refused and a retry would not help."""

    why: str


def last_error(model: object) -> str:
    """Return why a model left requests unanswered, for the end of a sentence."""
    reason = getattr(model, "last_error", "")
    return f" ({reason})" if reason else ""


class Model(Protocol):
    """Defines the minimal interface that can be evaluated."""

    def generate(self, requests: list[ModelRequest]) -> Sequence[Sequence[Segment]]: ...


class NativeModel:
    """Runs a model folder in memory; each image is encoded once for all of its requests.

    rows: text answers at a time. Images take up to three KV-cache slots each during generation, so
    a third as many images run at a time.
    """

    def __init__(
        self,
        bundle: model_bundle.ModelBundle,
        sample: Sample,
        *,
        rows: int,
        name: str,
        fingerprint: str,
    ):
        self.generator, self.sample, self.rows = bundle, sample, rows
        self.name, self.fingerprint = name, fingerprint
        self._codes: dict[Path, np.ndarray] = {}

    def generate(self, requests: Sequence[ModelRequest]) -> list[list[Segment]]:
        answers: list[list[Segment]] = [[] for _ in requests]
        for index, segments in self.stream(requests):
            answers[index] = segments
        return answers

    def stream(self, requests: Sequence[ModelRequest]) -> Iterator[tuple[int, list[Segment]]]:
        """Yield (index, segments) of requests of one mode and bound, as the caller groups them."""
        if not requests:
            return
        request_kinds = {
            (request.mode, request.max_tokens, request.end_of_turn) for request in requests
        }
        if len(request_kinds) > 1:
            raise ValueError(
                f"requests differ in (mode, max_tokens, end_of_turn): {sorted(request_kinds)}; "
                "pass requests of one kind per call"
            )
        ((mode, max_tokens, ends),) = request_kinds
        max_tokens = min(max_tokens, self.sample.max_gen_len)
        yield from api.as_completed(
            self.generator,
            [self._parts(request) for request in self._encode_images(requests)],
            dataclasses.replace(self.sample, max_gen_len=max_tokens),
            mode=mode,
            seed=self.sample.seed,
            names=[request.id for request in requests],
            end_of_turn=ends,
            batch_size=self.rows if mode == "text" else max(1, self.rows // SLOTS_PER_GUIDED_IMAGE),
        )

    def score_options(
        self, requests: Sequence[ModelRequest], options: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Return the natural log-likelihood of each option's text after its prompt."""
        prompts = [self._parts(request) for request in self._encode_images(requests)]
        ends = {request.end_of_turn for request in requests}
        if len(ends) > 1:
            raise ValueError("requests differ in end_of_turn; pass requests of one kind per call")
        scores_by_request = api.score(
            self.generator, prompts, options, end_of_turn=ends != {False}, batch_size=self.rows
        )
        return [[score.total for score in scores] for scores in scores_by_request]

    def _encode_images(self, requests: Sequence[ModelRequest]) -> Sequence[ModelRequest]:
        """Return the requests after the codes of all their images are computed."""
        paths = [part for request in requests for part in request.parts if isinstance(part, Path)]
        new = [path for path in dict.fromkeys(paths) if path not in self._codes]
        codes = model_bundle.encode(self.generator, new)
        self._codes |= dict(zip(new, codes, strict=True))
        return requests

    def _parts(self, request: ModelRequest) -> list[PromptPart]:
        return [self._codes[part] if isinstance(part, Path) else part for part in request.parts]


def split_segments(
    segments: Sequence[Segment], *, where: str
) -> tuple[list[str], list[PIL.Image.Image], list[np.ndarray | None]]:
    """Return the texts, the images, and the images' codes where the model provides them."""
    if isinstance(segments, str | PIL.Image.Image | Text | Image):
        segments = [segments]
    texts, image_list, codes = [], [], []
    for part in segments:
        match part:
            case str():
                texts.append(part)
            case Text():
                texts.append(part.text)
            case Image():
                image_list.append(part.image)
                codes.append(part.codes)
            case PIL.Image.Image():
                image_list.append(part)
                codes.append(None)
            case _:
                raise ValueError(
                    f"{where}: a segment is a {type(part).__name__}; use str or PIL.Image"
                )
    return texts, image_list, codes
