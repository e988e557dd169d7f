"""python -m medmax_jax.plan --config=configs/medmax_7b_lora.py --topology=v5e:4x4 [--seq=2048] ...

Predict whether a run fits, its best possible speed and its cost. The program compiles the actual
training step, and the decode loop, for a machine that is not available; nothing is allocated.
Answers are stored in --cache.

    --topology=v5e:4x4 --slices=2       the machine: v4, v5e, v5p, v6e; A100-80, H100, H200, L40S:N
    --mesh=1,16,1                       data,fsdp,tp; or search, also over batch and remat
    --per_chip_batch=4 --seq=2048       rows of a microbatch on a device; tokens of a row
    --analytic                          a rough answer in a second, by arithmetic
    --decode=none                       the training step alone; or text, image, mixed
    --utilisation=0.6 --price=1.2       of the peak while products run; USD per chip-hour
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli, config, flops
from medmax_jax.config import Run
from medmax_jax.plan import analytic, compile_cache, search
from medmax_jax.plan import compile as plan_compile
from medmax_jax.plan.topology import PlanError, Topology, mesh_of, parse, use_no_device

_TOPOLOGY = flags.DEFINE_string("topology", None, "machine, for example v5e:4x4", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "number of slices")
_MESH = flags.DEFINE_string("mesh", "", "data,fsdp,tp; or search; empty: the mesh of the config")
_ROWS = flags.DEFINE_integer(
    "per_chip_batch", 0, "rows of a microbatch per device; 0: from the batch size of the config"
)
_SEQ = flags.DEFINE_integer("seq", 0, "tokens per row; 0: data.seq_len of the config")
_ANALYTIC = flags.DEFINE_bool("analytic", False, "estimate by arithmetic, without compiling")
_DECODE = flags.DEFINE_enum(
    "decode",
    "text",
    ["none", "text", "image", "mixed"],
    "output mode that decoding is compiled for",
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.6, "utilization: share of the peak FLOPs during matrix products"
)
_PRICE = flags.DEFINE_float("price", None, "USD per chip-hour")
_MOST = flags.DEFINE_integer("most", 3, "number of candidate settings that a search compiles")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(settings: ConfigDict, folder: str) -> None:
    """Run the program."""
    use_no_device()
    topology = parse(_TOPOLOGY.value, slices=_SLICES.value)
    if not 0 < _UTILISATION.value <= 1:
        raise PlanError(f"--utilisation={_UTILISATION.value}; it must be in (0, 1]")
    with cli.open_workdir(folder, "--cache") as work:
        _report(settings, topology, work.folder)


def _report(settings: ConfigDict, topology: Topology, cache: pathlib.Path) -> None:
    """Print the plan of the flags."""
    run, estimate = plan(settings, topology, cache)
    estimate |= analytic.rates(
        run, topology, estimate, utilisation=_UTILISATION.value, price=_PRICE.value
    )
    estimate["mesh"] = dict(zip(("data", "fsdp", "tp"), compile_cache.axes(run), strict=True))
    estimate |= {"batch_size": run.data.batch_size, "seq_len": run.data.seq_len}
    estimate |= {"remat": run.model.remat, "topology": topology.name, "slices": topology.slices}
    if _DECODE.value != "none" and not _ANALYTIC.value and topology.is_tpu:
        estimate["decode"] = _decoding(run, topology, cache)
    print("\n".join(format_plan(run, topology, estimate)))
    if _JSON.value:
        print(json.dumps(estimate))


def plan(settings: ConfigDict, topology: Topology, cache: pathlib.Path) -> tuple[Run, dict]:
    """Return the run given by the flags, or the best one found, and its answer."""
    tokens = settings.train.steps * settings.data.batch_size * settings.data.seq_len
    if _SEQ.value:
        limit = min(settings.data.document_limit, _SEQ.value)
        settings.data.update(seq_len=_SEQ.value, document_limit=limit)
    if _MESH.value == "search":
        # Everything is checked as given except the mesh, which the search replaces.
        settings.mesh.update(data=1, fsdp=1, tp=1)
        settings.train.steps = _steps(tokens, settings)
        run = config.from_config_dict(settings)
        rows = (_ROWS.value,) if _ROWS.value else search.ROWS
        runs = search.candidates(run, topology, rows=rows)
        order = search.rank_candidates(runs, topology, utilisation=_UTILISATION.value)
        return search.best_fitting(
            order, topology, lambda run: evaluate_setting(run, topology, cache),
            utilisation=_UTILISATION.value, most=_MOST.value,
        )  # fmt: skip
    config_mesh = ",".join(str(settings.mesh[axis]) for axis in ("data", "fsdp", "tp"))
    if not _MESH.value and math.prod(settings.mesh.values()) != topology.chips:
        raise PlanError(_mesh_hint(settings, topology))
    mesh = mesh_of(_MESH.value or config_mesh, topology)
    settings.mesh.update(dataclasses.asdict(mesh))
    if _ROWS.value:
        settings.data.batch_size = _ROWS.value * mesh.data * mesh.fsdp * settings.optim.accumulate
    settings.train.steps = _steps(tokens, settings)
    run = config.from_config_dict(settings)
    return run, evaluate_setting(run, topology, cache)


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


def evaluate_setting(run: Run, topology: Topology, cache: pathlib.Path) -> dict[str, Any]:
    """Return the answer for one setting."""
    if _ANALYTIC.value:
        return analytic.estimate(run, topology)
    program = plan_compile.train(run, topology)
    return dict(compile_cache.compile_cached(cache, program, run, topology))


def _decoding(run: Run, topology: Topology, cache: pathlib.Path) -> dict[str, Any]:
    rows, prompt = run.mesh.data * run.mesh.fsdp, run.model.context_length // 4
    program = plan_compile.decode(run, topology, mode=_DECODE.value, rows=rows, prompt=prompt)
    answer = compile_cache.compile_cached(cache, program, run, topology)
    streams = answer["rows"] * answer["streams"]
    bytes_read = flops.decode_bytes(run.model, run.vocab, run.lora, context=prompt, rows=streams)
    loops = answer.get("open_loops_s") or [None]  # the last loop writes tokens, one per iteration
    token_limit = bytes_read / topology.chips / topology.chip.hbm_rate
    return answer | {"token_s": loops[-1], "token_limit_s": round(token_limit, 8)}


def format_plan(run: Run, topology: Topology, answer: dict[str, Any]) -> list[str]:
    """Format the answer as text."""
    axes = " x ".join(f"{k} {v}" for k, v in answer["mesh"].items())
    verdict = "fits" if answer["fits"] else "does NOT fit"
    peak = "?" if answer["peak_hbm_gib"] is None else f"{answer['peak_hbm_gib']:.2f}"
    parts = ", ".join(f"{k} {v:.2f}" for k, v in answer["parts"].items() if v >= 0.005)
    lines = [
        f"{topology.slices} x {topology.name}, {axes}, {run.data.batch_size} rows of "
        f"{run.data.seq_len} tokens per step, remat {run.model.remat} ({answer['how']})",
        f"{verdict}: {peak} of {answer['hbm_gib']:.2f} GiB per chip ({parts})",
    ]
    if "error" in answer:
        lines.append(f"compiler error: {answer['error']}")
    lines += [
        f"{row['kind']}: {row['count']} per step, {row['bytes'] / 2**30:.2f} GiB, "
        + ("overlapped" if row["overlapped"] else "synchronous")
        for row in answer["collectives"] or []
    ]
    lines += [
        f"at {answer['utilisation']:.0%} of the peak: "
        f"{answer['tokens_per_s_per_chip']:,.0f} tokens/s per chip, MFU {answer['mfu']:.1%}, "
        f"step {answer['step_s']:.2f} s (compute {answer['compute_s']:.2f}, "
        f"overlapped {answer['overlapped_s']:.2f}, exposed {answer['exposed_s']:.2f})"
    ]
    if "scheduled_s" in answer:
        lines.append(f"scheduled, without kernels and waiting: {answer['scheduled_s']:.2f} s")
    cost = "" if answer["cost_usd"] is None else f", {answer['cost_usd']:,.0f} USD"
    lines.append(
        f"run: {run.train.steps:,} steps, {answer['hours']:,.1f} hours, "
        f"{answer['chip_hours']:,.0f} chip-hours{cost}"
    )
    return lines + _format_decoding(answer)


def _format_decoding(answer: dict[str, Any]) -> list[str]:
    if answer["how"] == "analytic":
        return ["estimated by arithmetic; omit --analytic to compile"]
    if "decode" not in answer:
        return []
    d = answer["decode"]
    token_ms = "?" if d["token_s"] is None else f"{1e3 * d['token_s']:.1f}"
    return [
        f"decoding {d['rows']} prompts, {d['mode']}: {'fits' if d['fits'] else 'does NOT fit'}, "
        f"{d['peak_hbm_gib']} GiB per chip, of which {d['cache_gib']:.2f} is the KV cache; one "
        f"token of each in {token_ms} ms as scheduled, at least "
        f"{1e3 * d['token_limit_s']:.1f} ms to read weights and cache"
    ]


if __name__ == "__main__":
    cli.run(
        main, errors=(PlanError, cli.WorkdirError), defaults={"cache": "runs/plan"}, folder="cache",
        compiles=False,
    )  # fmt: skip
