"""The host half of generation: prompts of any length become few shapes, hence few programs.

    prompt of 105 tokens, answer up to 20   ->  slots 128, read in one chunk of 128
    prompt of 700 tokens, answer up to 60   ->  slots 1024, read in three chunks of 256
    27 prompts                              ->  32 rows, five of them idle

Nothing here changes an answer: idle rows and idle tokens write nothing and are seen by nobody.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from medmax_jax import vocab as ids
from medmax_jax.config import Sample, Vocab
from medmax_jax.decoding import Knobs, Plan, Prompt

CHUNKS = (32, 64, 128, 256)  # tokens of a prompt read at once
SLOT_STEPS = (64, 512)  # cache sizes are multiples of these, up to 512 slots and beyond


class GenerateError(ValueError):
    """A request that cannot be served; the message names the prompt or setting and the mend."""


def batches(
    prompts: Sequence[Int[np.ndarray, "_"]], vocab: Vocab, *, mode: str, rows: int
) -> Iterator[tuple[list[int], int]]:
    """(indices of at most `rows` prompts of like length, streams they need).

    Image mode keeps prompts with and without an image apart: the latter need no image-only stream.
    """
    pictured = [bool(ids.is_image(prompt, vocab).any()) for prompt in prompts]
    for kind in (False, True):
        if mode == "image":
            some = [i for i, held in enumerate(pictured) if held == kind]
        else:
            some = [] if kind else list(range(len(prompts)))
        some.sort(key=lambda i: len(prompts[i]))
        streams = {"text": 1, "image": 2 + kind, "mixed": 3}[mode]
        for start in range(0, len(some), rows):
            yield some[start : start + rows], streams


def plan(
    lengths: Sequence[int],
    sample: Sample,
    vocab: Vocab,
    *,
    mode: str,
    streams: int,
    codes: int,
    context: int,
) -> Plan:
    """The program for prompts of these lengths, sizes rounded up."""
    longest = max(lengths)
    room = codes if mode == "image" else 1
    if longest + room > context:
        raise GenerateError(
            f"a prompt has {longest} tokens, its answer needs {room}, the model holds {context}; "
            "shorten the prompt or give fewer images"
        )
    need = {"text": longest + sample.max_gen_len, "mixed": context, "image": longest + codes}[mode]
    step = SLOT_STEPS[need > 512]
    return Plan(
        mode=mode,
        streams=streams,
        slots=min(-(-need // step) * step, context),
        chunk=next((c for c in CHUNKS if c >= longest), CHUNKS[-1]),
        codes=codes,
        context=context,
        vocab=vocab,
        text_greedy=sample.text_greedy,
        image_greedy=sample.image_greedy,
    )


def batch(
    prompts: Sequence[Int[np.ndarray, "_"]],
    numbers: Int[np.ndarray, "B"],
    plan: Plan,
    *,
    split: int,
    least: int,
) -> Prompt:
    """The prompts as arrays, with idle rows: up to a power of two times `split`, the mesh's rows.

    least: rows that there are at any rate: a last, smaller batch then needs no program of its own.
    """
    rows = split * 2 ** max(0, (-(-max(len(prompts), least) // split) - 1).bit_length())
    width = -(-plan.slots // plan.chunk) * plan.chunk
    tokens = np.full((rows, plan.streams, width), ids.PAD, np.int32)
    places = np.full((rows, plan.streams, width), -1, np.int32)
    slots = np.ones((rows, plan.streams), np.int32)
    seen = np.zeros((rows, plan.vocab.size), bool)
    for row, prompt in enumerate(prompts):
        before = prompt[:-1]  # the loop feeds the last token itself
        # in the order of decoding's streams: full, unconditional, image-only
        for at, held in enumerate([before, prompt[:1], _pictorial(before, plan.vocab)]):
            if at < plan.streams:
                tokens[row, at, : len(held)] = held
                places[row, at, : len(held)] = np.arange(len(held))
                slots[row, at] = len(held)
        seen[row, prompt] = True
    fill = rows - len(prompts)
    return Prompt(
        ids=tokens,
        positions=places,
        last=np.array([p[-1] for p in prompts] + [ids.PAD] * fill, np.int32),
        slots=slots,
        seen=seen,
        real=np.arange(rows) < len(prompts),
        numbers=np.append(numbers, np.zeros(fill, np.int32)),
        chunks=np.int32(-(-(max(map(len, prompts)) - 1) // plan.chunk)),
    )


def numbers(
    prompts: Sequence[Int[np.ndarray, "_"]], names: Sequence[str] | None
) -> Int[np.ndarray, "B"]:
    """A number below 2^31 for each sample, from its name, or else from the prompt and its count."""
    if names is None:
        count, names = Counter(), []
        for prompt in prompts:
            digest = hashlib.sha256(prompt.astype(np.int32).tobytes()).hexdigest()
            names.append(f"{digest}/{count[digest]}")
            count[digest] += 1
    if len(names) != len(prompts) or len(set(names)) != len(names):
        raise GenerateError(
            f"{len(prompts)} prompts but {len(set(names))} different names; give each its own"
        )
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return np.array([int.from_bytes(d[:4], "big") >> 1 for d in digests], np.int32)


def knobs(sample: Sample) -> Knobs:
    """The sampling numbers as arrays; raises GenerateError on one that makes no sense."""
    _check(sample)
    return Knobs(
        text_temperature=np.float32(sample.text_temperature),
        text_top_p=np.float32(sample.text_top_p),
        repetition_penalty=np.float32(sample.repetition_penalty),
        image_temperature=np.float32(sample.image_temperature),
        image_top_p=np.float32(sample.image_top_p),
        scale_text=np.float32(sample.guidance_scale_text),
        scale_image=np.float32(sample.guidance_scale_image),
        budget=np.int32(sample.max_gen_len),
    )


def _pictorial(tokens: Int[np.ndarray, "T"], vocab: Vocab) -> Int[np.ndarray, "_"]:
    """What the image-only stream keeps: BOS, BOI, codes and EOI."""
    kept = np.isin(tokens, (ids.BOS, ids.BOI, ids.EOI)) | ids.is_image(tokens, vocab)
    return tokens[kept]


def _check(sample: Sample) -> None:
    for name in ("text", "image"):
        temperature, p = (getattr(sample, f"{name}_{knob}") for knob in ("temperature", "top_p"))
        if temperature <= 0:
            raise GenerateError(
                f"sample.{name}_temperature is {temperature}; it must be above 0 "
                f"(sample.{name}_greedy=True takes the likeliest)"
            )
        if not 0 < p <= 1:
            raise GenerateError(f"sample.{name}_top_p is {p}; it must be above 0 and at most 1")
    if sample.repetition_penalty <= 0 or sample.max_gen_len < 1:
        raise GenerateError(
            f"sample.repetition_penalty is {sample.repetition_penalty} and sample.max_gen_len "
            f"{sample.max_gen_len}; both must be above 0"
        )
