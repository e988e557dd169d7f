"""Tests that the objective is that of the MedMax release, or the mean over tokens on request.

Reference: every document alone in its row, its own gradient from full logits, then a plain mean.
Held against it: the gradient that the true training step makes of the packed batch, which its first
moment is with b1 = 0 and nothing clipped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest
from flax import nnx

from medmax_jax import config, sharding
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.data import loader
from medmax_jax.data.packing.condition_dropout import trained_tokens
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Layout, RecordsError, loss_mask
from medmax_jax.models import chameleon
from medmax_jax.models.guidance_streams import IMAGE_ONLY, TEXT_ONLY, UNCONDITIONAL
from medmax_jax.models.vocab import is_image
from medmax_jax.training import step
from medmax_jax.training.batch import Batch

QUICK = {"xla_backend_optimization_level": 0}  # compile time is what these tests cost
ONE = (1, 1, 1)
SLOW_MESHES = [pytest.param(m, marks=pytest.mark.slow) for m in ((1, 8, 1), (1, 2, 4))]
WEIGHTS = ["document", "token"]
TASKS = ("VQA", "Visual Chat", "Image Generation")
FACTORS = config.LossWeights(text=0.5, image=3.0, tasks="VQA=0.25, Image Generation=2", pseudo=1.0)
NEVER = 1e9  # a norm that no gradient has


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Write documents of three tasks, in turn."""
    made = [
        dataclasses.replace(d, task=TASKS[n % 3])
        for n, d in enumerate(micro_run.documents(61, seed=0))
    ]
    layout = Layout(vocab=micro_run.run().vocab, codes_per_image=4, tokenizer="", vqgan="")
    path = tmp_path_factory.mktemp("records") / "r"
    writer.write(path, made, shard_size=16, layout=layout, notes={})
    return str(path)


@pytest.fixture(scope="module")
def lora_run(folder) -> config.Run:
    return micro_run.run(
        data__train=folder, lora__dropout=0.0, optim__b1=0.0, optim__clip_norm=NEVER
    )


@dataclasses.dataclass
class Made:
    """A compiled step with its arguments."""

    run: config.Run
    mesh: jax.sharding.Mesh
    graph: Any
    trainable: Any
    frozen: Any
    train_step: Any


@pytest.fixture(scope="module")
def steps(lora_run):
    """Return steps by mesh, each compiled on first use, with the same weights."""
    with jax.set_mesh(sharding.make_mesh(lora_run.mesh)):
        model = chameleon.create_model(
            lora_run.model, lora_run.vocab, lora_run.lora, key=jax.random.key(0)
        )
    rng = np.random.default_rng(0)  # B is not zero, so that A has gradients
    noise = lambda x: 0.1 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    named = safetensors_file.flatten_named(model).items()
    leaves = [noise(x) if name.endswith("lora_b") else np.asarray(x) for name, x in named]

    @functools.cache
    def on(shape: tuple[int, int, int], run: config.Run = lora_run) -> Made:
        m = sharding.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))
        with jax.set_mesh(m):
            like = chameleon.abstract_model(run.model, run.vocab, run.lora)
            put = [
                jax.device_put(x, s.sharding)
                for x, s in zip(leaves, jax.tree.leaves(like), strict=True)
            ]
            placed = jax.tree.unflatten(jax.tree.structure(like), put)
            graph, trainable, frozen = step.split_trainable(placed, run.train.trains)
            batch = sharding.shard_batch(first_batch(run), m)
            state = step.init_state(trainable, run)
            lowered = step.make_train_step(graph, run).lower(state, frozen, batch, key())
            return Made(run, m, graph, trainable, frozen, lowered.compile(QUICK))

    return on


def key() -> jax.Array:
    return jax.random.key(7)


def numpy(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in safetensors_file.flatten_named(tree).items()}


def weighing(run: config.Run, choice: str, **data: object) -> config.Run:
    train = dataclasses.replace(run.train, loss_weight=choice)
    return dataclasses.replace(run, train=train, data=dataclasses.replace(run.data, **data))


def first_batch(run: config.Run) -> Batch:
    return loader.train_batches(run, run.data.train).batch(0)


def documents_of(batch: Batch, run: config.Run) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return tokens and marks of the documents of a batch, from the records.

    They are looked up by their tokens, complete or as a stream of condition dropout.
    """
    records, by_tokens = loader.train_batches(run, run.data.train).records, {}
    for d in records:
        by_tokens[d.tokens.tobytes()] = loss_mask(d.tokens, run.data.mask, d.turns)
        if is_image(d.tokens, run.vocab)[by_tokens[d.tokens.tobytes()]].any():
            for stream in (UNCONDITIONAL, IMAGE_ONLY, TEXT_ONLY):
                tokens, scored = trained_tokens(d, stream, records, run.data.mask)
                by_tokens.setdefault(tokens.tobytes(), scored)
    rows = zip(batch.ids, batch.segments, strict=True)
    found = [ids[segments == n] for ids, segments in rows for n in range(1, segments.max() + 1)]
    return [(tokens, by_tokens[tokens.tobytes()]) for tokens in found]


def gradient(steps: Made, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and gradients of one real step on `batch`."""
    with jax.set_mesh(steps.mesh):
        batch = sharding.shard_batch(batch, steps.mesh)
        state = step.init_state(jax.tree.map(jnp.copy, steps.trainable), steps.run)  # is donated
        state, sums = steps.train_step(state, steps.frozen, batch, key())
    return float(jax.device_get(sums).loss.total), numpy(state.opt_state[1][0].mu)


def alone(
    steps: Made, documents: list[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[int, float, dict]]:
    """Return (scored tokens, mean NLL, its gradient) of each document alone, from full logits.

    `documents`: tokens, and which are scored.
    """
    run = steps.run

    def mean_nll(trainable, ids, targets, mask):
        model = nnx.merge(steps.graph, trainable, steps.frozen)
        positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        log_p = jax.nn.log_softmax(
            model.logits(model.hidden(ids, ids * 0 + 1, positions, key=None))
        )
        hit = targets[..., None] == jnp.arange(run.vocab.size)
        return (mask * -jnp.where(hit, log_p, 0).sum(-1)).sum() / mask.sum()

    results = []
    with jax.set_mesh(steps.mesh):
        call = jax.jit(jax.value_and_grad(mean_nll), compiler_options=QUICK)
        for tokens, marks in documents:
            padding = run.data.seq_len - len(tokens)
            ids = np.pad(tokens, (0, padding))
            targets, mask = (
                np.pad(tokens[1:], (0, padding + 1)),
                np.pad(marks[1:], (0, padding + 1)),
            )
            arrays = (jnp.asarray(x[None]) for x in (ids, targets, mask.astype(np.float32)))
            value, grads = call(steps.trainable, *arrays)
            results.append((int(marks.sum()), float(value), numpy(grads)))
    return results


def expected(parts: list[tuple[int, float, dict]], choice: str) -> tuple[float, dict]:
    """Return the mean over documents, or over all their tokens, of the separate results."""
    return expected_with([1 if choice == "document" else count for count, *_ in parts], parts)


def expected_with(weights: list[float], parts: list[tuple[int, float, dict]]) -> tuple[float, dict]:
    """Return the weighted mean of the separate results."""
    shares, names = np.array(weights, float) / np.sum(weights), parts[0][2]
    loss = sum(s * value for s, (_, value, _) in zip(shares, parts, strict=True))
    sums = {
        n: sum(s * grads[n].astype(float) for s, (*_, grads) in zip(shares, parts, strict=True))
        for n in names
    }
    return loss, sums


def distance(actual: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    """Return the largest error of any adapter, relative to its largest entry."""
    return max(np.abs(actual[n] - right[n]).max() / np.abs(right[n]).max() for n in right)


@pytest.fixture(scope="module")
def reference(steps, lora_run):
    """Return by loss_weight (loss, gradients) of the first packed batch, document by document."""
    documents = documents_of(first_batch(lora_run), lora_run)
    assert len(documents) > lora_run.data.batch_size  # several a row
    parts = alone(steps(ONE), documents)
    assert max(c for c, *_ in parts) > 3 * min(c for c, *_ in parts)  # the choices differ
    return {choice: expected(parts, choice) for choice in WEIGHTS}


@pytest.mark.parametrize("choice", WEIGHTS)
@pytest.mark.parametrize("shape", [ONE, (2, 2, 2), *SLOW_MESHES])
def test_packed_and_sharded_gradients_are_the_mean_over_documents(
    steps, lora_run, reference, shape, choice
):
    loss, grads = gradient(steps(shape), first_batch(weighing(lora_run, choice)))
    right_loss, right = reference[choice]
    np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
    assert set(grads) == set(right)
    assert distance(grads, right) < 1e-5


@pytest.mark.parametrize("choice", WEIGHTS)
@pytest.mark.parametrize("shape, pieces", [((1, 1, 1), 4), ((2, 2, 2), 2)])
def test_accumulated_gradients_are_the_same(steps, lora_run, reference, shape, pieces, choice):
    optim = dataclasses.replace(lora_run.optim, accumulate=pieces)
    run = dataclasses.replace(lora_run, optim=optim)
    loss, grads = gradient(steps(shape, run), first_batch(weighing(run, choice)))
    right_loss, right = reference[choice]
    np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
    assert distance(grads, right) < 1e-5


@pytest.mark.parametrize("choice", WEIGHTS)
def test_unpacked_rows_have_the_same_objective(steps, lora_run, choice):
    run = weighing(lora_run, choice, pack=False)
    batch = first_batch(run)
    assert batch.segments.max() == 1
    right_loss, right = expected(alone(steps(ONE), documents_of(batch, run)), choice)
    loss, grads = gradient(steps(ONE), batch)
    np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
    assert distance(grads, right) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_streams_of_condition_dropout_have_their_own_gradients(steps, lora_run, pack):
    """Packed or not, on any mesh: the mean over documents, each alone as its guidance stream."""
    dropout = config.ConditionDropout(text=0.4, image=0.0, all=0.4)
    run = weighing(lora_run, "document", condition_dropout=dropout, pack=pack)
    batch = loader.train_batches(run, run.data.train).batch(1)
    documents = documents_of(batch, run)
    assert sum(len(tokens) == 6 for tokens, _ in documents) >= 2  # BOS, BOI and four codes
    right_loss, right = expected(alone(steps(ONE), documents), "document")
    for shape in (ONE, (2, 2, 2)) if pack else (ONE,):
        loss, grads = gradient(steps(shape), batch)
        np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
        assert distance(grads, right) < 1e-5


@pytest.fixture(scope="module")
def weighted_reference(steps, lora_run):
    """Return by loss_weight (loss, gradients) with FACTORS, document by document."""
    documents = documents_of(first_batch(lora_run), lora_run)
    tasks = {d.tokens.tobytes(): d.task for d in loader.train_batches(
        lora_run, lora_run.data.train).records}  # fmt: skip
    of_task, factors = config.task_weights(FACTORS), []
    for tokens, scored in documents:
        modality = np.where(is_image(tokens, lora_run.vocab), FACTORS.image, FACTORS.text)
        factors.append(scored * modality * of_task.get(tasks[tokens.tobytes()], 1.0))
    parts = alone(steps(ONE), [(t, f) for (t, _), f in zip(documents, factors, strict=True)])
    results = {}
    for choice in WEIGHTS:
        lengths = [scored.sum() if choice == "document" else 1 for _, scored in documents]
        shares = [f.sum() / n for f, n in zip(factors, lengths, strict=True)]
        results[choice] = expected_with(shares, parts)
    return results


@pytest.mark.parametrize("choice", WEIGHTS)
@pytest.mark.parametrize("shape", [ONE, (2, 2, 2)])
def test_factors_of_modality_and_task_weigh_gradients(
    steps, lora_run, reference, weighted_reference, shape, choice
):
    run = weighing(lora_run, choice)
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, weights=FACTORS))
    batch = first_batch(run)
    assert batch.weights.sum() == pytest.approx(1, rel=1e-5)
    loss, grads = gradient(steps(shape), batch)
    right_loss, right = weighted_reference[choice]
    np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
    assert distance(grads, right) < 1e-5
    assert distance(grads, reference[choice][1]) > 1e-2


def test_equal_factors_change_nothing(lora_run):
    """Bit for bit: factors of 1, and where all tasks have the same factor, up to rounding."""
    plain = first_batch(lora_run)
    for weights, exact in (
        (config.LossWeights(text=1.0, image=1.0, tasks="VQA=1", pseudo=1.0), True),
        (config.LossWeights(text=3.0, image=3.0, tasks="", pseudo=1.0), False),
        (
            config.LossWeights(
                text=1.0, image=1.0, tasks="VQA=7, Visual Chat=7, Image Generation=7", pseudo=1.0
            ),
            False,
        ),
    ):
        run = dataclasses.replace(
            lora_run, loss=dataclasses.replace(lora_run.loss, weights=weights)
        )
        weighted = first_batch(run).weights
        np.testing.assert_allclose(weighted, plain.weights, rtol=0 if exact else 1e-6)


def test_validation_is_unweighted(lora_run):
    loss = dataclasses.replace(lora_run.loss, weights=FACTORS)
    run = dataclasses.replace(lora_run, loss=loss)
    ours, theirs = (loader.eval_batches(r, r.data.train).batch(0) for r in (run, lora_run))
    np.testing.assert_array_equal(ours.weights, theirs.weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dict(tasks="VQ=2"), "weights.tasks is 'VQ=2': .* has no task 'VQ'; use names from Image"),
        (dict(tasks="VQA=0, Visual Chat=0, Image Generation=0"), "has weight 0, so nothing would"),
    ],
)
def test_weights_without_effect_are_refused(lora_run, weights, message):
    weights = dataclasses.replace(config.LossWeights.off(), **weights)
    run = dataclasses.replace(lora_run, loss=dataclasses.replace(lora_run.loss, weights=weights))
    with pytest.raises(RecordsError, match=message):
        loader.train_batches(run, run.data.train)


def rows_equal(batch: Batch) -> np.ndarray:
    """Use the mean over rows of the mean over a row's documents: the average of row losses."""
    weights = np.zeros_like(batch.weights)
    for r, segments in enumerate(batch.segments):
        for n in range(1, segments.max() + 1):
            inside = (segments == n) & (batch.weights[r] > 0)
            weights[r, inside] = 1 / (inside.sum() * segments.max() * len(batch.ids))
    return weights


def rows_by_tokens(batch: Batch) -> np.ndarray:
    """Use the mean over rows of the mean over a row's tokens: an unweighted packed loss."""
    marks = batch.weights > 0
    return marks / (marks.sum(1, keepdims=True) * len(marks))


def halves_by_tokens(batch: Batch) -> np.ndarray:
    """Use the mean over two halves of each half's token mean: naive accumulation or devices."""
    marks = (batch.weights > 0).reshape(2, -1)
    return (marks / (2 * marks.sum(1, keepdims=True))).reshape(batch.weights.shape)


def all_tokens(batch: Batch) -> np.ndarray:
    """Train questions like answers."""
    inside = (batch.segments > 0) & (batch.positions > 0)
    return inside / inside.sum()


def late(batch: Batch) -> np.ndarray:
    """Shift each weight by one position."""
    return np.roll(batch.weights, 1, axis=1)


WRONG = [rows_equal, rows_by_tokens, halves_by_tokens, all_tokens, late]


@pytest.mark.parametrize("choice", WEIGHTS)
@pytest.mark.parametrize("mutate", WRONG)
def test_wrong_weightings_are_detected(steps, lora_run, reference, mutate, choice):
    """Each is a known error; the comparison above would fail by a large margin."""
    batch = first_batch(weighing(lora_run, choice))
    wrong = dataclasses.replace(batch, weights=mutate(batch).astype(np.float32))
    _, grads = gradient(steps(ONE), wrong)
    assert distance(grads, reference[choice][1]) > 1e-2


def test_loss_weight_choices_differ(reference):
    assert distance(reference["token"][1], reference["document"][1]) > 1e-2
