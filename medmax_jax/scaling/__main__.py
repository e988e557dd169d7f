"""Fit a scaling law to a table of runs, with intervals, checks and an HTML page.

python -m medmax_jax.scaling --table T.csv --law chinchilla [--workdir D] [--json]

T.csv   columns by law: params, tokens, loss (`--law list` shows which; --map and --target rename)
D       fit.json, *.png and page.html
laws    chinchilla tied power data_constrained finetune rectified accuracy mixed_modal

--target loss_text,loss_image fits each column separately. --map params=rank uses adapters' ranks
where a law has sizes. --fix alpha=0.34 fixes a parameter. --exclude "loss>3.4" leaves rows out, and
the checklist states this.

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from medmax_jax import arguments
from medmax_jax.cli import DONE, ERROR, WorkdirError, open_workdir
from medmax_jax.environment import environment
from medmax_jax.io import charts, html_page
from medmax_jax.io.progress import SECONDS, ItemProgress, log_to_stderr, report_waiting
from medmax_jax.scaling import checklist, diagnostics, mixed, report, table
from medmax_jax.scaling.laws import LAWS, ScalingError
from medmax_jax.scaling.study import Options, run_study
from medmax_jax.storage.folder import StorageError, file_sha256


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", metavar="T.csv", help="CSV with one row per run")
    add("--law", required=True, choices=(*LAWS, mixed.LAW.name, "list"), help="law to fit")
    add(
        "--target",
        default="",
        help="columns that the law predicts, separated by commas; default: loss",
    )
    add("--map", action="append", default=[], metavar="NAME=COLUMN", type=_pair)
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="RULE",
        help="exclude rows: COLUMN=V, COLUMN<V or COLUMN>V",
    )
    add("--fix", action="append", default=[], metavar="NAME=VALUE", type=_pair)
    add("--say", action="append", default=[], metavar="NAME=TEXT", type=_pair,
        help="statement for the checklist: " + ", ".join(checklist.STATEMENTS))  # fmt: skip
    add(
        "--delta",
        type=float,
        default=1e-3,
        help="delta of the Huber loss; a large value gives least squares",
    )
    add(
        "--residuals",
        choices=("log", "plain"),
        help="residuals of ln loss (log) or of the loss itself (plain)",
    )
    add("--bootstraps", type=int, default=1_000, help="number of bootstrap samples")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    add("--flops", type=float, default=6.0, help="FLOPs per token and parameter: 6 full, 4 LoRA")
    add("--budget", type=float, action="append", default=[], metavar="FLOPS",
        help="compute budget to allocate; may be repeated")  # fmt: skip
    add("--workdir", metavar="D", help="folder for fit.json, figures and page.html")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r}: use the form NAME=VALUE")
    return name, value


def _run(args: argparse.Namespace) -> None:
    if args.law == "list":
        for law in (*LAWS.values(), mixed.LAW):
            print(f"{law.name:17} {law.formula}\n{'':17} {', '.join(law.columns)}; {law.paper}")
        return
    if not args.table:
        raise ScalingError("--table is missing; use a CSV with one row per run")
    if args.bootstraps < 1 or args.delta <= 0:
        raise ScalingError("--bootstraps must be at least 1 and --delta above 0")
    with open_workdir(args.workdir) if args.workdir else nullcontext() as work:
        _fit(args, work.folder if work else None)


def _fit(args: argparse.Namespace, folder: Path | None) -> None:
    result = _mixed(args, folder) if args.law == mixed.LAW.name else _laws(args, folder)
    result["environment"] = environment()
    if folder:
        (folder / "fit.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {folder / 'page.html'} and {folder / 'fit.json'}")
    if args.json:
        print(json.dumps(result))


def _laws(args: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Return each target's fit; if there are several, by target."""
    law, statements = LAWS[args.law], checklist.read_statements(args.table, dict(args.say))
    if args.residuals:
        law = dataclasses.replace(law, log=args.residuals == "log")
    options = Options(
        delta=args.delta, fixed={name: _float(name, v) for name, v in args.fix},
        draws=args.bootstraps, seed=args.seed, flops=args.flops, budgets=tuple(args.budget),
    )  # fmt: skip
    studies = []
    for target in args.target.split(",") if args.target else [_default_target(args.law)]:
        rows = table.read(
            args.table, law, target=target, columns=dict(args.map), exclude=args.exclude
        )
        studies.append(run_study(law, rows, options, progress=log_to_stderr))
        print(checklist.format_fit(studies[-1], statements))
    if folder:
        title = f"{law.name} law of {Path(args.table).name}"
        report.write(studies, statements, folder, title=title, facts=_facts(args))
    results = [checklist.as_json(study, statements) for study in studies]
    return results[0] if len(results) == 1 else {"targets": {f["target"]: f for f in results}}


def _mixed(args: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Fit the law of two modalities together."""
    if args.fix:
        raise ScalingError("--fix: law mixed_modal cannot fix parameters; omit the flag")
    target = args.target or "loss"
    rows = table.read(
        args.table, mixed.LAW, target=target, columns=dict(args.map), exclude=args.exclude
    )
    with report_waiting(f"{target}: fitting", log_to_stderr):
        fitted = mixed.fit(rows, delta=args.delta)
    fits = ItemProgress(3 * args.bootstraps, "fits", log_to_stderr, every=SECONDS)
    draws = mixed.bootstrap_samples(
        fitted, rows, count=args.bootstraps, seed=args.seed,
        progress=lambda count: fits.tick(f"{target}: bootstraps", count),
    )  # fmt: skip
    intervals = {name: diagnostics.parameter_interval(samples) for name, samples in draws.items()}
    mixed_rows = mixed.parts(rows)[2]
    competing = int((fitted.competes(mixed_rows.x) > 0).sum())
    competition = f"the modalities compete in {competing} of {len(mixed_rows)} mixed runs"
    print(f"mixed_modal: {target} = {mixed.LAW.formula}")
    for name, value in fitted.values.items():
        print(f"  {name:12} {value:<12.6g} {checklist.ends(intervals[name])}")
    print(f"  {competition}")
    if folder:
        figure = report.agreement(mixed_rows.y, fitted.predict(mixed_rows.x), target)
        charts.save(figure, folder / "law.png")
        body = html_page.paragraph(
            f"{mixed.LAW.formula}; {mixed.LAW.paper}. In this table {competition}."
        )
        body += html_page.chart(charts.svg(figure), "The law against the mixed runs.")
        body += report.parameters(fitted.values, intervals, ())
        title = f"mixed_modal law of {Path(args.table).name}"
        report.render(folder, title, body, facts=_facts(args))
    return fitted.values | dict(
        law=mixed.LAW.name, target=target, competing=competing, mixed_runs=len(mixed_rows),
        intervals={name: list(ends) if ends else None for name, ends in intervals.items()},
    )  # fmt: skip


def _facts(args: argparse.Namespace) -> dict[str, object]:
    """Return the facts on a page about its data and the program."""
    digest = file_sha256(Path(args.table))[:16]
    facts = {"table": args.table, "digest": digest, "law": args.law, "seed": args.seed}
    return facts | {"bootstraps": args.bootstraps} | environment()


def _default_target(law: str) -> str:
    return "error" if law == "accuracy" else "loss"


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ScalingError(f"--fix {name}={text}: not a number") from error


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ScalingError, StorageError, WorkdirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
