"""The host half of generation before anything runs: prompts to checked requests, sizes to few.

    prompt of 105 tokens, answer up to 20   ->  128 slots        (a prompt is read in pieces of
    prompt of 700 tokens, answer up to 60   ->  1024 slots        32, 64, 128 or 256 tokens)
    27 prompts, 32 at once                  ->  32 rows, five of them idle

Nothing here changes an answer: idle rows and idle tokens write nothing and are seen by nobody.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from medmax_jax import grammar
from medmax_jax import vocab as ids
from medmax_jax.config import Sample, Vocab
from medmax_jax.decoding import Knobs

PIECES = (32, 64, 128, 256)  # tokens of a prompt read at once
SLOT_STEPS = (64, 512)  # cache sizes are multiples of these, up to 512 slots and beyond
SHORTEST_SPAN = 256  # slots that are read; doubled until it suffices


class GenerateError(ValueError):
    """A request that cannot be served; the message names the prompt or setting and the mend."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One answer to be written. `tokens`: the prompt; in image mode it ends with BOI."""

    tokens: np.ndarray
    number: int  # of the sample: its random numbers come from here
    budget: int  # tokens of text


def requests(
    prompts: Sequence[Int[np.ndarray, "_"]],
    sample: Sample,
    vocab: Vocab,
    *,
    mode: str,
    names: Sequence[str] | None,
    codes: int,
    context: int,
) -> list[Request]:
    """The prompts, checked; raises GenerateError on the first that cannot be answered."""
    grammar.check_mode(mode)
    found = numbers(prompts, names)
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, vocab, codes=codes, where=f"prompt {index}")
        check_room(len(prompt), mode=mode, codes=codes, context=context, where=f"prompt {index}")
    if mode == "image":
        prompts = [np.append(p, ids.BOI).astype(np.int32) for p in prompts]
    return [
        Request(np.asarray(p, np.int32), int(n), sample.max_gen_len)
        for p, n in zip(prompts, found, strict=True)
    ]


def check_prompt(tokens: Int[np.ndarray, "_"], vocab: Vocab, *, codes: int, where: str) -> None:
    """Raises GenerateError unless it is BOS, words and whole images."""
    if not len(tokens) or tokens[0] != ids.BOS or len(tokens) == 1:
        raise GenerateError(f"{where} is empty; give it words or a picture")
    ids.check_ids(tokens, vocab, where=where)
    left = 0
    for place, token in enumerate(tokens[1:].tolist(), start=1):
        code = ids.IMAGE_START <= token < ids.IMAGE_START + vocab.image_codes
        good = code if left > 1 else token == ids.EOI if left == 1 else not code
        if left == 0 and token in (ids.BOS, ids.PAD, ids.EOS, ids.EOI):
            good = False
        if not good:
            inside = f"{codes + 1 - left} codes into an image" if left else "outside an image"
            raise GenerateError(
                f"{where}: token {token} at place {place} stands {inside}; an image is BOI, "
                f"{codes} codes of this model's VQGAN, EOI, and text has its own ids"
            )
        left = left - 1 if left else (codes + 1 if token == ids.BOI else 0)
    if left:
        raise GenerateError(
            f"{where} ends inside an image; give all {codes} codes, or none and mode=image"
        )


def check_room(count: int, *, mode: str, codes: int, context: int, where: str) -> None:
    """Raises GenerateError where a prompt of `count` tokens leaves no room for an answer."""
    room = codes + 1 if mode == "image" else 1
    if count + room > context:
        what = "an image" if mode == "image" else "its answer"
        raise GenerateError(
            f"{where} has {count} tokens, {what} needs {room}, the model holds {context}; "
            "shorten the prompt or give fewer images"
        )


def rows(count: int, most: int) -> int:
    """Answers to write at once: a power of two, or `most`."""
    if most < 1:
        raise GenerateError(f"rows is {most}; at least one answer is written at once")
    return min(most, 1 << max(count - 1, 0).bit_length())


def slots(longest: int, sample: Sample, *, mode: str, codes: int, context: int) -> int:
    """Tokens that a lane must hold for the longest prompt, rounded up."""
    room = {"text": sample.max_gen_len, "mixed": context, "image": 1 + codes}[mode]
    need = min(longest + room, context)
    return min(rounded(need), context)


def rounded(count: int) -> int:
    """Up to a size that a cache may have."""
    step = SLOT_STEPS[count > 512]
    return -(-count // step) * step


def span(need: int, room: int) -> int:
    """Slots to read where `need` are filled, of `room`: 256, 512, 1024 ..., so few programs."""
    size = SHORTEST_SPAN
    while size < need:
        size *= 2
    return min(size, room)


def piece(longest: int) -> int:
    """Tokens of a prompt to read at once."""
    return next((size for size in PIECES if size >= longest), PIECES[-1])


def order(requests: Sequence[Request]) -> list[int]:
    """Their indices, those that begin with the same image next to each other, else as they come."""
    first: dict[bytes, int] = {}
    keys = []
    for index, request in enumerate(requests):
        ends = np.flatnonzero(request.tokens == ids.EOI)
        opening = request.tokens[: ends[0]].tobytes() if ends.size else index.to_bytes(8, "big")
        keys.append(first.setdefault(opening, index))
    return sorted(range(len(requests)), key=lambda index: (keys[index], index))


def pictorial(tokens: Int[np.ndarray, "T"], vocab: Vocab) -> Int[np.ndarray, "_"]:
    """What the image-only stream keeps: BOS, BOI, codes and EOI."""
    kept = np.isin(tokens, (ids.BOS, ids.BOI, ids.EOI)) | ids.is_image(tokens, vocab)
    return tokens[kept]


def names(prompts: Sequence[Int[np.ndarray, "_"]]) -> list[str]:
    """A name for each: a digest of the prompt, and how many of its equals came before."""
    count, found = Counter(), []
    for prompt in prompts:
        digest = hashlib.sha256(prompt.astype(np.int32).tobytes()).hexdigest()
        found.append(f"{digest}/{count[digest]}")
        count[digest] += 1
    return found


def numbers(
    prompts: Sequence[Int[np.ndarray, "_"]], given: Sequence[str] | None
) -> Int[np.ndarray, "B"]:
    """A number below 2^31 for each sample, from its name."""
    given = names(prompts) if given is None else given
    if len(given) != len(prompts) or len(set(given)) != len(given):
        raise GenerateError(
            f"{len(prompts)} prompts but {len(set(given))} different names; give each its own"
        )
    digests = [hashlib.sha256(name.encode()).digest() for name in given]
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
    )


def guided(sample: Sample) -> tuple[bool, bool]:
    """Whether the unconditional and the image-only stream change anything.

    With scales s and s the image-only stream cancels; with 1 and 1 both do.
    """
    text, image = sample.guidance_scale_text, sample.guidance_scale_image
    return not text == image == 1.0, text != image


def guidance(requests: Sequence[Request], sample: Sample, vocab: Vocab, *, mode: str) -> int:
    """How many streams beside its own a row may need at once.

    The image-only one is the unconditional one where nothing before holds an image: never in text,
    in image mode by the prompts, in mixed mode not known beforehand.
    """
    if mode == "text":
        return 0
    unconditional, image_only = guided(sample)
    pictured = mode == "mixed" or any(ids.is_image(r.tokens, vocab).any() for r in requests)
    return unconditional + (image_only and pictured)


def _check(sample: Sample) -> None:
    for name in ("text", "image"):
        temperature, p = (getattr(sample, f"{name}_{knob}") for knob in ("temperature", "top_p"))
        if not temperature > 0:
            raise GenerateError(
                f"sample.{name}_temperature is {temperature}; it must be above 0 "
                f"(sample.{name}_greedy=True takes the likeliest)"
            )
        if not 0 < p <= 1:
            raise GenerateError(f"sample.{name}_top_p is {p}; it must be above 0 and at most 1")
    if not sample.repetition_penalty > 0 or sample.max_gen_len < 1:
        raise GenerateError(
            f"sample.repetition_penalty is {sample.repetition_penalty} and sample.max_gen_len "
            f"{sample.max_gen_len}; both must be above 0"
        )
    if sample.budget not in ("answer", "segment"):
        raise GenerateError(f"sample.budget is {sample.budget!r}; it must be answer or segment")
