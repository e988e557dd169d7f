"""python -m eval.compare D1 D2: compares two workdirs of eval.run task by task.

Status 0: compared. 1: an error, reported in one line. 2: wrong usage.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from medmax_jax import arguments
from medmax_jax.environment import environment
from medmax_jax.eval.reporting import page
from medmax_jax.eval.reporting.comparison import compare, render
from medmax_jax.eval.results import SUMMARY, read_summary
from medmax_jax.io import journal
from medmax_jax.io.errors import printable_text
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import StorageError

PAGE = "comparison.html"


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or with --json one object as the last line; write the page."""
    parser = arguments.Parser(prog="python -m eval.compare", description=__doc__.split("\n")[0])
    parser.add_argument("first", metavar="D1", help="workdir of the first evaluation")
    parser.add_argument(
        "second", metavar="D2", help="workdir of the second; differences are D2 - D1"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="bootstrap resamples per interval"
    )
    parser.add_argument("--workdir", default="", help=f"folder in which {PAGE} is written")
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            first, second = (
                stack.enter_context(workdir.opened(path, mode="read")).folder
                for path in (args.first, args.second)
            )
            comparison = compare(
                first, second, seed=args.seed, resamples=args.resamples,
                names=(args.first, args.second),
            )  # fmt: skip
            if args.workdir:
                work = stack.enter_context(workdir.opened(args.workdir))
                facts = [_facts(first), _facts(second)]
                facts.append({"seed": args.seed, "resamples": args.resamples} | environment())
                markup = render(comparison, args.first, args.second, facts=facts)
                journal.write_text(work.folder / PAGE, markup)
    except (ValueError, OSError, StorageError) as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(dataclasses.asdict(comparison)))
        return 0
    lines = [page.markdown(comparison.rows), "Mean over the headline scores of the tasks:\n"]
    lines.append(page.markdown([comparison.suite]))
    lines += [f"left out: {line}" for line in comparison.left_out]
    lines += [f"page: {work.url(PAGE)}"] if args.workdir else []
    print(printable_text("\n".join(lines)))
    return 0


def _facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a finished evaluation, as its own page shows them."""
    return page.provenance(read_summary(folder)) if (folder / SUMMARY).exists() else {}


if __name__ == "__main__":
    sys.exit(main())
