"""Read data.pkl of a torch file, and pickled NumPy arrays, without pickle and without calls.

A pickle is a program for a small stack machine, and pickle's own machine imports and calls whatever
the program names. The machine of this module supports dicts, lists, tuples, numbers, strings, and
the few names below, which it compares as text; it can import, call and set nothing. Every other
program raises PthError.

    torch._utils._rebuild_tensor_v2(storage, 0, (2, 3), (3, 1), False, OrderedDict())  ->  Tensor
    torch._utils._rebuild_parameter(tensor, True, OrderedDict())                       ->  Tensor
    ("storage", torch.BFloat16Storage, "0", "cpu", 6), a persistent id                 ->  Storage
    collections.OrderedDict()                                                          ->  dict

`load_arrays` supports the names of a pickled `numpy.ndarray` instead of torch's.
"""

import dataclasses
import pickletools
import struct
from typing import Any

import numpy as np

from medmax_jax.io.errors import FileError

DTYPES = {  # of torch's storage classes, by safetensors' names
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_VALUES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool Size"
_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *DTYPES,
    *(f"torch.{name}" for name in _VALUES.split()),  # in the settings next to a state dict
}
_MAX_STEPS = 1 << 20  # opcodes; a tensor takes about 35, so this allows 30,000 tensors
_FIX = (
    "If you trust the file, load it in torch and save only the weights: "
    'torch.save({"state_dict": model.state_dict()}, path)'
)


class PthError(FileError):
    """A .pth file that cannot be used; the message names the file, the key or global, the fix."""


@dataclasses.dataclass(frozen=True)
class Storage:
    dtype: str  # of DTYPES
    key: str  # its file is data/<key>
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the pickle describes it, not yet checked against the storage.

    Its numbers are only known to be >= 0.
    """

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str  # of the names that the unpickler supports


@dataclasses.dataclass(frozen=True)
class _Dtype:
    name: str  # of _ARRAY_DTYPES, little endian


class _EmptyArray:
    """An array between its construction and the state that gives it a shape and values."""


def load(path: str, data: bytes) -> Any:
    """Return the object that the pickle describes; `path` appears in errors.

    Containers may contain themselves.
    """
    return _RestrictedUnpickler(path, data).run()


def load_prefix(path: str, data: bytes) -> tuple[Any, int]:
    """Return the object of the pickle at the start of `data`, and its size; more may follow."""
    machine = _RestrictedUnpickler(path, data)
    return machine.run(), machine.at


def load_arrays(path: str, data: bytes) -> Any:
    """Return pickled dicts, lists and tuples of NumPy arrays and plain values.

    Raises PthError for a pickle of anything else, which is not executed.
    """
    return _ArrayUnpickler(path, data).run()


def type_name(value: Any) -> str:
    """Return the type of a value, for a message."""
    return value.name if type(value) is _Global else type(value).__name__


class _RestrictedUnpickler:
    """The stack, the marks on it, and the memo; opcodes are those of pickle protocols 2 to 5."""

    PROGRAM = "data.pkl"  # how errors call the pickle
    WRITER = "torch"
    NAMES = frozenset(_GLOBALS)
    PURPOSE = "no state dict requires"
    FIX = _FIX

    def __init__(self, path: str, data: bytes):
        self.path, self.data, self.at = path, data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for _ in range(_MAX_STEPS):
                opcode = self._take(1)
                if opcode == b".":
                    (value,) = self.stack
                    return value
                self._step(opcode)
        except PthError:
            raise
        except (IndexError, KeyError, ValueError, struct.error) as e:
            raise PthError(
                f"{self.path}: {self.PROGRAM} is damaged at byte {self.at} ({type(e).__name__}); "
                "copy or download the file again"
            ) from e
        raise self._error(f"has more than {_MAX_STEPS} opcodes")

    def _step(self, opcode: bytes) -> None:
        """Run one opcode that changes the state; `_value` has those that only push."""
        stack = self.stack
        match opcode:
            case b"\x80" | b"\x95":  # PROTO, FRAME
                self._take(1 if opcode == b"\x80" else 8)
            case b"(":
                self.marks.append(len(stack))
            case b"q" | b"r" | b"\x94":  # BINPUT, LONG_BINPUT, MEMOIZE
                n = len(self.memo) if opcode == b"\x94" else self._uint(1 if opcode == b"q" else 4)
                self.memo[n] = stack[-1]
            case b"b":  # BUILD
                self._build(stack.pop())
            case b"a" | b"e":  # APPEND, APPENDS
                items = self._popped() if opcode == b"e" else [stack.pop()]
                if type(stack[-1]) is not list:
                    raise self._error(f"appends to a {type_name(stack[-1])}")
                stack[-1].extend(items)
            case b"s" | b"u":  # SETITEM, SETITEMS
                items = self._popped() if opcode == b"u" else [stack.pop(-2), stack.pop()]
                self._set(stack[-1], items[::2], items[1::2])
            case _:
                stack.append(self._value(opcode))

    def _value(self, opcode: bytes) -> Any:
        match opcode:
            case b"c" | b"\x93":  # GLOBAL, STACK_GLOBAL
                names = [self._line(), self._line()] if opcode == b"c" else self._last(2)
                return self._global(*names)
            case b"Q":
                return self._storage(self.stack.pop())
            case b"R":
                return self._call(*self._last(2))
            case b"h" | b"j":  # BINGET, LONG_BINGET
                return self.memo[self._uint(1 if opcode == b"h" else 4)]
            case b"N" | b"\x88" | b"\x89":  # NONE, NEWTRUE, NEWFALSE
                return {b"N": None, b"\x88": True, b"\x89": False}[opcode]
            case b"K" | b"M":  # BININT1, BININT2
                return self._uint(1 if opcode == b"K" else 2)
            case b"J" | b"\x8a":  # BININT, LONG1
                n = 4 if opcode == b"J" else self._uint(1)
                return int.from_bytes(self._take(n), "little", signed=True)
            case b"G":
                return struct.unpack(">d", self._take(8))[0]
            case b"X" | b"\x8c":  # BINUNICODE, SHORT_BINUNICODE
                return self._take(self._uint(4 if opcode == b"X" else 1)).decode()
            case b"}" | b"]" | b")":
                return {b"}": dict, b"]": list, b")": tuple}[opcode]()
            case b"t":
                return tuple(self._popped())
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                return tuple(self._last(opcode[0] - 0x84))
        opcode_info = pickletools.code2op.get(opcode.decode("latin-1"))
        raise self._error(
            f"uses {opcode_info.name if opcode_info else opcode}, which {self.WRITER} never writes"
        )

    def _global(self, module: Any, name: Any) -> _Global:
        if not type(module) is type(name) is str:
            raise self._error(f"names a global with a {type_name(module)} and a {type_name(name)}")
        qualified_name = f"{module}.{name}"
        if qualified_name not in self.NAMES:
            qualified_name = (
                qualified_name if qualified_name.isprintable() else repr(qualified_name)
            )
            raise self._error(f"refers to {qualified_name[:100]}, which {self.PURPOSE}")
        return _Global(qualified_name)

    def _storage(self, pid: Any) -> Storage:
        if type(pid) is tuple and len(pid) == 6 and pid[5] is None:
            pid = pid[:5]  # torch before 1.6 had a sixth part: None, or a view, which is refused
        match pid if type(pid) is tuple else ():
            case ("storage", _Global() as cls, str(key), str(), int(numel)):
                if cls.name in DTYPES and _sizes(numel):
                    return Storage(DTYPES[cls.name], key, numel)
        raise self._error("has a persistent id that is not a storage")

    def _call(self, function: Any, args: Any) -> Any:
        """Return the result of torch's function; a hook or a lazy view (conj, neg) is refused."""
        name = function.name if type(function) is _Global else None
        match (name, *args) if type(args) is tuple else ():
            case ("collections.OrderedDict",):
                return {}
            case ("torch.Size", tuple(shape)) if _sizes(*shape):
                return shape
            case ("torch._utils._rebuild_parameter", Tensor() as tensor, bool(), {**hooks}):
                if not hooks:
                    return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                Storage() as storage,
                start,
                tuple(shape),
                tuple(stride),
                bool(),
                {**hooks},
            ):
                if not hooks and _sizes(start, *shape, *stride):
                    return Tensor(storage, start, shape, stride)
        raise self._error(
            f"calls {type_name(function)} with arguments that a plain tensor does not have"
        )

    def _build(self, state: Any) -> None:
        """Drop the _metadata of a module's state dict; set nothing."""
        if type(self.stack[-1]) is not dict:
            raise self._error(f"sets attributes of a {type_name(self.stack[-1])}")

    def _set(self, target: Any, keys: list[Any], values: list[Any]) -> None:
        if type(target) is not dict:
            raise self._error(f"sets items of a {type_name(target)}")
        for key in keys:  # the hash of a deep tuple recurses without a limit
            if type(key) not in (str, int, float, bool, type(None)):
                raise self._error(f"has a {type_name(key)} as the key of a dict")
        target.update(zip(keys, values, strict=True))

    def _popped(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _last(self, n: int) -> list[Any]:
        return [self.stack.pop() for _ in range(n)][::-1]

    def _take(self, n: int) -> bytes:
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise IndexError("past the end")
        return self.data[start : self.at]

    def _uint(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _line(self) -> str:
        return self._take(self.data.index(b"\n", self.at) + 1 - self.at)[:-1].decode()

    def _error(self, what: str) -> PthError:
        return PthError(
            f"{self.path}: {self.PROGRAM} {what}; the file was not executed. {self.FIX}"
        )


_ARRAY_DTYPES = frozenset("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split())
_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


class _ArrayUnpickler(_RestrictedUnpickler):
    """Builds arrays from their bytes; NumPy's own functions are compared by name, never called."""

    PROGRAM = "the pickle"
    WRITER = "NumPy"
    NAMES = frozenset({"numpy.ndarray", "numpy.dtype", *_RECONSTRUCT})
    PURPOSE = "no NumPy array requires"
    FIX = "If you trust it, save its arrays again with numpy.savez"
    unset = 0  # arrays without a state so far

    def run(self) -> Any:
        value = super().run()
        if self.unset:
            raise self._error(f"has {self.unset} arrays without values")
        return value

    def _value(self, opcode: bytes) -> Any:
        if opcode in (b"C", b"B"):  # SHORT_BINBYTES, BINBYTES
            return self._take(self._uint(1 if opcode == b"C" else 4))
        return super()._value(opcode)

    def _call(self, function: Any, args: Any) -> Any:
        name = function.name if type(function) is _Global else None
        match (name, *args) if type(args) is tuple else ():
            case (_, _Global("numpy.ndarray"), (0,), b"b") if name in _RECONSTRUCT:
                self.unset += 1
                return _EmptyArray()
            case ("numpy.dtype", str(dtype), bool(), bool()) if dtype in _ARRAY_DTYPES:
                return _Dtype(dtype)
        raise self._error(
            f"calls {type_name(function)} with arguments that a plain array does not have"
        )

    def _build(self, state: Any) -> None:
        match (self.stack[-1], *state) if type(state) is tuple else ():
            case (_Dtype(), 3, "<" | "|", None, None, None, -1, -1, 0):
                return
            case (_EmptyArray() as empty, 1, tuple(shape), _Dtype(dtype), bool(fortran), bytes(b)):
                if not _sizes(*shape):
                    raise self._error(f"has an array of shape {shape}")
                array = np.frombuffer(b, f"<{dtype}").reshape(shape, order="FC"[not fortran])
                self.stack[-1], self.unset = array, self.unset - 1
                self.memo = {k: array if v is empty else v for k, v in self.memo.items()}
                return
        raise self._error(f"sets the state of a {type_name(self.stack[-1])}")


def _sizes(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
