"""python benchmarks/decode_cpu.py [--torch_python PY] [--threads 2] [--rounds 5] [--size 42m]

Measures CPU decoding in fp32 with the 42M Chameleon of train_cpu.py and the same weights.

    ours     tokens/s of medmax_jax/generation/scheduler.py, 8 rows: prompts of 128 tokens, 128 new,
             greedy
    theirs   tokens/s of HF's generate with sdpa attention (decode_hf_side.py)
    ratio    ours / theirs at 8 rows: above 1 means that ours is faster; `batch_1` is at 1 row

Both sides process prompts and output in the timed part, alternate, and compile beforehand. If they
do not write the same tokens up to the first near tie, the ratio is null.
Then this project alone, medians too:

    interleaved   an image and text in each answer: 8 rows at a time against one at a time
    guidance      one image per row: 1 stream, 2 (a text prompt), 3 (a prompt with an image)
    shared        10 questions on one image: in one engine against one engine each
    jacobi        images of the shipped model: sample.jacobi_window against one code per pass

Without --torch_python the other side is reported as skipped. The last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import sides
from train_cpu import settings as train_settings

from medmax_jax import arguments

HERE = pathlib.Path(__file__).resolve().parent
NEEDS = ["torch", "transformers", "peft"]
WINDOW = 16  # of jacobi
AGREE = 16  # first tokens of every row that must be the same on both sides
SIZES = {
    "42m": dict(prompt=128, new=128, codes=256, words=30, rows=8),
    "tiny": dict(prompt=16, new=32, codes=16, words=8, rows=2),  # for a test
}


def start(scratch: pathlib.Path, args: argparse.Namespace) -> list[sides.Side]:
    """Start this project's side, and the other side if its Python is given."""
    size = SIZES[args.size]
    args.prng, args.remat = "threefry2x32", "none"
    run = train_settings("", args)
    rng = np.random.default_rng(0)
    prompts = rng.integers(run.vocab.text_start, run.vocab.size, (size["rows"], size["prompt"]))
    prompts[:, 0], prompts[:, -1] = 0, 8_710
    spec = dict(
        run=run.to_dict(), codes=size["codes"], words=size["words"], prompts=prompts.tolist()
    )
    (scratch / "ours.json").write_text(json.dumps(spec))
    command = [sys.executable, str(HERE / "decode_jax_side.py"), str(scratch / "ours.json")]
    started = [sides.Side("ours", command, JAX_PLATFORMS="cpu")]
    if args.torch_python:
        sections = {name: spec["run"][name] for name in ("model", "vocab")}
        spec = sections | dict(prompts=spec["prompts"], threads=args.threads, attention="sdpa")
        (scratch / "theirs.json").write_text(json.dumps(spec))
        command = [args.torch_python, str(HERE / "decode_hf_side.py"), str(scratch / "theirs.json")]
        started.append(sides.Side("theirs", command))
    return started


def text(running: list[sides.Side], rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens per second of each side, and their ratio."""
    new, rate, answers = SIZES[args.size]["new"], {s.name: [] for s in running}, {}
    for side in running:
        answers[side.name] = side.ask(do="text", rows=rows, new=new)["tokens"]  # compiles
    for _ in range(args.rounds):
        for side in running:
            done = side.ask(do="text", rows=rows, new=new)
            rate[side.name].append(sum(map(len, done["tokens"])) / done["seconds"])
    summary = {name: sides.median(values) for name, values in rate.items()} | dict(ratio=None)
    if len(running) == 2:
        same = [
            next((n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), new)
            for pair in zip(answers["ours"], answers["theirs"], strict=True)
        ]
        summary["same_tokens"] = same
        if min(same) >= AGREE:
            summary["ratio"] = round(summary["ours"] / summary["theirs"], 3)
    return summary


def measure_ours(side: sides.Side, args: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements that only this project's side has."""
    rows = SIZES[args.size]["rows"]

    def rate(**question: Any) -> float:
        side.ask(**question)  # compiles
        done = [side.ask(**question) for _ in range(args.rounds)]
        return sides.median([d["tokens"] / d["seconds"] for d in done])

    def seconds(**question: Any) -> tuple[float, Any]:
        side.ask(**question)
        done = [side.ask(**question) for _ in range(args.rounds)]
        return sides.median([d["seconds"] for d in done]), done[0]["tokens"]

    batched = rate(do="interleaved", rows=rows, count=rows)
    single = rate(do="interleaved", rows=1, count=rows)
    streams = {str(n): rate(do="guided", streams=n, rows=rows) for n in (1, 2, 3)}
    shared, tokens = seconds(do="shared", together=True, questions=10)
    separate, others = seconds(do="shared", together=False, questions=10)
    return dict(
        jacobi=measure_jacobi(side, args),
        interleaved=dict(rows=rows, batched=batched, single=single, ratio=batched / single),
        guidance=dict(tokens_per_second=streams, two_against_three=streams["2"] / streams["3"]),
        shared=dict(
            seconds=shared, separate=separate, ratio=separate / shared, same=tokens == others
        ),
    )


def measure_jacobi(side: sides.Side, args: argparse.Namespace) -> dict[str, Any]:
    """Return how many times fewer passes and less time a window takes: at all rows, and at one."""
    report: dict[str, Any] = dict(window=WINDOW)
    for name, rows in (("", SIZES[args.size]["rows"]), ("_1", 1)):
        for window in (0, WINDOW):
            side.ask(do="jacobi", window=window, rows=rows)  # compiles
        runs = [
            [side.ask(do="jacobi", window=window, rows=rows) for window in (0, WINDOW)]
            for _ in range(args.rounds)
        ]
        single, windowed = zip(*runs, strict=True)
        report |= {
            "step_ratio" + name: round(single[0]["steps"] / windowed[0]["steps"], 3),
            "time_ratio" + name: round(
                sides.median([run["seconds"] for run in single])
                / sides.median([run["seconds"] for run in windowed]), 3,
            ),
            "same_tokens" + name: single[0]["tokens"] == windowed[0]["tokens"],
        }  # fmt: skip
    return report


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch_python", default="", help="Python with torch and transformers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="42m")
    args = parser.parse_args()
    skipped = ""
    if not args.torch_python:
        skipped = "theirs: no --torch_python"
    elif package := sides.missing(args.torch_python, NEEDS):
        skipped, args.torch_python = f"theirs: {package} is missing", ""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        running = start(pathlib.Path(scratch), args)
        rows = SIZES[args.size]["rows"]
        many, single = text(running, rows, args), text(running, 1, args)
        own = measure_ours(running[0], args)
        about = {side.name: side.ask(do="about") for side in running}
        for side in running:
            side.close()
    summary = dict(
        ours=many["ours"], theirs=many.get("theirs"), ratio=many["ratio"], unit="tokens/s"
    )
    summary |= dict(rows=rows, batch_1=single, same_tokens=many.get("same_tokens")) | own
    summary |= dict(threads=args.threads, size=args.size, about=about, load=load)
    print(json.dumps(summary | (dict(skipped=skipped) if skipped else {})))


if __name__ == "__main__":
    main()
