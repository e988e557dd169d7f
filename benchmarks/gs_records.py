"""python benchmarks/gs_records.py [--bucket gs://BUCKET/FOLDER] [--documents 20000] [--rounds 3]

Compares the input pipeline on records under gs:// with the same records on a disk: seconds until
the first batch, and rows per second after it. Records on gs:// are copied to the disk of a host
once, so there are three cases: local, the first start on gs://, and a later start.

Without --bucket, the server is fake-gcs-server on this machine (in memory), which has no network
between it and the client. Each case runs in a process of its own; the cases alternate. The last
line is one JSON object with medians; ratio: steady rate on gs:// over that on the disk.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gs_server
import micro_run

from medmax_jax import arguments
from medmax_jax.data import loader
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import Folder

ROWS = 256  # of a steady measurement, after the first batch


def measure(folder: str) -> dict[str, float]:
    """Return the seconds until the first batch, and the rate of the next rows."""
    settings = micro_run.run(data__train=folder, train__steps=10_000)
    begin = time.monotonic()
    batches = loader.train_batches(settings, folder).stream(0)
    next(batches)
    first, count = time.monotonic() - begin, ROWS // settings.data.batch_size
    begin = time.monotonic()
    for _ in range(count):
        next(batches)
    rows = count * settings.data.batch_size
    return dict(first_batch_s=first, rows_per_s=rows / (time.monotonic() - begin))


def run_in_process(folder: str, stage: pathlib.Path) -> dict[str, float]:
    """Measure in a new process, as a start of a training run does."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", folder], check=True, stdout=subprocess.PIPE,
        text=True, env=os.environ | {workdir.STAGE_VARIABLE: str(stage)},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the program."""
    parser = arguments.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", default="", help="folder of a bucket that may be written")
    parser.add_argument("--documents", type=int, default=20_000, help="of the records")
    parser.add_argument("--rounds", type=int, default=3, help="of each case")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        scratch = pathlib.Path(name)
        if not args.bucket:
            url = stack.enter_context(gs_server.fake_gcs(scratch))
            os.environ.update(gs_server.variables_of(url))
        remote = f"{args.bucket or 'gs://bucket'}/records"
        local = micro_run.write(scratch / "records", count=args.documents)
        for path in pathlib.Path(local).iterdir():
            Folder(remote).write(path.name, [path.read_bytes()])
        found: dict[str, list[dict[str, float]]] = {"local": [], "gs_first": [], "gs_later": []}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
            found["local"].append(run_in_process(local, scratch / "unused"))
            for case in ("gs_first", "gs_later"):
                found[case].append(run_in_process(remote, scratch / f"stage-{number}"))
            shutil.rmtree(scratch / f"stage-{number}")
        Folder(remote).remove()
    medians = {
        case: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        for case, rows in found.items()
    }
    ratio = medians["gs_later"]["rows_per_s"] / medians["local"]["rows_per_s"]
    load = [round(x, 1) for x in os.getloadavg()]
    print(json.dumps(medians | dict(ratio=round(ratio, 3), documents=args.documents, load=load)))


if __name__ == "__main__":
    main()
