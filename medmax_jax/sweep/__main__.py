"""Expand a sweep file, render it for a cluster or run it here, and collect a table of results.

python -m medmax_jax.sweep expand --config=configs/sweep_x.py --workdir D   a table; D/sweep.jsonl
python -m medmax_jax.sweep status --workdir D                        the state of each run
python -m medmax_jax.sweep run --workdir D                           what is left, on this machine
python -m medmax_jax.sweep render --workdir D --form slurm --out F   files for a cluster's launcher
python -m medmax_jax.sweep collect --workdir D                       D/table.csv for a fit

expand without --workdir writes nothing. status, collect and render read the folders of the runs, so
all may be repeated; render leaves finished runs out and keeps the ids of the others. Overrides of
the sweep file: --config.price=1.2. Run from the repository's root.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped early and restartable.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from medmax_jax.cli import DONE, ERROR, INTERRUPTED, USAGE, Interrupted, open_workdir
from medmax_jax.config import ConfigError
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.sweep import expand, render, runner, status
from medmax_jax.sweep.axes import SweepError

SAID = "said.json"  # the sweep file's answers for the checklist


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medmax_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("expand", help="a sweep file to D/sweep.jsonl and a table of costs")
    made.add_argument("--workdir", metavar="D")
    made.add_argument("--json", action="store_true")
    for name, words in (
        ("status", "who has ended"), ("run", "what is left, on this machine"),
        ("collect", "table.csv"), ("render", "files for a cluster"),
    ):  # fmt: skip
        each = commands.add_parser(name, help=words)
        each.add_argument("--workdir", metavar="D", required=True)
        each.add_argument("--json", action="store_true")
        if name == "collect":
            each.add_argument("--partial", action="store_true", help="also before all have ended")
        if name == "render":
            render.add_flags(each)
    return parser


def _expand(given: argparse.Namespace, rest: Sequence[str]) -> dict:
    sweep = expand.load(rest)
    runs = expand.plan_runs(sweep)
    print("\n".join(expand.table(sweep, runs)))
    facts = dict(sweep=sweep.name, runs=len(runs)) | expand.totals(runs)
    if given.workdir:
        folder = open_workdir(given.workdir)
        facts["file"] = str(expand.write(runs, folder))
        (folder / SAID).write_text(json.dumps(dict(sweep.said), indent=1) + "\n")
        print(f"written: {facts['file']}")
    return facts


def _status(given: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    known = status.states(runs, folder)
    for each in runs:
        changed = " ".join(f"{k}={v}" for k, v in each.overrides.items())
        print(f"{each.run_id}  {known[each.run_id]:9} {changed}")
    return dict(Counter(known.values())) | {"runs": len(runs)}


def _run(given: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    ended = runner.run(runs, folder)
    if left := [run_id for run_id, word in ended.items() if word in status.UNFINISHED]:
        raise SweepError(
            f"{len(left)} of {len(runs)} runs failed: {', '.join(left)}; their run.log says why, "
            "and the same command tries them again"
        )
    return dict(Counter(ended.values())) | {"runs": len(runs)}


def _collect(given: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    rows = status.collect(runs, folder, partial=given.partial)
    path = folder / SAID
    try:
        said = read_json_object(path) if path.exists() else {}
    except TextFileError as error:
        raise SweepError(f"{error}; expand the sweep again") from error
    written = status.write(rows, status.sweep_notes(runs, said), folder)
    diverged = [row["run"] for row in rows if row["state"] == "diverged"]
    print(f"written: {written}, {len(rows)} of {len(runs)} runs")
    if diverged:
        print(f"diverged, and nan in the table: {', '.join(diverged)}")
    return dict(table=str(written), rows=len(rows), runs=len(runs), diverged=diverged)


def _render(given: argparse.Namespace, runs: list[expand.SweepRun], folder: Path) -> dict:
    known = status.states(runs, folder)
    left = [r for r in runs if known[r.run_id] in status.UNFINISHED]
    written = render.write(left, folder, given)
    print("\n".join(f"written: {path}" for path in written))
    print(f"{len(left)} of {len(runs)} runs; the others are finished, running or diverged")
    return dict(files=[str(path) for path in written], rendered=len(left), runs=len(runs))


COMMANDS = {"status": _status, "run": _run, "collect": _collect, "render": _render}


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    given, rest = _parser().parse_known_args(argv)
    try:
        if given.command == "expand":
            facts = _expand(given, rest)
        elif rest:
            raise ConfigError(f"unexpected argument {rest[0]!r}")
        else:
            folder = Path(given.workdir)
            facts = COMMANDS[given.command](given, expand.read(folder), folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except Interrupted as error:
        print(error, file=sys.stderr)
        return INTERRUPTED
    except (SweepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    if given.json:
        print(json.dumps(facts))
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
