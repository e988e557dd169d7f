"""python -m medmax_jax.train --config=configs/tiny.py --workdir=D [--config.optim.peak_lr=1e-3 ...]

Trains adapters (train.trains = lora) or a whole model (full). The same command goes on after a stop
of any kind. What is in D afterwards:

    config.json      settings, versions and fingerprints of this run
    train.log        what stdout showed           metrics.jsonl, events.out.*    the numbers
    checkpoints/     the state of the last steps  adapter/ or model/             the result
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict

from data import loader
from data.documents import RecordsError
from data.pack import PackError
from medmax_jax import chameleon, cli, config, export, metrics, step, weights
from medmax_jax.checkpoint import CheckpointError, Checkpoints, check_meta
from medmax_jax.mesh import make_mesh, placed, put_batch
from medmax_jax.storage import StorageError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "safetensors")


class TrainError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


ERRORS = (
    TrainError, cli.WorkdirError, RecordsError, PackError, CheckpointError, StorageError,
    export.ExportError, weights.WeightsError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same from the first step to the last."""

    run: config.Run
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    writer: metrics.Writer
    clock: metrics.Clock
    checkpoints: Checkpoints
    train_data: loader.Batches
    held_data: loader.Batches | None
    graph: Any  # of the model, for nnx.merge
    frozen: PyTree
    key: jax.Array  # of dropout
    meta: dict[str, Any]  # what a checkpoint must agree with


def main(settings: ConfigDict, workdir: str) -> None:
    """The program."""
    run(config.from_config_dict(settings), workdir)


def run(run: config.Run, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains to the end and exports; returns the last numbers and where the result lies.

    Raises cli.Interrupted after SIGINT or SIGTERM; calling it again goes on from there.
    """
    clock, folder = metrics.Clock(), cli.open_workdir(workdir).absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(folder))
        writer = stack.enter_context(contextlib.closing(metrics.Writer(str(folder))))
        mesh = _usable(lambda: make_mesh(run.mesh))
        stack.enter_context(jax.set_mesh(mesh))
        _usable(lambda: step.check(run, mesh))

        # ---- data
        train_data = loader.batches(run, run.data.train)
        held_data = loader.one_pass(run, run.data.validation) if run.data.validation else None

        # ---- model
        like = _usable(lambda: chameleon.abstract(run.model, run.vocab, run.lora))
        meta = _meta(run, train_data)
        key_init, key = jax.random.split(jax.random.key(run.train.seed, impl=run.train.prng_impl))
        key = jax.device_put(key, NamedSharding(mesh, P()))  # the loop moves nothing by itself

        # ---- restore
        store = Checkpoints(folder / "checkpoints", keep=run.train.keep, log=writer.log)
        stack.callback(store.close)
        start = store.latest()
        changes = [] if start is None else check_meta(store.meta(start), meta)
        trainable, frozen = _weights(run, like, key_init, restoring=start is not None)
        state, cursor = _state(run, like, trainable, store, start)
        writer.start(step=start or 0)
        job = Job(
            run=run, folder=folder, mesh=mesh, writer=writer, clock=clock, checkpoints=store,
            train_data=train_data, held_data=held_data, graph=step.split(like, run.train.trains)[0],
            frozen=frozen, key=key, meta=meta,
        )  # fmt: skip
        _banner(job, state, start, changes)

        # ---- loop and end
        state, last = _loop(job, state, start or 0, cursor)
        return _finish(job, state, last)


def _loop(
    job: Job, state: step.TrainState, done: int, cursor: dict[str, Any]
) -> tuple[step.TrainState, dict[str, float]]:
    """The steps that are left, with reports, evaluations and checkpoints between them."""
    t, reporter, evaluator = job.run.train, Reporter(job, cursor), Evaluator(job)
    if done == t.steps:
        return state, reporter.last
    with cli.Stop() as stop:
        batches = job.train_data.stream(done)
        batch = _next(job, batches)
        with job.clock.spend("compile"):
            train_step = step.make_train_step(job.graph, job.run)
            train_step = train_step.lower(state, job.frozen, batch, job.key).compile()
        with jax.transfer_guard("disallow"):
            while done < t.steps:
                with job.clock.spend("step"):
                    state, sums = train_step(state, job.frozen, batch, job.key)
                done += 1
                reporter.pending.append(sums)
                last = done == t.steps
                if not last:
                    batch = _next(job, batches)  # while the device works
                if done % t.log_every == 0 or last:
                    reporter.report(done)
                if t.eval_every and (done % t.eval_every == 0 or last) and job.held_data:
                    reporter.last |= evaluator(state, done)
                asked = _asked(job, stop, done)
                if done % t.checkpoint_every == 0 or last or asked:
                    _save(job, state, done, reporter)
                if asked and not last:
                    _say_stopped(job, asked, done)
    return state, reporter.last


class Reporter:
    """Sums since the last report; fetched, which waits for the device, only when needed."""

    def __init__(self, job: Job, cursor: dict[str, Any]):
        self._job = job
        self.pending: list[metrics.Interval] = []  # on the device, one a step
        self._interval = metrics.from_list(cursor["interval"])
        self.last: dict[str, float] = cursor["last"]
        self._timed = (0.0, 0, 0)  # training seconds so far, tokens, steps since then

    def settle(self, done: int) -> None:
        """Fetches what is pending; raises TrainError at the first step that was not finite."""
        with self._job.clock.spend("step"):
            fetched = [metrics.on_host(each) for each in self.pending]
        self.pending.clear()
        for number, each in enumerate(fetched, start=done - len(fetched) + 1):
            if not each.finite.total:
                self._fail(number, metrics.means(each))
            self._interval = each if self._interval is None else self._interval.merge(each)
        begin, tokens, steps = self._timed
        tokens += sum(each.tokens.total for each in fetched)
        self._timed = (begin, tokens, steps + len(fetched))

    def report(self, done: int) -> None:
        """A line and a row about the interval, which then starts anew."""
        self.settle(done)
        job, (begin, tokens, steps) = self._job, self._timed
        seconds = max(job.clock.training - begin, 1e-9)
        row = metrics.means(self._interval) | {
            "tokens_per_second": float(tokens / seconds),
            "epoch": job.train_data.stats(done - 1).epoch,
        }
        eta = (job.run.train.steps - done) * seconds / steps
        job.writer.log(metrics.step_line(done, job.run.train.steps, row, eta=eta))
        kinds = metrics.by_kind(self._interval, job.train_data.kinds)
        job.writer.numbers("train", done, row | kinds | job.clock.report())
        self.last = self.last | row
        self._interval, self._timed = None, (job.clock.training, 0, 0)

    def cursor(self, done: int) -> dict[str, Any]:
        """What a checkpoint keeps of this, as JSON."""
        self.settle(done)
        return {"interval": metrics.to_list(self._interval), "last": self.last}

    def _fail(self, number: int, row: dict[str, float]) -> None:
        good = self._job.checkpoints.latest()
        kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
        raise TrainError(
            f"step {number}: loss {row['loss']}, gradient norm {row['grad_norm']} are not finite; "
            f"{kept} ({self._job.folder / 'checkpoints'}). Lower optim.peak_lr, or look at the data"
        )


class Evaluator:
    """Loss on every held-out document, text and image targets apart."""

    def __init__(self, job: Job):
        self._job, self._step = job, None

    def __call__(self, state: step.TrainState, done: int) -> dict[str, float]:
        job, total = self._job, None
        for number in range(len(job.held_data)):
            with job.clock.spend("eval"):
                batch = put_batch(job.held_data.batch(number), job.mesh)
            if self._step is None:
                with job.clock.spend("compile"):
                    lowered = step.make_eval_step(job.graph, job.run).lower(
                        state.trainable, job.frozen, batch
                    )
                    self._step = lowered.compile()
            with job.clock.spend("eval"):
                sums = metrics.on_host(self._step(state.trainable, job.frozen, batch))
            total = sums if total is None else total.merge(sums)
        row = metrics.means(total)
        job.writer.log(f"validation after step {done}: {metrics.loss_words(row)}")
        job.writer.numbers("validation", done, row | metrics.by_kind(total, job.held_data.kinds))
        return {f"validation_{name}": value for name, value in row.items()}


def _next(job: Job, batches: Iterator[loader.Batch]) -> loader.Batch:
    with job.clock.spend("data"):
        return put_batch(next(batches), job.mesh)


def _asked(job: Job, stop: cli.Stop, done: int) -> str:
    """The signal that a host has got; hosts ask each other at reports, since it makes them wait."""
    if jax.process_count() == 1:
        return stop.asked
    if done % job.run.train.log_every:
        return ""
    with jax.transfer_guard("allow"):
        anywhere = multihost_utils.process_allgather(np.array(bool(stop.asked))).any()
    return stop.asked or ("signal to another host" if anywhere else "")


def _save(job: Job, state: step.TrainState, done: int, reporter: Reporter) -> None:
    cursor = reporter.cursor(done)
    with job.clock.spend("checkpoint"), jax.transfer_guard("allow"):
        job.checkpoints.save(done, state, cursor=cursor, meta=job.meta)


def _say_stopped(job: Job, name: str, done: int) -> None:
    text = f"{name}: stopped after step {done}, checkpoint saved; the same command goes on"
    job.writer.log(text)
    raise cli.Interrupted(text)


def _finish(job: Job, state: step.TrainState, last: dict[str, float]) -> dict[str, Any]:
    run, facts = job.run, job.meta | {"step": job.run.train.steps}
    if run.train.trains == "lora":
        target = job.folder / "adapter"
        export.adapter(target, state.trainable, run, facts)
    else:
        target, whole = job.folder / "model", step.whole(job.graph, state.trainable, job.frozen)
        for name in export.model(target, whole, run, data=facts["data"], step=facts["step"]):
            job.writer.log(f"{target} has no {name}: config.train.init_from has none to copy")
    clock = job.clock.report()
    spent = " ".join(f"{name} {seconds:.1f}" for name, seconds in job.clock.seconds.items())
    job.writer.log(
        f"done: {run.train.steps} steps, {target}; {clock['seconds_total']:.1f} s ({spent}), "
        f"goodput {clock['goodput']:.2f}"
    )
    return last | {"step": run.train.steps, "export": str(target), "goodput": clock["goodput"]}


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Two runs must not write to one folder. The system drops the lock when the process ends."""
    with open(folder / ".lock", "w") as file:
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TrainError(
                    f"--workdir {folder} is in use by another run; wait for it or name another"
                ) from error
        yield


def _usable(make: Callable[[], Any]) -> Any:
    """The value of `make`, whose ValueErrors are about the config."""
    try:
        return make()
    except ValueError as error:
        raise config.ConfigError(str(error)) from error


def _weights(
    run: config.Run, like: chameleon.Chameleon, key: jax.Array, *, restoring: bool
) -> tuple[PyTree, PyTree]:
    """(trainable, frozen); `trainable` is None where a checkpoint will bring it."""
    trains, folder = run.train.trains, run.train.init_from
    _, like_trainable, like_frozen = step.split(like, trains)
    if restoring and trains == "full":
        return None, like_frozen  # which has no arrays
    if not folder:
        model = chameleon.create(run.model, run.vocab, run.lora, key=key)
        return step.split(model, trains)[1:]
    if trains == "full":
        return export.load(folder, like_trainable), like_frozen
    if trains == "image_head":
        graph, _, base = chameleon.split(like)
        model = nnx.merge(graph, export.load(folder, base))
        return step.split(model, trains)[1:]

    def adapters(key: jax.Array) -> PyTree:  # under jit, so the random base is never made
        model = chameleon.Chameleon(run.model, run.vocab, run.lora, key=key)
        return nnx.split(model, nnx.LoRAParam, ...)[1]

    return None if restoring else jax.jit(adapters)(key), export.load(folder, like_frozen)


def _state(
    run: config.Run,
    like: chameleon.Chameleon,
    trainable: PyTree,
    store: Checkpoints,
    start: int | None,
) -> tuple[step.TrainState, dict[str, Any]]:
    """(state, cursor) of step 0 or of a checkpoint."""
    if start is None:
        return step.init_state(trainable, run), {"interval": [], "last": {}}
    shapes = step.split(like, run.train.trains)[1]
    state = placed(jax.eval_shape(lambda t: step.init_state(t, run), shapes))
    return store.restore(start, state)


def _meta(run: config.Run, train_data: loader.Batches) -> dict[str, Any]:
    """Config, and fingerprints of the base weights and of the records."""
    folder, records = run.train.init_from, train_data.records
    base = f"random weights of seed {run.train.seed}, {run.train.prng_impl}"
    if folder:
        layout = records.layout
        export.check_base(folder, run, tokenizer=layout.tokenizer, vqgan=layout.vqgan)
        base = export.identity(folder)
    facts = {name: records.meta[name] for name in ("sources", "credentials")}
    facts |= {"data": records.fingerprint, "plan": train_data.plan}
    return {"config": config.to_dict(run), "base": base} | facts


def _banner(job: Job, state: step.TrainState, start: int | None, changes: list[str]) -> None:
    """What runs, on what, from where: to the log and to config.json."""
    run, log = job.run, job.writer.log
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = job.meta | {"versions": versions | {"python": platform.python_version()}, "git": _git()}
    if jax.process_index() == 0:
        (job.folder / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
    device, shape = jax.devices()[0], " x ".join(f"{k} {v}" for k, v in job.mesh.shape.items())
    log(f"medmax_jax {facts['git']} on {jax.device_count()} {device.device_kind}, mesh {shape}")
    for name, data in (("train", job.train_data), ("validation", job.held_data)):
        if data is not None:
            for line in data.words():
                log(f"{name}: {line}")
    trainable, frozen = (chameleon.count_parameters(t) for t in (state.trainable, job.frozen))
    log(f"trains {run.train.trains}: {trainable:,} of {trainable + frozen:,} parameters")
    tree = weights.named(state.trainable) | weights.named(job.frozen)
    log(parameter_overview.get_parameter_overview(tree, include_stats="sharding"))
    for change in changes:
        log(f"changed since the checkpoint: {change}")
    log(f"resuming after step {start}" if start else f"starting: {run.train.steps} steps")


def _git() -> str:
    """The commit of the source, with + when it was changed since; empty outside a checkout."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    cli.run(main, errors=ERRORS)
