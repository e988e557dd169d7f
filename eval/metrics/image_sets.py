"""Scores complete image sets with intervals over groups: KID's MMD^2, and diversity.

    distance   mean k(real, real') + mean k(generated, generated') - 2 mean k(real, generated)
    diversity  mean of 1 - cosine(generated, generated')
               each mean is over pairs of two different groups

Two images of one patient are more alike than two images of the source, and an image is more like
its own reference than like another. Over independent groups these pairs carry no information about
the sources and bias the sums, so they are left out of all three; where every image is a group and
no two rows belong together this is the unbiased MMD^2.

    resample   groups with replacement: a pair (g, h) counts times_g * times_h
               pairs within a group, so those of an image with its own copy, stay left out

A copy kept as another image would add k(x, x) to the inner sums and none to the outer one, and lift
every resample above the value. Between equal sources the truth is in the interval more often than
95 %: there MMD^2 varies less than its resamples do (a degenerate U-statistic). That errs towards
"inconclusive". The ends of an interval are intervals.from_draws of the resamples.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int

from medmax_jax.eval.metrics.embeddings import kernel, normalize_rows
from medmax_jax.eval.stats import intervals

BLOCKS = 1_000  # more groups are merged at random: an interval in bounded memory remains valid
ROWS = 1_024  # rows whose kernel is in memory at a time
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def kid(
    real: Float[np.ndarray, "m E"],
    generated: Float[np.ndarray, "n E"],
    *,
    real_groups: Sequence[Hashable],
    generated_groups: Sequence[Hashable],
    gamma: float,
    resampling: intervals.Resampling,
) -> intervals.Interval:
    """Return MMD^2 of KID's kernel between two sets; it may be below 0. `n`: generated images.

    Groups of both sides share names and are drawn together. `gamma`: as for
    eval/metrics/embeddings.py:kid.
    """
    real, generated = _rows(real, real_groups), _rows(generated, generated_groups)
    row_blocks, count, counts = _draw_blocks([*real_groups, *generated_groups], resampling)
    sides = (real, row_blocks[: len(real)]), (generated, row_blocks[len(real) :])
    means = [
        _means(first, second, lambda x, y: kernel(x, y, gamma), counts)
        for first, second in ((sides[0], sides[0]), (sides[1], sides[1]), sides)
    ]
    return _interval(means[0] + means[1] - 2 * means[2], len(generated), count, span=None)


def diversity(
    embeddings: Float[np.ndarray, "n E"],
    *,
    groups: Sequence[Hashable],
    resampling: intervals.Resampling,
) -> intervals.Interval:
    """Return the diversity: 0 when all images are equal, 1 when all are orthogonal."""
    x = normalize_rows(_rows(embeddings, groups), "embeddings")
    row_blocks, count, counts = _draw_blocks(groups, resampling)
    means = _means((x, row_blocks), (x, row_blocks), lambda a, b: 1 - a @ b.T, counts)
    return _interval(means, len(x), count, span=(0.0, 2.0))


def _rows(x: Float[np.ndarray, "n E"], groups: Sequence[Hashable]) -> Float64[np.ndarray, "n E"]:
    if len(x) != len(groups):
        raise ValueError(f"{len(x)} rows but {len(groups)} groups; pass one group per row")
    return np.asarray(x, np.float64)


def _draw_blocks(
    groups: Sequence[Hashable], resampling: intervals.Resampling
) -> tuple[Int[np.ndarray, "n"], int, Float64[np.ndarray, "r g"]]:
    """Return the block of each row, the number of blocks, and the counts of each block per draw.

    The first draw has every block once.
    """
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    rng = np.random.default_rng(resampling.seed)
    blocks = min(len(index), BLOCKS)
    block = rng.permutation(len(index)) % max(blocks, 1)
    if blocks < 2:
        raise ValueError(f"{len(index)} groups; pairs are of two groups and require 2 or more")
    counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=resampling.resamples)
    all_blocks = np.ones((1, blocks))
    return block[[index[name] for name in groups]], len(index), np.concatenate([all_blocks, counts])


def _means(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    of: Kernel,
    counts: Float64[np.ndarray, "r g"],
) -> Float64[np.ndarray, "r"]:
    """Return the mean over pairs of two blocks, in each draw; NaN where a draw has no such pair.

    A side is (rows, their blocks).
    """
    (x, at), (y, to), blocks = first, second, counts.shape[1]
    n, m = (np.bincount(row_blocks, minlength=blocks).astype(np.float64) for row_blocks in (at, to))
    sums = _sums(x, y, at, to, of, blocks)
    np.fill_diagonal(sums, 0.0)
    pairs = (counts @ n) * (counts @ m) - counts**2 @ (n * m)
    sums_of_draws = ((counts @ sums) * counts).sum(1)
    return np.divide(sums_of_draws, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def _sums(x, y, at, to, of: Kernel, blocks: int) -> Float64[np.ndarray, "g g"]:
    """Return the kernel summed over the rows of every two blocks."""
    order = np.argsort(to, kind="stable")
    present, starts = np.unique(to[order], return_index=True)
    total = np.zeros((blocks, blocks))
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        columns = np.add.reduceat(of(x[part], y[order]), starts, axis=1)
        added = np.zeros((blocks, len(present)))
        np.add.at(added, at[part], columns)
        total[:, present] += added
    return total


def _interval(
    values: Float64[np.ndarray, "r"], n: int, groups: int, *, span: intervals.Span | None
) -> intervals.Interval:
    """Return the interval of a value and its draws; draws without a pair are left out."""
    value, draws = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(value) or not len(draws):
        raise ValueError(f"{groups} groups, but one side has rows of fewer than 2 of them")
    blocks = min(groups, BLOCKS)
    weights = np.full(blocks, 1 / blocks)
    interval = intervals.from_draws(float(value), draws, weights, n=n, span=span)
    return dataclasses.replace(interval, groups=groups)
