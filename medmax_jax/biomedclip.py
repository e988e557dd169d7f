"""BiomedCLIP: pictures and texts to unit vectors of one space, whose dot product is the score.

    pixels b h w 3 --patches, CLS--> B T D --pre-norm blocks, norm--> CLS --head--> B E
    ids B T --words, positions--> B T D --post-norm blocks (BERT)--> CLS --proj_in, proj_out--> B E

A port of open_clip's `CustomTextCLIP` around timm's ViT and Hugging Face's BERT. Blocks stand
stacked on axis 0 and lax.scan runs them. All in fp32 at the highest precision: TPU's default moves
a score in its third digit. biomedclip_files.py reads the published weights, biomedclip_inputs.py
makes pixels and ids.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

PAD = 0  # id of [PAD] in the published vocabulary; such keys are masked
IMAGE_EPS = 1e-6  # of every LayerNorm in timm's ViT
TEXT_EPS = 1e-12  # in BERT
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSizes:
    size: int  # pixels, square
    patch: int
    width: int
    layers: int
    heads: int
    mlp: int

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 2 + 1  # CLS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSizes:
    vocab: int
    positions: int
    context: int  # tokens of a text, CLS and SEP included
    width: int
    layers: int
    heads: int
    mlp: int
    head: int  # between the two projections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """configs/biomedclip.py has the published ones."""

    embed_dim: int
    image: ImageSizes
    text: TextSizes


def abstract(sizes: Sizes) -> "BiomedClip":
    """The tree of weights as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: BiomedClip(sizes, rngs=nnx.Rngs(0)))


@jax.jit
def image_embeddings(model: "BiomedClip", pixels: Float[Array, "b h w 3"]) -> Float[Array, "b E"]:
    """Unit vectors of normalised pixels."""
    return _unit(model.visual(pixels))


@jax.jit
def text_embeddings(model: "BiomedClip", ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    """Unit vectors of texts; padding at the end changes nothing."""
    return _unit(model.text(ids))


class BiomedClip(nnx.Module):
    """Both towers, and the temperature of training, which no score uses."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.visual = ImageTower(sizes.image, sizes.embed_dim, rngs=rngs)
        self.text = TextTower(sizes.text, sizes.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


class ImageTower(nnx.Module):
    """timm's ViT with its CLS token, and a projection."""

    def __init__(self, sizes: ImageSizes, embed_dim: int, *, rngs: nnx.Rngs):
        side = (sizes.patch, sizes.patch)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, sizes.width)))
        self.pos_embed = nnx.Param(jnp.zeros((1, sizes.tokens, sizes.width)))
        self.patch_embed = nnx.Conv(
            3, sizes.width, side, strides=side, padding="VALID", precision=EXACT, rngs=rngs
        )
        self.blocks = jax.vmap(lambda key: ImageBlock(sizes, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), sizes.layers)
        )
        self.norm = _norm(sizes.width, IMAGE_EPS, rngs)
        self.head = _linear(sizes.width, embed_dim, rngs, bias=False)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b E"]:
        x = self.patch_embed(pixels)  # [b, i, j, D]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        # An empty place before the patches, filled by the addition: under any sharding of b.
        first = jnp.pad(self.cls_token[...], ((0, 0), (0, x.shape[1]), (0, 0)))
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + (self.pos_embed[...] + first)  # [b, T, D]
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return self.head(self.norm(x)[:, 0])


class TextTower(nnx.Module):
    """BERT without its pooler, and an MLP on its CLS token."""

    def __init__(self, sizes: TextSizes, embed_dim: int, *, rngs: nnx.Rngs):
        self.word_embeddings = nnx.Param(jnp.zeros((sizes.vocab, sizes.width)))
        self.position_embeddings = nnx.Param(jnp.zeros((sizes.positions, sizes.width)))
        self.token_type_embeddings = nnx.Param(jnp.zeros((2, sizes.width)))
        self.norm = _norm(sizes.width, TEXT_EPS, rngs)
        self.layers = jax.vmap(lambda key: TextBlock(sizes, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), sizes.layers)
        )
        self.proj_in = _linear(sizes.width, sizes.head, rngs, bias=False)
        self.proj_out = _linear(sizes.head, embed_dim, rngs, bias=False)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
        words = _rows(self.word_embeddings[...], ids)  # [B, T, D]
        places = self.position_embeddings[: ids.shape[1]] + self.token_type_embeddings[0]
        x, mask = self.norm(words + places), ids != PAD
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, mask), None), x, self.layers)
        return self.proj_out(_gelu(self.proj_in(x[:, 0])))


class ImageBlock(nnx.Module):
    """x + proj(attention(norm1 x)), then x + mlp(norm2 x)."""

    def __init__(self, sizes: ImageSizes, *, rngs: nnx.Rngs):
        self.norm1 = _norm(sizes.width, IMAGE_EPS, rngs)
        self.qkv = _linear(sizes.width, 3 * sizes.width, rngs)
        self.proj = _linear(sizes.width, sizes.width, rngs)
        self.norm2 = _norm(sizes.width, IMAGE_EPS, rngs)
        self.fc1 = _linear(sizes.width, sizes.mlp, rngs)
        self.fc2 = _linear(sizes.mlp, sizes.width, rngs)
        self.heads = sizes.heads

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        x = x + self.proj(_attend(q, k, v, heads=self.heads, mask=None))
        return x + self.fc2(_gelu(self.fc1(self.norm2(x))))


class TextBlock(nnx.Module):
    """norm1(x + attended(attention(x))), then norm2(x + mlp(x))."""

    def __init__(self, sizes: TextSizes, *, rngs: nnx.Rngs):
        self.query = _linear(sizes.width, sizes.width, rngs)
        self.key = _linear(sizes.width, sizes.width, rngs)
        self.value = _linear(sizes.width, sizes.width, rngs)
        self.attended = _linear(sizes.width, sizes.width, rngs)
        self.norm1 = _norm(sizes.width, TEXT_EPS, rngs)
        self.fc1 = _linear(sizes.width, sizes.mlp, rngs)
        self.fc2 = _linear(sizes.mlp, sizes.width, rngs)
        self.norm2 = _norm(sizes.width, TEXT_EPS, rngs)
        self.heads = sizes.heads

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        x = self.norm1(x + self.attended(_attend(q, k, v, heads=self.heads, mask=mask)))
        return self.norm2(x + self.fc2(_gelu(self.fc1(x))))


def _rows(table: Float[Array, "V D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of the ids, sharded like them."""
    sharding = jax.typeof(ids).sharding
    if sharding.mesh.empty:
        return table[ids]
    return table.at[ids].get(out_sharding=P(*sharding.spec, None))


def _attend(
    q: Float[Array, "B T D"],
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    *,
    heads: int,
    mask: Bool[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """Every token looks at every key that the mask has; None for all."""
    b, t, d = q.shape
    q, k, v = (x.reshape(b, t, heads, d // heads) for x in (q, k, v))  # [B, T, N, H]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision=EXACT) * (d // heads) ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v, precision=EXACT)
    return mixed.reshape(b, t, d)


def _linear(din: int, dout: int, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    return nnx.Linear(din, dout, use_bias=bias, precision=EXACT, rngs=rngs)


def _norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance (E[x^2] - E[x]^2) cancels in fp32 when the mean is large.
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


def _gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.gelu(x, approximate=False)  # erf: flax's default is the tanh approximation


def _unit(x: Float[Array, "b E"]) -> Float[Array, "b E"]:
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True)).clip(1e-12)  # torch's guard against 0 / 0
