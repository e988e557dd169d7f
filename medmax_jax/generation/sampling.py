"""From logits to one token a row: the processors of the Chameleon inference code, in its order.

    text    allow_only -> (BOI blocked) -> penalise -> temperature -> top_p -> pick
    image   guide (three streams to one) -> image ids only -> temperature -> top_p -> pick

Every function works on fp32 logits [B, V]; a row never looks at another row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Number = Float[Array, ""] | float


def allow_only(logits: Float[Array, "B V"], allowed: Bool[Array, "#B V"]) -> Float[Array, "B V"]:
    """-inf wherever `allowed` is False."""
    return jnp.where(allowed, logits, -jnp.inf)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Number
) -> Float[Array, "B V"]:
    """Hugging Face's repetition penalty at ids seen in prompt or output: s/p, or s*p below zero.

    With p = 1.2: 3.0 -> 2.5 and -3.0 -> -3.6. It acts on the prompt's words too, greedy or not.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Float[Array, "B V"], temperature: Number) -> Float[Array, "B V"]:
    """Logits over the temperature."""
    return logits / temperature


def top_p(logits: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Keeps the likeliest ids while the mass before them is below p (the first always), else -inf.

    Probabilities .5 .3 .15 .05: p = 0 keeps one, p = .75 two, p = .9 three. Equals of the last
    stay.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    floor = jnp.where(before < p, falling, falling[..., :1]).min(axis=-1, keepdims=True)
    keep = (probabilities >= floor) | (p >= 1)  # rounding must not cut the tail of the whole
    return jnp.where(keep, logits, -jnp.inf)


def apply_guidance(
    full: Float[Array, "B V"],
    unconditional: Float[Array, "B V"],
    image_only: Float[Array, "B V"],
    *,
    scale_text: Number,
    scale_image: Number,
) -> Float[Array, "B V"]:
    """Classifier-free guidance on text and image apart (InstructPix2Pix's form), on raw logits.

    uncond + s_image (image_only - uncond) + s_text (full - image_only). Where no image came before,
    image_only is the unconditional stream, and what is left is uncond + s_text (full - uncond).
    """
    return (
        unconditional
        + scale_image * (image_only - unconditional)
        + scale_text * (full - image_only)
    )


def sequence_keys(key: Key[Array, ""], numbers: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key a row, from the number of its sample: independent of row and batch."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], count: Int[Array, "B"], *, greedy: bool
) -> Int[Array, "B"]:
    """The likeliest id, or one drawn with the row's own key after `count` tokens."""
    if greedy:
        return jnp.argmax(logits, axis=-1)
    step_keys = jax.vmap(jax.random.fold_in)(keys, count)
    return jax.vmap(jax.random.categorical)(step_keys, logits)
