"""The command line of `python -m data.prepare stats`: counts, and with --out a page to look at."""

import argparse
from pathlib import Path
from typing import Any

from data import check, plan_report, stats_page
from data.codes import PrepareError
from data.reader import open_records
from data.records import credentialed

EXAMPLES = 12


def add(commands: Any, tiny: Path, manifest: Path) -> argparse.ArgumentParser:
    """`stats`. `tiny`: the model folder taken where it made the records; `manifest`: its facts."""
    counted = commands.add_parser("stats", help="what a folder of records holds; a page of it")
    counted.add_argument(
        "--seq_len", type=int, default=0, help="row length; 0: the longest document"
    )
    counted.add_argument("--out", type=Path, help="HTML page to write, with plots and examples")
    counted.add_argument("--model", type=Path, help="model folder that made the records")
    counted.add_argument("--examples", type=int, default=EXAMPLES, help="documents on the page")
    counted.add_argument("--seed", type=int, default=0, help="of the examples and of packing")
    counted.add_argument(
        "--show_credentialed", action="store_true",
        help="show pictures and texts of a credentialed folder, on a page that only you can read",
    )  # fmt: skip
    counted.set_defaults(run=_run, tiny=tiny, manifest=manifest)
    return counted


def _run(args: argparse.Namespace) -> dict[str, Any]:
    found = open_records(args.folder)
    if args.examples < 0:
        raise PrepareError(f"--examples is {args.examples}; it must be 0 or more")
    told = plan_report.stats(args.folder, seq_len=args.seq_len or found.meta["longest"])
    if args.out is None:
        return told
    if not args.out.parent.is_dir():
        raise PrepareError(f"--out {args.out}: no such folder; make it first")
    secret = credentialed(found)
    readable = args.examples > 0 and (not secret or args.show_credentialed)
    made_here = readable and check.made_by(found, args.model, args.tiny)
    markup = stats_page.build(
        found,
        told,
        tokenizer=check.tokenizer_of(found, args.model, args.tiny) if readable else None,
        encoder=check.encoder_of(found, args.model or args.tiny) if made_here else None,
        manifest=args.manifest,
        count=args.examples,
        show=args.show_credentialed,
        seed=args.seed,
    )
    stats_page.write(args.out, markup, secret=secret)
    return told | dict(page=str(args.out))
