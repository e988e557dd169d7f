"""Decide which documents an epoch holds, how often, and which may share a row.

    mixing.weights   one epoch of n documents within data.document_limit
    ""               each once, in the order of the epoch
    "A=3, B=1"       as many documents (or tokens: mixing.unit) as n of them have, 3/4 from A, 1/4
                     from B; names are sources or tasks (mixing.by)

    mixing.fraction  of the images of each source, with all their documents; 0.25 is a subset of 0.5
    mixing.leave_out "VQA, Captioning": no document of these
    mixing.pseudo    False: no document whose answer a model generated

A document over the limit is left out entirely: if it were cut, it would lose its answer or half an
image. No window of pack.py holds a document twice, so no row does.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.config import Data, Mixing
from medmax_jax.data.packing import condition_dropout, pack
from medmax_jax.data.packing.pack import Epochs, PackError, Plan
from medmax_jax.data.records.reader import Records

# Streams of shuffles; pack.py itself uses stream 0 and the indices of windows, and
# condition_dropout.py 5 << 40.
_REPEATS, _WINDOWS, _IMAGES, _FRACTION = 1 << 40, 2 << 40, 3 << 40, 4 << 40


def within_length_limit(records: Records, limit: int) -> Int[np.ndarray, "_"]:
    """Return the documents of at most `limit` tokens."""
    documents = np.flatnonzero(records.index["length"] <= limit).astype(np.int32)
    if not documents.size:
        raise PackError(
            f"{records.folder}: all {len(records)} documents exceed data.document_limit = "
            f"{limit}; the longest has {records.index['length'].max()} tokens"
        )
    return documents


def eligible_documents(records: Records, data: Data, mixing: Mixing) -> Int[np.ndarray, "_"]:
    """Return the documents that a run with these settings may draw.

    A fraction is taken of all images, before document_limit, leave_out and pseudo, so that a run
    without VQA sees the same images as the corresponding run with VQA.
    """
    documents = within_length_limit(records, data.document_limit)
    keep = np.ones(len(records), bool)
    if mixing.fraction < 1:
        keep = subsample(
            records.index["image_path"],
            records.index["source"],
            fraction=mixing.fraction,
            seed=mixing.fraction_seed,
        )
    if mixing.leave_out:
        keep &= ~np.isin(records.index[mixing.by], _excluded(records, mixing))
    if not mixing.pseudo:
        keep &= records.index["pseudo"] == 0
    eligible = documents[keep[documents]]
    if not eligible.size:
        raise PackError(
            f"{records.folder}: mixing.fraction = {mixing.fraction:g}, mixing.leave_out = "
            f"{mixing.leave_out!r} and mixing.pseudo = {mixing.pseudo} leave no document within "
            "data.document_limit; increase the fraction, exclude fewer names or draw pseudo "
            "documents"
        )
    return eligible


def subsample(
    images: Int[np.ndarray, "n"], sources: Int[np.ndarray, "n"], *, fraction: float, seed: int
) -> Bool[np.ndarray, "n"]:
    """Return True at documents of the first images of each source, in an order given by the seed.

    An image belongs to the source of its first document; -1 is a document without an image, and
    counts as an image of its own. A larger fraction of the same seed holds all of a smaller one.
    """
    unique = len(images) + np.arange(len(images))
    _, first, unit = np.unique(
        np.where(images < 0, unique, images), return_index=True, return_inverse=True
    )
    owner, kept = sources[first], np.zeros(len(first), bool)
    for source in np.unique(owner):
        units = np.flatnonzero(owner == source)
        order = units[pack.shuffle(len(units), seed, int(source), _FRACTION)]
        kept[order[: int(np.ceil(fraction * len(units)))]] = True
    return kept[unit]


def epochs(records: Records, data: Data, mixing: Mixing) -> Epochs:
    """Return the rows of all epochs."""
    documents = eligible_documents(records, data, mixing)
    seed = data.seed
    windows = functools.partial(pack.shuffled, documents, seed=seed)
    if mixing.weights:
        group, draws = _grouped(records, documents, mixing)

        def windows(epoch: int) -> list[np.ndarray]:
            times = repeat_documents(group, draws, seed=seed, epoch=epoch)
            return shuffled_windows(documents, times, seed=seed, epoch=epoch)

    elif mixing.image_centric:
        images = records.index["image_path"][documents]
        size = mixing.image_window
        windows = functools.partial(group_by_image, documents, images, size=size, seed=seed)
    streams = condition_dropout.streams_by_epoch(records, data, documents)

    def plan(epoch: int) -> Plan:
        trained = streams(epoch)
        return pack.plan(
            trained.length, seq_len=data.seq_len, pack=data.pack, seed=seed, epoch=epoch,
            windows=windows(epoch=epoch), streams=trained.stream,
        )  # fmt: skip

    return Epochs(plan)


def mixture_shares(
    records: Records, data: Data, mixing: Mixing
) -> dict[str, tuple[float, float, float]]:
    """Return, by name, its share of an epoch's documents, of its tokens, and its repeats.

    Documents count with all their tokens, whatever condition dropout leaves of them.
    """
    documents = eligible_documents(records, data, mixing)
    group, draws = _grouped(records, documents, mixing)
    count = np.bincount(group, minlength=len(draws))
    length = np.bincount(group, records.index["length"][documents], len(draws)) / np.maximum(
        count, 1
    )
    by_tokens = draws * length / (draws * length).sum()
    rows = zip(draws / draws.sum(), by_tokens, draws / np.maximum(count, 1), strict=True)
    return {
        name: tuple(map(float, row))
        for name, row in zip(records.names(mixing.by), rows, strict=True)
    }


def parse(weights: str, names: list[str]) -> list[float]:
    """Return the weight of each name; raise PackError unless exactly these names have one.

    "VQA=2, Visual Chat=0.5", ["VQA", "Visual Chat"]   ->   [2.0, 0.5]
    """
    parsed = {}
    for part in weights.split(","):
        name, _, number = part.rpartition("=")
        try:
            parsed[name.strip()] = float(number)
        except ValueError:
            parsed[part.strip()] = -1.0
    wrong = [n for n, w in parsed.items() if n not in names or not 0 <= w < float("inf")]
    wrong += [n for n in names if n not in parsed]
    if wrong or not sum(parsed.values()):
        problem = f"{wrong[0]!r} is invalid or missing" if wrong else "all weights are 0"
        raise PackError(
            f"mixing.weights is {weights!r}: {problem}; write comma-separated name=number pairs, "
            f"one for each of {', '.join(names)}; 0 excludes a name"
        )
    return [parsed[n] for n in names]


def sample_group(
    group: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"], weights: list[float], unit: str
) -> Int[np.ndarray, "_"]:
    """Return how many documents of each name (a source or a task: mixing.by) an epoch draws.

    Six documents of 10 tokens and two of 20 (100 tokens), weights 1 and 1:
        documents   4 and 4 documents
        tokens      5 and 2 documents, since 50 tokens are 2.5 documents of 20
    """
    count = np.bincount(group, minlength=len(weights))
    total = np.bincount(group, lengths, len(weights))
    share = np.where(count, weights, 0.0)
    if not share.sum():
        raise PackError(
            "mixing.weights draws no document within data.document_limit; increase the weight of a "
            "name that has some"
        )
    share = share / share.sum()
    exact = share * count.sum()
    if unit == "tokens":
        exact = share * total.sum() * count / np.maximum(total, 1)
    return np.where(share > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int64)


def repeat_documents(
    group: Int[np.ndarray, "n"], draws: Int[np.ndarray, "_"], *, seed: int, epoch: int
) -> Int[np.ndarray, "n"]:
    """Return each document's count in an epoch: floor or ceiling of draws / documents of its name.

    The extra repeats rotate over the documents, so that over any epochs the count is floor or
    ceiling too:
        one name with 5, 7 draws    epoch 0: 2 2 1 1 1    1: 1 1 2 2 1    2: 2 1 1 1 2
    up to the order of the documents, which depends on the seed.
    """
    times = np.zeros(len(group), np.int64)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        members = members[pack.shuffle(len(members), seed, 0, _REPEATS)]
        repeats, extra = divmod(int(draws[g]), len(members))
        times[members] = repeats
        times[members[(np.arange(extra) + epoch * extra) % len(members)]] += 1
    return times


def shuffled_windows(
    documents: Int[np.ndarray, "n"], times: Int[np.ndarray, "n"], *, seed: int, epoch: int
) -> list[Int[np.ndarray, "_"]]:
    """Return windows without repeated documents: copies are assigned to windows in turn."""
    order = pack.shuffle(len(documents), seed, epoch, 0)
    drawn = np.repeat(documents[order], times[order])
    count = max(-(-len(drawn) // pack.WINDOW), int(times.max()))
    offsets = pack.shuffle(count, seed, epoch, _WINDOWS)  # else copies would be in adjacent windows
    return [drawn[offset::count] for offset in offsets]


def group_by_image(
    documents: Int[np.ndarray, "n"],
    images: Int[np.ndarray, "n"],
    *,
    size: int,
    seed: int,
    epoch: int,
) -> list[Int[np.ndarray, "_"]]:
    """Return windows that hold all documents of their images; -1 is a document without one.

    A window has about `size` documents; its first image begins at a multiple of `size`, or is the
    first after one.

    This is an interpretation of image-centric training (IMAX, arXiv 2504.09967), not a
    reproduction: the paper's order of training is not published.
    """
    unique = len(documents) + np.arange(len(documents))  # above any image number that occurs
    _, number = np.unique(images, return_inverse=True)
    _, number = np.unique(np.where(images < 0, unique, number), return_inverse=True)
    rank = pack.shuffle(number.max() + 1, seed, epoch, _IMAGES)[number]
    order = pack.shuffle(len(documents), seed, epoch, 0)
    order = order[np.argsort(rank[order], kind="stable")]
    count = np.bincount(rank)
    window = ((np.cumsum(count) - count) // size)[rank[order]]  # of an image's first document
    return np.split(documents[order], np.flatnonzero(np.diff(window)) + 1)


def _grouped(records: Records, documents: np.ndarray, mixing: Mixing) -> tuple:
    """Return (index of each document's name, draws of each name)."""
    group, names = records.index[mixing.by][documents], records.names(mixing.by)
    if not mixing.weights:
        return group, np.bincount(group, minlength=len(names))
    lengths, weights = records.index["length"][documents], parse(mixing.weights, names)
    return group, sample_group(group, lengths, weights, mixing.unit)


def _excluded(records: Records, mixing: Mixing) -> list[int]:
    """Return the numbers of the names in mixing.leave_out."""
    names, excluded = records.names(mixing.by), [n.strip() for n in mixing.leave_out.split(",")]
    if unknown := [n for n in excluded if n not in names]:
        raise PackError(
            f"mixing.leave_out is {mixing.leave_out!r}: {records.folder} has no {mixing.by} "
            f"{unknown[0]!r}; use names from {', '.join(names)}"
        )
    return [names.index(n) for n in excluded]
