"""Attention inside packed documents by cuDNN: NVIDIA GPUs, no [N, T, T] scores in memory.

The kernel skips what lies above the diagonal; that a key stands in another document comes as a mask
[B, 1, T, T], which JAX hands to cuDNN as a bias in the dtype of q.
"""

import jax
from jaxtyping import Array, Bool, Float, Int

from medmax_jax.mesh import BATCH, HEADS


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    implementation: str,
) -> Float[Array, "B N T H"]:
    """Causal attention within each segment. `implementation`: "cudnn"; "xla" where there is none.

    Tests give "xla": the same call, mask and shards, so that only the kernel itself is left out.
    """

    def local(q, k, v, segments):
        turned = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # layouts to XLA, no copies
        mask = same_document(segments)
        out = jax.nn.dot_product_attention(
            *turned, mask=mask, is_causal=True, implementation=implementation
        )
        return out.transpose(0, 2, 1, 3)

    # JAX cannot split cuDNN's call over a mesh, and a custom call has no axes to check.
    specs = (HEADS, HEADS, HEADS, BATCH)
    run = jax.shard_map(local, in_specs=specs, out_specs=HEADS, check_vma=False)
    return run(q, k, v, segments)


def same_document(segments: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    """True where query and key stand in one document. [1, 1, 2] -> [[1, 1, 0], [1, 1, 0], ...]."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]
