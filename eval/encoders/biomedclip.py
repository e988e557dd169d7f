"""BiomedCLIP maps images and texts to unit vectors of one space; their dot product is the score.

    pixels b h w 3 --patches, CLS--> B T D --pre-norm blocks, norm--> CLS --head--> B E
    ids B T --words, positions--> B T D --post-norm blocks (BERT)--> CLS --proj_in, proj_out--> B E

A port of open_clip's `CustomTextCLIP` around timm's ViT and Hugging Face's BERT. Blocks are
stacked on axis 0 and lax.scan runs them. All in fp32 at the highest precision: TPU's default moves
a score in its third digit. This module also reads the published weights and
prepares pixels and ids.
"""

import dataclasses
import html
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32
from PIL import Image
from safetensors import SafetensorError
from tokenizers import normalizers, pre_tokenizers, processors

from medmax_jax.checkpoints import safetensors_file, torch_file
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.models import image_headers, images
from medmax_jax.sharding import AXES, ROWS
from medmax_jax.storage.folder import Folder

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
    """Holds the sizes of both towers; PUBLISHED_SIZES has those of the published model."""

    embed_dim: int
    image: ImageSizes
    text: TextSizes


def abstract(sizes: Sizes) -> "BiomedClip":
    """Return the tree of weights as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: BiomedClip(sizes, rngs=nnx.Rngs(0)))


@jax.jit
def image_embeddings(model: "BiomedClip", pixels: Float[Array, "b h w 3"]) -> Float[Array, "b E"]:
    """Return unit vectors of normalized pixels."""
    return _unit(model.visual(pixels))


@jax.jit
def text_embeddings(model: "BiomedClip", ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    """Return unit vectors of texts; padding at the end changes nothing."""
    return _unit(model.text(ids))


class BiomedClip(nnx.Module):
    """Holds both towers, and the training temperature, which no score uses."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.visual = ImageTower(sizes.image, sizes.embed_dim, rngs=rngs)
        self.text = TextTower(sizes.text, sizes.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


class ImageTower(nnx.Module):
    """Implements timm's ViT with its CLS token, and a projection."""

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
        # The addition fills a zero row before the patches: this holds under any sharding of b.
        first = jnp.pad(self.cls_token[...], ((0, 0), (0, x.shape[1]), (0, 0)))
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + (self.pos_embed[...] + first)  # [b, T, D]
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return self.head(self.norm(x)[:, 0])


class TextTower(nnx.Module):
    """Implements BERT without its pooler, and an MLP on its CLS token."""

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
        positions = self.position_embeddings[: ids.shape[1]] + self.token_type_embeddings[0]
        x, mask = self.norm(words + positions), ids != PAD
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, mask), None), x, self.layers)
        return self.proj_out(_gelu(self.proj_in(x[:, 0])))


class ImageBlock(nnx.Module):
    """Computes x + proj(attention(norm1 x)), then x + mlp(norm2 x)."""

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
    """Computes norm1(x + attended(attention(x))), then norm2(x + mlp(x))."""

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
    """Return the rows of the ids, sharded like them."""
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
    """Attend from every token to every key that the mask allows; None allows all."""
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


# ---- BiomedCLIP's published files to the Flax model: every tensor by its name, or an error ----
#
#     open_clip_model.safetensors, or open_clip_pytorch_model.bin    351 tensors
#     open_clip_config.json                                          must match the code here
#     vocab.txt                                                      one word per line
#
# KEY_MAP maps each array of this model to its published name; `{}` is the layer, over which arrays
# are stacked here. Kernels are transposed weights; scales and tables are the weights themselves.
# The .bin is read without torch, and nothing in it is executed.

Reads = dict[str, Callable[[], np.ndarray]]  # name -> function that reads the tensor
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
CONFIG, VOCAB = "open_clip_config.json", "vocab.txt"
FETCH = "hf download microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 --local-dir"
_BLOCK, _LAYER = "visual.trunk.blocks.{}.", "text.transformer.encoder.layer.{}."
KEY_MAP = {
    "visual.cls_token": "visual.trunk.cls_token",
    "visual.pos_embed": "visual.trunk.pos_embed",
    "visual.patch_embed": "visual.trunk.patch_embed.proj",
    "visual.blocks.norm1": _BLOCK + "norm1",
    "visual.blocks.qkv": _BLOCK + "attn.qkv",
    "visual.blocks.proj": _BLOCK + "attn.proj",
    "visual.blocks.norm2": _BLOCK + "norm2",
    "visual.blocks.fc1": _BLOCK + "mlp.fc1",
    "visual.blocks.fc2": _BLOCK + "mlp.fc2",
    "visual.norm": "visual.trunk.norm",
    "visual.head": "visual.head.proj",
    "text.word_embeddings": "text.transformer.embeddings.word_embeddings.weight",
    "text.position_embeddings": "text.transformer.embeddings.position_embeddings.weight",
    "text.token_type_embeddings": "text.transformer.embeddings.token_type_embeddings.weight",
    "text.norm": "text.transformer.embeddings.LayerNorm",
    "text.layers.query": _LAYER + "attention.self.query",
    "text.layers.key": _LAYER + "attention.self.key",
    "text.layers.value": _LAYER + "attention.self.value",
    "text.layers.attended": _LAYER + "attention.output.dense",
    "text.layers.norm1": _LAYER + "attention.output.LayerNorm",
    "text.layers.fc1": _LAYER + "intermediate.dense",
    "text.layers.fc2": _LAYER + "output.dense",
    "text.layers.norm2": _LAYER + "output.LayerNorm",
    "text.proj_in": "text.proj.0",
    "text.proj_out": "text.proj.2",
    "logit_scale": "logit_scale",
}
# A buffer 0, 1, 2, .. that transformers stored in checkpoints until 4.31; not a weight.
DROPPED = {"text.transformer.embeddings.position_ids"}


class WordPiece:
    """Tokenizes texts into rows of `context` ids with the published vocabulary."""

    def __init__(self, vocab: str | Path, *, size: int, context: int):
        """Read the vocabulary. `size`: the number of ids that the model has rows for."""
        vocabulary = _read_vocabulary(Path(vocab), size)
        self.context = context
        self._backend = tokenizers.Tokenizer(
            tokenizers.models.WordPiece(
                vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD
            )
        )
        self._backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._backend.post_processor = processors.BertProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
        )
        self._backend.add_special_tokens(list(SPECIALS))
        self._backend.enable_truncation(context)
        self._backend.enable_padding(length=context, pad_id=PAD, pad_token="[PAD]")

    def ids(self, texts: Sequence[str]) -> Int32[np.ndarray, "n T"]:
        """Return one row per text, cut or padded to `context`."""
        encodings = self._backend.encode_batch([clean(text) for text in texts])
        return np.array([row.ids for row in encodings], np.int32).reshape(len(texts), self.context)


def load(folder: str, sizes: Sizes) -> tuple[BiomedClip, WordPiece]:
    """Load model and tokenizer from the published repository's folder on a local disk.

    Raises WeightsError on files that are missing, incomplete, or not of these sizes.
    """
    if "://" in folder:
        raise WeightsError(
            f"{folder}: BiomedCLIP is read from a local disk only; copy the folder to one"
        )
    files = Folder(folder)
    name = SAFE if files.has(SAFE) else BIN
    for required in (name, CONFIG, VOCAB):
        if not files.has(required):
            raise WeightsError(
                f"{folder}/{required} is missing; download it with `{FETCH} {folder}`"
            )
    _check_config(f"{folder}/{CONFIG}", files.json(CONFIG), sizes)
    tokenizer = WordPiece(f"{folder}/{VOCAB}", size=sizes.text.vocab, context=sizes.text.context)
    readers = _safe(f"{folder}/{SAFE}") if name == SAFE else _bin(files)
    return from_tensors(f"{folder}/{name}", readers, sizes), tokenizer


def from_tensors(where: str, reads: Reads, sizes: Sizes) -> BiomedClip:
    """Build the model from open_clip's tensors, each read when it is needed.

    `where`: the source, for messages.
    """
    like = abstract(sizes)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves_by_name = {safetensors_file.dotted_name(path): leaf for path, leaf in leaves}
    sources = {name: published_keys(name, sizes) for name in leaves_by_name}
    expected = {key for keys in sources.values() for key in keys}
    safetensors_file.check_names(where, set(reads) - DROPPED, expected)
    arrays = [
        _array(where, name, sources[name], reads, leaves_by_name[name]) for name in leaves_by_name
    ]
    return jax.tree_util.tree_unflatten(structure, arrays)


def published_keys(name: str, sizes: Sizes) -> list[str]:
    """Return the published names of one array of this model, one per layer.

    "visual.blocks.qkv.kernel" -> ["visual.trunk.blocks.0.attn.qkv.weight", ..]
    """
    if name in KEY_MAP:
        return [KEY_MAP[name]]
    module, _, leaf = name.rpartition(".")
    key = f"{KEY_MAP[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    tower = sizes.image if module.startswith("visual.") else sizes.text
    return [key.format(n) for n in range(tower.layers)] if "{}" in key else [key]


def _array(where: str, name: str, keys: list[str], reads: Reads, like: Any) -> jax.Array:
    """Return one array of this model, float32."""
    stacked = name.startswith(("visual.blocks.", "text.layers."))
    shape = tuple(like.shape)[1:] if stacked else tuple(like.shape)
    parts = []
    for key in keys:
        part = np.asarray(reads[key]())
        converted = _to_flax(name, part).shape
        if converted != shape:
            raise WeightsError(
                f"{where}: {key} has shape {part.shape}, which converts to {name} {converted}; "
                f"expected {shape}: use the files of BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
            )
        if not np.isfinite(part).all():
            raise WeightsError(f"{where}: {key} contains NaN or infinity; download it again")
        parts.append(_to_flax(name, part.astype(np.float32)))
    return jnp.asarray(np.stack(parts) if stacked else parts[0])


def _to_flax(name: str, published_keys: np.ndarray) -> np.ndarray:
    if not name.endswith(".kernel"):
        return published_keys
    return (
        published_keys.transpose(2, 3, 1, 0) if published_keys.ndim == 4 else published_keys.T
    )  # OIHW to HWIO


def _bin(files: Folder) -> Reads:
    file = files.file(BIN)
    return {
        name: lambda entry=entry: torch_file.read(file, entry)
        for name, entry in torch_file.open_file(file).items()
    }


def _safe(path: str) -> Reads:
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is not a complete safetensors file ({error}); download it again"
        ) from error
    return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check_config(where: str, config: Any, sizes: Sizes) -> None:
    """Raise WeightsError where the published settings differ from those implemented here."""
    supported = {
        "model_cfg.embed_dim": sizes.embed_dim,
        "model_cfg.vision_cfg.image_size": sizes.image.size,
        "model_cfg.vision_cfg.timm_pool": "",  # CLS after the last norm
        "model_cfg.vision_cfg.timm_proj": "linear",
        "model_cfg.text_cfg.hf_proj_type": "mlp",
        "model_cfg.text_cfg.hf_pooler_type": "cls_last_hidden_state_pooler",
        "model_cfg.text_cfg.context_length": sizes.text.context,
        "preprocess_cfg.mean": list(MEAN),
        "preprocess_cfg.std": list(STD),
    }
    for name, value in supported.items():
        at = config
        for part in name.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at != value:
            raise WeightsError(
                f"{where}: {name} is {at!r}, but this port supports {value!r} only; use the folder "
                "of BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
            )


# ---- Embedding ----
#
# Embeddings of many images and texts, in batches of few shapes, over all devices of a process.
#
#     images     batches of `batch` per device, the last one padded with copies that are dropped
#     texts      sorted by length, each batch cut to the first of LENGTHS that fits its longest text
#
# Rows are split over the devices; weights are replicated. Each process embeds its own share.

LENGTHS = (32, 64, 128)  # tokens; the next is the context. A caption has about 40


class Embedder:
    """Runs the model on all devices of this process. `batch`: rows per device."""

    def __init__(self, model: BiomedClip, *, batch: int):
        devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
        self._mesh = jax.sharding.Mesh(devices, AXES, (AxisType.Explicit,) * 3)
        self._rows = batch * devices.size
        self._model = jax.device_put(model, NamedSharding(self._mesh, P()))

    def images(self, pixels: Iterable[Float32[np.ndarray, "h w 3"]]) -> Float32[np.ndarray, "n E"]:
        """Return one unit vector per image, in order; one batch is in memory at a time."""
        embeddings = [self._run(image_embeddings, np.stack(part)) for part in self._parts(pixels)]
        return np.concatenate(embeddings) if embeddings else self._empty()

    def texts(self, ids: Int32[np.ndarray, "n T"]) -> Float32[np.ndarray, "n E"]:
        """Return one unit vector per row of ids, in order."""
        lengths = (ids != PAD).sum(1)
        order = np.argsort(lengths, kind="stable")
        embeddings = self._empty(len(ids))
        for start in range(0, len(ids), self._rows):
            part = order[start : start + self._rows]
            longest = int(lengths[part].max())
            width = next((n for n in LENGTHS if longest <= n < ids.shape[1]), ids.shape[1])
            embeddings[part] = self._run(text_embeddings, ids[part, :width])
        return embeddings

    def _parts(self, pixels: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
        part: list[np.ndarray] = []
        for image_pixels in pixels:
            part.append(image_pixels)
            if len(part) == self._rows:
                yield part
                part = []
        if part:
            yield part

    def _run(self, embed: Callable[[BiomedClip, Array], Array], rows: np.ndarray) -> np.ndarray:
        full = np.concatenate([rows, np.repeat(rows[:1], self._rows - len(rows), axis=0)])
        with jax.set_mesh(self._mesh):
            sharding = NamedSharding(self._mesh, P(ROWS, *[None] * (full.ndim - 1)))
            return np.asarray(embed(self._model, jax.device_put(full, sharding)))[: len(rows)]

    def _empty(self, count: int = 0) -> Float32[np.ndarray, "n E"]:
        return np.zeros((count, self._model.text.proj_out.kernel.shape[-1]), np.float32)


# ---- Inputs ----
#
# BiomedCLIP's inputs: images as open_clip's eval transform prepares them, texts as WordPiece ids.
#
#     image   -> short side = size, the other int(size * long / short), BICUBIC
#             -> center crop at round((side - size) / 2), halves to even -> / 255, normalized
#     text    -> ftfy, HTML entities twice, spaces -> lower-case WordPiece -> CLS .. SEP, cut
#
# There are two orders of conversion to RGB. The correct one converts first (images.to_rgb).
# `released` is the order of the evaluation in the MedMax release: only RGBA is converted first, and
# alpha dropped; other modes are resized without conversion: a palette by nearest neighbor,
# and 16-bit gray saturates to white.

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, as in open_clip_config.json
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100  # characters; a longer word is [UNK], as in BERT


class InputError(ValueError):
    """Raised for an unusable vocabulary or text; the message states the reason and the fix."""


def pixels(image: Image.Image, *, size: int, released: bool) -> Float32[np.ndarray, "h w 3"]:
    """Return the normalized center square.

    Raises ImageError on an image too narrow to be scaled.
    """
    if not released:
        image = images.to_rgb(image)
    elif image.mode == "RGBA":
        image = image.convert("RGB")
    short, long = min(image.size), max(image.size)
    scaled = tuple(size if side == short else int(size * long / short) for side in image.size)
    if scaled[0] * scaled[1] > images.MAX_PIXELS:
        raise image_headers.ImageError(
            f"too narrow ({image.width} x {image.height} pixels); crop the image"
        )
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in scaled)
    square = image.crop((left, top, left + size, top + size)).convert("RGB")
    values = np.asarray(square, np.float32) / np.float32(255)
    return (values - np.float32(MEAN)) / np.float32(STD)


def clean(text: str) -> str:
    """Clean a text as open_clip does: fix wrong encodings, entities and spaces.

    "a &amp;lt; b \\n c" -> "a < b c".
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _read_vocabulary(vocab: Path, size: int) -> dict[str, int]:
    try:
        lines = vocab.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{vocab} cannot be read ({error}); use the vocab.txt of the published repository"
        ) from error
    words = {word: n for n, word in enumerate(lines)}
    if missing := [name for name in SPECIALS if name not in words]:
        raise InputError(
            f"{vocab} has no {missing[0]}; use a vocab.txt of BERT, with one word per line"
        )
    if words["[PAD]"] != PAD:
        raise InputError(
            f"{vocab}: [PAD] is word {words['[PAD]']}, but the model masks {PAD}; use the "
            "vocab.txt that was published with these weights"
        )
    if len(lines) != size or len(words) != size:
        raise InputError(
            f"{vocab} has {len(lines)} lines and {len(words)} words, but the model has {size}; use "
            "the vocab.txt that was published with these weights"
        )
    return words


# ---- The sizes of BiomedCLIP, microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 ----
#
# From its open_clip_config.json: timm's vit_base_patch16_224 and BiomedBERT-base with an mlp head.


PUBLISHED_SIZES = types.MappingProxyType(
    dict(
        embed_dim=512,
        image=dict(size=224, patch=16, width=768, layers=12, heads=12, mlp=3072),
        text=dict(
            vocab=30_522,
            positions=512,  # rows of the table; a text uses the first `context`
            context=256,
            width=768,
            layers=12,
            heads=12,
            mlp=3072,
            head=640,  # (768 + 512) // 2: open_clip's mlp projection
        ),
    )
)
