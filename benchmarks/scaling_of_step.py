"""python benchmarks/scaling_of_step.py [--points 4] [--repeats 5] [--remat attn] [--json]

Measures how a LoRA step's time and memory grow with row length, rows and depth, on this CPU.

From one base size (width 128, 4 heads, MLP 384, vocabulary 9,728; rows of 256, 2 rows, 2 layers)
each axis is doubled separately. A line has seconds (median of --repeats), tokens/s, temporaries of
the step by the compiler, and its input bytes (weights, optimizer, batch). `slope`: d log / d
log of an axis by least squares; 1 is proportional. Attention is xla: it stores all scores, so
length tends to 2, and rows and depth stay at or under 1. Memory is exact; seconds have the noise
of the machine.
"""

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

import jax_side
import numpy as np
import sides

from medmax_jax import arguments

BASE = dict(length=256, rows=2, depth=2)
MEASURED = ("seconds", "temporaries_mib", "arguments_mib")


def settings(folder: str, remat: str, *, length: int, rows: int, depth: int) -> Any:
    """Return the run as a ConfigDict."""
    from medmax_jax.configs import base as base_config

    c = base_config.get_config()
    c.vocab.update(size=9_728, text_start=8_712)
    c.model.update(
        hidden_size=128, num_layers=depth, num_heads=4, num_kv_heads=4, head_dim=32,
        intermediate_size=384, context_length=length, param_dtype="float32",
        compute_dtype="float32", remat=remat,
    )  # fmt: skip
    c.data.update(
        train=folder, validation="", document_limit=length, seq_len=length, batch_size=rows,
        pack=False,
    )  # fmt: skip
    c.train.update(steps=1_000, prng_impl="rbg")
    return c


def measure(remat: str, repeats: int, **size: int) -> dict[str, float]:
    """Measure one step at one size."""
    from medmax_jax import config

    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "records"
        run = config.from_config_dict(settings(str(folder), remat, **size))
        jax_side.write_records(folder, run, count=size["rows"])
        trainer = jax_side.Trainer(run, batches=1)
    trainer.steps(1)
    seconds = sides.median(trainer.steps(repeats)["seconds"])
    planned = trainer.compiled.memory_analysis()
    return dict(
        seconds=seconds,
        tokens_per_second=round(size["rows"] * size["length"] / seconds, 1),
        temporaries_mib=round(planned.temp_size_in_bytes / 2**20, 3),
        arguments_mib=round(planned.argument_size_in_bytes / 2**20, 3),
    )


def slope(sizes: list[int], values: list[float]) -> float:
    """Return the slope of log value over log size. 1, 2, 4 and 3, 6, 12: 1.0."""
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 3)


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=4, help="sizes of each axis, 2 or more")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each size")
    parser.add_argument("--remat", default="attn", help="config.model.remat")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    if args.points < 2:
        parser.error(f"--points is {args.points}; a slope requires at least 2")
    load, base, results = os.getloadavg(), None, {}
    print("| axis | size | seconds | tokens/s | temporaries MiB | inputs MiB |")
    print("|---|---|---|---|---|---|")
    for axis in BASE:
        sizes = [BASE[axis] * 2**n for n in range(args.points)]
        measured = []
        for size in sizes:
            if size == BASE[axis] and base is not None:
                measured.append(base)  # the corner of all axes is measured once
            else:
                measured.append(measure(args.remat, args.repeats, **(BASE | {axis: size})))
            base = base or measured[0]
            print(
                f"| {axis} | {size} | {' | '.join(map(str, measured[-1].values()))} |", flush=True
            )
        slopes = {name: slope(sizes, [f[name] for f in measured]) for name in MEASURED}
        results[axis] = dict(sizes=sizes, measured=measured, slopes=slopes)
        cells = [slopes["seconds"], "", slopes["temporaries_mib"], slopes["arguments_mib"]]
        print(f"| {axis} | slope | {' | '.join(map(str, cells))} |", flush=True)
    if args.json:
        print(json.dumps(results | dict(remat=args.remat, load_average=[load, os.getloadavg()])))


if __name__ == "__main__":
    main()
