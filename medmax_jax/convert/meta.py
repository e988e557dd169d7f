"""Meta's layout, in which Chameleon, Anole and MedMax are published.

    models/7b/consolidated.pth                  or one file per model-parallel shard:
    models/30b/consolidated.00.pth .. 03.pth    see TABLE for how each tensor is split
    models/7b/params.json, consolidate_params.json
    tokenizer/text_tokenizer.json               and text_tokenizer_modified.json
    tokenizer/vqgan.ckpt, vqgan.yaml            taming-transformers' VQGAN

A path may be the folder above `models`, or the one that contains consolidated*.pth. RoPE rotates
the pairs (x[2j], x[2j + 1]) in this layout, so the rows of q and k, and their gains, are in another
order.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped

from medmax_jax.checkpoints import torch_file
from medmax_jax.config import Model
from medmax_jax.convert import hf, safetensors_stream, vqgan
from medmax_jax.convert.safetensors_stream import prefetch
from medmax_jax.convert.state_dict import (
    Checkpoint,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_finite,
    check_gathered,
    check_heads,
    check_layers,
    check_settings,
    check_shapes,
    flag,
    language_shapes,
    model_settings,
    number,
    vocab_settings,
)
from medmax_jax.io.errors import quoted
from medmax_jax.storage.folder import Folder

# ---- The pieces of Meta's model-parallel checkpoints, and the order of the rows of a head ----
#
# split     the shards of a tensor contain
# rows      wq wk wv w1 w3 output        the rows of some heads, of some hidden units
# columns   wo w2 tok_embeddings         the columns of them
# copies    the norms over D             the complete tensor each
#
# row of a head, H = 6     HF rotates (x[j], x[j + H/2])      a0 a1 a2 b0 b1 b2
#                          Meta rotates (x[2j], x[2j + 1])    a0 b0 a1 b1 a2 b2

ROWS, COLUMNS, COPIES = "rows", "columns", "copies"

TABLE = {  # Meta's name -> (canonical name, its split); {} is the layer
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "layers.{}.attention.wq.weight": ("model.layers.{}.self_attn.q_proj.weight", ROWS),
    "layers.{}.attention.wk.weight": ("model.layers.{}.self_attn.k_proj.weight", ROWS),
    "layers.{}.attention.wv.weight": ("model.layers.{}.self_attn.v_proj.weight", ROWS),
    "layers.{}.attention.wo.weight": ("model.layers.{}.self_attn.o_proj.weight", COLUMNS),
    "layers.{}.attention.q_normalization.weight": ("model.layers.{}.self_attn.q_norm.weight", ROWS),
    "layers.{}.attention.q_normalization.bias": ("model.layers.{}.self_attn.q_norm.bias", ROWS),
    "layers.{}.attention.k_normalization.weight": ("model.layers.{}.self_attn.k_norm.weight", ROWS),
    "layers.{}.attention.k_normalization.bias": ("model.layers.{}.self_attn.k_norm.bias", ROWS),
    "layers.{}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight", COPIES),
    "layers.{}.ffn_norm.weight": ("model.layers.{}.post_attention_layernorm.weight", COPIES),
    "layers.{}.feed_forward.w1.weight": ("model.layers.{}.mlp.gate_proj.weight", ROWS),
    "layers.{}.feed_forward.w3.weight": ("model.layers.{}.mlp.up_proj.weight", ROWS),
    "layers.{}.feed_forward.w2.weight": ("model.layers.{}.mlp.down_proj.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", COPIES),
    "output.weight": ("lm_head.weight", ROWS),
}
DROPPED = ("rope.freqs",)  # a table that every reader computes
CONTEXT_LENGTH = 4_096  # of both published models, whose params.json does not state it
MAX_FACTOR = 64  # of ffn_dim_multiplier; the largest of a Llama is 1.3
NAMES = {(4_096, 32): "7b", (8_192, 48): "30b"}  # (dim, layers) -> folder under models/
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")


def find(folder: Folder) -> tuple[str, str] | None:
    """Return the prefixes of consolidated*.pth and of the tokenizer's files, or None."""
    folders = {
        name.rpartition("/")[0]
        for name in folder.names()
        if re.fullmatch(r"consolidated(\.\d\d)?\.pth", name.rpartition("/")[2])
    }
    if len(folders) > 1:
        raise ConvertError(
            f"{folder.path}: contains {len(folders)} models ({', '.join(sorted(folders))}); "
            "use the folder of one of them"
        )
    if not folders:
        return None
    model_folder = folders.pop()
    return (f"{model_folder}/" if model_folder else "", "tokenizer/")


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Read a checkpoint of this layout; raise ConvertError on anything else."""
    prefix, tokenizer_prefix = find(folder)
    tokenizer_folder = folder
    if not any(name.startswith(tokenizer_prefix) for name in folder.names()):
        tokenizer_folder = Folder(f"{folder.path.rstrip('/')}/../../tokenizer")
        tokenizer_prefix = ""
    shards = [
        safetensors_stream.read_torch(folder.file(prefix + file), dropped=DROPPED)
        for file in _files(folder, prefix)
    ]
    for shard in shards:
        check_gathered(f"{folder.path}/{prefix}consolidated*.pth", shard)
    params, where = _params(folder, prefix, len(shards)), f"{folder.path}/{prefix}params.json"
    vqgan_tensors, vq = vqgan.read_vqgan(tokenizer_folder, tokenizer_prefix)
    files = ("text_tokenizer.json", "text_tokenizer_modified.json")
    file = next(
        (
            tokenizer_prefix + name
            for name in files
            if tokenizer_folder.has(tokenizer_prefix + name)
        ),
        None,
    )
    tokenizer = bytes(tokenizer_folder.read(file)) if file else None
    names = hf.read_vocabulary(tokenizer, f"{tokenizer_folder.path}/{file}") if file else {}
    model = _model(params, shards, where)
    size, rows = params.get("vocab_size", -1), shards[0].get("tok_embeddings.weight")
    if rows is not None and (type(size) is not int or size <= 0):  # Meta writes -1
        size = rows.shape[0] if rows.shape else 0
    vocab = vocab_settings(size, names, vq, where)
    check_settings(model, vocab, vq, where)
    for tensor in (t for shard in shards for t in shard.values()):
        check_dtype(tensor.dtype, tensor.where)
    language = _language(shards, model, f"{folder.path}/{prefix}consolidated*.pth")
    check_shapes(f"{folder.path}/{prefix}", language, language_shapes(model, vocab))
    return Checkpoint(
        layout="meta", path=folder.path, model=model, vocab=vocab, vq=vq, language=language,
        vqgan=vqgan_tensors, tokenizer=tokenizer, facts={"shards": len(shards)},
    )  # fmt: skip


def write(folder: Folder, checkpoint: Checkpoint, *, progress: Callable[[int], None]) -> None:
    """Write the files above, with as many shards as the q/k-norm gains have rows."""
    if checkpoint.language:
        _write_language(folder, checkpoint, progress)
    if checkpoint.vqgan:
        vqgan.write(folder, "tokenizer/", checkpoint, progress=progress)
    if checkpoint.tokenizer:
        text = hf.to_meta_tokenizer(checkpoint.tokenizer)
        folder.write("tokenizer/text_tokenizer.json", [text])
        folder.write("tokenizer/text_tokenizer_modified.json", [hf.to_medmax_tokenizer(text)])


def _write_language(
    folder: Folder, checkpoint: Checkpoint, progress: Callable[[int], None]
) -> None:
    model, count = checkpoint.model, checkpoint.model.qk_norm_shards
    if model.head_dim * model.num_heads != model.hidden_size or model.intermediate_size % count:
        raise ConvertError(
            f"{checkpoint.path}: Meta's layout requires head_dim x num_heads = hidden_size, and an "
            f"intermediate_size divisible by {count} shards"
        )
    prefix = f"models/{NAMES.get((model.hidden_size, model.num_layers), 'model')}/"
    _write_params(folder, prefix, checkpoint)
    for shard in range(count):
        file = "consolidated.pth" if count == 1 else f"consolidated.{shard:02}.pth"
        entries = list(_shard(checkpoint, shard, progress))
        with folder.stream(prefix + file) as out, prefetch([e[3] for e in entries]) as arrays:
            read = [(*entry[:3], array) for entry, array in zip(entries, arrays, strict=True)]
            torch_file.write(out, read, wrap=None)


def _shard(
    checkpoint: Checkpoint, shard: int, progress: Callable[[int], None]
) -> Iterator[tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """Yield (name, shape, dtype, function that reads it) of every tensor of one file."""
    model, count = checkpoint.model, checkpoint.model.qk_norm_shards
    for name, canonical, split in _names(model.num_layers):
        tensor = checkpoint.language[canonical]
        shape = list(tensor.shape)
        if split == COLUMNS:
            shape[1] //= count
        elif split == ROWS:
            shape[0] //= count
        if "_norm." in canonical:
            shape = [model.head_dim]

        def part(tensor=tensor, canonical=canonical, split=split) -> np.ndarray:
            rows, columns = slice(0, tensor.shape[0]), slice(None)
            if split == ROWS:
                length = tensor.shape[0] // count
                rows = slice(shard * length, (shard + 1) * length)
            elif split == COLUMNS:
                width = tensor.shape[1] // count
                columns = slice(shard * width, (shard + 1) * width)
            array = check_finite(tensor.block(rows, columns), tensor.where)
            progress(array.nbytes)
            if "_norm." in canonical:
                return gains_to_meta(array[0])
            is_rotated = canonical.endswith(("q_proj.weight", "k_proj.weight"))
            return to_meta(array, model.head_dim) if is_rotated else array

        yield name, tuple(shape), tensor.dtype, part


def _names(layers: int) -> Iterator[tuple[str, str, str]]:
    """Yield (Meta's name, canonical name, split) of every tensor."""
    for name, (canonical, split) in TABLE.items():
        for i in range(layers if "{}" in name else 1):
            yield name.format(i), canonical.format(i), split


def _files(folder: Folder, prefix: str) -> list[str]:
    names = [n.removeprefix(prefix) for n in folder.names() if n.startswith(prefix)]
    if "consolidated.pth" in names:
        return ["consolidated.pth"]
    files = sorted(n for n in names if _SHARD.fullmatch(n))
    missing = set(range(len(files))) - {int(_SHARD.fullmatch(n)[1]) for n in files}
    if missing:
        raise ConvertError(
            f"{folder.path}/{prefix}consolidated.{min(missing):02}.pth is missing; copy all shards"
        )
    return files


def _params(folder: Folder, prefix: str, shards: int) -> dict[str, Any]:
    """Return the tables that Meta's loader merges: params.json, its `model`, consolidate_params."""
    params = folder.json(f"{prefix}params.json")
    name = f"{prefix}consolidate_params.json"
    consolidated = folder.json(name) if folder.has(name) else {}
    if not isinstance(params, dict) or not isinstance(consolidated, dict):
        raise ConvertError(
            f"{folder.path}/{prefix}params.json: not a table of settings; copy it again"
        )
    inner = params.get("model")
    params = params | (inner if isinstance(inner, dict) else {}) | consolidated
    expected = params.get("model_parallel_size", shards)
    if consolidated and expected != shards:
        raise ConvertError(
            f"{folder.path}/{name}: model_parallel_size {quoted(expected)}, but there are {shards} "
            "consolidated files; copy all shards"
        )
    return params


def _model(params: dict[str, Any], shards: list[dict[str, LazyTensor]], where: str) -> Model:
    heads = number(params, "n_heads", "model.num_heads", where)
    dim = number(params, "dim", "model.hidden_size", where)
    kv_heads = number(params, "n_kv_heads", "model.num_kv_heads", where, heads)
    check_heads(dim, heads, kv_heads, where)
    fields = dict(
        hidden_size=dim,
        num_layers=number(params, "n_layers", "model.num_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        intermediate_size=_checked_ffn(dim, params, where),
        context_length=number(
            params, "context_length", "model.context_length", where, CONTEXT_LENGTH
        ),
        rope_theta=number(params, "rope_theta", "model.rope_theta", where, 10_000.0),
        rms_norm_eps=number(params, "norm_eps", "model.rms_norm_eps", where, 1e-5),
        qk_norm_eps=1e-5,  # torch's default for LayerNorm, which Meta's code does not change
        qk_norm_shards=len(shards),
        swin_norm=flag(params, "swin_norm", where, default=False),
    )
    check_layers(fields["num_layers"], shards[0], where)
    if not params.get("qk_normalization", True):
        raise ConvertError(
            f"{where}: qk_normalization is false; the models of this family require it"
        )
    return model_settings(fields, {t.dtype for s in shards for t in s.values()}, where)


def _checked_ffn(dim: int, params: dict[str, Any], where: str) -> int:
    """Return the width of the MLP by _ffn, after checking the bounds of the numbers."""
    multiple = number(params, "multiple_of", "model.intermediate_size", where, 256)
    factor = params.get("ffn_dim_multiplier")
    if factor is not None and not (type(factor) in (int, float) and 0 < factor <= MAX_FACTOR):
        raise ConvertError(
            f"{where}: ffn_dim_multiplier is {quoted(factor)}; it must be above 0 and at most "
            f"{MAX_FACTOR}"
        )
    return _ffn(dim, {"multiple_of": multiple, "ffn_dim_multiplier": factor})


def _ffn(dim: int, params: dict[str, Any]) -> int:
    """Return the width of the MLP by Meta's rule: 2/3 of 4 dim, scaled, up to a multiple."""
    hidden = int(2 * (4 * dim) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params.get("multiple_of", 256)
    return multiple * ((hidden + multiple - 1) // multiple)


def _write_params(folder: Folder, prefix: str, checkpoint: Checkpoint) -> None:
    model, start = checkpoint.model, int(2 * (4 * checkpoint.model.hidden_size) / 3)
    width = model.intermediate_size
    plain = _ffn(model.hidden_size, {"multiple_of": 256}) == width
    settings = dict(
        dim=model.hidden_size,
        n_layers=model.num_layers,
        n_heads=model.num_heads,
        n_kv_heads=model.num_kv_heads,
        vocab_size=checkpoint.vocab.size,
        # With a multiple equal to the width and a factor of at most 1, _ffn gives exactly this
        # width.
        ffn_dim_multiplier=None if plain else min(1.0, width / start),
        multiple_of=256 if plain else width,
        norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
        qk_normalization=True,
        swin_norm=model.swin_norm,
        context_length=model.context_length,  # Meta's loader ignores fields that it does not know
    )
    for name, content in (
        ("params.json", {"model": settings}),
        ("consolidate_params.json", {"model_parallel_size": model.qk_norm_shards}),
    ):
        folder.write(prefix + name, [json.dumps(content, indent=1).encode() + b"\n"])


def _language(
    shards: list[dict[str, LazyTensor]], model: Model, where: str
) -> dict[str, LazyTensor]:
    """Return canonical name -> tensor over all shards; every key of every shard is used."""
    shards = [split_fused(shard, model, len(shards)) for shard in shards]
    expected = {name for name, _, _ in _names(model.num_layers)}
    for shard in shards:
        if wrong := sorted(expected ^ set(shard)):
            missing = [n for n in wrong if n in expected]
            raise ConvertError(
                f"{where}: {len(missing)} tensors are missing {missing[:4]}, "
                f"{len(wrong) - len(missing)} are unexpected "
                f"{[n for n in wrong if n not in expected][:4]}; not this model, or an incomplete "
                "copy"
            )
    language = {}
    for name, canonical, split in _names(model.num_layers):
        parts = [shard[name] for shard in shards]
        if len({(p.dtype, p.shape) for p in parts}) > 1:
            raise ConvertError(f"{where}: {name} differs in dtype or shape among the shards")
        if len(parts[0].shape) != (1 if "norm" in canonical else 2):
            raise ConvertError(
                f"{parts[0].where}: unexpected shape {quoted(parts[0].shape)}; not this model"
            )
        if "_norm." in canonical:
            heads = model.num_heads if ".q_norm." in canonical else model.num_kv_heads
            language[canonical] = expand_qk_norm(parts, heads, model.head_dim)
        else:
            language[canonical] = join_shards(parts, split)
            if canonical.endswith(("q_proj.weight", "k_proj.weight")):
                language[canonical] = permute_rope_to_hf(language[canonical], model.head_dim)
    return language


FUSED = {"attention.wqkv": ("wq", "wk", "wv"), "feed_forward.w13": ("w1", "w3")}


def from_meta(x: Shaped[np.ndarray, "NH D"], head_dim: int) -> Shaped[np.ndarray, "NH D"]:
    """Return rows of complete heads in HF's order, given Meta's."""
    return x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def to_meta(x: Shaped[np.ndarray, "NH D"], head_dim: int) -> Shaped[np.ndarray, "NH D"]:
    """Return rows of complete heads in Meta's order, given HF's."""
    return x.reshape(-1, 2, head_dim // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def gains_from_meta(x: Shaped[np.ndarray, "H"]) -> Shaped[np.ndarray, "H"]:
    """Return the gains or biases of a head in HF's order, given Meta's."""
    return from_meta(x[:, None], len(x))[:, 0]


def gains_to_meta(x: Shaped[np.ndarray, "H"]) -> Shaped[np.ndarray, "H"]:
    """Return the gains or biases of a head in Meta's order, given HF's."""
    return to_meta(x[:, None], len(x))[:, 0]


def split_fused(shard: dict[str, LazyTensor], model: Model, count: int) -> dict[str, LazyTensor]:
    """Return a shard with wqkv and w13 split; Meta's loader makes these fused tensors."""
    sizes = dict(
        wq=model.num_heads * model.head_dim // count,
        wk=model.num_kv_heads * model.head_dim // count,
        wv=model.num_kv_heads * model.head_dim // count,
        w1=model.intermediate_size // count,
        w3=model.intermediate_size // count,
    )
    tensors = {}
    for name, tensor in shard.items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        fused = f"{path.rpartition('.')[2]}.{last}"
        if fused not in FUSED:
            tensors[name] = tensor
            continue
        start = 0
        for part in FUSED[fused]:
            tensors[f"{path}.{part}.weight"] = _rows(tensor, start, start := start + sizes[part])
    return tensors


def _rows(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    """Return rows begin..end of a tensor, as a tensor."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        first, last, _ = rows.indices(end - begin)
        return tensor.block(slice(begin + first, begin + last), columns)

    return LazyTensor((end - begin, *tensor.shape[1:]), tensor.dtype, block, tensor.where)


def join_shards(parts: list[LazyTensor], split: str) -> LazyTensor:
    """Return the tensor of which each shard has rows, columns or a copy."""
    first, shape = parts[0], list(parts[0].shape)
    if len(parts) == 1:
        return first
    if split != COPIES:
        shape[split == COLUMNS] *= len(parts)

    def block(rows: slice, columns: slice) -> np.ndarray:
        if split == COLUMNS:
            full_columns = [p.block(rows, slice(None)) for p in parts]
            return np.concatenate(full_columns, axis=1)[:, columns]
        if split == ROWS:
            height = first.shape[0]
            begin, end, _ = rows.indices(shape[0])
            pieces = [
                p.block(slice(max(begin - i * height, 0), min(end - i * height, height)), columns)
                for i, p in enumerate(parts)
                if begin < (i + 1) * height and end > i * height
            ]
            return np.concatenate(pieces)
        copies = [p.block(rows, columns) for p in parts]
        for copy, part in zip(copies, parts, strict=True):
            if copy.tobytes() != copies[0].tobytes():
                raise ConvertError(
                    f"{part.where}: differs from its copy in the first shard; "
                    "the shards belong to different checkpoints"
                )
        return copies[0]

    return LazyTensor(tuple(shape), first.dtype, block, first.where)


def permute_rope_to_hf(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Return q_proj or k_proj in HF's order of rows; complete heads are read for any rows."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        begin, end, _ = rows.indices(tensor.shape[0])
        low, high = begin // head_dim * head_dim, -(-end // head_dim) * head_dim
        return from_meta(tensor.block(slice(low, high), columns), head_dim)[begin - low : end - low]

    return LazyTensor(tensor.shape, tensor.dtype, block, tensor.where)


def expand_qk_norm(parts: list[LazyTensor], heads: int, head_dim: int) -> LazyTensor:
    """Return q/k-norm gains in HF's form: one row per head, equal within a shard."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        gains = np.stack([gains_from_meta(p.read()) for p in parts])
        return np.repeat(gains, heads // len(parts), axis=0)[rows, columns]

    for part in parts:
        if part.shape != (head_dim,):
            raise ConvertError(
                f"{part.where}: shape {part.shape}, but params.json requires ({head_dim},)"
            )
    return LazyTensor((heads, head_dim), parts[0].dtype, block, parts[0].where)
