"""Defines Chameleon's VQGAN, the image tokenizer: pixels <-> a raster of codes.

    pixels b h w 3 --Encoder--> b i j Z --quant_conv--> b i j E --nearest row--> codes b i j
    codes b i j --row--> b i j E --post_quant_conv--> b i j Z --Decoder--> pixels b h w 3

    level (first = full size)        encoder                       decoder (runs last level first)
    channels x channel_mult[level]   num_res_blocks, Downsample    num_res_blocks + 1, Upsample
    lowest level                     mid: block_1 attn_1 block_2   mid: block_1 attn_1 block_2

Names are the checkpoint's (`encoder.down.0.block.0.conv1`; `decoder.up.0` is the full size),
kernels are HWIO. All operations up to the codes run in fp32 at the highest precision: a rounded
product can move a patch to another code, and codes are the input of the language model.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import VQ

RELEASED = VQ(  # vqgan.yaml of Chameleon
    image_size=512,
    channels=128,
    channel_mult=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    z_channels=256,
    embed_dim=256,
    num_codes=8_192,
    norm_groups=32,  # fixed in the code of taming-transformers
    view="released",
    answer_view="released",
)
EPS = 1e-6  # of every GroupNorm in taming-transformers, hence in Chameleon
ENCODER_PRECISION = jax.lax.Precision.HIGHEST  # TPU: six bf16 passes, as good as fp32
DECODER_PRECISION = jax.lax.Precision.HIGH  # decoder on TPU: three passes are enough for uint8


def create(config: VQ, *, key: jax.Array) -> "VQGAN":
    """Create random weights, replicated over the ambient mesh if there is one."""
    return jax.jit(lambda key: VQGAN(config, rngs=nnx.Rngs(key)))(key)


def abstract(config: VQ, *, decoder: bool = True) -> "VQGAN":
    """Return the model tree with ShapeDtypeStructs, replicated over any ambient mesh."""
    like = jax.eval_shape(lambda: VQGAN(config, rngs=_EqualKeys(), decoder=decoder))
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return like
    replicated = NamedSharding(mesh, P())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)  # noqa: E731
    return jax.tree.map(shape, like)


def load(file: str | os.PathLike, config: VQ) -> "VQGAN":
    """Return the weights of a vqgan.safetensors file, with or without its decoder.

    Hugging Face's checkpoints of this family have no decoder; the encoder is enough to tokenize.
    Raises WeightsError on a file that does not fit the config.
    """
    names = safetensors_file.names(file)
    check_blocks(names, config, file)
    has_decoder = any(name.startswith("decoder.") for name in names)
    return safetensors_file.load(file, abstract(config, decoder=has_decoder))


def check_blocks(names: Iterable[str], config: VQ, where: object) -> None:
    """Raise WeightsError where the config has residual blocks that the weights do not have.

    Tracing a network takes some 50 ms per block, so this check runs before a network is built from
    an external config. `names` are those of this project or of taming-transformers.
    """
    present = {name.rpartition(".")[0] for name in names}
    expected = [
        f"encoder.down.{level}.block.{block}.conv1"
        for level in range(len(config.channel_mult))
        for block in range(config.num_res_blocks)
    ]
    if missing := [name for name in expected if name not in present]:
        raise safetensors_file.WeightsError(
            f"{where}: {missing[0]} is missing ({len(missing)} of {len(expected)} blocks of the "
            "config are); use the config of this VQGAN, or copy the file again"
        )


@jax.jit
def encode(model: "VQGAN", pixels: Float[Array, "b h w 3"]) -> Int[Array, "b i j"]:
    """Encode pixels in [-1, 1] to codes; codes.reshape(b, -1) is the token order (row-major)."""
    return model.quantize.nearest(model.latents(pixels))


@jax.jit
def decode_codes(model: "VQGAN", codes: Int[Array, "b i j"]) -> Float[Array, "b h w 3"]:
    """Decode codes to pixels, about [-1, 1]; `to_uint8` clamps."""
    return model.pixels(model.quantize.rows(codes))


def to_uint8(pixels: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Map [-1, 1] to 0..255, clamped and truncated as in Meta's decoder. 0.999 -> 254, -1 -> 0."""
    return ((jnp.clip(pixels, -1, 1) + 1) / 2 * 255).astype(jnp.uint8)


class _EqualKeys:
    """Stands for nnx.Rngs where only shapes are needed.

    Flax counts its keys in variables; inside a trace each count searches all equations so far,
    which was three quarters of the time that `abstract` took.
    """

    def params(self) -> jax.Array:
        """Return a key for parameters."""
        return jax.random.key(0)


class VQGAN(nnx.Module):
    """Combines encoder, quant_conv, quantize, post_quant_conv and decoder: the full checkpoint.

    Without a decoder it converts pixels to codes, and `decode_codes` cannot be called.
    """

    def __init__(self, config: VQ, *, rngs: nnx.Rngs | _EqualKeys, decoder: bool = True):
        encoding, decoding = (
            Parts(rngs, p, config.norm_groups) for p in (ENCODER_PRECISION, DECODER_PRECISION)
        )
        self.encoder = Encoder(config, encoding)
        self.quant_conv = encoding.conv(config.z_channels, config.embed_dim, 1)
        self.quantize = Codebook(config.num_codes, config.embed_dim, rngs=rngs)
        self.post_quant_conv = decoding.conv(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config, decoding) if decoder else None

    @property
    def has_decoder(self) -> bool:
        """Return whether codes can be decoded to images."""
        return self.decoder is not None

    def latents(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b i j E"]:
        """Return the latents whose nearest codebook rows are looked up."""
        return self.quant_conv(self.encoder(pixels))

    def quantized(
        self, pixels: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b i j E"], Int[Array, "b i j"], Float[Array, "b i j E"]]:
        """Return (latents, codes, their codebook rows), for training."""
        latents = self.latents(pixels)
        codes = self.quantize.nearest(jax.lax.stop_gradient(latents))
        return latents, codes, self.quantize.rows(codes)

    def pixels(self, rows: Float[Array, "b i j E"]) -> Float[Array, "b h w 3"]:
        """Return the image of a raster of codebook rows."""
        return self.decoder(self.post_quant_conv(rows))


class Codebook(nnx.Module):
    """Holds num_codes rows of width E; a latent is assigned the nearest one."""

    def __init__(self, num_codes: int, embed_dim: int, *, rngs: nnx.Rngs | _EqualKeys):
        start = jax.random.uniform(
            rngs.params(), (num_codes, embed_dim), minval=-1 / num_codes, maxval=1 / num_codes
        )
        self.embedding = nnx.Param(start)

    def nearest(self, z: Float[Array, "b i j E"]) -> Int[Array, "b i j"]:
        """Return the argmin of |z - e|^2 in fp32; the lowest code wins a tie."""
        z, table = z.astype(jnp.float32), self.embedding[...].astype(jnp.float32)
        dots = jnp.einsum("bije,ke->bijk", z, table, precision=ENCODER_PRECISION)
        squares = (z**2).sum(-1, keepdims=True) + (table**2).sum(-1)
        return jnp.argmin(squares - 2 * dots, axis=-1)  # [b, i, j]

    def rows(self, codes: Int[Array, "b i j"]) -> Float[Array, "b i j E"]:
        """Return the rows of the codes, with the sharding of the codes."""
        sharding = jax.typeof(codes).sharding
        if sharding.mesh.empty:
            return self.embedding[...][codes]
        return self.embedding[...].at[codes].get(out_sharding=P(*sharding.spec, None))


class Parts(NamedTuple):
    """Builds the layers of one half of the model with shared settings."""

    rngs: nnx.Rngs | _EqualKeys
    precision: jax.lax.Precision
    norm_groups: int

    def conv(self, width: int, out: int, size: int) -> nnx.Conv:
        kernel = (size, size)
        return nnx.Conv(
            width, out, kernel, padding="SAME", precision=self.precision, rngs=self.rngs
        )

    def norm(self, width: int) -> nnx.GroupNorm:
        # The fast variance (E[x^2] - E[x]^2) cancels in fp32 when the mean is large.
        groups = self.norm_groups
        return nnx.GroupNorm(
            width, num_groups=groups, epsilon=EPS, use_fast_variance=False, rngs=self.rngs
        )


class Encoder(nnx.Module):
    """Encodes pixels to latents of Z channels at 1 / 2^(levels - 1) of the size."""

    def __init__(self, config: VQ, parts: Parts):
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = parts.conv(3, config.channels, 3)
        self.down = nnx.List()
        width = config.channels
        for level, out in enumerate(widths):
            blocks = [width] + [out] * (config.num_res_blocks - 1)
            last = level == len(widths) - 1
            self.down.append(Level(blocks, out, None if last else "downsample", parts))
            width = out
        self.mid = Mid(width, parts)
        self.norm_out = parts.norm(width)
        self.conv_out = parts.conv(width, config.z_channels, 3)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b i j Z"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(nnx.swish(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Decodes latents of Z channels to pixels."""

    def __init__(self, config: VQ, parts: Parts):
        widths = [config.channels * m for m in config.channel_mult]
        width = widths[-1]
        self.conv_in = parts.conv(config.z_channels, width, 3)
        self.mid = Mid(width, parts)
        up = []
        for level, out in reversed(list(enumerate(widths))):
            blocks = [width] + [out] * config.num_res_blocks
            up.append(Level(blocks, out, "upsample" if level else None, parts))
            width = out
        self.up = nnx.List(up[::-1])  # up.0 is the full size, as in the checkpoint
        self.norm_out = parts.norm(width)
        self.conv_out = parts.conv(width, 3, 3)

    def __call__(self, z: Float[Array, "b i j Z"]) -> Float[Array, "b h w 3"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(nnx.swish(self.norm_out(x)))


class Level(nnx.Module):
    """Applies residual blocks at one size, then `downsample`, `upsample` or no change of size."""

    def __init__(self, widths: list[int], out: int, change: str | None, parts: Parts):
        self.block = nnx.List([ResBlock(w, out, parts) for w in widths])
        self.downsample = Downsample(out, parts) if change == "downsample" else None
        self.upsample = Upsample(out, parts) if change == "upsample" else None

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b k l D"]:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Mid(nnx.Module):
    """Applies a residual block, attention over all positions, and another residual block."""

    def __init__(self, width: int, parts: Parts):
        self.block_1 = ResBlock(width, width, parts)
        self.attn_1 = Attention(width, parts)
        self.block_2 = ResBlock(width, width, parts)

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b i j C"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nnx.Module):
    """Computes x + conv(swish(norm(conv(swish(norm(x)))))).

    A 1x1 convolution `nin_shortcut` is applied to x where the width changes.
    """

    def __init__(self, width: int, out: int, parts: Parts):
        self.norm1 = parts.norm(width)
        self.conv1 = parts.conv(width, out, 3)
        self.norm2 = parts.norm(out)
        self.conv2 = parts.conv(out, out, 3)
        self.nin_shortcut = None if width == out else parts.conv(width, out, 1)

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b i j D"]:
        y = self.conv1(nnx.swish(self.norm1(x)))
        y = self.conv2(nnx.swish(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nnx.Module):
    """Applies single-head attention over all positions of an image, on a residual branch."""

    def __init__(self, width: int, parts: Parts):
        self.norm = parts.norm(width)
        self.q = parts.conv(width, width, 1)
        self.k = parts.conv(width, width, 1)
        self.v = parts.conv(width, width, 1)
        self.proj_out = parts.conv(width, width, 1)
        self.precision = parts.precision

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b i j C"]:
        y = self.norm(x)
        b, i, j, c = x.shape
        q, k, v = (f(y).reshape(b, i * j, c) for f in (self.q, self.k, self.v))  # [b, i*j, C]
        scores = jnp.einsum("btc,bsc->bts", q, k, precision=self.precision) * c**-0.5
        mixed = jnp.einsum("bts,bsc->btc", jax.nn.softmax(scores), v, precision=self.precision)
        return x + self.proj_out(mixed.reshape(b, i, j, c))


class Downsample(nnx.Module):
    """Halves the size; padding is one row below and one column right, as in the checkpoint."""

    def __init__(self, width: int, parts: Parts):
        self.conv = nnx.Conv(
            width,
            width,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            precision=parts.precision,
            rngs=parts.rngs,
        )

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b k l C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Enlarges each side by two, repeating every position, then applies a convolution."""

    def __init__(self, width: int, parts: Parts):
        self.conv = parts.conv(width, width, 3)

    def __call__(self, x: Float[Array, "b i j C"]) -> Float[Array, "b k l C"]:
        b, i, j, c = x.shape
        x = jnp.broadcast_to(x[:, :, None], (b, i, 2, j, c)).reshape(b, 2 * i, j, c)
        x = jnp.broadcast_to(x[:, :, :, None], (b, 2 * i, j, 2, c))
        return self.conv(x.reshape(b, 2 * i, 2 * j, c))
