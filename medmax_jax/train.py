"""python -m medmax_jax.train --config=configs/tiny.py --workdir=D [--config.optim.peak_lr=1e-3 ...]

Trains adapters (train.trains = lora), a complete model (full) or the image columns of its head
(image_head), and exports the result.
The same command resumes after a stop of any kind. D then contains:

    config.json      settings, versions and fingerprints of this run; history.jsonl: of each start
    train.log        what stdout showed           metrics.jsonl, events.out.*    the metrics
    checkpoints/     the state of the last steps  adapter/ or model/             the result
    samples/         samples during training      profile/             with --profile_steps
    adapter_stage_0/ or model_stage_0/: with a stage whose records are made with this model
    compiled/        with several hosts: compiled programs, for restarts (--compile_cache)

With credentialed records, D has mode 0700 and its files 0600.

--dry_run compiles the first step from shapes and reports its memory. It loads no weights and writes
no files; it reads the records.
"""

import contextlib
import dataclasses
import itertools
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from medmax_jax import cli, config, make_callable
from medmax_jax.checkpoints import export, safetensors_file
from medmax_jax.checkpoints.barriers import barrier
from medmax_jax.checkpoints.manager import CheckpointError, CheckpointManager
from medmax_jax.data import loader
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.io.progress import report_waiting
from medmax_jax.models import chameleon, vocab
from medmax_jax.sharding import make_mesh, shard_batch
from medmax_jax.storage.atomic_folder import private_folder
from medmax_jax.storage.folder import StorageError
from medmax_jax.training import log_writer, reporting, samples, setup, stages, step
from medmax_jax.training.batch import Batch, BatchSource
from medmax_jax.training.reporting import Evaluator, Reporter, TrainContext, TrainError

ERRORS = (
    TrainError, cli.WorkdirError, RecordsError, PackError, CheckpointError, StorageError,
    export.ExportError, safetensors_file.WeightsError, log_writer.TrackingError, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Holds the result of a complete run."""

    step: int  # the last one
    loss: float  # of the last report
    metrics: str  # path of metrics.jsonl, local or gs://, as the others
    export: str  # the folder of the adapter, or of the model
    workdir: str


def train(
    settings: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    extend: bool = False,
    profile: tuple[int, int] | None = None,
    wandb: str = "",
    listed_hosts: Sequence[str] = (),
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train to the end and export, as the program does.

    Ctrl-C raises KeyboardInterrupt, once the step in progress is complete and a checkpoint is
    saved; the same call resumes from there.

    Args:
        settings: the config, from `medmax_jax.load_config`.
        workdir: the folder of the run.
        extend: resume with a larger train.steps than the checkpoint has.
        profile: the first and the last step of an xprof trace.
        wandb: the Weights & Biases project that receives the metrics.
        listed_hosts: host:port that may receive metrics of credentialed data.
        on_metrics: a function that is called with the step and the metrics by name, such as
            train/loss, whenever metrics are written.
    """
    cli.skip_absent_tpu()
    options = setup.Options(
        extend=extend, profile=profile, wandb=wandb, listed_hosts=tuple(listed_hosts),
        on_metrics=on_metrics,
    )  # fmt: skip
    last = run(config.from_config_dict(settings), workdir, options)
    folder = os.fspath(workdir).rstrip("/")
    return TrainResult(
        step=last["step"], loss=last["loss"], metrics=f"{folder}/metrics.jsonl",
        export=last["export"], workdir=folder,
    )  # fmt: skip


def main(settings: ConfigDict, workdir: str) -> None:
    """Read the flags and train."""
    options = setup.Options(
        extend=FLAGS.extend,
        dry_run=FLAGS.dry_run,
        profile=setup.parse_step_range(FLAGS.profile_steps),
        wandb=FLAGS.wandb,
        listed_hosts=tuple(FLAGS.listed_host),
    )
    run(config.from_config_dict(settings), workdir, options)


def run(
    run: config.Run, workdir: str | os.PathLike, options: setup.Options = setup.DEFAULT_OPTIONS
) -> dict[str, Any]:
    """Train to the end and export; return the last metrics and the path of the result.

    Raises cli.Interrupted after SIGINT or SIGTERM; calling it again resumes from that step.
    """
    run = setup.checked(run, options)
    if options.dry_run:
        return setup.dry_run(run, lambda: load_data(run))
    clock = log_writer.GoodputTimer()
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(setup.open_workdir(workdir))
        folder = work.folder.absolute()
        stop = stack.enter_context(cli.Stop())
        mesh = setup.as_config_error(lambda: make_mesh(run.mesh))
        setup.as_config_error(lambda: step.check(run, mesh))
        stack.enter_context(jax.set_mesh(mesh))
        abstract_model = setup.as_config_error(
            lambda: chameleon.abstract_model(run.model, run.vocab, run.lora)
        )
        graph, abstract_trainable, _ = step.split_trainable(abstract_model, run.train.trains)
        stages.check_trains(run, abstract_trainable)

        # ---- data
        train_data, eval_data = load_data(run)
        loaded = [data.records_of_stages() for data in (train_data, eval_data) if data]
        if any(map(has_credentialed, itertools.chain.from_iterable(loaded))):
            stack.enter_context(private_folder(folder))

        # ---- log
        meta = setup.run_metadata(run, train_data)
        sinks = [options.on_metrics, setup.wandb_sink(run, options, folder, meta, stack)]
        writer = log_writer.MetricWriter(str(folder), [sink for sink in sinks if sink])
        stack.callback(writer.close)

        # ---- model
        key_init, key = jax.random.split(jax.random.key(run.train.seed, impl=run.train.prng_impl))
        key = jax.device_put(key, NamedSharding(mesh, P()))  # the loop makes no implicit transfer
        store = CheckpointManager(work, keep=run.train.keep, log=writer.log)
        stack.callback(store.close)
        with clock.measure("load"), report_waiting("loading the weights", writer.log):
            start, state, cursor, changes = setup.restore_checkpoint(
                run, abstract_model, store, meta, options
            )
            trainable, frozen = setup.load_or_init_weights(
                run, abstract_model, key_init, restoring=start is not None
            )
            state = step.init_state(trainable, run) if state is None else state
        writer.start(step=start or 0, repeated_kind="validation" if cursor["owed"] else "")
        context = TrainContext(
            run=run, work=work, mesh=mesh, writer=writer, clock=clock, stop=stop,
            checkpoints=store, train_data=train_data, eval_data=eval_data,
            graph=graph, frozen=frozen, key=key, meta=meta,
        )  # fmt: skip
        reporting.log_run_summary(context, state, start, changes)

        # ---- loop and end
        state, last = _loop(context, state, start or 0, cursor, options)
        return _finish(context, state, last)


def load_data(run: config.Run) -> tuple[BatchSource, BatchSource | None]:
    """Return the training batches, and the validation batches or None.

    Raises RecordsError where a folder is missing, with the commands that make it.
    """
    folders = {"train": run.data.train, "validation": run.data.validation}
    missing = {k: v for k, v in folders.items() if v and "://" not in v and not os.path.exists(v)}
    if missing:
        scratch = run.train.trains == "full" and not run.train.init_from
        kind = "pretraining" if scratch else "instruction"
        more = {"train": " --views 32 --rounds 4"}  # crops and wordings of the few images
        sample = " && ".join(
            f"python -m medmax_jax.data.prepare sample --out {shlex.quote(folder)} --split {split} "
            f"--kind {kind}{more.get(split, '')}"
            for split, folder in missing.items()
        )
        released = run.vocab == vocab.RELEASED  # the sample is tokenized with the shipped model
        raise RecordsError(
            f"{' and '.join(missing.values())}: no such folder. To make it: "
            + ("docs/guides/data.md" if released else sample)
        )
    validation = run.data.validation
    eval_data = loader.eval_batches(run, validation) if validation else None
    train_data = loader.train_batches(run, run.data.train)
    setup.check_hosts_agree(train_data)
    return train_data, eval_data


def _loop(
    job: TrainContext,
    state: step.TrainState,
    done: int,
    cursor: dict[str, Any],
    options: setup.Options,
) -> tuple[step.TrainState, dict[str, float]]:
    """Run the remaining steps, with reports, evaluations and checkpoints between them."""
    t, reporter = job.run.train, Reporter(job, cursor)
    evaluator, fisher_reporter = Evaluator(job), reporting.FisherReporter(job)
    eval_records = job.eval_data.records if job.eval_data else None
    sampler = samples.Sampler(job.run, eval_records, graph=job.graph, mesh=job.mesh)
    _check_stop(job, done)
    if cursor["owed"]:
        _evaluate(job, state, done, reporter, evaluator, sampler)
        _check_stop(job, done)
    if done == t.steps:
        return state, reporter.last
    if done == (available := job.train_data.available):
        _stop_for_records(job, state, done)
    batches = job.train_data.stream(done)
    batch = _next(job, batches)
    programs = _compiled(job, state, batch, done)
    _check_stop(job, done)
    profiler = reporting.Profiler(job, options.profile, done)
    with jax.transfer_guard("disallow"), contextlib.closing(profiler):
        while done < t.steps:
            profiler.before(done + 1)
            with job.clock.measure("step"):
                train_step = programs[stages.at(job.run, done)]
                state, sums = train_step(state, job.frozen, batch, job.key)
            done += 1
            profiler.after(done, state)
            reporter.pending.append(sums)
            last, stage_ends = done == t.steps, done in stages.ends(job.run)
            if done < available:
                batch = _next(job, batches)  # while the device computes
            if done % t.log_every == 0 or stage_ends:
                reporter.report(done)
            if t.fisher_every and done % t.fisher_every == 0:
                reporter.flush(done)
                fisher_reporter(state, done)
            if t.eval_every and (done % t.eval_every == 0 or stage_ends) and job.eval_data:
                _evaluate(job, state, done, reporter, evaluator, sampler)
            job.checkpoints.check()
            signal_name = job.stop.poll()
            if done % t.checkpoint_every == 0 or stage_ends or signal_name:
                _save(job, state, done, reporter)
            if signal_name and (reporter.eval_pending or not last):
                _stop_after_checkpoint(job, signal_name, done)
            if done == available and not last:
                _stop_for_records(job, state, done)
    return state, reporter.last


def _evaluate(
    job: TrainContext,
    state: step.TrainState,
    done: int,
    reporter: Reporter,
    evaluator: Evaluator,
    sampler: samples.Sampler,
) -> None:
    """Run validation and samples; a signal cuts them short and the next start repeats them."""
    reporter.flush(done)
    metrics = evaluator(state, done)
    reporter.last |= metrics or {}
    reporter.eval_pending = metrics is None or bool(sampler.prompts and job.stop.poll())
    if sampler.prompts and not reporter.eval_pending:
        with job.clock.measure("sample"), jax.transfer_guard("allow"):
            try:
                folder = job.work.folder / "samples"
                path = sampler(state.trainable, job.frozen, step=done, folder=folder)
            except OSError as error:  # a page for people; no program reads it
                job.writer.log(f"WARNING: samples after step {done} could not be written ({error})")
                return
        job.writer.log(f"samples after step {done}: {path}")


def _compiled(
    job: TrainContext, state: step.TrainState, batch: Batch, done: int
) -> dict[int, Callable]:
    """Return the training step of each remaining stage, compiled once for each `trains`."""
    job.stop.activity = "the compilation of the training step"
    waiting = report_waiting("compiling the training step", job.writer.log)
    programs: dict[str, Callable] = {}
    remaining = range(stages.at(job.run, done), len(stages.ends(job.run)))
    with job.clock.measure("compile"), waiting:
        for number in remaining:
            if (only := stages.trains(job.run, number)) not in programs:
                train_step = step.make_train_step(job.graph, job.run, number)
                lowered = train_step.lower(state, job.frozen, batch, job.key)
                programs[only] = lowered.compile()
        barrier("the training step is compiled")
    job.stop.activity = "this step"
    memory = reporting.memory_summary(next(iter(programs.values())))
    count = f"{len(programs)} training steps " if len(programs) > 1 else ""
    job.writer.log(f"compiled {count}in {job.clock.seconds['compile']:.1f} s; {memory}")
    return {number: programs[stages.trains(job.run, number)] for number in remaining}


def _next(job: TrainContext, batches: Iterator[Batch]) -> Batch:
    with job.clock.measure("data"):
        return shard_batch(next(batches), job.mesh)


def _save(job: TrainContext, state: step.TrainState, done: int, reporter: Reporter) -> None:
    cursor = reporter.cursor(done)
    with job.clock.measure("checkpoint"), jax.transfer_guard("allow"):
        job.checkpoints.save(done, state, cursor=cursor, meta=job.meta)
    job.writer.write("checkpoint", done, {"blocked_seconds": job.checkpoints.blocked[-1]})


def _check_stop(job: TrainContext, done: int) -> None:
    """Stop the run on a signal before the next step, when there is nothing new to save."""
    if signal_name := job.stop.poll():
        message = f"{signal_name}: stopped before step {done + 1}; {cli.RESUME}"
        job.writer.log(message)
        raise cli.Interrupted(message)


def _stop_after_checkpoint(job: TrainContext, signal_name: str, done: int) -> None:
    with job.clock.measure("checkpoint"):
        job.checkpoints.wait()
    message = f"{signal_name}: stopped after step {done}, checkpoint saved; {cli.RESUME}"
    job.writer.log(message)
    raise cli.Interrupted(message)


def _stop_for_records(job: TrainContext, state: step.TrainState, done: int) -> NoReturn:
    """Export the model of the stage that has ended and stop: the next one has no records yet."""
    number = stages.at(job.run, done)
    with job.clock.measure("checkpoint"), jax.transfer_guard("allow"):
        target = setup.export_result(job, state, done, f"_stage_{number - 1}")
    run, own = job.run, job.run.stages[number].records
    lora = run.train.trains == "lora"
    model = [run.train.init_from, "--adapter", target] if lora else [target]
    words = ["medmax_jax.data.prepare", "pseudo", run.data.train, "--model", *model, "--out", own]
    message = (
        f"stage {number} reads {own}, which does not exist yet. To make it with the model of stage "
        f"{number - 1}: python -m {shlex.join(words)}; then {cli.RESUME}"
    )
    job.writer.log(message)
    raise TrainError(message)  # not Interrupted: a scheduler would start the run again


def _finish(job: TrainContext, state: step.TrainState, last: dict[str, float]) -> dict[str, Any]:
    run = job.run
    with job.clock.measure("checkpoint"):
        target = setup.export_result(job, state, run.train.steps, "")
    clock = job.clock.report()
    seconds_by_purpose = " ".join(
        f"{name} {seconds:.1f}" for name, seconds in job.clock.seconds.items()
    )
    job.writer.log(
        f"finished {run.train.steps} steps in {clock['seconds_total']:.1f} s "
        f"({seconds_by_purpose}), goodput {clock['goodput']:.2f}; exported to {target}"
    )
    return last | {"step": run.train.steps, "export": target, "goodput": clock["goodput"]}


make_callable(__name__)

# ---- The program ----

FLAGS = flags.FLAGS


def _flags() -> None:
    flags.DEFINE_bool("extend", False, "resume with a larger train.steps than the checkpoint has")
    flags.DEFINE_bool(
        "dry_run", False, "compile the first step, without loading weights or writing files"
    )
    flags.DEFINE_string(
        "profile_steps", "", "FIRST:LAST: write an xprof trace of these steps to D/profile"
    )
    flags.DEFINE_string("wandb", "", "Weights & Biases project to log the metrics to")
    flags.DEFINE_multi_string(
        "listed_host", [], "host:port that may receive metrics of credentialed data"
    )


if __name__ == "__main__":
    _flags()
    cli.run(main, errors=ERRORS)
