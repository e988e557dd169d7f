"""Report for `python -m data.prepare stats` and `plan`: how full rows are, their documents, images.

fill     tokens divided by positions, for rows of a given length; `offline` is best-fit decreasing
         over all documents at once, which a plan of shuffled windows nearly reaches
padded   the method of the MedMax release: one document per row, a batch as long as its longest

Runs that are compared at equal tokens have equal numbers of scored tokens: the targets of the loss,
which a run's plan determines. `plan D --config C` prints them; `--scored N` also prints how many
steps of the last stage make the run's number the nearest one to N. `plan D --sweep S` prints them
for each run of an expanded sweep, with the steps for the number of the first run.
"""

import argparse
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from medmax_jax import cli
from medmax_jax.config import ConditionDropout, Data, Mixing, Run, from_config_dict
from medmax_jax.data.packing import condition_dropout, mixing, pack, plan_file, stages
from medmax_jax.data.records.document import PSEUDO
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.models.guidance_streams import STREAMS
from medmax_jax.sweep import expand
from medmax_jax.sweep.axes import SweepError
from medmax_jax.training import stages as run_stages

# Documents and tasks per image of the data set IMAX (arXiv 2504.09967).
IMAX_PER_IMAGE = {"entries": 7.46, "tasks": 4.10}
ROW_LENGTHS = (2_048, 4_096, 8_192, 16_384)
STEP = 128  # rows are padded to a multiple of this if shapes are compiled
_ROW_FIELDS = ("id", "source", "task", "image_path")


def stats(folder: str | Path, *, seq_len: int) -> dict[str, Any]:
    """Return the contents of a folder, and how full packed rows of `seq_len` tokens are."""
    records = open_records(folder)
    lengths = records.index["length"]
    rows = len(pack.plan(lengths, seq_len=seq_len, pack=True, seed=0, epoch=0))
    names = ("documents", "groups", "tokens", "text_tokens", "image_tokens", "scored")
    contents = {n: records.meta[n] for n in (*names, "tasks", "sources", "credentials", "notes")}
    quantiles = {f"{q}%": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 95, 100)}
    fill = round(float(lengths.sum() / (rows * seq_len)), 4)
    contents |= dict(lengths=quantiles, seq_len=seq_len, rows=rows, fill=fill)
    # Verbatim: part of the data.
    contents["by_picture"] = image_stats(records)
    if PSEUDO in records.meta:
        task = records.index["task"][records.index[PSEUDO] == 1]
        counts = zip(records.names("task"), np.bincount(task).tolist(), strict=False)
        contents[PSEUDO] = {name: count for name, count in counts if count}
    return contents


def report(
    records: Records, data: Data, mixing_config: Mixing, *, epoch: int, row: int | None
) -> dict[str, Any]:
    """Describe one epoch of a run with these settings, and its row number `row`."""
    if epoch < 0:
        raise pack.PackError(f"--epoch is {epoch}; the first is 0")
    epochs = mixing.epochs(records, data, mixing_config)
    plan, lengths = epochs.plan(epoch), records.index["length"]
    longest = int(plan.lengths.max())
    long = np.flatnonzero(lengths > data.document_limit)
    summary = dict(
        plan=epochs.first.fingerprint,
        epoch=epoch,
        documents=len(plan.documents),
        rows=len(plan),
        fill=round(packing_efficiency(plan, data.seq_len), 4),
        fills=packing_efficiencies(plan.lengths, {*ROW_LENGTHS, data.seq_len}, longest, data.seed),
        padded=padding_efficiency(plan.lengths, batch_size=data.batch_size, seed=data.seed),
        shares={
            name: dict(documents=round(d, 4), tokens=round(t, 4), times=round(n, 4))
            for name, (d, t, n) in mixing.mixture_shares(records, data, mixing_config).items()
        },
        left_out=len(long),
        left_out_ids=long.tolist()
        if has_credentialed(records)
        else [d.id for d in records.read(long)],
    )
    if data.condition_dropout != ConditionDropout.off():
        summary["streams"] = condition_dropout.stream_counts(plan)
    return summary if row is None else summary | {f"row {row}": row_documents(records, plan, row)}


def run_report(records: Records, run: Run, *, scored: int = 0) -> dict[str, Any]:
    """Describe the plan of a run: of each stage its steps and settings, and its first epoch.

    `records`: of the stages that have none of their own. `scored`: also find the number of steps of
    the last stage with which the run scores that many tokens, 0: not.
    """
    described, plans, parts = [], [], stages.parts(run.data, run.mixing, run.stages)
    ready = stages.ready(run.stages) if run.stages else 1
    for number, (data, mixing_config, first, end) in enumerate(parts[:ready]):
        own = run.stages[number].records if run.stages else ""
        from_records = open_records(own) if own else records
        epochs = mixing.epochs(from_records, data, mixing_config)
        plan, steps = epochs.plan(0), int(min(end, run.train.steps)) - first
        weights = run.stages[number].loss_weights if run.stages else run.loss.weights
        plans.append(epochs.first.fingerprint)
        tokens, targets = tokens_of_rows(from_records, epochs, data, steps * data.batch_size)
        described.append(
            dict(
                stage=number,
                steps=steps,
                epochs=round(steps * data.batch_size / len(plan), 3),
                documents=len(plan.documents),
                rows=len(plan),
                fill=round(packing_efficiency(plan, data.seq_len), 4),
                tokens=int(tokens.sum()),
                scored=int(targets.sum()),
                streams=condition_dropout.stream_counts(plan),
                settings=run_stages.settings(mixing_config, data.condition_dropout, weights),
            )
        )
    summary = dict(plan=stages.fingerprint(plans), steps=run.train.steps)
    summary |= {name: sum(row[name] for row in described) for name in ("tokens", "scored")}
    if ready < len(parts):
        missing = run.stages[ready].records
        if scored:
            raise pack.PackError(f"--scored: {missing} of stage {ready} does not exist; make it")
        summary["missing"] = f"{missing}, which stage {ready} reads"
    elif scored:
        before = summary["scored"] - described[-1]["scored"]
        steps, of_stage = _steps_for(scored - before, from_records, epochs, data)
        summary |= dict(last_stage_steps=steps, scored_then=before + of_stage)
    return summary | dict(stages=described)


def sweep_report(records: Records, folder: Path) -> dict[str, Any]:
    """Compare the scored tokens of the runs of a sweep with those of its first run.

    `share`: of the first run's number; `last_stage_steps`: steps of the last stage, or of a run
    without stages, with which it is nearest to 1, and `share_then`.
    """
    try:
        runs = expand.read(folder)
    except SweepError as error:
        raise pack.PackError(str(error)) from error
    rows, first = [], 0
    for planned in runs:
        found = run_report(records, expand.settings(planned), scored=first)
        if "missing" in found:
            raise pack.PackError(f"run {planned.run_id}: {found['missing']}, is missing; make it")
        first = first or found["scored"]
        row = {name: found[name] for name in ("steps", "tokens", "scored")}
        row["share"] = round(found["scored"] / first, 4)
        row["last_stage_steps"] = found.get("last_stage_steps", found["stages"][-1]["steps"])
        row["share_then"] = round(found.get("scored_then", found["scored"]) / first, 4)
        rows.append(dict(run=planned.run_id) | row)
    return dict(equal_tokens="scored tokens: the targets of the loss", runs=rows)


def tokens_of_rows(
    records: Records, epochs: pack.Epochs, data: Data, count: int
) -> tuple[Int[np.ndarray, "r"], Int[np.ndarray, "r"]]:
    """Return the tokens, and the scored tokens, of each of the first `count` rows of all epochs."""
    tokens, scored, epoch = [], [], 0
    while count > 0:
        plan = epochs.plan(epoch)
        targets = records.index[data.mask][plan.documents].astype(np.int64)
        targets = np.where(plan.streams, records.layout.codes_per_image, targets)
        for columns, values in ((tokens, plan.lengths.astype(np.int64)), (scored, targets)):
            columns.append(np.add.reduceat(values, plan.starts[:-1])[:count])
        count, epoch = count - len(plan), epoch + 1
    return np.concatenate(tokens), np.concatenate(scored)


def _steps_for(scored: int, records: Records, epochs: pack.Epochs, data: Data) -> tuple[int, int]:
    """Return the steps whose scored tokens are nearest to a number, at least 1, and that sum."""
    rows = data.batch_size
    while (targets := tokens_of_rows(records, epochs, data, rows)[1]).sum() < scored:
        rows *= 2
    sums = np.cumsum(targets.reshape(-1, data.batch_size).sum(1))
    steps = int(np.argmin(np.abs(sums - scored)))
    return steps + 1, int(sums[steps])


def packing_efficiency(plan: pack.Plan, seq_len: int) -> float:
    """Return tokens divided by positions."""
    return float(plan.lengths.sum() / (len(plan) * seq_len))


def packing_efficiencies(
    lengths: Int[np.ndarray, "n"], seq_lens: Iterable[int], longest: int, seed: int
) -> dict[int, dict[str, float]]:
    """Return the fill of a plan, and offline, for each row length that holds every document."""
    table = {}
    for seq_len in sorted(s for s in seq_lens if s >= longest):
        plan = pack.plan(lengths, seq_len=seq_len, pack=True, seed=seed, epoch=0)
        offline = lengths.sum() / (best_fit_row_count(lengths, seq_len) * seq_len)
        ours = packing_efficiency(plan, seq_len)
        table[seq_len] = dict(rows=len(plan), fill=round(ours, 4), offline=round(float(offline), 4))
    return table


def best_fit_row_count(lengths: Int[np.ndarray, "n"], seq_len: int) -> int:
    """Return the number of rows of best-fit decreasing over all documents at once.

    Rows with equal free space are interchangeable, so they are only counted: bit r of `available`
    is set if some row has r free tokens, and the lowest set bit from a document's length on is its
    best fit.
    """
    count, available, rows = [0] * (seq_len + 1), 0, 0
    for length in np.sort(lengths)[::-1].tolist():
        fitting = available >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            count[free] -= 1
            available ^= (not count[free]) << free
        else:
            free, rows = seq_len, rows + 1
        count[free - length] += 1
        available |= 1 << (free - length)
    return rows


def padding_efficiency(
    lengths: Int[np.ndarray, "n"], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return the fill of batches of `batch_size` documents that are padded to their longest.

    `shapes`: how many different lengths the batches have, each a compilation; `fill_of_steps` and
    `shapes_of_steps` are the same with lengths rounded up to a multiple of STEP.
    """
    order = lengths[pack.shuffle(len(lengths), seed, 0, 0)]
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    if not batches.size:
        batches = order[None]
    longest = batches.max(1)
    stepped = -(-longest // STEP) * STEP
    return dict(
        fill=round(float(batches.sum() / (longest.sum() * batches.shape[1])), 4),
        shapes=len(np.unique(longest)),
        fill_of_steps=round(float(batches.sum() / (stepped.sum() * batches.shape[1])), 4),
        shapes_of_steps=len(np.unique(stepped)),
    )


def row_documents(records: Records, plan: pack.Plan, row: int) -> list[dict[str, Any]]:
    """Return a row's documents with their positions; credentialed ones by number only."""
    if not 0 <= row < len(plan):
        raise pack.PackError(f"--row is {row}; this epoch has rows 0..{len(plan) - 1}")
    names = ("source", "task") if has_credentialed(records) else _ROW_FIELDS
    documents, start = [], 0
    complete = plan.complete_row(row)
    read = records.read(complete.documents)
    for document, number, tokens, stream in zip(read, *complete, strict=True):
        line = dict(document=int(number), start=start, tokens=int(tokens))
        line |= {n: getattr(document, n) for n in names}
        documents.append(line | (dict(stream=STREAMS[stream]) if stream else {}))
        start += int(tokens)
    return documents


def image_stats(records: Records) -> dict[str, Any]:
    """Count the documents (entries) and tasks per image, of all documents and of each source.

    Three documents of image 0 (VQA, VQA, Visual Chat), one of image 1 (VQA), one without: 2 images,
    1 document without an image, entries 2.0, tasks 1.5, of_entries {1: 1, 3: 1}. For a source,
    only its own documents count.
    """
    image, task = records.index["image_path"], records.index["task"]
    has_image = image >= 0
    if not has_image.any():
        # Verbatim: part of the data.
        return dict(pictures=0, without_picture=len(image))
    sizes, counts = np.unique(np.bincount(image[has_image]), return_counts=True)
    source, by_source = records.index["source"], {}
    for number, name in enumerate(records.names("source")):
        own = has_image & (source == number)
        if own.any():
            by_source[name] = _per_image(image[own], task[own])
    overall = _per_image(image[has_image], task[has_image])
    # Verbatim: part of the data.
    return dict(
        pictures=overall["images"],
        without_picture=int((~has_image).sum()),
        entries=overall["entries"],
        tasks=overall["tasks"],
        of_entries=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
        by_source=by_source,
    )


def _per_image(image: Int[np.ndarray, "n"], task: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Return the number of images, and the mean numbers of documents and of tasks of an image."""
    images = len(np.unique(image))
    tasks = np.unique(np.stack([image, task]), axis=1).shape[1] / images
    return dict(images=images, entries=round(len(image) / images, 3), tasks=round(tasks, 3))


# ---- The command line ----


def add(commands: Any) -> argparse.ArgumentParser:
    """Add `plan`, with the flags of config.data and config.mixing."""
    planned = commands.add_parser("plan", help="show which documents share a row in a training run")
    planned.add_argument(
        "--seq_len", type=int, help="tokens per row; not used with --config or for a saved plan"
    )
    planned.add_argument(
        "--config", default="", metavar="FILE.py",
        help="config of a run, whose settings replace these flags; prints each of its stages",
    )  # fmt: skip
    planned.add_argument(
        "--sweep", type=Path, metavar="S",
        help="folder of an expanded sweep: compare the scored tokens of its runs",
    )  # fmt: skip
    planned.add_argument(
        "--scored", type=int, default=0, metavar="N",
        help="with --config: find the steps of its last stage for N scored tokens in all",
    )  # fmt: skip
    planned.add_argument(
        "--document_limit", type=int, default=0,
        help="exclude documents with more tokens; 0: the row length",
    )  # fmt: skip
    planned.add_argument(
        "--batch_size", type=int, default=8, help="batch size of the comparison with padding"
    )
    planned.add_argument("--seed", type=int, default=0, help="config.data.seed")
    planned.add_argument("--epoch", type=int, default=0, help="epoch that is described")
    planned.add_argument("--row", type=int, help="row whose documents are listed")
    planned.add_argument("--save", type=Path, metavar="F.npz", help="write the plan to a file")
    planned.add_argument(
        "--by", choices=("source", "task"), default="source", help="names that --weights refers to"
    )
    planned.add_argument(
        "--unit", choices=("documents", "tokens"), default="documents",
        help="what --weights are shares of",
    )  # fmt: skip
    planned.add_argument("--weights", default="", help="config.mixing.weights: 'name=3, other=1'")
    planned.add_argument(
        "--mask", choices=("answers", "release"), default="answers",
        help="config.data.mask, which selects the documents of --condition_dropout",
    )  # fmt: skip
    planned.add_argument(
        "--condition_dropout", default="", metavar="'text=P, image=P, all=P'",
        help="config.data.condition_dropout",
    )  # fmt: skip
    planned.add_argument(
        "--image_centric", action="store_true", help="keep the documents of an image together"
    )
    planned.add_argument(
        "--image_window", type=int, default=256, help="config.mixing.image_window: documents"
    )
    flags = vars(planned.parse_args([]))  # all but the folder, which prepare.py adds
    default = {n: value for n, value in flags.items() if n not in ("config", "scored", "sweep")}
    planned.set_defaults(run=functools.partial(_run_plan, default=default))
    return planned


def _run_plan(args: argparse.Namespace, default: dict[str, Any]) -> dict[str, Any]:
    if str(args.folder).endswith(plan_file.SUFFIX):
        return _describe_saved(args)
    if args.sweep is not None:
        _check_alone(args, default, f"--sweep={args.sweep}")
        return sweep_report(open_records(args.folder), args.sweep)
    if args.config:
        return _describe_run(args, default)
    if args.scored:
        raise pack.PackError("--scored is of a run; use it with --config")
    for name in ("seq_len", "batch_size", "image_window"):
        if (getattr(args, name) or 0) < 1:
            raise pack.PackError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    data = Data(
        train="", validation="", document_limit=args.document_limit or args.seq_len,
        seq_len=args.seq_len, batch_size=args.batch_size, pack=True, mask=args.mask, seed=args.seed,
        plan="", condition_dropout=condition_dropout.parse(args.condition_dropout),
    )  # fmt: skip
    mixing_config = Mixing(
        by=args.by, unit=args.unit, weights=args.weights, image_centric=args.image_centric,
        image_window=args.image_window, leave_out="", pseudo=True, fraction=1.0,
        fraction_seed=0,
    )  # fmt: skip
    records = open_records(args.folder)
    summary = report(records, data, mixing_config, epoch=args.epoch, row=args.row)
    if args.save is None:
        return summary
    plan_file.save(args.save, records, data, mixing_config, epoch=args.epoch)
    return summary | dict(saved=str(args.save))


def _describe_run(args: argparse.Namespace, default: dict[str, Any]) -> dict[str, Any]:
    """Describe the plan of a run's config, with the records of the command."""
    _check_alone(args, default, f"--config={args.config}")
    run = from_config_dict(cli.load_config(args.config))
    return run_report(open_records(args.folder), run, scored=args.scored)


def _check_alone(args: argparse.Namespace, default: dict[str, Any], flag: str) -> None:
    """Raise PackError where flags repeat settings that the config of a run contains."""
    if given := [name for name in default if getattr(args, name) != default[name]]:
        raise pack.PackError(
            f"--{given[0]} and {flag} are both given; a config contains the settings of its run: "
            "use that flag alone, or the other flags without it"
        )


def _describe_saved(args: argparse.Namespace) -> dict[str, Any]:
    """Describe a saved plan from the file alone."""
    if args.seq_len or args.save or args.weights:
        raise pack.PackError(
            f"{args.folder} is a saved plan, which contains its settings; use --row only"
        )
    saved = plan_file.load(args.folder)
    tokens = saved.lengths[saved.plan.documents].sum()
    positions = len(saved.plan) * saved.header["settings"]["seq_len"]
    summary = dict(saved.header, documents=len(saved.plan.documents), row_count=len(saved.plan))
    summary["fill"] = round(float(tokens / positions), 4)
    if args.row is None:
        return summary
    return summary | {f"row {args.row}": saved.row_documents(args.row)}
