"""Small torch files made by hand, and what reads all of one: for test_pth and test_unpickle."""

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import settings

from medmax_jax.checkpoints import torch_file, torch_unpickler

FUZZ = settings(max_examples=250, deadline=None, derandomize=True)


class Bytes:
    """A ByteFile that remembers what was read of it."""

    def __init__(self, data):
        self.name, self.data, self.size, self.ranges = "toy.pth", data, len(data), []

    def read(self, start, stop):
        self.ranges.append((start, stop))
        return self.data[start:stop]


class Pipe:
    """A stream that can only be written to."""

    def __init__(self):
        self.parts = []

    def write(self, data):
        self.parts.append(bytes(data))
        return len(data)


def zipped(pickled, storages=(b"\0" * 24,), **extra):
    """A torch file around a data.pkl."""
    out = io.BytesIO()
    files = {"data.pkl": pickled, "byteorder": b"little"} | extra
    files |= {f"data/{n}": data for n, data in enumerate(storages)}
    with zipfile.ZipFile(out, "w") as z:
        for name, data in files.items():
            z.writestr(zipfile.ZipInfo(f"a/{name}"), data)
    return out.getvalue()


def text(s):
    return b"X" + struct.pack("<L", len(s)) + s.encode()


def number(n):
    return b"\x8a\x14" + n.to_bytes(20, "little", signed=True)


def numbers(*values):
    return b"(" + b"".join(number(n) for n in values) + b"t"


def storage(cls="torch\nFloatStorage", key="0", numel=6):
    return (
        b"("
        + text("storage")
        + f"c{cls}\n".encode()
        + text(key)
        + text("cpu")
        + number(numel)
        + b"tQ"
    )


ODICT = b"ccollections\nOrderedDict\n)R"


def tensor(of=None, start=0, shape=(2, 3), stride=(3, 1), rest=b"\x89" + ODICT):
    of = storage() if of is None else of
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + number(start) + numbers(*shape)
        + numbers(*stride) + rest + b"tR"
    )  # fmt: skip


def state(value=None):
    return b"\x80\x02}" + text("w") + (tensor() if value is None else value) + b"s."


TOY = zipped(state(), [np.arange(6, dtype=np.float32).tobytes()])


def refused(data, message):
    with pytest.raises(torch_unpickler.PthError, match=message) as raised:
        torch_file.open_file(Bytes(data))
    assert str(raised.value).startswith("toy.pth: ")
    return str(raised.value)


def survives(data):
    """Reads all of a file; nothing but PthError may end it."""
    file = Bytes(data)
    try:
        for entry in torch_file.open_file(file).values():
            assert torch_file.read(file, entry).shape == entry.shape
    except torch_unpickler.PthError as error:
        assert str(error).startswith("toy.pth: ")
