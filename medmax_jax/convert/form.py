"""The form that every layout is read into and written from: named tensors not yet read.

    meta.read --+                                   +--> meta.write
    hf.read ----+--> Checkpoint(language, vqgan) ---+--> hf.write
    native.read +                                   +--> native.write
    peft.read -----> Adapter ---------------------------> peft.write, merge.merged

Names of `language` are Hugging Face's, matrices [out, in], RoPE in halves; those of `vqgan` are
taming-transformers', kernels OIHW. A tensor is read when a writer asks for it, so that memory holds
a few at a time whatever the size of the model.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from configs import base
from medmax_jax.config import VQ, ConfigError, Lora, Model, Vocab, build
from medmax_jax.vocab import RELEASED_END

DTYPES = {  # what weights may be, by safetensors' names
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_PIECE = 1 << 18  # numbers that are looked at together: they stay in the cache
SAMPLE_ROWS, SAMPLE_COLUMNS = 128, 16  # of each tensor, for the fingerprint


class ConvertError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the tensor and the mend."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """`block(rows, columns)` reads from the file. `where`: file and name there, for messages."""

    shape: tuple[int, ...]
    dtype: str
    block: Callable[[slice, slice], np.ndarray]  # columns mean nothing for a vector
    where: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self.block(slice(0, self.shape[0]), slice(None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model, or a VQGAN alone (`language` empty, `model` and `vocab` None)."""

    layout: str  # meta | hf | native
    path: str
    model: Model | None
    vocab: Vocab | None
    vq: VQ | None
    language: dict[str, Tensor]
    vqgan: dict[str, Tensor]  # empty where absent; HF's own has no decoder
    tokenizer: bytes | None  # the JSON of the layout, as it lay there
    facts: dict[str, Any]  # what was found beside the weights: see each layout
    quant: str = "none"  # native only: int8 | int4 | nf4, then the matrices cannot go out again

    @functools.cached_property
    def fingerprint(self) -> str:
        """`digest` of the language model: it reads a few percent of the weights, once."""
        return digest(self.language)

    @property
    def has_decoder(self) -> bool:
        return "decoder.conv_in.weight" in self.vqgan

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.language.values(), *self.vqgan.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA matrices as PEFT has them: canonical name of the weight -> A [R, in], B [out, R]."""

    layout: str  # native | peft
    path: str
    lora: Lora
    matrices: dict[str, tuple[Tensor, Tensor]]
    facts: dict[str, Any]  # base, data, step, sources, credentials, config: where known


def language_shapes(model: Model, vocab: Vocab) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the language model, in the model's order."""
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


def model_settings(fields: dict[str, Any], dtypes: set[str], where: str) -> Model:
    """A Model of these fields; how it is run comes from configs/base.py and from the dtypes."""
    run = base.get_config().model.to_dict()
    run["param_dtype"] = run["compute_dtype"] = "float32" if dtypes == {"F32"} else "bfloat16"
    try:
        return build(Model, run | fields)
    except ConfigError as error:
        raise ConvertError(f"{where}: {error}") from error


def vocab_settings(size: Any, names: dict[str, int], vq: VQ, where: str) -> Vocab:
    """The vocabulary; its first text id is that of "!", the first byte symbol of the BPE.

    Without a tokenizer: the release's first id, or where the model is smaller the tiny family's.
    """
    released = base.get_config().vocab.text_start
    whole = isinstance(size, int) and size > released
    start = names.get("!", released if whole else RELEASED_END)
    if not isinstance(size, int) or not start < size:
        raise ConvertError(
            f"{where}: {size!r} ids, but text begins at {start}; not the vocabulary of this family,"
            " or a tokenizer of another model"
        )
    return Vocab(size=size, image_codes=vq.num_codes, text_start=start)


def require(path: str, have: dict[str, Any], want: dict[str, tuple[int, ...]]) -> None:
    """Raises ConvertError unless the names are exactly these, each of its shape and a float."""
    extra, missing = sorted(set(have) - set(want)), sorted(set(want) - set(have))
    if extra or missing:
        raise ConvertError(
            f"{path}: {len(missing)} tensors missing {_some(missing)}, "
            f"{len(extra)} without a place {_some(extra)}; not this model, or an incomplete copy"
        )
    for name, shape in want.items():
        if have[name].shape != shape:
            raise ConvertError(
                f"{have[name].where}: shape {have[name].shape}, the config of {path} asks for "
                f"{shape}; another model's weights or config"
            )


def check_dtype(dtype: str, where: str) -> None:
    """Raises ConvertError on integers, float64, float8: no weights of this family."""
    if dtype not in DTYPES:
        raise ConvertError(
            f"{where}: dtype {dtype}; weights are {', '.join(DTYPES)}, so cast them in the program "
            "that wrote the file (quantised weights: convert the original ones)"
        )


def finite(array: np.ndarray, where: str) -> np.ndarray:
    """The array; raises ConvertError where it holds a NaN or an infinity."""
    flat = np.ravel(array, order="K")
    for start in range(0, flat.size, _PIECE):
        if not _all_finite(flat[start : start + _PIECE]):
            bad = array.size - int(np.isfinite(array).sum())
            raise ConvertError(
                f"{where}: {bad} of {array.size} numbers are NaN or infinite; a broken training "
                "run or a damaged copy: use an earlier checkpoint"
            )
    return array


def _all_finite(piece: np.ndarray) -> bool:
    if piece.dtype.itemsize != 2:
        return bool(np.isfinite(piece).all())
    # Of 16-bit floats by their bits: isfinite is eight times slower there.
    largest = 0x7C00 if piece.dtype == np.float16 else 0x7F80  # all ones in the exponent
    return int((piece.view(np.uint16) & 0x7FFF).max(initial=0)) < largest


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over two blocks of every tensor, rounded to bfloat16.

    The same for one model in every layout and float dtype; any training changes it. It identifies
    and does not guard: that is the work of the CRCs.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.shape}".encode())
        for block in _blocks(tensor):
            found.update(np.ascontiguousarray(block).astype(ml_dtypes.bfloat16).tobytes())
    return found.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[Float[np.ndarray, "..."]]:
    length, columns = tensor.shape[0], slice(0, SAMPLE_COLUMNS)
    yield tensor.block(slice(0, min(SAMPLE_ROWS, length)), columns)
    if length > SAMPLE_ROWS:
        yield tensor.block(slice(length - SAMPLE_ROWS, length), columns)


def _some(names: list[str]) -> str:
    return f"({', '.join(names[:4])}{', ..' if len(names) > 4 else ''})" if names else ""
