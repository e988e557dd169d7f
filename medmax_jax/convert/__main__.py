"""Convert checkpoints of the Chameleon family between layouts, exactly in both directions.

python -m medmax_jax.convert --from P --to Q --format {native,hf,meta,peft} [--base B]
python -m medmax_jax.convert inspect P [--json]       describe P without loading its weights
python -m medmax_jax.convert check P                  check whether P is what was published
python -m medmax_jax.convert check P --full --out D   ten checks, and a page of their results

P     a checkpoint of Meta, Anole, Hugging Face or this project, a PEFT adapter, a training run,
      or a vqgan.ckpt; a path, gs://bucket/prefix or hf://ORG/NAME[@REVISION][/PART], which is
      downloaded to the cache of huggingface_hub. Its layout is detected.
Q     a new folder, written atomically.

B     the weights that an adapter or a run was trained on. For hf and meta the adapter is merged
      into them; for peft the adapter is written alone, and also for native unless --merge is given.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped.
"""

import argparse
import json
import logging
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import jax

from medmax_jax import arguments
from medmax_jax.cli import DONE, ERROR, INTERRUPTED
from medmax_jax.convert import check, convert, full_check, inspect_checkpoint, model_card
from medmax_jax.data import sample
from medmax_jax.data.mixture import SOURCES
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.io.errors import printable_text
from medmax_jax.io.progress import report_waiting


def _parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="P", help="checkpoint to convert"
    )
    parser.add_argument("--to", dest="target", required=True, metavar="Q", help="folder to create")
    parser.add_argument("--format", required=True, choices=convert.FORMATS, help="layout of Q")
    parser.add_argument("--base", metavar="B", help="base model that the adapter was trained on")
    parser.add_argument(
        "--merge", action="store_true", help="native: merge the adapter into its base"
    )
    parser.add_argument(
        "--vqgan",
        metavar="V",
        help="take the VQGAN from this path (a vqgan.ckpt, or a model that has one)",
    )
    parser.add_argument(
        "--quant",
        default="none",
        choices=("none", "int8", "int4", "nf4"),
        help="quantize the matrices of a native model",
    )
    parser.add_argument(
        "--no_decoder",
        action="store_true",
        help="hf: omit the VQGAN decoder, as HF's own checkpoints do",
    )
    return parser


def _inspect_parser() -> arguments.Parser:
    parser = arguments.Parser(prog="python -m medmax_jax.convert inspect")
    parser.add_argument("path", metavar="P")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check_parser() -> arguments.Parser:
    parser = arguments.Parser(
        prog="python -m medmax_jax.convert check",
        description=f"{check.__doc__}\n--full: {full_check.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="P")
    parser.add_argument(
        "--torch_python", metavar="PY", help="a Python with torch and transformers, to compare with"
    )
    parser.add_argument(
        "--scratch", metavar="D", default=tempfile.gettempdir(), help="folder for temporary copies"
    )
    parser.add_argument("--full", action="store_true", help="run the ten checks; requires --out")
    parser.add_argument("--out", metavar="D", help="--full: folder of the results")
    parser.add_argument(
        "--only", metavar="NAME", action="append", default=[], choices=full_check.CHECKS,
        help=f"--full: run this check, may be repeated; one of {', '.join(full_check.CHECKS)}",
    )  # fmt: skip
    parser.add_argument("--codes", metavar="F", help="--full: recorded codes of the three images")
    return parser


def _check(argv: Sequence[str]) -> int:
    """Run `check`, with or without --full."""
    parser = _check_parser()
    args = parser.parse_args(argv)
    say = lambda s: print(printable_text(s), flush=True)  # noqa: E731
    if args.full != bool(args.out):
        parser.error("--full and --out D are given together")
    if args.full:
        subject = full_check.Subject(
            args.path, pathlib.Path(args.out), codes=args.codes, torch_python=args.torch_python,
            say=say,
        )  # fmt: skip
        return full_check.run(subject, args.only)
    if args.only or args.codes:
        parser.error("--only and --codes belong to --full")
    return check.check(args.path, torch_python=args.torch_python, scratch=args.scratch, say=say)


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["inspect"]:
        args = _inspect_parser().parse_args(argv[1:])
        description = inspect_checkpoint.describe(convert.read_checkpoint(args.path))
        print(
            json.dumps(description)
            if args.json
            else printable_text(inspect_checkpoint.format_description(description))
        )
        return DONE
    if argv[:1] == ["check"]:
        return _check(argv[1:])
    args = _parser().parse_args(argv)
    log = lambda s: print(printable_text(s), flush=True)  # noqa: E731
    with report_waiting("waiting for a tensor or the disk", log) as restart:

        def say(line: str) -> None:
            log(line)
            restart()

        convert.convert(
            args.source, args.target, layout=args.format, base=args.base, vqgan=args.vqgan,
            quant=args.quant, merge_native=args.merge, decoder=not args.no_decoder, say=say,
            data_sources=data_sources(),
        )  # fmt: skip
    return DONE


def data_sources() -> dict[str, model_card.SourceTerms]:
    """Return the terms of MedMax's sources and of the packages of the embedded sample, by name."""
    licences: dict[str, set[str]] = {}
    for row in read_manifest(pathlib.Path(sample.__file__).parent / "manifest.jsonl"):
        licences.setdefault(row["source_package"].split("==")[0], set()).add(row["licence"])
    terms = {
        name: ("no", "; ".join(sorted(licence_or_terms)))
        for name, licence_or_terms in licences.items()
    }
    terms |= {source.name: (source.credential, source.licence) for source in SOURCES}
    return {
        name: model_card.SourceTerms(*licence_or_terms) for name, licence_or_terms in terms.items()
    }


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
    try:
        return _run(list(argv))
    except KeyboardInterrupt:
        print(
            "interrupted; no partial output was left, run the same command to start again",
            file=sys.stderr,
        )
        return INTERRUPTED
    except convert.ERRORS as error:
        print(printable_text(f"error: {error}"), file=sys.stderr)
        return ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
