"""torch's files without torch: files of torch, files of this project, and invalid zips."""

import io
import math
import pathlib
import struct
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pth_setup import (
    FUZZ,
    TOY,
    Bytes,
    Pipe,
    refused,
    state,
    storage,
    survives,
    tensor,
    text,
    zipped,
)

from medmax_jax.checkpoints import torch_file, torch_unpickler

PARITY = pathlib.Path(__file__).parents[1] / "parity"
BF16 = {"bf16", "strided"}  # of torch_file.npz, where they are int16


def golden(prefix=""):
    with np.load(PARITY / "torch_file.npz") as file:
        return {
            name.removeprefix(prefix): a.view(ml_dtypes.bfloat16) if name in BF16 else a
            for name, a in file.items()
            if name.startswith("nest/") == bool(prefix)
        }


def written(arrays, wrap=None):
    names = {dtype: name for name, dtype in torch_file._NUMPY.items()}
    out = Pipe()
    sources = ((n, a.shape, names[a.dtype], lambda a=a: a) for n, a in arrays.items())
    torch_file.write(out, sources, wrap=wrap)
    return b"".join(out.parts)


def write_ours():
    """Makes the file that tests/parity/make_pth.py --check loads in torch."""
    (PARITY / "our_file.pth").write_bytes(written(golden(), wrap="state_dict"))


def assert_contains(data, arrays):
    file = Bytes(data)
    entries = torch_file.open_file(file)
    assert list(entries) == list(arrays)
    for name, entry in entries.items():
        value = torch_file.read(file, entry)
        assert (
            value.dtype == arrays[name].dtype and value.shape == arrays[name].shape == entry.shape
        )
        assert value.tobytes() == arrays[name].tobytes(), name
        assert value.flags.c_contiguous and value.flags.writeable
    return entries


def test_reads_what_torch_wrote():
    entries = assert_contains((PARITY / "torch_file.pth").read_bytes(), golden())
    assert entries["bf16"].dtype == "BF16" and entries["i64"].dtype == "I64"
    assert entries["scalar"].shape == () and entries["empty"].shape == (0, 5)
    ties = {name for name, e in entries.items() if e.storage == entries["whole"].storage}
    assert ties == {"whole", "row", "column"}
    before_2_1 = TOY.replace(b"byteorder", b"something")
    assert_contains(before_2_1, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_reads_the_state_dict_of_a_checkpoint():
    assert_contains((PARITY / "torch_nest.ckpt").read_bytes(), golden("nest/"))
    for key in ("state_dict", "model"):
        data = zipped(b"}(" + text("step") + b"K\1" + text(key) + state()[2:-1] + b"u.")
        assert list(torch_file.open_file(Bytes(data))) == ["w"]


def test_reads_only_the_required_bytes():
    data = written({"a": np.zeros(10_000, np.float32), "b": np.ones((50, 20), np.float32)})
    file = Bytes(data)
    entries = torch_file.open_file(file)
    assert sum(stop - start for start, stop in file.ranges) < 2_000 and len(file.ranges) <= 8
    file.ranges.clear()
    torch_file.read(file, entries["b"])
    assert [stop - start for start, stop in file.ranges] == [30 + len("archive/data/1"), 4_000]
    whole = Bytes((PARITY / "torch_file.pth").read_bytes())
    row = torch_file.open_file(whole)["row"]
    torch_file.read(whole, row)
    assert whole.ranges[-1][1] - whole.ranges[-1][0] == 6 * 4


def test_writes_the_file_that_torch_has_loaded():
    """our_file.pth is what make_pth.py --check loaded in torch, so these bytes load too."""
    data = written(golden(), wrap="state_dict")
    assert data == (PARITY / "our_file.pth").read_bytes()
    assert_contains(data, golden())
    assert_contains(written(golden()), golden())
    assert_contains(written({}), {})
    wide = {f"{n}": np.zeros((0, n), np.int8) for n in (255, 2**31 - 1, 2**31, 2**39)}
    assert_contains(written(wide), wide)


def test_writes_an_aligned_zip():
    with zipfile.ZipFile(io.BytesIO(written(golden()))) as z:
        assert z.testzip() is None
        assert z.namelist()[0] == "archive/data.pkl"
        assert z.read("archive/byteorder") == b"little" and z.read("archive/version") == b"3\n"
        for info in z.infolist():
            with z.open(info) as f:
                assert f._orig_compress_start % 64 == 0 and info.compress_type == zipfile.ZIP_STORED


def test_large_files_use_64_bit_fields(monkeypatch):
    monkeypatch.setattr(torch_file, "_ZIP64", 100)
    arrays = golden() | {"big": np.arange(99.0)}
    data = written(arrays)
    for name, place in (("data/19", -26), ("data/19", -22), ("version", -4)):  # sizes, an offset
        at = data.rindex(b"archive/" + name.encode()) + place
        assert data[at : at + 4] == b"\xff" * 4
    assert_contains(data, arrays)
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        assert z.testzip() is None and len(z.namelist()) == len(arrays) + 3


def test_tensors_are_requested_one_by_one():
    alive = []

    def make():
        assert not any(ref() is not None for ref in alive)
        array = np.ones(1_000, np.float32)
        alive.append(weakref.ref(array))
        return array

    torch_file.write(Pipe(), [(f"{n}", (1_000,), "F32", make) for n in range(5)], wrap=None)
    assert len(alive) == 5


def test_invalid_tensors_are_not_written():
    one = np.ones(3, np.float32)
    for sources, message in [
        ([("a", (3,), "F8", lambda: one)], "a: dtype 'F8' has no torch storage type; use one of"),
        (
            [("a", (2,), "F32", lambda: one)],
            r"a: got an array float32 \(3,\), declared as F32 \(2,\)",
        ),
        ([("a", (3,), "F16", lambda: one)], "declared as F16"),
        ([("a", (3,), "F32", lambda: one.astype(">f4"))], "declared as F32"),
        ([("a", (3,), "F32", lambda: one)] * 2, "two tensors have the same name"),
    ]:
        with pytest.raises(torch_unpickler.PthError, match=message):
            torch_file.write(Pipe(), sources, wrap=None)
    pipe = Pipe()
    pipe.write = lambda data: 1
    with pytest.raises(
        torch_unpickler.PthError,
        match="byte 0: the stream wrote only part of the data; open it with",
    ):
        torch_file.write(pipe, [], wrap=None)


def test_stride_of_an_axis_of_length_one_is_ignored():
    strange = state(tensor(shape=(1, 6, 1), stride=(2**70, 1, 0)))
    file = Bytes(zipped(strange, [np.arange(6, dtype=np.float32).tobytes()]))
    file.data = np.frombuffer(file.data, np.uint8)  # a file may as well give arrays
    value = torch_file.read(file, torch_file.open_file(file)["w"])
    np.testing.assert_array_equal(value, np.arange(6, dtype=np.float32).reshape(1, 6, 1))


def rezipped(**changes):
    """TOY after changes of its directory: {place in an entry: byte}, for the entry of data/0."""
    data = bytearray(TOY)
    at = data.index(b"a/data/0", data.index(b"PK\1\2")) - 46
    for place, value in changes.items():
        data[at + int(place[1:])] = value
    return bytes(data)


def compressed():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", state())
    return out.getvalue()


def doubled():
    data = zipped(state(), **{"data/9": b"\0" * 24})
    return data.replace(b"a/data/9", b"a/data/0")


ZIPS = {
    "nothing": (lambda: b"", "not the zip format of torch >= 1.6; if torch can open it"),
    "a byte": (lambda: b"P", "not the zip format of torch"),
    "an end alone": (lambda: b"PK\5\6" + bytes(18), "its zip directory is truncated"),
    "half an end": (lambda: b"PK\5\6" + bytes(9), "not the zip format of torch"),
    "legacy": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." * 9, "not the zip format of"),
    "cut off": (lambda: TOY[:-9], "damaged: its end is missing; copy or download it again"),
    "another zip": (lambda: zipped(b"").replace(b"data.pkl", b"data.txt"), "with 0 data.pkl"),
    "two of them": (lambda: zipped(state(), **{"b/data.pkl": state()}), "with 2 data.pkl"),
    "big endian": (lambda: zipped(state(), byteorder=b"big"), "byteorder is b'big', expected"),
    "compressed": (compressed, "b'a/data.pkl' is compressed or encrypted"),
    "method of the storage": (lambda: rezipped(_10=8), "b'a/data/0' is compressed"),
    "encrypted": (lambda: rezipped(_8=1), "b'a/data/0' is compressed or encrypted"),
    "a name twice": (doubled, "its zip directory is truncated or contains a name twice"),
    "longer than the file": (lambda: rezipped(_23=9, _27=9), "b'a/data/0' overlaps the next entry"),
    "one byte longer": (lambda: rezipped(_20=25, _24=25), "b'a/data/0' overlaps the next entry"),
    "two sizes": (lambda: rezipped(_20=23), "b'a/data/0' is compressed"),
    "over another": (lambda: rezipped(_42=0, _43=0), "overlaps the next entry"),
    "far away": (lambda: rezipped(_45=99), "overlaps the next entry"),
    "a giant data.pkl": (lambda: zipped(bytes((64 << 20) + 1)), "data.pkl' has 67108865 bytes,"),
    "a flipped data.pkl": (lambda: TOY.replace(b"tQ", b"tR"), "checksum of b'a/data.pkl' is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("case", ZIPS)
def test_zips_that_torch_never_writes_are_rejected(case):
    refused(ZIPS[case][0](), ZIPS[case][1])


def test_damaged_storages_are_rejected():
    def value(data):
        file = Bytes(data)
        return torch_file.read(file, torch_file.open_file(file)["w"])

    start = TOY.index(np.arange(6, dtype=np.float32).tobytes())
    flipped = TOY[: start + 7] + b"\x55" + TOY[start + 8 :]
    with pytest.raises(
        torch_unpickler.PthError, match="damaged: the checksum of b'a/data/0' is wrong"
    ):
        value(flipped)
    unchecked = flipped.replace(
        struct.pack("<L", torch_file.zlib.crc32(TOY[start : start + 24])), bytes(4)
    )
    assert value(unchecked).shape == (2, 3)  # as with torch.serialization.set_crc32_options(False)
    local = TOY.index(b"a/data/0")
    for other in (TOY[:local] + b"a/data/1" + TOY[local + 8 :], TOY.replace(b"PK\3\4", b"PK\3\5")):
        with pytest.raises(
            torch_unpickler.PthError, match="is not at the offset stated in the zip directory"
        ):
            value(other)
    with pytest.raises(torch_unpickler.PthError, match="overlaps the next entry, or is compressed"):
        value(TOY[: local - 2] + b"\xff" + TOY[local - 1 :])  # its extra field


SMALL = {
    "torch": (PARITY / "torch_nest.ckpt").read_bytes(),
    "ours": written({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2, np.int8)}),
    "zipfile": TOY,
}


@pytest.mark.parametrize("which", SMALL)
def test_any_byte_may_be_corrupt(which):
    good = SMALL[which]

    @FUZZ
    @given(
        flips=st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4),
        stop=st.one_of(st.just(len(good)), st.integers(0, len(good))),
    )
    def check(flips, stop):
        data = bytearray(good)
        for at, value in flips:
            data[at] = value
        survives(bytes(data[:stop]))

    check()
    for at in range(len(good) - 60, len(good)):  # the end of the directory, byte by byte
        for value in (0, 1, 0x7F, 0xFF):
            survives(good[:at] + bytes([value]) + good[at + 1 :])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_views_are_read_as_in_numpy(data):
    """Any shape, stride and offset within a storage."""
    base = np.arange(60, dtype=np.int16)
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    stride = tuple(data.draw(st.integers(0, 9)) for _ in shape)
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    start = data.draw(st.integers(0, 59 - last)) if last < 60 else 0
    view = tensor(storage("torch\nShortStorage", numel=60), start, shape, stride)
    file = Bytes(zipped(state(view), [base.tobytes()]))
    if last >= 60 or math.prod(shape) > 60:
        refused(file.data, "do not fit the 60 elements")
        return
    expected = np.lib.stride_tricks.as_strided(base[start:], shape, [2 * s for s in stride])
    np.testing.assert_array_equal(torch_file.read(file, torch_file.open_file(file)["w"]), expected)


def test_unpickler_supports_every_storage_type():
    assert set(torch_file._TORCH) == set(torch_file._NUMPY) == set(torch_unpickler.DTYPES.values())
