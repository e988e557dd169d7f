"""Requests to the engine service, and the events that answer them.

ticket = service.submit(GenerationRequest(...))
for event in ticket:        TextDelta, ImageDone, ..., then exactly one Finished or Failed
    ...                     ticket.cancel() ends it early: Failed("cancelled")
"""

import dataclasses
import queue
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image

from medmax_jax.config import Sample

# Kinds of failures: Failed.kind.
CANCELLED, TIME, ENGINE, CLOSED = "cancelled", "time", "engine", "closed"


class ServiceError(RuntimeError):
    """Raised where the service accepts no request now; the message states when it will."""


class QueueFullError(ServiceError):
    """Raised where too many requests wait; `retry_after_s`: when a place may be free."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        """Store the message and the seconds to wait."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceClosedError(ServiceError):
    """Raised where the service finishes what runs and accepts nothing new."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GenerationRequest:
    """One answer to generate."""

    model: str  # a name that the service serves
    prompt: np.ndarray  # token ids, of `Service.prompt`
    sample: Sample  # its seed is the seed of the request
    mode: str  # text, image or mixed
    name: str = ""  # of the sample; random numbers derive from seed and name; "": a digest
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """The next part of the text."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDone:
    """A complete image, and the codes that it was decoded from."""

    image: PIL.Image.Image
    codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A text token of the answer and its log-likelihood over the full vocabulary.

    It is that of the model, before penalties, temperature and top-p.
    """

    token: str
    logprob: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a complete answer."""

    reason: str  # "stop": EOS, a stop text, or the image of image mode; "length": a limit
    prompt_tokens: int
    completion_tokens: int  # as generated: also those after a stop text
    logprobs: tuple[TokenLogprob, ...] | None  # None: not requested


@dataclasses.dataclass(frozen=True)
class Failed:
    """The end of an answer that is incomplete."""

    kind: str  # CANCELLED, TIME, ENGINE or CLOSED
    message: str


Event = TextDelta | ImageDone | Finished | Failed


class Ticket:
    """An accepted request; iterate over it for its events, in any thread."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        deliver: Callable[[Event], None] | None,
        cancel: Callable[["Ticket"], None],
    ) -> None:
        """Create a ticket; see `Service.submit` for `deliver`."""
        self.index, self.request = index, request
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.deliver = deliver or self._events.put
        self._cancel = cancel

    def cancel(self) -> None:
        """End the request at the next chunk; its row and slots are free then."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Event]:
        """Yield the events up to Finished or Failed; not after `submit` with `deliver`."""
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return
