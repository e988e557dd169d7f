"""Computes causal attention inside packed documents.

    segments  1 1 1 2 2 0        query t attends to key s where s <= t, in the same document
    allowed   x . . . . .        (0 is padding; it attends only to padding and is never used)
              x x . . . .
              x x x . . .
              . . . x . .
              . . . x x .
              . . . . . x

N query heads share K key heads, N/K each: query head n reads key head n // (N/K).

    config.model.attention    complete rows, in training
    xla                       any device: `attention` with the mask above; scores in memory
    splash                    TPU: `splash_attend`
    splash_interpret          the same kernel where there is no TPU, very slow: for tests
    cudnn                     NVIDIA GPU: `cudnn_attend`

Attention against a cache of keys and values is in kv_cache.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from medmax_jax.sharding import BATCH, HEADS

QUERY_CHUNKS, MIN_CHUNK = 8, 64  # chunks in chunked_causal_attention; least tokens per chunk

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}  # the others run anywhere


def make_packed_attention(
    segments: Int[Array, "B T"], *, impl: str
) -> Callable[[Array, Array, Array], Array]:
    """Return f(q, k, v) -> [B, N, T, H]: causal attention inside the documents of these rows.

    The mask and other values that the layers share are computed once, here. The result is named
    "attn" for remat.
    """
    if impl == "xla":
        mask = packed_mask(segments)
        return lambda q, k, v: checkpoint_name(chunked_causal_attention(q, k, v, mask), "attn")
    if impl in ("splash", "splash_interpret"):
        interpret = impl == "splash_interpret"
        return lambda q, k, v: splash_attend(q, k, v, segments, interpret=interpret)
    if impl == "cudnn":
        run = lambda q, k, v: cudnn_attend(q, k, v, segments, implementation="cudnn")  # noqa: E731
        return lambda q, k, v: checkpoint_name(run(q, k, v), "attn")
    raise ValueError(f"config.model.attention is {impl!r}; use xla, splash or cudnn")


def check_platform(impl: str, platform: str) -> None:
    """Raise ValueError where devices of `platform` cannot run `impl`."""
    needed = PLATFORMS.get(impl, platform)
    if needed != platform:
        raise ValueError(
            f"config.model.attention is {impl!r}, which runs on {needed} devices; "
            f"these are {platform}: use 'xla'"
        )


def packed_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Return True where query t may attend to key s.

    [[1, 1, 2]] -> [[1, 0, 0], [1, 1, 0], [0, 0, 1]].
    """
    order = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (order[:, None] >= order[None, :])


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """Compute attention with scores and softmax in fp32.

    A row without any allowed key gives finite but meaningless values.
    """
    (rows, heads, tokens, dim), keys = q.shape, k.shape[1]
    groups = heads // keys
    # One [G*T, S] product per key head: on CPUs XLA is twice as slow with N or G inside.
    # Shardings are explicit, not left to reshape: it loses those of axes of size 1.
    q = jnp.reshape(q, (rows, keys, groups * tokens, dim), out_sharding=HEADS)  # [B, K, G*T, H]
    mask = jnp.tile(mask, (1, groups, 1))[:, None]  # [B, 1, G*T, S]
    scores = jnp.einsum("bkmh,bksh->bkms", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores * dim**-0.5, -1e30), -1).astype(v.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v)
    return jnp.reshape(out, (rows, heads, tokens, dim), out_sharding=HEADS)


def chunked_causal_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B N T H"]:
    """Compute `attention` in chunks of queries, each with only the keys up to its end.

    Eight chunks avoid 7/16 of the scores. The backward pass recomputes the scores of a chunk
    instead of keeping them: on CPUs fresh memory costs more. Short rows are one chunk.
    """
    take, tokens = jax.lax.slice_in_dim, q.shape[2]
    if tokens % QUERY_CHUNKS or tokens < QUERY_CHUNKS * MIN_CHUNK:
        return attention(q, k, v, mask)
    outputs, recomputed, length = [], jax.checkpoint(attention), tokens // QUERY_CHUNKS
    for end in range(length, tokens + 1, length):
        start = end - length
        allowed = take(take(mask, start, end, axis=1), 0, end, axis=2)
        keys, values = (take(x, 0, end, axis=2) for x in (k, v))
        outputs.append(recomputed(take(q, start, end, axis=2), keys, values, allowed))
    return jnp.concatenate(outputs, axis=2)


def reference_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B N T H"]:
    """Compute attention by its definition, for tests: key heads repeated, everything in fp32."""
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q.astype(jnp.float32), k) / jnp.sqrt(q.shape[3])
    scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores, -1), v)


# ---- splash ----
#
# Attention inside packed documents with the splash kernel of JAX: TPUs, no [T, T] scores in memory.
#
#     q [B, N, T, H] --shard_map--> rows and heads of a device --vmap over rows--> kernel [N, T, H]
#
# The kernel skips blocks above the diagonal, masks by document inside a block, and reads N/K query
# heads for one key head. It names its output and the logsumexp that its backward pass needs "attn",
# for config.model.remat.

TPU_TILE = 128  # T must be a multiple of this, the smallest block of the kernel
# Among the blocks that compile for v5e at T 2048, 1024 computes 3/4 of the scores and 512 5/8,
# since only complete blocks are skipped; 2048 does not fit into VMEM.
BLOCK = 512


def splash_attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    interpret: bool,
) -> Float[Array, "B N T H"]:
    """Compute causal attention within each segment. `interpret`: on a CPU, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length = q.shape[2]
    if length % TPU_TILE:
        raise ValueError(
            f"{length} tokens per row; splash attention requires a multiple of {TPU_TILE}"
        )

    def local(q, k, v, segments):
        kernel = _kernel(q.shape[1], length, interpret)
        q = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)  # the kernel does not
        ids = kernels.SegmentIds(q=segments, kv=segments)
        return jax.vmap(kernel)(q, k, v, ids)

    specs = (HEADS, HEADS, HEADS, BATCH)
    # The result of a kernel does not state the axes it varies over, so nothing can be checked.
    run = jax.shard_map(local, in_specs=specs, out_specs=HEADS, check_vma=False)
    return run(q, k, v, segments)


def block_size(length: int) -> int:
    """Return the largest multiple of TPU_TILE up to BLOCK that divides `length`.

    2048 -> 512, 640 -> 128.
    """
    return max(b for b in range(TPU_TILE, BLOCK + 1, TPU_TILE) if length % b == 0)


def _kernel(heads: int, length: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    block = block_size(length)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # five products per block in the backward pass instead of seven
    )  # fmt: skip
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads),
        block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attn",
        interpret=interpret,
    )  # fmt: skip


# ---- Attention inside packed documents by cuDNN: NVIDIA GPUs, no [N, T, T] scores in memory ----
#
# The kernel skips everything above the diagonal; document boundaries are passed as a mask
# [B, 1, T, T], which JAX passes to cuDNN as a bias in the dtype of q.


def cudnn_attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    implementation: str,
) -> Float[Array, "B N T H"]:
    """Compute causal attention within each segment with `implementation`, normally "cudnn".

    Tests pass "xla", for machines without cuDNN: the call, the mask and the shards are the same, so
    that only the kernel itself is left out.
    """

    def local(q, k, v, segments):
        transposed = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # layouts for XLA, no copies
        mask = same_document(segments)
        out = jax.nn.dot_product_attention(
            *transposed, mask=mask, is_causal=True, implementation=implementation
        )
        return out.transpose(0, 2, 1, 3)

    # JAX cannot split cuDNN's call over a mesh, and a custom call has no axes to check.
    specs = (HEADS, HEADS, HEADS, BATCH)
    run = jax.shard_map(local, in_specs=specs, out_specs=HEADS, check_vma=False)
    return run(q, k, v, segments)


def same_document(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """Return True where query and key belong to one document.

    [1, 1, 2] -> [[1, 1, 0], [1, 1, 0], ...].
    """
    return (segments[:, :, None] == segments[:, None, :])[:, None]
