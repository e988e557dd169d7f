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
from pathlib import Path
from typing import Any

from medmax_jax.cli import DONE, ERROR, WorkdirError, open_workdir
from medmax_jax.io import html_page
from medmax_jax.io.progress import SECONDS, ItemProgress
from medmax_jax.scaling import checklist, diagnostics, mixed, report, table
from medmax_jax.scaling.laws import LAWS, ScalingError
from medmax_jax.scaling.study import Options, run_study


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medmax_jax.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--table", metavar="T.csv", help="a row a run")
    add("--law", required=True, choices=(*LAWS, mixed.LAW.name, "list"))
    add("--target", default="", help="column that the law predicts: loss; several with commas")
    add("--map", action="append", default=[], metavar="NAME=COLUMN", type=_pair)
    add("--exclude", action="append", default=[], metavar="RULE", help="COLUMN=V, COLUMN<V ...")
    add("--fix", action="append", default=[], metavar="NAME=VALUE", type=_pair)
    add("--say", action="append", default=[], metavar="NAME=TEXT", type=_pair,
        help="for the checklist: " + ", ".join(checklist.STATEMENTS))  # fmt: skip
    add("--delta", type=float, default=1e-3, help="of the Huber loss; large: least squares")
    add("--residuals", choices=("log", "plain"), help="of ln loss (losses) or of the loss itself")
    add("--bootstraps", type=int, default=1_000)
    add("--seed", type=int, default=0, help="of the bootstraps")
    add("--flops", type=float, default=6.0, help="of a token, per parameter: 6 full, 4 LoRA")
    add("--budget", type=float, action="append", default=[], metavar="FLOPS")
    add("--workdir", metavar="D")
    add("--json", action="store_true", help="the last line is one JSON object")
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


def _run(given: argparse.Namespace) -> None:
    if given.law == "list":
        for law in (*LAWS.values(), mixed.LAW):
            print(f"{law.name:17} {law.formula}\n{'':17} {', '.join(law.columns)}; {law.paper}")
        return
    if not given.table:
        raise ScalingError("--table is missing; name a CSV with a row a run")
    if given.bootstraps < 1 or given.delta <= 0:
        raise ScalingError("--bootstraps must be at least 1 and --delta above 0")
    folder = open_workdir(given.workdir) if given.workdir else None
    facts = _mixed(given, folder) if given.law == mixed.LAW.name else _laws(given, folder)
    if folder:
        (folder / "fit.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"written: {folder / 'page.html'}, {folder / 'fit.json'}")
    if given.json:
        print(json.dumps(facts))


def _laws(given: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Return each target's fit; if there are several, by target."""
    law, said = LAWS[given.law], checklist.read_statements(given.table, dict(given.say))
    if given.residuals:
        law = dataclasses.replace(law, log=given.residuals == "log")
    options = Options(
        delta=given.delta, fixed={name: _float(name, v) for name, v in given.fix},
        draws=given.bootstraps, seed=given.seed, flops=given.flops, budgets=tuple(given.budget),
    )  # fmt: skip
    studies = []
    for target in given.target.split(",") if given.target else [_usual(given.law)]:
        rows = table.read(
            given.table, law, target=target, columns=dict(given.map), exclude=given.exclude
        )
        studies.append(run_study(law, rows, options, progress=_log))
        print(checklist.format_fit(studies[-1], said))
    if folder:
        report.write(studies, said, folder, f"{law.name} law of {Path(given.table).name}")
    facts = [checklist.as_json(each, said) for each in studies]
    return facts[0] if len(facts) == 1 else {"targets": {f["target"]: f for f in facts}}


def _mixed(given: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    """Fit the law of two modalities together."""
    if given.fix:
        raise ScalingError("--fix: law mixed_modal holds no parameter; leave it away")
    target = given.target or "loss"
    rows = table.read(
        given.table, mixed.LAW, target=target, columns=dict(given.map), exclude=given.exclude
    )
    found = mixed.fit(rows, delta=given.delta)
    fits = ItemProgress(3 * given.bootstraps, "fits", _log, every=SECONDS)
    draws = mixed.bootstrap_samples(
        found, rows, count=given.bootstraps, seed=given.seed,
        progress=lambda count: fits.tick(f"{target}: bootstraps", count),
    )  # fmt: skip
    intervals = {name: diagnostics.parameter_interval(each) for name, each in draws.items()}
    both = mixed.parts(rows)[2]
    competing = int((found.competes(both.x) > 0).sum())
    barrier = f"the modalities compete in {competing} of {len(both)} mixed runs"
    print(f"mixed_modal: {target} = {mixed.LAW.formula}")
    for name, value in found.values.items():
        print(f"  {name:12} {value:<12.6g} {checklist.ends(intervals[name])}")
    print(f"  {barrier}")
    if folder:
        png = report.agreement(both.y, found.predict(both.x), target)
        (folder / "law.png").write_bytes(png)
        body = html_page.paragraph(
            f"{mixed.LAW.formula}; {mixed.LAW.paper}. In this table {barrier}."
        )
        body += html_page.figure(png, "The law against the mixed runs.")
        body += report.parameters(found.values, intervals, ())
        report.render(folder, f"mixed_modal law of {Path(given.table).name}", body)
    return found.values | dict(
        law=mixed.LAW.name, target=target, competing=competing, mixed_runs=len(both),
        intervals={name: list(ends) if ends else None for name, ends in intervals.items()},
    )  # fmt: skip


def _log(line: str) -> None:
    """Log to stderr: stdout has the results, with --json as its last line."""
    print(line, file=sys.stderr, flush=True)


def _usual(law: str) -> str:
    return "error" if law == "accuracy" else "loss"


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ScalingError(f"--fix {name}={text}: not a number") from error


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
    given = _parser().parse_args(argv)
    try:
        _run(given)
    except (ScalingError, WorkdirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
