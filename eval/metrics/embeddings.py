"""Scores embeddings: unit rows [n, E] of images and texts in one space.

| score     | of                        | is                                                      |
|-----------|---------------------------|---------------------------------------------------------|
| cosine    | image-text, image-image,  | the dot product: BiomedCLIPScore, if the embeddings are |
|           | text-text                 | BiomedCLIP's                                            |
| combined  | image, text, references   | harmonic mean of image-text and the best reference      |
| ranks     | n queries, n targets      | rank of the own target among all; ties share the mean   |
| kid       | two sets of images        | unbiased MMD^2 with the kernel (gamma x.y + 1)^3, as it |
|           |                           | is published: mean and std of subsets                   |
| images    | images of each answer     | first, best, coverage, a fixed score for none           |

The MedMax release takes the raw cosine (no x 100, no factor 2.5, no clamp at 0), of the first image
of an answer, over the answers that have one; a model that draws once and well wins. For captions it
compares the text with the image and never reads the reference. `per_answer_similarity` has both
averages. KID and diversity with intervals over groups: eval/metrics/image_sets.py.

Everything is float64 NumPy and a function of its arguments: seeds and sizes have no defaults.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

RANK_BLOCK = 1024  # queries whose similarities are in memory at a time
TIE = 1e-6  # cosines: the same text, embedded in another batch, is about 1e-7 away
DEGREE, SHIFT = 3, 1.0  # of KID's kernel (Binkowski et al. 2018)
UNIT_ERROR = 1e-3  # rows further from length 1 are not embeddings


def cosine(a: Float[np.ndarray, "n E"], b: Float[np.ndarray, "n E"]) -> Float64[np.ndarray, "n"]:
    """Return the cosine of each pair of rows, in -1..1."""
    a, b = normalize_rows(a, "a"), normalize_rows(b, "b")
    if a.shape != b.shape:
        raise ValueError(
            f"embeddings have shapes {a.shape} and {b.shape}; pass one row of b per row of a"
        )
    return (a * b).sum(1)


def combined_clip_score(
    image: Float[np.ndarray, "n E"],
    text: Float[np.ndarray, "n E"],
    references: Sequence[Float[np.ndarray, "_ E"]],
) -> Float64[np.ndarray, "n"]:
    """Return the harmonic mean of the clamped image-text and best reference-text cosines.

    RefCLIPScore's form without its factor 2.5: 0.3 and 0.6 -> 0.4; a negative cosine is 0.
    `references`: the reference captions of each row, at least one.
    """
    if len(references) != len(text) or not all(len(rows) for rows in references):
        raise ValueError(
            f"{len(text)} texts but references for {len(references)}; pass one or more references "
            "per text"
        )
    image_cosines = cosine(image, text).clip(0)
    text = normalize_rows(text, "text")
    pairs = zip(references, text, strict=True)
    best = [(normalize_rows(rows, "references") @ row).max() for rows, row in pairs]
    text_cosines = np.array(best).clip(0)
    total = image_cosines + text_cosines
    zeros = np.zeros(len(total))
    return np.divide(2 * image_cosines * text_cosines, total, out=zeros, where=total > 0)


def retrieval_ranks(
    queries: Float[np.ndarray, "n E"], targets: Float[np.ndarray, "n E"]
) -> Float64[np.ndarray, "n"]:
    """Return the rank of target i among all targets for query i: 1 is best, n the last.

    Targets with the same similarity as the own one share the mean of their ranks, so the same text
    for every image ranks at (n + 1) / 2, which is chance, whatever its content.
    """
    queries, targets = normalize_rows(queries, "queries"), normalize_rows(targets, "targets")
    if queries.shape != targets.shape:
        raise ValueError(
            f"queries have shape {queries.shape} and targets {targets.shape}; pass one target per "
            "query"
        )
    ranks = np.zeros(len(queries))
    for start in range(0, len(queries), RANK_BLOCK):
        part = slice(start, start + RANK_BLOCK)
        near = queries[part] @ targets.T
        own = near[np.arange(len(near)), np.arange(start, start + len(near))][:, None]
        same = np.abs(near - own) <= TIE
        above = ((near > own) & ~same).sum(1)
        ranks[part] = 1 + above + (same.sum(1) - 1) / 2
    return ranks


@dataclasses.dataclass(frozen=True)
class Retrieval:
    n: int
    median_rank: float
    recall: dict[int, float]  # k -> share of queries whose own target is among the first k
    mean_reciprocal_rank: float
    chance_median: float
    chance_recall: dict[int, float]


def retrieval(ranks: Float[np.ndarray, "n"], *, at: Sequence[int]) -> Retrieval:
    """Return a summary of ranks and its chance level. `at`: the k of recall at k."""
    n = len(ranks)
    if not n or min(at) < 1:
        raise ValueError(
            f"{n} ranks and recall at {list(at)}; required are at least one rank and k of at least "
            "1"
        )
    return Retrieval(
        n=n,
        median_rank=float(np.median(ranks)),
        recall={k: float((ranks <= k).mean()) for k in at},
        mean_reciprocal_rank=float((1 / ranks).mean()),
        chance_median=(n + 1) / 2,
        chance_recall={k: min(k / n, 1.0) for k in at},
    )


def mmd2(x: Float[np.ndarray, "m E"], y: Float[np.ndarray, "n E"], *, gamma: float) -> float:
    """Return the unbiased squared maximum mean discrepancy.

    It may be below 0, and is 0 on average for equal sources.
    [[0], [1]] and [[2], [3]] at gamma 1: 1 + 343 - 2 * 93 / 4 = 297.5.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"features have shapes {x.shape} and {y.shape}; required are two or more rows each, of "
            "one width"
        )
    x, y = x.astype(np.float64), y.astype(np.float64)
    return _other_pairs(x, gamma) + _other_pairs(y, gamma) - 2 * float(kernel(x, y, gamma).mean())


@dataclasses.dataclass(frozen=True)
class Kid:
    mean: float
    std: float  # over the subsets: not an error of the mean, since they share rows
    subsets: int
    size: int


def kid(
    real: Float[np.ndarray, "m E"],
    generated: Float[np.ndarray, "n E"],
    *,
    gamma: float,
    subsets: int,
    size: int,
    seed: int,
) -> Kid:
    """Return MMD^2 over `subsets` draws of `size` rows of each side without replacement.

    `gamma`: 1 for unit rows; 1 / E for raw features, whose entries are about 1. Published values
    have 100 subsets of 1,000 on raw Inception features, and are not comparable with other features.
    """
    if not 2 <= size <= min(len(real), len(generated)) or subsets < 1:
        raise ValueError(
            f"subsets is {subsets} and size is {size}, of {len(real)} and {len(generated)} rows; "
            f"size must be in 2..{min(len(real), len(generated))} and subsets at least 1"
        )
    rng = np.random.default_rng(seed)
    values = [
        mmd2(
            real[rng.choice(len(real), size, replace=False)],
            generated[rng.choice(len(generated), size, replace=False)],
            gamma=gamma,
        )
        for _ in range(subsets)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)), subsets, size)


@dataclasses.dataclass(frozen=True)
class ImageSimilarity:
    """Holds similarities of the images of each answer to the requested content."""

    coverage: float  # share of answers with an image
    released: float | None  # mean of first images over answers that have one; None: no answer has
    with_missing: float  # mean of first images, `missing_score` where there is none
    best_of_all: float  # mean of each answer's best image, `missing_score` where there is none


def per_answer_similarity(
    similarities: Sequence[Sequence[float]], *, missing_score: float
) -> ImageSimilarity:
    """Summarize the similarities of every image of every answer, in their order, [] for none.

    `missing_score`: of an answer without an image, such as the similarity of a blank one.
    [[0.8, 0.9], []] at 0.1: coverage 0.5, released 0.8, with_missing 0.45, best_of_all 0.5.
    """
    if not similarities:
        raise ValueError("similarities is empty: there are no answers to score")
    first = [values[0] for values in similarities if len(values)]
    n = len(similarities)
    missing = missing_score * (n - len(first))
    return ImageSimilarity(
        coverage=len(first) / n,
        released=sum(first) / len(first) if first else None,
        with_missing=(sum(first) + missing) / n,
        best_of_all=(sum(max(values) for values in similarities if len(values)) + missing) / n,
    )


def _other_pairs(x: Float64[np.ndarray, "m E"], gamma: float) -> float:
    """Return the mean of the kernel over pairs of two different rows."""
    k = kernel(x, x, gamma)
    return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))


def kernel(
    x: Float64[np.ndarray, "m E"], y: Float64[np.ndarray, "n E"], gamma: float
) -> Float64[np.ndarray, "m n"]:
    """Return KID's kernel of every row of x with every row of y."""
    return (gamma * (x @ y.T) + SHIFT) ** DEGREE


def normalize_rows(x: Float[np.ndarray, "n E"], name: str) -> Float64[np.ndarray, "n E"]:
    """Return the rows in float64 with length exactly 1; raise for rows of another length."""
    x = np.asarray(x, np.float64)
    if not x.size:
        return x
    lengths = np.linalg.norm(x, axis=-1)
    if x.ndim != 2 or not (np.abs(lengths - 1) < UNIT_ERROR).all():
        raise ValueError(
            f"{name} has shape {x.shape} and rows of length {lengths.min():.3g} to "
            f"{lengths.max():.3g}; pass unit rows, as Embedder computes them"
        )
    return x / lengths[:, None]
