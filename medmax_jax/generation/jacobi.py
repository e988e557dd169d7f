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

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

RULES = ("speculative", "gumbel")
INITS = ("repeat", "horizontal", "vertical", "random")

class Drafts(NamedTuple):
    """The open images of N rows, of C codes of K kinds, and windows of W."""

    codes: Int[Array, "N C+W"]  # settled, then drafts
    count: Int[Array, "N"]  # settled codes and drafts
    q: Float[Array, "N W K"] | None  # of the window's drafts; None where the rule has no use for it


def empty_drafts(batch_size: int, *, codes: int, kinds: int, window: int, rule: str) -> Drafts:
    """Return the drafts of rows without an image, of `codes` codes of `kinds` kinds."""
    return Drafts(
        codes=jnp.zeros((batch_size, codes + window), jnp.int32),
        count=jnp.zeros(batch_size, jnp.int32),
        q=jnp.zeros((batch_size, window, kinds)) if rule == "speculative" else None,
    )


def place_keys(
    keys: Key[Array, "N"], count: Int[Array, "N"], *, window: int
) -> Key[Array, "N W"]:
    """Return a key for each place of a row's window, which begins after `count` tokens."""
    places = count[:, None] + jnp.arange(window)
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys, places)


def fill(
    drafts: Drafts, settled: Int[Array, "N"], drawn: Int[Array, "N W"], *, kinds: int, init: str
) -> Drafts:
    """Guess what follows the drafts in windows that begin after `settled` codes.

    drawn: guesses where no code is copied, each from the uniform distribution.
    """
    window = drawn.shape[1]
    places, last = settled[:, None] + jnp.arange(window), drafts.count[:, None] - 1
    source = _source(places, settled[:, None], last, drafts.codes.shape[1] - window, init)
    guess = jnp.where(source < 0, drawn, _get(drafts.codes, jnp.maximum(source, 0)))
    new, q = places > last, drafts.q
    codes = _put(drafts.codes, places, jnp.where(new, guess, _get(drafts.codes, places)))
    if q is not None:
        certain = (guess[..., None] == jnp.arange(kinds)).astype(q.dtype)
        q = jnp.where(new[..., None], jnp.where(source[..., None] < 0, 1 / kinds, certain), q)
    return Drafts(codes=codes, count=settled + window, q=q)


def window_codes(drafts: Drafts, settled: Int[Array, "N"], *, window: int) -> Int[Array, "N W"]:
    """Return the drafts of the windows that begin after `settled` codes."""
    return _get(drafts.codes, settled[:, None] + jnp.arange(window))


def speculative_draws(
    drafts: Int[Array, "N W"],
    q: Float[Array, "N W K"],
    p: Float[Array, "N W K"],
    uniform: Float[Array, "N W K+1"],
) -> Int[Array, "N W"]:
    """Return draws from p that equal the drafts, which are from q, as often as possible.

    uniform: fresh random numbers above 0 and below 1.
    """
    at = lambda weights: jnp.take_along_axis(weights, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
    kept = uniform[..., 0] * at(q) < at(p)
    residual = jnp.maximum(p - q, 0)
    some = residual.any(axis=-1, keepdims=True)  # none: p and q differ by rounding alone
    other = gumbel_draws(jnp.log(jnp.where(some, residual, p)), -jnp.log(-jnp.log(uniform[..., 1:])))
    return jnp.where(kept, drafts, other)


def gumbel_draws(
    logits: Float[Array, "N W K"], noise: Float[Array, "N W K"]
) -> Int[Array, "N W"]:
    """Return draws by Gumbel noise, as jax.random.categorical makes them."""
    return jnp.argmax(noise + logits, axis=-1)


def settle(
    drafts: Int[Array, "N W"], draws: Int[Array, "N W"], limit: Int[Array, "N"]
) -> Int[Array, "N"]:
    """Return how many draws are settled: up to the first that differs from its draft.

    limit: the codes of the image to come, at least 1.
    """
    equal = jnp.cumprod(draws[:, :-1] == drafts[:, :-1], axis=1)
    return jnp.minimum(1 + equal.sum(axis=1), limit)


def advance(
    drafts: Drafts,
    settled: Int[Array, "N"],
    draws: Int[Array, "N W"],
    p: Float[Array, "N W K"] | None,
    accepted: Int[Array, "N"],
) -> Drafts:
    """Replace the drafts by the draws, of which `accepted` are settled."""
    window = draws.shape[1]
    codes = _put(drafts.codes, settled[:, None] + jnp.arange(window), draws)
    q = None
    if drafts.q is not None:
        q = _get(p, accepted[:, None] + jnp.arange(window))
    return drafts._replace(codes=codes, q=q)


def _source(
    places: Int[Array, "N W"], settled: Int[Array, "N 1"], last: Int[Array, "N 1"], codes: int,
    init: str,
) -> Int[Array, "N W"]:  # fmt: skip
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
    }[init]
    return jnp.where(last < 0, -1, source)


def _get(array: Array, places: Int[Array, "N W"]) -> Array:
    rows = jnp.arange(len(places))[:, None]
    return array.at[rows, places].get(mode="clip")


def _put(array: Array, places: Int[Array, "N W"], values: Array) -> Array:
    rows = jnp.arange(len(places))[:, None]
    return array.at[rows, places].set(values, mode="drop")
