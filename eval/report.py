"""python -m eval.report --workdir=D [--images=FOLDER]

Rewrites D/report.html from the summary.json and records.jsonl that eval.run left in D.
"""

import sys
from pathlib import Path

from medmax_jax import arguments
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.records import read_records
from medmax_jax.eval.reporting import page
from medmax_jax.eval.results import Summary, read_summary
from medmax_jax.io.errors import printable_text
from medmax_jax.io.text_files import TextFileError
from medmax_jax.storage import hub, workdir
from medmax_jax.storage.folder import StorageError

SAMPLE = Path(__file__).parent.parent / "data" / "sample"


def images_folder(summary: Summary) -> Path:
    """Return the folder of a run's images, from its settings."""
    settings = summary.settings
    if settings.get("images"):
        return Path(hub.locate(settings["images"]))
    items = settings.get("questions", "sample")
    items = items if isinstance(items, str) else items[0]
    return SAMPLE if items == "sample" else Path(hub.locate(items)).parent


def rewrite_report(evaluated: str | Path, images: str) -> Path:
    """Rewrite the page of a workdir and return its path."""
    evaluated = Path(evaluated)
    per_record.check_names(evaluated.glob("*.json*"))
    try:
        summary = read_summary(evaluated)
    except TextFileError as error:
        raise EvalError(
            f"{evaluated}: no finished evaluation ({error}); run eval.run to the end"
        ) from error
    records = read_records(evaluated / "records.jsonl")
    folder = Path(images) if images else images_folder(summary)
    page.write(evaluated / "report.html", summary, records, images_folder=folder)
    return evaluated / "report.html"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the page; return the exit code."""
    parser = arguments.Parser(prog="python -m eval.report", description=__doc__.split("\n")[2])
    parser.add_argument("--workdir", required=True, metavar="D", help="folder that eval.run wrote")
    parser.add_argument(
        "--images", default="", help="folder of the images; default: that of eval.run's settings"
    )
    args = parser.parse_args(argv)
    try:
        if args.workdir.startswith("gs://"):
            with workdir.opened(args.workdir) as work:
                print(f"report: {work.url(rewrite_report(work.folder, args.images).name)}")
        else:
            print(f"report: {rewrite_report(args.workdir, args.images)}")
    except (ValueError, OSError, StorageError) as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
