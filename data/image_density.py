"""Rearrange records by image: the same tasks on few images (IMAX) or on many (DMAX).

python -m data.prepare densify POOL --out IMAX (--documents N | --like D) [--seed S]
python -m data.prepare decentralize POOL --out DMAX --like IMAX [--seed S]

    image      a          b          c          d            VQA = v, Caption = c, Report = r
    POOL       v v c r    v c        c r        v
    densify    v v c r                                       few images with all their tasks
    decentral. v v                   r          .   and c of b: one task for each image

Both select documents of POOL, without changing them: as many of each task as D has, or N with the
shares of the tasks in POOL. So two arms of a comparison differ in the arrangement only. IMAX and
DMAX are the data sets of arXiv 2504.09967; the selection is ours, because theirs was not available
to us. A folder of records is one split, so no patient gets into another split.

The selection is greedy. `densify` takes the image with the most tasks that are still needed, then
the one with the most documents. `decentralize` gives each image the task that is scarcest: the
greatest share of the documents left of which is needed.
"""

import argparse
import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from medmax_jax import arguments
from medmax_jax.data.packing.report import IMAX_PER_IMAGE, image_stats
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document, RecordsError
from medmax_jax.data.records.reader import Records, open_records

SHARD_SIZE = 4_096  # documents
READ = 256  # documents at once


def densify(
    image: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    need: Int[np.ndarray, "K"],
    *,
    seed: int,
) -> Int[np.ndarray, "m"]:
    """Return documents of as few images as possible, need[t] of each task t.

    Args:
        image: the image of each document; -1 (none) is never selected.
        task: the task of each document.
        need: documents of each task.
        seed: the order of images that are equally good.

    Raises:
        RecordsError: a task has too few documents with an image.
    """
    left, of_image = need.astype(np.int64).copy(), _documents_by_image(image, task)
    rank = np.random.default_rng(seed).permutation(len(of_image))

    def gain(tasks: Mapping[int, list[int]]) -> tuple[int, int]:
        taken = [min(len(documents), left[t]) for t, documents in tasks.items() if left[t]]
        return -len(taken), -int(sum(taken))

    queue = [(*gain(tasks), int(rank[n]), n) for n, tasks in enumerate(of_image)]
    heapq.heapify(queue)
    chosen: list[int] = []
    while left.any() and queue:
        *believed, order, n = heapq.heappop(queue)
        now = gain(of_image[n])
        if now != tuple(believed):  # needs have been met since; a gain can only become smaller
            heapq.heappush(queue, (*now, order, n))
            continue
        for t, documents in of_image[n].items():
            taken = documents[: left[t]]
            left[t] -= len(taken)
            chosen += taken
    return _complete(chosen, need, left)


def decentralize(
    image: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    need: Int[np.ndarray, "K"],
    *,
    seed: int,
) -> Int[np.ndarray, "m"]:
    """Return documents such that all of an image have one task; otherwise as `densify`.

    Raises:
        RecordsError: there are too few images. The selection is greedy, so another one could
            reach a few documents more.
    """
    left, of_image = need.astype(np.int64).copy(), _documents_by_image(image, task)
    available = np.zeros(len(need), np.int64)
    for tasks in of_image:
        for t, documents in tasks.items():
            available[t] += len(documents)
    shuffled = np.random.default_rng(seed).permutation(len(of_image))
    chosen: list[int] = []
    for n in sorted(shuffled.tolist(), key=lambda n: len(of_image[n])):  # least choice first
        tasks = of_image[n]
        needed = [t for t in tasks if left[t]]
        if needed:
            scarcest = max(needed, key=lambda t: left[t] / available[t])
            taken = tasks[scarcest][: left[scarcest]]
            left[scarcest] -= len(taken)
            chosen += taken
        for t, documents in tasks.items():
            available[t] -= len(documents)
    return _complete(chosen, need, left)


def task_counts(records: Records, names: list[str]) -> Int[np.ndarray, "K"]:
    """Return the number of documents with an image of each task; `names` must hold all tasks."""
    own = records.names("task")
    task = records.index["task"][records.index["image_path"] >= 0]
    counts = dict(zip(own, np.bincount(task, minlength=len(own)).tolist(), strict=True))
    if missing := [name for name in own if counts[name] and name not in names]:
        raise RecordsError(
            f"{records.folder} has the task {missing[0]!r}, which the pool lacks; use a pool with "
            f"all of its tasks"
        )
    return np.array([counts.get(name, 0) for name in names])


def scaled_counts(counts: Int[np.ndarray, "K"], total: int) -> Int[np.ndarray, "K"]:
    """Return `total` documents divided as `counts`, rounded to the largest remainders.

    ([6, 3, 1], 5)   ->   [3, 1, 1]; of equal remainders the first is rounded up
    """
    exact = counts / counts.sum() * total
    scaled = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - scaled), kind="stable")[: total - scaled.sum()]
    scaled[largest] += 1
    return scaled


def _documents_by_image(
    image: Int[np.ndarray, "n"], task: Int[np.ndarray, "n"]
) -> list[dict[int, list[int]]]:
    """Return task -> documents for each image."""
    table: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for document in np.flatnonzero(image >= 0).tolist():
        table[int(image[document])][int(task[document])].append(document)
    return [dict(table[n]) for n in sorted(table)]


def _complete(
    chosen: list[int], need: Int[np.ndarray, "K"], left: Int[np.ndarray, "K"]
) -> Int[np.ndarray, "m"]:
    if left.any():
        t = int(np.argmax(left))
        raise RecordsError(
            f"{need.sum():,} documents are needed, but only {(need - left).sum():,} can be "
            f"selected: of task {t} {left[t]:,} of {need[t]:,} are missing"
        )
    return np.sort(np.array(chosen, np.int64))


# ---- The command line ----

SELECTIONS = {"densify": densify, "decentralize": decentralize}


def add(commands: Any) -> None:
    """Add `densify` and `decentralize`."""
    for name, text in (
        ("densify", "select documents on as few images as possible (IMAX)"),
        ("decentralize", "select documents so that each image is used for one task (DMAX)"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=arguments.folder, help="pool: a folder of records")
        command.add_argument("--out", type=arguments.folder, required=True, help="folder to write")
        size = command.add_mutually_exclusive_group(required=True)
        size.add_argument(
            "--like", type=arguments.folder, metavar="D",
            help="records whose number of documents of each task is selected",
        )  # fmt: skip
        size.add_argument(
            "--documents", type=int, metavar="N",
            help="number of documents, divided into tasks like the pool",
        )  # fmt: skip
        command.add_argument("--seed", type=int, default=0, help="order of equally good images")
        command.set_defaults(run=_run, selection=name)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    pool = open_records(args.folder)
    names = pool.names("task")
    if args.like is not None:
        like = open_records(args.like)
        need, size = task_counts(like, names), dict(like=like.fingerprint)
    else:
        counts, size = task_counts(pool, names), dict(documents=args.documents)
        if not 1 <= args.documents <= counts.sum():
            raise RecordsError(
                f"--documents is {args.documents}; it must be 1 to {counts.sum()}, the documents "
                f"with an image of {args.folder}"
            )
        need = scaled_counts(counts, args.documents)
    if not need.any():
        raise RecordsError(f"{args.like}: no document has an image; select from other records")
    image, task = (np.asarray(pool.index[label]) for label in ("image_path", "task"))
    try:
        chosen = SELECTIONS[args.selection](image, task, need, seed=args.seed)
    except RecordsError as error:
        tasks = ", ".join(f"{n} {name}" for n, name in enumerate(names))
        raise RecordsError(
            f"{args.folder}: {error} ({tasks}); use a smaller --documents or --like, or a larger "
            "pool"
        ) from error
    selection = dict(kind=args.selection, pool=pool.fingerprint, seed=args.seed) | size
    meta = writer.write(
        args.out,
        _read(pool, chosen),
        shard_size=SHARD_SIZE,
        layout=pool.layout,
        notes=pool.meta["notes"] | dict(selection=selection),
    )
    per_image = {"pool": pool, args.selection: open_records(args.out)}
    table = {name: _density(records) for name, records in per_image.items()}
    return dict(
        documents=meta["documents"], tasks=meta["tasks"],
        per_image=table | {"IMAX (published)": dict(images="", **IMAX_PER_IMAGE)},
    )  # fmt: skip


def _density(records: Records) -> dict[str, float]:
    stats = image_stats(records)
    # Verbatim: part of the data.
    return dict(images=stats["pictures"], entries=stats["entries"], tasks=stats["tasks"])


def _read(pool: Records, chosen: Int[np.ndarray, "m"]) -> Iterator[Document]:
    for start in range(0, len(chosen), READ):
        yield from pool.read(chosen[start : start + READ])
