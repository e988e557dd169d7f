"""python -m eval.export D --format=lmms_eval --out=FOLDER: writes scores in the form of others.

lmms_eval: the results and samples that lmms-eval writes. hf_eval_results: the files that model
pages of the Hub read. No text of a credentialed item is written; what is left out is named. Status
0: written. 1: an error, reported in one line. 2: wrong usage.
"""

import collections
import sys
from pathlib import Path

from medmax_jax import arguments
from medmax_jax.endpoints import egress
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.records import read_records
from medmax_jax.eval.reporting import hub_results, lmms_eval, tables
from medmax_jax.io.errors import printable_text
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import StorageError

FORMATS = ("lmms_eval", "hf_eval_results")


def main(argv: list[str] | None = None) -> int:
    """Write the files and print their names and what is left out; return the exit code."""
    parser = arguments.Parser(prog="python -m eval.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="D", help="workdir of a finished evaluation")
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose form to write")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder that is written")
    parser.add_argument(
        "--source_url", default="", help="hf_eval_results: link to the complete results"
    )
    args = parser.parse_args(argv)
    try:
        with workdir.opened(args.run, mode="read") as work, workdir.opened(args.out) as out:
            files, notes = export(work.folder, out.folder, args.format, source_url=args.source_url)
            names = [out.url(str(file.relative_to(out.folder))) for file in files]
    except (ValueError, OSError, StorageError) as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    print(printable_text("\n".join([*names, *notes])))
    return 0


def export(
    evaluated: Path, out: Path, form: str, *, source_url: str = ""
) -> tuple[list[Path], list[str]]:
    """Write an evaluation in a form of FORMATS; return the files, and notes on what they lack."""
    summary = tables.finished_summary(evaluated)
    if form == "hf_eval_results":
        return hub_results.write(out, summary, source_url=source_url)
    per_record.check_names(evaluated.glob("*.json*"))
    records = read_records(evaluated / "records.jsonl")
    judge = summary.judge or {}
    inputs = per_record.read(evaluated, judge=judge.get("judge"))
    files, notes = lmms_eval.write(out, summary, records, inputs)
    classes = collections.Counter(record.data_class for record in records)
    if bound := classes[egress.LICENCE_BOUND]:
        notes.append(f"{bound} samples are licence-bound: check their terms before publishing them")
    return files, notes


if __name__ == "__main__":
    sys.exit(main())
