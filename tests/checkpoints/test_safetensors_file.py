"""Weights on disk: names, dtypes, shardings, and mismatched files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from medmax_jax.checkpoints import safetensors_file


class Toy(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([nnx.Linear(4, 8, rngs=nnx.Rngs(i)) for i in range(2)])
        self.scale = nnx.Param(jnp.float32(3.0))
        self.half = nnx.Param(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_module_state_and_dict_read_the_same_file(tmp_path):
    file = tmp_path / "deep" / "toy.safetensors"
    toy = Toy()
    safetensors_file.save(file, toy, {"made": "here"})
    assert safetensors_file.metadata(file) == {"made": "here"}
    assert_same(safetensors_file.load(file, jax.eval_shape(Toy)), toy)
    assert_same(safetensors_file.load(file, nnx.state(toy)), nnx.state(toy))
    assert list(safetensors_file.flatten_named(toy)) == [
        "blocks.0.bias",
        "blocks.0.kernel",
        "blocks.1.bias",
        "blocks.1.kernel",
        "half",
        "scale",
    ]
    assert [f.name for f in file.parent.iterdir()] == ["toy.safetensors"]


def test_like_determines_dtype_and_sharding(tmp_path):
    file = tmp_path / "w.safetensors"
    value = np.arange(32, dtype=np.float32).reshape(8, 4)
    safetensors_file.save(file, {"w": value}, {})
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    sharding = jax.NamedSharding(mesh, P("fsdp", "tp"))
    like = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding)}
    loaded = safetensors_file.load(file, like)["w"]
    assert loaded.sharding == sharding and loaded.dtype == jnp.bfloat16
    assert loaded.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(loaded, np.float32), value)
    safetensors_file.save(tmp_path / "again.safetensors", {"w": loaded}, {})  # gathers shards
    like = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    np.testing.assert_array_equal(
        np.asarray(safetensors_file.load(tmp_path / "again.safetensors", like)["w"]), value
    )


def test_mismatched_file_is_named(tmp_path):
    file = tmp_path / "w.safetensors"
    safetensors_file.save(file, {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}, {})
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(
        safetensors_file.WeightsError, match=r"missing in the file \['c'\].*unexpected \['b'\]"
    ):
        safetensors_file.load(file, {"a": leaf, "c": leaf})
    with pytest.raises(
        safetensors_file.WeightsError, match=r"b has shape \(3,\), but the model has \(2,\)"
    ):
        safetensors_file.load(file, {"a": leaf, "b": leaf})
    with pytest.raises(safetensors_file.WeightsError, match="weight file not found"):
        safetensors_file.load(tmp_path / "none.safetensors", {"a": leaf})


def test_truncated_file_and_duplicate_names_raise(tmp_path):
    file = tmp_path / "w.safetensors"
    safetensors_file.save(file, {"a": np.zeros(100, np.float32)}, {})
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(safetensors_file.WeightsError, match="not a complete safetensors file"):
        safetensors_file.load(file, {"a": jax.ShapeDtypeStruct((100,), jnp.float32)})
    with pytest.raises(safetensors_file.WeightsError, match="same dotted name"):
        safetensors_file.save(file, {"a.b": np.zeros(1), "a": {"b": np.zeros(1)}}, {})


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("I64", 8), ("BOOL", 1), ("C64", 8)])
def test_dtypes_that_do_not_only_round_are_rejected(tmp_path, dtype, size):
    header = {"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}
    text = json.dumps(header).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * size))
    with pytest.raises(
        safetensors_file.WeightsError, match=f"w has dtype {dtype}, but the model has float32"
    ):
        safetensors_file.load(file, {"w": jax.ShapeDtypeStruct((4,), jnp.float32)})
