"""Answer questions about images: with a model folder in the generation engine, or at an endpoint.

    samples   k sampled answers of each prompt; an unusable one, as one that is cut off, is None
    choose    which of some texts is the answer: the engine compares their log-likelihoods per
              token; an endpoint, which has none, answers at temperature 0, and the text that
              agrees most with its reply is chosen

Each call is over many prompts of one kind. A result is None as a whole where an endpoint did not
reply this time; the question is then asked again by the next run.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.checkpoints import export
from medmax_jax.config import Sample
from medmax_jax.configs.sampling import SETS
from medmax_jax.data.annotation.filters import nearest
from medmax_jax.data.annotation.kinds import KINDS
from medmax_jax.data.annotation.questions import Question
from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import Endpoint, TransientError, image_part, text_part
from medmax_jax.generation import api, model_bundle
from medmax_jax.models.vocab import EOS
from medmax_jax.storage.folder import file_sha256

ADAPTER = "adapter.safetensors"
TOO_LONG = "too long"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A question about an image. `name`: unique, determines what is sampled."""

    name: str
    question: Question
    text: str
    image_first: bool
    codes: np.ndarray
    png: Callable[[], bytes]  # of the image's file, read only if it is sent to an endpoint
    credential: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The number of the chosen text, None: none of them, and the log-likelihoods if there are any.

    `pick` is TOO_LONG where the prompt and a text do not fit in the context.
    """

    pick: int | None | str
    likelihoods: tuple[float, ...] = ()


def _digest(*facts: str) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class EngineGenerator:
    """Answers with a model folder and an adapter."""

    last_error = ""  # it has an answer to every prompt

    def __init__(
        self, folder: Path, adapter: Path | None, *, rows: int, temperature: float, seed: int
    ):
        weights = model_bundle.adapter_folder(adapter) / ADAPTER if adapter else None
        adapter_digest = file_sha256(weights) if weights else ""
        self.digest = _digest(export.base_fingerprint(folder), adapter_digest)
        self.bundle = model_bundle.load(folder, adapter=adapter)
        self._rows, self._temperature, self._seed = rows, temperature, seed

    def samples(self, prompts: Sequence[Prompt], count: int) -> list[list[str | None]]:
        """Return `count` sampled answers of each prompt."""
        g, kind = self.bundle, KINDS[prompts[0].question.kind]
        changes = dict(
            text_greedy=False, text_temperature=self._temperature,
            repetition_penalty=1.0, max_gen_len=kind.max_tokens, budget="answer",
        )  # fmt: skip
        sample = Sample(**(SETS["medmax_eval"] | changes))
        tokens = self._tokens(prompts)
        answers: list[list[str | None]] = [[None] * count for _ in prompts]
        fitting = [n for n, t in enumerate(tokens) if len(t) + kind.max_tokens <= self._context]
        jobs = [(n, k) for n in fitting for k in range(count)]
        for done, outputs in api.generate_tokens(
            g,
            [tokens[n] for n, _ in jobs],
            sample,
            mode="text",
            seed=self._seed,
            names=[f"{prompts[n].name}/{k}" for n, k in jobs],
            batch_size=self._rows,
        ):
            for job, ids in zip(done, outputs, strict=True):
                n, k = jobs[job]
                if len(ids) and ids[-1] == EOS:  # else it was cut off at the bound
                    answers[n][k] = g.tokenizer.decode(ids)
        return answers

    def choose(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
    ) -> list[Choice | None]:
        """Return the choice of one of the texts of each prompt."""
        encode = self.bundle.tokenizer.encode
        longest = [max(len(encode(text)) for text in own) for own in texts]
        lengths = [len(t) + n for t, n in zip(self._tokens(prompts), longest, strict=True)]
        fitting = [n for n, length in enumerate(lengths) if length <= self._context]
        choices: list[Choice | None] = [Choice(pick=TOO_LONG)] * len(prompts)
        scores = api.score(
            self.bundle,
            [_parts(prompts[n]) for n in fitting],
            [texts[n] for n in fitting],
            batch_size=self._rows,
        )
        for n, own in zip(fitting, scores, strict=True):
            means = tuple(round(score.mean, 6) for score in own)
            choices[n] = Choice(pick=int(np.argmax(means)), likelihoods=means)
        return choices

    @property
    def _context(self) -> int:
        return self.bundle.config.context_length

    def _tokens(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        return model_bundle.prompt_tokens(self.bundle, list(map(_parts, prompts)), end_of_turn=True)


def _parts(prompt: Prompt) -> list[np.ndarray | str]:
    return [prompt.codes, prompt.text] if prompt.image_first else [prompt.text, prompt.codes]


class EndpointGenerator:
    """Answers at an OpenAI-compatible endpoint, through a cache that no call repeats.

    Samples of a question differ by the parameter `seed`, which the endpoint must support.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: cached_chat_api.Cache,
        *,
        concurrency: int,
        temperature: float,
        seed: int,
        stopped: Callable[[], bool],
    ):
        self.digest = _digest(endpoint.url, endpoint.model)
        self._endpoint, self._cache, self._concurrency = endpoint, cache, concurrency
        self._temperature, self._seed, self._stopped = temperature, seed, stopped
        self.last_error = ""

    def samples(self, prompts: Sequence[Prompt], count: int) -> list[list[str | None] | None]:
        """Return `count` sampled answers of each prompt; None where one had no reply."""
        by_sample = [
            self._complete(prompts, dict(temperature=self._temperature, seed=self._seed + k))
            for k in range(count)
        ]
        columns = zip(*by_sample, strict=True)
        return [None if False in column else list(column) for column in columns]

    def choose(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
    ) -> list[Choice | None]:
        """Return the choice of one of the texts of each prompt; None where there was no reply."""
        replies = self._complete(prompts, dict(temperature=0, seed=self._seed))
        return [
            None if reply is False else Choice(pick=nearest(prompt.question, reply, own))
            for prompt, reply, own in zip(prompts, replies, texts, strict=True)
        ]

    def _complete(self, prompts: Sequence[Prompt], parameters: dict[str, Any]) -> list[Any]:
        """Return the text of each reply, None of an unusable one, False where there was none."""
        bound = dict(max_tokens=KINDS[prompts[0].question.kind].max_tokens) | parameters
        endpoint = dataclasses.replace(
            self._endpoint, parameters=bound | dict(self._endpoint.parameters)
        )
        results: list[Any] = [False] * len(prompts)
        requests = (_request(prompt, str(n)) for n, prompt in enumerate(prompts))
        for request, reply in cached_chat_api.complete_all(
            endpoint, requests, self._cache, concurrency=self._concurrency, stopped=self._stopped
        ):
            if isinstance(reply, TransientError):
                secret = request.data_class == egress.CREDENTIALED
                self.last_error = "no reply from the endpoint" if secret else str(reply)
            else:
                results[int(request.id)] = None if reply.problem else reply.text
        return results


def _request(prompt: Prompt, name: str) -> cached_chat_api.ChatRequest:
    text = "\n".join(filter(None, [prompt.text, KINDS[prompt.question.kind].request]))
    parts = [image_part(prompt.png()), text_part(text)]
    return cached_chat_api.ChatRequest(
        id=name,
        messages=[{"role": "user", "content": parts if prompt.image_first else parts[::-1]}],
        data_class=egress.class_of_credential(prompt.credential),
    )
