"""Reads named arrays in blocks onto any mesh; arrays.py has the layout, and writes them.

A process reads the blocks that its devices hold and no others; a flipped bit is an error.
"""

import collections
import math
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree, Shaped

from medmax_jax import storage, weights
from medmax_jax.storage import Folder, StorageError

IN_FLIGHT = 2**30  # bytes that are being read or written at a time
CACHE = 2**28  # bytes of blocks that several devices of a process share


def names(folder: Folder) -> list[str]:
    """The arrays of a folder."""
    return sorted(n.removesuffix("/zarr.json") for n in folder.names() if n.endswith("/zarr.json"))


def open_array(folder: Folder, name: str, *, cache: int = 0) -> ts.TensorStore:
    """An array of a folder, nothing of it read yet. `cache`: bytes of blocks to keep."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    asked = spec(folder, name) | {"recheck_cached_data": False}
    found = ts.open(asked, open=True, context=context)
    return storage.wait(found, f"{folder.path}/{name}")


def read(folder: Folder, store: ts.TensorStore) -> Shaped[np.ndarray, "..."]:
    """The numbers of an array or of a part of it (`store[index]`); StorageError when damaged."""
    size = store.dtype.numpy_dtype.itemsize * math.prod(store.shape)
    return storage.wait(store.read(), store.kvstore.path, size)


def load(folder: Folder, like: PyTree) -> PyTree:
    """The tree of `like` (ShapeDtypeStructs with shardings), in its dtypes, on its devices.

    A process reads what its own devices hold. Raises weights.WeightsError where names or shapes
    differ, StorageError where a block is damaged.
    """
    wanted = weights.named(like)
    weights.check_names(folder.path, set(names(folder)), set(wanted))
    pending: collections.deque[tuple[Any, ...]] = collections.deque()
    loaded, flying = [], 0
    for name, leaf in wanted.items():
        store = open_array(folder, name, cache=CACHE)
        if tuple(store.shape) != tuple(leaf.shape):
            raise weights.misfit(folder.path, name, tuple(store.shape), leaf)
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places: dict[Any, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            places.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
        parts = {k: store[tuple(slice(*s) for s in k)].read() for k in places}
        size = store.dtype.numpy_dtype.itemsize * math.prod(leaf.shape)
        pending.append((name, leaf, sharding, places, parts, size))
        flying += size
        while flying > IN_FLIGHT and pending:
            flying -= pending[0][-1]
            loaded.append(_placed(folder, *pending.popleft()[:-1]))
    loaded += [_placed(folder, *each[:-1]) for each in pending]
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def _placed(folder: Folder, name: str, leaf, sharding, places, parts) -> jax.Array:
    on_devices = []
    for key, future in parts.items():
        part = storage.wait(future, f"{folder.path}/{name}", IN_FLIGHT).astype(
            leaf.dtype, copy=False
        )
        on_devices += [jax.device_put(part, device) for device in places[key]]
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, on_devices)


def spec(folder: Folder, name: str) -> dict[str, Any]:
    """What TensorStore must know of an array, to read or to write it."""
    if "/" in name or name.startswith("."):
        raise StorageError(f"{folder.path}: {name!r} is no name of an array")
    return {
        "driver": "zarr3",
        "kvstore": folder.kvstore(name),
        # a file that is gone is an error and no zeros, so zeros must be stored as well
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
