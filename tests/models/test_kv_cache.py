"""The cache: lanes chosen and by order, spans, bytes with scales, copies; on several devices."""

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import chameleon_cases as cases

from medmax_jax.config import Mesh
from medmax_jax.models import kv_cache
from medmax_jax.sharding import make_mesh

SLOTS = 24


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


def blocks(values, mesh):
    """Rows split over data x fsdp, as the cache wants them."""
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), *[None] * (np.ndim(values) - 1))
    return jax.device_put(np.asarray(values), jax.sharding.NamedSharding(mesh, spec))


def feed(model, cache, ids, positions, lanes, *, span=SLOTS):
    mesh = jax.sharding.get_mesh()
    rows = [None if a is None else blocks(np.asarray(a, np.int32), mesh)
            for a in (ids, positions, lanes)]  # fmt: skip
    run = setup.jit(lambda m, c, i, p, lanes: kv_cache.decode(m, i, c, p, lanes=lanes, span=span))
    return run(model, cache, *rows)


def test_any_lane_serves_any_row(mesh):
    """Two rows of four lanes a device, in lanes by name; then lane after lane."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(0)
    ids = rng.integers(0, cases.SIZE, (2 * split, 9)).astype(np.int32)
    want = np.asarray(full(m, ids))
    cache = kv_cache.init_cache(m.config, lanes=4 * split, slots=SLOTS, kind="model")
    lanes, places = np.tile([2, 0], split), np.tile(np.arange(8), (2 * split, 1))
    got, cache = feed(m, cache, ids[:, :8], places, lanes)
    np.testing.assert_allclose(got, want[:, :8], atol=3e-5)
    fed = np.zeros((3 * split, 1), np.int32)  # the first three lanes of each device, none named
    at = np.full((3 * split, 1), -1, np.int32)
    where = np.arange(2 * split) // 2 * 3 + lanes
    fed[where, 0], at[where, 0] = ids[:, 8], 8
    got, cache = feed(m, cache, fed, at, None, span=10)
    np.testing.assert_allclose(np.asarray(got)[where, 0], want[:, 8], atol=3e-5)
    untouched = np.asarray(cache.k).reshape(3, split, 4, -1)[:, :, [1, 3]]
    assert not untouched.any()


def test_a_copied_lane_goes_on_like_the_first(mesh):
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(1)
    ids = rng.integers(0, cases.SIZE, (split, 8)).astype(np.int32)
    cache = kv_cache.init_cache(m.config, lanes=3 * split, slots=SLOTS, kind="model")
    _, cache = feed(m, cache, ids[:, :6], np.tile(np.arange(6), (split, 1)), np.zeros(split))
    pairs = [blocks(np.tile(a, split).astype(np.int32), mesh) for a in ([0, 0], [2, 0])]
    cache = jax.jit(kv_cache.copy_slots, static_argnames="span")(cache, *pairs, span=16)
    got, cache = feed(m, cache, ids[:, 6:], np.tile([6, 7], (split, 1)), np.full(split, 2))
    np.testing.assert_allclose(got, np.asarray(full(m, ids))[:, 6:], atol=3e-5)
    assert not np.asarray(cache.k).reshape(3, split, 3, -1)[:, :, 1].any()


def test_bytes_with_scales(mesh):
    """int8: half the bytes of bf16 and a little; near the exact answer."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    m, rng = model(), np.random.default_rng(2)
    ids = rng.integers(0, cases.SIZE, (split, 12)).astype(np.int32)
    cache = kv_cache.init_cache(m.config, lanes=split, slots=SLOTS, kind="int8")
    assert cache.k.dtype == jnp.int8
    places = np.tile(np.arange(12), (split, 1))
    got, cache = feed(m, cache, ids, places, None)
    off = np.asarray(got) - np.asarray(full(m, ids))
    assert 1e-5 < off.std() < 0.02  # hidden states have a deviation of about 1
    size = kv_cache.cache_bytes(m.config, lanes=split, slots=SLOTS, kind="int8")
    assert size == sum(x.nbytes for x in jax.tree.leaves(cache))
    plain = kv_cache.init_cache(m.config, lanes=split, slots=SLOTS, kind="model")
    whole = kv_cache.cache_bytes(m.config, lanes=split, slots=SLOTS, kind="model")
    assert whole == sum(x.nbytes for x in jax.tree.leaves(plain))


def test_quantised_by_hand():
    codes, scale = kv_cache.quantize_int8(jnp.array([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]] and scale.tolist() == [1.0, 0.0]


def test_an_unknown_kind_of_cache():
    with pytest.raises(ValueError, match="kind is 'int4'; it must be one of model, int8"):
        kv_cache.init_cache(setup.config(cases.SWIN), lanes=1, slots=8, kind="int4")
