"""python benchmarks/true_size.py --scratch D [--torch_python PY] [--stage NAME ...] [--smoke]

Runs the complete pipeline at true size without an accelerator: a random 7B in the published
layouts, the published vocabulary of 65,536 ids, the published VQGAN at 512 px, and one layer of the
30B. Every program is the one that a user runs; its results are compared with HF's layers in torch.
PY: a Python with torch, transformers and peft; without it those comparisons are skipped by name.

A finished stage is not repeated (D/results has its result, D/logs its output); --stage chooses
some, of which each needs others before it. A stage starts only with enough free memory and disk.
--smoke runs the same code on tiny widths in minutes. --keep keeps the models in D. The last line is
one JSON object: the commands of each stage with seconds, peak memory in GB and the longest time
without output, and what was found.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import convert_7b
import jax
import sides
import true_size_jax as steps
import true_size_make as make

from medmax_jax import arguments
from medmax_jax.convert import full_check

HERE = pathlib.Path(__file__).resolve().parent
NEEDS = ["torch", "transformers", "peft", "safetensors"]
GB = 1e9
TOKENS, SMOKE_TOKENS = 2_304, 512
COUNTS = {  # flags: default, help
    "tokens": (None, f"of the packed row; default {TOKENS:,}, with --smoke {SMOKE_TOKENS}"),
    "train_tokens": (256, "of a row of the three steps; with an image a step takes ten minutes"),
    "text_tokens": (32, "to generate"),
    "image_codes": (64, "to generate"),
}
RUN_SECONDS = 4 * 3600  # until a training run that shall be killed counts as stuck


class Pipeline:
    """Holds the folder, the settings, and the commands of the stage that runs."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.job = args, steps.Job(args.scratch)
        self.commands: list[dict[str, Any]] = []
        self.stage = ""

    def path(self, name: str) -> str:
        """Return a path below the folder."""
        return self.job.path(name)

    def program(self, *words: str) -> dict[str, Any]:
        """Run a program of this project, measured; return the JSON of its last line, if any."""
        return self._run("", [sys.executable, "-u", "-m", *words])

    def ours(self, step: str) -> dict[str, Any]:
        """Run a step of true_size_jax.py."""
        script = str(HERE / "true_size_jax.py")
        return self._run("", [sys.executable, "-u", script, step, str(self.args.scratch)])

    def theirs(self, step: str) -> dict[str, Any]:
        """Run a step of true_size_torch.py, or return why it is skipped."""
        if self.args.skipped:
            return {"skipped": self.args.skipped}
        script = str(HERE / "true_size_torch.py")
        found = self._run("torch: ", [self.args.torch_python, "-u", script, step, self.path("")])
        return {f"against torch, {step}": found}

    def remove(self, *names: str) -> None:
        """Remove folders that no later stage needs."""
        for name in names if not self.args.keep else ():
            shutil.rmtree(self.path(name), ignore_errors=True)

    def _run(self, prefix: str, command: list[str]) -> dict[str, Any]:
        log = pathlib.Path(self.path("logs")) / f"{self.stage}.{len(self.commands)}.log"
        log.unlink(missing_ok=True)
        shown = prefix + " ".join(command[2:]).replace(str(self.args.scratch), "D")
        print(f"{self.stage}: {shown}", flush=True)
        measured = convert_7b.run_measured(command, log)
        self.commands.append({"command": shown.replace(f"{HERE}/", "")} | measured)
        print(f"    {measured}", flush=True)
        last = log.read_text().splitlines()[-1:]
        return json.loads(last[0]) if last and last[0].startswith("{") else {}


def inputs(pipeline: Pipeline) -> dict[str, Any]:
    """Write the random models in Meta's layout, the tokenizer, the VQGAN and the documents."""
    return pipeline.ours("inputs")


def convert(pipeline: Pipeline) -> dict[str, Any]:
    """Convert to the native and to HF's layout; the source is then removed."""
    for name, layout in (("native", "native"), ("hf", "hf")):
        _convert(pipeline, "meta", name, "--format", layout)
    pipeline.remove("meta/models")
    return dict(native_gb=_gb(pipeline, "native"), hf_gb=_gb(pipeline, "hf"))


def images(pipeline: Pipeline) -> dict[str, Any]:
    """Tokenize eight images, decode their codes, and compare both with torch."""
    result = pipeline.program(
        "data.prepare",
        "tokenize",
        "--images",
        pipeline.path("images"),
        "--out",
        pipeline.path("codes"),
        "--model",
        pipeline.path("native"),
        "--batch",
        "1",
        "--json",
    )
    return {"unique": result["unique"]} | pipeline.ours("codes") | pipeline.theirs("vq")


def records(pipeline: Pipeline) -> dict[str, Any]:
    """Make records of every kind of task, and pack them into rows of 4,096 and of 8,192."""
    made = pipeline.program(
        "data.prepare",
        "documents",
        "--from",
        pipeline.path("documents.jsonl"),
        "--images",
        pipeline.path("images"),
        "--codes",
        pipeline.path("codes"),
        "--model",
        pipeline.path("native"),
        "--out",
        pipeline.path("records"),
        "--json",
    )
    found = {name: made[name] for name in ("documents", "tokens", "longest", "tasks")}
    for length in (4_096, 8_192):
        plan = pipeline.program(
            "data.prepare", "plan", pipeline.path("records"), f"--seq_len={length}",
            "--document_limit=2048", "--json",
        )  # fmt: skip
        found[f"rows of {length}"] = {name: plan[name] for name in ("rows", "fill")}
    return found


def forward(pipeline: Pipeline) -> dict[str, Any]:
    """Compare one forward pass of a packed row with HF's layers, layer by layer, and the logits."""
    return pipeline.ours("forward") | pipeline.theirs("forward")


def generate(pipeline: Pipeline) -> dict[str, Any]:
    """Generate greedy text, and the first codes of an image with guidance; compare each token."""
    return pipeline.ours("generate") | pipeline.theirs("generate")


def gradient(pipeline: Pipeline) -> dict[str, Any]:
    """Compare loss and adapter gradients of one LoRA step with autograd in two layers."""
    return pipeline.ours("gradient") | pipeline.theirs("gradient")


def train(pipeline: Pipeline) -> dict[str, Any]:
    """Train three steps on short rows: kill the process after its first checkpoint, then resume."""
    shutil.rmtree(pipeline.path("run"), ignore_errors=True)
    fields = steps.overrides(pipeline.job, tokens=pipeline.job.settings["train_tokens"])
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    words = [
        "medmax_jax.train",
        "--config=configs/medmax_7b_lora.py",
        f"--workdir={pipeline.path('run')}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]
    _kill_after_first_checkpoint(pipeline, words)
    pipeline.program(*words)
    log = pathlib.Path(pipeline.path("run/metrics.jsonl")).read_text().splitlines()
    rows = [row for row in map(json.loads, log) if row["kind"] == "train"]
    resumed = "resum" in pathlib.Path(pipeline.path("run/train.log")).read_text()
    return dict(losses={row["step"]: round(row["loss"], 4) for row in rows}, resumed=resumed)


def _kill_after_first_checkpoint(pipeline: Pipeline, words: list[str]) -> None:
    """Start the training run, and send it SIGKILL during its second step."""
    with open(pipeline.path("logs/train.killed.log"), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *words], stdout=log, stderr=log, cwd=convert_7b.ROOT
        )
        deadline, folder = time.monotonic() + RUN_SECONDS, pathlib.Path(pipeline.path("run"))
        while not any(folder.glob("checkpoints/[0-9]*/sha256.json")):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise SystemExit(f"{words[0]} ended before its first checkpoint; see {log.name}")
            time.sleep(0.1)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{words[0]} ended by itself; use longer rows")


def export(pipeline: Pipeline) -> dict[str, Any]:
    """Merge the trained adapter, export to HF and Meta, reload in torch."""
    found = pipeline.ours("adapted")
    _convert(pipeline, "run", "merged_hf", "--format", "hf", "--base", pipeline.path("native"))
    found |= pipeline.theirs("reload")
    _convert(pipeline, "merged_hf", "merged_meta", "--format", "meta")
    found |= pipeline.theirs("meta")
    pipeline.remove("merged_hf", "merged_meta")
    return found


def quantize(pipeline: Pipeline) -> dict[str, Any]:
    """Convert to int8 and nf4; compare layers and logits with HF's on weights rounded in torch."""
    for kind in ("int8", "nf4"):
        _convert(pipeline, "hf", kind, "--format", "native", "--quant", kind)
    sizes = {f"{kind}_gb": _gb(pipeline, kind) for kind in ("int8", "nf4")}
    found = sizes | {"correlation of logits": pipeline.ours("quantized")}
    found |= pipeline.theirs("quantized")
    pipeline.remove("int8", "nf4")
    return found


def evaluate(pipeline: Pipeline) -> dict[str, Any]:
    """Evaluate eight items: closed and multiple-choice questions about two images."""
    make.write_items(pipeline.args.scratch)
    shutil.rmtree(pipeline.path("eval"), ignore_errors=True)
    fields = dict(
        questions=pipeline.path("items.jsonl"),
        baselines="constant",
        probes="",
        options=False,
        rows=1,
        images=str(make.SAMPLE),
    )
    pipeline.program(
        "medmax_jax.eval.run",
        "--config=configs/eval_tiny.py",
        f"--workdir={pipeline.path('eval')}",
        f"--model=native:{pipeline.path('native')}",
        "--config.sample.max_gen_len=1",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    )
    summary = json.loads(pathlib.Path(pipeline.path("eval/summary.json")).read_text())
    return dict(items=sum(row["n"] for row in summary["scores"]))


def large_layer(pipeline: Pipeline) -> dict[str, Any]:
    """Convert one layer of the 30B, and compare its forward and backward pass."""
    for name, layout in (("large", "native"), ("large_hf", "hf")):
        _convert(pipeline, "large_meta", name, "--format", layout)
    found = pipeline.ours("large_layer") | pipeline.theirs("large_layer")
    pipeline.remove("large", "large_hf", "large_meta")
    return found


def memory(pipeline: Pipeline) -> dict[str, Any]:
    """Compare the plan's arithmetic with what XLA's CPU client reports for the training step."""
    return pipeline.ours("memory")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, what it needs at true size, and the stages that it needs."""

    run: Callable[[Pipeline], dict[str, Any]]
    memory_gb: float
    disk_gb: float  # more than is there already
    after: tuple[str, ...] = ()


STAGES = {
    stage.run.__name__: stage
    for stage in (
        Stage(inputs, 6, 18),
        Stage(convert, 4, 29, ("inputs",)),
        Stage(images, 8, 1, ("convert",)),
        Stage(records, 2, 1, ("images",)),
        Stage(forward, 20, 3, ("records",)),
        Stage(generate, 20, 1, ("convert",)),
        Stage(gradient, 19, 2, ("records",)),
        Stage(train, 19, 2, ("records",)),
        Stage(export, 17, 29, ("train",)),
        Stage(quantize, 16, 13, ("convert",)),
        Stage(evaluate, 20, 1, ("convert",)),
        Stage(large_layer, 14, 9, ("inputs",)),
        Stage(memory, 4, 0, ("records",)),
    )
}


def check(name: str, stage: Stage, pipeline: Pipeline) -> None:
    """Exit with the reason when a stage cannot start."""
    done = pathlib.Path(pipeline.path("results"))
    if missing := [other for other in stage.after if not (done / f"{other}.json").exists()]:
        raise SystemExit(f"stage {name} needs {missing[0]}; add --stage {missing[0]}")
    if pipeline.args.smoke:
        return
    free = {
        "memory": full_check.available_memory(),
        "disk": shutil.disk_usage(pipeline.args.scratch).free,
    }
    for what, need in (("memory", stage.memory_gb), ("disk", stage.disk_gb)):
        if free[what] is not None and free[what] < need * GB:
            raise SystemExit(
                f"stage {name} needs {need} GB of {what}, but {free[what] / GB:.1f} GB are free; "
                f"free some{' or use another --scratch' if what == 'disk' else ''}, then run the "
                "same command"
            )


def run_stages(pipeline: Pipeline, names: list[str]) -> dict[str, Any]:
    """Run the stages that have no result yet; return all results."""
    folder, results = pathlib.Path(pipeline.path("results")), {}
    for name in names:
        file = folder / f"{name}.json"
        if not file.exists():
            check(name, STAGES[name], pipeline)
            pipeline.stage, pipeline.commands, load = name, [], os.getloadavg()
            found = STAGES[name].run(pipeline)
            peak = max((c["peak_VmRSS_gb"] for c in pipeline.commands), default=0.0)
            seconds = round(sum(c["seconds"] for c in pipeline.commands), 1)
            result = dict(seconds=seconds, peak_gb=peak, found=found, commands=pipeline.commands)
            file.write_text(json.dumps(result | dict(load_average=[load, os.getloadavg()])))
        results[name] = json.loads(file.read_text())
    return results


def _convert(pipeline: Pipeline, source: str, target: str, *flags: str) -> None:
    shutil.rmtree(pipeline.path(target), ignore_errors=True)
    places = ("--from", pipeline.path(source), "--to", pipeline.path(target))
    pipeline.program("medmax_jax.convert", *places, *flags)


def _gb(pipeline: Pipeline, name: str) -> float:
    return round(convert_7b.size_of(pathlib.Path(pipeline.path(name))) / GB, 3)


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=pathlib.Path, required=True, help="folder on a local disk"
    )
    parser.add_argument("--torch_python", default="", help="Python with " + ", ".join(NEEDS))
    parser.add_argument("--stage", action="append", choices=tuple(STAGES), help="default: all")
    for name, (default, meaning) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--smoke", action="store_true", help="tiny widths")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    args = parser.parse_args()
    args.scratch = args.scratch.absolute()
    args.skipped = "no --torch_python"
    if args.torch_python:
        lacks = sides.missing(args.torch_python, NEEDS)
        args.skipped = f"{args.torch_python} lacks {lacks}" if lacks else ""
    for name in ("results", "logs"):
        (args.scratch / name).mkdir(parents=True, exist_ok=True)
    job = args.scratch / "job.json"
    settings = {name: getattr(args, name) for name in ("smoke", *COUNTS)}
    settings["tokens"] = args.tokens or (SMOKE_TOKENS if args.smoke else TOKENS)
    if job.exists() and json.loads(job.read_text()) != settings:
        raise SystemExit(f"{args.scratch}: was made with {job.read_text()}; use another --scratch")
    job.write_text(json.dumps(settings))
    names = [name for name in STAGES if not args.stage or name in args.stage]
    results = run_stages(Pipeline(args), names)
    if not args.keep and not args.stage:
        shutil.rmtree(args.scratch)
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    print(json.dumps(settings | dict(skipped=args.skipped, stages=results, versions=versions)))


if __name__ == "__main__":
    main()
