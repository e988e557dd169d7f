"""Turns the tokens of one answer into events, up to a stop text.

stop ("\\n\\n",)      tokens so far   "A CT.\\n"   ->   TextDelta("A CT.")
                                    "A CT.\\n\\nQ"  ->   end: the answer is "A CT."
"""

from collections.abc import Iterator

import numpy as np

from medmax_jax.generation.model_bundle import IncrementalDetokenizer, ModelBundle, Text
from medmax_jax.models import vocab as ids
from medmax_jax.serving.tickets import ImageDone, TextDelta, TokenLogprob


class AnswerEvents:
    """The events of one answer; `stopped` is true once a stop text was generated."""

    def __init__(self, g: ModelBundle, stop: tuple[str, ...]) -> None:
        """Create it for a model; no stop text is empty."""
        self.stopped = False
        self._g, self._stop = g, stop
        self._detokenizer = IncrementalDetokenizer()
        self._held = ""  # generated, but it may be the beginning of a stop text
        self._characters = 0  # of text that were yielded

    @property
    def stopped_length(self) -> int | None:
        """Return the characters of an answer that a stop text has ended; None for another one."""
        return self._characters if self.stopped else None

    def update(self, tokens: np.ndarray, done: bool) -> Iterator[TextDelta | ImageDone]:
        """Yield what is new in `tokens`, the complete answer so far."""
        for part in self._detokenizer.update(self._g, tokens, done):
            if self.stopped:
                return
            if isinstance(part, Text):
                yield from self._text(part.text)
            else:
                yield from self._flush()
                yield ImageDone(part.image, part.codes)
        if done and not self.stopped:
            yield from self._flush()

    def _text(self, text: str) -> Iterator[TextDelta]:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)]
            yield from self._flush()
            return
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        rest = self._held[len(ready) :]
        self._held = ready
        yield from self._flush()
        self._held = rest

    def _flush(self) -> Iterator[TextDelta]:
        text, self._held = self._held, ""
        self._characters += len(text)
        if text:
            yield TextDelta(text)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text are the beginning of the stop text."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def token_logprobs(
    g: ModelBundle, tokens: np.ndarray, likelihoods: np.ndarray, text_length: int | None
) -> tuple[TokenLogprob, ...]:
    """Return the text tokens of an answer with likelihoods.

    text_length: characters of the answer, where a stop text ended it; None: all tokens.
    """
    found: list[TokenLogprob] = []
    text: list[int] = []
    for token, logprob in zip(tokens.tolist(), likelihoods.tolist(), strict=True):
        if ids.is_image(np.asarray(token), g.vocab) or token in (ids.BOI, ids.EOI, ids.EOS):
            continue
        if text_length is not None and len(g.tokenizer.decode(text)) >= text_length:
            break
        text.append(token)
        found.append(TokenLogprob(g.tokenizer.decode([token]), logprob))
    return tuple(found)
