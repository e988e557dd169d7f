"""Run requests of the page through the engine service, and collect what they answer.

answers(service, [request of the base, request with the adapter])
->  (("a",), ()), (("a CT",), ("a",)), ...     what each has answered so far
"""

import dataclasses
import functools
import queue
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from medmax_jax.config import Sample
from medmax_jax.demo import markup
from medmax_jax.generation import api
from medmax_jax.serving.service import Service
from medmax_jax.serving.tickets import (
    CANCELLED,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ImageDone,
    TextDelta,
    Ticket,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ShownImage:
    """An image of a conversation, and its codes where it was generated."""

    image: PIL.Image.Image
    codes: np.ndarray | None = None

    @functools.cached_property
    def figure(self) -> str:
        """Return the image as HTML; each part of an answer shows the conversation again."""
        generated = self.codes is not None
        caption = "generated" if generated else "your image"
        return markup.figures([(self.image, caption)], generated=generated)


@dataclasses.dataclass(frozen=True)
class Note:
    """A remark about an answer that is not a part of it."""

    text: str


Part = str | ShownImage | Note
Turn = tuple[Part, ...]


def make_sample(*, temperature: float, max_tokens: int, seed: int, guidance: float = 3.0) -> Sample:
    """Return MedMax's evaluation settings with those of the page; temperature 0 is greedy."""
    greedy = temperature == 0
    return dataclasses.replace(
        api.defaults("medmax_eval"),
        text_greedy=greedy,
        text_temperature=1.0 if greedy else float(temperature),
        max_gen_len=int(max_tokens),
        guidance_scale_text=float(guidance),
        seed=int(seed),
    )


def prompt(service: Service, turns: Sequence[Turn]) -> np.ndarray:
    """Return the tokens of a conversation; an image that was generated is not encoded again."""
    return service.prompt(
        [[_content(part) for part in turn if not isinstance(part, Note)] for turn in turns]
    )


def text_of(turn: Turn) -> str:
    """Return the text of an answer, with remarks about it."""
    pieces = [part if isinstance(part, str) else part.text for part in turn if _has_text(part)]
    return "\n".join(pieces)


def answers(
    service: Service, requests: Sequence[GenerationRequest], running: list[Ticket] | None = None
) -> Iterator[tuple[Turn, ...]]:
    """Yield what each request has answered so far, whenever there is more.

    The requests run at the same time, and are cancelled where the iterator is closed early. A
    failure is a Note in what is incomplete. `running` has the tickets until all have ended, for
    another thread that cancels them. Raises the errors of `Service.submit`.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    tickets: list[Ticket] = [] if running is None else running
    so_far: list[Turn] = [()] * len(requests)
    left = len(requests)
    try:
        for index, request in enumerate(requests):
            put = lambda event, index=index: events.put((index, event))  # noqa: E731
            tickets.append(service.submit(request, put))
        while left:
            index, event = events.get()
            left -= isinstance(event, Finished | Failed)
            so_far[index] = _extended(so_far[index], event)
            yield tuple(so_far)
    finally:
        for ticket in tickets:
            ticket.cancel()
        tickets.clear()


def _has_text(part: Part) -> bool:
    return isinstance(part, str | Note)


def _content(part: str | ShownImage) -> Any:
    if isinstance(part, str):
        return part
    return part.image if part.codes is None else part.codes


def _extended(turn: Turn, event: Event) -> Turn:
    if isinstance(event, ImageDone):
        return (*turn, ShownImage(event.image, event.codes))
    if isinstance(event, TextDelta):
        if turn and isinstance(turn[-1], str):
            return (*turn[:-1], turn[-1] + event.text)
        return (*turn, event.text)
    if isinstance(event, Failed):
        stopped = event.kind == CANCELLED
        return (*turn, Note("(stopped)" if stopped else f"(incomplete: {event.message})"))
    if isinstance(event, Finished) and event.reason == "length":
        return (*turn, Note("(stopped at the limit of tokens)"))
    if isinstance(event, Finished) and not turn:
        return (Note("(no text)"),)
    return turn
