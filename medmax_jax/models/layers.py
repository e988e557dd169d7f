"""Defines the parts of a Chameleon layer: Linear with LoRA, Embed, the two norms, RoPE.

    Linear     y = x W + (alpha / rank) drop(x) A B     only A and B are nnx.LoRAParam
    RMSNorm    x / rms(x) * scale                       over D, statistics in fp32
    QKNorm     (x - mean) / std * scale + bias          over each head's H, before RoPE

Matrices are stored as [in, out]. Every part is built for one layer; chameleon.py stacks them with
vmap.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from medmax_jax.config import Lora
from medmax_jax.models import quantization
from medmax_jax.models.vocab import IMAGE_START
from medmax_jax.sharding import ACT, EMBED, UP

INIT_STD = 0.02  # of matrices and embeddings, as HF's initializer_range


class Linear(nnx.Module):
    """Applies a matrix without bias and, at rank > 0, its LoRA adapter."""

    def __init__(
        self, din: int, dout: int, *, spec: P, dtype: str, kind: str, lora: Lora,
        keys: Key[Array, "2"],
    ):  # fmt: skip
        """Initialize the layer. `kind`: config.model.quant. `keys`: two, of the matrix and of A."""
        if kind == "none":
            kernel = INIT_STD * jax.random.normal(keys[0], (din, dout), out_sharding=spec)
            self.kernel = nnx.Param(kernel.astype(dtype))
        else:
            self.kernel = quantization.QuantizedMatrix(din, dout, spec=spec, kind=kind)
        self.lora = lora
        if lora.rank:
            # As peft: A uniform within 1/sqrt(din), B zero. fp32: small steps vanish in bf16.
            a = jax.random.uniform(
                keys[1],
                (din, lora.rank),
                minval=-(din**-0.5),
                maxval=din**-0.5,
                out_sharding=P(spec[0], None),
            )
            self.lora_a = nnx.LoRAParam(a)
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, dout), out_sharding=P(None, spec[1])))

    def __call__(
        self,
        x: Float[Array, "B T I"],
        out: P,
        *,
        key: PRNGKeyArray | None,
        y: Float[Array, "B T O"] | None = None,
    ) -> Float[Array, "B T O"]:
        """Return the product. `out`: sharding of the result. `key`: adapter dropout; None: none.

        `y`: x W, where it is already computed.
        """
        if y is None:
            quantized = isinstance(self.kernel, quantization.QuantizedMatrix)
            kernel = (
                self.kernel.dequantize(x.dtype) if quantized else self.kernel[...].astype(x.dtype)
            )
            y = matmul(x, kernel, out, dtype=x.dtype)
        if not self.lora.rank:
            return y
        x = _tokens_first(x)
        if key is not None and self.lora.dropout:
            x = dropout(x, self.lora.dropout, key=key)
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        delta = matmul(matmul(x, a, ACT, dtype=x.dtype), b, out, dtype=x.dtype)
        return y + self.lora.alpha / self.lora.rank * delta


def _tokens_first(x: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
    """Return x in a layout with tokens before features, for its gradient too.

    For the thin products with A and B alone, XLA on TPUs would use the other layout for all of x,
    and copy it back for all other uses. The constraint is applied inside shard_map, since XLA would
    otherwise gather its operand: it cannot split the constraint.
    """
    spec = jax.typeof(x).sharding.spec
    local = lambda x: with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2)))  # noqa: E731
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x)


class Embed(nnx.Module):
    """Looks up token ids in the embedding table."""

    def __init__(self, size: int, dim: int, *, dtype: str, key: PRNGKeyArray):
        table = INIT_STD * jax.random.normal(key, (size, dim), out_sharding=EMBED)
        self.embedding = nnx.Param(table.astype(dtype))

    def __call__(self, ids: Int[Array, "B T"], dtype: str) -> Float[Array, "B T D"]:
        # Complete rows first: with columns and batch on one axis XLA would move activations.
        table = jax.sharding.reshard(self.embedding[...], P("tp", None))
        return table.at[ids].get(out_sharding=ACT).astype(dtype)


class RMSNorm(nnx.Module):
    """Scales each token to unit root mean square."""

    def __init__(self, dim: int, *, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones(dim, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)  # in bf16 the squares of a large residual lose the sum
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class QKNorm(nnx.Module):
    """Applies LayerNorm to each head's vector; row s of the gains applies to block s of heads.

    The 30B was trained on four model-parallel shards with separate gains: 64 heads and 4 rows mean
    that row 0 applies to heads 0..15, row 1 to heads 16..31, and so on.
    """

    def __init__(self, shards: int, head_dim: int, *, eps: float, dtype: str):
        self.scale = nnx.Param(jnp.ones((shards, head_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((shards, head_dim), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "B N T H"]) -> Float[Array, "B N T H"]:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, -1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        scale, bias = (_per_head(p[...], x.shape[1]) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


def matmul(
    x: Float[Array, "B T I"], kernel: Float[Array, "I O"], out: P, *, dtype: DTypeLike
) -> Float[Array, "B T O"]:
    """Return x @ kernel, summed in `dtype` and sharded as `out`."""
    # Over rows, not [B, T]: with three axes XLA on CPUs transposes all of the gradient of y.
    rows, tokens, din = x.shape
    flat = jnp.reshape(x, (rows * tokens, din), out_sharding=_rows(jax.typeof(x).sharding.spec))
    y = jnp.matmul(flat, kernel, preferred_element_type=dtype, out_sharding=_rows(out))
    return jnp.reshape(y, (rows, tokens, kernel.shape[1]), out_sharding=out)


def rope_angles(
    positions: Int[Array, "B T"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B 1 T J"], Float[Array, "B 1 T J"]]:
    """Return cosine and sine of position * theta^(-2j/H) for j < J = H/2, in fp32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(
    x: Float[Array, "B N T H"], cos: Float[Array, "B 1 T J"], sin: Float[Array, "B 1 T J"]
) -> Float[Array, "B N T H"]:
    """Rotate the pairs (x[j], x[j + H/2]): the layout of HF, not Meta's (x[2j], x[2j + 1])."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)


def dropout(x: Float[Array, "B T I"], rate: float, *, key: PRNGKeyArray) -> Float[Array, "B T I"]:
    """Zero a share `rate` of the entries and scale the rest, so that the mean is unchanged."""
    # Without out_sharding every device would draw the mask of the complete batch.
    shape, sharding = x.shape, jax.typeof(x).sharding

    def kept(key: PRNGKeyArray) -> Bool[Array, "B T I"]:
        return jax.random.bernoulli(key, 1 - rate, shape, out_sharding=sharding)

    def kept_on_cpu(key: PRNGKeyArray) -> Bool[Array, "B T I"]:
        # 32 random bits are used for two tokens, since drawing them takes most of the time there;
        # the rate is exact to 2^-17. TPUs would have to copy the halves.
        half = (shape[0], (shape[1] + 1) // 2, shape[2])
        bits = jax.random.bits(key, half, jnp.uint32, out_sharding=sharding)
        halves = jnp.concatenate([bits & 0xFFFF, bits >> 16], axis=1)[:, : shape[1]]
        return halves >= round(rate * 2**16)

    keep = jax.lax.platform_dependent(key, cpu=kept_on_cpu, default=kept)
    return jnp.where(keep, x / (1 - rate), 0)


def _rows(spec: P) -> P:
    return P(spec[0], spec[2])


def _per_head(gains: Float[Array, "C H"], heads: int) -> Float[Array, "N 1 H"]:
    return jnp.repeat(gains.astype(jnp.float32), heads // gains.shape[0], axis=0)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadWeights:
    """Holds the output projection; `image`: fp32 columns that replace the kernel's if trained."""

    kernel: Any  # [D, V]; or a gradient or a sharding, where a transformation builds this class
    image: Any  # [D, C] or None


def image_token_columns(kernel: Float[Array, "D V"], codes: int) -> Float[Array, "D C"]:
    """Return the columns of the image codes, in fp32."""
    full = jax.sharding.reshard(kernel, P("fsdp", None))  # 4 is not at a shard boundary
    columns = full[:, IMAGE_START : IMAGE_START + codes].astype(jnp.float32)
    return jax.sharding.reshard(columns, UP)


def full_kernel(head: HeadWeights) -> Float[Array, "D V"]:
    """Return one matrix with the image columns at their ids; the kernel where there are none."""
    if head.image is None:
        return head.kernel
    codes, size = head.image.shape[1], head.kernel.shape[1]
    image = jax.sharding.reshard(head.image, P("fsdp", None))
    image = jnp.pad(image, ((0, 0), (IMAGE_START, size - IMAGE_START - codes)))
    ids = jnp.arange(size)
    is_code = (ids >= IMAGE_START) & (ids < IMAGE_START + codes)
    return jnp.where(is_code, jax.sharding.reshard(image, UP), head.kernel.astype(jnp.float32))
