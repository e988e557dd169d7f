"""Define the commands of the published files: `data.prepare import` and `data.prepare unpack`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from medmax_jax.data.image_tokens.encoder import load_encoder, log
from medmax_jax.data.records.document import Layout
from medmax_jax.data.release import archives, eval_rows, train_rows
from medmax_jax.models import vocab, vqgan
from medmax_jax.models.tokenizer import Tokenizer

RELEASED = "released"
SHARD_SIZE = 4_096  # documents; about 10 MB per shard at the released document length


def add(commands: Any) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Add both commands to the parser's sub-commands."""
    brought = commands.add_parser("import", help="published rows to records")
    _import_flags(brought)
    brought.set_defaults(run=_run_import)
    unpacked = commands.add_parser("unpack", help="the published image archives, under limits")
    _unpack_flags(unpacked)
    unpacked.set_defaults(run=_run_unpack, left="every file that is there is whole")
    return brought, unpacked


def layout_of(name: str) -> Layout:
    """Return the meaning of the ids of published rows: "released", or those of a model folder."""
    if name != RELEASED:
        return load_encoder(Path(name), vq=()).layout  # its weights are not needed
    return Layout(
        vocab=vocab.RELEASED,
        codes_per_image=vqgan.RELEASED.codes_per_image,
        tokenizer="",  # the files that made the published tokens are not stated anywhere
        vqgan="",
    )


def _import_flags(brought: argparse.ArgumentParser) -> None:
    brought.add_argument(
        "--from", type=Path, required=True, dest="source", help="train.jsonl, or the eval parquet"
    )
    brought.add_argument("--out", type=Path, required=True, help="folder, or items.jsonl, to write")
    brought.add_argument(
        "--tasks", nargs="*", default=[], metavar="TASK", help="of a parquet; all if not given"
    )
    brought.add_argument(
        "--allow_counts", action="store_true", help="of a parquet: other numbers of rows are right"
    )
    brought.add_argument(
        "--model_layout", default=RELEASED, help="released, or a model folder with those ids"
    )
    brought.add_argument("--tokenizer", type=Path, help="compare text and tokens with this file")
    brought.add_argument("--max_bad", type=float, default=train_rows.MAX_BAD, metavar="SHARE")
    brought.add_argument(
        "--no_separator", action="store_true", help="accept rows without end of turn"
    )


def _unpack_flags(unpacked: argparse.ArgumentParser) -> None:
    unpacked.add_argument(
        "--from", type=Path, nargs="+", required=True, dest="parts", help="parts of one archive"
    )
    unpacked.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, limit in dataclasses.asdict(archives.LIMITS).items():
        unpacked.add_argument(f"--max_{name}", type=_positive, default=limit)


def _run_import(args: argparse.Namespace) -> dict[str, Any]:
    if args.source.suffix == ".parquet":
        fixed = dict(tasks=args.tasks, allow_counts=args.allow_counts, say=log.info)
        return eval_rows.import_items(args.source, args.out, **fixed)
    if args.tasks:
        raise train_rows.PublishedError(f"--tasks is for a parquet, not for {args.source}")
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
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
