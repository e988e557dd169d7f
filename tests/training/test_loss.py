"""The objective on documents against a plain reference, packed or not, by kind of document."""

import dataclasses
import functools

import jax
import micro_run
import numpy as np
import pytest

from medmax_jax import config, sharding
from medmax_jax.data import loader
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Layout, loss_mask
from medmax_jax.models import chameleon
from medmax_jax.models.vocab import is_image
from medmax_jax.training import loss, metrics


def the_mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))


@pytest.fixture(scope="module")
def model() -> chameleon.Chameleon:
    run = micro_run.run()
    with jax.set_mesh(the_mesh((1, 1, 1))):
        return chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Two sources and two tasks, crossed."""
    documents = [
        dataclasses.replace(
            d, source="SLAKE" if n % 3 else "Quilt-1M", task="VQA" if n % 4 < 2 else "Visual Chat"
        )
        for n, d in enumerate(micro_run.documents(23, seed=0))
    ]
    folder = tmp_path_factory.mktemp("records") / "r"
    layout = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
    writer.write(folder, documents, shard_size=16, layout=layout, notes={})
    return str(folder)


def on(model, run, batch, m):
    """objective() of one batch, jitted, as numpy."""
    with jax.set_mesh(m):
        call = jax.jit(lambda model, b: loss.training_objective(model, b, None, trains="lora"))
        return jax.device_get(call(model, sharding.shard_batch(batch, m)))


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
        log_p = np.asarray(full(model, *sharding.shard_batch((ids, segments, positions), m)))
    log_likelihoods = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return [np.r_[0, -n][: len(d.tokens)] for n, d in zip(log_likelihoods, documents, strict=True)]


def check_log_z_and_norms(model, run, batch, m, parts, maxima) -> None:
    """Compare with full logits and the last layer's output, position by position."""
    args = (batch.ids, batch.segments, batch.positions)
    with jax.set_mesh(m):
        placed = sharding.shard_batch(args, m)
        logits = np.asarray(jax.jit(lambda model, *a: model.logits(model.hidden(*a, key=None)))(
            model, *placed))  # fmt: skip
        last = np.asarray(jax.jit(lambda model, *a: model.hidden_states_by_layer(*a)[-1])(
            model, *placed))  # fmt: skip
    log_z, top = np.logaddexp.reduce(logits, -1)[:, :-1], logits.max(-1)[:, :-1]
    norms, scored = np.linalg.norm(last, axis=-1)[:, :-1], batch.weights[:, 1:] > 0
    image = is_image(batch.ids[:, 1:], run.vocab)
    for name, targets in (("text", scored & ~image), ("image", scored & image)):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=name)
        close(parts[f"{name}_log_z"], log_z[targets].sum())
        close(parts[f"{name}_hidden_norm"], norms[targets].sum())
        close(maxima[f"{name}_log_z_max"], log_z[targets].max())
        close(maxima[f"{name}_max_logit"], top[targets].max())


@pytest.mark.parametrize("weighing", ["document", "token"])
def test_packed_objective_is_the_mean_over_documents(model, folder, weighing):
    """All documents of a pass: packed and not, against one document at a time."""
    m = the_mesh((1, 1, 1))
    packed = micro_run.run(data__train=folder, train__loss_weight=weighing, data__batch_size=24)
    alone = dataclasses.replace(packed, data=dataclasses.replace(packed.data, pack=False))
    means, sums, text, image, kinds = [], [], [], [], {}
    documents = list(loader.eval_batches(packed, folder).records)
    for document, nll in zip(documents, nll_alone(model, documents, packed, m), strict=True):
        mask = loss_mask(document.tokens, packed.data.mask, document.turns)
        means.append(nll[mask].mean())
        sums += list(nll[mask])
        image_mask = is_image(document.tokens, packed.vocab)
        text, image = text + list(nll[mask & ~image_mask]), image + list(nll[mask & image_mask])
        for name in (f"source/{document.source}", f"task/{document.task}"):
            for what, part in (("text", mask & ~image_mask), ("image", mask & image_mask)):
                kinds.setdefault(f"{name}/{what}_nll", []).extend(nll[part])
    expected = np.mean(means if weighing == "document" else sums)
    for run in (packed, alone):
        data = loader.eval_batches(run, folder)
        assert len(data) == 1
        batch = data.batch(0)
        assert (batch.segments.max() > 1) == run.data.pack
        total, (parts, maxima) = on(model, run, batch, m)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        np.testing.assert_allclose(parts["text_nll"], sum(text), rtol=1e-5)
        np.testing.assert_allclose(parts["image_nll"], sum(image), rtol=1e-5)
        assert (parts["text_count"], parts["image_count"]) == (len(text), len(image))
        check_log_z_and_norms(model, run, batch, m, parts, maxima)
        eval_metrics = metrics.EvalMetrics.single_from_model_output(
            **parts, weighted_loss=total, share=1.0
        )
        actual, expected_means = (
            metrics.by_kind(eval_metrics, data.kinds),
            {k: np.mean(v) for k, v in kinds.items() if v},
        )
        assert len(expected_means) == 7 and actual.keys() == expected_means.keys()
        for name, value in expected_means.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)
