"""Rearrange records by image: the same tasks on few images (IMAX) or on many (DMAX).

python -m data.prepare densify POOL --out IMAX (--documents N | --like D) [--entries E] [--seed S]
python -m data.prepare decentralize POOL --out DMAX --like IMAX [--entries E] [--seed S]

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

With --entries E each selected image has exactly E documents; for `decentralize`, the last image of
a task may have fewer. Which images and documents these are is drawn by the seed:

    densify       the first images of the drawn order that have E documents, with as many tasks
                  per image as the counts allow; so if all images have enough, those of E = 8 are
                  among those of E = 4, and E alone decides how many images there are
    decentralize  the images that a maximum flow gives each task

Of these images a selection is found if there is one: a flow, or a linear program whose vertices
are integers.
"""

import argparse
import functools
import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Int
from scipy import optimize
from scipy.sparse import csgraph

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


def densify_by_entries(
    image: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    need: Int[np.ndarray, "K"],
    *,
    entries: int,
    seed: int,
) -> Int[np.ndarray, "m"]:
    """Return documents of need.sum() / entries images, `entries` of each, need[t] of each task t.

    The images are the first of the drawn order; where these have too few documents of a task,
    images that have it come first.

    Raises:
        RecordsError: the pool has too few images with as many documents, or too few documents of a
            task on them; or `entries` does not divide the need.
    """
    images, left_over = divmod(int(need.sum()), entries)
    if not need.any():
        return np.zeros(0, np.int64)
    if left_over:
        raise RecordsError(
            f"{need.sum():,} documents cannot have {entries} on each image; use a multiple, such "
            f"as {images * entries:,} or {(images + 1) * entries:,}"
        )
    available, of_place = _drawn_documents(image, task, need, seed)
    drawn = np.flatnonzero(np.minimum(available, need).sum(1) >= entries)
    if len(drawn) < images:
        raise RecordsError(
            f"{images:,} images with {entries} documents of the needed tasks are needed, but only "
            f"{len(drawn):,} have as many, for at most {len(drawn) * entries:,} documents"
        )
    scarce: list[int] = []  # tasks of which the first images have too few documents
    while True:
        first = np.argsort(-(available[drawn][:, scarce] > 0).sum(1), kind="stable")[:images]
        chosen = np.sort(drawn[first])
        left = need - _flow(available[chosen], np.full(images, entries), need).sum(0)
        if not left.any():
            return _take(of_place, chosen, _most_tasks(available[chosen], entries, need))
        missing = int(np.argmax(left))
        if missing in scarce:
            _complete([], need, left)
        scarce.append(missing)


def decentralize_by_entries(
    image: Int[np.ndarray, "n"],
    task: Int[np.ndarray, "n"],
    need: Int[np.ndarray, "K"],
    *,
    entries: int,
    seed: int,
) -> Int[np.ndarray, "m"]:
    """Return documents such that each image has `entries` of one task; need[t] of each task t.

    The last image of a task has the rest of its need.

    Raises:
        RecordsError: there are too few images with as many documents.
    """
    available, of_place = _drawn_documents(image, task, need, seed)
    images = -(-need // entries)  # of each task
    flow = _flow((available >= entries).astype(int), np.ones(len(available), int), images)
    taken, left = np.zeros_like(available), need.copy()
    for place, t in np.argwhere(flow):
        taken[place, t] = min(entries, left[t])
        left[t] -= taken[place, t]
    _complete([], need, left)
    return _take(of_place, np.arange(len(available)), taken)


def _drawn_documents(
    image: Int[np.ndarray, "n"], task: Int[np.ndarray, "n"], need: Int[np.ndarray, "K"], seed: int
) -> tuple[Int[np.ndarray, "i K"], list[dict[int, list[int]]]]:
    """Return images in a drawn order: documents of each task, their number and they themselves."""
    rng, of_image = np.random.default_rng(seed), _documents_by_image(image, task)
    of_place = [
        {t: rng.permutation(documents).tolist() for t, documents in sorted(of_image[n].items())}
        for n in rng.permutation(len(of_image))
    ]
    available = np.zeros((len(of_place), len(need)), np.int64)
    for place, tasks in enumerate(of_place):
        for t, documents in tasks.items():
            available[place, t] = len(documents)
    return available, of_place


def _flow(
    limits: Int[np.ndarray, "i K"], of_image: Int[np.ndarray, "i"], need: Int[np.ndarray, "K"]
) -> Int[np.ndarray, "i K"]:
    """Return a maximum flow from images to tasks: at most `limits`, and these sums of each side."""
    count, tasks = limits.shape
    capacity = scipy.sparse.lil_array((count + tasks + 2,) * 2, dtype=np.int32)
    capacity[-2, :count] = of_image
    capacity[:count, count:-2] = limits
    capacity[count:-2, -1] = need[:, None]
    found = csgraph.maximum_flow(capacity.tocsr(), count + tasks, count + tasks + 1).flow
    return np.maximum(found[:count, count:-2].toarray(), 0)


def _most_tasks(
    available: Int[np.ndarray, "i K"], entries: int, need: Int[np.ndarray, "K"]
) -> Int[np.ndarray, "i K"]:
    """Return the numbers of documents with the most pairs of an image and a task of it.

    The first document of a pair is a variable of its own, and the sum of these is maximized.
    """
    rows, tasks = np.nonzero(available)
    pairs, sums = np.arange(len(rows)), (sum(available.shape), len(rows))
    of_image = scipy.sparse.coo_array((np.ones(len(rows)), (rows, pairs)), shape=sums)
    of_task = scipy.sparse.coo_array(
        (np.ones(len(rows)), (len(available) + tasks, pairs)), shape=sums
    )
    both = of_image + of_task
    most = np.append(np.ones(len(rows)), available[rows, tasks] - 1)
    found = optimize.linprog(
        -np.repeat([1.0, 0.0], len(rows)),
        A_eq=scipy.sparse.hstack([both, both]),
        b_eq=np.append(np.full(len(available), entries), need),
        bounds=np.stack([np.zeros_like(most), most], axis=1),
        method="highs-ds",
    )
    taken = np.zeros_like(available)
    taken[rows, tasks] = np.rint(found.x.reshape(2, -1).sum(0))
    return taken


def _take(
    of_place: list[dict[int, list[int]]],
    places: Int[np.ndarray, "i"],
    taken: Int[np.ndarray, "i K"],
) -> Int[np.ndarray, "m"]:
    """Return the first documents of each task of each place, as many as `taken` has."""
    chosen: list[int] = []
    for row, t in np.argwhere(taken):
        chosen += of_place[places[row]][int(t)][: taken[row, t]]
    return np.sort(np.array(chosen, np.int64))


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
BY_ENTRIES = {"densify": densify_by_entries, "decentralize": decentralize_by_entries}


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
        command.add_argument(
            "--entries", type=int, metavar="E",
            help="documents of each selected image; without it, as many as the image has",
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
    select = SELECTIONS[args.selection]
    if args.entries is not None:
        if args.entries < 1:
            raise RecordsError(f"--entries is {args.entries}; it must be at least 1")
        select = functools.partial(BY_ENTRIES[args.selection], entries=args.entries)
        size |= dict(entries=args.entries)
    try:
        chosen = select(image, task, need, seed=args.seed)
    except RecordsError as error:
        tasks = ", ".join(f"{n} {name}" for n, name in enumerate(names))
        raise RecordsError(
            f"{args.folder}: {error} ({tasks}); use another --documents or --like"
            f"{', a smaller --entries' if args.entries else ''}, or a larger pool"
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
