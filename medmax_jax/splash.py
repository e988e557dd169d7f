"""Attention inside packed documents by the splash kernel of JAX: TPUs, no [T, T] scores in memory.

    q [B, N, T, H] --shard_map--> rows and heads of a device --vmap over rows--> kernel [N, T, H]

The kernel skips blocks above the diagonal, masks by document inside a block, and reads N/K query
heads for one key head. It names its output and the logsumexp that its backward pass needs "attn",
for config.model.remat.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

from medmax_jax.mesh import BATCH, HEADS

LANES = 128  # T is a multiple: the kernel's smallest block
# Of the blocks that compile for v5e at T 2048, 1024 computes 3/4 of the scores and 512 5/8, since
# whole blocks are skipped; 2048 does not fit into VMEM.
BLOCK = 512


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    interpret: bool,
) -> Float[Array, "B N T H"]:
    """Causal attention within each segment. `interpret`: on a CPU, slowly, for tests."""
    length = q.shape[2]
    if length % LANES:
        raise ValueError(f"{length} tokens a row; splash attention needs a multiple of {LANES}")

    def local(q, k, v, segments):
        kernel = _kernel(q.shape[1], length, interpret)
        q = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)  # the kernel does not
        ids = kernels.SegmentIds(q=segments, kv=segments)
        return jax.vmap(kernel)(q, k, v, ids)

    specs = (HEADS, HEADS, HEADS, BATCH)
    # A kernel's result says nothing of the axes it varies over, so nothing can be checked.
    run = jax.shard_map(local, in_specs=specs, out_specs=HEADS, check_vma=False)
    return run(q, k, v, segments)


def block_size(length: int) -> int:
    """The largest multiple of LANES up to BLOCK that divides `length`. 2048 -> 512, 640 -> 128."""
    return max(b for b in range(LANES, BLOCK + 1, LANES) if length % b == 0)


def _kernel(heads: int, length: int, interpret: bool):
    block = block_size(length)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # five products a block in the backward pass instead of seven
    )  # fmt: skip
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads),
        block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attn",
        interpret=interpret,
    )  # fmt: skip
