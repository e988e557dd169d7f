"""python benchmarks/startup.py [--parts help generate ...] [--rounds 3 --before CHECKOUT]

Measures how long programs take to start, each in a new process, with an empty compile cache and
again with the cache that the first process left:

    help         --help of each program
    generate     the first answer to one prompt; it is one chunk, so its first token is no earlier
    eval         eval.run on ten items, complete, with its probes, baselines and report
    train        the first step of configs/tiny.py
    sweep        a run of one step, complete, inside of `sweep run`
    quickstart   complete, by stage

`cpu` is user and system seconds of the process and its children, which other work on the machine
changes little; `wall` is seconds by the clock; `import` is the part of Python's imports and
`compile` the part of XLA, or of reading its cache, both by the clock. `silent` is the longest time
without a line of output. With --rounds the numbers are medians; with --before the rounds alternate
with those of the script in another checkout. The last line is one JSON object. Linux only.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments

PROGRAMS = (
    *(f"medmax_jax.{name}" for name in ("quickstart", "train", "train_vqgan", "generate")),
    *(f"medmax_jax.{name}" for name in ("convert", "plan", "scaling", "sweep")),
    *("data.prepare", "data.objective", "eval.run", "eval.report", "eval.compare", "eval.suite"),
)
TINY = "medmax_jax/tiny"
ITEMS = dict(vqa_closed=8, image_generation=2)
KEYS = ("cpu", "wall", "import", "compile", "silent")
TICKS = os.sysconf("SC_CLK_TCK")
IMPORT = re.compile(r"import time: +(\d+) \|")
COMPILED = re.compile(r"Finished XLA compilation of .* in ([\d.]+) sec")


class Child:
    """Runs a program; `rows` has the seconds at lines of its output that contain a mark."""

    def __init__(self, program: str, *arguments: str, folder: pathlib.Path, marks: str = ""):
        self.rows: list[dict] = []
        self._imports = self._compiles = self._silent = 0.0
        self._begin = self._last = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
            "XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "matplotlib"),
            "PYTHONUNBUFFERED": "1", "PYTHONPROFILEIMPORTTIME": "1", "JAX_LOG_COMPILES": "1",
            "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-m", program, *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        ) as process:  # fmt: skip
            shown = []
            for line in process.stdout:
                if self._measured(line):
                    continue
                shown.append(line)
                self._silent = max(self._silent, time.monotonic() - self._last)
                self._last = time.monotonic()
                if marks and re.search(marks, line):
                    self._mark(line.strip(), _tree_cpu(process.pid))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{program} {' '.join(arguments)} failed:\n{''.join(shown)[-3_000:]}")
        self._mark("end", usage.ru_utime + usage.ru_stime)

    def _measured(self, line: str) -> bool:
        """Add up the lines of Python and of JAX about imports and compilations."""
        if found := IMPORT.match(line):
            self._imports += int(found[1]) / 1e6
        elif found := COMPILED.search(line):
            self._compiles += float(found[1])
        return line.startswith("import time:") or "jax._src" in line or "Compiling jit" in line

    def _mark(self, line: str, cpu: float) -> None:
        seconds = {"cpu": cpu, "wall": time.monotonic() - self._begin}
        seconds |= {"import": self._imports, "compile": self._compiles, "silent": self._silent}
        self.rows.append({k: round(v, 2) for k, v in seconds.items()} | {"line": line[:90]})


def _tree_cpu(root: int) -> float:
    """Return the processor seconds of a process and of all processes below it."""
    parents, seconds = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], seconds[pid] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS
    total = 0.0
    for process in seconds:
        ancestor = process
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        total += seconds[process] if ancestor == root else 0
    return total


def help_texts(folder: pathlib.Path) -> dict:
    """Return the rows of --help of each program."""
    return {name: Child(name, "--help", folder=folder).rows[-1] for name in PROGRAMS}


def generate(folder: pathlib.Path) -> dict:
    """Return the rows of the first answer."""
    words = [f"--model={TINY}", "--prompt=Is it a CT?", "--config.sample.max_gen_len=96"]
    return _twice(
        lambda out: Child("medmax_jax.generate", *words, f"--out={out}", folder=folder,
                          marks="^  -> ").rows[0],
        folder,
    )  # fmt: skip


def evaluate(folder: pathlib.Path) -> dict:
    """Return the rows of an evaluation."""
    others = ("vqa_mcq", "vqa_open", "captioning", "multimodal", "visual_chat")
    counts = dict.fromkeys(others, 0) | ITEMS
    words = ["--config=configs/eval_tiny.py", f"--model=native:{TINY}"]
    words += [f"--config.counts.{name}={count}" for name, count in counts.items()]
    return _twice(
        lambda out: Child("eval.run", *words, f"--workdir={out}", folder=folder).rows[-1], folder
    )


def train(folder: pathlib.Path) -> dict:
    """Return the rows of the first step."""
    words = ["--config=configs/tiny.py", *_overrides(_records(folder, "instruction"))]
    words += ["--config.train.steps=1", "--config.train.log_every=1"]
    return _twice(
        lambda out: Child("medmax_jax.train", *words, f"--workdir={out}", folder=folder,
                          marks="^step 1/1").rows[0],
        folder,
    )  # fmt: skip


def sweep(folder: pathlib.Path) -> dict:
    """Return the rows of the first runs of a sweep; a later run is the difference of two rows."""
    home, fixed = folder / "sweep", _records(folder, "pretraining")
    fixed |= {"train.steps": 1, "train.log_every": 1}
    words = [f"--config.axes=({{'seeds': (0, 1, 2)}}, {{'fixed': {fixed}}})"]
    command = ["medmax_jax.sweep", "expand", "--config=configs/sweep_tiny.py", *words]
    Child(*command, f"--workdir={home}", folder=folder)
    rows = Child("medmax_jax.sweep", "run", f"--workdir={home}", folder=folder,
                 marks=": finished").rows  # fmt: skip
    later = {name: round(rows[2][name] - rows[1][name], 2) for name in ("cpu", "wall")}
    return {"first": rows[0], "later": later | {"line": rows[2]["line"]}}


def quickstart(folder: pathlib.Path) -> dict:
    """Return the rows of the ends of stages."""
    rows = Child("medmax_jax.quickstart", f"--workdir={folder / 'quickstart'}", folder=folder,
                 marks=r"^== .*: ").rows  # fmt: skip
    keys = ("cpu", "wall", "import", "compile")
    stages, before = {}, dict.fromkeys(keys, 0.0)
    for row in rows:
        name = row["line"].removeprefix("== ").partition(":")[0]
        stages[name] = {key: round(row[key] - before[key], 2) for key in keys}
        before = row
    return stages | {"total": rows[-1]}


def _twice(measure, folder: pathlib.Path) -> dict:
    """Return the rows with an empty compile cache and with the one that this leaves."""
    name = f"{len(list(folder.iterdir()))}"
    return {kind: measure(folder / f"{name}_{kind}") for kind in ("cold", "warm")}


def _records(folder: pathlib.Path, kind: str) -> dict[str, str]:
    """Write the embedded sample as records; return the fields of a config that name them."""
    fields = {}
    for split in ("train", "validation"):
        fields[f"data.{split}"] = str(folder / kind / split)
        words = ["--out", fields[f"data.{split}"], "--split", split, "--kind", kind]
        Child("data.prepare", "sample", *words, folder=folder / "records")
    return fields


def _overrides(fields: dict[str, str]) -> list[str]:
    return [f"--config.{name}={value}" for name, value in fields.items()]


PARTS = dict(help=help_texts, generate=generate, eval=evaluate, train=train, sweep=sweep,
             quickstart=quickstart)  # fmt: skip


def main() -> None:
    """Run the parts, print a table, then one line of JSON."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--before", type=pathlib.Path, help="another checkout of this repository")
    args, load = parser.parse_args(), os.getloadavg()
    if args.before or args.rounds > 1:
        results = _medians(args.parts, args.rounds, args.before)
    else:
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "medmax_jax"], cwd=ROOT, check=True
        )
        results = {}
        for part in args.parts:
            with tempfile.TemporaryDirectory() as folder:
                results[part] = PARTS[part](pathlib.Path(folder))
    print(f"{'':34} " + " ".join(f"{key:>7}" for key in KEYS))
    for part, rows in results.items():
        for name, row in rows.items():
            numbers = " ".join(f"{row[key]:7.1f}" if key in row else " " * 7 for key in KEYS)
            print(f"{part + ' ' + name:34} {numbers}", flush=True)
    result = {"unit": "s", "results": results, "load_average": [load, os.getloadavg()]}
    versions = {"jax": importlib.metadata.version("jax"), "python": sys.version.split()[0]}
    print(json.dumps(result | {"cores": os.cpu_count(), "versions": versions}))


def _medians(parts: list[str], rounds: int, before: pathlib.Path | None) -> dict:
    """Return the medians of rounds of this script, alternating with the other checkout."""
    checkouts = {"": ROOT} | ({"before": before.resolve()} if before else {})
    values: dict = {}
    for number in range(rounds):
        for label, root in checkouts.items():
            command = [sys.executable, f"{root}/benchmarks/startup.py", "--parts", *parts]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for part, rows in json.loads(output.splitlines()[-1])["results"].items():
                for name, row in rows.items():
                    of_row = values.setdefault(f"{label} {part}".strip(), {}).setdefault(name, {})
                    for key in KEYS:
                        of_row.setdefault(key, []).extend([row[key]] if key in row else [])
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return {
        part: {
            name: {key: round(statistics.median(all_), 2) for key, all_ in row.items() if all_}
            for name, row in rows.items()
        }
        for part, rows in values.items()
    }


if __name__ == "__main__":
    main()
