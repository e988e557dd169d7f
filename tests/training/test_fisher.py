"""Tests of the Fisher information: against dense eigenvalues, alone against packed, on meshes."""

import json

import jax
import micro_run
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_step_sharding import filled

from medmax_jax import config, sharding, train
from medmax_jax.data import loader
from medmax_jax.models import chameleon
from medmax_jax.training import fisher, loss, step
from medmax_jax.training.batch import Batch

SIZES = dict(model__num_heads=8, model__num_kv_heads=4, model__head_dim=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> config.Run:
    folder = micro_run.write(tmp_path_factory.mktemp("records") / "r", count=120)
    return micro_run.run(data__train=folder, data__seq_len=64, **SIZES)


def gram_on(run: config.Run, shape: tuple[int, int, int]) -> np.ndarray:
    mesh = sharding.make_mesh(config.Mesh(**dict(zip(("data", "fsdp", "tp"), shape, strict=True))))
    with jax.set_mesh(mesh):
        model = filled(chameleon.abstract_model(run.model, run.vocab, run.lora))
        graph, trainable, frozen = step.split_trainable(model, "lora")
        data = loader.train_batches(run, run.data.train)
        places, _ = fisher.places(data.documents_of_rows(0))
        places = jax.device_put(places, NamedSharding(mesh, P()))
        batch = sharding.shard_batch(data.batch(0), mesh)
        return np.asarray(fisher.make_gram(graph, run)(trainable, frozen, batch, places))


@pytest.fixture(scope="module")
def gram(run) -> np.ndarray:
    return gram_on(run, (1, 1, 1))


def alone(run: config.Run) -> np.ndarray:
    """Return the flat gradients of the documents, each computed alone in a row from position 0."""
    with jax.set_mesh(sharding.make_mesh(config.Mesh(data=1, fsdp=1, tp=1))):
        model = filled(chameleon.abstract_model(run.model, run.vocab, run.lora))
        graph, trainable, frozen = step.split_trainable(model, "lora")
        data = loader.train_batches(run, run.data.train)
        batch = data.batch(0)
        places, numbers = fisher.places(data.documents_of_rows(0))

        @jax.jit
        def gradient(one: Batch):
            def objective(trainable):
                model = nnx.merge(graph, trainable, frozen)
                return loss.training_objective(model, one, None, trains="lora")[0]

            return jax.grad(objective)(trainable)

        rows = []
        for row, segment in zip(*places, strict=True):
            if not segment:
                break
            here = batch.segments[row] == segment
            parts = {}
            for name in ("ids", "segments", "positions", "weights", "kinds"):
                values = getattr(batch, name)[row][here]
                parts[name] = np.zeros((1, 64), values.dtype)
                parts[name][0, : len(values)] = values
            parts["segments"][parts["segments"] > 0] = 1
            parts["weights"] /= parts["weights"].sum()
            tree = gradient(sharding.shard_batch(Batch(**parts), jax.sharding.get_mesh()))
            rows.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))
        assert len(rows) == len(numbers)
        return np.stack(rows).astype(np.float64)


def test_equals_dense_eigenvalues_of_documents_alone(run, gram):
    gradients = alone(run)
    n = len(gradients)
    assert n > run.data.batch_size  # packed: more documents than rows
    # The nonzero eigenvalues of F = 1/n sum g g^T are squared singular values of the gradients.
    values = np.linalg.svd(gradients, compute_uv=False) ** 2 / n
    p = values / values.sum()
    entropy, leading = -(p[p > 0] * np.log(p[p > 0])).sum(), p.max()
    row = fisher.statistics(gram, ["VQA"] * n, np.full(n, -1))
    assert row["spectral_entropy"] == pytest.approx(entropy, rel=1e-3)
    assert row["leading_share"] == pytest.approx(leading, rel=1e-3)
    products = gradients @ gradients.T / fisher.DOCUMENTS
    total = gram.sum(0)[:n, :n]
    assert np.abs(total - products).max() < 1e-4 * np.abs(products).max()


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_is_the_same_on_every_mesh(run, gram, shape):
    other = gram_on(run, shape)
    assert np.abs(other - gram).max() < 1e-4 * np.abs(gram).max()


def test_spectrum_and_cosines_of_known_gradients():
    entropy, leading = fisher.spectrum(np.diag([3.0, 1.0, 0.0]))
    assert leading == 0.75 and entropy == pytest.approx(0.5623, abs=1e-4)
    assert np.isnan(fisher.spectrum(np.zeros((2, 2)))).all()
    same = np.ones((3, 3))  # all gradients are equal: one direction
    assert fisher.spectrum(same) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 0.0]])
    cosines = fisher.task_cosines(vectors @ vectors.T, ["A", "B", "A", "A"], np.array([0, 0, 1, 1]))
    assert cosines == {"A, A/other_image": 0.0, "A, B/other_image": 0.0, "A, B/same_image": 1.0}
    none = fisher.task_cosines(vectors @ vectors.T, ["A"] * 4, np.full(4, -1))
    assert set(none) == {"A, A/other_image"}


def test_places_are_the_first_documents_of_all_rows():
    rows = [np.array([7, 8]), np.zeros(0, int), np.array([9])]
    places, numbers = fisher.places(rows)
    assert numbers.tolist() == [7, 8, 9] and len(places.rows) == fisher.DOCUMENTS
    assert places.rows[:3].tolist() == [0, 0, 2]
    assert places.segments[:4].tolist() == [1, 2, 1, 0]


def test_a_run_reports_it_and_trains_the_same(tmp_path):
    folder = micro_run.write(tmp_path / "r")
    losses = {}
    for every in (0, 2):
        settings = micro_run.run(data__train=folder, train__steps=4, train__fisher_every=every)
        train.run(settings, tmp_path / str(every))
        lines = (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[every] = [row["loss"] for row in rows if row["kind"] == "train"]
        found = [row for row in rows if row["kind"] == "fisher"]
        assert [row["step"] for row in found] == ([2, 4] if every else [])
    assert losses[0] == losses[2]
    assert 0 < found[0]["leading_share"] <= 1 and "layer_01/spectral_entropy" in found[0]
    assert "cosine/VQA, VQA/other_image" in found[0]
    assert "documents after step 2: spectral entropy" in (tmp_path / "2" / "train.log").read_text()


def test_requires_adapters():
    message = r"train\.fisher_every is 5; .*0 when train\.trains"
    with pytest.raises(config.ConfigError, match=message):
        micro_run.run(train__fisher_every=5, train__trains="full", lora__rank=0)


def test_cost_and_interval_follow_from_the_rows():
    for rows, fsdp, every, share, least in ((8, 1, 40, "10.0%", 80), (8, 8, 1_280, "2.5%", 640)):
        run = micro_run.run(data__batch_size=rows, mesh__fsdp=fsdp, train__fisher_every=every)
        line = fisher.describe_cost(run)
        assert fisher.least_interval(run) == least and f"about {share} of the time" in line
        assert ("5% or less from 80 on" in line) is (every < least)
        assert fisher.steps_per_measurement(run) / least <= fisher.SHARE
