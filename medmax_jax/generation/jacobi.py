"""Speculative Jacobi decoding of images: drafts, what replaces them, and which codes are settled.

    settled  c0 c1 c2 | d3 d4 d5 d6    window 4: one pass of the model reads c2 d3 d4 d5
    draws             | x3 x4 x5 x6    from p, the distributions after c2, d3, d4 and d5
    x3 = d3, x4 != d4                  so c3 = x3 and c4 = x4 are settled, as x4 was drawn after c3
    settled  c0 .. c4 | x5 x6 d7 d8    the next window: x5 and x6 are drafts, d7 and d8 guesses

A rule couples each draw to the draft at its place, so that they are often equal:

    speculative   the draft, drawn from q, is kept with probability p / q; otherwise the draw is of
                  what p has above q
    gumbel        the draw with the noise of sample and position, so that the codes are those of one
                  code per pass with the same seed; it needs no q

Both are exact: given everything about the places before it, a draw has the distribution p, because
it depends on other places only through theirs. See docs/explanation/generation.md.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from medmax_jax.config import CHOICES

RULES, INITS = CHOICES["sample.jacobi_rule"], CHOICES["sample.jacobi_init"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacobiConfig:
    """The static options."""

    window: int  # tokens per pass, W
    rule: str  # one of RULES
    init: str  # one of INITS: where a guess is copied from, or that it is drawn uniformly


class Drafts(NamedTuple):
    """The open images of N rows, each of C codes of K kinds."""

    codes: Int[Array, "N C+W"]  # settled, then drafts
    count: Int[Array, "N"]  # settled codes and drafts
    q: Float[Array, "N W K"] | None  # of the window's drafts; None where the rule has no use for it


def empty_drafts(config: JacobiConfig, batch_size: int, *, codes: int, kinds: int) -> Drafts:
    """Return the drafts of rows without an image, of `codes` codes of `kinds` kinds."""
    speculative = config.rule == "speculative"
    return Drafts(
        codes=jnp.zeros((batch_size, codes + config.window), jnp.int32),
        count=jnp.zeros(batch_size, jnp.int32),
        q=jnp.zeros((batch_size, config.window, kinds)) if speculative else None,
    )


def draw_noise(
    config: JacobiConfig,
    keys: Key[Array, "N"],
    count: Int[Array, "N"],
    steps: Int[Array, "N"],
    *,
    kinds: int,
) -> Float[Array, "N W R"]:
    """Return the random numbers of a pass, after `count` tokens and `steps` passes of each row.

    Those of the rule gumbel depend on the place alone and are what `sampling.sample_tokens` adds.
    """
    fold, places = jax.random.fold_in, count[:, None] + jnp.arange(config.window)

    def of_place(key, place, step):
        if config.rule == "gumbel":
            return jax.random.gumbel(fold(key, place), (kinds,))
        tiny = jnp.finfo(jnp.float32).tiny  # its logarithm is finite
        return jax.random.uniform(fold(fold(key, place), step), (2 + kinds,), minval=tiny)

    return jax.vmap(jax.vmap(of_place, in_axes=(None, 0, None)))(keys, places, steps)


def fill(
    config: JacobiConfig,
    drafts: Drafts,
    settled: Int[Array, "N"],
    noise: Float[Array, "N W R"],
    *,
    kinds: int,
) -> Drafts:
    """Guess what follows the drafts, up to the end of windows that begin after `settled` codes."""
    places, last = _places(config, settled), drafts.count[:, None] - 1
    source = _source(config, places, settled[:, None], last, drafts.codes.shape[1] - config.window)
    if config.rule == "gumbel":
        drawn = jnp.argmax(noise, axis=-1)
    else:
        drawn = jnp.minimum((noise[..., 0] * kinds).astype(jnp.int32), kinds - 1)
    guess = jnp.where(source < 0, drawn, _get(drafts.codes, jnp.maximum(source, 0)))
    new, q = places > last, drafts.q
    codes = _put(drafts.codes, places, jnp.where(new, guess, _get(drafts.codes, places)))
    if q is not None:
        certain = (guess[..., None] == jnp.arange(kinds)).astype(q.dtype)
        q = jnp.where(new[..., None], jnp.where(source[..., None] < 0, 1 / kinds, certain), q)
    return Drafts(codes=codes, count=settled + config.window, q=q)


def window_codes(
    config: JacobiConfig, drafts: Drafts, settled: Int[Array, "N"]
) -> Int[Array, "N W"]:
    """Return the drafts of windows that begin after `settled` codes."""
    return _get(drafts.codes, _places(config, settled))


def verify(
    config: JacobiConfig,
    drafts: Drafts,
    settled: Int[Array, "N"],
    logits: Float[Array, "N W K"],
    noise: Float[Array, "N W R"],
    limit: Int[Array, "N"],
) -> tuple[Int[Array, "N W"], Int[Array, "N"], Drafts]:
    """Return the draws that replace the drafts, how many of them are settled, and the next drafts.

    limit: the codes of the image to come, at least 1.
    """
    places, codes, q = _places(config, settled), window_codes(config, drafts, settled), drafts.q
    if config.rule == "gumbel":
        draws = jnp.argmax(noise + logits, axis=-1)
    else:
        p = jax.nn.softmax(logits, axis=-1)
        draws = speculative_draws(codes, q, p, noise[..., 1:])
    accepted = jnp.minimum(1 + leading_matches(codes, draws), limit)
    if q is not None:
        q = _get(p, accepted[:, None] + jnp.arange(config.window))
    return draws, accepted, drafts._replace(codes=_put(drafts.codes, places, draws), q=q)


def speculative_draws(
    drafts: Int[Array, "N W"],
    q: Float[Array, "N W K"],
    p: Float[Array, "N W K"],
    uniform: Float[Array, "N W K+1"],
) -> Int[Array, "N W"]:
    """Return draws from p that equal the drafts, which are from q, as often as possible."""
    at = lambda weights: jnp.take_along_axis(weights, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
    kept = uniform[..., 0] * at(q) < at(p)
    residual = jnp.maximum(p - q, 0)
    some = residual.any(axis=-1, keepdims=True)  # none: p and q differ by rounding alone
    noise = -jnp.log(-jnp.log(uniform[..., 1:]))
    other = jnp.argmax(noise + jnp.log(jnp.where(some, residual, p)), axis=-1)
    return jnp.where(kept, drafts, other)


def leading_matches(drafts: Int[Array, "N W"], draws: Int[Array, "N W"]) -> Int[Array, "N"]:
    """Return how many drafts the model has read, from the first on, equal their draws."""
    return jnp.cumprod(draws[:, :-1] == drafts[:, :-1], axis=1).sum(axis=1)


def _source(
    config: JacobiConfig,
    places: Int[Array, "N W"],
    settled: Int[Array, "N 1"],
    last: Int[Array, "N 1"],
    codes: int,
) -> Int[Array, "N W"]:
    """Return the place from which a guess is copied; -1: the guess is drawn uniformly.

    last: the greatest place with a code. A neighbor after it is replaced by its own neighbor.
    """
    side = math.isqrt(codes)
    above = lambda place: place + side * ((last - place) // side)  # noqa: E731
    first = places - places % side
    source = {
        "repeat": jnp.broadcast_to(settled - 1, places.shape),
        "horizontal": jnp.where(first <= last, last, above(first)),
        "vertical": jnp.where(above(places) < 0, last, above(places)),
        "random": jnp.full_like(places, -1),
    }[config.init]
    return jnp.where(last < 0, -1, source)


def _places(config: JacobiConfig, settled: Int[Array, "N"]) -> Int[Array, "N W"]:
    return settled[:, None] + jnp.arange(config.window)


def _get(array: Array, places: Int[Array, "N W"]) -> Array:
    return array.at[jnp.arange(len(places))[:, None], places].get(mode="clip")


def _put(array: Array, places: Int[Array, "N W"], values: Array) -> Array:
    return array.at[jnp.arange(len(places))[:, None], places].set(values, mode="drop")
