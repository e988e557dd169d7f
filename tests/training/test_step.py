"""One step: the same on every mesh, only trained weights change, dropout depends on the step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import micro_run
import numpy as np
import pytest

from medmax_jax import config, sharding
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.data import loader
from medmax_jax.models import chameleon
from medmax_jax.training import metrics, step
from medmax_jax.training.batch import Batch

QUICK = {"xla_backend_optimization_level": 0}  # compile time is what these tests cost
ALL_AXES = (2, 2, 2)
SLOW_MESHES = [pytest.param(m, marks=pytest.mark.slow) for m in ((1, 8, 1), (1, 2, 4))]


@dataclasses.dataclass
class Setup:
    """A compiled step with everything that it takes."""

    run: config.Run
    mesh: jax.sharding.Mesh
    graph: Any
    state: step.TrainState
    frozen: Any
    batch: Batch
    train_step: Any

    def fresh(self) -> step.TrainState:
        """A copy of the first state, since a step donates its own."""
        return jax.tree.map(jnp.copy, self.state)


def key() -> jax.Array:
    return jax.random.key(7)


def setup(run: config.Run, model: chameleon.Chameleon, shape: tuple[int, int, int]) -> Setup:
    """`model`'s weights on another mesh, and the first batch of the run."""
    m = sharding.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tp=shape[2]))
    with jax.set_mesh(m):
        like = chameleon.abstract_model(run.model, run.vocab, run.lora)
        shards, structure = jax.tree.flatten(like)  # its settings may differ from the model's
        leaves = zip(jax.tree.leaves(model), shards, strict=True)
        placed = structure.unflatten([jax.device_put(np.asarray(x), s.sharding) for x, s in leaves])
        graph, trainable, frozen = step.split_trainable(placed, run.train.trains)
        state = step.init_state(trainable, run)
        batch = sharding.shard_batch(loader.train_batches(run, run.data.train).batch(0), m)
        lowered = step.make_train_step(graph, run).lower(state, frozen, batch, key())
        return Setup(run, m, graph, state, frozen, batch, lowered.compile(QUICK))


def take(s: Setup, state: step.TrainState) -> tuple[step.TrainState, metrics.TrainMetrics]:
    with jax.set_mesh(s.mesh):
        state, sums = s.train_step(state, s.frozen, s.batch, key())
    return state, metrics.to_host(sums)


def numpy(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in safetensors_file.flatten_named(tree).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return micro_run.write(tmp_path_factory.mktemp("records") / "r")


@pytest.fixture(scope="module")
def lora_run(folder) -> config.Run:
    return micro_run.run(data__train=folder, optim__warmup_ratio=0.0, train__steps=100)


@pytest.fixture(scope="module")
def model(lora_run) -> chameleon.Chameleon:
    """Random weights; B is not zero, so that A has gradients and dropout shows."""
    run = lora_run
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        model = chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    named = safetensors_file.flatten_named(model)
    leaves = [noise(x) if name.endswith("lora_b") else x for name, x in named.items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


@pytest.fixture(scope="module")
def lora(lora_run, model) -> Setup:
    return setup(lora_run, model, (1, 1, 1))


@pytest.mark.parametrize("shape", [ALL_AXES, *SLOW_MESHES])
def test_a_step_is_the_same_on_every_mesh(lora, lora_run, model, shape):
    """Loss, gradient norm, every updated adapter and moment, dropout included."""
    other = setup(lora_run, model, shape)
    (expected, sums), (actual, other_sums) = take(lora, lora.fresh()), take(other, other.fresh())
    for name, value in metrics.compute_means(sums).items():
        np.testing.assert_allclose(
            metrics.compute_means(other_sums)[name], value, rtol=1e-5, err_msg=name
        )
    expected, actual = numpy(expected), numpy(actual)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        # Adam's first update is lr * sign(g), so a gradient near 0 may turn: hence the moments
        # tightly, and the parameters within 1e-5 of lr 1e-2 wherever the gradient is not noise.
        if name.startswith("trainable"):
            moment = expected[name.replace("trainable", "opt_state.1.0.mu")]
            sure = np.abs(moment) > 1e-7
            assert sure.mean() > 0.9, name
            np.testing.assert_allclose(actual[name][sure], value[sure], atol=2e-5, err_msg=name)
        else:
            atol = 1e-5 * max(np.abs(value).max(), 1e-12)
            np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=atol, err_msg=name)


def test_only_adapters_change_and_the_state_is_donated(lora):
    state, before = lora.fresh(), numpy(lora.state)
    frozen_before = numpy(lora.frozen)
    after, _ = take(lora, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    for name, value in numpy(after).items():
        if name.startswith("trainable"):
            assert "lora_" in name and (value != before[name]).any(), name
    assert int(after.step) == 1
    for name, value in numpy(lora.frozen).items():
        assert "lora_" not in name
        np.testing.assert_array_equal(value, frozen_before[name])


def test_dropout_depends_on_the_step(lora):
    losses = [take(lora, lora.fresh())[1].loss.total for _ in range(2)]
    assert losses[0] == losses[1]
    later = dataclasses.replace(lora.fresh(), step=lora.state.step + 1)
    assert take(lora, later)[1].loss.total != losses[0]


def test_training_on_one_batch_reduces_its_loss(lora):
    state, losses = lora.fresh(), []
    for _ in range(40):
        state, sums = take(lora, state)
        losses.append(float(sums.loss.total))
    assert losses[-1] < losses[0] - 0.2
    assert sums.finite.total == 1 and sums.grad_norm.total > 0
    batch = lora.batch
    assert sums.tokens.total == np.count_nonzero(batch.segments)
    assert sums.fill.count == batch.ids.size
    assert sums.text_nll.count + sums.image_nll.count == np.count_nonzero(batch.weights)


def test_nan_weights_are_reported_as_not_finite(lora):
    broken = jax.tree.map(lambda x: x * jnp.nan, lora.fresh().trainable)
    _, sums = take(lora, dataclasses.replace(lora.fresh(), trainable=broken))
    assert sums.finite.total == 0


def test_full_training_changes_every_weight(folder):
    run = micro_run.run(
        data__train=folder, optim__warmup_ratio=0.0, train__trains="full", lora__rank=0
    )
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        model = chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))
    s = setup(run, model, (1, 1, 1))
    assert not jax.tree.leaves(s.frozen)
    before = numpy(s.state.trainable)
    after, _ = take(s, s.fresh())
    for name, value in numpy(after.trainable).items():
        assert (value != before[name]).any(), name


def test_evaluation_is_the_mean_over_all_documents(lora, tmp_path):
    """Batches of different fill, and one filled up with empty rows: the mean is over documents."""
    held_out = micro_run.write(tmp_path / "held", count=27, seed=3)
    data = {"data__train": lora.run.data.train, "data__validation": held_out}
    small, large = micro_run.run(**data), micro_run.run(**data, data__batch_size=64)
    means = []
    with jax.set_mesh(lora.mesh):
        for run in (small, large):
            batches, total = loader.eval_batches(run, held_out), None
            evaluate = step.make_eval_step(lora.graph, run)
            for i in range(len(batches)):
                batch = sharding.shard_batch(batches.batch(i), lora.mesh)
                sums = metrics.to_host(evaluate(lora.state.trainable, lora.frozen, batch))
                total = sums if total is None else total.merge(sums)
            means.append(metrics.compute_means(total))
            assert total.loss.count == 27
    assert (
        len(loader.eval_batches(small, held_out)) > 1 == len(loader.eval_batches(large, held_out))
    )
    for name, value in means[0].items():
        np.testing.assert_allclose(value, means[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("pieces", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulated_gradients_equal_those_of_the_batch(lora, lora_run, model, pieces):
    """Packed rows, weights by document, no dropout: one update of one batch and of its pieces."""
    changes = dict(lora=dataclasses.replace(lora_run.lora, dropout=0.0))
    once = dataclasses.replace(lora_run, **changes)
    changes["optim"] = dataclasses.replace(lora_run.optim, accumulate=pieces)
    full = setup(once, model, (1, 2, 1))
    accumulated = setup(dataclasses.replace(lora_run, **changes), model, (1, 2, 1))
    assert np.asarray(full.batch.segments).max() > 1  # several documents a row
    (expected, sums), (actual, part_sums) = (
        take(full, full.fresh()),
        take(accumulated, accumulated.fresh()),
    )
    for name, value in metrics.compute_means(sums).items():
        np.testing.assert_allclose(
            metrics.compute_means(part_sums)[name], value, rtol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(part_sums.kinds.total, sums.kinds.total, rtol=1e-5)
    expected, actual = numpy(expected.opt_state), numpy(actual.opt_state)
    for (
        name,
        value,
    ) in expected.items():  # the first moments are the gradients, clipped, times 1 - b1
        atol = 1e-5 * max(np.abs(value).max(), 1e-12)
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=atol, err_msg=name)


def test_full_training_in_bfloat16_keeps_fp32_weights(folder):
    """Gradients of bf16 products are near those of fp32; weights and moments stay fp32."""
    base = dict(
        data__train=folder, optim__warmup_ratio=0.0, train__trains="full", lora__rank=0,
        optim__peak_lr=1e-6,
    )  # fmt: skip
    states = {}
    for dtype in ("float32", "bfloat16"):
        run = micro_run.run(**base, model__compute_dtype=dtype)
        with jax.set_mesh(sharding.make_mesh(run.mesh)):
            model = chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))
        s = setup(run, model, (1, 1, 1))
        before = numpy(s.state.trainable)
        after, _ = take(s, s.fresh())
        states[dtype] = numpy(after.opt_state)
    moments = [n for n in states["float32"] if ".mu." in n]
    assert moments
    for name in moments:
        exact, half = states["float32"][name], states["bfloat16"][name]
        assert half.dtype == np.float32
        assert np.abs(half - exact).max() < 0.06 * np.abs(exact).max(), name
    # an update of 1e-6 would be lost in bf16 weights
    moved = {n: (v != before[n]).mean() for n, v in numpy(after.trainable).items()}
    assert moved["layers.mlp.up_proj.kernel"] > 0.9


def test_only_image_columns_of_the_head_change(folder):
    """Anole's stage on a bf16 base: fp32 columns, and one matrix again in the exported base."""
    run = micro_run.run(
        data__train=folder, optim__warmup_ratio=0.0, train__trains="image_head", lora__rank=0,
        model__param_dtype="bfloat16",
    )  # fmt: skip
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        model = chameleon.create_model(run.model, run.vocab, run.lora, key=jax.random.key(0))
    head = np.asarray(model.lm_head.kernel[...], np.float32)
    s = setup(run, model, (1, 2, 2))
    (before,) = numpy(s.state.trainable).values()
    assert before.dtype == np.float32 and before.shape == (32, 16)
    np.testing.assert_array_equal(before, head[:, 4:20])
    state, losses = s.fresh(), []
    for _ in range(10):
        state, sums = take(s, state)
        losses.append(float(sums.image_nll.total))
    assert losses[-1] < losses[0] - 0.1
    (after,) = numpy(state.trainable).values()
    assert (after != before).any(axis=0).all()
    with jax.set_mesh(s.mesh):
        trained = step.trained_base(s.graph, state.trainable, s.frozen)
    exported, original = numpy(trained), numpy(chameleon.split_adapters(model)[2])
    assert exported.keys() == original.keys()
    kernel = exported.pop("lm_head.kernel")
    assert kernel.dtype == original["lm_head.kernel"].dtype
    np.testing.assert_array_equal(kernel[:, 4:20], after.astype(kernel.dtype))
    np.testing.assert_array_equal(
        np.delete(kernel, np.s_[4:20], 1), np.delete(head, np.s_[4:20], 1)
    )
    for name, value in exported.items():
        np.testing.assert_array_equal(value, original[name], err_msg=name)
