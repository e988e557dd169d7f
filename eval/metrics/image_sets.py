"""Whole sets of pictures with intervals over groups: KID's MMD^2, and diversity.

    distance   mean k(real, real') + mean k(made, made') - 2 mean k(real, made)
    diversity  mean of 1 - cosine(made, made')
               each mean is over pairs of two different groups

Two pictures of one patient are more alike than two of the source, and a picture is more like the
reference that it was asked after than like another. Over independent groups these pairs say nothing
of the sources and bias the sums, so they are left out of all three; where every picture is a group
and no two rows belong together this is the unbiased MMD^2.

    resample   groups with replacement: a pair (g, h) counts times_g * times_h
               pairs within a group, so those of a picture with its own copy, stay left out

A copy kept as another picture would add k(x, x) to the inner sums and none to the outer one, and
lift every resample above the value. Between equal sources the truth lies in the interval more often
than 95 %: there MMD^2 varies less than its resamples do (a degenerate U-statistic). That errs
towards "cannot say". The ends of an interval are stats.from_draws of the resamples.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Float64, Int

from medmax_jax.eval.metrics.embeddings import kernel, normalize_rows
from medmax_jax.eval.stats import intervals

BLOCKS = 1_000  # more groups are put together at random: an interval in bounded memory still holds
ROWS = 1_024  # rows whose kernel is in memory at a time
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def kid(
    real: Float[np.ndarray, "m E"],
    made: Float[np.ndarray, "n E"],
    *,
    real_groups: Sequence[Hashable],
    made_groups: Sequence[Hashable],
    gamma: float,
    seed: int,
    resamples: int,
) -> intervals.Interval:
    """MMD^2 of KID's kernel between two sets; may be below 0. `n`: pictures made.

    Groups of both sides have names in common and are drawn together. `gamma`: as for
    score_picture.kid.
    """
    real, made = _rows(real, real_groups), _rows(made, made_groups)
    places, count, times = _drawn([*real_groups, *made_groups], seed, resamples)
    sides = (real, places[: len(real)]), (made, places[len(real) :])
    means = [
        _means(one, two, lambda x, y: kernel(x, y, gamma), times)
        for one, two in ((sides[0], sides[0]), (sides[1], sides[1]), sides)
    ]
    return _interval(means[0] + means[1] - 2 * means[2], len(made), count, span=None)


def diversity(
    embeddings: Float[np.ndarray, "n E"],
    *,
    groups: Sequence[Hashable],
    seed: int,
    resamples: int,
) -> intervals.Interval:
    """0 when all are one picture, 1 when all are orthogonal."""
    x = normalize_rows(_rows(embeddings, groups), "embeddings")
    places, count, times = _drawn(groups, seed, resamples)
    found = _means((x, places), (x, places), lambda a, b: 1 - a @ b.T, times)
    return _interval(found, len(x), count, span=(0.0, 2.0))


def _rows(x: Float[np.ndarray, "n E"], groups: Sequence[Hashable]) -> Float64[np.ndarray, "n E"]:
    if len(x) != len(groups):
        raise ValueError(f"{len(x)} rows but {len(groups)} groups: one group a row")
    return np.asarray(x, np.float64)


def _drawn(
    groups: Sequence[Hashable], seed: int, resamples: int
) -> tuple[Int[np.ndarray, "n"], int, Float64[np.ndarray, "r g"]]:
    """The block of each row, how many groups, and how often each draw has a block: first, once."""
    intervals.check_resamples(resamples)
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    rng = np.random.default_rng(seed)
    blocks = min(len(index), BLOCKS)
    block = rng.permutation(len(index)) % max(blocks, 1)
    if blocks < 2:
        raise ValueError(f"{len(index)} groups; pairs are of two groups and need 2 or more")
    times = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    whole = np.ones((1, blocks))
    return block[[index[name] for name in groups]], len(index), np.concatenate([whole, times])


def _means(
    one: tuple[np.ndarray, np.ndarray],
    two: tuple[np.ndarray, np.ndarray],
    of: Kernel,
    times: Float64[np.ndarray, "r g"],
) -> Float64[np.ndarray, "r"]:
    """Mean over pairs of two blocks, in each draw; NaN where a draw has no such pair.

    A side is (rows, their blocks).
    """
    (x, at), (y, to), blocks = one, two, times.shape[1]
    n, m = (np.bincount(places, minlength=blocks).astype(np.float64) for places in (at, to))
    sums = _sums(x, y, at, to, of, blocks)
    np.fill_diagonal(sums, 0.0)
    pairs = (times @ n) * (times @ m) - times**2 @ (n * m)
    found = ((times @ sums) * times).sum(1)
    return np.divide(found, pairs, out=np.full(len(times), np.nan), where=pairs > 0)


def _sums(x, y, at, to, of: Kernel, blocks: int) -> Float64[np.ndarray, "g g"]:
    """The kernel summed over the rows of every two blocks."""
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
    found: Float64[np.ndarray, "r"], n: int, groups: int, *, span: intervals.Span | None
) -> intervals.Interval:
    """Of the value and its draws; those without a pair of some kind go without one."""
    value, draws = found[0], found[1:][np.isfinite(found[1:])]
    if not np.isfinite(value) or not len(draws):
        raise ValueError(f"{groups} groups: a side has rows of fewer than 2 of them")
    blocks = min(groups, BLOCKS)
    weights = np.full(blocks, 1 / blocks)
    interval = intervals.from_draws(float(value), draws, weights, n=n, span=span)
    return dataclasses.replace(interval, groups=groups)
