"""Generate text and images from prompts of text and images; the Python API.

g = load(folder, adapter=...)
generate(g, [[image, "A CT?"], ["An MRI?"]], sample, mode="text", seed=0)  ->  [[Text], [Text]]

    mode    generates                                          stops at
    text    text                                               EOS, max_gen_len, full context
    image   exactly one image                                  its last code
    mixed   text, and images where the model opens them        as text; an image is never truncated

A prompt is encoded as BOS, its parts in order, and SEP, as in MedMax's fine-tuning. What is sampled
for a prompt depends on the prompt, the settings, `seed` and the name of its sample only, not on the
other prompts of the batch; without names, equal prompts are numbered. `sample` is a config.Sample;
`defaults` returns the settings of the released programs (Meta's and MedMax's) by name.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from medmax_jax.config import Sample
from medmax_jax.configs.sampling import SETS
from medmax_jax.generation import buckets, engine, sampling_params, scheduler
from medmax_jax.generation import requests as prompt_requests
from medmax_jax.generation.model_bundle import (
    Image,
    IncrementalDetokenizer,
    ModelBundle,
    PromptPart,
    Text,
    check_decoder,
    decode_segments,
    prompt_tokens,
)
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import vocab as ids
from medmax_jax.models.tokenizer import prompt_ids

Prompts = Sequence[Sequence[PromptPart]]


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-likelihood of an option after its prompt, in natural logarithms."""

    total: float
    tokens: int
    greedy: bool  # each of its tokens is the most likely one of the vocabulary
    by_token: tuple[float, ...] = dataclasses.field(compare=False)  # the terms of the total

    @property
    def mean(self) -> float:
        """Return the log-likelihood per token, which compares options of different lengths."""
        return self.total / self.tokens


def defaults(name: str) -> Sample:
    """Return the sampling settings of a released program: meta, medmax or medmax_eval."""
    if name not in SETS:
        raise GenerateError(
            f"no sampling settings have the name {name!r}; use one of {', '.join(SETS)}"
        )
    return Sample(**SETS[name])


def generate(
    g: ModelBundle,
    prompts: Prompts,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    batch_size: int = 32,
    cache_dtype: str = "model",
) -> list[list[Text | Image]]:
    """Return the answers, in the order of the prompts; see `as_completed` for the arguments."""
    answers: list[list[Text | Image]] = [[] for _ in prompts]
    for index, answer in as_completed(
        g, prompts, sample, mode=mode, seed=seed, names=names, end_of_turn=end_of_turn,
        batch_size=batch_size, cache_dtype=cache_dtype,
    ):  # fmt: skip
        answers[index] = answer
    return answers


def as_completed(
    g: ModelBundle,
    prompts: Prompts,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    batch_size: int = 32,
    cache_dtype: str = "model",
) -> Iterator[tuple[int, list[Text | Image]]]:
    """Yield (index of the prompt, answer) in order of completion.

    Args:
        g: the model, its tokenizer and its VQGAN.
        prompts: the parts of each prompt.
        sample: the sampling settings.
        mode: "text", "image" or "mixed".
        seed: the seed of all samples.
        names: the ids of the samples, from which their random numbers are derived. None: a digest
            of the prompt and, for the second of two equal prompts, its count.
        end_of_turn: False passes the parts without SEP, for a base model.
        batch_size: the largest number of answers that are generated at once.
        cache_dtype: the KV-cache dtype, "model" or "int8".
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    for batch, answers in generate_tokens(
        g, tokens, sample, mode=mode, seed=seed, names=names, batch_size=batch_size,
        cache_dtype=cache_dtype,
    ):  # fmt: skip
        yield from zip(batch, decode_segments(g, answers), strict=True)


def stream_chunks(
    g: ModelBundle,
    prompts: Prompts,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    batch_size: int = 32,
    cache_dtype: str = "model",
) -> Iterator[tuple[int, Text | Image | None]]:
    """Yield (index, text as it is generated, or a complete image); (index, None) ends an answer.

    The concatenated text of an answer equals that of `generate`. A character is yielded only when
    all of its bytes are complete. See `as_completed` for the arguments.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    detokenizers = [IncrementalDetokenizer() for _ in prompts]
    for outputs in _run_requests(
        g, tokens, sample, mode=mode, seed=seed, names=names, batch_size=batch_size,
        cache_dtype=cache_dtype,
    ):  # fmt: skip
        for output in outputs:
            for part in detokenizers[output.index].update(g, output.tokens, output.done):
                yield output.index, part
            if output.done:
                yield output.index, None


def generate_tokens(
    g: ModelBundle,
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None,
    batch_size: int,
    cache_dtype: str = "model",
) -> Iterator[tuple[list[int], list[Int[np.ndarray, "_"]]]]:
    """Yield (indices, tokens including EOS) of the requests that finish; prompts are token ids."""
    for outputs in _run_requests(
        g, prompts, sample, mode=mode, seed=seed, names=names, batch_size=batch_size,
        cache_dtype=cache_dtype,
    ):  # fmt: skip
        done = [output for output in outputs if output.done]
        if done:
            yield [output.index for output in done], [output.tokens for output in done]


def score(
    g: ModelBundle,
    prompts: Prompts,
    options: Sequence[Sequence[str]],
    *,
    end_of_turn: bool = True,
    batch_size: int = 32,
    cache_dtype: str = "model",
) -> list[list[Score]]:
    """Return the likelihood of each option of each prompt as its continuation; nothing is sampled.

    The text of an option is tokenized separately, as an answer is in training.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    if len(options) != len(prompts):
        raise GenerateError(f"{len(prompts)} prompts but {len(options)} lists of options")
    encoded = [encode_options(g, texts, f"prompt {index}") for index, texts in enumerate(options)]
    context, codes, longest = g.config.context_length, g.vq_config.codes_per_image, 0
    for index, (prompt, of_prompt) in enumerate(zip(tokens, encoded, strict=True)):
        where = f"prompt {index}"
        prompt_requests.check_prompt(prompt, g.vocab, codes=codes, where=where)
        longest = max(longest, len(prompt) + max(map(len, of_prompt)))
        if longest > context:
            raise GenerateError(
                f"{where} and an option have {longest} tokens, but the context of the model has "
                f"{context}; shorten them"
            )
    if not tokens:
        return []
    count = buckets.batch_size_for(len(tokens), batch_size)
    sizes = engine.EngineSizes(
        batch_size=count,
        num_slots=count,
        cache_length=min(buckets.round_cache_length(longest), context),
        cache_dtype=cache_dtype,
    )
    e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes)
    return [
        [make_score(likelihoods, best) for likelihoods, best in of_prompt]
        for of_prompt in engine.score_options(e, tokens, encoded)
    ]


def make_score(likelihoods: Float[np.ndarray, "_"], best: Bool[np.ndarray, "_"]) -> Score:
    """Return the score of an option from what the engine returns for its tokens."""
    return Score(
        total=float(likelihoods.sum()),
        tokens=len(likelihoods),
        greedy=bool(best.all()),
        by_token=tuple(likelihoods.tolist()),
    )


def encode_options(
    g: ModelBundle, options: Sequence[str], where: str
) -> list[Int[np.ndarray, "_"]]:
    """Return the token ids of each option.

    Raises GenerateError, or TokenizerError where an option is not text only.
    """
    if isinstance(options, str):
        raise GenerateError(f"the options of {where} are {options!r}; pass a list of texts")
    for option in options:
        prompt_requests.check_text(option, where=f"an option of {where}")
    encoded = [prompt_ids(g.tokenizer, [option], g.vocab, False)[1:] for option in options]
    if not encoded or not all(map(len, encoded)):
        raise GenerateError(f"{where} has no options, or an empty one; each option requires text")
    return encoded


def _run_requests(
    g: ModelBundle,
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None,
    batch_size: int,
    cache_dtype: str,
) -> Iterator[list[scheduler.RequestOutput]]:
    """Create an engine that is large enough for these requests and yield its output per chunk."""
    codes, context = g.vq_config.codes_per_image, g.config.context_length
    settings = _resolve(g, sample, mode=mode, seed=seed)
    if mode != "text":
        check_decoder(g)
    requests = prompt_requests.make_requests(
        prompts, sample, g.vocab, mode=mode, names=names, codes=codes, context=context
    )
    count = buckets.batch_size_for(len(requests), batch_size)
    if not requests:
        return
    longest = max(len(request.tokens) for request in requests)
    streams = 1 + sampling_params.guidance_streams_needed(requests, settings)
    sizes = engine.EngineSizes(
        batch_size=count,
        num_slots=streams * count,
        cache_length=buckets.cache_length_for(
            longest, sample, mode=mode, codes=codes, context=context
        ),
        cache_dtype=cache_dtype,
    )
    e = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes)
    yield from scheduler.run_requests(e, requests, settings, seed)


def _resolve(
    g: ModelBundle, sample: Sample, *, mode: str, seed: int
) -> sampling_params.DecodeSettings:
    """Return the settings of the decode loop; raise GenerateError before anything is allocated."""
    sampling_params.check_seed(seed)
    return sampling_params.resolve(
        sample, g.vocab, mode=mode, codes=g.vq_config.codes_per_image, barred=g.tokenizer.barred
    )


# ---- chat ----
#
# A conversation: each turn is processed after the earlier ones, which stay in the KV cache.
#
# BOS  q1 SEP  a1 SEP  q2 SEP  a2          as documents of several turns in training
#
# chat = Chat(g, sample, mode="text", seed=0)
# chat.send([image, "Is it a CT?"])   ->  [Text("yes")]
# chat.send(["Of which organ?"])      ->  [Text("the chest")]     the image is not processed again


class Chat:
    """A conversation with its own KV cache."""

    def __init__(
        self, g: ModelBundle, sample: Sample, *, mode: str, seed: int, cache_dtype: str = "model"
    ) -> None:
        self._settings = _resolve(g, sample, mode=mode, seed=seed)
        self._g, self._sample, self._mode, self._seed = g, sample, mode, seed
        self.tokens = np.array([ids.BOS], np.int32)  # all turns so far
        streams = 1 if mode == "text" else 1 + sum(self._settings.guidance)
        sizes = engine.EngineSizes(
            batch_size=1,
            num_slots=streams + 1,  # guidance streams of an image must not evict the conversation
            cache_length=g.config.context_length,
            cache_dtype=cache_dtype,
        )
        codes = g.vq_config.codes_per_image
        self.engine = engine.make_engine(g.model, g.vocab, g.mesh, sizes, codes=codes)

    def send(self, parts: Sequence[PromptPart]) -> list[Text | Image]:
        """Return the answer to one more turn."""
        for _ in self.stream_chunks(parts):
            pass
        return decode_segments(self._g, [self._answer])[0]

    def stream_chunks(self, parts: Sequence[PromptPart]) -> Iterator[Text | Image]:
        """Yield the answer as it is generated.

        If the iterator is closed early, the text and the complete images so far stay in the
        conversation.
        """
        g = self._g
        turn = prompt_tokens(g, [parts], end_of_turn=True)[0]
        prompt = np.concatenate([self.tokens, turn[1:]])
        (request,) = prompt_requests.make_requests(
            [prompt], self._sample, g.vocab, mode=self._mode, names=None,
            codes=g.vq_config.codes_per_image, context=g.config.context_length,
        )  # fmt: skip
        detokenizer, self._answer = IncrementalDetokenizer(), prompt[:0]
        for outputs in scheduler.run_requests(self.engine, [request], self._settings, self._seed):
            for output in outputs:
                self._answer = output.tokens
                self._keep(request.tokens, output.tokens)
                yield from detokenizer.update(g, output.tokens, output.done)

    def _keep(self, prompt: np.ndarray, answer: np.ndarray) -> None:
        """Store the conversation with this answer, closed by SEP as training closes a turn."""
        tokens = np.append(prompt, answer[answer != ids.EOS])
        opened = np.flatnonzero(tokens == ids.BOI)
        if opened.size and ids.EOI not in tokens[opened[-1] :]:
            complete = len(tokens) - 1 - opened[-1] == self._g.vq_config.codes_per_image
            tokens = np.append(tokens, ids.EOI) if complete else tokens[: opened[-1]]
        self.tokens = np.append(tokens, ids.SEP).astype(np.int32)
