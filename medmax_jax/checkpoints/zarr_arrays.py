"""Store named arrays of any size in blocks: zarr3 by TensorStore, on a disk or gs://.

    D/layers.mlp.up_proj.kernel/zarr.json     shape, dtype, layout
                               /c/3/0/0       a file: layer 3, half of its rows, at most 64 MiB
         in the file: blocks of about 1 MiB, cut along the sharded axes, each with its CRC-32C

The arrays can be loaded onto any mesh. A process reads only the blocks that its devices hold; a
flipped bit is an error. Orbax would hold the complete tree twice to save it, and by default writes
one chunk per array, which every process then reads completely. Arrays are written piece by piece: a
model never has to fit in memory.
"""

import collections
import math
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree, Shaped

from medmax_jax.checkpoints import safetensors_file
from medmax_jax.storage import gcs
from medmax_jax.storage.folder import Folder, StorageError

FILE_BYTES = 64 * 2**20  # maximum size of a file
BLOCK_BYTES = 2**20  # approximate size of what is read at once
WAYS = 16  # maximum number of parts of an axis: this many shards are read without waste
WHOLE_BYTES = 4 * 2**20  # an array up to this size is one block


class Writer:
    """Writes arrays to an atomic_folder; at most IN_FLIGHT bytes of them are in memory."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self._pending: collections.deque[tuple[Any, int, str]] = collections.deque()
        self._bytes = 0

    def create(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype, sharded: tuple[bool, ...]
    ) -> ts.TensorStore:
        """Create an empty array; `sharded` states which axes a mesh may cut."""
        file, block = chunk_layout(shape, np.dtype(dtype).itemsize, sharded)
        kvstore = self._folder.kvstore(name)
        if not self._folder.remote:
            kvstore["file_io_sync"] = False  # atomic_folder syncs all files once at its end
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        inner = {"chunk_shape": block, "codecs": codecs, "index_codecs": codecs}
        spec = array_spec(self._folder, name) | {
            "kvstore": kvstore,
            "metadata": {
                "shape": shape,
                "data_type": np.dtype(dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
                "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            },
        }
        store = ts.open(spec, create=True)
        return gcs.wait(store, f"{self._folder.path}/{name}")

    def write(self, store: ts.TensorStore, index: Any, piece: Shaped[np.ndarray, "..."]) -> None:
        """Write store[index]; a piece should fill complete files, or they are written again."""
        while self._pending and self._bytes + piece.nbytes > IN_FLIGHT:
            self._wait_for_oldest()
        self._pending.append((store[index].write(piece), piece.nbytes, store.kvstore.path))
        self._bytes += piece.nbytes

    def finish(self) -> None:
        """Return when everything is on the disk."""
        while self._pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        future, size, where = self._pending.popleft()
        gcs.wait(future, where, size)
        self._bytes -= size


def chunk_layout(
    shape: tuple[int, ...], itemsize: int, sharded: tuple[bool, ...]
) -> tuple[list[int], list[int]]:
    """Return (shape of a file, shape of a block in it).

    [32, 4096, 11008] of 2 bytes, both last axes sharded -> [1, 2048, 11008], [1, 512, 688]
    Three axes are a stack of layers; a file contains one layer, so that layers can be written
    separately.
    """
    file = list(shape)
    if math.prod(shape) * itemsize <= WHOLE_BYTES:
        return file, list(file)
    if len(shape) == 3:
        file[0] = 1
    cuts = [1] * len(shape)
    while math.prod(file) * itemsize // math.prod(cuts) > BLOCK_BYTES:
        divisible = [
            i
            for i, size in enumerate(file)
            if sharded[i] and cuts[i] < WAYS and size % (2 * cuts[i]) == 0
        ]
        if not divisible:
            break
        cuts[min(divisible, key=lambda i: (cuts[i], -file[i]))] *= 2
    block = [size // cut for size, cut in zip(file, cuts, strict=True)]
    for axis in range(len(file)):
        while math.prod(file) * itemsize > FILE_BYTES and file[axis] % (2 * block[axis]) == 0:
            file[axis] //= 2
    return file, block


# ---- Reading arrays onto any mesh ----
#
# A process reads only the blocks that its devices hold; a flipped bit is an error.

IN_FLIGHT = 2**30  # bytes that are being read or written at a time
ALIGNMENT = 64  # bytes; JAX on CPUs copies arrays that start elsewhere
CACHE = 2**28  # bytes of blocks that several devices of a process share


def names(folder: Folder) -> list[str]:
    """Return the names of the arrays of a folder."""
    return sorted(n.removesuffix("/zarr.json") for n in folder.names() if n.endswith("/zarr.json"))


def open_array(folder: Folder, name: str, *, cache: int = 0) -> ts.TensorStore:
    """Open an array of a folder without reading it; `cache`: bytes of blocks to keep."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    spec = array_spec(folder, name) | {"recheck_cached_data": False}
    store = ts.open(spec, open=True, context=context)
    return gcs.wait(store, f"{folder.path}/{name}")


def read(folder: Folder, store: ts.TensorStore) -> Shaped[np.ndarray, "..."]:
    """Read an array or a part of it (`store[index]`); raise StorageError when it is damaged."""
    size = store.dtype.numpy_dtype.itemsize * math.prod(store.shape)
    return gcs.wait(store.read(), store.kvstore.path, size)


def load(folder: Folder, like: PyTree) -> PyTree:
    """Return the tree of `like`, in its dtypes, on its devices.

    `like` has ShapeDtypeStructs with shardings. A process reads what its own devices hold. Raises
    safetensors_file.WeightsError where names or shapes differ, StorageError where a block is
    damaged.
    """
    leaves = safetensors_file.flatten_named(like)
    safetensors_file.check_names(folder.path, set(names(folder)), set(leaves))
    pending: collections.deque[tuple[Any, ...]] = collections.deque()
    loaded, bytes_in_flight = [], 0
    for name, leaf in leaves.items():
        store = open_array(folder, name, cache=CACHE)
        if tuple(store.shape) != tuple(leaf.shape):
            raise safetensors_file.shape_error(folder.path, name, tuple(store.shape), leaf)
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        devices_by_index: dict[Any, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            devices_by_index.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
        parts = {k: _start(store[tuple(slice(*s) for s in k)]) for k in devices_by_index}
        size = store.dtype.numpy_dtype.itemsize * math.prod(leaf.shape)
        pending.append((name, leaf, sharding, devices_by_index, parts, size))
        bytes_in_flight += size
        while bytes_in_flight > IN_FLIGHT and pending:
            bytes_in_flight -= pending[0][-1]
            loaded.append(_placed(folder, *pending.popleft()[:-1]))
    loaded += [_placed(folder, *pending_array[:-1]) for pending_array in pending]
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def _placed(folder: Folder, name: str, leaf, sharding, devices_by_index, parts) -> jax.Array:
    on_devices, where = [], f"{folder.path}/{name}"
    for key, source in parts.items():
        if isinstance(source, ts.TensorStore):
            part = _read_by_layer(source, leaf.dtype, where)
        else:
            part = gcs.wait(source, where, IN_FLIGHT).astype(leaf.dtype, copy=False)
        on_devices += [jax.device_put(part, device) for device in devices_by_index[key]]
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, on_devices)


def _start(store: ts.TensorStore) -> Any:
    """Start to read; a stack of layers that exceeds IN_FLIGHT is returned unread."""
    size = store.dtype.numpy_dtype.itemsize * math.prod(store.shape)
    return store if len(store.shape) == 3 and size > IN_FLIGHT else store.read()


def _read_by_layer(store: ts.TensorStore, dtype: Any, where: str) -> Shaped[np.ndarray, "L I O"]:
    """Read a stack with few layers in flight, into memory that JAX on CPUs uses without a copy.

    A stack has 3 GB at 7B and 17 GB at 30B: read as one array, it would exist twice.
    """
    layers, dtype = store.shape[0], np.dtype(dtype)
    size = dtype.itemsize * math.prod(store.shape)
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    stack = raw[start : start + size].view(dtype).reshape(store.shape)
    ahead = max(1, IN_FLIGHT // 4 // (size // layers))
    reads = collections.deque(store[i].read() for i in range(min(ahead, layers)))
    for i in range(layers):
        if i + ahead < layers:
            reads.append(store[i + ahead].read())
        stack[i] = gcs.wait(reads.popleft(), where, IN_FLIGHT)
    return stack


def array_spec(folder: Folder, name: str) -> dict[str, Any]:
    """Return TensorStore's spec of an array, to read or to write it."""
    if "/" in name or name.startswith("."):
        raise StorageError(
            f"{folder.path}: {name!r} is not a valid array name; it must not contain '/' or "
            "start with '.'"
        )
    return {
        "driver": "zarr3",
        "kvstore": folder.kvstore(name),
        # a missing file is an error and not zeros, so zeros must be stored too
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
