"""Attention against its definition: every implementation, packed documents, gradients, meshes."""

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest
from jax.sharding import NamedSharding

from medmax_jax import config
from medmax_jax.config import Mesh
from medmax_jax.models import attention
from medmax_jax.sharding import ACT, BATCH, HEADS, make_mesh
from medmax_jax.training import step

RNG = np.random.default_rng(0)
ROWS, HEAD_COUNT, KEY_HEADS, DIM = 2, 4, 2, 16


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def put(x: np.ndarray, spec) -> jax.Array:
    return jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), spec))


def documents(length: int) -> np.ndarray:
    """Return two rows: three documents that end inside blocks, and padding; one document."""
    ends = np.array([length // 5, length // 2 + 3, length - 7])
    first = np.searchsorted(ends, np.arange(length), side="right") + 1
    return np.stack([np.where(first > 3, 0, first), np.ones(length)]).astype(np.int32)


def test_packed_mask_is_causal_within_documents():
    got = attention.packed_mask(jnp.asarray([[1, 1, 1, 2, 2, 0]]))
    expected = "100000 110000 111000 000100 000110 000001".split()
    np.testing.assert_array_equal(got[0], np.array([[c == "1" for c in row] for row in expected]))
    same = np.asarray(attention.same_document(jnp.asarray([[1, 1, 2]])), int)
    np.testing.assert_array_equal(same[0, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "fsdp, tp, rows, tokens, kv_heads",
    [(2, 1, 2, 6, 1), (2, 2, 2, 6, 2), (2, 2, 2, 6, 8), (1, 1, 1, 6, 8), (1, 2, 1, 1, 8)],
)
def test_attention_equals_the_reference(fsdp, tp, rows, tokens, kv_heads):
    """One row and one token are included: there jax 0.11 rejects shardings that reshape drops."""
    q, k, v = normal(rows, 8, tokens, 4), *(normal(rows, kv_heads, 9, 4) for _ in range(2))
    mask = RNG.random((rows, tokens, 9)) < 0.5
    mask[..., 0] = True
    expected = attention.reference_attention(*(jnp.asarray(a) for a in (q, k, v, mask)))
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=fsdp, tp=tp))):
        args = (*(put(a, HEADS) for a in (q, k, v)), put(mask, ACT))
        got = jax.jit(lambda *a: attention.attention(*a))(*args)
        assert jax.typeof(got).sharding.spec == HEADS
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_of_a_fully_masked_row_is_finite():
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        q, mask = put(normal(2, 2, 1, 4), HEADS), put(np.zeros((2, 1, 1), bool), ACT)
        assert np.isfinite(attention.attention(q, q, q, mask)).all()


def make_attention(impl: str, segments: jax.Array):
    if impl == "cudnn":  # its kernel runs on GPUs only; the rest runs here
        return lambda q, k, v: attention.cudnn_attend(q, k, v, segments, implementation="xla")
    return attention.make_packed_attention(segments, impl=impl)


def value_and_grads(attend, q, k, v, weights) -> list[np.ndarray]:
    def total(q, k, v):
        out = attend(q, k, v)
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (out, *grads)]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("impl, length", [("xla", 40), ("splash_interpret", 640), ("cudnn", 40)])
def test_every_implementation_equals_the_reference(impl, length, mesh):
    """Output and gradients are compared; splash runs in five blocks of 128."""
    q, weights = (normal(ROWS, HEAD_COUNT, length, DIM) for _ in range(2))
    k, v = (normal(ROWS, KEY_HEADS, length, DIM) for _ in range(2))
    segments = documents(length)
    mask = attention.packed_mask(jnp.asarray(segments))
    expected = value_and_grads(lambda *a: attention.reference_attention(*a, mask), q, k, v, weights)
    with jax.set_mesh(make_mesh(Mesh(data=mesh[0], fsdp=mesh[1], tp=mesh[2]))):
        args = [put(x, HEADS) for x in (q, k, v, weights)]
        sharded = put(segments, BATCH)
        got = value_and_grads(lambda *a: make_attention(impl, sharded)(*a), *args)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * max(1, np.abs(e).max()))
    assert np.abs(expected[0]).max() > 1


def test_documents_do_not_attend_to_each_other():
    """With changed keys in the first document, splash gives the same bits for the others."""
    q, k, v = (normal(ROWS, 2, 128, DIM) for _ in range(3))
    other = k.copy()
    other[0, :, :25] += 1
    with jax.set_mesh(make_mesh(Mesh(data=1, fsdp=1, tp=1))):
        segments = put(documents(128), BATCH)
        run = jax.jit(lambda *a: attention.splash_attend(*a, segments, interpret=True))
        first, second = (
            np.asarray(run(*(put(x, HEADS) for x in (q, keys, v)))) for keys in (k, other)
        )
    np.testing.assert_array_equal(first[0, :, 25:], second[0, :, 25:])
    assert (first[0, :, 1:25] != second[0, :, 1:25]).any(axis=(0, 2)).all()


def test_block_sizes_divide():
    assert [attention.block_size(n) for n in (128, 640, 2_048, 4_096)] == [128, 128, 512, 512]
    with pytest.raises(
        ValueError, match="100 tokens per row; splash attention requires a multiple"
    ):
        attention.splash_attend(
            *[jnp.zeros((1, 2, 100, 8))] * 3, jnp.zeros((1, 100), int), interpret=True
        )


@pytest.mark.parametrize("impl, devices", [("splash", "tpu"), ("cudnn", "gpu")])
def test_attention_for_other_devices_raises(impl, devices):
    run = micro_run.run(
        data__seq_len=128, data__document_limit=64, model__attention=impl,
        model__compute_dtype="bfloat16",
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"attention is '{impl}', which runs on {devices} devices"):
        step.check(run, make_mesh(run.mesh))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model__attention="splash"), "data.seq_len is 32; it must be a multiple of 128"),
        (dict(model__attention="cudnn"), "compute_dtype is 'float32'; it must be bfloat16"),
        (dict(model__attention="flash"), "one of xla, splash, splash_interpret, cudnn"),
    ],
)
def test_invalid_settings_raise(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        micro_run.run(**changes)


def test_unknown_name_raises():
    with pytest.raises(ValueError, match="config.model.attention is 'flash'"):
        attention.make_packed_attention(jnp.ones((1, 4), int), impl="flash")


def test_chunked_attention_equals_the_reference():
    """Values and gradients of rows that are split into chunks, three documents and padding each."""
    rng, shape = np.random.default_rng(0), (2, 4, 512, 8)
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(3))
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], 2, 0).repeat([200, 50, 240, 22], 1), jnp.int32)
    mask = attention.packed_mask(segments)
    m = make_mesh(Mesh(data=1, fsdp=1, tp=1))
    with jax.set_mesh(m):
        chunked, expected = (
            jax.value_and_grad(lambda *a, f=f: (jnp.sin(f(*a, mask))).sum(), argnums=(0, 1, 2))(
                q, k, v
            )
            for f in (attention.chunked_causal_attention, attention.reference_attention)
        )
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
