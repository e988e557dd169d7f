"""python benchmarks/gpu.py --part {train,qlora,decode,vq} --workdir D [--torch_python PY] [...]

Compares Chameleon-7B with random weights on one GPU with HF and peft on the same GPU in turn.

    train    a LoRA step, rows of 2,048 tokens, bf16: the same batch, then each side's best batch
    qlora    the same on a base in nf4; bitsandbytes on the other side
    decode   tokens/s: a prompt of 1,034 tokens and 256 greedy ones of each row
    vq       images of 512 px/s to codes; ours also back, for which HF has no decoder

A measurement is one process per side, and is stored in D/PART.json when it is done: the same
command resumes with the missing ones. None is started that may not end within --minutes; then the
exit code is 75 and `unfinished` names the rest. If a side runs out of memory or lacks a package,
that is recorded as the result. In measurement "same" both sides are alive and alternate, and first
show that they compute the same from the same weights: if not, `ratio` is null. The last line is
one JSON object: ours, theirs (the best of each), ratio, `same_batch`, and next to each of our
measurements the memory and time that medmax_jax.plan computes for it, with the error.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any

import gpu_parts
import sides

from medmax_jax import arguments

HERE = pathlib.Path(__file__).resolve().parent
RESTART = 75  # exit code: stopped early, the same command resumes
ROUNDS, FIRST_STEPS = 3, 10
GUESS = 150.0  # seconds of a measurement before the first one is done: a cold start of 7B


def run(measurement: gpu_parts.Measurement, args: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement; its failure is a result."""
    begin, running, results = time.perf_counter(), [], {}
    try:
        for name, spec in measurement.specs.items():
            if name == "theirs" and args.skipped:
                continue
            path = args.workdir / f"{name}.json"
            path.write_text(json.dumps(spec))
            python = sys.executable if name == "ours" else args.torch_python
            side = sides.Side(
                name,
                [python, str(HERE / measurement.scripts[name]), str(path)],
                **measurement.environment,
            )
            running.append(side)
            results[name] = dict(seconds=[])
        if len(measurement.specs) > 1:
            for side in running:
                results[side.name] |= side.ask(do="losses", count=FIRST_STEPS)
        for side in running:
            side.ask(do="steps", count=1)
        for _ in range(ROUNDS):
            for side in running:
                reply = side.ask(do="steps", count=measurement.steps)
                for key, values in reply.items():
                    results[side.name].setdefault(key, []).extend(values)
        for side in running:
            results[side.name] |= side.ask(do="about")
            results[side.name]["rate"] = sides.median(
                [measurement.work / s for s in results[side.name]["seconds"]]
            )
    except sides.Failed as error:
        results = dict(failed=str(error))
    finally:
        for side in running:
            side.close()
    return dict(
        sides=results, wall=round(time.perf_counter() - begin, 1), settings=measurement.settings
    )


def measure(
    todo: list[gpu_parts.Measurement], path: pathlib.Path, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Return (results by name, names of the rest); completed results are not repeated."""
    done = json.loads(path.read_text()) if path.exists() else {}
    end, longest = time.monotonic() + 60 * args.minutes, GUESS if args.size == "7b" else 0.0
    for number, measurement in enumerate(todo):
        if measurement.name in done:
            continue
        if time.monotonic() + longest > end:
            return done, [m.name for m in todo[number:] if m.name not in done]
        print(f"{measurement.name} ...", file=sys.stderr, flush=True)
        done[measurement.name] = run(measurement, args)
        longest = max(longest, done[measurement.name]["wall"])
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(done, indent=1))
        draft.replace(path)
    return done, []


def result(done: dict[str, Any], todo: list[gpu_parts.Measurement], args: argparse.Namespace):
    """Return the last line, without the list of missing measurements."""
    summary: dict[str, Any] = dict(ours=None, theirs=None, ratio=None, unit=todo[0].unit)
    best: dict[str, tuple[float, str]] = {}
    for measurement in todo:
        for name, side in done.get(measurement.name, {}).get("sides", {}).items():
            if name != "failed" and side["rate"] > best.get(name, (0.0, ""))[0]:
                best[name] = (side["rate"], measurement.name)
            if name == "ours":
                summary.setdefault("plan", {})[measurement.name] = gpu_parts.planned(
                    measurement, side
                )
    for name, (rate, where) in best.items():
        summary |= {name: rate, f"{name}_best": where}
    same = done.get("same", {}).get("sides", {})
    if {"ours", "theirs"} <= set(same):
        agreement = todo[0].agree(same["ours"]["losses"], same["theirs"]["losses"])
        rates = {name: same[name]["rate"] for name in ("ours", "theirs")}
        summary["same_batch"] = rates | dict(agreement=agreement, ratio=None)
        if agreement["ok"]:
            summary["same_batch"]["ratio"] = round(rates["ours"] / rates["theirs"], 3)
            summary["ratio"] = round(summary["ours"] / summary["theirs"], 3)
    if args.skipped:
        summary["skipped"] = args.skipped
    for measured in done.values():  # long, and part of `agreement`
        for side in measured["sides"].values():
            if isinstance(side, dict):
                side.pop("losses", None)
    failures = {n: d["sides"]["failed"] for n, d in done.items() if "failed" in d["sides"]}
    return summary | dict(failed=failures, measured=done)


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", required=True, choices=sorted(gpu_parts.NEEDS))
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="folder of the results so far"
    )
    parser.add_argument("--torch_python", default="", help="Python with torch, transformers, ...")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of this call")
    parser.add_argument(
        "--size",
        default="7b",
        choices=("7b", "tiny"),
        help="tiny: a small model on a CPU, for tests",
    )
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    needs, args.skipped, load = gpu_parts.NEEDS[args.part], "", os.getloadavg()
    if not args.torch_python:
        args.skipped = "theirs: no --torch_python"
    elif package := sides.missing(args.torch_python, needs):
        args.skipped = f"theirs: {args.torch_python} lacks {package}"
    todo = gpu_parts.measurements(args.part, args.size, args.workdir, theirs=not args.skipped)
    done, remaining = measure(todo, args.workdir / f"{args.part}.json", args)
    summary = result(done, todo, args) | dict(unfinished=remaining, part=args.part, size=args.size)
    print(json.dumps(summary | dict(load_average=[load, os.getloadavg()])))
    sys.exit(RESTART if remaining else 0)


if __name__ == "__main__":
    main()
