"""Cross-entropy against a plain reference, for all chunk counts, meshes and training modes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from medmax_jax import config, sharding
from medmax_jax.models import layers
from medmax_jax.models.layers import HeadWeights
from medmax_jax.training import cross_entropy as ce

ROWS, LENGTH, WIDTH, VOCAB, CODES = 8, 12, 16, 40, 16
MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def the_mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))


def reference(hidden, kernel, targets):
    """Return -log softmax at the target, log Z and the largest logit, from all logits at once."""
    logits = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    top = logits.max(-1)
    log_z = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ce.TokenValues(nll, log_z, top)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return dict(
        hidden=rng.standard_normal((ROWS, LENGTH, WIDTH), np.float32),
        kernel=rng.standard_normal((WIDTH, VOCAB), np.float32),
        image=rng.standard_normal((WIDTH, CODES), np.float32),
        targets=rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        weights=rng.random((ROWS, LENGTH), np.float32),
        z=rng.choice(np.array([0.01, 0.05], np.float32), (ROWS, LENGTH)),
    )


@pytest.fixture(scope="module")
def expected() -> dict[tuple[bool, bool], tuple]:
    """Sum, values and gradients of hidden and kernel, by (tuned, with z-loss).

    tuned: the image columns in the kernel's place. The sum is doubled, so that a gradient that is
    not scaled would show.
    """
    by_case, a = {}, arrays()
    for tuned, with_z in itertools.product((False, True), repeat=2):
        kernel = a["kernel"].copy()
        if tuned:
            kernel[:, 4 : 4 + CODES] = a["image"]

        def total(hidden, kernel, a=a, z=a["z"] if with_z else 0.0):
            values = reference(hidden, kernel, a["targets"])
            return 2 * (a["weights"] * (values.nll + z * values.log_z**2)).sum(), values

        by_case[tuned, with_z] = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
            a["hidden"], kernel
        )
    return by_case


@pytest.mark.parametrize("trains", ["lora", "full", "image_head"])
@pytest.mark.parametrize(
    "shape, chunks",
    [(MESHES[0], 1), (MESHES[0], 12), (MESHES[1], 4), *((m, 6) for m in MESHES[2:])],
)
@pytest.mark.parametrize("with_z", [False, True])
def test_values_and_gradients_match_the_reference(shape, chunks, trains, with_z, expected):
    """With the z-loss too, whose coefficient differs from token to token."""
    a, tuned = arrays(), trains == "image_head"
    (want, want_values), (want_hidden, want_kernel) = expected[tuned, with_z]
    with jax.set_mesh(m := the_mesh(shape)):
        put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))  # noqa: E731
        targets, weights, z = (put(a[n], sharding.BATCH) for n in ("targets", "weights", "z"))
        z = z if with_z else None
        head = HeadWeights(
            put(a["kernel"], sharding.UP), put(a["image"], sharding.UP) if tuned else None
        )

        def total(hidden, head):
            found, values = ce.weighted_nll(
                hidden, head, targets, weights, z, trains_kernel=trains == "full", chunks=chunks
            )
            return 2 * found, values

        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (got, values), (of_hidden, of_head) = run(put(a["hidden"], sharding.ACT), head)
        without_gradients = jax.jit(total)(
            put(a["hidden"], sharding.ACT), head
        )  # without gradients
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(
        close,
        (got, values, of_hidden, *without_gradients),
        (want, want_values, want_hidden, want, want_values),
    )
    assert of_hidden.sharding.spec == sharding.ACT
    if trains == "full":
        close(of_head.kernel, want_kernel)
        assert of_head.kernel.sharding.spec == sharding.UP
    else:
        assert not of_head.kernel.any()
    if tuned:
        close(of_head.image, want_kernel[:, 4 : 4 + CODES])


def plain(hidden, kernel, chunks: int) -> tuple[jax.Array, jax.Array]:
    """Sum and nll on one device, the head frozen."""
    with jax.set_mesh(m := the_mesh((1, 1, 1))):
        put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))  # noqa: E731
        placed = [put(arrays()[n], sharding.BATCH) for n in ("targets", "weights")]
        head = HeadWeights(put(kernel, sharding.UP), None)
        run = lambda h: ce.weighted_nll(h, head, *placed, trains_kernel=False, chunks=chunks)  # noqa: E731
        return jax.jit(jax.value_and_grad(run, has_aux=True))(put(hidden, sharding.ACT))


def test_bfloat16_is_within_bfloat16_rounding():
    a = arrays()
    hidden, kernel = (a[n].astype(jnp.bfloat16) for n in ("hidden", "kernel"))
    exact = jax.grad(lambda h: (a["weights"] * reference(h, kernel, a["targets"]).nll).sum())
    _, got = plain(hidden, kernel, 2)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), exact(jnp.asarray(hidden, jnp.float32)), atol=0.02
    )


def test_large_logits_do_not_overflow():
    (_, values), grad = plain(arrays()["hidden"] * 1e4, arrays()["kernel"], 1)
    assert np.isfinite(values.nll).all() and np.isfinite(grad).all()


def test_chunks_must_divide_the_tokens():
    with pytest.raises(ValueError, match="96 tokens are not divisible by 5 chunks"):
        plain(arrays()["hidden"], arrays()["kernel"], 5)


def test_image_columns_are_extracted_and_merged():
    a = arrays()
    for shape in (MESHES[0], MESHES[2]):
        with jax.set_mesh(m := the_mesh(shape)):
            kernel = jax.device_put(a["kernel"], NamedSharding(m, sharding.UP))
            image = layers.image_token_columns(kernel, CODES)
            assert image.sharding.spec == sharding.UP and image.dtype == jnp.float32
            np.testing.assert_array_equal(image, a["kernel"][:, 4 : 4 + CODES])
            merged = np.asarray(layers.full_kernel(HeadWeights(kernel, image + 1)))
        changed = merged - a["kernel"]
        np.testing.assert_allclose(changed[:, 4 : 4 + CODES], 1, rtol=1e-6)
        changed[:, 4 : 4 + CODES] = 0
        assert not changed.any()


@pytest.mark.parametrize(
    "shape, rows, length, vocab, chunks",
    [
        ((1, 1, 1), 8, 256, 9_728, 2),  # the tiny family: 1,024 tokens, 10 M logits
        ((1, 1, 1), 4, 2_048, 65_536, 8),  # 7B on one device: 1,024 tokens, whatever their logits
        ((1, 4, 1), 16, 2_048, 65_536, 32),  # on four: 256 of each, 2**24 logits
        ((1, 8, 1), 16, 2_048, 65_536, 16),  # 256 of each again, half as many logits
        ((1, 2, 2), 4, 2_048, 65_536, 8),
        ((1, 1, 1), 1, 2_049, 65_536, 3),  # 2049 = 3 x 683
        ((1, 1, 1), 1, 1_031, 65_536, 1_031),  # a prime
    ],
)
def test_chunk_count_is_per_device(shape, rows, length, vocab, chunks):
    counts = []
    with jax.set_mesh(m := the_mesh(shape)):
        struct = lambda shape, spec: jax.ShapeDtypeStruct(  # noqa: E731
            shape, jnp.float32, sharding=NamedSharding(m, spec)
        )
        jax.eval_shape(
            lambda h, k: counts.append(ce.num_chunks(h, k)),
            struct((rows, length, 8), sharding.ACT),
            struct((8, vocab), sharding.UP),
        )
    assert counts == [chunks]
