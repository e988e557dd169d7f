"""Hugging Face's layout of the Chameleon family.

    config.json                  ChameleonConfig with vocabulary_map; or of the VQGAN alone
    model*.safetensors           names of state_dict.py; the VQGAN under `model.vqmodel.`
    tokenizer.json ..            see the end of this module

q_norm and k_norm have one row per head in this layout; heads of one model-parallel shard have the
same row.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tokenizers

from medmax_jax.config import VQ, Model, Vocab
from medmax_jax.convert import safetensors_stream, vqgan
from medmax_jax.convert.state_dict import (
    Checkpoint,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_gathered,
    check_heads,
    check_layers,
    check_settings,
    check_shapes,
    flag,
    language_shapes,
    model_settings,
    number,
    section,
    vocab_settings,
)
from medmax_jax.io.errors import quoted
from medmax_jax.models.tokenizer import IMAGE_NAME, SEP_NAME, UNMODIFIED_IMAGE_NAME, parse_spec
from medmax_jax.storage.folder import Folder

VQ_PREFIX = "model.vqmodel."
FIXED = dict(  # fixed by the architecture; another value is another model
    hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
    rope_scaling=None,
)  # fmt: skip
_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def is_layout(config: Any) -> bool:
    """Return whether a config.json is of this layout."""
    return isinstance(config, dict) and str(config.get("model_type")).startswith("chameleon")


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Read a checkpoint that transformers wrote; raise ConvertError on anything else."""
    config = folder.json("config.json")
    tensors = safetensors_stream.read(folder)
    check_gathered(folder.path, tensors)
    for tensor in tensors.values():
        check_dtype(tensor.dtype, tensor.where)
    if config["model_type"] != "chameleon":
        vq = _vq(config, folder.path)
        return Checkpoint(
            layout="hf", path=folder.path, model=None, vocab=None, vq=vq, language={},
            vqgan=vqgan.check(folder.path, tensors, vq), tokenizer=None, facts={},
        )  # fmt: skip
    where = f"{folder.path}/config.json"
    _check_architecture(config, folder.path)
    vqgan_tensors = {
        n.removeprefix(VQ_PREFIX): t for n, t in tensors.items() if n.startswith(VQ_PREFIX)
    }
    language = {n: t for n, t in tensors.items() if not n.startswith(VQ_PREFIX)}
    if "lm_head.weight" not in language and "model.embed_tokens.weight" in language:
        raise ConvertError(
            f"{folder.path}: lm_head.weight is missing; models of this family have a separate "
            "head, so save the model again with tie_word_embeddings=False"
        )
    vq = _vq(section(config, "vq_config", where), folder.path)
    tokenizer = bytes(folder.read("tokenizer.json")) if folder.has("tokenizer.json") else None
    model, vocab = _model(config, language, folder.path), _vocab(config, vq, tokenizer, folder.path)
    check_settings(model, vocab, vq, where)
    language = _expand_gains(language, model, folder.path)
    check_shapes(folder.path, language, language_shapes(model, vocab))
    return Checkpoint(
        layout="hf", path=folder.path, model=model, vocab=vocab, vq=vq, language=language,
        vqgan=vqgan.check(folder.path, vqgan_tensors, vq), tokenizer=tokenizer, facts={},
    )  # fmt: skip


def write(
    folder: Folder,
    checkpoint: Checkpoint,
    *,
    shard_bytes: int,
    decoder: bool,
    progress: Callable[[int], None],
) -> None:
    """Write the files that transformers loads; `decoder` False omits the VQGAN's decoder."""
    vqgan_tensors = {
        name: tensor
        for name, tensor in checkpoint.vqgan.items()
        if decoder or not name.startswith("decoder.")
    }
    if checkpoint.language:
        _check_head_dim(checkpoint)
        vqgan_tensors = {VQ_PREFIX + name: tensor for name, tensor in vqgan_tensors.items()}
        config = _config(checkpoint)
        if checkpoint.tokenizer:
            write_processor(folder, checkpoint)
            vocabulary = read_vocabulary(checkpoint.tokenizer)
            config |= {"vocabulary_map": vocabulary, "image_token_id": vocabulary["<image>"]}
    else:
        config = _vq_config(checkpoint.vq) | {
            "model_type": "chameleon_vqgan", "architectures": ["ChameleonVQVAE"],
        }  # fmt: skip
    tensors = checkpoint.language | vqgan_tensors
    safetensors_stream.write(folder, tensors, shard_bytes=shard_bytes, progress=progress)
    config_json = json.dumps(config, indent=2, ensure_ascii=False)
    folder.write("config.json", [config_json.encode() + b"\n"])


def _check_architecture(config: dict[str, Any], path: str) -> None:
    for name, value in FIXED.items():
        if (config.get(name) or value) != value:
            raise ConvertError(
                f"{path}/config.json: {name} is {quoted(config[name])}; only {value!r} is "
                "supported, as in all published models of the family"
            )
    rope = section(config, "rope_parameters", f"{path}/config.json")
    if rope.get("rope_type", "default") != "default":
        rope_type = quoted(rope["rope_type"])
        raise ConvertError(f"{path}/config.json: rope_type {rope_type} is not supported")


def _model(config: dict[str, Any], language: dict[str, LazyTensor], path: str) -> Model:
    where = f"{path}/config.json"
    heads = number(config, "num_attention_heads", "model.num_heads", where)
    hidden = number(config, "hidden_size", "model.hidden_size", where)
    rope = section(config, "rope_parameters", where)
    theta = number(config, "rope_theta", "model.rope_theta", where, 10_000.0)
    kv_heads = number(config, "num_key_value_heads", "model.num_kv_heads", where, heads)
    check_heads(hidden, heads, kv_heads, where)
    fields = dict(
        hidden_size=hidden,
        num_layers=number(config, "num_hidden_layers", "model.num_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=number(config, "intermediate_size", "model.intermediate_size", where),
        context_length=number(
            config, "max_position_embeddings", "model.context_length", where, 4_096
        ),
        rope_theta=number(rope, "rope_theta", "model.rope_theta", where, theta),
        rms_norm_eps=number(config, "rms_norm_eps", "model.rms_norm_eps", where, 1e-5),
        qk_norm_eps=1e-5,  # fixed in HF's ChameleonLayerNorm
        swin_norm=flag(config, "swin_norm", where, default=False),
    )
    check_layers(fields["num_layers"], language, where)
    min_shards = number(config, "model_parallel_size", "model.qk_norm_shards", where, 1)
    shards = _shards(language, heads, kv_heads, fields["num_layers"], min_shards, path)
    dtypes = {t.dtype for t in language.values()}
    return model_settings(fields | dict(qk_norm_shards=shards), dtypes, where)


def _gains(language: dict[str, LazyTensor], layers: int) -> Iterator[tuple[str, str, LazyTensor]]:
    """Yield (name, q_norm or k_norm, tensor) of the existing q/k-norm gains and biases."""
    for i in range(layers):
        for norm in ("q_norm", "k_norm"):
            for leaf in ("weight", "bias"):
                name = f"model.layers.{i}.self_attn.{norm}.{leaf}"
                if name in language:
                    yield name, norm, language[name]


def _shards(
    language: dict[str, LazyTensor],
    heads: int,
    kv_heads: int,
    layers: int,
    min_shards: int,
    path: str,
) -> int:
    """Return the number of different rows of q/k-norm gains, at least `min_shards`."""
    counts = {"q_norm": heads, "k_norm": kv_heads}
    gains = [
        tensor.read()
        for _, norm, tensor in _gains(language, layers)
        if len(tensor.shape) == 2 and tensor.shape[0] == counts[norm]
    ]
    for shards in range(min_shards, kv_heads + 1):
        if kv_heads % shards == 0 and all(_constant(g, shards) for g in gains):
            return shards
    raise ConvertError(
        f"{path}: the q_norm and k_norm gains differ among heads that share a key head or a shard "
        f"(model_parallel_size {min_shards}); no supported layout can represent that"
    )


def _expand_gains(
    language: dict[str, LazyTensor], model: Model, path: str
) -> dict[str, LazyTensor]:
    """Return the tensors with q/k-norm gains of one row (H,) as rows of every head (N, H).

    The copy of transformers in Anole's repository saves one row, which it applies to every head.
    This is correct for a model of one model-parallel shard; with several, a row would be missing.
    """
    counts, expanded = {"q_norm": model.num_heads, "k_norm": model.num_kv_heads}, dict(language)
    for name, norm, tensor in _gains(language, model.num_layers):
        if tensor.shape != (model.head_dim,):
            continue
        if model.qk_norm_shards > 1:
            raise ConvertError(
                f"{tensor.where}: one row of gains, but the model has {model.qk_norm_shards} "
                "model-parallel shards with one row each; an early version of transformers kept "
                "only the first row: convert Meta's original files"
            )
        expanded[name] = _repeated(tensor, counts[norm])
    return expanded


def _repeated(tensor: LazyTensor, count: int) -> LazyTensor:
    """Return a vector (H,) as `count` equal rows (count, H)."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        return np.broadcast_to(tensor.read(), (count, *tensor.shape))[rows, columns]

    return LazyTensor((count, *tensor.shape), tensor.dtype, block, tensor.where)


def _constant(gains: np.ndarray, shards: int) -> bool:
    grouped = gains.reshape(shards, -1, gains.shape[1])
    return bool((grouped == grouped[:, :1]).all())


def _vocab(config: dict[str, Any], vq: VQ, tokenizer: bytes | None, path: str) -> Vocab:
    names = section(config, "vocabulary_map", f"{path}/config.json")
    if tokenizer is not None:
        names = read_vocabulary(tokenizer, f"{path}/tokenizer.json")
    return vocab_settings(config.get("vocab_size"), names, vq, f"{path}/config.json")


def _vq(config: dict[str, Any], path: str) -> VQ:
    sizes = dict(
        image_size=config.get("resolution", 512),
        channels=config.get("base_channels", 128),
        channel_mult=config.get("channel_multiplier", [1, 1, 2, 2, 4]),
        num_res_blocks=config.get("num_res_blocks", 2),
        z_channels=config.get("latent_channels", 256),
        embed_dim=config.get("embed_dim", 256),
        num_codes=config.get("num_embeddings", 8_192),
        norm_groups=config.get("norm_groups", vqgan.TAMING_GROUPS),
    )
    return vqgan.settings(
        sizes, double=config.get("double_latent"), attention=config.get("attn_resolutions"),
        where=f"{path}/config.json, vq_config",
    )  # fmt: skip


def _check_head_dim(checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    if model.head_dim * model.num_heads != model.hidden_size:
        raise ConvertError(
            f"{checkpoint.path}: num_heads {model.num_heads} x head_dim {model.head_dim} is not "
            f"hidden_size {model.hidden_size}, which the layouts of HF and Meta require"
        )


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return config.json for transformers 4 and 5: some fields appear there under two names."""
    model, dtypes = checkpoint.model, {t.dtype for t in checkpoint.language.values()}
    dtype = _TORCH["BF16" if len(dtypes) > 1 else dtypes.pop()]
    return dict(
        architectures=["ChameleonForConditionalGeneration"],
        model_type="chameleon",
        vocab_size=checkpoint.vocab.size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        model_parallel_size=model.qk_norm_shards,
        swin_norm=model.swin_norm,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        dtype=dtype,
        torch_dtype=dtype,
        vq_config=_vq_config(checkpoint.vq),
        **FIXED,
    )


def _vq_config(vq: VQ) -> dict[str, Any]:
    config = dict(
        resolution=vq.image_size,
        base_channels=vq.channels,
        channel_multiplier=list(vq.channel_mult),
        num_res_blocks=vq.num_res_blocks,
        latent_channels=vq.z_channels,
        embed_dim=vq.embed_dim,
        num_embeddings=vq.num_codes,
        double_latent=False,
        attn_resolutions=[],
    )
    custom = vq.norm_groups != vqgan.TAMING_GROUPS
    return config | ({"norm_groups": vq.norm_groups} if custom else {})


# ---- Hugging Face's tokenizer and processor files, written by transformers itself ----
#
# Meta's text_tokenizer.json has all names in one BPE vocabulary; the two differ in three points:
#
#                        Meta                      HF
#     id 8711            <reserved08707>           <image>
#     special in text    none                      <s> .. <eoss> <racm3:break> .. <image>
#     BOS                added by the caller       added by the tokenizer

WHERE = "the tokenizer file"  # in messages, where its path is not known
BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
SPECIAL = (BOS, PAD, EOS, UNK, "<eoss>", "<racm3:break>", SEP_NAME, IMAGE_NAME)
RESCALE = 0.0078  # of HF's image processor; Meta divides by 127.5, which is 0.00784
MEAN = STD = [1.0, 1.0, 1.0]


def read_vocabulary(tokenizer: bytes, where: str = WHERE) -> dict[str, int]:
    """Return name -> id, with 8711 named <image>; raise TokenizerError on another file."""
    names = dict(parse_spec(tokenizer, where)["model"]["vocab"])
    if UNMODIFIED_IMAGE_NAME in names and IMAGE_NAME not in names:
        names[IMAGE_NAME] = names.pop(UNMODIFIED_IMAGE_NAME)
    return dict(sorted(names.items(), key=lambda item: item[1]))


def to_medmax_tokenizer(tokenizer: bytes) -> bytes:
    """Return the file as MedMax's text_tokenizer_modified.json.

    `<reserved08707>` is renamed `<image>`.
    """
    spec = parse_spec(tokenizer, WHERE)
    spec["model"]["vocab"] = read_vocabulary(tokenizer)
    for token in spec.get("added_tokens") or []:
        if token.get("content") == UNMODIFIED_IMAGE_NAME:
            token["content"] = IMAGE_NAME
    return json.dumps(spec, ensure_ascii=False).encode()


def to_meta_tokenizer(tokenizer: bytes) -> bytes:
    """Return the file as Meta's text_tokenizer.json; Meta's own is reproduced byte for byte."""
    spec = parse_spec(tokenizer, WHERE)
    names = spec["model"]["vocab"]
    if IMAGE_NAME not in names:
        return tokenizer
    names[UNMODIFIED_IMAGE_NAME] = names.pop(IMAGE_NAME)
    spec["model"]["vocab"] = dict(sorted(names.items(), key=lambda item: item[1]))
    spec |= {"added_tokens": [], "post_processor": None}
    return json.dumps(spec, ensure_ascii=False).encode()


def write_processor(folder: Folder, checkpoint: Checkpoint) -> None:
    """Write tokenizer.json, tokenizer_config.json, processor and generation settings."""
    # Without torch it warns already at its import; nothing that is written here needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes seconds to import, and only this function needs it

    transformers.logging.set_verbosity_error()
    spec = json.loads(to_medmax_tokenizer(checkpoint.tokenizer))
    names = spec["model"]["vocab"]
    if missing := [name for name in (BOS, PAD, EOS, SEP_NAME, IMAGE_NAME) if name not in names]:
        raise ConvertError(
            f"{checkpoint.path}: its tokenizer has no {missing[0]}, which Hugging Face's processor "
            "requires; use the tokenizer that was published with the weights"
        )
    spec["added_tokens"] = [_added(name, names[name]) for name in SPECIAL if name in names]
    spec["post_processor"] = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, names[BOS])]
    )
    spec["post_processor"] = json.loads(spec["post_processor"].__getstate__())
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        sep_token=SEP_NAME, clean_up_tokenization_spaces=False, padding_side="left",
        model_max_length=checkpoint.model.context_length,
    )  # fmt: skip
    vq = checkpoint.vq
    size = dict(height=vq.image_size, width=vq.image_size)
    image_processor = transformers.ChameleonImageProcessor(
        size={"shortest_edge": vq.image_size}, crop_size=size, rescale_factor=RESCALE,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    processor = transformers.ChameleonProcessor(
        image_processor, text, image_seq_length=vq.codes_per_image, image_token=IMAGE_NAME
    )
    with tempfile.TemporaryDirectory() as scratch:
        image_processor.save_pretrained(
            scratch
        )  # preprocessor_config.json, which transformers 4 reads
        processor.save_pretrained(scratch)
        for path in sorted(pathlib.Path(scratch).iterdir()):
            folder.write(path.name, [path.read_bytes()])
    generation = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    folder.write("generation_config.json", [json.dumps(generation, indent=2).encode() + b"\n"])


def _added(name: str, number: int) -> dict[str, Any]:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=number, content=name, special=True) | plain
