"""This project's layout: a model folder.

    config.json          vocab, model, vq as in configs/; weights: see below
    model.zarr/          zarr_arrays.py: layers stacked, matrices [in, out]; or, for a small model,
    model.safetensors    safetensors_file.py: the same arrays in one file
    vqgan.safetensors    by vqgan.py
    tokenizer.json       a copy of the source's, byte for byte

    "weights": {"fingerprint", "quant", "dtypes": {tensor: dtype where it is not that of its stack}}

A stack has one dtype, the narrowest that represents all of its layers' exactly; when it is written
to another layout, every tensor gets its original dtype again.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Shaped

from medmax_jax.checkpoints import safetensors_file, zarr_arrays
from medmax_jax.config import VQ, ConfigError, Mesh, Model, Vocab, build, check_vq, to_dict
from medmax_jax.convert import safetensors_stream
from medmax_jax.convert import vqgan as vqgan_layout
from medmax_jax.convert.safetensors_stream import prefetch
from medmax_jax.convert.state_dict import (
    DTYPES,
    Checkpoint,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_finite,
    check_gathered,
    check_settings,
    check_shapes,
    language_shapes,
)
from medmax_jax.io.errors import quoted
from medmax_jax.models import chameleon, quantization, vqgan
from medmax_jax.models.quantization import PACKED, TILE
from medmax_jax.sharding import make_mesh
from medmax_jax.storage.folder import Folder

STORE, SMALL = "model.zarr", "model.safetensors"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class StackedArray(NamedTuple):
    """An array; `read(layer, *slices, turned)` reads one layer, or all layers for None.

    turned: transpose the result.
    """

    shape: tuple[int, ...]
    dtype: str
    where: str
    read: Callable[..., np.ndarray]


class ArrayLocation(NamedTuple):
    """The location of a canonical tensor: the array, and the layer in it (None: all of it)."""

    stack: str
    layer: int | None


def is_layout(config: Any) -> bool:
    """Return whether a config.json is of this layout."""
    return isinstance(config, dict) and ("model" in config or "vq" in config)


def place(canonical: str) -> ArrayLocation:
    """Return the location: model.layers.3.mlp.up_proj.weight -> (layers.mlp.up_proj.kernel, 3)."""
    layer = None
    name = canonical.removeprefix("model.")
    if match := _LAYER.fullmatch(canonical):
        layer, name = int(match[1]), f"layers.{match[2]}"
    path, _, leaf = name.rpartition(".")
    if leaf == "weight":
        leaf = "scale" if "norm" in path.rpartition(".")[2] else "kernel"
        leaf = "embedding" if path == "embed_tokens" else leaf
    return ArrayLocation(f"{path}.{leaf}", layer)


def stacks(model: Model, vocab: Vocab) -> dict[str, jax.ShapeDtypeStruct]:
    """Return array name -> shape and sharding, of a model without adapters."""
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        return safetensors_file.flatten_named(
            chameleon.abstract_model(model, vocab, chameleon.NO_LORA)
        )


def settings(folder: Folder) -> dict[str, Any]:
    """Return config.json: `vocab`, `model`, `vq` as dataclasses or None, `weights` unchanged."""
    config, path = folder.json("config.json"), f"{folder.path}/config.json"
    if not is_layout(config):
        raise ConvertError(f"{path}: contains neither model nor vq; convert the checkpoint again")
    try:
        sections = {
            name: build(section_type, config[name]) if name in config else None
            for name, section_type in (("vocab", Vocab), ("model", Model), ("vq", VQ))
        }
        if sections["vq"]:
            check_vq(sections["vq"])
    except ConfigError as error:
        raise ConvertError(f"{path}: {error}") from error
    if sections["model"]:
        if missing := [name for name in ("vocab", "vq") if sections[name] is None]:
            raise ConvertError(f"{path}: {missing[0]} is missing; convert the checkpoint again")
        check_settings(sections["model"], sections["vocab"], sections["vq"], path)
    facts = config.get("weights", {})
    valid = isinstance(facts, dict) and isinstance(facts.get("dtypes", {}), dict)
    if not valid or not isinstance(facts.get("fingerprint", ""), str):
        raise ConvertError(f"{path}: weights is {quoted(facts)}; convert the checkpoint again")
    return sections | {"weights": facts}


def read_checkpoint(folder: Folder) -> Checkpoint:
    """Read a model folder of any kind; raise ConvertError on an incomplete one."""
    config = settings(folder)
    model, vocab, vq, facts = (config[name] for name in ("model", "vocab", "vq", "weights"))
    vqgan_tensors = {}
    if vq and folder.has("vqgan.safetensors"):
        vqgan_tensors = _read_vqgan(folder, vq)
    language: dict[str, LazyTensor] = {}
    if model:
        if model.quant == "none":
            language = _read_language(folder, model, vocab, facts.get("dtypes", {}))
            check_shapes(folder.path, language, language_shapes(model, vocab))
        else:
            _check_stacks(folder, model, vocab)
    tokenizer = bytes(folder.read("tokenizer.json")) if folder.has("tokenizer.json") else None
    return Checkpoint(
        layout="native", path=folder.path, model=model, vocab=vocab, vq=vq, language=language,
        vqgan=vqgan_tensors, tokenizer=tokenizer, facts=facts,
        quant=model.quant if model else "none",
    )  # fmt: skip


def write(folder: Folder, checkpoint: Checkpoint, *, progress: Callable[[int], None]) -> None:
    """Write a model folder; config.model.quant states whether its matrices are quantized."""
    config: dict[str, Any] = {}
    if checkpoint.language:
        model, vocab = checkpoint.model, checkpoint.vocab
        dtypes = _write_language(folder, checkpoint, progress)
        facts = dict(fingerprint=checkpoint.fingerprint, dtypes=dtypes)
        config |= dict(vocab=to_dict(vocab), model=to_dict(model))
        config |= dict(vq=to_dict(checkpoint.vq), weights=facts)
    else:
        config |= dict(vq=to_dict(checkpoint.vq))
    if checkpoint.vqgan:
        _write_vqgan(folder, checkpoint, progress)
    if checkpoint.tokenizer:
        folder.write("tokenizer.json", [checkpoint.tokenizer])
    folder.write("config.json", [json.dumps(config, indent=1).encode() + b"\n"])


def check_quant(checkpoint: Checkpoint) -> None:
    """Raise ConvertError where the matrices are not divisible into the tiles of 4 bits."""
    for name, tensor in checkpoint.language.items():
        tiled = (
            checkpoint.model.quant in quantization.PACKED
            and place(name).stack in quantization.MATRICES
        )
        if tiled and tensor.shape[1] % quantization.TILE:
            raise ConvertError(
                f"{tensor.where}: {tensor.shape[1]} columns are not a multiple of "
                f"{quantization.TILE}, the tile of {checkpoint.model.quant}; use int8"
            )


def _read_language(
    folder: Folder, model: Model, vocab: Vocab, dtypes: dict[str, str]
) -> dict[str, LazyTensor]:
    arrays = _stored(folder)
    expected = {name: tuple(leaf.shape) for name, leaf in stacks(model, vocab).items()}
    check_shapes(folder.path, arrays, expected)
    language = {}
    for name, shape in language_shapes(model, vocab).items():
        stack, layer = place(name)
        dtype = dtypes.get(name, arrays[stack].dtype)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            where = f"{folder.path}/config.json: weights.dtypes.{name}"
            raise ConvertError(f"{where} is {quoted(dtype)}; it must be one of {', '.join(DTYPES)}")
        language[name] = _from_stack(arrays[stack], stack.rpartition(".")[2], layer, shape, dtype)
    return language


def _stored(folder: Folder) -> dict[str, StackedArray]:
    """Return the stacked arrays of either file format."""
    if folder.has(SMALL):
        tensors = safetensors_stream.read_file(folder.file(SMALL))
        return {name: _in_file(tensor) for name, tensor in tensors.items()}
    inside = Folder(f"{folder.path.rstrip('/')}/{STORE}")
    return {name: _in_store(inside, name) for name in zarr_arrays.names(inside)}


def _in_file(tensor: LazyTensor) -> StackedArray:
    def read(layer: int | None, *axes: slice, turned: bool = False) -> np.ndarray:
        rows = slice(0, tensor.shape[0]) if layer is None else slice(layer, layer + 1)
        full = tensor.block(rows, slice(None))
        array = (full if layer is None else full[0])[axes]
        return array.T if turned else array

    return StackedArray(tensor.shape, tensor.dtype, tensor.where, read)


def _in_store(folder: Folder, name: str) -> StackedArray:
    store = zarr_arrays.open_array(folder, name)

    def read(layer: int | None, *axes: slice, turned: bool = False) -> np.ndarray:
        part = store if layer is None else store[layer]
        inside = (slice(*a.indices(n)) for a, n in zip(axes, part.shape, strict=False))
        part = part[tuple(inside)]  # numpy clips slices outside the array, zarr does not
        # TensorStore transposes block by block, which is fast
        return zarr_arrays.read(folder, part.T if turned else part)

    dtype = _NAMES.get(store.dtype.numpy_dtype, store.dtype.name)
    return StackedArray(tuple(store.shape), dtype, f"{folder.path}/{name}", read)


def _from_stack(
    stack: StackedArray, leaf: str, layer: int | None, shape: tuple[int, ...], dtype: str
) -> LazyTensor:
    """Return a canonical tensor of a stack."""

    def block(rows: slice, columns: slice) -> np.ndarray:
        if leaf == "kernel":
            array = stack.read(layer, columns, rows, turned=True)
        elif leaf == "embedding":
            array = stack.read(layer, rows, columns)
        elif len(shape) == 2:  # q/k-norm gains: one row per shard, here one row per head
            gains = stack.read(layer, slice(None), columns)
            array = np.repeat(gains, shape[0] // len(gains), axis=0)[rows]
        else:
            array = stack.read(layer, rows)
        return array.astype(DTYPES[dtype], copy=False)

    return LazyTensor(shape, dtype, block, stack.where)


def _to_stack(array: np.ndarray, leaf: str, shards: int) -> np.ndarray:
    """Return a canonical tensor in the form of its stack."""
    if leaf == "kernel":
        return array.T
    return array[:: len(array) // shards] if array.ndim == 2 and leaf != "embedding" else array


def _write_language(
    folder: Folder, checkpoint: Checkpoint, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write the arrays; return the dtypes of the tensors that differ from their stack's."""
    model, dtypes = checkpoint.model, {}
    members: dict[str, list[tuple[str, LazyTensor]]] = {}
    for name, tensor in checkpoint.language.items():
        members.setdefault(place(name).stack, []).append((name, tensor))
    writer = zarr_arrays.Writer(Folder(f"{folder.path.rstrip('/')}/{STORE}"))
    abstract_stacks = stacks(dataclasses.replace(model, quant="none"), checkpoint.vocab)
    stored = {stack: _widest({t.dtype for _, t in tensors}) for stack, tensors in members.items()}
    calls = [
        functools.partial(_piece, name, t, DTYPES[stored[stack]], model)
        for stack, tensors in members.items()
        for name, t in tensors
    ]
    with prefetch(calls) as pieces:
        queue = iter(pieces)
        for stack, tensors in members.items():
            dtypes |= {name: t.dtype for name, t in tensors if t.dtype != stored[stack]}
            tensors = _counted(itertools.islice(queue, len(tensors)), tensors, progress)
            if model.quant != "none" and stack in quantization.MATRICES:
                quantize_write(writer, stack, tensors, abstract_stacks[stack], model.quant)
            else:
                _write_stack(writer, stack, tensors, abstract_stacks[stack], DTYPES[stored[stack]])
    writer.finish()
    return dtypes


def _piece(name: str, tensor: LazyTensor, dtype: np.dtype, model: Model) -> np.ndarray:
    array = check_finite(tensor.read(), tensor.where).astype(dtype, copy=False)
    return _to_stack(array, place(name).stack.rpartition(".")[2], model.qk_norm_shards)


def _counted(
    calls: Iterator[Callable[[], np.ndarray]],
    tensors: list[tuple[str, LazyTensor]],
    progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
    for call, (_, tensor) in zip(calls, tensors, strict=True):
        yield call()
        progress(tensor.nbytes)


def _write_stack(
    writer: zarr_arrays.Writer,
    name: str,
    pieces: Iterator[np.ndarray],
    like: jax.ShapeDtypeStruct,
    dtype: np.dtype,
) -> None:
    sharded = tuple(axis is not None for axis in _spec(like))
    store = writer.create(name, like.shape, dtype, sharded)
    if not name.startswith("layers."):
        writer.write(store, ..., next(pieces))
    elif store.chunk_layout.write_chunk.shape[0] > 1:  # a small stack is one file
        writer.write(store, ..., np.stack(list(pieces)))
    else:
        for layer, piece in enumerate(pieces):
            writer.write(store, layer, piece)


def _spec(like: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
    spec = tuple(like.sharding.spec)
    return spec + (None,) * (len(like.shape) - len(spec))


def _widest(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "F32"  # represents bfloat16 and float16 exactly


def _check_stacks(folder: Folder, model: Model, vocab: Vocab) -> None:
    expected = {name: tuple(leaf.shape) for name, leaf in stacks(model, vocab).items()}
    check_shapes(folder.path, _stored(folder), expected)


def _read_vqgan(folder: Folder, vq: VQ) -> dict[str, LazyTensor]:
    native_tensors, tensors = safetensors_stream.read_file(folder.file("vqgan.safetensors")), {}
    check_gathered(f"{folder.path}/vqgan.safetensors", native_tensors)
    vqgan.check_blocks(native_tensors, vq, f"{folder.path}/vqgan.safetensors")
    for taming, (name, shape) in vqgan_layout.key_map(vq).items():
        if name in native_tensors:
            tensor = native_tensors.pop(name)
            if tensor.shape != shape:
                raise ConvertError(
                    f"{tensor.where}: shape {quoted(tensor.shape)}, but config.vq requires {shape}"
                )
            check_dtype(tensor.dtype, tensor.where)
            tensors[taming] = vqgan_layout.from_native(tensor)
    if native_tensors:
        raise ConvertError(
            f"{folder.path}/vqgan.safetensors: {quoted(min(native_tensors))} is unexpected"
        )
    return vqgan_layout.check(f"{folder.path}/vqgan.safetensors", tensors, vq)


def _write_vqgan(folder: Folder, checkpoint: Checkpoint, progress: Callable[[int], None]) -> None:
    table, native_tensors = vqgan_layout.key_map(checkpoint.vq), {}
    for taming, tensor in checkpoint.vqgan.items():
        native_tensors[table[taming].name] = vqgan_layout.as_native(tensor, table[taming].shape)
    safetensors_stream.write_file(folder, "vqgan.safetensors", native_tensors, progress=progress)


# ---- quantize ----
#
# Matrices are quantized to 8 or 4 bits by qwix, on the host, one in memory at a time;
# quantization.py reads them.


def quantize(kernel: Float[np.ndarray, "I O"], kind: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Return qvalue and scale of a matrix, computed on the host."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        quantized = _qwix(jnp.asarray(kernel), kind)
    codes, scale = np.asarray(quantized.qvalue), np.asarray(quantized.scale, np.float32)
    if kind in PACKED:
        pairs = codes.astype(np.int8).view(np.uint8) & 15
        codes = pairs[0::2] | (pairs[1::2] << 4)
    return {"qvalue": codes, "scale": scale}


def quantize_write(
    writer: zarr_arrays.Writer,
    name: str,
    kernels: Iterator[Float[np.ndarray, "I O"]],
    like: jax.ShapeDtypeStruct,
    kind: str,
) -> None:
    """Quantize a stack of kernels, layer by layer, into the arrays name.qvalue and name.scale."""
    sharded, scales = tuple(axis is not None for axis in like.sharding.spec), []
    store = None
    for layer, kernel in enumerate(kernels):
        quantized = quantize(kernel, kind)
        scales.append(quantized["scale"])
        codes = quantized["qvalue"]
        if store is None:
            store = writer.create(
                f"{name}.qvalue", (like.shape[0], *codes.shape), codes.dtype, sharded
            )
        writer.write(store, layer, codes)
    stack = np.stack(scales)
    store = writer.create(f"{name}.scale", stack.shape, stack.dtype, (False, False, False))
    writer.write(store, ..., stack)


@functools.partial(jax.jit, static_argnums=1)
def _qwix(kernel: Float[Array, "I O"], kind: str) -> qwix.QArray:
    tiles = {0: TILE} if kind in PACKED else {}
    return qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tiles)
