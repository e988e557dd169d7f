"""Stores the frozen matrices of the layers in 8 or 4 bits, in the format the layers read.

    int8   [I, O]  ->  qvalue int8 [I, O],      scale fp32 [1, O]       greatest of a column / 127
    nf4    [I, O]  ->  qvalue uint8 [I / 2, O], scale fp32 [I / 64, O]  greatest of 64 rows
    int4   as nf4, its sixteen values -8 .. 7 instead of the quantiles; greatest of 64 rows / 7.5

convert/native.py creates them once, on the host: a chip never holds the complete model in bf16.
The codes of rows 2k and 2k + 1 share a byte, the first in its low half, since not every backend has
uint4. Embeddings, norms and head are not quantized.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

PACKED = ("nf4", "int4")  # two codes per byte
TILE = 64  # rows that share a scale in those, as in QLoRA (arXiv:2305.14314, section 4)
MATRICES = frozenset(
    [f"layers.self_attn.{name}.kernel" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    + [f"layers.mlp.{name}.kernel" for name in ("gate_proj", "up_proj", "down_proj")]
)
NF4 = (  # the quantiles of a normal distribution: QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class QuantizedMatrix(nnx.Module):
    """Holds a quantized kernel [I, O]; its codes come from a checkpoint."""

    def __init__(self, din: int, dout: int, *, spec: P, kind: str):
        rows, dtype = (din // 2, jnp.uint8) if kind in PACKED else (din, jnp.int8)
        self.qvalue = nnx.Param(jnp.zeros((rows, dout), dtype, out_sharding=spec))
        tiles, cut = (din // TILE, spec[0]) if kind in PACKED else (1, None)
        self.scale = nnx.Param(jnp.zeros((tiles, dout), jnp.float32, out_sharding=P(cut, spec[1])))
        self.kind = kind

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "I O"]:
        """Return the matrix, computed in fp32 and rounded once."""
        codes, scale = self.qvalue[...], self.scale[...]
        if self.kind == "int8":
            return (codes.astype(jnp.float32) * scale).astype(dtype)
        spec = jax.typeof(codes).sharding.spec
        (rows, columns), tiles = codes.shape, scale.shape[0]
        halves = jnp.stack([codes & 15, codes >> 4], axis=1)  # [I / 2, 2, O]
        split = jnp.reshape(halves, (tiles, 2 * rows // tiles, columns), out_sharding=P(
            spec[0], None, spec[1]))  # fmt: skip
        value = _nf4_value(split) if self.kind == "nf4" else _int4_value(split)
        dense = value * scale[:, None]
        return jnp.reshape(dense.astype(dtype), (2 * rows, columns), out_sharding=spec)


def _int4_value(codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Decode half a byte in two's complement: 0 .. 7 -> 0 .. 7, 8 .. 15 -> -8 .. -1."""
    return (codes.astype(jnp.int32) ^ 8).astype(jnp.float32) - 8


def _nf4_value(codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Return NF4[codes] by comparisons: a gather would depend on how the codes are sharded."""
    value = jnp.full_like(codes, NF4[0], dtype=jnp.float32)
    for code, quantile in enumerate(NF4[1:], start=1):
        value = jnp.where(codes == code, quantile, value)
    return value
