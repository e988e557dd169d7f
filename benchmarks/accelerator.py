"""Runs the measurements of gpu.py and tpu.py, one after another, and writes their JSON and page.

A measurement is one process per side, ended after --limit_s. D/results.json and D/page.html are
written after each one, so that the same command goes on where an interrupted one was. Running out
of memory and out of time are results, too; only other failures are repeated by the next call.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import accelerator_page
import accelerator_parts
import sides
from accelerator_parts import Accelerator, Measurement

from medmax_jax import arguments, flops
from medmax_jax.environment import environment
from medmax_jax.plan import topology

RESTART = 75  # exit code: stopped early, the same command resumes
ROUNDS, FIRST_STEPS = 3, 10
LIMIT_S = 180.0
MEASURED, MEMORY, LATE = "measured", "out of memory", "time limit"
PROBE = (
    "import jax, json; d = jax.local_devices(); "
    "print(json.dumps(dict(platform=d[0].platform, kind=d[0].device_kind, chips=len(d))))"
)


def main(device: Accelerator, text: str) -> None:
    """Run the program of one kind of device; `text` is its help."""
    args = _arguments(device, text)
    topology.use_no_device()  # in this process: the sides need all of it
    machine = _machine(device, args)
    folder: pathlib.Path = args.workdir
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else dict(measurements={})
    if results.setdefault("machine", machine) != machine:
        sys.exit(f"error: {path} is of {results['machine']}, not of {machine}; use a new --workdir")
    skipped = _skipped(device, args.torch_python)
    todo = accelerator_parts.measurements(
        args.parts, device, chips=machine["chips"], smoke=args.smoke, folder=folder,
        theirs={*accelerator_parts.NEEDS} - {*skipped} if device.theirs else set(),
    )  # fmt: skip
    results |= dict(program=f"{device.platform}.py", skipped=skipped)
    done, end = results["measurements"], time.monotonic() + 60 * args.minutes
    rest = [m for m in todo if not _is_done(done.get(m.name), args.limit_s)]
    results["unfinished"] = [m.name for m in rest]
    for m in rest:
        if time.monotonic() + (0 if args.smoke else args.limit_s) > end:
            break
        print(f"{m.name} ...", file=sys.stderr, flush=True)
        done[m.name] = run(m, args, flops.chip(machine["kind"]))
        results["unfinished"].remove(m.name)
        results["environment"] = environment()
        results["comparison"] = _comparison(done)
        _write(path, json.dumps(results, indent=1))
        _write(folder / "page.html", accelerator_page.page(results))
    results.setdefault("comparison", {})
    print(json.dumps(results | dict(page=str(folder / "page.html"))))
    failed = any(record["outcome"] == "failed" for record in done.values())
    sys.exit(RESTART if results["unfinished"] else int(failed))


def run(m: Measurement, args: argparse.Namespace, chip: flops.Chip | None) -> dict[str, Any]:
    """Return the record of one measurement; its failure is a result."""
    begin, running, found = time.perf_counter(), [], {}
    record: dict[str, Any] = dict(
        part=m.part, unit=m.unit, chips=m.chips, date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        plan=accelerator_parts.plan(m, chip),
    )  # fmt: skip
    try:
        for name, spec in m.specs.items():
            path = args.workdir / f"{name}.json"
            path.write_text(json.dumps(spec))
            python = sys.executable if name == "ours" else args.torch_python
            command = [python, str(HERE / m.scripts[name]), str(path)]
            running.append(sides.Side(name, command, limit_s=args.limit_s, **m.environment))
            found[name] = dict(seconds=[])
        losses = [s.ask(do="losses", count=FIRST_STEPS)["losses"] for s in running[1:] and running]
        for side in running:
            found[side.name]["first_s"] = side.ask(do="steps", count=1)["seconds"][0]
        for _ in range(ROUNDS):
            for side in running:
                for key, values in side.ask(do="steps", count=m.steps).items():
                    found[side.name].setdefault(key, []).extend(values)
        for side in running:
            found[side.name] |= side.ask(do="about")
        record |= dict(outcome=MEASURED, sides={n: _rates(m, s) for n, s in found.items()})
        if losses:
            record["agreement"] = m.agree(*losses)
        if "ours" in found:
            record |= _compared(m, record, chip)
    except sides.Failed as error:
        record |= dict(outcome=error.outcome, message=str(error), limit_s=args.limit_s)
    finally:
        for side in running:
            side.close()
    return record | dict(wall_s=round(time.perf_counter() - begin, 1))


def _rates(m: Measurement, side: dict[str, Any]) -> dict[str, Any]:
    """Return a side with its rate and the seconds of its step, both medians."""
    real = [side["tokens"]] * len(side["seconds"]) if "tokens" in side else None  # no padding
    of_steps = side.pop("work", real or [m.work] * len(side["seconds"]))
    rates = [n / s for n, s in zip(of_steps, side["seconds"], strict=True)]
    return side | dict(rate=sides.median(rates), step_s=sides.median(side["seconds"]))


def _compared(m: Measurement, record: dict[str, Any], chip: flops.Chip | None) -> dict[str, Any]:
    """Return what the chip reached of its limits, and the errors of the plan."""
    side = record["sides"]["ours"]
    needed, moved = accelerator_parts.work(m, side)
    rate = needed / side["step_s"] / m.chips
    result: dict[str, Any] = dict(
        roofline=dict(intensity=needed / moved, flops_per_s=rate, flops=needed, bytes=moved)
    )
    if m.part in accelerator_parts.QUANT:
        result["utilization"] = accelerator_parts.utilization(m, side, needed, chip)
    if record["plan"]:
        measured = dict(gib=side["peak_gib"], seconds=side["step_s"])
        result["plan_error"] = {
            name: round(record["plan"][name] / value - 1, 3)
            for name, value in measured.items()
            if value and name in record["plan"]
        }
    return result


def _comparison(done: dict[str, Any]) -> dict[str, Any]:
    """Return by part the best rates of both sides on one chip, and their ratio.

    The ratio is null unless both sides have shown that they compute the same.
    """
    found: dict[str, Any] = {}
    for record in done.values():
        for name, side in record.get("sides", {}).items() if record["chips"] == 1 else ():
            best = found.setdefault(record["part"], dict(ours=None, theirs=None, ratio=None))
            best[name] = max(best[name] or 0, side["rate"])
        if "agreement" in record:
            found[record["part"]].setdefault("agreement", record["agreement"])
    for best in found.values():
        if best["theirs"] and best["ours"] and best.get("agreement", {}).get("ok"):
            best["ratio"] = round(best["ours"] / best["theirs"], 3)
    return {part: best for part, best in found.items() if best["theirs"]}


def _is_done(record: dict[str, Any] | None, limit_s: float) -> bool:
    if record is None or record["outcome"] == "failed":
        return False
    return record["outcome"] != LATE or record["limit_s"] >= limit_s


def _machine(device: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """Return the platform, kind and number of the devices of JAX; exit if it is another platform.

    A process of its own finds out, because a TPU serves one process at a time.
    """
    if args.smoke:
        return dict(platform="cpu", kind="cpu", chips=2 if device.meshes else 1, smoke=True)
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    found = dict(platform="no device", error=probe.stderr.strip().rpartition("\n")[2])
    with contextlib.suppress(IndexError, ValueError):
        found = json.loads(probe.stdout.splitlines()[-1])
    if found["platform"] != device.platform:
        sys.exit(
            f"error: JAX finds {found.get('kind') or found['error'] or 'no device'} here, not a "
            f"{device.platform}; install its JAX (docs/guides/install.md), or use --smoke"
        )
    return found | dict(chips=found["chips"] if device.meshes else 1, smoke=False)


def _skipped(device: Accelerator, python: str) -> dict[str, str]:
    """Return for each part of the other side that is not measured the reason."""
    needs = accelerator_parts.NEEDS if device.theirs else {}
    if not python:
        return dict.fromkeys(needs, "no --torch_python")
    missing = {part: sides.missing(python, packages) for part, packages in needs.items()}
    return {part: f"{python} lacks {name}" for part, name in missing.items() if name}


def _write(path: pathlib.Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def _arguments(device: Accelerator, text: str) -> argparse.Namespace:
    parser = arguments.Parser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="folder of results.json and page.html"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=accelerator_parts.PARTS, default=accelerator_parts.PARTS
    )
    parser.add_argument("--limit_s", type=float, default=LIMIT_S, help="of one measurement")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"),
        help="of this call: none starts that may not end within them",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a tiny model on a CPU, to test this")
    if device.theirs:
        parser.add_argument("--torch_python", default="", help="Python with torch, peft, ...")
    else:
        parser.set_defaults(torch_python="")
    return parser.parse_args()
