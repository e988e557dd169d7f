"""The KV cache: explicit and implicit slots, spans, int8 with scales, copies; on many devices."""

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import chameleon_cases as cases

from medmax_jax.config import Mesh
from medmax_jax.models import kv_cache
from medmax_jax.sharding import make_mesh

CACHE_LENGTH = 24


@pytest.fixture(params=[(1, 1, 1), (1, 2, 2)], ids=str)
def mesh(request):
    data, fsdp, tp = request.param
    with jax.set_mesh(make_mesh(Mesh(data=data, fsdp=fsdp, tp=tp))):
        yield jax.sharding.get_mesh()


def model(**changes):
    return setup.load(setup.config(cases.SWIN, **changes), cases.weights(cases.SWIN, lora=False))


@setup.jit
def full(model, ids):
    segments, positions = jnp.ones_like(ids), jnp.tile(jnp.arange(ids.shape[1]), (len(ids), 1))
    return model.hidden(ids, segments, positions, key=None)


def shard(values, mesh):
    """Return rows split over data x fsdp, as the cache requires."""
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), *[None] * (np.ndim(values) - 1))
    return jax.device_put(np.asarray(values), jax.sharding.NamedSharding(mesh, spec))


def decode(model, cache, ids, positions, slots, *, span=CACHE_LENGTH):
    mesh = jax.sharding.get_mesh()
    rows = [None if a is None else shard(np.asarray(a, np.int32), mesh)
            for a in (ids, positions, slots)]  # fmt: skip
    run = setup.jit(lambda m, c, i, p, slots: kv_cache.decode(m, i, c, p, slots=slots, span=span))
    return run(model, cache, *rows)


def test_any_slot_serves_any_row(mesh):
    """Two rows in four slots per device, with explicit slots; then with row b in slot b."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(0)
    ids = rng.integers(0, cases.SIZE, (2 * split, 9)).astype(np.int32)
    expected = np.asarray(full(m, ids))
    cache = kv_cache.init_cache(
        m.config, num_slots=4 * split, cache_length=CACHE_LENGTH, cache_dtype="model"
    )
    slots, positions = np.tile([2, 0], split), np.tile(np.arange(8), (2 * split, 1))
    got, cache = decode(m, cache, ids[:, :8], positions, slots)
    np.testing.assert_allclose(got, expected[:, :8], atol=3e-5)
    tokens = np.zeros((3 * split, 1), np.int32)  # the first three slots of each device, implicit
    positions = np.full((3 * split, 1), -1, np.int32)
    rows = np.arange(2 * split) // 2 * 3 + slots
    tokens[rows, 0], positions[rows, 0] = ids[:, 8], 8
    got, cache = decode(m, cache, tokens, positions, None, span=10)
    np.testing.assert_allclose(np.asarray(got)[rows, 0], expected[:, 8], atol=3e-5)
    untouched = np.asarray(cache.k).reshape(3, split, 4, -1)[:, :, [1, 3]]
    assert not untouched.any()


def test_copied_slot_continues_like_its_source(mesh):
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(1)
    ids = rng.integers(0, cases.SIZE, (split, 8)).astype(np.int32)
    cache = kv_cache.init_cache(
        m.config, num_slots=3 * split, cache_length=CACHE_LENGTH, cache_dtype="model"
    )
    _, cache = decode(m, cache, ids[:, :6], np.tile(np.arange(6), (split, 1)), np.zeros(split))
    pairs = [shard(np.tile(a, split).astype(np.int32), mesh) for a in ([0, 0], [2, 0])]
    cache = jax.jit(kv_cache.copy_slots, static_argnames="span")(cache, *pairs, span=16)
    got, cache = decode(m, cache, ids[:, 6:], np.tile([6, 7], (split, 1)), np.full(split, 2))
    np.testing.assert_allclose(got, np.asarray(full(m, ids))[:, 6:], atol=3e-5)
    assert not np.asarray(cache.k).reshape(3, split, 3, -1)[:, :, 1].any()


def test_int8_cache_is_close_to_the_exact_result(mesh):
    """int8 requires a little more than half the bytes of bf16."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(2)
    ids = rng.integers(0, cases.SIZE, (split, 12)).astype(np.int32)
    cache = kv_cache.init_cache(
        m.config, num_slots=split, cache_length=CACHE_LENGTH, cache_dtype="int8"
    )
    assert cache.k.dtype == jnp.int8
    got, cache = decode(m, cache, ids, np.tile(np.arange(12), (split, 1)), None)
    error = np.asarray(got) - np.asarray(full(m, ids))
    assert 1e-5 < error.std() < 0.02  # hidden states have a deviation of about 1
    size = kv_cache.cache_bytes(
        m.config, num_slots=split, cache_length=CACHE_LENGTH, cache_dtype="int8"
    )
    assert size == sum(x.nbytes for x in jax.tree.leaves(cache))
    exact = kv_cache.init_cache(
        m.config, num_slots=split, cache_length=CACHE_LENGTH, cache_dtype="model"
    )
    exact_size = kv_cache.cache_bytes(
        m.config, num_slots=split, cache_length=CACHE_LENGTH, cache_dtype="model"
    )
    assert exact_size == sum(x.nbytes for x in jax.tree.leaves(exact))


def test_quantize_int8_worked_example():
    codes, scale = kv_cache.quantize_int8(jnp.array([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]] and scale.tolist() == [1.0, 0.0]


def test_unknown_cache_dtype_raises():
    with pytest.raises(ValueError, match="cache_dtype is 'int4'; it must be one of model, int8"):
        kv_cache.init_cache(
            setup.config(cases.SWIN), num_slots=1, cache_length=8, cache_dtype="int4"
        )
