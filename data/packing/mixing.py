"""Decide which documents an epoch holds, how often, and which may share a row.

    mixing.weights   one epoch of n documents within data.document_limit
    ""               each once, in the order of the epoch
    "A=3, B=1"       as many documents (or tokens: mixing.unit) as n of them have, 3/4 from A, 1/4
                     from B; names are sources or tasks (mixing.by)

    mixing.fraction  of the images of each source, with all their documents; 0.25 is a subset of 0.5
    mixing.leave_out "VQA, Captioning": no document of these

A document over the limit is left out entirely: if it were cut, it would lose its answer or half an
image. No window of pack.py holds a document twice, so no row does.
"""

import functools

import numpy as np
from jaxtyping import Bool, Int

from medmax_jax.config import Data, Mixing
from medmax_jax.data.packing import pack
from medmax_jax.data.packing.pack import Epochs, PackError
from medmax_jax.data.records.reader import Records

IMAGE_WINDOW = 256  # documents, two steps of 8 rows of 16,384: larger windows pack better
# Streams of shuffles; pack.py itself uses stream 0 and the indices of windows.
_TURNS, _PLACES, _PICTURES, _FRACTION = 1 << 40, 2 << 40, 3 << 40, 4 << 40


def within_length_limit(found: Records, limit: int) -> Int[np.ndarray, "_"]:
    """Return the documents of at most `limit` tokens."""
    fitting = np.flatnonzero(found.index["length"] <= limit).astype(np.int32)
    if not fitting.size:
        raise PackError(
            f"{found.folder}: all {len(found)} documents are longer than data.document_limit = "
            f"{limit}; the longest has {found.index['length'].max()} tokens"
        )
    return fitting


def eligible_documents(found: Records, data: Data, mixing: Mixing) -> Int[np.ndarray, "_"]:
    """Return the documents that a run with these settings may draw.

    A fraction is taken of all images, before document_limit and leave_out, so that a run without
    VQA sees the same images as the corresponding run with VQA.
    """
    documents = within_length_limit(found, data.document_limit)
    keep = np.ones(len(found), bool)
    if mixing.fraction < 1:
        keep = subsample(
            found.index["picture"],
            found.index["source"],
            fraction=mixing.fraction,
            seed=mixing.fraction_seed,
        )
    if mixing.leave_out:
        keep &= ~np.isin(found.index[mixing.by], _numbers(found, mixing))
    left = documents[keep[documents]]
    if not left.size:
        raise PackError(
            f"{found.folder}: mixing.fraction = {mixing.fraction:g} without "
            f"{mixing.leave_out or 'anything left out'} holds no document within "
            "data.document_limit; raise the fraction or leave out less"
        )
    return left


def subsample(
    pictures: Int[np.ndarray, "n"], sources: Int[np.ndarray, "n"], *, fraction: float, seed: int
) -> Bool[np.ndarray, "n"]:
    """Return True at documents of the first images of each source, in an order given by the seed.

    An image belongs to the source of its first document; -1 is a document without an image, and
    counts as an image of its own. A larger fraction of the same seed holds all of a smaller one.
    """
    alone = len(pictures) + np.arange(len(pictures))
    _, first, unit = np.unique(
        np.where(pictures < 0, alone, pictures), return_index=True, return_inverse=True
    )
    owner, kept = sources[first], np.zeros(len(first), bool)
    for source in np.unique(owner):
        units = np.flatnonzero(owner == source)
        order = units[pack.shuffle(len(units), seed, int(source), _FRACTION)]
        kept[order[: int(np.ceil(fraction * len(units)))]] = True
    return kept[unit]


def epochs(found: Records, data: Data, mixing: Mixing) -> Epochs:
    """Return the rows of all epochs."""
    documents = eligible_documents(found, data, mixing)
    seed = data.seed
    windows = functools.partial(pack.shuffled, documents, seed=seed)
    if mixing.weights:
        group, draws = _grouped(found, documents, mixing)

        def windows(epoch: int) -> list[np.ndarray]:
            times = repeat_documents(group, draws, seed=seed, epoch=epoch)
            return shuffled_windows(documents, times, seed=seed, epoch=epoch)

    elif mixing.image_centric:
        pictures = found.index["picture"][documents]
        windows = functools.partial(group_by_image, documents, pictures, seed=seed)
    at = dict(seq_len=data.seq_len, pack=data.pack, seed=seed)
    return Epochs(found.index["length"], **at, windows=lambda epoch: windows(epoch=epoch))


def mixture_shares(
    found: Records, data: Data, mixing: Mixing
) -> dict[str, tuple[float, float, float]]:
    """Return, by name, its share of an epoch's documents, of its tokens, and its repeats."""
    documents = eligible_documents(found, data, mixing)
    group, draws = _grouped(found, documents, mixing)
    count = np.bincount(group, minlength=len(draws))
    length = np.bincount(group, found.index["length"][documents], len(draws)) / np.maximum(count, 1)
    by_tokens = draws * length / (draws * length).sum()
    rows = zip(draws / draws.sum(), by_tokens, draws / np.maximum(count, 1), strict=True)
    return {
        name: tuple(map(float, row)) for name, row in zip(found.names(mixing.by), rows, strict=True)
    }


def parse(weights: str, names: list[str]) -> list[float]:
    """Return the weight of each name; raise PackError unless exactly these names have one.

    "VQA=2, Visual Chat=0.5", ["VQA", "Visual Chat"]   ->   [2.0, 0.5]
    """
    found = {}
    for part in weights.split(","):
        name, _, number = part.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found[part.strip()] = -1.0
    wrong = [n for n, w in found.items() if n not in names or not 0 <= w < float("inf")]
    wrong += [n for n in names if n not in found]
    if wrong or not sum(found.values()):
        about = f"{wrong[0]!r} is wrong there or missing" if wrong else "all are 0"
        raise PackError(
            f"mixing.weights is {weights!r}: {about}; write name=number, with commas between, for "
            f"each of {', '.join(names)}; 0 leaves a name out"
        )
    return [found[n] for n in names]


def sample_group(
    group: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"], weights: list[float], unit: str
) -> Int[np.ndarray, "_"]:
    """Return how many documents of each group an epoch draws.

    Six documents of 10 tokens and two of 20 (100 tokens), weights 1 and 1:
        documents   4 and 4 documents
        tokens      5 and 2 documents, since 50 tokens are 2.5 documents of 20
    """
    count = np.bincount(group, minlength=len(weights))
    total = np.bincount(group, lengths, len(weights))
    share = np.where(count, weights, 0.0)
    if not share.sum():
        raise PackError("mixing.weights draws no document within data.document_limit")
    share = share / share.sum()
    exact = share * count.sum()
    if unit == "tokens":
        exact = share * total.sum() * count / np.maximum(total, 1)
    return np.where(share > 0, np.maximum(np.rint(exact), 1), 0).astype(np.int64)


def repeat_documents(
    group: Int[np.ndarray, "n"], draws: Int[np.ndarray, "_"], *, seed: int, epoch: int
) -> Int[np.ndarray, "n"]:
    """Return each document's count in an epoch: floor or ceiling of its group's draws / size.

    The extra repeats rotate over the documents, so that over any epochs the count is floor or
    ceiling too:
        one group of 5, 7 draws     epoch 0: 2 2 1 1 1    1: 1 1 2 2 1    2: 2 1 1 1 2
    up to the order of the group, which depends on the seed.
    """
    times = np.zeros(len(group), np.int64)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        members = members[pack.shuffle(len(members), seed, 0, _TURNS)]
        whole, more = divmod(int(draws[g]), len(members))
        times[members] = whole
        times[members[(np.arange(more) + epoch * more) % len(members)]] += 1
    return times


def shuffled_windows(
    documents: Int[np.ndarray, "n"], times: Int[np.ndarray, "n"], *, seed: int, epoch: int
) -> list[Int[np.ndarray, "_"]]:
    """Return windows without repeated documents: copies are assigned to windows in turn."""
    order = pack.shuffle(len(documents), seed, epoch, 0)
    drawn = np.repeat(documents[order], times[order])
    count = max(-(-len(drawn) // pack.WINDOW), int(times.max()))
    places = pack.shuffle(count, seed, epoch, _PLACES)  # else copies would be in adjacent windows
    return [drawn[place::count] for place in places]


def group_by_image(
    documents: Int[np.ndarray, "n"], pictures: Int[np.ndarray, "n"], *, seed: int, epoch: int
) -> list[Int[np.ndarray, "_"]]:
    """Return windows that hold all documents of their images; -1 is a document without one.

    This is an interpretation of image-centric training (IMAX, arXiv 2504.09967), not a
    reproduction: the paper's order of training is not published.
    """
    alone = len(documents) + np.arange(len(documents))  # more than any image number that occurs
    _, number = np.unique(pictures, return_inverse=True)
    _, number = np.unique(np.where(pictures < 0, alone, number), return_inverse=True)
    place = pack.shuffle(number.max() + 1, seed, epoch, _PICTURES)[number]
    order = pack.shuffle(len(documents), seed, epoch, 0)
    order = order[np.argsort(place[order], kind="stable")]
    size = np.bincount(place)
    window = ((np.cumsum(size) - size) // IMAGE_WINDOW)[place[order]]  # where an image begins
    return np.split(documents[order], np.flatnonzero(np.diff(window)) + 1)


def _grouped(found: Records, documents: np.ndarray, mixing: Mixing) -> tuple:
    """Return (group of each document, draws of each group)."""
    group, names = found.index[mixing.by][documents], found.names(mixing.by)
    if not mixing.weights:
        return group, np.bincount(group, minlength=len(names))
    lengths, weights = found.index["length"][documents], parse(mixing.weights, names)
    return group, sample_group(group, lengths, weights, mixing.unit)


def _numbers(found: Records, mixing: Mixing) -> list[int]:
    names, wanted = found.names(mixing.by), [n.strip() for n in mixing.leave_out.split(",")]
    if unknown := [n for n in wanted if n not in names]:
        raise PackError(
            f"mixing.leave_out is {mixing.leave_out!r}: {found.folder} has no {mixing.by} "
            f"{unknown[0]!r}; it has {', '.join(names)}"
        )
    return [names.index(n) for n in wanted]
