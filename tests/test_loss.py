"""The objective against the plainest reference, whatever the chunks, the packing or the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest
from jax.sharding import NamedSharding

from data import loader
from data.documents import scored
from medmax_jax import chameleon, config, loss, mesh
from medmax_jax.vocab import is_image

ROWS, LENGTH, WIDTH, VOCAB = 8, 12, 16, 40
MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def the_mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return mesh.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))


def reference(hidden, kernel, targets):
    """-log softmax at the target, from all logits at once."""
    logits = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((ROWS, LENGTH, WIDTH), np.float32)
    kernel = rng.standard_normal((WIDTH, VOCAB), np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32)
    return hidden, kernel, targets, rng.random((ROWS, LENGTH), np.float32)


def value_and_grads(nll, hidden, kernel, targets, weights):
    total = lambda h, k: (weights * nll(h, k, targets)).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, kernel)


@pytest.fixture(scope="module")
def expected():
    return value_and_grads(reference, *arrays())


@pytest.mark.parametrize(
    "shape, chunks", [(MESHES[0], 1), (MESHES[0], 12), *((shape, 4) for shape in MESHES[1:])]
)
def test_values_and_gradients_are_the_reference(shape, chunks, expected):
    hidden, kernel, targets, weights = arrays()
    with jax.set_mesh(m := the_mesh(shape)):
        put = lambda x, spec: jax.device_put(x, NamedSharding(m, spec))  # noqa: E731
        found = value_and_grads(
            lambda h, k, t: loss.token_nll(h, k, t, chunks=chunks),
            put(hidden, mesh.ACT),
            put(kernel, mesh.UP),
            put(targets, mesh.BATCH),
            put(weights, mesh.BATCH),
        )
    for e, f in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-5)


def test_large_logits_do_not_overflow():
    hidden, kernel, targets, _ = arrays()
    with jax.set_mesh(the_mesh((1, 1, 1))):
        found = loss.token_nll(
            jnp.asarray(hidden) * 1e4, jnp.asarray(kernel), jnp.asarray(targets), chunks=1
        )
    assert np.isfinite(found).all()


def test_chunks_must_divide():
    hidden, kernel, targets, _ = arrays()
    with jax.set_mesh(the_mesh((1, 1, 1))), pytest.raises(ValueError, match="5 chunks"):
        loss.token_nll(jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(targets), chunks=5)


@pytest.mark.parametrize(
    "rows, length, vocab, chunks",
    [
        (8, 256, 9_728, 1),  # the tiny family: 20 M logits
        (1, 2_048, 65_536, 2),  # 7B, a row a device: 134 M, two chunks of 256 MiB
        (8, 2_048, 65_536, 16),
        (1, 2_049, 65_536, 3),  # 2049 = 3 x 683
        (64, 3, 65_536_000, 3),  # never more chunks than tokens
    ],
)
def test_chunk_count(rows, length, vocab, chunks):
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    counts = []

    def count(hidden, kernel):
        counts.append(loss.num_chunks(hidden, kernel))

    with jax.set_mesh(the_mesh((1, 1, 1))):
        jax.eval_shape(count, like(rows, length, 8), like(8, vocab))
    assert counts == [chunks]


def test_chunk_count_is_of_one_device():
    counts = []
    with jax.set_mesh(m := the_mesh((2, 2, 2))):
        struct = lambda shape, spec: jax.ShapeDtypeStruct(  # noqa: E731
            shape, jnp.float32, sharding=NamedSharding(m, spec)
        )
        jax.eval_shape(
            lambda h, k: counts.append(loss.num_chunks(h, k)),
            struct((8, 2_048, 8), mesh.ACT),
            struct((8, 65_536), mesh.UP),
        )
    assert counts == [2]  # 2 rows x half of the vocabulary


# ---- the objective on documents, with a model


@pytest.fixture(scope="module")
def model() -> chameleon.Chameleon:
    run = micro_run.run()
    with jax.set_mesh(the_mesh((1, 1, 1))):
        return chameleon.create(run.model, run.vocab, run.lora, key=jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return micro_run.write(tmp_path_factory.mktemp("records") / "r", count=23)


def on(model, run, batch, m):
    """objective() of one batch, jitted, as numpy."""
    with jax.set_mesh(m):
        call = jax.jit(lambda model, b: loss.objective(model, b, None, vocab=run.vocab))
        return jax.device_get(call(model, mesh.put_batch(batch, m)))


def nll_alone(model, documents, run, m) -> list[np.ndarray]:
    """NLL of every token, each document alone in its row, from full logits; position 0 has none."""
    ids = np.zeros((len(documents), run.data.seq_len), np.int32)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document.tokens)] = document.tokens
    positions = np.broadcast_to(np.arange(run.data.seq_len, dtype=np.int32), ids.shape).copy()
    segments = np.array([positions[0] < len(d.tokens) for d in documents], np.int32)
    with jax.set_mesh(m):
        logits = lambda model, *a: model.logits(model.hidden(*a, key=None))  # noqa: E731
        full = jax.jit(lambda *a: jax.nn.log_softmax(logits(*a)))
        log_p = np.asarray(full(model, *mesh.put_batch((ids, segments, positions), m)))
    found = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return [np.r_[0, -n][: len(d.tokens)] for n, d in zip(found, documents, strict=True)]


@pytest.mark.parametrize("weighing", ["document", "token"])
def test_packed_objective_is_the_mean_over_documents(model, folder, weighing):
    """All documents of a pass: packed and not, against one document at a time."""
    m = the_mesh((1, 1, 1))
    packed = micro_run.run(data__train=folder, train__loss_weight=weighing, data__batch_size=24)
    alone = dataclasses.replace(packed, data=dataclasses.replace(packed.data, pack=False))
    means, sums, text, image = [], [], [], []
    documents = list(loader.one_pass(packed, folder).records)
    for document, nll in zip(documents, nll_alone(model, documents, packed, m), strict=True):
        mask = scored(document.tokens, packed.data.mask, document.turns)
        means.append(nll[mask].mean())
        sums += list(nll[mask])
        picture = is_image(document.tokens, packed.vocab)
        text, image = text + list(nll[mask & ~picture]), image + list(nll[mask & picture])
    expected = np.mean(means if weighing == "document" else sums)
    for run in (packed, alone):
        data = loader.one_pass(run, folder)
        assert len(data) == 1
        batch = data.batch(0)
        assert (batch.segments.max() > 1) == run.data.pack
        total, parts = on(model, run, batch, m)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        np.testing.assert_allclose(parts["text_nll"], sum(text), rtol=1e-5)
        np.testing.assert_allclose(parts["image_nll"], sum(image), rtol=1e-5)
        assert (parts["text_count"], parts["image_count"]) == (len(text), len(image))
