"""The parts of a layer against their formulas in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from medmax_jax.config import Lora, Mesh
from medmax_jax.models import layers
from medmax_jax.sharding import ACT, DOWN, HID, UP, make_mesh, shard_batch

RNG = np.random.default_rng(0)
LORA = Lora(rank=4, alpha=6.0, dropout=0.25)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        yield


@pytest.fixture
def four_devices():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=2, tp=2))):
        yield


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def put(array: np.ndarray, spec: P) -> jax.Array:
    return jax.device_put(array, jax.NamedSharding(jax.sharding.get_mesh(), spec))


def linear(lora: Lora, spec: P = UP) -> layers.Linear:
    def make(keys):
        return layers.Linear(32, 48, spec=spec, dtype="float32", kind="none", lora=lora, keys=keys)

    return jax.jit(make)(jax.random.split(KEY))


@pytest.mark.usefixtures("four_devices")
def test_linear_adds_alpha_over_rank_times_the_adapter():
    layer, x = linear(LORA), normal(4, 5, 32)
    b = normal(4, 48)
    layer.lora_b[...] = put(b, P(None, "tp"))
    got = jax.jit(lambda m, x: m(x, HID, key=None))(layer, put(x, ACT))
    w, a = np.asarray(layer.kernel[...]), np.asarray(layer.lora_a[...])
    np.testing.assert_allclose(got, x @ w + 1.5 * (x @ a) @ b, rtol=2e-5, atol=2e-5)
    assert jax.typeof(got).sharding.spec == HID


def test_linear_starts_as_its_base():
    """B is zero, A uniform within 1/sqrt(in) as in peft, and rank 0 has no adapter at all."""
    layer, bare, x = linear(LORA), linear(Lora(rank=0, alpha=0.0, dropout=0.0)), normal(4, 5, 32)
    run = jax.jit(lambda m, x, k: m(x, HID, key=k), static_argnums=2)
    np.testing.assert_array_equal(run(layer, x, None), run(bare, x, None))
    assert [p for p in vars(bare) if p.startswith("lora_")] == []
    a = np.asarray(layer.lora_a[...])
    assert np.abs(a).max() <= 32**-0.5 and abs(a.std() - (3 * 32) ** -0.5) < 0.02
    assert abs(np.std(layer.kernel[...]) - 0.02) < 0.001


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("spec", [UP, DOWN], ids=["up", "down"])
def test_adapters_are_sharded_as_their_kernel(spec):
    layer = linear(LORA, spec)
    assert jax.typeof(layer.kernel[...]).sharding.spec == spec
    assert jax.typeof(layer.lora_a[...]).sharding.spec == P(spec[0], None)
    assert jax.typeof(layer.lora_b[...]).sharding.spec == P(None, spec[1])


def test_dropout_keeps_the_mean_and_scales_the_rest():
    x = put(np.ones((8, 50, 64), np.float32), HID)
    drop = jax.jit(lambda x, key: layers.dropout(x, 0.25, key=key))
    got = np.asarray(drop(x, KEY))
    assert set(np.unique(got)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(got.mean() - 1) < 4 * (0.25 / 0.75 / got.size) ** 0.5  # four standard errors
    assert (got != np.asarray(drop(x, jax.random.key(1)))).any()
    assert abs(got[0].mean() - got[1:].mean()) < 0.1 and (got[0] != got[4]).any()
    assert (got[:, :25] != got[:, 25:]).any()  # two halves of the same random bits
    kept, odd = got > 0, np.asarray(drop(x[:, :7], KEY))
    assert abs(np.corrcoef(kept[:, :25].ravel(), kept[:, 25:].ravel())[0, 1]) < 4 / 12_800**0.5
    assert odd.shape == (8, 7, 64) and abs(odd.mean() - 1) < 4 * (0.25 / 0.75 / odd.size) ** 0.5


def test_dropout_touches_the_adapter_only():
    layer, x = linear(LORA), put(normal(4, 5, 32), ACT)
    layer.lora_b[...] = put(normal(4, 48), P(None, "tp"))
    run = jax.jit(lambda m, x, keys: jax.lax.map(lambda k: m(x, HID, key=k), keys))
    without = jax.jit(lambda m, x: m(x, HID, key=None))(layer, x)
    many = np.asarray(run(layer, x, jax.random.split(KEY, 500)))
    error = many.std(0) / 500**0.5
    assert (error > 0).all() and (np.abs(many.mean(0) - without) < 5 * error).all()
    base = x @ np.asarray(layer.kernel[...])
    layer.lora_b[...] = put(np.zeros((4, 48), np.float32), P(None, "tp"))
    np.testing.assert_allclose(run(layer, x, jax.random.split(KEY, 2))[0], base, atol=1e-5)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("spec, local", [(ACT, (2, 6, 8)), (HID, (2, 6, 4))], ids=["ACT", "HID"])
def test_dropout_masks_are_drawn_in_shards(spec, local):
    """The program of a device draws random bits for its own shard, not for the complete batch."""
    x = put(np.ones((4, 6, 8), np.float32), spec)
    drop = jax.jit(lambda x, key: layers.dropout(x, 0.5, key=key))
    sizes = set(re.findall(r"u32\[(\d+,\d+,\d+)\]", drop.lower(x, KEY).compile().as_text()))
    rows, tokens, features = local
    assert sizes == {f"{rows},{count},{features}" for count in (tokens // 2, tokens)}
    assert jax.typeof(drop(x, KEY)).sharding.spec == spec


@pytest.mark.usefixtures("four_devices")
def test_embed_reads_rows():
    make = lambda: layers.Embed(40, 8, dtype="float32", key=KEY)  # noqa: E731
    layer, ids = jax.jit(make)(), RNG.integers(0, 40, (4, 7)).astype(np.int32)
    ids[0, :2] = 0, 39
    batch = shard_batch(ids, jax.sharding.get_mesh())
    got = jax.jit(lambda m, i: m(i, "bfloat16"))(layer, batch)
    table = np.asarray(layer.embedding[...].astype("bfloat16"))
    np.testing.assert_array_equal(np.asarray(got), table[ids])
    assert jax.typeof(got).sharding.spec == ACT


def test_rms_norm():
    layer, x = layers.RMSNorm(16, eps=1e-2, dtype="float32"), normal(2, 3, 16)
    layer.scale[...] = jnp.asarray(scale := normal(16))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bf16_counts_in_fp32():
    layer = layers.RMSNorm(4_096, eps=1e-5, dtype="bfloat16")
    x = jnp.asarray(3e4 * normal(1, 2, 4_096), jnp.bfloat16)
    got = np.asarray(layer(x), np.float32)
    np.testing.assert_allclose((got**2).mean(-1), 1, rtol=2e-3)


def test_qk_norm_applies_one_row_of_gains_per_block_of_heads():
    layer, x = layers.QKNorm(2, 4, eps=1e-2, dtype="float32"), normal(2, 6, 3, 4)
    scale, bias = normal(2, 4), normal(2, 4)
    layer.scale[...], layer.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    expected = np.empty_like(x)
    for head in range(6):
        row, v = head // 3, x[:, head]
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-2)
        expected[:, head] = v * scale[row] + bias[row]
    got = jax.jit(lambda m, x: m(x))(layer, put(x, P(None, "tp", None, None)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_rope_rotates_complex_numbers():
    x, positions = normal(2, 3, 5, 8), np.array([[0, 1, 2, 3, 4], [0, 7, 0, 1, 300]], np.int32)
    cos, sin = layers.rope_angles(jnp.asarray(positions), head_dim=8, theta=100.0)
    turn = np.exp(1j * positions[:, None, :, None] * 100.0 ** (-np.arange(4) / 4))
    expected = (x[..., :4] + 1j * x[..., 4:]) * turn
    got = layers.rope(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(got, np.concatenate([expected.real, expected.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(got[0, :, 0], x[0, :, 0])  # position 0 turns nothing
