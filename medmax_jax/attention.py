"""Causal attention inside packed documents.

    segments  1 1 1 2 2 0        query t sees key s where s <= t and both stand in the same document
    allowed   x . . . . .        (0 is padding; it sees only padding, and nobody reads it)
              x x . . . .
              x x x . . .
              . . . x . .
              . . . x x .
              . . . . . x

N query heads share K key heads, N/K each: query head n reads key head n // (N/K).

    config.model.attention    whole rows, in training
    xla                       any device: `attend` with the mask above; scores in memory
    splash                    TPU: splash.py
    splash_interpret          the same kernel where there is no TPU, very slow: for tests
    cudnn                     NVIDIA GPU: cudnn.py

Against a cache of keys and values: cached.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from medmax_jax import cudnn, splash
from medmax_jax.mesh import HEADS

PIECES, SHORTEST = 8, 64  # of queries in attend_causal; tokens of one

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}  # the others run anywhere


def packed(segments: Int[Array, "B T"], *, impl: str) -> Callable[[Array, Array, Array], Array]:
    """f(q, k, v) -> [B, N, T, H]: causal attention inside the documents of these rows.

    What the layers have in common is made once, here. The result is named "attn" for remat.
    """
    if impl == "xla":
        mask = packed_mask(segments)
        return lambda q, k, v: checkpoint_name(attend_causal(q, k, v, mask), "attn")
    if impl in ("splash", "splash_interpret"):
        interpret = impl == "splash_interpret"
        return lambda q, k, v: splash.attend(q, k, v, segments, interpret=interpret)
    if impl == "cudnn":
        run = lambda q, k, v: cudnn.attend(q, k, v, segments, implementation="cudnn")  # noqa: E731
        return lambda q, k, v: checkpoint_name(run(q, k, v), "attn")
    raise ValueError(f"config.model.attention is {impl!r}; use xla, splash or cudnn")


def check_platform(impl: str, platform: str) -> None:
    """Raises ValueError where devices of `platform` cannot run `impl`."""
    needed = PLATFORMS.get(impl, platform)
    if needed != platform:
        raise ValueError(
            f"config.model.attention is {impl!r}, which runs on {needed} devices; "
            f"these are {platform}: use 'xla'"
        )


def packed_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may see key s. [[1, 1, 2]] -> [[1, 0, 0], [1, 1, 0], [0, 0, 1]]."""
    order = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (order[:, None] >= order[None, :])


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """Attention with scores and softmax in fp32. A row that sees nothing gives finite nonsense."""
    (rows, heads, tokens, dim), keys = q.shape, k.shape[1]
    groups = heads // keys
    # One [G*T, S] product a key head: on CPUs XLA is twice as slow with N or G inside.
    # Shardings are said, not left to reshape: it loses those of axes of size 1.
    q = jnp.reshape(q, (rows, keys, groups * tokens, dim), out_sharding=HEADS)  # [B, K, G*T, H]
    mask = jnp.tile(mask, (1, groups, 1))[:, None]  # [B, 1, G*T, S]
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores * dim**-0.5, -1e30), -1).astype(v.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v)
    return jnp.reshape(out, (rows, heads, tokens, dim), out_sharding=HEADS)


def attend_causal(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B N T H"]:
    """`attend` where no query sees a later key: pieces of queries, each with the keys up to it.

    Eight pieces spare 7/16 of the scores. The backward pass makes a piece's scores again instead
    of keeping them: on CPUs fresh memory costs more. Short rows are one piece.
    """
    cut, tokens = jax.lax.slice_in_dim, q.shape[2]
    if tokens % PIECES or tokens < PIECES * SHORTEST:
        return attend(q, k, v, mask)
    found, again, length = [], jax.checkpoint(attend), tokens // PIECES
    for end in range(length, tokens + 1, length):
        start = end - length
        seen = cut(cut(mask, start, end, axis=1), 0, end, axis=2)
        keys, values = (cut(x, 0, end, axis=2) for x in (k, v))
        found.append(again(cut(q, start, end, axis=2), keys, values, seen))
    return jnp.concatenate(found, axis=2)


def reference_attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """The definition, for tests: every key head repeated, everything in fp32."""
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q.astype(jnp.float32), k) / jnp.sqrt(q.shape[3])
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores, -1), v)
