"""Starts a run: checks before anything is loaded, the lock, the state to resume from; exports it.

checked -> open_workdir -> mesh, data, run_metadata
    -> restore_checkpoint (one that checkpoints/resume.py accepts) -> load_or_init_weights
dry_run: the same from shapes alone, up to the compiled first step
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from medmax_jax import cli, config
from medmax_jax.checkpoints import export
from medmax_jax.checkpoints.barriers import barrier
from medmax_jax.checkpoints.manager import NAME, CheckpointManager, DamagedError
from medmax_jax.checkpoints.resume import check_meta
from medmax_jax.models import chameleon
from medmax_jax.sharding import make_mesh, shard_batch, with_shardings
from medmax_jax.storage import hub
from medmax_jax.storage.workdir import Workdir
from medmax_jax.training import log_writer, reporting, stages, step
from medmax_jax.training.batch import BatchSource
from medmax_jax.training.reporting import TrainError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Holds the options of this start of a run, which are not settings of the run."""

    extend: bool = False  # train.steps may be more than the checkpoint's
    dry_run: bool = False
    profile: tuple[int, int] | None = None  # the first and the last step of a trace
    wandb: str = ""  # the project
    listed_hosts: tuple[str, ...] = ()  # for credentialed data
    on_metrics: Callable[[int, dict[str, float]], None] | None = None  # called with each row


DEFAULT_OPTIONS = Options()


def checked(run: config.Run, options: Options) -> config.Run:
    """Return the run with each hf:// address at its commit; what it names is downloaded.

    Raises ConfigError before that for invalid settings that are detectable.
    """
    config.check(run)
    steps = options.profile
    if steps and not 1 <= steps[0] <= steps[1] <= run.train.steps:
        raise config.ConfigError(
            f"--profile_steps={steps[0]}:{steps[1]} is out of range; use FIRST:LAST with "
            f"1 <= FIRST <= LAST <= train.steps = {run.train.steps}"
        )
    if run.train.samples and jax.process_count() > 1:
        raise config.ConfigError(
            f"config.train.samples is {run.train.samples}; it must be 0 with "
            f"{jax.process_count()} hosts; generate samples from the adapter on one host"
        )
    data = {name: hub.pinned(getattr(run.data, name)) for name in ("train", "validation")}
    weights = hub.pinned(run.train.init_from)
    run_stages = tuple(
        dataclasses.replace(stage, records=hub.pinned(stage.records)) for stage in run.stages
    )
    return dataclasses.replace(
        run,
        stages=run_stages,
        data=dataclasses.replace(run.data, **data),
        train=dataclasses.replace(run.train, init_from=weights),
    )


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike) -> Iterator[Workdir]:
    """Open the folder of a run, which no other process may write."""
    # Orbax writes the checkpoints to a bucket itself.
    with cli.open_workdir(path, own="metrics.jsonl", skip=(f"{NAME}/*",)) as work:
        barrier("the workdir is open")  # the first host may wait for the lease of a dead process
        with workdir_lock(work.folder.absolute()):
            yield work


@contextlib.contextmanager
def workdir_lock(folder: pathlib.Path) -> Iterator[None]:
    """Lock `folder`, so that a second run cannot write to it; raise TrainError if it is locked.

    The operating system releases the lock when the process ends.
    """
    first = jax.process_index() == 0  # before the file: finding the devices takes seconds
    with open(folder / ".lock", "w") as file:
        if first and not _try_lock(file):
            raise TrainError(
                f"--workdir {folder} is in use by another run; wait for it or use another folder"
            )
        yield


def _try_lock(file: IO[str]) -> bool:
    """Return whether the lock was free; `sweep status` may hold it for an instant."""
    for _ in range(4):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def as_config_error(make: Callable[[], Any]) -> Any:
    """Return the value of `make`; raise ConfigError for its ValueErrors, caused by the config."""
    try:
        return make()
    except ValueError as error:
        raise config.ConfigError(str(error)) from error


def restore_checkpoint(
    run: config.Run,
    like: chameleon.Chameleon,
    store: CheckpointManager,
    meta: dict[str, Any],
    options: Options,
) -> tuple[int | None, step.TrainState | None, dict[str, Any], list[str]]:
    """Restore the newest valid checkpoint: (step, state, cursor, harmless changes).

    The step and the state are None where there is no checkpoint.
    """
    shapes = step.split_trainable(like, run.train.trains)[1]
    while (start := store.latest()) is not None:
        changes = check_meta(store.meta(start), meta, extend=options.extend)
        state = with_shardings(jax.eval_shape(lambda t: step.init_state(t, run), shapes))
        try:
            return start, *store.restore(start, state), changes
        except DamagedError:
            continue  # it was renamed to damaged_*, and the log reports it
    return None, None, {"interval": [], "last": {}, "owed": False}, []


def run_metadata(run: config.Run, train_data: BatchSource) -> dict[str, Any]:
    """Return the config, versions, and fingerprints of the base weights and of the records.

    Where stages have records of their own, `stage_data` and `stage_plans` are those of each stage
    that can be loaded.
    """
    folder, of_stages = run.train.init_from, train_data.records_of_stages()
    base = f"random weights of seed {run.train.seed}, {run.train.prng_impl}"
    if folder:
        for layout in (records.layout for records in of_stages):
            export.check_base(folder, run, tokenizer=layout.tokenizer, vqgan=layout.vqgan)
        base = export.base_fingerprint(folder)
    metadata: dict[str, Any] = {name: {} for name in ("sources", "credentials")}
    for name, counts in metadata.items():
        for records in of_stages:  # pseudo records have the documents of the others, too
            counts |= {n: max(counts.get(n, 0), count) for n, count in records.meta[name].items()}
    metadata |= {
        "data": of_stages[0].fingerprint,
        "plan": train_data.plan,
        "versions": reporting.versions(),
    }
    if any(stage.records for stage in run.stages):
        metadata |= {
            "stage_data": [records.fingerprint for records in of_stages],
            "stage_plans": list(train_data.plans),
        }
    return {"config": config.to_dict(run), "base": base} | metadata


def check_hosts_agree(train_data: BatchSource) -> None:
    """Raise ConfigError on all hosts where some find the records of a stage and others do not."""
    if jax.process_count() == 1:
        return
    steps = multihost_utils.process_allgather(np.array(train_data.available))
    if steps.min() != steps.max():
        raise config.ConfigError(
            f"the hosts find records for different numbers of steps, {steps.min()} to "
            f"{steps.max()}: those of a stage are complete for some of them only; give all hosts "
            "the same folders, then run the same command again"
        )


def load_or_init_weights(
    run: config.Run, like: chameleon.Chameleon, key: jax.Array, *, restoring: bool
) -> tuple[PyTree, PyTree]:
    """Return (trainable, frozen); `trainable` is None where a checkpoint provides it."""
    trains, folder = run.train.trains, run.train.init_from
    _, like_trainable, like_frozen = step.split_trainable(like, trains)
    if restoring and trains == "full":
        return None, like_frozen  # the frozen part has no arrays
    if not folder:
        model = chameleon.create_model(run.model, run.vocab, run.lora, key=key)
        return step.split_trainable(model, trains)[1:]
    if trains == "full":
        return export.load(folder, like_trainable), like_frozen
    if trains == "image_head":
        graph, _, base = chameleon.split_adapters(like)
        model = nnx.merge(graph, export.load(folder, base))
        return step.split_trainable(model, trains)[1:]

    def adapters(key: jax.Array) -> PyTree:  # under jit, so the random base is never created
        model = chameleon.Chameleon(run.model, run.vocab, run.lora, key=key)
        return nnx.split(model, nnx.LoRAParam, ..., graph=False)[1]

    return None if restoring else jax.jit(adapters)(key), export.load(folder, like_frozen)


def wandb_sink(
    run: config.Run,
    options: Options,
    folder: pathlib.Path,
    meta: dict[str, Any],
    stack: contextlib.ExitStack,
) -> Callable[[int, dict[str, float]], None] | None:
    """Return a function that sends rows of metrics to Weights & Biases; None without --wandb."""
    if not options.wandb or jax.process_index():
        return None
    send, close = log_writer.init_wandb(
        options.wandb, run, name=folder.name, folder=str(folder), credentials=meta["credentials"],
        listed=options.listed_hosts, environment=os.environ,
    )  # fmt: skip
    stack.callback(close)
    return send


def dry_run(
    run: config.Run, load_data: Callable[[], tuple[BatchSource, BatchSource | None]]
) -> dict[str, Any]:
    """Run everything up to the compiled first step, from shapes alone."""
    try:
        mesh = make_mesh(run.mesh)
    except ValueError as error:
        raise config.ConfigError(
            f"{error}; to compile for a machine that is not available: python -m medmax_jax.plan "
            "--config=... --topology=v5e:4x4"
        ) from error
    as_config_error(lambda: step.check(run, mesh))
    with jax.set_mesh(mesh):
        train_data, eval_data = load_data()
        reporting.environment_summary(run, mesh, train_data, eval_data, log=print)
        print(f"base: {run_metadata(run, train_data)['base']}")
        abstract_model = as_config_error(
            lambda: chameleon.abstract_model(run.model, run.vocab, run.lora)
        )
        graph, trainable, frozen = step.split_trainable(abstract_model, run.train.trains)
        stages.check_trains(run, trainable)
        state = with_shardings(jax.eval_shape(lambda t: step.init_state(t, run), trainable))
        counts = [chameleon.count_parameters(t) for t in (state.trainable, frozen)]
        print(f"training {run.train.trains}: {counts[0]:,} of {sum(counts):,} parameters")
        for stage in stages.facts(run, trainable):
            print(stages.describe(stage))
        batch = shard_batch(train_data.batch(0), mesh)
        key = jax.device_put(
            jax.random.key(run.train.seed, impl=run.train.prng_impl), NamedSharding(mesh, P())
        )
        train_step = step.make_train_step(graph, run)
        memory = reporting.memory_summary(
            train_step.lower(state, with_shardings(frozen), batch, key).compile()
        )
    print(
        f"compiled the first step; {memory}\ndry run: no weights were loaded, no files were written"
    )
    return {"memory": memory}


def parse_step_range(text: str) -> tuple[int, int] | None:
    """Return the two numbers of 3:5; None for an empty text."""
    first, colon, last = text.partition(":")
    if not text:
        return None
    if not (colon and first.isdigit() and last.isdigit()):
        raise config.ConfigError(
            f"--profile_steps={text} is not a range of steps; write FIRST:LAST, for example 10:12"
        )
    return int(first), int(last)


def export_result(
    job: reporting.TrainContext, state: step.TrainState, done: int, suffix: str
) -> str:
    """Write the adapter or the model after `done` steps; return its path."""
    run, metadata = job.run, job.meta | {"step": done}
    job.checkpoints.wait()
    if non_finite := _count_non_finite(state.trainable):
        raise TrainError(
            f"{non_finite} trained parameters are not finite, so nothing was exported; restart "
            f"from an earlier step of {job.work.url('checkpoints')} with a lower optim.peak_lr"
        )
    if run.train.trains == "lora":
        target = job.work.url(f"adapter{suffix}")
        export.adapter(job.work.folder / f"adapter{suffix}", state.trainable, run, metadata)
    else:
        name = f"model{suffix}"
        target, folder = job.work.url(name), job.work.folder / name
        base = step.trained_base(job.graph, state.trainable, job.frozen)
        for name in export.model(folder, base, run, data=metadata["data"], step=metadata["step"]):
            job.writer.log(f"{target} has no {name}: config.train.init_from does not contain one")
    return target


def _count_non_finite(tree: PyTree) -> int:
    count = jax.jit(lambda t: sum((~jnp.isfinite(x)).sum() for x in jax.tree.leaves(t)))
    return int(count(tree))
