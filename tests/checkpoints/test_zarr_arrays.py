"""Arrays in blocks: sizes of files and blocks, any mesh, any dtype, damage, two processes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from medmax_jax.checkpoints import zarr_arrays
from medmax_jax.checkpoints.safetensors_file import WeightsError
from medmax_jax.config import Mesh
from medmax_jax.sharding import make_mesh
from medmax_jax.storage.folder import Folder

MESHES = ((1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
SPECS = {"kernel": P(None, "fsdp", "tp"), "embed": P("tp", "fsdp"), "scale": P()}


def named(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("data", "fsdp", "tp"), sizes, strict=True))


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> Folder:
    out = Folder(folder)
    writer = zarr_arrays.Writer(out)
    for name, array in arrays.items():
        sharded = tuple(axis is not None for axis in SPECS[name]) or (False,) * array.ndim
        store = writer.create(name, array.shape, array.dtype, sharded)
        if array.ndim == 3:
            for i, layer in enumerate(array):
                writer.write(store, i, layer)
        else:
            writer.write(store, ..., array)
    writer.finish()
    return out


def random_arrays(dtype, *, large: bool) -> dict[str, np.ndarray]:
    rng, side = np.random.default_rng(0), 1_024 if large else 16
    shapes = {"kernel": (3, side, 2 * side), "embed": (4 * side, side), "scale": (side,)}
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("large", [False, True])
def test_arrays_load_bit_for_bit_on_every_mesh(tmp_path, dtype, large):
    expected = random_arrays(dtype, large=large)
    folder = write(tmp_path / "a", expected)
    for sizes in MESHES:
        mesh = make_mesh(Mesh(**named(sizes)))
        with jax.set_mesh(mesh):
            like = {
                n: jax.ShapeDtypeStruct(
                    a.shape, a.dtype, sharding=jax.NamedSharding(mesh, SPECS[n])
                )
                for n, a in expected.items()
            }
            loaded = zarr_arrays.load(folder, like)
        for name, array in expected.items():
            assert loaded[name].sharding == like[name].sharding
            assert np.asarray(loaded[name]).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_stack_beyond_the_limit_is_read_by_layers(tmp_path, dtype, monkeypatch):
    """Read as one array, a stack of 30B would need 17 GB of the host, twice on a CPU."""
    stack = np.random.default_rng(0).standard_normal((5, 16, 24)).astype(np.float32)
    folder, waited = write(tmp_path, {"kernel": stack, "embed": stack[0]}), []
    wait = zarr_arrays.gcs.wait
    like = {
        "kernel": jax.ShapeDtypeStruct(stack.shape, dtype),
        "embed": jax.ShapeDtypeStruct(stack[0].shape, dtype),
    }

    def record(future, *words):
        waited.append(getattr(wait(future, *words), "nbytes", 0))
        return future.result()

    monkeypatch.setattr(zarr_arrays, "IN_FLIGHT", 3 * stack[0].nbytes)
    monkeypatch.setattr(zarr_arrays.gcs, "wait", record)
    loaded = zarr_arrays.load(folder, like)
    np.testing.assert_array_equal(loaded["kernel"], stack.astype(dtype))
    np.testing.assert_array_equal(loaded["embed"], stack[0].astype(dtype))
    assert max(waited) == stack[0].nbytes


def test_like_determines_the_dtype(tmp_path):
    expected = random_arrays(np.float32, large=False)
    folder = write(tmp_path / "a", expected)
    like = {n: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for n, a in expected.items()}
    for name, array in zarr_arrays.load(folder, like).items():
        np.testing.assert_array_equal(np.asarray(array), expected[name].astype(ml_dtypes.bfloat16))


def test_names_and_shapes_must_match_the_model(tmp_path):
    folder = write(tmp_path / "a", random_arrays(np.float32, large=False))
    good = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype)
        for n, a in random_arrays(np.float32, large=False).items()
    }
    with pytest.raises(WeightsError, match="1 arrays are missing in the file .'other'"):
        zarr_arrays.load(folder, good | {"other": good["scale"]})
    with pytest.raises(WeightsError, match="1 are unexpected .'scale'"):
        zarr_arrays.load(folder, {n: leaf for n, leaf in good.items() if n != "scale"})
    with pytest.raises(WeightsError, match=r"scale has shape \(16,\), but the model has \(8,\)"):
        zarr_arrays.load(folder, good | {"scale": jax.ShapeDtypeStruct((8,), np.float32)})


def test_zeros_are_stored(tmp_path):
    """Otherwise a deleted file would be read as zeros."""
    folder = write(tmp_path / "a", {"scale": np.zeros(16, np.float32)})
    store = zarr_arrays.open_array(folder, "scale")
    np.testing.assert_array_equal(zarr_arrays.read(folder, store), np.zeros(16))


def test_files_and_blocks_of_7b():
    for shape, sharded, file, block in (
        ((32, 4_096, 11_008), (False, True, True), [1, 2_048, 11_008], [1, 512, 688]),
        ((32, 4_096, 4_096), (False, True, True), [1, 4_096, 4_096], [1, 512, 1_024]),
        ((65_536, 4_096), (True, True), [8_192, 4_096], [4_096, 256]),
        ((4_096,), (False,), [4_096], [4_096]),
    ):
        assert zarr_arrays.chunk_layout(shape, 2, sharded) == (file, block)


@given(
    shape=st.lists(st.integers(1, 40).map(lambda n: n * 64), min_size=2, max_size=2),
    layers=st.integers(1, 40),
    itemsize=st.sampled_from([1, 2, 4]),
    sharded=st.tuples(st.booleans(), st.booleans()),
)
def test_blocks_fill_files_and_files_fill_arrays(shape, layers, itemsize, sharded):
    full_shape = (layers, *shape)
    file, block = zarr_arrays.chunk_layout(full_shape, itemsize, (False, *sharded))
    for size, of_file, of_block in zip(full_shape, file, block, strict=True):
        assert size % of_file == 0 and of_file % of_block == 0
    small = np.prod(full_shape) * itemsize <= zarr_arrays.WHOLE_BYTES
    assert small or file[0] == 1
    if all(sharded):
        assert np.prod(file) * itemsize <= zarr_arrays.FILE_BYTES


CHILD = """
import json, sys, jax
from jax.sharding import PartitionSpec as P
from medmax_jax.checkpoints import zarr_arrays
from medmax_jax.config import Mesh
from medmax_jax.storage.folder import Folder
from medmax_jax.sharding import make_mesh



folder, address, process, sizes, shapes = json.loads(sys.argv[1])
jax.distributed.initialize(address, num_processes=2, process_id=process)
specs = dict(kernel=P(None, "fsdp", "tp"), embed=P("tp", "fsdp"), scale=P())
read = lambda: int(open("/proc/self/io").read().split()[1])  # rchar: bytes that the process read
with jax.set_mesh(make_mesh(Mesh(**dict(zip(("data", "fsdp", "tp"), sizes))))):
    mesh = jax.sharding.get_mesh()
    like = {
        n: jax.ShapeDtypeStruct(s, "bfloat16", sharding=jax.NamedSharding(mesh, specs[n]))
        for n, s in shapes.items()
    }
    before = read()
    loaded = jax.block_until_ready(zarr_arrays.load(Folder(folder), like))
    after = read()
    total = jax.jit(lambda t: [x.astype("float32").sum() for x in jax.tree.leaves(t)])(loaded)
print(json.dumps([after - before, [float(x) for x in total]]), flush=True)
"""


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (1, 4, 2)])
def test_two_processes_together_read_each_block_once(tmp_path, sizes):
    expected = random_arrays(ml_dtypes.bfloat16, large=True)
    write(tmp_path / "a", expected)
    size = sum(a.nbytes for a in expected.values())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shapes = {n: a.shape for n, a in expected.items()}
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment["JAX_PLATFORMS"] = "cpu"
    runs = [
        subprocess.Popen(
            [
                sys.executable, "-c", CHILD,
                json.dumps([str(tmp_path / "a"), address, i, sizes, shapes]),
            ],
            stdout=subprocess.PIPE, text=True, env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    assert sum(read for read, _ in outputs) <= 1.1 * size
    sums = [float(expected[n].astype(np.float64).sum()) for n in sorted(expected)]
    np.testing.assert_allclose(outputs[0][1], sums, rtol=1e-3, atol=1)


def test_arrays_of_more_elements_than_int32_holds(tmp_path):
    """30B has stacks of 8.7e9 numbers; here only the last layer of one is written and read."""
    layer = np.random.default_rng(0).integers(-100, 100, (8_192, 8_192)).astype(np.int8)
    writer = zarr_arrays.Writer(Folder(tmp_path))
    store = writer.create("stack", (33, *layer.shape), layer.dtype, (False, True, True))
    assert np.prod(store.shape, dtype=np.int64) > 2**31
    writer.write(store, 32, layer)
    writer.finish()
    opened = zarr_arrays.open_array(Folder(tmp_path), "stack")
    np.testing.assert_array_equal(
        zarr_arrays.read(Folder(tmp_path), opened[32, 8_189:]), layer[8_189:]
    )
