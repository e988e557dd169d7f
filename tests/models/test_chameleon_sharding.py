"""A training step and a decoding step give equal results on every mesh; sharding.py itself."""

import dataclasses
import functools

import chameleon_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from generate_setup import MODEL as MICRO
from jax.sharding import PartitionSpec as P

from medmax_jax.config import Lora, Mesh, Vocab
from medmax_jax.models import chameleon, kv_cache
from medmax_jax.sharding import ACT, BATCH, CACHE, LOGITS, ROWS, make_mesh, shard_batch

ALL_AXES = (2, 2, 2)
SLOW_MESHES = [pytest.param(m, marks=pytest.mark.slow) for m in ((1, 8, 1), (1, 2, 4))]
VOCAB = Vocab(size=64, image_codes=512, text_start=8_712)  # only the size shapes the model
LORA = Lora(rank=4, alpha=6.0, dropout=0.25)
MODEL = dataclasses.replace(  # heads and norms that split over four devices
    MICRO,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    context_length=16,
    qk_norm_shards=4,
    swin_norm=True,
    remat="attn",
)


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))


def model_on_mesh(lora: Lora = LORA) -> chameleon.Chameleon:
    """Return the same weights on every mesh, large enough to matter, B not zero."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        value = rng.standard_normal(leaf.shape) * leaf.shape[-2 if leaf.ndim > 1 else -1] ** -0.5
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    return jax.tree.map(fill, chameleon.abstract_model(MODEL, VOCAB, lora))


def batch_on(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Return packed rows: two documents and padding in each."""
    rng, length = np.random.default_rng(1), 10
    segments = np.array([1] * 4 + [2] * 5 + [0], np.int32)
    positions = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0], np.int32)
    rows = dict(ids=rng.integers(0, 64, (8, length)).astype(np.int32))
    rows |= dict(segments=np.tile(segments, (8, 1)), positions=np.tile(positions, (8, 1)))
    return shard_batch(rows, mesh)


def loss_of(model, batch, key):
    hidden = model.hidden(batch["ids"], batch["segments"], batch["positions"], key=key)
    logits = model.logits(hidden)
    assert jax.typeof(hidden).sharding.spec == ACT
    assert jax.typeof(logits).sharding.spec == LOGITS
    hit = jnp.roll(batch["ids"], -1, 1)[..., None] == jnp.arange(VOCAB.size)
    nll = jax.nn.logsumexp(logits, -1) - jnp.where(hit, logits, 0).sum(-1)
    return jnp.where(batch["segments"] > 0, nll, 0).mean()


@functools.cache
def step_on(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return the loss with dropout, gradients of the adapters, and the adapters after AdamW."""
    with jax.set_mesh(mesh := mesh_of(shape)):
        graph, lora, base = chameleon.split_adapters(model_on_mesh())
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.0))

        @setup.jit
        def step(lora, base, batch, key):
            loss = lambda lora: loss_of(nnx.merge(graph, lora, base), batch, key)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(lora)
            updates, opt = tx.update(grads, tx.init(lora), lora)
            return value, grads, optax.apply_updates(lora, updates), opt[1][0].mu

        loss, *trees = step(lora, base, batch_on(mesh), jax.random.key(2))
        for tree in trees:  # gradients, weights and moments are sharded as their parameters
            jax.tree.map(_same_sharding, lora, tree)
        grads, after, _ = (setup.named(t) for t in jax.device_get(trees))
        return dict(loss=jax.device_get(loss), lora=grads, after=after)


@functools.cache
def full_gradients_on(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return the gradients of every base weight, without adapters."""
    with jax.set_mesh(mesh := mesh_of(shape)):
        model = model_on_mesh(chameleon.NO_LORA)
        grads = setup.jit(jax.grad(loss_of))(model, batch_on(mesh), None)
        jax.tree.map(_same_sharding, model, grads)
        return setup.named(jax.device_get(grads))


def _same_sharding(a: jax.Array, b: jax.Array) -> None:
    assert jax.typeof(a).sharding.spec == jax.typeof(b).sharding.spec


@pytest.mark.slow  # tests/training/test_step.py has the step of a run on all axes
@pytest.mark.parametrize("shape", [ALL_AXES, *SLOW_MESHES], ids=str)
def test_training_step_is_the_same_on_every_mesh(shape):
    expected, got = step_on((1, 1, 1)), step_on(shape)
    assert max(np.abs(g).max() for g in expected["lora"].values()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_full_gradients_are_the_same_on_a_mesh_of_all_axes():
    expected, got = full_gradients_on((1, 1, 1)), full_gradients_on((2, 2, 2))
    assert all(np.abs(g).max() > 1e-4 for g in expected.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@functools.cache
def decoded_on(shape: tuple[int, int, int]) -> np.ndarray:
    """Return the logits of a chunk of three tokens and of one more, at a position per row."""
    with jax.set_mesh(mesh := mesh_of(shape)):
        model, ids = model_on_mesh(), np.random.default_rng(3).integers(0, 64, (8, 4))
        decode = setup.jit(lambda m, *args: kv_cache.decode(m, *args, slots=None, span=12))
        cache = kv_cache.init_cache(MODEL, num_slots=8, cache_length=12, cache_dtype="model")
        assert jax.typeof(cache.k).sharding.spec == CACHE
        prompt, chunk, outputs = np.where(np.arange(8) == 5, 2, 3)[:, None], np.arange(3)[None], []
        for positions in (np.where(chunk < prompt, chunk, -1), prompt):
            inputs = (np.take_along_axis(ids, positions, 1), positions)
            tokens, positions = shard_batch([a.astype(np.int32) for a in inputs], mesh)
            hidden, cache = decode(model, tokens, cache, positions)
            outputs.append(jax.device_get(setup.jit(lambda m, h: m.logits(h))(model, hidden)))
        assert jax.typeof(cache.v).sharding.spec == CACHE
        return np.concatenate(outputs, 1)


@pytest.mark.parametrize("shape", [ALL_AXES, SLOW_MESHES[1]], ids=str)
def test_decoding_is_the_same_on_every_mesh(shape):
    np.testing.assert_allclose(decoded_on(shape), decoded_on((1, 1, 1)), rtol=1e-5, atol=1e-5)


def test_weights_have_their_shards():
    with jax.set_mesh(mesh_of((2, 2, 2))):
        like = chameleon.abstract_model(MODEL, VOCAB, LORA)
    specs = {n: x.sharding.spec for n, x in setup.named(like).items()}
    assert specs["embed_tokens.embedding"] == P("tp", "fsdp")
    assert specs["lm_head.kernel"] == P("fsdp", "tp")
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ):
        assert specs[f"layers.{name}.kernel"] == P(None, "fsdp", "tp")
        assert specs[f"layers.{name}.lora_a"] == P(None, "fsdp", None)
        assert specs[f"layers.{name}.lora_b"] == P(None, None, "tp")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert specs[f"layers.{name}.kernel"] == P(None, "tp", "fsdp")


@pytest.mark.slow  # two compilations of every random draw
def test_created_model_is_the_same_on_every_mesh_and_as_abstract():
    models = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(mesh_of(shape)):
            model = chameleon.create_model(MODEL, VOCAB, LORA, key=jax.random.key(0))
            like = chameleon.abstract_model(MODEL, VOCAB, LORA)
        for name, leaf in setup.named(model).items():
            expected = setup.named(like)[name]
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (
                expected.shape,
                expected.dtype,
                expected.sharding,
            )
        models.append(jax.device_get(model))
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_too_few_devices():
    with pytest.raises(ValueError, match="2 x 8 x 1 = 16 devices, but there are 8"):
        mesh_of((2, 8, 1))
    with pytest.raises(ValueError, match="every axis must be at least 1"):
        mesh_of((1, 0, 1))


def test_shard_batch_splits_rows():
    mesh = mesh_of((2, 2, 2))
    batch = {"ids": np.arange(24, dtype=np.int32).reshape(8, 3), "count": np.ones(8, np.float32)}
    sharded = shard_batch(batch, mesh)
    assert sharded["ids"].sharding.spec == BATCH and sharded["count"].sharding.spec == P(ROWS)
    assert {s.data.shape for s in sharded["ids"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, sharded, batch)
    with pytest.raises(ValueError, match="6 rows cannot be split over data x fsdp = 4"):
        shard_batch(batch["ids"][:6], mesh)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 1, 8), "model.num_kv_heads is 4, not divisible by config.mesh.tp = 8"),
        ((1, 3, 1), "model.hidden_size is 32, not divisible by config.mesh.fsdp = 3"),
    ],
)
def test_sizes_must_split_over_the_mesh(shape, message):
    with jax.set_mesh(mesh_of(shape)), pytest.raises(ValueError, match=message):
        chameleon.abstract_model(MODEL, VOCAB, LORA)


def test_model_without_a_mesh_raises():
    with pytest.raises(ValueError, match="no mesh is set"):
        chameleon.create_model(MODEL, VOCAB, LORA, key=jax.random.key(0))
