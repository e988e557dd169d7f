"""Predict whether a run fits, how fast it can be and what it costs: the program as a function."""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from medmax_jax import cli, config, flops
from medmax_jax.config import Run
from medmax_jax.models import chameleon
from medmax_jax.plan import analytic as plan_analytic
from medmax_jax.plan import compile as plan_compile
from medmax_jax.plan import compile_cache, search
from medmax_jax.plan.topology import PlanError, Topology, mesh_of, parse
from medmax_jax.sharding import make_mesh
from medmax_jax.training import stages, step


def plan(
    settings: ConfigDict,
    topology: str,
    cache: str | os.PathLike[str] = "runs/plan",
    *,
    slices: int = 1,
    mesh: str = "",
    per_chip_batch: int = 0,
    seq: int = 0,
    analytic: bool = False,
    decode: str = "",
    codes_per_pass: float = 2.5,
    utilisation: float = 0.6,
    price: float | None = None,
    most: int = 3,
) -> dict[str, Any]:
    """Return what the program prints with --json; nothing is allocated, `settings` do not change.

    Args:
        settings: the config, from `medmax_jax.load_config`.
        topology: the machine, for example v5e:4x4.
        cache: the folder of the compiler's answers.
        slices: the number of slices.
        mesh: data,fsdp,tp; or "search", also over batch and remat; "": the mesh of the config.
        per_chip_batch: rows of a microbatch per device; 0: from the batch size of the config.
        seq: tokens per row; 0: data.seq_len of the config.
        analytic: estimate by arithmetic, without compiling.
        decode: compile decoding in this mode: none, text, image, mixed; "": text, if for TPUs.
        codes_per_pass: the assumed codes that a pass settles where sample.jacobi_window is on.
        utilisation: the share of the peak FLOPs during matrix products.
        price: USD per chip-hour.
        most: the number of candidate settings that a search compiles.
    """
    cli.skip_absent_tpu()
    machine = parse(topology, slices=slices)
    if not 0 < utilisation <= 1:
        raise PlanError(f"--utilisation={utilisation}; it must be in (0, 1]")
    mode = _decoded(decode, machine, analytic)
    settings = ConfigDict(settings)  # a copy, which keeps references between fields
    with cli.open_workdir(cache, "--cache") as work:

        def answer(run: Run) -> dict[str, Any]:
            if analytic:
                return plan_analytic.estimate(run, machine)
            program = plan_compile.train(run, machine)
            return dict(compile_cache.compile_cached(work.folder, program, run, machine))

        if mesh == "search":
            runs = _candidates(settings, machine, per_chip_batch, seq)
            order = search.rank_candidates(runs, machine, utilisation=utilisation)
            run, estimate = search.best_fitting(
                order, machine, answer, utilisation=utilisation, most=most
            )
        else:
            run = _given(settings, machine, mesh, per_chip_batch, seq)
            estimate = answer(run)
        if mode:
            estimate["decode"] = _decoding(run, machine, work.folder, mode, codes_per_pass)
    estimate |= plan_analytic.rates(run, machine, estimate, utilisation=utilisation, price=price)
    return estimate | _facts(run, machine)


def _decoded(decode: str, machine: Topology, analytic: bool) -> str:
    """Return the mode that decoding is compiled in, "" for none; raise PlanError if it cannot."""
    if decode == "none":
        return ""
    if machine.is_tpu and not analytic:
        return decode or "text"
    if not decode:
        return ""
    how = "--analytic compiles nothing" if analytic else f"{machine.name} is not a TPU"
    raise PlanError(f"--decode={decode} is compiled for TPUs, but {how}; leave one of them out")


def _facts(run: Run, topology: Topology) -> dict[str, Any]:
    """Return what was planned: the mesh, the batch, the machine."""
    return {
        "mesh": dict(zip(("data", "fsdp", "tp"), compile_cache.axes(run), strict=True)),
        "batch_size": run.data.batch_size,
        "seq_len": run.data.seq_len,
        "remat": run.model.remat,
        "topology": topology.name,
        "slices": topology.slices,
        "steps": run.train.steps,
        "stages": _stages(run),
    }


def _stages(run: Run) -> list[dict[str, Any]]:
    """Return the facts of each stage; raise ConfigError where one names no parameter."""
    if not run.stages:
        return []
    with jax.set_mesh(make_mesh(config.Mesh(data=1, fsdp=1, tp=1))):  # only sizes are counted
        model = chameleon.abstract_model(run.model, run.vocab, run.lora)
        trainable = step.split_trainable(model, run.train.trains)[1]
    stages.check_trains(run, trainable)
    return stages.facts(run, trainable)


def _candidates(settings: ConfigDict, topology: Topology, rows: int, seq: int) -> list[Run]:
    """Return the settings that a search ranks: all is checked except the mesh, which they set."""
    tokens = _set_seq(settings, seq)
    settings.mesh.update(data=1, fsdp=1, tp=1)
    run = stages.with_steps(config.from_config_dict(settings), _steps(tokens, settings))
    return search.candidates(run, topology, rows=(rows,) if rows else search.ROWS)


def _given(settings: ConfigDict, topology: Topology, axes: str, rows: int, seq: int) -> Run:
    """Return the settings with the mesh, the rows and the length that were given."""
    tokens = _set_seq(settings, seq)
    config_mesh = ",".join(str(settings.mesh[axis]) for axis in ("data", "fsdp", "tp"))
    if not axes and math.prod(settings.mesh.values()) != topology.chips:
        raise PlanError(_mesh_hint(settings, topology))
    mesh = mesh_of(axes or config_mesh, topology)
    settings.mesh.update(dataclasses.asdict(mesh))
    if rows:
        settings.data.batch_size = rows * mesh.data * mesh.fsdp * settings.optim.accumulate
    return stages.with_steps(config.from_config_dict(settings), _steps(tokens, settings))


def _set_seq(settings: ConfigDict, seq: int) -> int:
    """Set the tokens of a row, 0: unchanged; return the tokens of the config's own run."""
    tokens = settings.train.steps * settings.data.batch_size * settings.data.seq_len
    if seq:
        limit = min(settings.data.document_limit, seq)
        settings.data.update(seq_len=seq, document_limit=limit)
    return tokens


def _mesh_hint(settings: ConfigDict, topology: Topology) -> str:
    """Return the error of a config whose mesh is of another machine, with the nearest mesh."""
    own = config.build(config.Mesh, settings.mesh)
    settings.mesh.update(data=1, fsdp=1, tp=1)
    run = config.from_config_dict(settings)
    near = search.nearest_mesh(own, search.candidates(run, topology))
    hint = f"--mesh={near.data},{near.fsdp},{near.tp}, the nearest, or " if near else ""
    return (
        f"config.mesh is {own.data} x {own.fsdp} x {own.tp}, but {topology.slices} x "
        f"{topology.name} has {topology.chips} chips; use {hint}--mesh=search"
    )


def _steps(tokens: int, settings: ConfigDict) -> int:
    """Return the steps that process as many tokens as the config's own run, whatever the batch."""
    return max(1, round(tokens / (settings.data.batch_size * settings.data.seq_len)))


def _decoding(
    run: Run, topology: Topology, cache: pathlib.Path, mode: str, codes_per_pass: float
) -> dict[str, Any]:
    if not codes_per_pass >= 1:
        raise PlanError(f"--codes_per_pass={codes_per_pass}; it must be at least 1")
    rows, prompt = run.mesh.data * run.mesh.fsdp, run.model.context_length // 4
    program = plan_compile.decode(run, topology, mode=mode, rows=rows, prompt=prompt)
    answer = compile_cache.compile_cached(cache, program, run, topology)
    streams = answer["rows"] * answer["streams"]
    bytes_read = flops.decode_bytes(run.model, run.vocab, run.lora, context=prompt, rows=streams)
    loops = answer.get("open_loops_s") or [None]  # the last loop writes tokens, one per iteration
    token_limit = bytes_read / topology.chips / topology.chip.hbm_rate
    window = run.sample.jacobi_window if mode != "text" else 0
    answer |= {"window": window, "token_s": loops[-1], "token_limit_s": round(token_limit, 8)}
    if mode != "text" and answer["token_s"] is not None:
        settled = codes_per_pass if window else 1.0
        passes = run.vq.codes_per_image / settled
        answer |= {"codes_per_pass": settled, "image_s": round(passes * answer["token_s"], 3)}
    return answer
