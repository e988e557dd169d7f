"""python benchmarks/loader.py --scratch D [--rows 20000] [--many 400000] [--rounds 5]

Measures the latency, rate and memory of loading batches, on synthetic records
(data/records/synthetic.py):

    ours     seconds from the imports to the first batch: open the folder, plan, read 8 rows
    theirs   the same for the method of the MedMax release, reimplemented: every row of a JSONL by
             json.loads into RAM, int64, one document per row, a batch padded to its longest
    ratio    theirs / ours: above 1 means that ours has a batch earlier

Each measurement is a separate process, ours and theirs in turn, files in the page cache. In
addition: imports, index (ours: open and plan), tokens/s of one process over --steps batches, peak
memory (VmHWM) and memory after the imports; ours also at --many rows. `theirs` has no torch:
numpy's int64 replaces its tensors and this process its DataLoader, which minimizes its work.
Then two epochs of the full mixture (1.47 M documents) are planned, next to offline packing, and a
reader is killed in the middle of its second epoch and started again. The last line is one JSON
object.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

START = time.monotonic()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SEQ_LEN, LIMIT, BATCH, MIXTURE = 4_096, 2_048, 8, 1_470_000


def memory(name: str) -> float:
    """Return VmRSS or VmHWM of this process, in MB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return round(int(line.split()[1]) * 1024 / 1e6, 1)
    raise KeyError(name)


def print_json(**numbers: object) -> None:
    """Print one line of JSON for the waiting process."""
    print(json.dumps(numbers), flush=True)


# ---- programs of each process


def settings(folder: str, steps: int):
    """Return a run that reads `folder`."""
    from medmax_jax import config
    from medmax_jax.configs import base as base_config

    raw = base_config.get_config()
    raw.data.update(
        train=folder, document_limit=LIMIT, seq_len=SEQ_LEN, batch_size=BATCH, validation=""
    )
    raw.train.update(steps=steps)
    return config.from_config_dict(raw)


def ours(folder: str, steps: int) -> None:
    """Load the first batch and the next ones, as training does."""
    from medmax_jax.data import loader

    run = settings(folder, steps + 1)
    imported, base = time.monotonic(), memory("VmRSS")
    batches = loader.train_batches(run, folder)
    indexed = time.monotonic()
    stream = batches.stream(0)
    next(stream)
    first = time.monotonic()
    tokens = sum(int((batch.segments > 0).sum()) for batch in stream)
    report(imported, indexed, first, tokens, base)


def theirs(path: str, steps: int) -> None:
    """Load all rows first, then padded batches of documents, as the MedMax release does."""
    import numpy as np

    imported, base = time.monotonic(), memory("VmRSS")
    with open(path) as file:
        rows = [np.array(json.loads(line)["tokens"][:LIMIT], np.int64) for line in file]
    indexed = time.monotonic()
    order = np.random.default_rng(0).permutation(len(rows))
    first, tokens = 0.0, 0
    for start in range(0, min(len(rows), (steps + 1) * BATCH), BATCH):
        batch = padded([rows[i] for i in order[start : start + BATCH]])
        first = first or time.monotonic()
        tokens += int(batch[1].sum()) if start else 0
    report(imported, indexed, first, tokens, base)


def padded(rows: list) -> tuple:
    """Return ids, mask and labels of a batch, padded to its longest row.

    Labels are -100 up to the separator.
    """
    import numpy as np

    shape = (len(rows), max(map(len, rows)))
    ids, mask = np.full(shape, 1, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100, np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)], mask[r, : len(row)] = row, 1
        begin = int(np.flatnonzero(row == 8_710)[0]) + 1  # the separator
        labels[r, begin : len(row)] = row[begin:]
    return ids, mask, labels


def report(imported: float, indexed: float, first: float, tokens: int, base: float) -> None:
    """Print the numbers of one side."""
    print_json(
        imports=round(imported - START, 3),
        index=round(indexed - imported, 4),
        first_batch=round(first - imported, 4),
        tokens_per_second=round(tokens / (time.monotonic() - first)),
        after_imports_mb=base,
        peak_mb=memory("VmHWM"),
    )


def digests(folder: str, start: int, stop: int) -> None:
    """Print a digest of each batch from `start` on, one per line."""
    from medmax_jax.data import loader

    batches = loader.train_batches(settings(folder, stop), folder)
    for step, batch in enumerate(batches.stream(start), start=start):
        digest = hashlib.sha256()
        for name in ("ids", "segments", "positions", "weights"):
            digest.update(getattr(batch, name).tobytes())
        epoch = batches.stats(step).epoch
        print(f"{step} {epoch} {digest.hexdigest()}", flush=True)


# ---- measurements


def child(*arguments: object) -> dict:
    """Run one of the above; return its output."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout.splitlines()[-1])
    print(*arguments[:1], result, flush=True)
    return result


def make(scratch: pathlib.Path, rows: int, jsonl: bool) -> tuple[pathlib.Path, pathlib.Path]:
    """Write the same documents as records and, if requested, as the released JSONL."""
    from medmax_jax.data.records import synthetic, writer

    folder, path = scratch / f"records_{rows}", scratch / f"rows_{rows}.jsonl"
    documents = synthetic.documents(rows, seed=0)
    if not (folder / "dataset.json").exists():
        writer.write(folder, documents, shard_size=4_096, layout=synthetic.LAYOUT, notes={})
    if jsonl and not path.exists():
        with open(path, "w") as out:
            for d in synthetic.documents(rows, seed=0):
                row = dict(text="<image> " + "word " * 60, image_path=d.image_path, task=d.task)
                row |= dict(source=d.source, credential=d.credential)
                out.write(json.dumps(row | {"tokens": d.tokens.tolist()}) + "\n")
    return folder, path


def planned() -> dict:
    """Plan two epochs of the full mixture at each row length; return how full its rows are."""
    import numpy as np

    from medmax_jax.data.packing import mixing, pack
    from medmax_jax.data.packing import report as packing_report
    from medmax_jax.data.records import synthetic

    lengths, table = synthetic.lengths(MIXTURE, seed=0), {}
    short = lengths[lengths <= LIMIT]
    for seq_len in packing_report.ROW_LENGTHS:
        start = time.monotonic()
        for epoch in (0, 1):
            plan = pack.plan(short, seq_len=seq_len, pack=True, seed=0, epoch=epoch)
        seconds = time.monotonic() - start
        images = np.arange(len(short)) // 2
        windows = mixing.group_by_image(np.arange(len(short)), images, size=256, seed=0, epoch=0)
        image_centric = pack.plan(
            short, seq_len=seq_len, pack=True, seed=0, epoch=0, windows=windows
        )
        offline = short.sum() / (packing_report.best_fit_row_count(short, seq_len) * seq_len)
        table[seq_len] = dict(
            two_epochs_seconds=round(seconds, 2),
            rows=len(plan),
            fill=round(packing_report.packing_efficiency(plan, seq_len), 4),
            offline=round(float(offline), 4),
            image_centric=round(packing_report.packing_efficiency(image_centric, seq_len), 4),
        )
        print(seq_len, table[seq_len], flush=True)
    batches = {n: packing_report.padding_efficiency(short, batch_size=n, seed=0) for n in (8, 64)}
    excluded = MIXTURE - len(short)
    return dict(
        excluded=excluded, rows_of=table, padded_to_longest=batches, peak_mb=memory("VmHWM")
    )


def weighted() -> dict:
    """Return the seconds for two epochs of the full mixture with a weight for each source."""
    import numpy as np

    from medmax_jax.data.mixture import SOURCES
    from medmax_jax.data.packing import mixing, pack
    from medmax_jax.data.records import synthetic

    lengths = synthetic.lengths(MIXTURE, seed=0)
    shares = np.array([s.percent for s in SOURCES])
    group = np.random.default_rng(1).choice(len(SOURCES), MIXTURE, p=shares / shares.sum())
    start = time.monotonic()
    draws = mixing.sample_group(group, lengths, np.sqrt(shares).tolist(), "tokens")
    for epoch in (0, 1):
        counts = mixing.repeat_documents(group, draws, seed=0, epoch=epoch)
        windows = mixing.shuffled_windows(np.arange(MIXTURE), counts, seed=0, epoch=epoch)
        pack.plan(lengths, seq_len=16_384, pack=True, seed=0, epoch=epoch, windows=windows)
    repeated = any(len(np.unique(w)) < len(w) for w in windows)
    return dict(
        two_epochs_seconds=round(time.monotonic() - start, 2), repeated_in_a_window=repeated
    )


def killed(folder: pathlib.Path, steps_an_epoch: int) -> dict:
    """Kill a reader in its second epoch, resume in another, and compare the batches."""
    stop = 2 * steps_an_epoch
    command = [sys.executable, __file__, "--child", "digests", str(folder)]
    complete = subprocess.run(
        [*command, "0", str(stop)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    process = subprocess.Popen([*command, "0", str(stop)], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if len(lines) == steps_an_epoch * 3 // 2:
            process.kill()
            break
    process.communicate()
    position, epoch = len(lines), int(lines[-1].split()[1])
    rest = subprocess.run(
        [*command, str(position), str(stop)], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    result = dict(killed_after=position, epoch=epoch, steps=stop, equal=lines + rest == complete)
    print("killed", result, flush=True)
    return result


def middle(runs: list[dict]) -> dict:
    """Return the median of each number."""
    return {name: statistics.median(r[name] for r in runs) for name in runs[0]}


def main() -> None:
    """Run the program."""
    if sys.argv[1:2] == ["--child"]:
        name, path, *numbers = sys.argv[2:]
        {"ours": ours, "theirs": theirs, "digests": digests}[name](path, *map(int, numbers))
        return
    from medmax_jax import arguments  # not in a child, whose imports are measured

    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=pathlib.Path, required=True, help="folder for 2 GB of records"
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="batches after the first")
    parser.add_argument("--keep", action="store_true", help="keep the records")
    args = parser.parse_args()
    load, scratch = os.getloadavg(), args.scratch / "loader"
    scratch.mkdir(parents=True, exist_ok=True)
    folder, path = make(scratch, args.rows, jsonl=True)
    print(f"{path.stat().st_size / 1e6:.0f} MB of JSONL", flush=True)
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        runs["theirs"].append(child("theirs", path, args.steps))
        runs["ours"].append(child("ours", folder, args.steps))
    large = [child("ours", make(scratch, args.many, jsonl=False)[0], args.steps)]
    large += [child("ours", scratch / f"records_{args.many}", args.steps) for _ in range(2)]
    results = dict(planned=planned(), weighted=weighted())
    steps_an_epoch = args.rows // (3 * BATCH)
    results["killed"] = killed(folder, steps_an_epoch)
    if not args.keep:
        shutil.rmtree(scratch)
    finish(runs, large, results, load)


def finish(runs: dict, large: list[dict], results: dict, load: tuple) -> None:
    """Print the last line."""
    import grain
    import jax
    import numpy as np

    mine, other = middle(runs["ours"]), middle(runs["theirs"])
    result = dict(
        ours=mine["first_batch"],
        theirs=other["first_batch"],
        ratio=round(other["first_batch"] / mine["first_batch"], 1),
        ours_all=mine,
        theirs_all=other,
        ours_many_rows=middle(large),
        **results,
        load_average=[load, os.getloadavg()],
        versions={
            "jax": jax.__version__, "grain": grain.__version__, "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
    )  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
