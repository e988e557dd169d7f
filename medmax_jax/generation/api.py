"""Generate text and images from prompts of text and images; the Python API.

g = load(folder, adapter=...)
generate(g, [[image, "A CT?"], ["An MRI?"]], sample, mode="text", seed=0)  ->  [[Text], [Text]]

    mode    generates                                          stops at
    text    text                                               EOS, max_gen_len, full context
    image   exactly one image                                  its last code
    mixed   text, and images where the model opens them        as text; an image is never truncated

A prompt is encoded as BOS, its parts in order, and END-OF-TURN, as in MedMax's fine-tuning. What is
sampled for a prompt depends on `seed` and the name of its sample only, not on the other prompts of
the batch. `sample` is a config.Sample; `defaults` returns the settings of the released programs
(Meta's and MedMax's) by name.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from medmax_jax.config import Sample
from medmax_jax.configs.sampling import SETS
from medmax_jax.generation import buckets, engine, grammar, sampling_params, scheduler
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

    @property
    def mean(self) -> float:
        """Return the log-likelihood per token, which compares options of different lengths."""
        return self.total / self.tokens


def defaults(name: str) -> Sample:
    """Return the sampling settings of a released program: meta, medmax or medmax_eval."""
    if name not in SETS:
        raise GenerateError(f"no settings are called {name!r}; use one of {', '.join(SETS)}")
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
    rows: int = 32,
    kind: str = "model",
) -> list[list[Text | Image]]:
    """Return the answers, in the order of the prompts; see `as_completed` for the arguments."""
    found: list[list[Text | Image]] = [[] for _ in prompts]
    request = dict(names=names, end_of_turn=end_of_turn, rows=rows, kind=kind)
    for index, answer in as_completed(g, prompts, sample, mode=mode, seed=seed, **request):
        found[index] = answer
    return found


def as_completed(
    g: ModelBundle,
    prompts: Prompts,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> Iterator[tuple[int, list[Text | Image]]]:
    """Yield (index of the prompt, answer) in order of completion, `rows` in progress at a time.

    Args:
        g: the model, its tokenizer and its VQGAN.
        prompts: the parts of each prompt.
        sample: the sampling settings.
        mode: "text", "image" or "mixed".
        seed: the seed of all samples.
        names: the ids of the samples, from which their random numbers are derived. None: a digest
            of the prompt and, for the second of two equal prompts, its count.
        end_of_turn: False passes the parts without END-OF-TURN, for a base model.
        rows: the largest batch size.
        kind: the KV-cache dtype, "model" or "int8".
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    fixed = dict(mode=mode, seed=seed, names=names, rows=rows, kind=kind)
    for batch, written in generate_tokens(g, tokens, sample, **fixed):
        yield from zip(batch, decode_segments(g, written), strict=True)


def stream_chunks(
    g: ModelBundle,
    prompts: Prompts,
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None = None,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> Iterator[tuple[int, Text | Image | None]]:
    """Yield (index, text as it is generated, or a complete image); (index, None) ends an answer.

    The concatenated text of an answer equals that of `generate`. A character is yielded only when
    all of its bytes are complete. See `as_completed` for the arguments.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    fixed = dict(mode=mode, names=names, rows=rows, kind=kind)
    served = _run_requests(g, tokens, sample, seed=seed, **fixed)
    told = [IncrementalDetokenizer() for _ in prompts]
    for news in served:
        for each in news:
            for part in told[each.index].update(g, each.tokens, each.done):
                yield each.index, part
            if each.done:
                yield each.index, None


def generate_tokens(
    g: ModelBundle,
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    *,
    mode: str,
    seed: int,
    names: Sequence[str] | None,
    rows: int,
    kind: str = "model",
) -> Iterator[tuple[list[int], list[Int[np.ndarray, "_"]]]]:
    """Yield (indices, tokens including EOS) of the requests that finish; prompts are token ids."""
    fixed = dict(mode=mode, names=names, rows=rows, kind=kind)
    for news in _run_requests(g, prompts, sample, seed=seed, **fixed):
        done = [each for each in news if each.done]
        if done:
            yield [each.index for each in done], [each.tokens for each in done]


def score(
    g: ModelBundle,
    prompts: Prompts,
    options: Sequence[Sequence[str]],
    *,
    end_of_turn: bool = True,
    rows: int = 32,
    kind: str = "model",
) -> list[list[Score]]:
    """Return the likelihood of each option of each prompt as its continuation; nothing is sampled.

    The text of an option is tokenized separately, as an answer is in training.
    """
    tokens = prompt_tokens(g, prompts, end_of_turn=end_of_turn)
    if len(options) != len(prompts):
        raise GenerateError(f"{len(prompts)} prompts but {len(options)} lists of options")
    asked = [_options(g, each, f"prompt {index}") for index, each in enumerate(options)]
    context, codes, longest = g.config.context_length, g.vq_config.codes_per_image, 0
    for index, (prompt, each) in enumerate(zip(tokens, asked, strict=True)):
        where = f"prompt {index}"
        prompt_requests.check_prompt(prompt, g.vocab, codes=codes, where=where)
        longest = max(longest, len(prompt) + max(map(len, each)))
        if longest > context:
            raise GenerateError(
                f"{where} and an option have {longest} tokens, the model holds {context}; "
                "shorten them"
            )
    if not tokens:
        return []
    count = buckets.batch_size_for(len(tokens), rows)
    slots = min(buckets.round_cache_length(longest), context)
    e = _engine_for(g, rows=count, lanes=count, slots=slots, kind=kind)
    return [
        [
            Score(total=float(one.sum()), tokens=len(one), greedy=bool(best.all()))
            for one, best in each
        ]
        for each in engine.score_options(e, tokens, asked)
    ]


def _options(g: ModelBundle, options: Sequence[str], where: str) -> list[Int[np.ndarray, "_"]]:
    """Return the token ids of each option.

    Raises GenerateError, or TokenizerError where an option is not text only.
    """
    if isinstance(options, str):
        raise GenerateError(f"the options of {where} are {options!r}; write a list of them")
    for option in options:
        prompt_requests.check_text(option, where=f"an option of {where}")
    found = [prompt_ids(g.tokenizer, [o], g.vocab, False)[1:] for o in options]
    if not found or not all(map(len, found)):
        raise GenerateError(f"{where} has no options, or an empty one; give it words")
    return found


def _run_requests(
    g: ModelBundle, prompts, sample: Sample, *, mode: str, seed: int, names, rows: int, kind: str
) -> Iterator[list[scheduler.RequestOutput]]:
    """Create an engine that is large enough for these requests and yield its output per chunk."""
    sampling_params.sampling_params(sample)  # reject invalid settings before anything is allocated
    if mode != "text":
        check_decoder(g)
    codes, context = g.vq_config.codes_per_image, g.config.context_length
    requests = prompt_requests.make_requests(
        prompts, sample, g.vocab, mode=mode, names=names, codes=codes, context=context
    )
    count = buckets.batch_size_for(len(requests), rows)
    if not requests:
        return
    longest = max(len(request.tokens) for request in requests)
    streams = 1 + sampling_params.guidance_streams_needed(requests, sample, g.vocab, mode=mode)
    slots = buckets.cache_length_for(longest, sample, mode=mode, codes=codes, context=context)
    e = _engine_for(g, rows=count, lanes=streams * count, slots=slots, kind=kind)
    yield from scheduler.run_requests(e, requests, sample, mode=mode, seed=seed)


def _engine_for(g: ModelBundle, *, rows: int, lanes: int, slots: int, kind: str) -> engine.Engine:
    codes = g.vq_config.codes_per_image
    sizes = dict(codes=codes, rows=rows, lanes=lanes, slots=slots, kind=kind)
    sizes["barred"] = g.tokenizer.barred
    return engine.make_engine(g.model, g.vocab, g.mesh, **sizes)


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
        self, g: ModelBundle, sample: Sample, *, mode: str, seed: int, kind: str = "model"
    ) -> None:
        grammar.check_mode(mode)
        self._g, self._sample, self._mode, self._seed = g, sample, mode, seed
        self.tokens = np.array([ids.BOS], np.int32)  # all turns so far
        streams = 1 if mode == "text" else 1 + sum(sampling_params.guidance_scales_active(sample))
        self.engine = engine.make_engine(
            g.model,
            g.vocab,
            g.mesh,
            codes=g.vq_config.codes_per_image,
            rows=1,
            lanes=streams + 1,  # the guidance streams of an image must not evict the conversation
            slots=g.config.context_length,
            kind=kind,
            barred=g.tokenizer.barred,
        )

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
        g, codes = self._g, self._g.vq_config.codes_per_image
        asked = prompt_tokens(g, [parts], end_of_turn=True)[0]
        prompt = np.concatenate([self.tokens, asked[1:]])
        (request,) = prompt_requests.make_requests(
            [prompt], self._sample, g.vocab, mode=self._mode, names=None, codes=codes,
            context=g.config.context_length,
        )  # fmt: skip
        told, self._answer = IncrementalDetokenizer(), prompt[:0]
        fixed = dict(mode=self._mode, seed=self._seed)
        for news in scheduler.run_requests(self.engine, [request], self._sample, **fixed):
            for each in news:
                self._answer = each.tokens
                self._keep(request.tokens, each.tokens)
                yield from told.update(g, each.tokens, each.done)

    def _keep(self, prompt: np.ndarray, written: np.ndarray) -> None:
        """Store the conversation with this answer, closed by SEP as training closes a turn."""
        tokens = np.append(prompt, written[written != ids.EOS])
        opened = np.flatnonzero(tokens == ids.BOI)
        if opened.size and ids.EOI not in tokens[opened[-1] :]:
            whole = len(tokens) - 1 - opened[-1] == self._g.vq_config.codes_per_image
            tokens = np.append(tokens, ids.EOI) if whole else tokens[: opened[-1]]
        self.tokens = np.append(tokens, ids.SEP).astype(np.int32)
