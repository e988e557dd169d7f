"""BiomedCLIP's published files to the Flax model: every tensor by its name, or an error.

    open_clip_model.safetensors, or open_clip_pytorch_model.bin    351 tensors
    open_clip_config.json                                          must say what is computed here
    vocab.txt                                                      a word a line

PLACES says where each of our arrays stands there; `{}` is the layer, over which ours are stacked.
Kernels are transposed weights, scales and tables the weights themselves. The .bin is read without
torch and nothing in it is executed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import SafetensorError

from medmax_jax import biomedclip, biomedclip_inputs, pth, weights
from medmax_jax.biomedclip import BiomedClip, Sizes
from medmax_jax.biomedclip_inputs import WordPiece
from medmax_jax.storage import Folder
from medmax_jax.weights import WeightsError

Reads = dict[str, Callable[[], np.ndarray]]  # name -> what reads the tensor
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
CONFIG, VOCAB = "open_clip_config.json", "vocab.txt"
FETCH = "hf download microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 --local-dir"
_BLOCK, _LAYER = "visual.trunk.blocks.{}.", "text.transformer.encoder.layer.{}."
PLACES = {
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
# A buffer 0, 1, 2, .. that transformers kept in checkpoints until 4.31; no weight.
DROPPED = {"text.transformer.embeddings.position_ids"}


def load(folder: str, sizes: Sizes) -> tuple[BiomedClip, WordPiece]:
    """Model and tokenizer of the published repository's folder, on a local disk.

    Raises WeightsError on files that are not there, not whole, or not of these sizes.
    """
    if "://" in folder:
        raise WeightsError(f"{folder}: BiomedCLIP is read from a local disk; copy the folder there")
    files = Folder(folder)
    name = SAFE if files.has(SAFE) else BIN
    for wanted in (name, CONFIG, VOCAB):
        if not files.has(wanted):
            raise WeightsError(f"{folder}/{wanted}: missing; `{FETCH} {folder}`")
    _check_config(f"{folder}/{CONFIG}", files.json(CONFIG), sizes)
    tokenizer = WordPiece(f"{folder}/{VOCAB}", size=sizes.text.vocab, context=sizes.text.context)
    reads = _safe(f"{folder}/{SAFE}") if name == SAFE else _bin(files)
    return from_tensors(f"{folder}/{name}", reads, sizes), tokenizer


def from_tensors(where: str, reads: Reads, sizes: Sizes) -> BiomedClip:
    """The model of open_clip's tensors, each read when its turn comes. `where`: for messages."""
    like = biomedclip.abstract(sizes)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    ours = {weights.dotted(path): leaf for path, leaf in leaves}
    sources = {name: theirs(name, sizes) for name in ours}
    known = {key for keys in sources.values() for key in keys}
    weights.check_names(where, set(reads) - DROPPED, known)
    arrays = [_array(where, name, sources[name], reads, ours[name]) for name in ours]
    return jax.tree_util.tree_unflatten(structure, arrays)


def theirs(name: str, sizes: Sizes) -> list[str]:
    """Their names of one of our arrays, a layer each.

    "visual.blocks.qkv.kernel" -> ["visual.trunk.blocks.0.attn.qkv.weight", ..]
    """
    if name in PLACES:
        return [PLACES[name]]
    module, _, leaf = name.rpartition(".")
    key = f"{PLACES[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    tower = sizes.image if module.startswith("visual.") else sizes.text
    return [key.format(n) for n in range(tower.layers)] if "{}" in key else [key]


def _array(where: str, name: str, keys: list[str], reads: Reads, like: Any) -> jax.Array:
    """One of our arrays, float32."""
    stacked = name.startswith(("visual.blocks.", "text.layers."))
    shape = tuple(like.shape)[1:] if stacked else tuple(like.shape)
    parts = []
    for key in keys:
        part = np.asarray(reads[key]())
        if _ours(name, part).shape != shape:
            raise WeightsError(
                f"{where}: {key} has shape {part.shape}, which does not fit {name} {shape}; use "
                "the files of BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
            )
        if not np.isfinite(part).all():
            raise WeightsError(f"{where}: {key} has NaN or infinite numbers; download it again")
        parts.append(_ours(name, part.astype(np.float32)))
    return jnp.asarray(np.stack(parts) if stacked else parts[0])


def _ours(name: str, theirs: np.ndarray) -> np.ndarray:
    if not name.endswith(".kernel"):
        return theirs
    return theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs.T  # OIHW to HWIO


def _bin(files: Folder) -> Reads:
    file = files.file(BIN)
    return {
        name: lambda entry=entry: pth.read(file, entry)
        for name, entry in pth.open_file(file).items()
    }


def _safe(path: str) -> Reads:
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from error
    return {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _check_config(where: str, found: Any, sizes: Sizes) -> None:
    """Raises WeightsError where the published settings are not those computed here."""
    wanted = {
        "model_cfg.embed_dim": sizes.embed_dim,
        "model_cfg.vision_cfg.image_size": sizes.image.size,
        "model_cfg.vision_cfg.timm_pool": "",  # CLS after the last norm
        "model_cfg.vision_cfg.timm_proj": "linear",
        "model_cfg.text_cfg.hf_proj_type": "mlp",
        "model_cfg.text_cfg.hf_pooler_type": "cls_last_hidden_state_pooler",
        "model_cfg.text_cfg.context_length": sizes.text.context,
        "preprocess_cfg.mean": list(biomedclip_inputs.MEAN),
        "preprocess_cfg.std": list(biomedclip_inputs.STD),
    }
    for name, value in wanted.items():
        at = found
        for part in name.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at != value:
            raise WeightsError(
                f"{where}: {name} is {at!r}, this port computes {value!r}; name the folder of "
                "BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
            )
