"""data.pkl as an attacker would write it: nothing is executed, and errors name the cause."""

import copyreg
import pathlib
import pickle
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pth_setup import (
    FUZZ,
    ODICT,
    number,
    numbers,
    refused,
    state,
    storage,
    survives,
    tensor,
    text,
    zipped,
)

from medmax_jax.checkpoints import torch_unpickler


class Harm:
    """Pickles into a call."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def called(name, *args):
    module, _, name = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{name}\n(".encode() + b"".join(args) + b"tR."


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "as a value", "next to the state dict"])
def test_nothing_in_a_file_is_executed(tmp_path, protocol, place):
    marker = tmp_path / "ran"
    for call, name in [(eval, "eval"), (getattr, "getattr"), (exec, "exec")]:
        harm = Harm(call, f"open({str(marker)!r}, 'w')", *(["x"] if call is getattr else []))
        harm = {"alone": harm, "as a value": {"w": harm}}.get(place, {"state_dict": {}, "x": harm})
        message = refused(zipped(pickle.dumps(harm, protocol)), "data.pkl")
        if protocol != 0 or place == "alone":  # 0 has opcodes of its own for dicts and text
            assert f"refers to {'__builtin__' if protocol < 3 else 'builtins'}.{name}," in message
            assert "was not executed" in message
    assert not marker.exists()


HOSTILE = {
    "os.system": (called("posix.system", text("touch ran")), "refers to posix.system, which no"),
    "a chain": (
        called("builtins.getattr", called("builtins.__import__", text("os"))[2:-1], text("x")),
        "refers to builtins.getattr,",
    ),
    "numpy": (called("numpy.core.multiarray.scalar"), "refers to numpy.core.multiarray.scalar,"),
    "a class of ours": (
        called("medmax_jax.checkpoints.torch_file.ByteFile"),
        "refers to medmax_jax.checkpoints.torch_file.ByteFile,",
    ),
    "torch.load": (called("torch.load", text("x")), "refers to torch.load,"),
    "dotted": (called("torch._utils._rebuild_tensor_v2.x"), "_rebuild_tensor_v2.x, which"),
    "attribute of a name": (b"\x80\x04ctorch\nSize.__init__\n.", "refers to torch.Size.__init__,"),
    "a long name": (called("x" * 9_000 + ".y"), "refers to x{100}, which"),
    "a name in control characters": (called("os.\x1b[31m"), r"refers to 'os.\\x1b\[31m', which"),
    "a name that is none": (b"]K\1\x93.", "names a global with a list and a int"),
    "untyped storage": (state(tensor(storage("torch.storage\nUntypedStorage"))), "UntypedStorage,"),
    "lightning callback": (
        called("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
        "refers to pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint, .* save only",
    ),
    "INST": (b"(" + text("touch ran") + b"iposix\nsystem\n.", "uses INST, which torch never"),
    "OBJ": (b"(ctorch\nSize\no.", "uses OBJ,"),
    "NEWOBJ": (b"ctorch\nSize\n)\x81.", "uses NEWOBJ,"),
    "EXT1": (b"\x82\x01.", "uses EXT1,"),
    "EXT4": (b"\x84\x01\0\0\0.", "uses EXT4,"),
    "PERSID": (b"Pstorage\n.", "uses PERSID,"),
    "an opcode that is none": (b"\xff.", r"uses b'\\xff',"),
    "calls a tensor": (state(tensor() + b")R"), "calls Tensor with"),
    "calls a string": (text("posix.system") + b")R.", "calls str with"),
    "calls a storage class": (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage with"),
    "items for OrderedDict": (b"ccollections\nOrderedDict\n]\x85R.", "calls collections.Ord"),
    "arguments in a list": (b"ctorch\nSize\n]R.", "calls torch.Size with"),
    "text in a size": (b"ctorch\nSize\n" + text("x") + b"\x85\x85R.", "calls torch.Size with"),
    "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n(N\x88}tR.", "_rebuild_param"),
    "a hook": (state(tensor(rest=b"\x89}" + text("h") + b"K\1s")), "_rebuild_tensor_v2 with"),
    "a lazy view": (state(tensor(rest=b"\x89" + ODICT + b"}" + text("neg") + b"\x88s")), "_v2 w"),
    "a negative stride": (state(tensor(stride=(-3, 1))), "_rebuild_tensor_v2 with"),
    "a negative offset": (state(tensor(start=-1)), "_rebuild_tensor_v2 with"),
    "a negative shape": (state(tensor(shape=(-2, -3))), "_rebuild_tensor_v2 with"),
    "a boolean shape": (state(tensor(of=storage() + b"K\0\x88\x85")), "_rebuild_tensor_v2 with"),
    "BUILD of a tensor": (state(tensor() + b"}" + text("shape") + b"Nsb"), "attributes of a Ten"),
    "BUILD of a function": (b"ctorch\nSize\n}" + text("name") + b"Nsb.", "attributes of a torch.S"),
    "BUILD of a class": (b"ctorch\nFloatStorage\nN}\x86b.", "sets attributes of a torch.FloatSto"),
    "an id of text": (text("storage") + b"Q.", "has a persistent id that is not a storage"),
    "a short id": (b"(" + text("storage") + b"tQ.", "has a persistent id that"),
    "an id in a list": (b"](" + storage()[1:-2] + b"eQ.", "has a persistent id that"),
    "an id of a size": (storage("torch\nSize") + b".", "has a persistent id that"),
    "a negative storage": (storage(numel=-6) + b".", "has a persistent id that"),
    "a tuple as key": (b"})Ns.", "has a tuple as the key of a dict"),
    "a tensor as key": (b"}" + tensor() + b"Ns.", "has a Tensor as the key of a dict"),
    "items of a list": (b"]K\1Ns.", "sets items of a list"),
    "append to a dict": (b"}Na.", "appends to a dict"),
    "append to a size": (b"ctorch\nSize\nNa.", "appends to a torch.Size"),
    "an empty program": (b"", "data.pkl is damaged at byte 1"),
    "no stop": (b"\x80\x02}", "data.pkl is damaged"),
    "two results": (b"}}.", "data.pkl is damaged"),
    "no mark": (b"}u.", "data.pkl is damaged"),
    "an odd dict": (b"}(" + text("w") + b"u.", "data.pkl is damaged"),
    "no such memo": (b"h\0.", "data.pkl is damaged"),
    "text past the end": (b"X\xff\xff\xff\xffabc.", "data.pkl is damaged"),
    "text that is none": (b"X\1\0\0\0\xff.", "data.pkl is damaged"),
    "a list": (b"].", "contains a list, not a dict"),
    "itself": (b"}q\0" + text("state_dict") + b"h\0s.", "entry 'state_dict' is a dict"),
    "a number": (state(b"K\1"), "entry 'w' is a int; expected tensors under string keys"),
    "a number as name": (b"}K\5" + tensor() + b"s.", "entry '5' is a Tensor; expected tensors"),
    "no such storage": (state(tensor(storage(key="../7"))), r"'w': storage '../7' is missing"),
    "a long storage": (state(tensor(storage(numel=7))), "storage '0' has 24 bytes, not 7 elements"),
    "a wide storage": (state(tensor(storage("torch\nDoubleStorage"))), "not 6 elements of F64"),
    "a giant storage": (state(tensor(storage(numel=2**140))), "'w': storage '0' has 24 bytes, not"),
    "a giant shape": (state(tensor(shape=(2**70, 2**70))), r"'w': shape \(1180591620717411303424,"),
    "an expanded view": (state(tensor(shape=(7,), stride=(0,))), r"shape \(7,\), stride \(0,\)"),
    "past the storage": (state(tensor(start=1)), "storage_offset 1 do not fit the 6 elements"),
    "strides past it": (state(tensor(stride=(4, 1))), r"stride \(4, 1\), storage_offset 0 do not"),
    "two shapes": (state(tensor(stride=(3,))), r"shape \(2, 3\), stride \(3,\)"),
    "many axes": (state(tensor(shape=(1,) * 99, stride=(1,) * 99)), "do not fit"),
    "a giant empty": (state(tensor(shape=(0, 2**70))), r"shape \(0, 1180591620717411303424\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_rejected(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(zipped(HOSTILE[case][0]), HOSTILE[case][1])
    assert not list(tmp_path.iterdir())


def test_a_registered_extension_is_not_called():
    copyreg.add_extension("builtins", "print", 77_000)
    try:
        refused(zipped(pickle.dumps(print, 2)), "uses EXT4, which torch never writes")
    finally:
        copyreg.remove_extension("builtins", "print", 77_000)


def doubled(container, layer, close=b""):
    """A container of two of a container of two of ... : 2^64 leaves."""
    return b"\x80\x02}(" + text("w") + container + layer * 64 + close + b"u."


N = 4_000
BOMBS = {
    "2^64 in lists": (doubled(b"(]", b"q\0]h\0ah\0a", b"t"), "entry 'w' is a tuple"),
    "2^64 in tuples": (doubled(b")", b"q\0h\0\x86"), "entry 'w' is a tuple; expected tensors"),
    "a key of 2^64": (b"})" + b"q\0h\0\x86" * 64 + b"Ns.", "has a tuple as the key of a dict"),
    "deep lists": (b"}" + text("w") + b"]" * N + b"a" * (N - 1) + b"s.", "entry 'w' is a list"),
    "deep tuples": (b"}" + text("w") + b")" + b"\x85" * N + b"s.", "entry 'w' is a tuple"),
    "a deep key": (b"})" + b"\x85" * N + b"Ns.", "has a tuple as the key of a dict"),
    "a far memo": (b"}r\xff\xff\xff\xff0.", "uses POP, which torch never writes"),
    "long text": (b"X\xff\xff\xff\xff", "data.pkl is damaged at byte 4294967300"),
    "many steps": (b"N" * 9_999 + b".", "has more than 9999 opcodes"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickle_bombs_are_rejected(case, monkeypatch):
    monkeypatch.setattr(torch_unpickler, "_MAX_STEPS", 9_999)
    data = zipped(BOMBS[case][0])
    tracemalloc.start(1)
    try:
        refused(data, BOMBS[case][1])
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@FUZZ
@given(
    flips=st.lists(
        st.tuples(
            st.integers(0, len(state()) - 1),
            st.sampled_from(b"(tQRbuseahqNKJ\x88}])c\x85\x86X.\0\xff"),
        ),
        min_size=1, max_size=4,
    ),
    gap=st.integers(0, len(state())),
)  # fmt: skip
def test_any_opcode_may_be_corrupt(flips, gap):
    """With checksums that fit, so that the machine sees them."""
    data = bytearray(state())
    for at, value in flips:
        data[at] = value
    survives(zipped(bytes(data)))
    survives(zipped(bytes(data[:gap] + data[gap + 1 :])))


WORDS = [b"(", b"t", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"b", b"Q", b"R", b"N", b"\x88"]
WORDS += [
    b"K\0",
    b"K\1",
    b"K\6",
    b"q\0",
    b"h\0",
    b"q\1",
    b"h\1",
    b"\x94",
    b"\x93",
    b"\x85",
    b"\x86",
]
WORDS += [text("w"), text("state_dict"), text("0"), storage(), tensor(), ODICT, number(2**100)]
WORDS += [b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n"]
WORDS += [b"ctorch._utils\n_rebuild_parameter\n", numbers(6), numbers(2**40, 2**40), numbers(0, 3)]


@FUZZ
@given(st.lists(st.sampled_from(WORDS), max_size=24).map(b"".join))
def test_any_pickle_program_terminates(program):
    survives(zipped(program + b"."))
    survives(zipped(state(program)))


ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "Fortran order": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "bool": np.array([True, False]),
    "scalar": np.array(3, "i8"),
    "empty": np.zeros((0, 4), "f2"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_equal_what_numpy_unpickles(case, protocol):
    array = ARRAYS[case]
    tree = {"a": {"kernel": array}, "again": [array, (array, 1.5, None)]}
    if protocol == 2:  # bytes are text then, decoded by a call
        with pytest.raises(
            torch_unpickler.PthError, match="refers to _codecs.encode, which no NumPy"
        ):
            torch_unpickler.load_arrays("f", pickle.dumps(tree, protocol))
        return
    loaded = torch_unpickler.load_arrays("f", pickle.dumps(tree, protocol))
    for read in (loaded["a"]["kernel"], loaded["again"][0], loaded["again"][1][0]):
        np.testing.assert_array_equal(read, array, strict=True)
    assert loaded["again"][1][1:] == (1.5, None)


HOSTILE_ARRAYS = {
    "a call": (pickle.dumps({"w": Harm(eval, "1")}, 4), "refers to builtins.eval, which no NumPy"),
    "objects": (pickle.dumps(np.array([print, 1], object), 4), "numpy.dtype with arguments"),
    "big endian": (pickle.dumps(np.zeros(2, ">f4"), 4), "sets the state of a _Dtype"),
    "records": (pickle.dumps(np.zeros(2, "f4,i4"), 4), "numpy.dtype with arguments"),
    "torch": (called("torch.Size"), "refers to torch.Size, which no NumPy"),
    "a subclass": (
        pickle.dumps(np.zeros(2, "f4"), 3).replace(b"cnumpy\nndarray", b"cnumpy\nmatrix"),
        "refers to numpy.matrix,",
    ),
    "a longer shape": (
        pickle.dumps(np.zeros(2, "f4"), 3).replace(b"K\x02\x85", b"K\x09\x85"), "is damaged",
    ),
    "no state": (
        pickle.dumps(np.zeros(2, "f4"), 3).split(b"K\x01K\x02")[0][:-1] + b".", "without values",
    ),
    "cut": (pickle.dumps(np.zeros(2, "f4"), 4)[:-9], "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_only_plain_arrays_are_read(case):
    program, message = HOSTILE_ARRAYS[case]
    with pytest.raises(torch_unpickler.PthError, match=message):
        torch_unpickler.load_arrays("f", program)


def test_no_other_unpickler_in_the_tree():
    root = pathlib.Path(__file__).parents[2]
    uses = [
        str(path.relative_to(root))
        for folder in ("medmax_jax", "data", "eval", "configs")
        for path in sorted((root / folder).rglob("*.py"))
        if re.search(
            r"^\s*(import|from) (pickle|dill|cloudpickle|shelve|marshal)\b", path.read_text(), re.M
        )
    ]
    assert uses == []
