"""python -m medmax_jax.plan --config=configs/medmax_7b_lora.py --topology=v5e:4x4 [--seq=2048] ...

Predict whether a run fits, its best possible speed and its cost. The program compiles the actual
training step, and the decode loop, for a machine that is not available; nothing is allocated.
Answers are stored in --cache.

    --topology=v5e:4x4 --slices=2       the machine: v4, v5e, v5p, v6e; A100-80, H100, H200, L40S:N
    --mesh=1,16,1                       data,fsdp,tp; or search, also over batch and remat
    --per_chip_batch=4 --seq=2048       rows of a microbatch on a device; tokens of a row
    --analytic                          a rough answer in a second, by arithmetic
    --decode=image                      also of an image, on TPUs; or mixed, none; default: text
    --utilisation=0.6 --price=1.2       of the peak while products run; USD per chip-hour
"""

import json
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from medmax_jax import cli
from medmax_jax.plan.api import plan
from medmax_jax.plan.topology import PlanError, use_no_device
from medmax_jax.training import stages

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
    None,
    ["none", "text", "image", "mixed"],
    "output mode that decoding is compiled for; default: text, if this is a plan by the compiler "
    "for TPUs",
)
_CODES = flags.DEFINE_float(
    "codes_per_pass", 2.5, "codes that a pass settles where config.sample.jacobi_window is on"
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.6, "utilization: share of the peak FLOPs during matrix products"
)
_PRICE = flags.DEFINE_float("price", None, "USD per chip-hour")
_MOST = flags.DEFINE_integer("most", 3, "number of candidate settings that a search compiles")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object as the last line")


def main(settings: ConfigDict, folder: str) -> None:
    """Read the flags and print the plan."""
    use_no_device()
    answer = plan(
        settings, _TOPOLOGY.value, folder, slices=_SLICES.value, mesh=_MESH.value,
        per_chip_batch=_ROWS.value, seq=_SEQ.value, analytic=_ANALYTIC.value,
        decode=_DECODE.value or "", codes_per_pass=_CODES.value,
        utilisation=_UTILISATION.value, price=_PRICE.value, most=_MOST.value,
    )  # fmt: skip
    print("\n".join(format_plan(answer)))
    if _JSON.value:
        print(json.dumps(answer))


def format_plan(answer: dict[str, Any]) -> list[str]:
    """Format the answer as text."""
    axes = " x ".join(f"{k} {v}" for k, v in answer["mesh"].items())
    verdict = "fits" if answer["fits"] else "does NOT fit"
    peak = "?" if answer["peak_hbm_gib"] is None else f"{answer['peak_hbm_gib']:.2f}"
    parts = ", ".join(f"{k} {v:.2f}" for k, v in answer["parts"].items() if v >= 0.005)
    lines = [
        f"{answer['slices']} x {answer['topology']}, {axes}, {answer['batch_size']} rows of "
        f"{answer['seq_len']} tokens per step, remat {answer['remat']} ({answer['how']})",
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
        f"run: {answer['steps']:,} steps, {answer['hours']:,.1f} hours, "
        f"{answer['chip_hours']:,.0f} chip-hours{cost}"
    )
    lines += [stages.describe(stage) for stage in answer["stages"]]
    return lines + _format_decoding(answer)


def _format_decoding(answer: dict[str, Any]) -> list[str]:
    if answer["how"] == "analytic":
        return ["estimated by arithmetic; omit --analytic to compile"]
    if "decode" not in answer:
        return []
    d = answer["decode"]
    token_ms = "?" if d["token_s"] is None else f"{1e3 * d['token_s']:.1f}"
    image = ""
    if "image_s" in d:
        image = (
            f"; an image of each in {d['image_s']:.1f} s, {d['codes_per_pass']:g} codes per pass"
        )
    return [
        f"decoding {d['rows']} prompts, {d['mode']}: {'fits' if d['fits'] else 'does NOT fit'}, "
        f"{d['peak_hbm_gib']} GiB per chip, of which {d['cache_gib']:.2f} is the KV cache; one "
        f"{'pass' if d['window'] else 'token'} of each in {token_ms} ms as scheduled, at least "
        f"{1e3 * d['token_limit_s']:.1f} ms to read weights and cache{image}"
    ]


if __name__ == "__main__":
    cli.run(
        main, errors=(PlanError, cli.WorkdirError), defaults={"cache": "runs/plan"}, folder="cache",
        compiles=False,
    )  # fmt: skip
