"""Weight files of a folder: read by ranges, written as a stream; at most one tensor in memory.

    model.safetensors                                     one file, or
    model-00001-of-00003.safetensors ..                   several, and
    model.safetensors.index.json {"weight_map": {tensor: file}}
    pytorch_model.bin, pytorch_model.bin.index.json       the same from torch.save: only read, where
                                                          there are no safetensors files

The safetensors library requires a file on a local disk and, to write, all tensors in memory; here
the file may be a gs:// object. The values of a header are checked against the size of the file
before any of them is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from medmax_jax.checkpoints import torch_file
from medmax_jax.convert.state_dict import (
    DTYPES,
    ConvertError,
    LazyTensor,
    check_dtype,
    check_finite,
)
from medmax_jax.io.errors import printable, quoted
from medmax_jax.io.settings_files import MAX_JSON_BYTES, parse_settings
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage.folder import ByteFile, Folder

INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
BIN = "pytorch_model.bin"
MAX_TENSORS = 1 << 17  # per file; 30B has 760
MAX_NAME = 512  # characters of a tensor's name
MAX_RANK, MAX_DIM = 16, 1 << 40  # axes, and the length of one
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_PLAIN = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)")


def read(folder: Folder) -> dict[str, LazyTensor]:
    """Return tensor name -> tensor of all weight files of the folder; safetensors files first."""
    names = [n for n in folder.names() if "/" not in n]
    files = [n for n in names if n.endswith(".safetensors")]
    if folder.has(INDEX):
        return _read_indexed(folder, INDEX, files)
    if not files and folder.has(BIN_INDEX):
        return _read_indexed(folder, BIN_INDEX, [n for n in names if n.endswith(".bin")])
    if not files and folder.has(BIN):
        return read_torch(folder.file(BIN))
    if len(files) != 1:
        raise ConvertError(
            f"{folder.path}: {len(files)} safetensors files, but no {INDEX} and no {BIN}; "
            "copy the complete folder again"
        )
    return read_file(folder.file(files[0]))


def read_torch(file: ByteFile, *, dropped: tuple[str, ...] = ()) -> dict[str, LazyTensor]:
    """Return name -> tensor of a .pth, .ckpt or .bin file of torch.save, except those `dropped`."""
    tensors = {}
    for name, entry in torch_file.open_file(file).items():

        def block(rows: slice, columns: slice, entry=entry) -> np.ndarray:
            first, last, _ = rows.indices(entry.shape[0])
            start = entry.start + first * entry.stride[0]
            shape = (last - first, *entry.shape[1:])
            array = torch_file.read(file, dataclasses.replace(entry, start=start, shape=shape))
            return array[:, columns] if array.ndim > 1 else array

        if name not in dropped:
            tensors[name] = LazyTensor(entry.shape, entry.dtype, block, f"{file.name}: {name}")
    return tensors


def _read_indexed(folder: Folder, index: str, files: list[str]) -> dict[str, LazyTensor]:
    by_file: dict[str, set[str]] = {}
    for name, file in _weight_map(folder, index).items():
        by_file.setdefault(file, set()).add(name)
    if missing := sorted(set(by_file) - set(files)):
        raise ConvertError(f"{folder.path}/{missing[0]} is missing, but listed in {index}; copy it")
    tensors: dict[str, LazyTensor] = {}
    for file, names in sorted(by_file.items()):
        reader = read_torch if index == BIN_INDEX else read_file
        file_tensors = reader(folder.file(file))
        if wrong := sorted(names ^ set(file_tensors)):
            raise ConvertError(
                f"{folder.path}/{file}: {printable(wrong[0], 80)} is in the file or in {index}, "
                f"not in both ({len(wrong)} tensors); the files belong to different checkpoints"
            )
        tensors |= file_tensors
    return tensors


def read_file(file: ByteFile) -> dict[str, LazyTensor]:
    """Return tensor name -> tensor of one safetensors file."""
    header, start = _header(file)
    tensors, ends = {}, [start]
    for name, entry in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        shape, dtype, (begin, end) = _entry(file, name, entry)
        if begin + start != ends[-1]:
            short = printable(name, 80)
            raise _broken(
                file, f"{short} begins at byte {begin}, not at the end of the previous tensor"
            )
        ends.append(end + start)
        tensors[name] = _tensor(file, name, shape, dtype, begin + start)
    if ends[-1] != file.size:
        raise _broken(file, f"its tensors end at byte {ends[-1]} of {file.size}")
    return tensors


def write(
    folder: Folder,
    tensors: dict[str, LazyTensor],
    *,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Write the tensors in this order, in files of at most `shard_bytes` where tensors allow.

    Raises ConvertError on a number that is not finite. `progress` receives the number of bytes
    written.
    """
    shards = _shards(tensors, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        write_file(folder, file, {n: tensors[n] for n in names}, progress=progress)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        folder.write(INDEX, [json.dumps(index, indent=2).encode() + b"\n"])


def write_file(
    folder: Folder, file: str, tensors: dict[str, LazyTensor], *, progress: Callable[[int], None]
) -> None:
    """Write one safetensors file with the metadata that HF's loader requires."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = dict(dtype=tensor.dtype, shape=tensor.shape, data_offsets=offsets)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data start at a multiple of 8
    calls = [
        lambda t=t: np.ascontiguousarray(check_finite(t.read(), t.where)) for t in tensors.values()
    ]
    with folder.stream(file) as out, prefetch(calls) as arrays:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor, array in zip(tensors.values(), arrays, strict=True):
            out.write(array())
            progress(tensor.nbytes)


def _weight_map(folder: Folder, name: str) -> dict[str, str]:
    """Return tensor name -> file name of an index; the files are plain names of this folder."""
    index, where = folder.json(name), f"{folder.path}/{name}"
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConvertError(f"{where}: has no valid weight_map; copy it again")
    if len(weight_map) > MAX_TENSORS:
        raise ConvertError(
            f"{where}: {len(weight_map)} tensors, more than {MAX_TENSORS}; not this model's index"
        )
    for tensor, file in weight_map.items():
        if not _PLAIN.fullmatch(file):
            raise ConvertError(
                f"{where}: {printable(tensor, 80)} refers to {quoted(file)}, which is not a plain "
                "file name in this folder; do not trust this checkpoint"
            )
    return weight_map


def _header(file: ByteFile) -> tuple[dict[str, Any], int]:
    """Return the header without its metadata, and the offset of the data."""
    if file.size < 8:
        raise _broken(file, f"{file.size} bytes are too short for a header")
    length = int.from_bytes(bytes(file.read(0, 8)), "little")
    if length > min(MAX_JSON_BYTES, file.size - 8):
        raise _broken(file, f"a header of {length} bytes in a file of {file.size}")
    try:
        header = parse_settings(bytes(file.read(8, 8 + length)), "its header")
    except TextFileError as error:
        raise _broken(file, str(error)) from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a table of tensors")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _broken(file, f"a header of {len(header)} tensors, more than {MAX_TENSORS}")
    if long := next((name for name in header if len(name) > MAX_NAME), None):
        raise _broken(file, f"a name of {len(long)} characters, more than {MAX_NAME}")
    return header, 8 + length


def _offsets(file: ByteFile, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    valid = isinstance(offsets, list) and [type(o) for o in offsets] == [int, int]
    if not valid or not 0 <= offsets[0] <= offsets[1] <= file.size:
        short = printable(name, 80)
        raise _broken(file, f"{short} has no valid data_offsets: two integers within the file")
    return offsets[0], offsets[1]


def _entry(file: ByteFile, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    begin, end = _offsets(file, name, entry)
    shape, dtype, short = entry.get("shape"), entry.get("dtype"), printable(name, 80)
    valid = isinstance(shape, list) and all(type(n) is int and 0 <= n <= MAX_DIM for n in shape)
    if not valid or len(shape) > MAX_RANK:
        raise _broken(file, f"{short} has shape {quoted(shape)}")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ConvertError(f"{file.name}: {short} has the unknown dtype {quoted(dtype)}")
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        size = quoted(end - begin)
        raise _broken(file, f"{short}, {dtype} {quoted(shape)}, cannot have {size} bytes")
    return tuple(shape), dtype, (begin, end)


def _tensor(
    file: ByteFile, name: str, shape: tuple[int, ...], dtype: str, start: int
) -> LazyTensor:
    row = math.prod(shape[1:]) * _SIZES[dtype]

    def block(rows: slice, columns: slice) -> np.ndarray:
        check_dtype(dtype, f"{file.name}: {name}")
        first, last, _ = rows.indices(shape[0])
        raw = file.read(start + first * row, start + last * row)
        array = raw.view(DTYPES[dtype]).reshape(last - first, *shape[1:])
        return array[:, columns] if len(shape) > 1 else array

    return LazyTensor(shape, dtype, block, f"{file.name}: {name}")


def _shards(tensors: dict[str, LazyTensor], shard_bytes: int) -> list[list[str]]:
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
    return ConvertError(f"{file.name}: not a valid safetensors file: {what}; copy it again")


# ---- Reading the next tensor while one is written ----


@contextlib.contextmanager
def prefetch(calls: Iterable[Callable[[], np.ndarray]]) -> Iterator[list[Callable[[], np.ndarray]]]:
    """Yield the same calls, to be made in order; the next one runs while a result is used.

    Reading, checksums and copies release the interpreter's lock, so a second core runs them.
    """
    calls = list(calls)
    futures: dict[int, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(1) as worker:

        def result(i: int) -> np.ndarray:
            for k in (i, i + 1):
                if k < len(calls) and k not in futures:
                    futures[k] = worker.submit(calls[k])
            return futures.pop(i).result()

        try:
            yield [functools.partial(result, i) for i in range(len(calls))]
        finally:
            worker.shutdown(wait=True, cancel_futures=True)
