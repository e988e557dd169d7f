"""From logits to one token per row: the logit processors of Chameleon's inference code, in order.

    text    allow_only -> (BOI blocked) -> repetition penalty -> temperature -> top_p -> sample
    image   guidance (three streams to one) -> image ids only -> temperature -> top_p -> sample

Every function works on fp32 logits [B, V]; rows are independent of each other, and so are their
options, which are numbers or [B, 1].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

Number = Float[Array, "B 1"] | Float[Array, ""] | float


def allow_only(logits: Float[Array, "B V"], allowed: Bool[Array, "#B V"]) -> Float[Array, "B V"]:
    """Set the logits to -inf wherever `allowed` is False."""
    return jnp.where(allowed, logits, -jnp.inf)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Number
) -> Float[Array, "B V"]:
    """Apply Hugging Face's repetition penalty to ids seen in prompt or output.

    A score s becomes s/p, or s*p below zero. With p = 1.2: 3.0 -> 2.5 and -3.0 -> -3.6. It also
    applies to the tokens of the prompt, with greedy decoding or without.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Float[Array, "B V"], temperature: Number) -> Float[Array, "B V"]:
    """Divide the logits by the temperature."""
    return logits / temperature


def top_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Keep the most likely ids while the mass before them is below p; set the others to -inf.

    The first is always kept. Probabilities .5 .3 .15 .05: p = 0 keeps one, p = .75 two, p = .9
    three. Ids that tie with the last one are kept too.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    descending = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    minimum = jnp.where(before < p, descending, descending[..., :1]).min(axis=-1, keepdims=True)
    keep = (probabilities >= minimum) | (p >= 1)  # rounding must not cut the tail at p = 1
    return jnp.where(keep, logits, -jnp.inf)


def apply_guidance(
    full: Float[Array, "B V"],
    unconditional: Float[Array, "B V"],
    image_only: Float[Array, "B V"],
    *,
    scale_text: Number,
    scale_image: Number,
) -> Float[Array, "B V"]:
    """Apply classifier-free guidance separately to text and image, on raw logits.

    This is InstructPix2Pix's form: uncond + s_image (image_only - uncond) + s_text (full -
    image_only). Where no image came before, image_only is the unconditional stream, and uncond +
    s_text (full - uncond) remains.
    """
    return (
        unconditional
        + scale_image * (image_only - unconditional)
        + scale_text * (full - image_only)
    )


def sequence_keys(seeds: UInt32[Array, "B"], sample_seeds: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return one key per row, from its seed and that of its sample: independent of the batch."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), sample_seeds)


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], count: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Return one id per row, sampled with the row's own key after `count` tokens."""
    step_keys = jax.vmap(jax.random.fold_in)(keys, count)
    return jax.vmap(jax.random.categorical)(step_keys, logits)
