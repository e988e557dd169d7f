"""Reports on a run: run summary, metrics, held-out losses, documents of non-finite batches.

tokens_per_second_per_chip      real tokens, without padding, over step time and data wait
processed_per_second_per_chip   every position of the rows; fill is the ratio of the two
data_share                      share of that time spent on waiting for the input
mfu, hfu                        flops.py; compilation, evaluation and saving are not included
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from medmax_jax import cli, config, flops
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.checkpoints.barriers import barrier
from medmax_jax.checkpoints.manager import CheckpointError, CheckpointManager
from medmax_jax.environment import environment, git_commit
from medmax_jax.io.progress import report_waiting
from medmax_jax.io.run_files import LogFile
from medmax_jax.models import chameleon
from medmax_jax.sharding import shard_batch
from medmax_jax.storage.workdir import Workdir
from medmax_jax.training import fisher, log_writer, metrics, stages, step
from medmax_jax.training.batch import BatchSource, BatchStats

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "safetensors")

# Growth above the lowest report so far that a warning is logged for.
LOG_Z_GROWTH = 5.0  # nats
NORM_GROWTH = 10.0  # factor


class TrainError(RuntimeError):
    """Raised when a run cannot start or continue; the message gives the reason and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Holds what is constant from the first step to the last."""

    run: config.Run
    work: Workdir
    mesh: jax.sharding.Mesh
    writer: log_writer.MetricWriter
    clock: log_writer.GoodputTimer
    stop: cli.Stop
    checkpoints: CheckpointManager
    train_data: BatchSource
    eval_data: BatchSource | None
    graph: Any  # of the model, for nnx.merge
    frozen: PyTree
    key: jax.Array  # of dropout
    meta: dict[str, Any]  # what a checkpoint must be consistent with


class Reporter:
    """Collects sums since the last report; fetches them, waiting for the device, when needed."""

    def __init__(self, job: TrainContext, cursor: dict[str, Any]):
        self._job = job
        self.pending: list[metrics.TrainMetrics] = []  # on the device, one per step
        self._interval = metrics.from_list(cursor["interval"])
        self.last: dict[str, float] = cursor["last"]
        self.eval_pending = False  # an evaluation was due and a signal arrived before its end
        self._lowest: dict[str, float] = cursor.get("lowest", {})  # checkpoints of before have none
        self._since = Throughput(job.clock)

    def flush(self, done: int) -> None:
        """Fetch the pending sums; raise TrainError at the first step that was not finite."""
        with self._job.clock.measure("step"):
            fetched = [metrics.to_host(collection) for collection in self.pending]
        self.pending.clear()
        for number, collection in enumerate(fetched, start=done - len(fetched) + 1):
            if not collection.finite.total:
                self._fail(number, metrics.compute_means(collection))
            self._interval = (
                collection if self._interval is None else self._interval.merge(collection)
            )
            self._since.add(self._job.train_data.stats(number - 1))

    def report(self, done: int) -> None:
        """Write a log line and a metrics row for the interval, then start a new one."""
        self.flush(done)
        job = self._job
        row = metrics.compute_means(self._interval) | self._since.rates(job)
        row |= {"epoch": job.train_data.stats(done - 1).epoch} | stages.reported(job.run, done)
        eta = (job.run.train.steps - done) * self._since.seconds_per_step()
        job.writer.log(log_writer.format_step(done, job.run.train.steps, row, eta=eta))
        for warning in growth_warnings(row, self._lowest):
            job.writer.log(f"WARNING: step {done}: {warning}")
        kinds = metrics.by_kind(self._interval, job.train_data.kinds)
        job.writer.write("train", done, row | kinds | job.clock.report())
        self.last = self.last | row
        self._interval, self._since = None, Throughput(job.clock)

    def cursor(self, done: int) -> dict[str, Any]:
        """Return the state that a checkpoint stores for this reporter, as JSON."""
        self.flush(done)
        sums = metrics.to_list(self._interval)
        return {
            "interval": sums,
            "last": self.last,
            "owed": self.eval_pending,
            "lowest": self._lowest,
        }

    def _fail(self, number: int, row: dict[str, float]) -> None:
        job = self._job
        try:
            job.checkpoints.wait()  # it may still be written, and the log must end with this error
        except CheckpointError as error:
            job.writer.log(f"WARNING: {error}")
        latest = job.checkpoints.latest()
        checkpoint = (
            f"the last good checkpoint is step {latest}" if latest else "there is no checkpoint yet"
        )
        documents = job.train_data.document_names(number - 1)
        path = job.work.folder / f"not_finite_{number}.json"
        if jax.process_index() == 0:
            try:
                path.write_text(
                    json.dumps({"step": number, "documents": documents}, indent=1) + "\n"
                )
            except OSError as error:
                job.writer.log(f"WARNING: cannot write {path} ({error.strerror})")
        shown = ", ".join(documents[:4]) + (
            f" and {len(documents) - 4} more" if len(documents) > 4 else ""
        )
        message = (
            f"step {number}: loss {row['loss']} or gradient norm {row['grad_norm']} is not finite; "
            f"its documents: {shown} (all of them in {path}); {checkpoint} "
            f"({job.work.url('checkpoints')}). Lower optim.peak_lr, inspect these documents, or "
            "set optim.skip_window to skip the updates of loss spikes"
        )
        job.writer.log(message)
        raise TrainError(message)


def growth_warnings(row: dict[str, float], lowest: dict[str, float]) -> list[str]:
    """Return a warning for each mean of log Z or norm that has grown far above its lowest report.

    Chameleon's paper (arXiv 2405.09818, section 2.3) describes the cause: norms of the two
    modalities grow in competition, slowly, until they leave the range of bfloat16, and only then
    the loss diverges. `lowest` holds the lowest report of each so far and is updated. A value that
    has caused a warning becomes the new lowest, so the next warning is for as much growth again.
    """
    warnings, rules = (
        [],
        (
            ("log_z", "mean log Z", 1.0, LOG_Z_GROWTH),
            ("hidden_norm", "mean norm of the last layer", NORM_GROWTH, 0.0),
        ),
    )
    for modality, (name, what, factor, growth) in itertools.product(("text", "image"), rules):
        key = f"{modality}_{name}"
        if not math.isfinite(value := row[key]):
            continue
        old = lowest.get(key, value)
        grown = value > factor * old + growth
        if grown:
            warnings.append(
                f"the {what} at {modality} targets is {value:.4g}, up from {old:.4g}: the loss may "
                "diverge soon; stop, and lower optim.peak_lr, or set loss.z"
            )
        lowest[key] = value if grown else min(old, value)
    return warnings


class Throughput:
    """Counts tokens and seconds since the last report."""

    def __init__(self, clock: log_writer.GoodputTimer):
        self._clock = clock
        self._training, self._data = clock.training, clock.seconds["data"]
        self._steps = self._tokens = self._squares = 0

    def add(self, stats: BatchStats) -> None:
        self._steps += 1
        self._tokens += stats.tokens
        self._squares += stats.squared_lengths

    @property
    def _seconds(self) -> float:
        return max(self._clock.training - self._training, 1e-9)

    def seconds_per_step(self) -> float:
        return self._seconds / max(self._steps, 1)

    def rates(self, job: TrainContext) -> dict[str, float]:
        """Return the rates in the module docstring; a rate that is unknown is left out."""
        run, chips = job.run, job.mesh.size
        rate = self._tokens / self._seconds
        positions = self._steps * run.data.batch_size * run.data.seq_len
        rates = {
            "tokens_per_second": rate,
            "tokens_per_second_per_chip": rate / chips,
            "processed_per_second_per_chip": positions / self._seconds / chips,
            "data_share": (self._clock.seconds["data"] - self._data) / self._seconds,
        }
        trains, length = run.train.trains, self._squares / max(self._tokens, 1)
        train_flops = flops.train_flops(
            run.model, run.vocab, run.lora, trains=trains, length=length
        )
        remat_flops = flops.remat_flops(run.model, trains=trains, length=length)
        chip = flops.chip(jax.devices()[0].device_kind)
        if (mfu := flops.mfu(rate, train_flops, chips=chips, chip=chip)) is not None:
            rates |= {"mfu": mfu, "hfu": flops.hfu(mfu, train_flops, remat_flops)}
        if (peak_bytes_used := peak_bytes()) is not None:
            rates["hbm_peak_gib"] = peak_bytes_used / 2**30
        return rates


class Evaluator:
    """Computes the loss on all held-out documents: by text and image targets, source and task."""

    def __init__(self, job: TrainContext):
        self._job, self._step = job, None

    def __call__(self, state: step.TrainState, done: int) -> dict[str, float] | None:
        """Return the metrics, named validation_..; None when a signal arrived before the end."""
        job, total = self._job, None
        for number in range(len(job.eval_data)):
            if job.stop.poll():
                job.writer.log(
                    f"validation after step {done} was interrupted; the next start repeats it"
                )
                return None
            with job.clock.measure("eval"):
                batch = shard_batch(job.eval_data.batch(number), job.mesh)
            if self._step is None:
                eval_step = step.make_eval_step(job.graph, job.run)
                arguments = (state.trainable, job.frozen, batch)
                self._step = _compiled(job, "the evaluation step", eval_step, arguments)
            with job.clock.measure("eval"):
                sums = metrics.to_host(self._step(state.trainable, job.frozen, batch))
            total = sums if total is None else total.merge(sums)
        row, stage = metrics.compute_means(total), stages.reported(job.run, done)
        after = "".join(f" of stage {number}" for number in stage.values())
        job.writer.log(f"validation after step {done}{after}: {log_writer.format_losses(row)}")
        kinds = metrics.by_kind(total, job.eval_data.kinds)
        job.writer.write("validation", done, row | kinds | stage)
        return {f"validation_{name}": value for name, value in row.items()}


class FisherReporter:
    """Reports the spectrum of the gradients of single documents of a step, see fisher.py."""

    def __init__(self, job: TrainContext):
        self._job, self._gram = job, None

    def __call__(self, state: step.TrainState, done: int) -> None:
        """Write a row of kind fisher for the documents of the last step, at its weights."""
        job, data = self._job, self._job.train_data
        with job.clock.measure("eval"):
            places, numbers = fisher.places(data.documents_of_rows(done - 1))
            batch = shard_batch(data.batch(done - 1), job.mesh)
            places = jax.device_put(places, NamedSharding(job.mesh, P()))
        if self._gram is None:
            gram = fisher.make_gram(job.graph, job.run)
            arguments = (state.trainable, job.frozen, batch, places)
            self._gram = _compiled(job, "the gradients of documents", gram, arguments)
        records = data.records_at(done - 1)
        index, names = records.index, records.names("task")
        tasks = [names[number] for number in index["task"][numbers]]
        with job.clock.measure("eval"):
            gram = jax.device_get(self._gram(state.trainable, job.frozen, batch, places))
            row = fisher.statistics(gram, tasks, index["image_path"][numbers])
        job.writer.log(
            f"Fisher information of {len(tasks)} documents after step {done}: spectral "
            f"entropy {row['spectral_entropy']:.3f}, leading share {row['leading_share']:.3f}"
        )
        job.writer.write("fisher", done, row)


def _compiled(job: TrainContext, what: str, function: Any, arguments: tuple) -> Any:
    """Return a jitted function compiled for its arguments, on all hosts; the log shows the wait."""
    waiting = report_waiting(f"compiling {what}", job.writer.log)
    with job.clock.measure("compile"), waiting:
        program = function.lower(*arguments).compile()
        barrier(f"compiled: {what}")
    return program


class Profiler:
    """Writes an xprof trace of some steps to D/profile."""

    def __init__(self, job: TrainContext, steps: tuple[int, int] | None, done: int):
        self._job, self._steps, self._on = job, steps, False
        if steps and done >= steps[0]:
            job.writer.log(
                f"WARNING: --profile_steps: step {steps[0]} is already done (the run is at step "
                f"{done}); no trace is written"
            )
            self._steps = None

    def before(self, number: int) -> None:
        if self._steps and number == self._steps[0]:
            jax.profiler.start_trace(str(self._job.work.folder / "profile"))
            self._on = True

    def after(self, number: int, state: step.TrainState) -> None:
        if self._on and number == self._steps[1]:
            jax.block_until_ready(state.step)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            self._job.writer.log(f"trace of steps {self._steps}: {self._job.work.url('profile')}")


def memory_summary(compiled: Any) -> str:
    """Return the memory that a device needs for a step, as reported by XLA."""
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return "memory per device: " + ", ".join(f"{n} {b / 2**30:.3f} GiB" for n, b in parts.items())


def peak_bytes() -> int | None:
    """Return the peak memory used by a device of this host; None if devices do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [
        device_stats["peak_bytes_in_use"]
        for device_stats in stats
        if "peak_bytes_in_use" in device_stats
    ]
    return max(peaks) if peaks else None


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    package_versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return package_versions | {"python": platform.python_version()}


def log_run_summary(
    job: TrainContext, state: step.TrainState, start: int | None, changes: list[str]
) -> None:
    """Write the run's settings, hardware and starting step to the log and to config.json."""
    run, log = job.run, job.writer.log
    metadata = job.meta | {
        "environment": environment(devices=jax.devices()),
        "epoch_tokens": job.train_data.epoch_tokens(),
    }
    if jax.process_index() == 0:
        (job.work.folder / "config.json").write_text(json.dumps(metadata, indent=1) + "\n")
        _note_start(job, start or 0)
    tables = not start  # a resumed run has the same ones, above in its log
    environment_summary(run, job.mesh, job.train_data, job.eval_data, log=log, tables=tables)
    trainable, frozen = (chameleon.count_parameters(t) for t in (state.trainable, job.frozen))
    log(f"training {run.train.trains}: {trainable:,} of {trainable + frozen:,} parameters")
    for stage in stages.facts(run, state.trainable):
        log(stages.describe(stage))
    if run.train.fisher_every:
        log(fisher.describe_cost(run))
    if tables:
        tree = safetensors_file.flatten_named(state.trainable)
        tree |= safetensors_file.flatten_named(job.frozen)
        log(parameter_overview.get_parameter_overview(tree, include_stats="sharding"))
    for change in changes:
        log(f"changed since the last checkpoint: {change}")
    log(f"settings, versions, fingerprints of base and records: {job.work.url('config.json')}")
    log(f"curves: {tensorboard_command(job.work.path)}")
    weights = [stage.loss_weights for stage in run.stages] or [run.loss.weights]
    log(loss_legend(run.train.loss_weight, weights))
    log(
        f"resuming after step {start} of {run.train.steps}; the tables are in the log of the first "
        "start"
        if start
        else f"starting a run of {run.train.steps} steps"
    )


def tensorboard_command(folder: str) -> str:
    """Return the command that shows the metrics, with the installation that it still needs."""
    install = "" if importlib.util.find_spec("tensorboard") else "pip install tensorboard && "
    return f"{install}tensorboard --logdir {shlex.quote(folder)}"


def loss_legend(loss_weight: str, weights: Sequence[config.LossWeights]) -> str:
    """Return what `loss`, `text` and `image` of the log are: their unit, and how they differ.

    `weights`: of each stage, or of a run without stages.
    """
    parts = "text, image: mean over all scored text tokens, and over all scored image tokens"
    if any(w != config.LossWeights.off() for w in weights):
        factors = ", then ".join(
            f"text {w.text:g}, image {w.image:g}"
            + (f", {w.tasks}" if w.tasks else "")
            + (f", pseudo {w.pseudo:g}" if w.pseudo != 1 else "")
            for w in weights
        )
        parts += (
            f". In the loss of training each is multiplied by config.loss.weights ({factors}), and "
            "those of weight 0 are in none of the three; validation_loss is unweighted"
        )
    if loss_weight == "token":
        return f"loss: mean over all scored tokens, in nats per token; {parts}"
    return (
        "loss: mean over documents of each document's mean over its scored tokens, in nats per "
        f"token; {parts}. A short answer counts as much in the loss as a long one, so where short "
        "answers are predicted worse, the loss is larger than both"
    )


def _note_start(job: TrainContext, start: int) -> None:
    """Add a line to history.jsonl: the data of the steps from here, for data.prepare who_saw."""
    names = ("data", "plan", "config", "stage_data")
    metadata = {name: job.meta[name] for name in names if name in job.meta} | {"start": start}
    metadata["validation"] = job.eval_data.records.fingerprint if job.eval_data else ""
    with contextlib.closing(LogFile(job.work.folder / "history.jsonl", job.writer.log)) as file:
        file.write(json.dumps(metadata))


def environment_summary(
    run: config.Run,
    mesh: jax.sharding.Mesh,
    train_data: BatchSource,
    eval_data: BatchSource | None,
    *,
    log: Any,
    tables: bool = True,
) -> None:
    """Log the devices, the mesh and the data; `tables`: also the shares of the mixture."""
    if folder := run.train.init_from:
        if warning := config.view_warning(folder, export.base_vq(folder), run.vq):
            log(f"WARNING: {warning}")
    device, shape = jax.devices()[0], " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    log(f"medmax_jax {git_commit()} on {jax.device_count()} {device.device_kind}, mesh {shape}")
    if flops.chip(device.device_kind) is None:
        log(f"the peak FLOPs of {device.device_kind} are unknown, so no MFU is reported")
    for name, data in (("train", train_data), ("validation", eval_data)):
        if data is not None:
            for line in data.describe() if tables else data.describe()[:1]:
                log(f"{name}: {line}")
