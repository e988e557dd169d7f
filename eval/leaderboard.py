"""python -m eval.leaderboard D1 D2 D3 --workdir=D: ranks several workdirs of eval.run in one table.

Writes D/leaderboard.html, which sorts by any column and can be read without scripts,
D/leaderboard.json and D/leaderboard.csv. Status 0: written. 1: an error, reported in one line. 2:
wrong usage.
"""

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from medmax_jax import arguments
from medmax_jax.environment import environment
from medmax_jax.eval.reporting import leaderboard, page
from medmax_jax.io import journal
from medmax_jax.io.errors import printable_text
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import StorageError

PAGE, TABLE, CONTENT = "leaderboard.html", "leaderboard.csv", "leaderboard.json"


def main(argv: list[str] | None = None) -> int:
    """Write the three files and print the table."""
    parser = arguments.Parser(prog="python -m eval.leaderboard", description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="D", nargs="+", help="workdirs of finished evaluations")
    parser.add_argument("--workdir", required=True, help=f"folder in which {PAGE} is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="resamples per interval and per test"
    )
    args = parser.parse_args(argv)
    try:
        board, url = _write(args)
    except (ValueError, OSError, StorageError) as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return 1
    rows = [
        {
            "rank": row["rank"],
            "model": row["model"],
            **{name: _text(cell) for name, cell in [("mean", row["mean"]), *row["tasks"].items()]},
        }
        for row in board.rows
    ]
    lines = [page.markdown(rows), *(f"left out: {line}" for line in board.left_out), f"page: {url}"]
    print(printable_text("\n".join(lines)))
    return 0


def _write(args: argparse.Namespace) -> tuple[leaderboard.Leaderboard, str]:
    with contextlib.ExitStack() as stack:
        folders = {
            path: stack.enter_context(workdir.opened(path, mode="read")).folder
            for path in args.runs
        }
        for path, folder in folders.items():
            same = [name for name in args.runs if folders[name].resolve() == folder.resolve()]
            if len(same) > 1:
                raise ValueError(f"{path} is named twice; name each workdir once")
        board = leaderboard.build(folders, seed=args.seed, resamples=args.resamples)
        work = stack.enter_context(workdir.opened(args.workdir))
        facts = {"seed": args.seed, "resamples": args.resamples} | environment()
        journal.write_text(work.folder / PAGE, leaderboard.render(board, facts=facts))
        journal.write_text(work.folder / TABLE, leaderboard.as_csv(board))
        journal.write_json(work.folder / CONTENT, dataclasses.asdict(board) | {"made_by": facts})
        return board, work.url(PAGE)


def _text(cell: dict[str, Any] | None) -> str | None:
    return None if cell is None else f"{cell['value']:.3f} {cell['letters']}"


if __name__ == "__main__":
    sys.exit(main())
