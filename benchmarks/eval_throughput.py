"""python benchmarks/eval_throughput.py [--rounds 3] [--items 64] [--samples 10000]

Measures the evaluation loop with the shipped tiny model; answers are stored as by eval.run.

    ours     samples/s of eval/pipeline/inference.py with the generation engine, 32 rows at a time
    theirs   samples/s of the same loop and model, one sample at a time, as in the MedMax release
    ratio    ours / theirs: above 1 means that batches are faster

Both alternate in one process, on closed questions and captions of the embedded set, the programs
compiled beforehand. Both must write the same text, else the ratio is null. Then the suite over a
synthetic set of --samples closed questions with the constant baseline, which is eval.run without
a model: seconds, and resident memory after the first tenth and at the end. The last line is JSON.
"""

import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import PIL.Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments
from medmax_jax.config import build
from medmax_jax.configs import eval_tiny
from medmax_jax.eval.config import Settings
from medmax_jax.eval.models import base
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.tasks.selection import load_eval_set
from medmax_jax.generation import model_bundle

TINY = ROOT / "medmax_jax" / "tiny"
ROWS = 32


def throughput(items: int, rounds: int) -> dict:
    """Return the median samples/s of both sides."""
    config = eval_tiny.get_config().unlock()
    config.counts.update(vqa_mcq=0, vqa_open=0, image_generation=0, multimodal=0)
    config.counts.update(vqa_closed=items // 2, captioning=items - items // 2)
    settings = build(Settings, config)
    eval_set, g = load_eval_set(settings), model_bundle.load(TINY)
    model = {
        name: base.NativeModel(g, settings.sample, rows=rows, name=name, fingerprint=name)
        for name, rows in (("ours", ROWS), ("theirs", 1))
    }
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    texts: dict[str, list[str]] = {}
    for number in range(rounds + 1):  # the first one compiles
        for name in model if number % 2 else reversed(model):
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                records = inference.run_items(
                    model[name],
                    eval_set.items,
                    mode="strict",
                    images_folder=eval_set.folder,
                    out=pathlib.Path(folder) / "records.jsonl",
                    progress=lambda line: None,
                    window=settings.window if name == "ours" else 1,
                )
                elapsed = time.perf_counter() - begin
            texts[name] = [record["text"] for record in records]
            if number:
                seconds[name].append(elapsed)
                print(f"{name}: {len(records) / elapsed:.2f} samples/s", flush=True)
    rate = {
        name: len(eval_set.items) / statistics.median(values) for name, values in seconds.items()
    }
    same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True))
    agree = same == len(eval_set.items)
    return rate | {
        "ratio": rate["ours"] / rate["theirs"] if agree else None,
        "items": len(eval_set.items),
        "same_texts": same,
        "seconds": seconds,
    }


def write_synthetic(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Write closed questions, ten on each image."""
    path = folder / "items.jsonl"
    with open(path, "w") as file:
        for n in range(count):
            name = f"{n // 10}.png"
            if n % 10 == 0:
                color = (n // 10 % 256, n // 2_560 % 256, 0)
                PIL.Image.new("RGB", (16, 16), color).save(folder / name)
            row = dict(task_name="vqa_rad", question_type="closed", prompt=f"Is it {n}?")
            row |= dict(answer="yes" if n % 3 else "no", image_path=name, id=str(n))
            file.write(json.dumps(row | {"data_class": "open"}) + "\n")
    return path


# A process starts with the peak of its parent, so a small process must fork it: this one holds the
# models.
_PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def suite_of(count: int) -> dict:
    """Return seconds and peak memory of eval.run on `count` samples and on a tenth of them."""
    by_size = {}
    for size in (count // 10, count):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            items = write_synthetic(folder, size)
            command = [sys.executable, "-m", "eval.run", "--config=configs/eval_tiny.py"]
            command += ["--model=baseline:constant", f"--config.questions={items}"]
            command += ["--config.probes=", "--config.options=False", f"--workdir={folder / 'out'}"]
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _PEAK, *command], cwd=ROOT, capture_output=True, text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
            if done.returncode:
                sys.exit((done.stdout + done.stderr)[-2_000:])
            by_size[size] = dict(
                seconds=round(time.perf_counter() - begin, 1),
                peak_mib=round(int(done.stdout.splitlines()[-1]) / 1024, 1),
                records=sum(1 for _ in open(folder / "out" / "records.jsonl")),
            )
            print(f"{size} samples: {by_size[size]}", flush=True)
    return {"suite": by_size, "mib_per_thousand": _slope(by_size)}


def _slope(by_size: dict) -> float:
    (few, small), (many, large) = by_size.items()
    return round((large["peak_mib"] - small["peak_mib"]) / (many - few) * 1_000, 2)


def main() -> None:
    """Run both parts, then print one line of JSON."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--samples", type=int, default=10_000)
    args, before = parser.parse_args(), os.getloadavg()
    result = throughput(args.items, args.rounds) | suite_of(args.samples)
    result |= {"unit": "samples/s", "load_average": [before, os.getloadavg()]}
    versions = {"jax": importlib.metadata.version("jax"), "python": sys.version.split()[0]}
    print(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
    main()
