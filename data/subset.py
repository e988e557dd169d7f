"""Which documents a run may draw at all: a fraction by picture, and names left out.

    mixing.fraction   of the pictures of each source, with all their documents: 0.25 holds a quarter
                      of PathVQA's pictures and a quarter of SLAKE's, and lies within 0.5
    mixing.leave_out  "VQA, Captioning": no document of these tasks (or sources: mixing.by)

A fraction is taken of all pictures, before document_limit and leave_out, so that a run without VQA
sees the pictures that its neighbour with VQA sees.
"""

import numpy as np
from jaxtyping import Bool, Int

from data import pack
from data.pack import PackError
from data.reader import Records
from medmax_jax.config import Mixing

_STREAM = 4 << 40  # of shuffles; mixing.py has those below


def chosen(found: Records, documents: Int[np.ndarray, "n"], mixing: Mixing) -> Int[np.ndarray, "_"]:
    """Those of `documents` that a run with these settings may draw."""
    keep = np.ones(len(found), bool)
    if mixing.fraction < 1:
        keep = within(
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


def within(
    pictures: Int[np.ndarray, "n"], sources: Int[np.ndarray, "n"], *, fraction: float, seed: int
) -> Bool[np.ndarray, "n"]:
    """True at documents of the first pictures of each source, in an order that is the seed's.

    A picture belongs to the source of its first document; -1 is a document without a picture, and
    counts as a picture of its own. A larger fraction of the same seed holds all of a smaller one.
    """
    alone = len(pictures) + np.arange(len(pictures))
    _, first, unit = np.unique(
        np.where(pictures < 0, alone, pictures), return_index=True, return_inverse=True
    )
    owner, kept = sources[first], np.zeros(len(first), bool)
    for source in np.unique(owner):
        units = np.flatnonzero(owner == source)
        order = units[pack.shuffle(len(units), seed, int(source), _STREAM)]
        kept[order[: int(np.ceil(fraction * len(units)))]] = True
    return kept[unit]


def _numbers(found: Records, mixing: Mixing) -> list[int]:
    names, wanted = found.names(mixing.by), [n.strip() for n in mixing.leave_out.split(",")]
    if unknown := [n for n in wanted if n not in names]:
        raise PackError(
            f"mixing.leave_out is {mixing.leave_out!r}: {found.folder} has no {mixing.by} "
            f"{unknown[0]!r}; it has {', '.join(names)}"
        )
    return [names.index(n) for n in wanted]
