"""Read and write torch's .pth and .ckpt files without torch; nothing in a file is executed.

    <root>/data.pkl    a pickle: {name: tensor of storage "0", storage_offset, shape, stride}
    <root>/data/0 ...  the storages, raw and little-endian
    <root>/byteorder   "little"; a file from before torch 2.1 has none, and is little-endian too
    <root>/version     of this layout

The format is one zip, whose files are stored without compression, as torch writes it since 1.6.
Reading a tensor reads only its bytes, so files of 13 GB in a bucket can be used like local ones.
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from medmax_jax.checkpoints import torch_unpickler
from medmax_jax.checkpoints.torch_unpickler import PthError

Buffer = bytes | bytearray | memoryview | np.ndarray  # of uint8
Source = tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]  # name, shape, dtype, values

_NUMPY = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TORCH = {dtype: name for name, dtype in torch_unpickler.DTYPES.items()}

_MAX_META = 64 << 20  # bytes of the zip's directory, and of data.pkl; those of 30B are < 1 MiB
_MAX_RANK = 32  # axes; the limit of numpy 1
_MAX_EMPTY = 1 << 40  # of a tensor without elements: the product of its other axes
_PIECE = 16 << 20  # bytes per read or write
_ALIGN = 64  # bytes; torch's value, for mmap=True
_ZIP64 = (1 << 31) - 1  # larger sizes and offsets take 64 bits; some readers' 32 are signed
_FULL = 0xFFFFFFFF  # in a 32-bit field: see the 64-bit one
_CENTRAL, _LOCAL = "<4s6H3L5H2L", "<4s5H3L2H"  # a file in the directory, and before its data
_END64, _LOCATOR, _END = "<4sQ2H2L4Q", "<4sLQL", "<4s4H2LH"  # the three records at the end of a zip


@runtime_checkable
class ByteFile(Protocol):
    """A file that is read by ranges: a local one, or an object in a bucket."""

    name: str
    size: int

    def read(self, start: int, stop: int) -> Buffer | UInt8[np.ndarray, "n"]: ...


@runtime_checkable
class FileWriter(Protocol):
    """A destination of `write`: any open binary file; seeking is not needed."""

    def write(self, data: Buffer, /) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class _Record:
    """One file inside the zip."""

    name: bytes
    header: int  # the offset of its local header
    size: int
    crc: int  # 0: not computed (torch.serialization.set_crc32_options(False))
    limit: int  # the offset of the next header, or of the directory


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, not yet read; entries of one `storage` share their memory in torch."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, I64, ...
    storage: str
    start: int  # the first element in the storage; this, stride and record are for `read`
    stride: tuple[int, ...]  # elements
    record: _Record


def open_file(file: ByteFile) -> dict[str, Entry]:
    """Return name -> tensor of a state dict, or of the `state_dict` or `model` in a checkpoint.

    It reads the zip's directory, byteorder and data.pkl. Entries next to `state_dict` are ignored.
    """
    records = _directory(file)
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise PthError(
            f"{file.name}: a zip with {len(roots)} data.pkl files, not a file written by "
            "torch.save; use a .pth file"
        )
    prefix = roots[0] + "/"
    order = records.get(prefix + "byteorder")
    if order and (byteorder := _read_record(file, order)) != b"little":
        raise PthError(
            f"{file.name}: byteorder is {byteorder[:9]!r}, expected b'little'; save it again in "
            "torch on a little-endian machine"
        )
    top = torch_unpickler.load(file.name, _read_record(file, records[prefix + "data.pkl"]))
    return {
        name: _entry(f"{file.name}: {name[:200]!r}", value, records, prefix)
        for name, value in _state_dict(file.name, top).items()
    }


def read(file: ByteFile, entry: Entry) -> np.ndarray:
    """Return the tensor as a new contiguous array; read only from its first to its last element."""
    dtype = _NUMPY[entry.dtype]
    if 0 in entry.shape:
        return np.zeros(entry.shape, dtype)
    stride = [s if n > 1 else 1 for n, s in zip(entry.shape, entry.stride, strict=True)]
    last = sum((n - 1) * s for n, s in zip(entry.shape, stride, strict=True))
    start = _data_start(file, entry.record) + entry.start * dtype.itemsize
    raw = np.frombuffer(_bytes(file, start, start + (last + 1) * dtype.itemsize), np.uint8)
    raw = raw if raw.flags.writeable else raw.copy()
    crc = zlib.crc32(raw)
    if raw.size == entry.record.size and entry.record.crc not in (0, crc):
        raise _damaged(file, f"the checksum of {entry.record.name!r} is wrong")
    strides = tuple(s * dtype.itemsize for s in stride)
    view = np.ndarray(entry.shape, dtype, raw.data, 0, strides)
    return view if view.flags.c_contiguous else view.copy("C")


def write(out: FileWriter, tensors: Iterable[Source], *, wrap: str | None) -> None:
    """Write a file for torch.load, deterministically; values are requested one by one.

    `out` is empty at the start. `wrap` is the key to store the state dict under, "state_dict" for a
    Lightning checkpoint, or None.
    """
    sources = list(tensors)
    archive = _ZipWriter(out)
    archive.add("data.pkl", _pickled(sources, wrap))
    archive.add("byteorder", b"little")
    for n, (name, shape, dtype, values) in enumerate(sources):
        archive.add(f"data/{n}", _raw(name, shape, dtype, values()))
    archive.add("version", b"3\n")  # the version that torch writes since 1.6
    archive.close()


def _state_dict(path: str, top: Any) -> dict[str, torch_unpickler.Tensor]:
    """Return the state dict; search one level deep only, as containers may contain themselves."""
    if type(top) is not dict:
        raise PthError(
            f"{path}: contains a {torch_unpickler.type_name(top)}, not a dict; "
            "save model.state_dict()"
        )
    nested = [top[key] for key in ("state_dict", "model") if type(top.get(key)) is dict]
    state = nested[0] if nested else top
    for key, value in state.items():
        if type(key) is not str or type(value) is not torch_unpickler.Tensor:
            raise PthError(
                f"{path}: entry {str(key)[:200]!r} is a {torch_unpickler.type_name(value)}; "
                "expected tensors under string keys; save only the state dict: "
                "torch.save(model.state_dict(), path)"
            )
    return state


def _entry(
    where: str, tensor: torch_unpickler.Tensor, records: dict[str, _Record], prefix: str
) -> Entry:
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    record = records.get(f"{prefix}data/{storage.key}")
    if record is None:
        raise PthError(
            f"{where}: storage {storage.key[:20]!r} is missing in the file; download it again"
        )
    if storage.numel * _NUMPY[storage.dtype].itemsize != record.size:
        raise PthError(
            f"{where}: storage {storage.key!r} has {record.size} bytes, not {storage.numel:,} "
            f"elements of {storage.dtype}; download the file again"
        )
    fits = len(shape) == len(stride) and len(shape) <= _MAX_RANK
    if fits and 0 in shape:
        fits = math.prod(n for n in shape if n) <= _MAX_EMPTY
    elif fits:
        last = tensor.start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        fits = last < storage.numel and math.prod(shape) <= storage.numel
    if not fits:
        raise PthError(
            f"{where}: shape {shape[:_MAX_RANK]}, stride {stride[:_MAX_RANK]}, storage_offset "
            f"{tensor.start} do not fit the {storage.numel} elements of storage {storage.key!r}; "
            "save tensor.contiguous()"
        )
    return Entry(shape, storage.dtype, storage.key, tensor.start, stride, record)


def _directory(file: ByteFile) -> dict[str, _Record]:
    """Return the files of the zip by name: uncompressed, complete, without overlap."""
    start, size, count = _end(file)
    data = bytes(_bytes(file, start, start + size))
    entries, at = [], 0
    try:
        while at < size:
            record, at = _central(file, data, at)
            entries.append(record)
        names = [record.name.decode() for record in entries]
    except (struct.error, UnicodeDecodeError) as e:
        raise _damaged(file, "its zip directory is unreadable") from e
    if not entries or at != size or len(entries) != count or len(set(names)) != count:
        raise _damaged(file, "its zip directory is truncated or contains a name twice")
    order = sorted(range(count), key=lambda n: entries[n].header)
    limits = [entries[n].header for n in order[1:]] + [start]
    records = {}
    for n, limit in zip(order, limits, strict=True):
        records[names[n]] = record = dataclasses.replace(entries[n], limit=limit)
        if record.header + struct.calcsize(_LOCAL) + len(record.name) + record.size > limit:
            raise _damaged(file, f"{record.name[:99]!r} overlaps the next entry")
    return records


def _end(file: ByteFile) -> tuple[int, int, int]:
    """Return the offset of the zip's directory, its size in bytes, and its number of files.

    torch writes no comment after it.
    """
    sizes = [struct.calcsize(layout) for layout in (_END64, _LOCATOR, _END)]
    tail = bytes(_bytes(file, max(0, file.size - sum(sizes)), file.size))
    if len(tail) < sizes[2] or not tail[-sizes[2] :].startswith(b"PK\5\6"):
        if bytes(_bytes(file, 0, min(4, file.size))) == b"PK\3\4":
            raise _damaged(file, "its end is missing")
        raise PthError(
            f"{file.name}: not the zip format of torch >= 1.6; if torch can open it, save it "
            "again: torch.save(torch.load(path, weights_only=True), path)"
        )
    *_, count, size, start, _ = struct.unpack(_END, tail[-sizes[2] :])
    end = file.size - sizes[2]
    if len(tail) == sum(sizes) and tail[sizes[0] :].startswith(b"PK\6\7"):
        signature, *_, count, size, start = struct.unpack(_END64, tail[: sizes[0]])
        end -= sizes[0] + sizes[1]
        if signature != b"PK\6\6":
            raise _damaged(file, "its zip directory has no end")
    if start + size != end or size > _MAX_META:
        raise _damaged(file, f"its zip directory of {size} bytes at offset {start} is invalid")
    return start, size, count


def _central(file: ByteFile, data: bytes, at: int) -> tuple[_Record, int]:
    fields = struct.unpack_from(_CENTRAL, data, at)
    signature, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, *_, header = (
        fields
    )
    at += struct.calcsize(_CENTRAL)
    stop = at + name + extra + comment
    name, extra = data[at : at + name], data[at + name : at + name + extra]
    size, packed, header = _wide([size, packed, header], extra)
    if signature != b"PK\1\2":
        raise _damaged(file, "its zip directory is unreadable")
    if method or size != packed or flags & 0x2041:  # encrypted, in any of the three ways
        raise PthError(
            f"{file.name}: {name[:99]!r} is compressed or encrypted, which torch never does; "
            "unpack it and save it again in torch"
        )
    return _Record(name, header, size, crc, 0), stop


def _wide(values: list[int], extra: bytes) -> list[int]:
    """Return size, packed size and offset.

    Values that exceed 32 bits are taken from the 64-bit extra field.
    """
    while len(extra) >= 4:
        tag, n = struct.unpack_from("<2H", extra)
        if tag == 1:
            wide = iter(struct.unpack_from(f"<{n // 8}Q", extra, 4))
            return [next(wide, value) if value == _FULL else value for value in values]
        extra = extra[4 + n :]
    return values


def _data_start(file: ByteFile, record: _Record) -> int:
    size = struct.calcsize(_LOCAL)
    head = bytes(_bytes(file, record.header, record.header + size + len(record.name)))
    signature, _, flags, method, *_, name, extra = struct.unpack_from(_LOCAL, head)
    start = record.header + size + name + extra
    if signature != b"PK\3\4" or head[size:] != record.name or name != len(record.name):
        raise _damaged(
            file, f"{record.name[:99]!r} is not at the offset stated in the zip directory"
        )
    if method or flags & 0x2041 or start + record.size > record.limit:
        raise _damaged(file, f"{record.name[:99]!r} overlaps the next entry, or is compressed")
    return start


def _read_record(file: ByteFile, record: _Record) -> bytes:
    if record.size > _MAX_META:
        raise _damaged(file, f"{record.name[:99]!r} has {record.size} bytes, more than {_MAX_META}")
    start = _data_start(file, record)
    data = bytes(_bytes(file, start, start + record.size))
    if record.crc not in (0, zlib.crc32(data)):
        raise _damaged(file, f"the checksum of {record.name[:99]!r} is wrong")
    return data


def _bytes(file: ByteFile, start: int, stop: int) -> memoryview:
    data = memoryview(file.read(start, stop))
    if len(data) != stop - start:
        raise _damaged(file, f"read {len(data)} bytes at offset {start}, expected {stop - start}")
    return data


def _damaged(file: ByteFile, why: str) -> PthError:
    return PthError(f"{file.name}: damaged: {why}; copy or download it again")


def _pickled(sources: list[Source], wrap: str | None) -> bytes:
    """Return data.pkl as pickle protocol 2, which torch.load(weights_only=True) reads."""
    if len({name for name, *_ in sources}) != len(sources):
        raise PthError("two tensors have the same name; use unique names")
    parts = [b"\x80\x02", b"}" + _string(wrap) if wrap is not None else b"", b"}("]
    for n, (name, shape, dtype, _) in enumerate(sources):
        if dtype not in _TORCH:
            raise PthError(
                f"{name}: dtype {dtype!r} has no torch storage type; use one of {[*_TORCH]}"
            )
        strides = [math.prod(max(m, 1) for m in shape[axis + 1 :]) for axis in range(len(shape))]
        parts += [_string(name), _global("torch._utils._rebuild_tensor_v2"), b"(("]
        parts += [_string("storage"), _global(_TORCH[dtype]), _string(str(n)), _string("cpu")]
        parts += [_integer(math.prod(shape)), b"tQK\0", _integers(shape), _integers(strides)]
        parts += [b"\x89", _global("collections.OrderedDict"), b")RtR"]
    return b"".join([*parts, b"u", b"s" if wrap is not None else b"", b"."])


def _string(text: str) -> bytes:
    return b"X" + struct.pack("<L", len(text.encode())) + text.encode()


def _global(name: str) -> bytes:
    return b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n"


def _integer(n: int) -> bytes:
    size = n.bit_length() // 8 + 1  # including the sign
    data = n.to_bytes(max(size, 4), "little", signed=True)
    return b"J" + data if size <= 4 else bytes([0x8A, size]) + data


def _integers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(_integer(n) for n in values) + b"t"


def _raw(name: str, shape: tuple[int, ...], dtype: str, values: np.ndarray) -> memoryview:
    if values.shape != shape or values.dtype != _NUMPY[dtype]:
        raise PthError(
            f"{name}: got an array {values.dtype} {values.shape}, declared as {dtype} {shape}; "
            "declare the dtype and shape of the array"
        )
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class _ZipWriter:
    """Writes a zip of uncompressed, aligned files to a stream that cannot seek."""

    def __init__(self, out: FileWriter):
        self.out, self.at, self.directory = out, 0, []

    def add(self, name: str, data: Buffer) -> None:
        path, size, crc, header = f"archive/{name}".encode(), len(data), zlib.crc32(data), self.at
        wide = size > _ZIP64
        extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
        before = header + struct.calcsize(_LOCAL) + len(path) + len(extra) + 4
        padding = -before % _ALIGN  # under 0xD935, the tag that Android's zipalign pads with
        extra += struct.pack("<2H", 0xD935, padding) + bytes(padding)
        narrow = (_FULL, _FULL) if wide else (size, size)
        # 1980-01-01, the first date that a zip can represent
        version, date = 45 if wide else 20, 33
        fields = (version, 0, 0, 0, date, crc, *narrow, len(path))
        self._write(struct.pack(_LOCAL, b"PK\3\4", *fields, len(extra)) + path + extra)
        self._write(data)
        far = header > _ZIP64
        places = [size, size] * wide + [header] * far
        extra = struct.pack(f"<2H{len(places)}Q", 1, 8 * len(places), *places) if places else b""
        fields = (version, *fields, len(extra), 0, 0, 0, 0, _FULL if far else header)
        self.directory.append(struct.pack(_CENTRAL, b"PK\1\2", *fields) + path + extra)

    def close(self) -> None:
        """Write the directory and its end, in 64 and in 32 bits as torch does."""
        start, count, data = self.at, len(self.directory), b"".join(self.directory)
        end = start + len(data)
        places = (count, count, len(data), start)
        self._write(data)
        self._write(struct.pack(_END64, b"PK\6\6", 44, 45, 45, 0, 0, *places))
        self._write(struct.pack(_LOCATOR, b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        self._write(struct.pack(_END, b"PK\5\6", 0, 0, few, few, len(data), min(start, _FULL), 0))

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            if self.out.write(piece) not in (None, len(piece)):
                raise PthError(
                    f"byte {self.at + at}: the stream wrote only part of the data; "
                    "open it with buffering"
                )
        self.at += len(view)
