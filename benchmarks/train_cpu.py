"""python benchmarks/train_cpu.py [--torch_python PY] [--threads 2] [--rounds 5] [--prng rbg] [...]

Measures a LoRA step of a 42M Chameleon on a CPU in fp32, text only: vocabulary 16,384, width 512, 8
layers of 8 heads, MLP 1,376; rank 16, dropout 0.05, four rows of 1,024 tokens, AdamW and a clip.

    ours     tokens/s of medmax_jax/training/step.py, the median over all timed steps
    theirs   tokens/s of HF's Chameleon with peft's LoRA, sdpa attention (hf_side.py)
    ratio    ours / theirs: above 1 means that ours is faster

Both sides are processes with the same threads, which alternate; compile time and the first step
are separate. Before the timed part, both run the first ten steps without dropout from the same
weights on the same batches: if the losses differ by more than 1e-4, or do not change, the ratio is
null. Without --torch_python theirs is reported as skipped. The last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import sides

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from medmax_jax import arguments

NEEDS = ["torch", "transformers", "peft"]
AGREE, FIRST_STEPS = 1e-4, 10
SIZES = {
    "42m": dict(vocab=16_384, dim=512, layers=8, heads=8, mlp=1_376, seq=1_024, rows=4),
    "tiny": dict(vocab=9_728, dim=64, layers=2, heads=2, mlp=128, seq=64, rows=2),  # for a test
}


def settings(folder: str, args: argparse.Namespace) -> Any:
    """Return the run as a ConfigDict."""
    from medmax_jax.configs import base

    size, c = SIZES[args.size], base.get_config()
    c.vocab.update(size=size["vocab"], text_start=8_712)
    c.model.update(
        hidden_size=size["dim"], num_layers=size["layers"], num_heads=size["heads"],
        num_kv_heads=size["heads"], head_dim=size["dim"] // size["heads"],
        intermediate_size=size["mlp"], context_length=size["seq"], param_dtype="float32",
        compute_dtype="float32", remat=args.remat,
    )  # fmt: skip
    c.data.update(
        train=folder, validation="", document_limit=size["seq"], seq_len=size["seq"],
        batch_size=size["rows"], pack=False,
    )  # fmt: skip
    # A rate that changes the loss within ten steps, the same at every step.
    c.optim.update(peak_lr=3e-3, warmup_ratio=0.0, final_lr_ratio=1.0)
    c.train.update(steps=1_000, prng_impl=args.prng)
    return c


def start(scratch: pathlib.Path, args: argparse.Namespace) -> list[sides.Side]:
    """Start this project's side, and the other side if its Python is given."""
    import jax_side

    from medmax_jax import config

    run = config.from_config_dict(settings(str(scratch / "records"), args))
    jax_side.write_records(scratch / "records", run, count=run.data.batch_size * FIRST_STEPS)
    jax_side.write_batches(scratch / "batches.npz", run, count=FIRST_STEPS)
    sections = config.to_dict(run)
    (scratch / "ours.json").write_text(json.dumps(dict(run=sections, batches=FIRST_STEPS)))
    spec = {name: sections[name] for name in ("model", "vocab", "lora", "optim")} | dict(
        batches=str(scratch / "batches.npz"), rows=run.data.batch_size, device="cpu",
        dtype="float32", threads=args.threads, quant="none", checkpointing=False, compile=False,
        attention="sdpa",
    )  # fmt: skip
    (scratch / "theirs.json").write_text(json.dumps(spec))
    command = [sys.executable, str(HERE / "jax_side.py"), str(scratch / "ours.json")]
    started = [sides.Side("ours", command, JAX_PLATFORMS="cpu")]
    if args.torch_python:
        command = [args.torch_python, str(HERE / "hf_side.py"), str(scratch / "theirs.json")]
        started.append(sides.Side("theirs", command))
    return started


def measure(running: list[sides.Side], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return by side: the first losses, seconds of every timed step, and its description."""
    results: dict[str, dict[str, Any]] = {}
    for side in running:
        begin = time.perf_counter()
        losses = side.ask(do="losses", count=FIRST_STEPS)
        side.ask(do="steps", count=1)
        results[side.name] = losses | dict(seconds=[], ready=round(time.perf_counter() - begin, 1))
        print(side.name, losses, file=sys.stderr, flush=True)
    for _ in range(args.rounds):
        for side in running:
            timed = side.ask(do="steps", count=args.steps)["seconds"]
            results[side.name]["seconds"] += timed
            print(side.name, timed, file=sys.stderr, flush=True)
            time.sleep(args.pause)  # threads of the side that has worked stop spinning
    for side in running:
        results[side.name] |= side.ask(do="about")
        side.close()
    return results


def result(results: dict[str, dict[str, Any]], skipped: str, args: argparse.Namespace) -> dict:
    """Return the last line."""
    size = SIZES[args.size]
    tokens = size["rows"] * size["seq"]
    rate = {n: sides.median([tokens / s for s in f["seconds"]]) for n, f in results.items()}
    summary = dict(ours=rate["ours"], theirs=rate.get("theirs"), ratio=None, unit="tokens/s")
    if skipped:
        summary["skipped"] = skipped
    else:
        curves = [results[name].pop("losses") for name in ("ours", "theirs")]
        summary["losses"] = sides.agree(*curves, within=AGREE)
        if summary["losses"]["ok"]:
            summary["ratio"] = round(rate["ours"] / rate["theirs"], 3)
    return summary | dict(
        prng=args.prng, remat=args.remat, threads=args.threads, size=args.size, sides=results
    )


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python", default="", help="Python with " + ", ".join(NEEDS))
    parser.add_argument("--threads", type=int, default=2, help="cores, the same for both sides")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two rounds")
    parser.add_argument("--prng", default="rbg", choices=("threefry2x32", "rbg", "unsafe_rbg"))
    parser.add_argument("--remat", default="none", help="config.model.remat of ours")
    parser.add_argument("--size", default="42m", choices=sorted(SIZES))
    args = parser.parse_args()
    load = os.getloadavg()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(cores) < args.threads:
        parser.error(f"--threads is {args.threads}, but this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores)  # which both sides inherit and count
    skipped = ""
    if not args.torch_python:
        skipped = "theirs: no --torch_python"
    elif package := sides.missing(args.torch_python, NEEDS):
        skipped, args.torch_python = f"theirs: {args.torch_python} lacks {package}", ""
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(start(pathlib.Path(scratch), args), args)
    summary = result(results, skipped, args)
    print(json.dumps(summary | dict(load_average=[load, os.getloadavg()])))


if __name__ == "__main__":
    main()
