"""python benchmarks/suite_scale.py [--items 10000] [--profile FILE]

Measures the suite without a model, on questions of twelve benchmarks in their published formats.

    import   data.prepare eval_items of each benchmark: seconds
    plan     the items are loaded and their images are checked: seconds
    run      the constant baseline answers them: seconds
    score    scores with intervals, three baselines and the report: seconds
    peak     resident memory of a process that plans, runs and scores: MiB

The files are generated, with real images of data/sample scaled to 64 pixels. Then the same with
twice the items, for the growth of the memory. --profile writes cProfile's statistics of the first
process. The last line is JSON.
"""

import cProfile
import csv
import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import benchmark_files as files

from medmax_jax import arguments
from medmax_jax.models import images

SIDE = 64
STAGES = ("plan", "run", "score")
LIMIT_S, GROWTH = 60.0, 1.3


def small_images() -> list[bytes]:
    """Return the sample's images, scaled down."""
    small = []
    for path in files.IMAGES:
        out = io.BytesIO()
        full = images.load(path, max_pixels=images.MAX_PIXELS)
        full.resize((SIDE, SIDE)).save(out, "JPEG")
        small.append(out.getvalue())
    return small


def write_of_medmax(folder: pathlib.Path, count: int) -> None:
    """Write the files of five benchmarks of MedMax's suite."""
    rad, slake, probmed, path_vqa = [], [], [], []
    table = io.StringIO()
    letters = [f"Choice {letter}" for letter in "ABCD"]
    writer = csv.writer(table)
    writer.writerow(["index", "Figure_path", "Caption", "Question", *letters, "Answer", "split"])
    for n in range(count):
        name, shown = f"{n // 5}.jpg", files.image(n // 5)
        if n % 5 == 0:
            for place in ("vqa_rad/VQA_RAD Image Folder", "slake/imgs", "pmc_vqa/figures"):
                files.put(folder, f"{place}/{name}", shown)
            files.put(folder, f"probmed/chest/{name}", shown)
        yes = "Yes" if n % 2 else "No"
        rad.append(
            dict(
                qid=n, image_name=name, image_organ="CHEST", answer=yes, answer_type="CLOSED",
                question_type="PRES", question=f"Is finding {n} present?",
                phrase_type="test_freeform",
            )
        )  # fmt: skip
        slake.append(
            dict(
                img_id=n, img_name=name, question=f"What is organ {n}?", answer="The liver",
                q_lang="en", location="Abdomen", modality="MRI", answer_type="OPEN",
                content_type="Organ", qid=n,
            )
        )  # fmt: skip
        probmed.append(
            dict(
                id=n // 5, image=f"chest/{name}", question=f"Does it show {n}?",
                answer=yes.lower(), qa_type="entity_hallu_0", image_type="chest_x-ray",
            )
        )  # fmt: skip
        path_vqa.append(
            dict(image=dict(bytes=shown, path=None), question=f"What is {n}?", answer="a cell")
        )
        writer.writerow([n, name, "", f"Which of {n}?", "A: CT", "B: MRI", "C: a", "D: b", "B", ""])
    files.put(folder, "vqa_rad/VQA_RAD Dataset Public.json", json.dumps(rad))
    files.put(folder, "slake/test.json", json.dumps(slake))
    files.put(folder, "probmed/test.json", json.dumps(probmed))
    files.put(folder, "pmc_vqa/test_2.csv", table.getvalue())
    files.put_parquet(folder, "pathvqa/test-00000-of-00001.parquet", path_vqa)


def write(folder: pathlib.Path, count: int) -> list[str]:
    """Write the files of twelve benchmarks, `count` items in all; return their names."""
    ours = ["medframeqa", "kormedmcqa_v", "medbookvqa", "medxpertqa_mm", "gmai_mmbench"]
    ours += ["r_rad", "r_slake"]
    names = ["vqa_rad", "slake", "pathvqa", "pmc_vqa", "probmed", *ours]
    share = count // len(names)
    write_of_medmax(folder, share)
    for name in ours:
        rows = share // 2 if name.startswith("r_") else share  # closed, and as many open ones
        row_of, put = getattr(files, name), getattr(files, f"put_{name}")
        put(folder / name, [row_of(n) for n in range(rows)])
    return names


def import_all(folder: pathlib.Path, names: list[str]) -> float:
    """Import every benchmark; return the seconds."""
    from medmax_jax.eval.tasks import benchmark_import

    begin = time.perf_counter()
    for name in names:
        out = folder / "items" / name
        out.parent.mkdir(exist_ok=True)
        benchmark_import.eval_items(
            name, folder / name, out, prefix=name, allow_counts=True, max_bad=0.0
        )
        for path in out.glob("images"):  # embedded images lie with the others, under the prefix
            path.rename(folder / name / "images")
    return time.perf_counter() - begin


def evaluate(folder: pathlib.Path, profile: str) -> dict:
    """Plan, run and score the items of a folder; return the seconds of each, and the peak."""
    from medmax_jax.config import build
    from medmax_jax.configs import eval_suite
    from medmax_jax.eval.config import Settings
    from medmax_jax.eval.pipeline import stages

    config = eval_suite.get_config().unlock()
    config.questions = ",".join(map(str, sorted(folder.glob("items/*/items.jsonl"))))
    config.images, config.probes, config.options = str(folder), "", False
    settings = build(Settings, config)
    begin, marks = time.perf_counter(), {}

    def mark(name: str, stage):
        def timed(*args, **fields):
            marks.setdefault(name, time.perf_counter())
            return stage(*args, **fields)

        return timed

    stages.run_inference = mark("plan", stages.run_inference)
    stages.build_summary = mark("run", stages.build_summary)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    summary = stages.run(
        settings, folder / "workdir", model="baseline:constant", progress=lambda _: None
    )
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)
    ends = [marks["plan"], marks["run"], time.perf_counter()]
    seconds = [end - start for start, end in zip([begin, *ends], ends, strict=False)]
    return dict(zip(STAGES, (round(s, 2) for s in seconds), strict=True)) | dict(
        items=sum(row.n for row in summary.scores if row.headline),
        tasks=sum(row.headline for row in summary.scores),
        cpu_s=round(time.process_time(), 1),
        peak_mib=round(peak_kib() / 1024, 1),
    )


def peak_kib() -> int:
    """Return the peak of this program's memory; getrusage would start with that of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def measure(count: int, profile: str) -> dict:
    """Return the measurements of `count` items; the evaluation is a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        names = write(folder, count)
        seconds = import_all(folder, names)
        command = [sys.executable, __file__, "--of", str(folder), "--profile", profile]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if done.returncode:
            sys.exit((done.stdout + done.stderr)[-2_000:])
        found = {"benchmarks": len(names), "import": round(seconds, 2)}
        return found | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure both sizes, then print one line of JSON."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--profile", default="", help="file for the statistics of cProfile")
    parser.add_argument(
        "--of", type=pathlib.Path, help="measure a folder of items, in this process"
    )
    args, before = parser.parse_args(), os.getloadavg()
    if args.of:
        print(json.dumps(evaluate(args.of, args.profile)))
        return
    small = small_images()
    files.image = lambda number: small[number % len(small)]
    sizes = {}
    for count, profile in ((args.items, args.profile), (2 * args.items, "")):
        sizes[count] = measure(count, profile)
        print(f"{count} items: {sizes[count]}", flush=True)
    first, second = sizes.values()
    total = round(sum(first[stage] for stage in STAGES), 2)
    growth = round(second["peak_mib"] / first["peak_mib"], 3)
    result = {
        "sizes": sizes,
        "plan_run_score_s": total,
        "peak_growth": growth,
        "within": total <= LIMIT_S and growth <= GROWTH,
        "load_average": [before, os.getloadavg()],
        "versions": {"jax": importlib.metadata.version("jax"), "python": sys.version.split()[0]},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
