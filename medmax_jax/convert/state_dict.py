"""The common form of all layouts: named tensors that are not yet read.

    meta.read_checkpoint --+                                   +--> meta.write
    hf.read_checkpoint ----+--> Checkpoint(language, vqgan) ---+--> hf.write
    native.read_checkpoint +                                   +--> native.write
    adapters.read_adapter --> Adapter ----------> adapters.write_peft, adapters.merged

Names of `language` are Hugging Face's, matrices [out, in], RoPE in halves; those of `vqgan` are
taming-transformers', kernels OIHW. A tensor is read when a writer requests it, so that only a few
are in memory at a time whatever the size of the model.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from medmax_jax.config import VQ, ConfigError, Lora, Model, Vocab, build, check_bounds, check_model
from medmax_jax.io.errors import FileError, printable, quoted
from medmax_jax.models.vocab import RELEASED, RELEASED_END

DTYPES = {  # permitted dtypes of weights, by safetensors' names
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
RUN_OPTIONS = dict(quant="none", remat="attn", attention="xla")  # of a converted model
_PIECE = 1 << 18  # numbers that are checked together: they fit in the CPU cache
SAMPLE_ROWS, SAMPLE_COLUMNS = 128, 16  # of each tensor, for the fingerprint


class ConvertError(FileError):
    """A checkpoint that cannot be used; the message names the file, the tensor and the fix."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that `block(rows, columns)` reads from its file; `where` names both for messages."""

    shape: tuple[int, ...]
    dtype: str
    block: Callable[[slice, slice], np.ndarray]  # columns are ignored for a vector
    where: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """Read the complete tensor."""
        return self.block(slice(0, self.shape[0]), slice(None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model, or a VQGAN alone (`language` empty, `model` and `vocab` None)."""

    layout: str  # meta | hf | native
    path: str
    model: Model | None
    vocab: Vocab | None
    vq: VQ | None
    language: dict[str, LazyTensor]
    vqgan: dict[str, LazyTensor]  # empty where absent; HF's own has no decoder
    tokenizer: bytes | None  # the JSON of the layout, unchanged
    facts: dict[str, Any]  # additional data next to the weights: see each layout
    quant: str = "none"  # native only: int8 | int4 | nf4; such matrices cannot be converted again

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return `fingerprint` of the language model; reads a few percent of the weights, once."""
        return fingerprint(self.language)

    @property
    def has_decoder(self) -> bool:
        return "decoder.conv_in.weight" in self.vqgan

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.language.values(), *self.vqgan.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA matrices in PEFT's form: canonical name of the weight -> A [R, in], B [out, R]."""

    layout: str  # native | peft
    path: str
    lora: Lora
    matrices: dict[str, tuple[LazyTensor, LazyTensor]]
    facts: dict[str, Any]  # base, data, step, sources, credentials, config: where known
    # The factor of B A in each matrix, where it is not lora.alpha / lora.rank in all.
    scales: dict[str, float] = dataclasses.field(default_factory=dict)

    def scale(self, name: str) -> float:
        """Return the factor of B A before it is added to the weight of that name."""
        return self.scales.get(name, self.lora.alpha / self.lora.rank)


def language_shapes(model: Model, vocab: Vocab) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> shape of every tensor of the language model, in its order."""
    d, h, f = model.hidden_size, model.head_dim, model.intermediate_size
    wide, narrow = model.num_heads * h, model.num_kv_heads * h
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (wide, d),
        "self_attn.k_proj.weight": (narrow, d),
        "self_attn.v_proj.weight": (narrow, d),
        "self_attn.o_proj.weight": (d, wide),
        "self_attn.q_norm.weight": (model.num_heads, h),
        "self_attn.q_norm.bias": (model.num_heads, h),
        "self_attn.k_norm.weight": (model.num_kv_heads, h),
        "self_attn.k_norm.bias": (model.num_kv_heads, h),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (vocab.size, d)}
    for i in range(model.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (vocab.size, d)}


def number(table: dict[str, Any], name: str, bound: str, where: str, default: Any = None) -> Any:
    """Return table[name] if it is a number within config.BOUNDS[bound]; raise ConvertError.

    number(params, "n_layers", "model.num_layers", "params.json") == 32
    A missing or null setting has the value `default`; if that is None, it is an error.
    """
    value = table.get(name)
    if value is None:
        if default is None:
            raise ConvertError(f"{where}: {name} is missing; not the settings of a Chameleon model")
        return default
    try:
        check_bounds(bound, value, name)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}; not the settings of a Chameleon model") from error
    return value


def section(table: Any, name: str, where: str) -> dict[str, Any]:
    """Return table[name], {} where it is missing or null; raise ConvertError unless a table."""
    value = table.get(name) if isinstance(table, dict) else table
    if value is not None and not isinstance(value, dict):
        raise ConvertError(f"{where}: {name} is {quoted(value)}; it must be a table")
    return value or {}


def flag(table: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    """Return the true or false of table[name]; raise ConvertError on anything else."""
    value = table.get(name)
    if value is not None and type(value) is not bool:
        raise ConvertError(f"{where}: {name} is {quoted(value)}; it must be true or false")
    return default if value is None else value


def check_heads(hidden: int, heads: int, kv_heads: int, where: str) -> None:
    """Raise ConvertError where the width or the heads are not divisible."""
    if hidden % heads or heads % kv_heads:
        raise ConvertError(
            f"{where}: hidden size {hidden}, {heads} heads and {kv_heads} key heads are not "
            "divisible; not the settings of a Chameleon model"
        )


def check_layers(layers: int, names: Collection[str], where: str) -> None:
    """Raise ConvertError where settings require more layers than there are tensors.

    The table of all names grows with the layers, so this is checked before it is built.
    """
    if layers > len(names):
        raise ConvertError(
            f"{where}: asks for {layers} layers, but the weights have {len(names)} tensors; "
            "another model's config, or an incomplete copy"
        )


def model_settings(fields: dict[str, Any], dtypes: set[str], where: str) -> Model:
    """Return a Model of these fields and RUN_OPTIONS; the dtype is that of the tensors."""
    dtype = "float32" if dtypes == {"F32"} else "bfloat16"
    try:
        return build(Model, RUN_OPTIONS | fields | dict(param_dtype=dtype, compute_dtype=dtype))
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error


def vocab_settings(size: Any, names: dict[str, int], vq: VQ, where: str) -> Vocab:
    """Return the vocabulary; its first text id is that of "!", the first byte symbol of the BPE.

    Without a tokenizer it is the first id of the MedMax release, or that of the tiny family if the
    model is smaller.
    """
    full = type(size) is int and size > RELEASED.text_start
    start = names.get("!", RELEASED.text_start if full else RELEASED_END)
    if type(size) is not int or type(start) is not int or not start < size:
        raise ConvertError(
            f"{where}: {quoted(size)} ids, but text begins at {quoted(start)}; not the vocabulary "
            "of this family, or a tokenizer of another model"
        )
    sizes = dict(size=size, image_codes=vq.num_codes, text_start=start)
    try:
        return build(Vocab, sizes)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error


def check_settings(model: Model, vocab: Vocab, vq: VQ, where: str) -> None:
    """Raise ConvertError where settings contradict one another."""
    try:
        check_model(model, vocab, vq)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}; not the config of this model") from error


def check_gathered(path: str, tensors: dict[str, Any]) -> None:
    """Raise ConvertError where there are no tensors, or tensors without elements.

    Both are saved by a run under DeepSpeed ZeRO-3 or FSDP when no rank gathered the weights.
    """
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if tensors and not empty:
        return
    problem = f"{len(empty)} of {len(tensors)} tensors have no elements {_first_names(empty)}"
    raise ConvertError(
        f"{path}: {problem if tensors else 'contains no tensors'}; a sharded run (ZeRO-3, FSDP) "
        "saved it without gathering the weights. Gather them and save again (DeepSpeed: "
        "zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save)"
    )


def check_shapes(path: str, tensors: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ConvertError unless the names are exactly these, each of its shape and a float."""
    check_gathered(path, tensors)
    extra, missing = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
    if extra or missing:
        raise ConvertError(
            f"{path}: {len(missing)} tensors are missing {_first_names(missing)}, "
            f"{len(extra)} are unexpected {_first_names(extra)}; not this model, or an incomplete "
            "copy"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ConvertError(
                f"{tensors[name].where}: shape {quoted(tensors[name].shape)}, but the config of "
                f"{path} requires {shape}; weights and config belong to different models"
            )


def check_dtype(dtype: str, where: str) -> None:
    """Raise ConvertError on integers, float64, float8: no weights of this family have these."""
    if dtype not in DTYPES:
        raise ConvertError(
            f"{where}: dtype {dtype} is not supported; weights must be {', '.join(DTYPES)}: cast "
            "them in the program that wrote the file (for quantized weights, convert the original)"
        )


def check_finite(array: np.ndarray, where: str) -> np.ndarray:
    """Return the array; raise ConvertError where it contains a NaN or an infinity."""
    flat = np.ravel(array, order="K")
    for start in range(0, flat.size, _PIECE):
        if not _all_finite(flat[start : start + _PIECE]):
            non_finite = array.size - int(np.isfinite(array).sum())
            raise ConvertError(
                f"{where}: {non_finite} of {array.size} values are NaN or infinite; a diverged "
                "training run or a damaged copy: use an earlier checkpoint"
            )
    return array


def _all_finite(piece: np.ndarray) -> bool:
    if piece.dtype.itemsize != 2:
        return bool(np.isfinite(piece).all())
    # 16-bit floats are checked by their bits: isfinite is eight times slower for them.
    largest = 0x7C00 if piece.dtype == np.float16 else 0x7F80  # all ones in the exponent
    return int((piece.view(np.uint16) & 0x7FFF).max(initial=0)) < largest


def fingerprint(tensors: dict[str, LazyTensor]) -> str:
    """Return sha256 over two blocks of every tensor, rounded to bfloat16.

    It is the same for one model in every layout and float dtype; any training changes it. It
    identifies a model and does not protect against damage: the CRCs do.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.shape}".encode())
        for block in _blocks(tensor):
            digest.update(np.ascontiguousarray(block).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _blocks(tensor: LazyTensor) -> Iterator[Float[np.ndarray, "..."]]:
    length, columns = tensor.shape[0], slice(0, SAMPLE_COLUMNS)
    yield tensor.block(slice(0, min(SAMPLE_ROWS, length)), columns)
    if length > SAMPLE_ROWS:
        yield tensor.block(slice(length - SAMPLE_ROWS, length), columns)


def _first_names(names: list[str]) -> str:
    if not names:
        return ""
    few = ", ".join(printable(name, 80) for name in names[:4])
    return f"({few}{', ..' if len(names) > 4 else ''})"
