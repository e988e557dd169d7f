"""Validates the sampling options of a request and resolves them to settings of the decode loop.

resolve(sample, vocab, mode="mixed", codes=1024)  ->  DecodeSettings, for any number of requests
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from medmax_jax.config import CHOICES, Sample, Vocab
from medmax_jax.generation import grammar, jacobi
from medmax_jax.generation.requests import MAX_NUMBER, MIN_NUMBER, GenerateError, Request
from medmax_jax.models import vocab as ids

CHUNK = 16  # passes of the model between two synchronizations with the host


class SamplingParams(NamedTuple):
    """Sampling options, one of each per row; changing them does not recompile."""

    text_temperature: Float[Array, "*N"]
    text_top_p: Float[Array, "*N"]
    text_greedy: Bool[Array, "*N"]
    repetition_penalty: Float[Array, "*N"]
    image_temperature: Float[Array, "*N"]
    image_top_p: Float[Array, "*N"]
    image_greedy: Bool[Array, "*N"]
    scale_text: Float[Array, "*N"]
    scale_image: Float[Array, "*N"]
    opens_images: Bool[Array, "*N"]  # mixed mode: text may open an image
    ends_with_codes: Bool[Array, "*N"]  # image mode: the last code of the image ends the answer
    stop_at_boi: Bool[Array, "*N"]  # an opened image ends the answer
    per_segment: Bool[Array, "*N"]  # the budget starts again after each image


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """The static options of the compiled programs, in addition to sizes."""

    chunk: int  # passes of the model between two synchronizations with the host
    codes: int  # per image
    vocab: Vocab
    text_greedy: bool  # in all rows, which saves sorting for top_p
    image_greedy: bool  # in all rows
    barred: tuple[int, ...]  # ids that text never contains (Tokenizer.barred)
    jacobi: jacobi.JacobiConfig | None  # of images; None: one code per pass of the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Validated sampling options of a request, as the decode loop reads them."""

    mode: str
    params: SamplingParams  # traced; of one row
    config: DecodeConfig  # static
    guidance: tuple[bool, bool]  # the unconditional and the image-only stream have an effect


def resolve(
    sample: Sample, vocab: Vocab, *, mode: str, codes: int, barred: tuple[int, ...] = ()
) -> DecodeSettings:
    """Return the settings of the decode loop; raise GenerateError on an invalid option.

    Args:
        sample: the sampling options.
        vocab: the vocabulary of the model.
        mode: "text", "image" or "mixed".
        codes: VQ codes per image.
        barred: ids that are never generated as text, `Tokenizer.barred` of the model's tokenizer.
    """
    check_sample(sample)
    if mode != "text" and sample.jacobi_window > codes:
        raise GenerateError(
            f"sample.jacobi_window is {sample.jacobi_window}; it must be at most the {codes} codes "
            "of an image"
        )
    return DecodeSettings(
        mode=grammar.check_mode(mode),
        params=SamplingParams(
            text_temperature=np.float32(sample.text_temperature),
            text_top_p=np.float32(sample.text_top_p),
            text_greedy=np.bool_(sample.text_greedy),
            repetition_penalty=np.float32(sample.repetition_penalty),
            image_temperature=np.float32(sample.image_temperature),
            image_top_p=np.float32(sample.image_top_p),
            image_greedy=np.bool_(sample.image_greedy),
            scale_text=np.float32(sample.guidance_scale_text),
            scale_image=np.float32(sample.guidance_scale_image),
            opens_images=np.bool_(mode == "mixed"),
            ends_with_codes=np.bool_(mode == "image"),
            stop_at_boi=np.bool_(sample.boi_ends),
            per_segment=np.bool_(sample.budget == "segment"),
        ),
        config=DecodeConfig(
            chunk=CHUNK,
            codes=codes,
            vocab=vocab,
            text_greedy=sample.text_greedy,
            image_greedy=sample.image_greedy,
            barred=barred,
            jacobi=_jacobi(sample),
        ),
        guidance=_guidance(sample.guidance_scale_text, sample.guidance_scale_image),
    )


def _jacobi(sample: Sample) -> jacobi.JacobiConfig | None:
    if not sample.jacobi_window:
        return None
    return jacobi.JacobiConfig(
        window=sample.jacobi_window, rule=sample.jacobi_rule, init=sample.jacobi_init
    )


def empty_params(batch_size: int) -> SamplingParams:
    """Return options of rows without a request."""
    ones, none = np.ones(batch_size, np.float32), np.zeros(batch_size, bool)
    return SamplingParams(
        text_temperature=ones.copy(),
        text_top_p=ones.copy(),
        text_greedy=~none,
        repetition_penalty=ones.copy(),
        image_temperature=ones.copy(),
        image_top_p=ones.copy(),
        image_greedy=~none,
        scale_text=ones.copy(),
        scale_image=ones.copy(),
        opens_images=none.copy(),
        ends_with_codes=none.copy(),
        stop_at_boi=none.copy(),
        per_segment=none.copy(),
    )


def _guidance(scale_text: float, scale_image: float) -> tuple[bool, bool]:
    """Return whether the unconditional and the image-only stream have an effect.

    With scales s and s the image-only stream cancels; with 1 and 1 both do.
    """
    return not scale_text == scale_image == 1.0, scale_text != scale_image


def guidance_streams_needed(requests: Sequence[Request], settings: DecodeSettings) -> int:
    """Return how many streams in addition to its own a row may need at once.

    The image-only stream equals the unconditional one where no image precedes: always in text mode,
    depending on the prompts in image mode, not known in advance in mixed mode.
    """
    mode, vocab = settings.mode, settings.config.vocab
    if mode == "text":
        return 0
    unconditional, image_only = settings.guidance
    has_image = mode == "mixed" or any(ids.is_image(r.tokens, vocab).any() for r in requests)
    return unconditional + (image_only and has_image)


def check_seed(seed: int) -> None:
    """Raise GenerateError on a seed that equals another one in JAX's 32 bits."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise GenerateError(f"seed is {seed!r}; it must be an integer of 0 .. {2**32 - 1}")


def check_sample(sample: Sample) -> None:
    """Raise GenerateError on an option that is out of range."""
    check_seed(sample.seed)
    for field in dataclasses.fields(sample):
        value = getattr(sample, field.name)
        if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
            raise GenerateError(
                f"sample.{field.name} is {value}; it must be a finite number of at most "
                f"{MAX_NUMBER:g}"
            )
    for kind in ("text", "image"):
        temperature, p = getattr(sample, f"{kind}_temperature"), getattr(sample, f"{kind}_top_p")
        if not temperature >= MIN_NUMBER:
            raise GenerateError(
                f"sample.{kind}_temperature is {temperature}; it must be at least {MIN_NUMBER:g} "
                f"(sample.{kind}_greedy=True selects the most likely token)"
            )
        if not 0 < p <= 1:
            raise GenerateError(f"sample.{kind}_top_p is {p}; it must be above 0 and at most 1")
    if not sample.repetition_penalty >= MIN_NUMBER or sample.max_gen_len < 1:
        raise GenerateError(
            f"sample.repetition_penalty is {sample.repetition_penalty} and sample.max_gen_len is "
            f"{sample.max_gen_len}; they must be at least {MIN_NUMBER:g} and 1"
        )
    if sample.jacobi_window < 0 or sample.jacobi_window == 1:
        raise GenerateError(
            f"sample.jacobi_window is {sample.jacobi_window}; it must be 0 or at least 2"
        )
    for name in ("budget", "jacobi_rule", "jacobi_init"):
        value, allowed = getattr(sample, name), CHOICES[f"sample.{name}"]
        if value not in allowed:
            raise GenerateError(f"sample.{name} is {value!r}; it must be {' or '.join(allowed)}")
