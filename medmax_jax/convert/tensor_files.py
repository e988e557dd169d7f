"""Safetensors files of a folder: read by ranges, written as a stream; one tensor in memory at most.

    model.safetensors                                     one file, or
    model-00001-of-00003.safetensors ..                   several, and
    model.safetensors.index.json {"weight_map": {tensor: file}}

The safetensors library wants a file on a local disk and, to write, all of it in memory; here the
file may be a gs:// object. What a header says is checked against the size of its file before any
of it is believed.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from medmax_jax.convert.ahead import ahead
from medmax_jax.convert.form import DTYPES, ConvertError, Tensor, finite
from medmax_jax.storage import ByteFile, Folder

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes; the library's own limit
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_PLAIN = re.compile(r"[\w.-]+\.safetensors")


def read(folder: Folder) -> dict[str, Tensor]:
    """Tensor name -> tensor of all safetensors files of the folder."""
    files = [n for n in folder.names() if n.endswith(".safetensors") and "/" not in n]
    if not folder.has(INDEX):
        if len(files) != 1:
            raise ConvertError(
                f"{folder.path}: {len(files)} safetensors files and no {INDEX}; copy the whole "
                "folder again"
            )
        return read_file(folder.file(files[0]))
    places = _weight_map(folder)
    if gone := sorted(set(places.values()) - set(files)):
        raise ConvertError(f"{folder.path}/{gone[0]}: missing, but {INDEX} names it; copy it")
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        held = read_file(folder.file(file))
        wanted = {name for name, place in places.items() if place == file}
        if wrong := sorted(wanted ^ set(held)):
            raise ConvertError(
                f"{folder.path}/{file}: {wrong[0]} is in the file or in {INDEX}, not in both "
                f"({len(wrong)} such); files of two checkpoints are mixed"
            )
        found |= held
    return found


def read_file(file: ByteFile) -> dict[str, Tensor]:
    """Tensor name -> tensor of one file."""
    header, start = _header(file)
    found, ends = {}, [start]
    for name, entry in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        shape, dtype, (begin, end) = _entry(file, name, entry)
        if begin + start != ends[-1]:
            raise _broken(file, f"{name} begins at byte {begin}, not where the one before it ends")
        ends.append(end + start)
        found[name] = _tensor(file, name, shape, dtype, begin + start)
    if ends[-1] != file.size:
        raise _broken(file, f"its tensors end at byte {ends[-1]} of {file.size}")
    return found


def write(
    folder: Folder,
    tensors: dict[str, Tensor],
    *,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Writes the tensors in this order, a file at most `shard_bytes` long where tensors allow.

    Raises ConvertError on a number that is not finite. `progress` is told of bytes written.
    """
    shards = _shards(tensors, shard_bytes)
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        write_file(folder, file, {n: tensors[n] for n in names}, progress=progress)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        folder.write(INDEX, [json.dumps(index, indent=2).encode() + b"\n"])


def write_file(
    folder: Folder, file: str, tensors: dict[str, Tensor], *, progress: Callable[[int], None]
) -> None:
    """One safetensors file with the metadata that HF's loader asks for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=offsets)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data lie at a multiple of 8
    calls = [lambda t=t: np.ascontiguousarray(finite(t.all(), t.where)) for t in tensors.values()]
    with folder.stream(file) as out, ahead(calls) as arrays:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor, array in zip(tensors.values(), arrays, strict=True):
            out.write(array())
            progress(tensor.nbytes)


def _weight_map(folder: Folder) -> dict[str, str]:
    index = folder.json(INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ConvertError(f"{folder.path}/{INDEX}: has no weight_map of names; copy it again")
    for name, file in places.items():
        if not _PLAIN.fullmatch(file):
            raise ConvertError(
                f"{folder.path}/{INDEX}: {name} is said to be in {file!r}, which is no plain file "
                "name of this folder; do not trust this checkpoint"
            )
    return places


def _header(file: ByteFile) -> tuple[dict[str, Any], int]:
    """The header without its metadata, and where the data begin."""
    if file.size < 8:
        raise _broken(file, f"{file.size} bytes are too few for a header")
    length = int.from_bytes(bytes(file.read(0, 8)), "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise _broken(file, f"a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(bytes(file.read(8, 8 + length)), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is no table of tensors")
    header.pop("__metadata__", None)
    return header, 8 + length


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands twice")
        found[name] = value
    return found


def _offsets(file: ByteFile, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or [type(o) for o in offsets] != [int, int]:
        raise _broken(file, f"{name} has no data_offsets of two whole numbers")
    return offsets[0], offsets[1]


def _entry(file: ByteFile, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    begin, end = _offsets(file, name, entry)
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _broken(file, f"{name} has shape {shape!r}")
    if dtype not in _SIZES:
        raise ConvertError(f"{file.name}: {name} has dtype {dtype!r}, which is unknown here")
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise _broken(file, f"{name}, {dtype} {shape}, cannot have {end - begin} bytes")
    return tuple(shape), dtype, (begin, end)


def _tensor(file: ByteFile, name: str, shape: tuple[int, ...], dtype: str, start: int) -> Tensor:
    row = math.prod(shape[1:]) * _SIZES[dtype]

    def block(rows: slice, columns: slice) -> np.ndarray:
        first, last, _ = rows.indices(shape[0])
        raw = file.read(start + first * row, start + last * row)
        array = raw.view(DTYPES[dtype]).reshape(last - first, *shape[1:])
        return array[:, columns] if len(shape) > 1 else array

    return Tensor(shape, dtype, block, f"{file.name}: {name}")


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _broken(file: ByteFile, what: str) -> ConvertError:
    return ConvertError(f"{file.name}: not a whole safetensors file: {what}; copy it again")
