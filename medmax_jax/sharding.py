"""Builds the device mesh and defines every sharding, named after what it shards.

    axis   devices along it hold
    data   copies of the weights, different rows of the batch
    fsdp   slices of the weights (gathered for use), different rows of the batch
    tp     slices of the heads, of the MLP and of the vocabulary, the same rows of the batch

All three axes are Explicit: an array's type carries its sharding, and an operation whose result
could be sharded in two ways passes `out_sharding=`. An axis of size 1 costs nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from medmax_jax.config import Mesh

AXES = ("data", "fsdp", "tp")
ROWS = ("data", "fsdp")  # the axes that split the batch

BATCH = P(ROWS, None)  # [B, T]
ACT = P(ROWS, None, None)  # [B, T, D], and LoRA's [B, T, R]
HID = P(ROWS, None, "tp")  # [B, T, F] inside the MLP, [B, T, N*H] around attention
HEADS = P(ROWS, "tp", None, None)  # [B, N, T, H] and [B, K, T, H]
SPLIT = P(ROWS, None, "tp", None)  # [B, T, N, H], on the way from HID to HEADS
LOGITS = P(ROWS, None, "tp")  # [B, T, V]
CACHE = P(None, ROWS, "tp", None, None)  # [L, B, K, S, H]
EMBED = P("tp", "fsdp")  # [V, D]
UP = P("fsdp", "tp")  # [D, F], a kernel into the heads, the MLP or the vocabulary
DOWN = P("tp", "fsdp")  # [F, D], a kernel back to the residual stream


def make_mesh(config: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Return the mesh over the first data x fsdp x tp devices; raise ValueError for too few.

    `devices`: those of a machine to compile for; None: those of this machine.
    """
    shape = (config.data, config.fsdp, config.tp)
    if min(shape) < 1:
        raise ValueError(f"config.mesh is {config}; every axis must be at least 1")
    need = config.data * config.fsdp * config.tp
    everywhere = devices is None
    devices = jax.devices() if devices is None else devices
    requirement = (
        f"config.mesh requires data x fsdp x tp = {' x '.join(map(str, shape))} = {need} devices"
    )
    if need > len(devices):
        raise ValueError(
            f"{requirement}, but there are {len(devices)} ({devices[0].platform}); reduce an axis"
        )
    if everywhere and jax.process_count() > 1 and need != len(devices):
        # a host without a device in the mesh could not join the collectives of the others
        raise ValueError(
            f"{requirement}, but {jax.process_count()} hosts have {len(devices)}; use all of them"
        )
    return jax.sharding.Mesh(_arrange(shape, devices[:need]), AXES, (AxisType.Explicit,) * 3)


def local_mesh(config: Mesh) -> jax.sharding.Mesh:
    """Return the mesh over devices of this host alone, for work that hosts divide among them."""
    return make_mesh(config, jax.local_devices())


def _arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices so that mesh neighbors are network neighbors; slices are along data."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices == 0 and len(devices) % slices == 0:
        slice_shape = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(
            slice_shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise ValueError(
            f"config.mesh.data is {shape[0]} and the devices are in {slices} slices; set it to a "
            f"multiple of {slices}, since only data may use the slow network between slices"
        )
    return np.array(devices).reshape(shape)  # on GPUs a slice is a node, which fsdp may cross


def with_shardings(like: Any) -> Any:
    """Return the result of jax.eval_shape with the devices of the ambient mesh added.

    jax.eval_shape keeps only the axes, and a restore needs the devices.
    """
    mesh = jax.sharding.get_mesh()

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, like)


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Convert NumPy arrays [rows of this host, ...] to global arrays split over data x fsdp."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(local: np.ndarray) -> jax.Array:
        rows = local.shape[0] * jax.process_count()
        if rows % split:
            raise ValueError(
                f"a batch of {rows} rows cannot be split over data x fsdp = {split} devices; "
                f"use a multiple of {split}"
            )
        sharding = NamedSharding(mesh, P(ROWS, *[None] * (local.ndim - 1)))
        return jax.make_array_from_process_local_data(sharding, local)

    # With several hosts JAX treats this as an implicit transfer, which the train loop forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, batch)


# ---- Programs of large models on CPUs ----
#
# XLA on CPUs computes in fp32 what is stored in bf16, and moves the conversion out of the loop over
# layers: an fp32 copy of all weights at once, 27 GB for the 14 GB of 7B. Without the pass that
# moves it, each layer is converted when it is used. For small models the copy saves time.

LARGE_BYTES = 2 << 30  # of the arguments
KEEP_IN_LOOP = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function, compiled in another way for CPUs where its arguments are large."""

    default: Any  # as jax.jit returns it
    large_on_cpu: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compile the function if necessary, and run it."""
        return self._for(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Return the program for these arguments, which may be shapes."""
        return self._for(args, kwargs).lower(*args, **kwargs)

    def _for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mesh = jax.sharding.get_mesh()
        if mesh.empty or mesh.devices.flat[0].platform != "cpu":
            return self.default
        arrays = (x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "dtype"))
        size = sum(x.size * x.dtype.itemsize for x in arrays)
        return self.large_on_cpu if size > LARGE_BYTES else self.default


def jit(function: Callable, **options: Any) -> Program:
    """Return jax.jit(function, **options), for models of any size on any device.

    It runs under `jax.set_mesh`.
    """
    given = options.pop("compiler_options", None)
    compile_for = lambda settings: jax.jit(function, compiler_options=settings, **options)  # noqa: E731
    return Program(compile_for(given), compile_for((given or {}) | KEEP_IN_LOOP))
