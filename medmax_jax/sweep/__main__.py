"""Expand a sweep file, render it for a cluster or run it here, and collect a table of results.

python -m medmax_jax.sweep expand --config=configs/sweep_x.py --workdir D   a table; D/sweep.jsonl
python -m medmax_jax.sweep status --workdir D                        the state of each run
python -m medmax_jax.sweep run --workdir D                           what is left, on this machine
python -m medmax_jax.sweep render --workdir D --form slurm --out F   files for a cluster's launcher
python -m medmax_jax.sweep collect --workdir D                       D/table.csv for a fit
python -m medmax_jax.sweep fisher NAME=RUN .. --out PAGE             gradients of single documents

expand without --workdir writes nothing. status, collect and render read the folders of the runs, so
all may be repeated; render leaves finished runs out and keeps the ids of the others. Overrides of
the sweep file: --config.price=1.2; a smaller sweep: --limit=4 expands only the first four runs, and
--config.axes='({"seeds": (0, 1)},)' replaces the axes. Run from the repository's root.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped early and restartable.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from medmax_jax import arguments
from medmax_jax.cli import DONE, ERROR, INTERRUPTED, USAGE, Interrupted, open_workdir
from medmax_jax.config import ConfigError
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.storage import workdir
from medmax_jax.storage.folder import StorageError
from medmax_jax.sweep import expand, fisher_page, render, runner, status
from medmax_jax.sweep.axes import SweepError

RUNS = ("*/*",)  # what the folders of runs contain
LARGE = ("*/state/*", "*/compiled/*", "*/profile/*", "*/events.out.*", "*/*.safetensors")
NOTES_FILE = "said.json"  # the sweep file's statements for the checklist of a fit


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    expand_parser = commands.add_parser(
        "expand", help="expand a sweep file to D/sweep.jsonl, with a table of costs"
    )
    expand_parser.add_argument("--workdir", metavar="D", help="folder of the sweep")
    expand_parser.add_argument(
        "--limit", type=int, metavar="N", help="expand only the first N runs, for a trial"
    )
    expand_parser.add_argument("--json", action="store_true", help="print one JSON object last")
    for name, help_text in (
        ("status", "print the state of each run"), ("run", "run the unfinished runs here"),
        ("collect", "write table.csv"), ("render", "write files for a cluster's launcher"),
    ):  # fmt: skip
        command_parser = commands.add_parser(name, help=help_text)
        command_parser.add_argument(
            # render reports all its missing flags at once
            "--workdir", metavar="D", required=name != "render", help="folder of the sweep",
        )  # fmt: skip
        command_parser.add_argument(
            "--json", action="store_true", help="print one JSON object last"
        )
        if name == "collect":
            command_parser.add_argument(
                "--partial", action="store_true", help="collect although some runs have not ended"
            )
        if name == "render":
            render.add_flags(command_parser)
    page_parser = commands.add_parser(
        "fisher", help="write a page of the spectrum of single documents' gradients along training"
    )
    page_parser.add_argument(
        "runs", nargs="+", metavar="NAME=RUN",
        help="folders of runs with train.fisher_every; several of one name are its seeds",
    )  # fmt: skip
    page_parser.add_argument("--out", type=Path, required=True, help="HTML page to write")
    page_parser.add_argument("--json", action="store_true", help="print one JSON object last")
    return parser


def _expand(args: argparse.Namespace, rest: Sequence[str]) -> dict:
    sweep = expand.load(rest)
    runs = expand.plan_runs(sweep, limit=args.limit)
    print("\n".join(expand.table(sweep, runs)))
    result = dict(sweep=sweep.name, runs=len(runs)) | expand.totals(runs)
    if args.workdir:
        with open_workdir(args.workdir, skip=RUNS) as work:
            result["file"] = work.url(expand.write(runs, work.folder).name)
            notes = json.dumps(dict(sweep.said), indent=1) + "\n"
            (work.folder / NOTES_FILE).write_text(notes)
        print(f"wrote {result['file']}")
    return result


def _status(args: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    run_states = status.states(runs, folder)
    for run in runs:
        changed = " ".join(f"{k}={v}" for k, v in run.overrides.items())
        print(f"{run.run_id}  {run_states[run.run_id]:9} {changed}")
    return dict(Counter(run_states.values())) | {"runs": len(runs)}


def _run(args: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    ended = runner.run(runs, folder)
    if unfinished := [
        run_id for run_id, run_state in ended.items() if run_state in status.UNFINISHED
    ]:
        raise SweepError(
            f"{len(unfinished)} of {len(runs)} runs failed: {', '.join(unfinished)}; see their "
            "run.log, and run the same command to retry them"
        )
    return dict(Counter(ended.values())) | {"runs": len(runs)}


def _collect(args: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    rows = status.collect(runs, folder, partial=args.partial)
    path = folder / NOTES_FILE
    try:
        statements = read_json_object(path) if path.exists() else {}
    except TextFileError as error:
        raise SweepError(f"{error}; expand the sweep again") from error
    written = status.write(rows, status.sweep_notes(runs, statements), folder)
    diverged = [row["run"] for row in rows if row["state"] == "diverged"]
    print(f"wrote {written} with {len(rows)} of {len(runs)} runs")
    if diverged:
        print(f"diverged (nan in the table): {', '.join(diverged)}")
    return dict(table=str(written), rows=len(rows), runs=len(runs), diverged=diverged)


def _render(args: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    run_states = status.states(runs, folder)
    unfinished = [r for r in runs if run_states[r.run_id] in status.UNFINISHED]
    written = render.write(unfinished, folder, args)
    print("\n".join(f"wrote {path}" for path in written))
    print(
        f"rendered {len(unfinished)} of {len(runs)} runs; the others are finished, running or "
        "diverged"
    )
    return dict(files=[str(path) for path in written], rendered=len(unfinished), runs=len(runs))


@contextlib.contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Path]:
    """Open the folder of a sweep; of one on gs://, the large files of its runs are left there."""
    if not args.workdir.startswith("gs://"):
        yield Path(args.workdir)
    elif args.command in ("run", "collect"):
        name, skip = ("", ()) if args.command == "run" else ("collect", LARGE)
        with open_workdir(args.workdir, writer=name, skip=skip) as work:
            yield work.folder
    else:
        with workdir.opened(args.workdir, mode="read", skip=LARGE) as work:
            yield work.folder


COMMANDS = {"status": _status, "run": _run, "collect": _collect, "render": _render}


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    known = args.command == "expand"  # its other arguments are those of the sweep file
    if unknown := [w for w in rest if not known or w.startswith("-") and "-config" not in w]:
        parser.leaf(argv).reject(unknown)
    if args.command == "render" and (missing := render.missing_flags(args)):
        parser.error(arguments.required(missing))
    try:
        if args.command == "expand":
            result = _expand(args, rest)
        elif args.command == "fisher":
            result = fisher_page.write(args.runs, args.out, log=print)
            print(f"wrote {args.out}")
        else:
            with _opened(args) as folder:
                result = COMMANDS[args.command](args, expand.read(folder), folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except Interrupted as error:
        print(error, file=sys.stderr)
        return INTERRUPTED
    except (SweepError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    if args.json:
        print(json.dumps(result))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
