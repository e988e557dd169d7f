"""Report for `python -m data.prepare stats` and `plan`: how full rows are, their documents, images.

fill     tokens divided by positions, for rows of a given length; `offline` is best-fit decreasing
         over all documents at once, which a plan of shuffled windows nearly reaches
padded   the method of the MedMax release: one document per row, a batch as long as its longest
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from medmax_jax.config import Data, Mixing
from medmax_jax.data.packing import mixing, pack, plan_file
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed

ROW_LENGTHS = (2_048, 4_096, 8_192, 16_384)
STEP = 128  # rows are padded to a multiple of this if shapes are compiled


def stats(folder: str | Path, *, seq_len: int) -> dict[str, Any]:
    """Return the contents of a folder, and how full packed rows of `seq_len` tokens are."""
    found = open_records(folder)
    lengths = found.index["length"]
    rows = len(pack.plan(lengths, seq_len=seq_len, pack=True, seed=0, epoch=0))
    names = ("documents", "groups", "tokens", "text_tokens", "image_tokens", "scored")
    held = {n: found.meta[n] for n in (*names, "tasks", "sources", "credentials", "notes")}
    quantiles = {f"{q}%": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 95, 100)}
    fill = round(float(lengths.sum() / (rows * seq_len)), 4)
    return (
        held
        | dict(lengths=quantiles, seq_len=seq_len, rows=rows, fill=fill)
        | dict(by_picture=image_stats(found))
    )


def report(
    found: Records, data: Data, mixed: Mixing, *, epoch: int, row: int | None
) -> dict[str, Any]:
    """Describe one epoch of a run with these settings, and its row number `row`."""
    if epoch < 0:
        raise pack.PackError(f"--epoch is {epoch}; the first is 0")
    epochs = mixing.epochs(found, data, mixed)
    plan, lengths = epochs.plan(epoch), found.index["length"]
    longest = int(lengths[plan.documents].max())
    long = np.flatnonzero(lengths > data.document_limit)
    told = dict(
        plan=epochs.first.fingerprint,
        epoch=epoch,
        documents=len(plan.documents),
        rows=len(plan),
        fill=round(packing_efficiency(lengths, plan, data.seq_len), 4),
        fills=packing_efficiencies(
            lengths[plan.documents], {*ROW_LENGTHS, data.seq_len}, longest, data.seed
        ),
        padded=padding_efficiency(
            lengths[plan.documents], batch_size=data.batch_size, seed=data.seed
        ),
        shares={
            name: dict(documents=round(d, 4), tokens=round(t, 4), times=round(n, 4))
            for name, (d, t, n) in mixing.mixture_shares(found, data, mixed).items()
        },
        left_out=len(long),
        left_out_ids=long.tolist() if has_credentialed(found) else [d.id for d in found.read(long)],
    )
    return told if row is None else told | {f"row {row}": row_documents(found, plan, row)}


def packing_efficiency(lengths: Int[np.ndarray, "n"], plan: pack.Plan, seq_len: int) -> float:
    """Return tokens divided by positions."""
    return float(lengths[plan.documents].sum() / (len(plan) * seq_len))


def packing_efficiencies(
    lengths: Int[np.ndarray, "n"], seq_lens: Iterable[int], longest: int, seed: int
) -> dict[int, dict[str, float]]:
    """Return the fill of a plan, and offline, for each row length that holds every document."""
    table = {}
    for seq_len in sorted(s for s in seq_lens if s >= longest):
        plan = pack.plan(lengths, seq_len=seq_len, pack=True, seed=seed, epoch=0)
        offline = lengths.sum() / (best_fit_row_count(lengths, seq_len) * seq_len)
        ours = packing_efficiency(lengths, plan, seq_len)
        table[seq_len] = dict(rows=len(plan), fill=round(ours, 4), offline=round(float(offline), 4))
    return table


def best_fit_row_count(lengths: Int[np.ndarray, "n"], seq_len: int) -> int:
    """Return the number of rows of best-fit decreasing over all documents at once.

    Rows with equal free space are interchangeable, so they are only counted: bit r of `open_` is
    set if some row has r free tokens, and the lowest set bit from a document's length on is its
    best fit.
    """
    count, open_, rows = [0] * (seq_len + 1), 0, 0
    for length in np.sort(lengths)[::-1].tolist():
        fitting = open_ >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            count[room] -= 1
            open_ ^= (not count[room]) << room
        else:
            room, rows = seq_len, rows + 1
        count[room - length] += 1
        open_ |= 1 << (room - length)
    return rows


def padding_efficiency(
    lengths: Int[np.ndarray, "n"], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return the fill of batches of `batch_size` documents that are padded to their longest.

    `shapes`: how many different lengths the batches have, each a compilation; `fill_of_steps` and
    `shapes_of_steps` are the same with lengths rounded up to a multiple of STEP.
    """
    order = lengths[pack.shuffle(len(lengths), seed, 0, 0)]
    whole = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    if not whole.size:
        whole = order[None]
    longest = whole.max(1)
    stepped = -(-longest // STEP) * STEP
    return dict(
        fill=round(float(whole.sum() / (longest.sum() * whole.shape[1])), 4),
        shapes=len(np.unique(longest)),
        fill_of_steps=round(float(whole.sum() / (stepped.sum() * whole.shape[1])), 4),
        shapes_of_steps=len(np.unique(stepped)),
    )


def row_documents(found: Records, plan: pack.Plan, row: int) -> list[dict[str, Any]]:
    """Return a row's documents with their positions; credentialed ones by number only."""
    if not 0 <= row < len(plan):
        raise pack.PackError(f"--row is {row}; this epoch has rows 0..{len(plan) - 1}")
    told, start = [], 0
    for number, document in zip(plan.row(row), found.read(plan.row(row)), strict=True):
        at = dict(document=int(number), start=start, tokens=len(document.tokens))
        names = (
            ("source", "task")
            if has_credentialed(found)
            else ("id", "source", "task", "image_path")
        )
        told.append(at | {n: getattr(document, n) for n in names})
        start += len(document.tokens)
    return told


def image_stats(found: Records) -> dict[str, Any]:
    """Count the documents and tasks per image: IMAX (arXiv 2504.09967) has 7.46 and 4.10.

    Three documents of image 0 (VQA, VQA, Visual Chat), one of image 1 (VQA), one without:
        pictures 2, without_picture 1, entries 2.0, tasks 1.5, of_entries {1: 1, 3: 1}
    """
    picture, task = found.index["picture"], found.index["task"]
    has = picture >= 0
    if not has.any():
        return dict(pictures=0, without_picture=len(picture))
    entries = np.bincount(picture[has])
    tasks = np.bincount(np.unique(np.stack([picture[has], task[has]]), axis=1)[0])
    sizes, many = np.unique(entries, return_counts=True)
    return dict(
        pictures=len(entries),
        without_picture=int((~has).sum()),
        entries=round(float(entries.mean()), 3),
        tasks=round(float(tasks.mean()), 3),
        of_entries=dict(zip(sizes.tolist(), many.tolist(), strict=True)),
    )


# ---- The command line ----


def add(commands: Any) -> argparse.ArgumentParser:
    """Add `plan`, with the flags of config.data and config.mixing."""
    planned = commands.add_parser("plan", help="which documents share a row, as a run has it")
    planned.add_argument("--seq_len", type=int, help="tokens a row; not for a saved plan")
    planned.add_argument("--document_limit", type=int, default=0, help="0: the row length")
    planned.add_argument("--batch_size", type=int, default=8, help="of padding to longest")
    planned.add_argument("--seed", type=int, default=0, help="config.data.seed")
    planned.add_argument("--epoch", type=int, default=0, help="epoch to show")
    planned.add_argument("--row", type=int, help="row whose documents to show")
    planned.add_argument("--save", type=Path, metavar="F.npz", help="write the plan to a file")
    planned.add_argument("--by", choices=("source", "task"), default="source")
    planned.add_argument("--unit", choices=("documents", "tokens"), default="documents")
    planned.add_argument("--weights", default="", help="as config.mixing: 'name=3, other=1'")
    planned.add_argument("--image_centric", action="store_true", help="pictures stay together")
    planned.set_defaults(run=_run_plan)
    return planned


def _run_plan(args: argparse.Namespace) -> dict[str, Any]:
    if args.folder.suffix == plan_file.SUFFIX:
        return _saved(args)
    for name in ("seq_len", "batch_size"):
        if (getattr(args, name) or 0) < 1:
            raise pack.PackError(f"--{name} is {getattr(args, name)}; it must be above 0")
    data = Data(
        train="", validation="", document_limit=args.document_limit or args.seq_len,
        seq_len=args.seq_len, batch_size=args.batch_size, pack=True, mask="", seed=args.seed,
        plan="",
    )  # fmt: skip
    mixed = Mixing(
        by=args.by, unit=args.unit, weights=args.weights, image_centric=args.image_centric,
        leave_out="", fraction=1.0, fraction_seed=0,
    )  # fmt: skip
    found = open_records(args.folder)
    told = report(found, data, mixed, epoch=args.epoch, row=args.row)
    if args.save is None:
        return told
    plan_file.save(args.save, found, data, mixed, epoch=args.epoch)
    return told | dict(saved=str(args.save))


def _saved(args: argparse.Namespace) -> dict[str, Any]:
    """Describe a saved plan from the file alone."""
    if args.seq_len or args.save or args.weights:
        raise pack.PackError(f"{args.folder} is a saved plan: its settings are in it; --row alone")
    saved = plan_file.load(args.folder)
    held = saved.lengths[saved.plan.documents].sum()
    places = len(saved.plan) * saved.header["settings"]["seq_len"]
    told = dict(saved.header, documents=len(saved.plan.documents), row_count=len(saved.plan))
    told["fill"] = round(float(held / places), 4)
    return told if args.row is None else told | {f"row {args.row}": saved.who(args.row)}
