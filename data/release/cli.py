"""Define the commands of the published files: `data.prepare import` and `data.prepare unpack`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from medmax_jax import arguments
from medmax_jax.data.image_tokens.encoder import load_encoder, log
from medmax_jax.data.records.document import Layout
from medmax_jax.data.release import archives, eval_rows, train_rows
from medmax_jax.models import vocab, vqgan
from medmax_jax.models.tokenizer import Tokenizer

RELEASED = "released"
SHARD_SIZE = 4_096  # documents; about 10 MB per shard at the released document length


def add(commands: Any) -> None:
    """Add both commands to the parser's sub-commands."""
    importer = commands.add_parser("import", help="convert published rows to records or eval items")
    _import_flags(importer)
    importer.set_defaults(run=_run_import)
    unpacker = commands.add_parser("unpack", help="unpack the published image archives")
    _unpack_flags(unpacker)
    unpacker.set_defaults(
        run=_run_unpack, resumes=True, left="every file written so far is complete"
    )


def layout_of(name: str) -> Layout:
    """Return the meaning of the ids of published rows: "released", or those of a model folder."""
    if name != RELEASED:
        return load_encoder(name, vq=()).layout  # its weights are not needed
    return Layout(
        vocab=vocab.RELEASED,
        codes_per_image=vqgan.RELEASED.codes_per_image,
        tokenizer="",  # the files that made the published tokens are not stated anywhere
        vqgan="",
    )


def _import_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", type=Path, required=True, dest="source",
        help="train.jsonl, validation.jsonl, or the evaluation parquet",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=arguments.folder,
        required=True,
        help="folder, or items.jsonl, to write",
    )
    parser.add_argument(
        "--tasks", nargs="*", default=[], metavar="TASK",
        help="tasks of a parquet to convert; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--allow_counts", action="store_true",
        help="accept a parquet whose numbers of rows differ from the published ones",
    )  # fmt: skip
    parser.add_argument(
        "--model_layout", default=RELEASED, help="'released', or a model folder with these ids"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json with which text and tokens are compared"
    )
    parser.add_argument(
        "--max_bad", type=float, default=train_rows.MAX_BAD, metavar="SHARE",
        help="stop if more than this share of rows is invalid",
    )  # fmt: skip
    parser.add_argument(
        "--no_separator", action="store_true", help="accept rows without a separator (SEP)"
    )


def _unpack_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", type=Path, nargs="+", required=True, dest="parts",
        help="parts of one archive, in order",
    )  # fmt: skip
    parser.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
    meanings = dict(
        members="files in the archive",
        member_bytes="bytes of one file",
        total_bytes="bytes of all files",
        ratio="unpacked bytes per byte of the archive",
    )
    for name, limit in dataclasses.asdict(archives.LIMITS).items():
        parser.add_argument(
            f"--max_{name}", type=_positive, default=limit,
            help=f"maximum of {meanings[name]}; default: {limit}",
        )  # fmt: skip


def _run_import(args: argparse.Namespace) -> dict[str, Any]:
    if args.source.suffix == ".parquet":
        return eval_rows.import_items(
            args.source, args.out,
            tasks=args.tasks, allow_counts=args.allow_counts, say=log.info,
        )  # fmt: skip
    if args.tasks:
        raise train_rows.PublishedError(
            f"--tasks is for a parquet, but --from is {args.source}; remove --tasks"
        )
    layout = layout_of(args.model_layout)
    tokenizer = args.tokenizer and Tokenizer.from_file(args.tokenizer, layout.vocab)
    rules = train_rows.RowRules(
        layout=layout,
        separator=not args.no_separator,
        max_bad=args.max_bad,
        shard_size=SHARD_SIZE,
        tokenizer=tokenizer,
    )
    return train_rows.import_rows(args.source, args.out, rules=rules, say=log.info)


def _run_unpack(args: argparse.Namespace) -> dict[str, Any]:
    names = dataclasses.asdict(archives.LIMITS)
    limits = archives.Limits(**{name: getattr(args, f"max_{name}") for name in names})
    return archives.unpack(args.parts, args.out, limits=limits, say=log.info)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; use 1 or more")
    return number
