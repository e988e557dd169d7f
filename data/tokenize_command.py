"""The command line of `python -m data.prepare tokenize`; code_store.py does the work."""

import argparse
from pathlib import Path
from typing import Any

from data import outgoing
from data.batch_encoder import PRECISIONS
from data.code_store import SLICE, tokenize
from data.codes import BATCH, PrepareError, load_encoder
from data.sources.stream import json_lines
from medmax_jax import images
from medmax_jax.io.image_paths import is_inside


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data.prepare tokenize`."""
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument(
        "--list", type=Path, help="JSONL with image_path; without: every picture of the folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", type=Path, required=True, help="model folder, for its VQGAN")
    parser.add_argument("--precision", choices=PRECISIONS, default="highest")
    parser.add_argument("--shard_size", type=int, default=SLICE, help="pictures")
    parser.add_argument("--batch", type=int, default=BATCH, help="of pictures on a device")
    parser.add_argument("--max_bad", type=float, default=0.01, metavar="SHARE")
    parser.add_argument("--process", type=int, default=0, help="number of this process")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument(
        "--credentialed", action="store_true", help="private files, and no name of a picture"
    )
    parser.add_argument(
        "--burned_in", action="store_true", help="take DICOM files that say they show text"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    names = ("precision", "shard_size", "batch", "max_bad", "process", "processes")
    names += ("credentialed", "burned_in")
    paths = _listed(args.images, args.list, credentialed=args.credentialed)
    meta = tokenize(
        args.out, paths, folder=args.images,
        encoder=load_encoder(args.model), **{name: getattr(args, name) for name in names},
    )  # fmt: skip
    return {n: meta[n] for n in ("pictures", "unique", "unreadable", "agreement")}


def _listed(folder: Path, listing: Path | None, *, credentialed: bool) -> list[str]:
    """The pictures by path, each once: of a JSONL of rows, or all files with a picture's suffix."""
    for path, there in ((folder, folder.is_dir()), (listing, not listing or listing.is_file())):
        if not there:
            raise PrepareError(f"{path}: not there; check --images and --list")
    if listing is None:
        suffixes = (*images.SUFFIXES, ".dcm")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
        return sorted(str(p.relative_to(folder)) for p in found)
    paths: dict[str, None] = {}
    for place, row in json_lines(listing):
        if isinstance(row, dict) and not credentialed:
            # of a row that states no class nothing is known: the flag decides
            stated = outgoing.class_of(row, str(place), default=outgoing.LICENCE_BOUND)
            if stated == outgoing.CREDENTIALED:
                raise PrepareError(f"{place}: is credentialed; add --credentialed")
        path = row.get("image_path", "") if isinstance(row, dict) else None
        if path is None or path and not is_inside(path):
            shown = "" if credentialed else f" {path!r},"
            raise PrepareError(f"{place}: image_path is{shown} no name of a file below --images")
        paths |= {path: None} if path else {}
    return list(paths)
