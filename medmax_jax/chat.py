"""A conversation: each turn is read and written behind the earlier ones, which stay in the cache.

BOS  q1 SEP  a1 SEP  q2 SEP  a2          as documents of several turns in training

chat = Chat(g, sample, mode="text", seed=0)
chat.say([picture, "Is it a CT?"])  ->  [Text("yes")]
chat.say(["Of which organ?"])       ->  [Text("the chest")]        the picture is not read again
"""

from collections.abc import Iterator, Sequence

import numpy as np

from medmax_jax import batching, engine, grammar, serving
from medmax_jax import vocab as ids
from medmax_jax.answers import Telling
from medmax_jax.batching import GenerateError
from medmax_jax.config import Sample
from medmax_jax.generator import Generator, Image, Part, Text, prompt_tokens, segments


class Chat:
    """One conversation, with a cache of its own."""

    def __init__(
        self, g: Generator, sample: Sample, *, mode: str, seed: int, kind: str = "model"
    ) -> None:
        grammar.check_mode(mode)
        self._g, self._sample, self._mode, self._seed = g, sample, mode, seed
        self.tokens = np.array([ids.BOS], np.int32)  # all turns so far
        streams = 1 if mode == "text" else 1 + sum(batching.guided(sample))
        self.engine = engine.make(
            g.model,
            g.vocab,
            g.mesh,
            codes=g.vq_config.codes_per_image,
            rows=1,
            lanes=streams + 1,  # an image's streams must not drive the conversation out
            slots=g.config.context_length,
            kind=kind,
            barred=g.tokenizer.barred,
        )

    def say(self, parts: Sequence[Part]) -> list[Text | Image]:
        """The answer to one more turn."""
        for _ in self.pieces(parts):
            pass
        return segments(self._g, [self._answer])[0]

    def pieces(self, parts: Sequence[Part]) -> Iterator[Text | Image]:
        """The answer as it comes; of a turn left in the middle the words and whole images count."""
        g, codes = self._g, self._g.vq_config.codes_per_image
        asked = prompt_tokens(g, [parts], end_of_turn=True)[0]
        prompt = np.concatenate([self.tokens, asked[1:]])
        (request,) = batching.requests(
            [prompt], self._sample, g.vocab, mode=self._mode, names=None, codes=codes,
            context=g.config.context_length,
        )  # fmt: skip
        told, self._answer = Telling(), prompt[:0]
        fixed = dict(mode=self._mode, seed=self._seed)
        for news in serving.serve(self.engine, [request], self._sample, **fixed):
            for each in news:
                self._answer = each.tokens
                self._keep(request.tokens, each.tokens)
                yield from told.more(g, each.tokens, each.done)

    def _keep(self, prompt: np.ndarray, written: np.ndarray) -> None:
        """The conversation with this answer, closed as training closes a turn: by SEP."""
        tokens = np.append(prompt, written[written != ids.EOS])
        opened = np.flatnonzero(tokens == ids.BOI)
        if opened.size and ids.EOI not in tokens[opened[-1] :]:
            whole = len(tokens) - 1 - opened[-1] == self._g.vq_config.codes_per_image
            tokens = np.append(tokens, ids.EOI) if whole else tokens[: opened[-1]]
        self.tokens = np.append(tokens, ids.SEP).astype(np.int32)


__all__ = ["Chat", "GenerateError"]
