"""Defines one training step and one evaluation step as pure functions of state and batch.

    state  --donated-->  train_step  -->  state'         trainable, optimizer, step + 1
    frozen, batch, key ---^        \\-->  TrainMetrics   sums of this step, still on the device

`frozen` has the weights that are not trained. `split_trainable` alone decides what trains: the
adapters, the complete model, or the image columns of its head (Anole's stage). Dropout of step s is
drawn from fold_in(key, s), so a resumed run draws what the uninterrupted one would have drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray, PyTree

from medmax_jax import sharding
from medmax_jax.config import Run
from medmax_jax.models import attention, chameleon
from medmax_jax.sharding import BATCH, with_shardings
from medmax_jax.training import loss, optimizer, stages
from medmax_jax.training.batch import Batch
from medmax_jax.training.metrics import LOWEST, PARAMETER_NORMS, EvalMetrics, TrainMetrics

# Options of libtpu by config.train.compile.
COMPILER_OPTIONS = {
    "default": {},
    # The weights of a layer are gathered completely, while the previous layer computes, instead of
    # in a ring of partial products: docs/explanation/performance.md.
    "gather": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds everything that changes in training, and everything that a checkpoint needs."""

    trainable: PyTree
    opt_state: PyTree
    step: Any  # int32 [], updates made; jit also builds this class with values that are not arrays


def check(run: Run, mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError on settings that the devices of `mesh` cannot run."""
    platform = mesh.devices.flat[0].platform
    attention.check_platform(run.model.attention, platform)
    if COMPILER_OPTIONS[run.train.compile] and platform != "tpu":
        raise ValueError(
            f"config.train.compile is {run.train.compile!r}, which requires TPUs; the devices "
            f"are {platform}, so use 'default'"
        )


def split_trainable(model: chameleon.Chameleon, trains: str) -> tuple[Any, PyTree, PyTree]:
    """Return (graph, trainable, frozen) of a model, abstract or not; `nnx.merge` inverts this."""
    if trains == "image_head":
        make = chameleon.with_image_columns
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model))
        tuned = with_shardings(jax.eval_shape(make, model)) if abstract else make(model)
        return nnx.split(tuned, chameleon.ImageColumns, ..., graph=False)
    graph, adapters, base = chameleon.split_adapters(model)
    return (graph, adapters, base) if trains == "lora" else (graph, base, adapters)


def trained_base(graph: Any, trainable: PyTree, frozen: PyTree) -> PyTree:
    """Return the base after training, for export; trained image columns are put into the head."""
    model = nnx.merge(graph, trainable, frozen)
    if model.lm_head.tuned:
        model = chameleon.without_image_columns(model)
    return chameleon.split_adapters(model)[2]


def init_state(trainable: PyTree, run: Run) -> TrainState:
    """Return the state of step 0; the moments are initialized in the shards of their parameters."""

    def make(trainable: PyTree) -> tuple[PyTree, Array]:
        tx = optimizer.make_optimizer(run.optim, steps=stages.schedule(run))
        return tx.init(trainable), jnp.int32(0)

    return TrainState(trainable, *jax.jit(make)(trainable))


def make_train_step(graph: Any, run: Run, stage: int = 0) -> Callable:
    """Return train_step(state, frozen, batch, key) -> (state, TrainMetrics).

    The function is jitted, and `state` is donated. Stages that train the same parameters have the
    same function: what else they change is in the batch.
    """
    steps, only = stages.schedule(run), stages.trains(run, stage)
    tx = optimizer.make_optimizer(run.optim, steps=steps)

    def train_step(
        state: TrainState, frozen: PyTree, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, TrainMetrics]:
        dropout = jax.random.fold_in(key, state.step)

        def objective(trainable: PyTree, batch: Batch, key: PRNGKeyArray) -> tuple[Array, tuple]:
            model = nnx.merge(graph, trainable, frozen)
            return loss.training_objective(
                model, batch, key,
                trains=run.train.trains, z=run.loss.z, residual_dropout=run.train.residual_dropout,
            )  # fmt: skip

        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        if run.optim.accumulate == 1:
            (total, (sums, maxima)), grads = value_and_grad(state.trainable, batch, dropout)
        else:
            total, sums, maxima, grads = accumulate(
                value_and_grad, state.trainable, batch, dropout, run
            )
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, value=total)
        skipped = optimizer.consecutive_skips(opt_state)
        updated = optax.apply_updates(state.trainable, updates)
        trainable = stages.keep_others(updated, state.trainable, only)
        metrics = TrainMetrics.single_from_model_output(
            **sums,
            **maxima,
            **parameter_norms(trainable, run.train.trains),
            loss=total - sums["z_loss"],
            grad_norm=norm,
            finite=jnp.where(
                skipped > 0, skipped < optimizer.LIMIT, jnp.isfinite(total) & jnp.isfinite(norm)
            ),
            skipped=skipped > 0,
            lr=optimizer.learning_rate(state.step, run.optim, steps=steps),
            tokens=(batch.segments > 0).sum(dtype=jnp.float32),
            positions=jnp.float32(batch.ids.size),
            steps=jnp.float32(1),
        )
        return TrainState(trainable, opt_state, state.step + 1), metrics

    options = COMPILER_OPTIONS[run.train.compile] or None
    return sharding.jit(train_step, donate_argnums=0, compiler_options=options)


def accumulate(
    value_and_grad: Callable, trainable: PyTree, batch: Batch, key: PRNGKeyArray, run: Run
) -> tuple[Array, dict[str, Array], dict[str, Array], PyTree]:
    """Return (loss, sums, maxima, gradients) of a batch, computed one microbatch at a time.

    The activations of only one microbatch exist at any time. The weights of the batch are shares of
    all of it, so losses and gradients add up. Microbatch i has rows [i * B / n, (i + 1) * B / n)
    for any mesh, and its own dropout.
    """
    microbatches = run.optim.accumulate

    def split(x: Array) -> Array:  # [n, B / n, T]; a few bytes per token, so every device gets all
        replicated = jax.sharding.reshard(x, P(None, None))
        return jax.sharding.reshard(
            replicated.reshape(microbatches, -1, x.shape[1]), P(None, *BATCH)
        )

    def body(grads: PyTree, xs: tuple) -> tuple[PyTree, tuple]:
        (total, reports), microbatch_grads = value_and_grad(trainable, *xs)
        return jax.tree.map(jnp.add, grads, microbatch_grads), (total, *reports)

    xs = (jax.tree.map(split, batch), jax.random.split(key, microbatches))
    grads, parts = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, trainable), xs)
    total, sums = jax.tree.map(lambda x: x.sum(0), parts[:2])
    maxima = jax.tree.map(lambda x: x.max(0), parts[2])
    return total, sums, maxima, grads


def parameter_norms(trainable: PyTree, trains: str) -> dict[str, Array]:
    """Return the L2 norms of all A and of all B matrices, or of all parameters that train.

    The others are LOWEST.
    """
    norms = dict.fromkeys(PARAMETER_NORMS, jnp.float32(LOWEST))
    if trains != "lora":
        return norms | {"param_norm": optax.tree.norm(trainable)}
    named = jax.tree_util.tree_leaves_with_path(trainable)
    for name in ("lora_a", "lora_b"):
        norms[f"{name}_norm"] = optax.tree.norm(
            [leaf for path, leaf in named if name in jax.tree_util.keystr(path)]
        )
    return norms


def make_eval_step(graph: Any, run: Run) -> Callable:
    """Return eval_step(trainable, frozen, batch) -> EvalMetrics; jitted, without dropout."""

    def eval_step(trainable: PyTree, frozen: PyTree, batch: Batch) -> EvalMetrics:
        model = nnx.merge(graph, trainable, frozen)
        total, (sums, _) = loss.training_objective(model, batch, None, trains=run.train.trains)
        # A batch's loss is a mean over this many, so the mean over batches is the one over all.
        documents = batch.segments.max(axis=1).sum().astype(jnp.float32)
        targets = sums["text_count"] + sums["image_count"]
        share = documents if run.train.loss_weight == "document" else targets
        return EvalMetrics.single_from_model_output(
            **sums, weighted_loss=total * share, share=share
        )

    return sharding.jit(eval_step)


def abstract_batch(run: Run) -> Batch:
    """Return the shapes and shardings of a global batch on the ambient mesh, to compile for."""
    shape = (run.data.batch_size, run.data.seq_len)
    dtypes = {"weights": jnp.float32}
    rows = [
        jax.ShapeDtypeStruct(
            shape,
            dtypes.get(f.name, jnp.int32),
            sharding=NamedSharding(jax.sharding.get_mesh(), BATCH),
        )
        for f in dataclasses.fields(Batch)
    ]
    return Batch(*rows)
