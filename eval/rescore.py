"""python -m eval.rescore FILE .. --workdir=D: scores published predictions again, strictly.

Reads the predictions of SMMILE, lmms-eval, VLMEvalKit and MedEvalKit, and writes D/rescore.html and
D/rescore.json: published and strict scores with intervals, the reasons of each difference, and
paired tests between the files that have items in common.

Status 0: scored. 1: an error, reported in one line. 2: wrong usage.
"""

import json
import sys
from pathlib import Path
from typing import Any

from medmax_jax import arguments
from medmax_jax.environment import environment
from medmax_jax.eval.prediction_files import rescoring
from medmax_jax.eval.prediction_files.formats import PredictionFile, read_predictions
from medmax_jax.eval.reporting import rescored
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.io import journal
from medmax_jax.io.errors import printable_text
from medmax_jax.storage import hub, workdir
from medmax_jax.storage.folder import StorageError

PAGE, RESULT = "rescore.html", "rescore.json"


def rescore_files(
    paths: list[str], *, against: str = "", resampling: Resampling
) -> tuple[list[PredictionFile], dict[str, Any]]:
    """Return the files, and the content of rescore.json: their rows and the paired tests."""
    if remote := [path for path in paths if path.startswith("gs://")]:
        raise ValueError(f"{remote[0]}: prediction files are read from a disk; copy it there first")
    located = [str(Path(hub.locate(path))) for path in paths]
    if twice := [path for path in dict.fromkeys(located) if located.count(path) > 1]:
        raise ValueError(f"{twice[0]} is named twice; name each file once")
    if against and str(Path(hub.locate(against))) not in located:
        raise ValueError(f"--against is {against!r}, which is not one of the files; name one")
    files = [read_predictions(path) for path in located]
    scores = [rescoring.item_scores(file) for file in files]
    rows = [
        row
        for file, own in zip(files, scores, strict=True)
        for row in rescoring.rescore(file, own, resampling=resampling)
    ]
    compared = rescored.comparisons(
        files, scores, against=hub.locate(against) if against else "", resampling=resampling
    )
    notes = {str(file.path): own for file in files if (own := rescoring.notes_of(file))}
    left_out = {str(file.path): file.left_out for file in files if file.left_out}
    return files, dict(rows=rows, comparisons=compared, notes=notes, left_out=left_out)


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or with --json one object as the last line; write both files."""
    parser = arguments.Parser(prog="python -m eval.rescore", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="prediction files; hf:// too")
    parser.add_argument("--workdir", required=True, metavar="D", help=f"folder of {PAGE}")
    parser.add_argument(
        "--against", default="", metavar="FILE", help="compare each file with this one"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="bootstrap resamples per interval"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args(argv)
    try:
        resampling = Resampling(args.seed, args.resamples)
        files, result = rescore_files(args.files, against=args.against, resampling=resampling)
        facts = {"seed": args.seed, "resamples": args.resamples} | environment()
        rows, compared = result["rows"], result["comparisons"]
        with workdir.opened(args.workdir) as work:
            markup = rescored.render(rows, files, compared, facts=facts)
            journal.write_text(work.folder / PAGE, markup)
            journal.write_json(work.folder / RESULT, result | dict(environment=facts))
    except (ValueError, OSError, StorageError) as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
        return 0
    lines = [rescored.markdown(rows, compared)]
    lines += [f"{path}: {note}" for path, notes in result["notes"].items() for note in notes]
    lines += [
        f"{path}: {len(places)} rows left out: {reason}"
        for path, reasons in result["left_out"].items()
        for reason, places in reasons.items()
    ]
    print(printable_text("\n".join([*lines, f"page: {work.url(PAGE)}"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
