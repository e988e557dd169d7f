"""Intervals that know what they stand on: questions about one patient or volume are one cluster.

    scores    1 0 1 | 1 1 | 0 0 0 1        three groups, nine questions
    resample  draw three groups with replacement, mean of all questions drawn; 2,000 times or more
    interval  2.5 % and 97.5 % of those means

A paired difference resamples the same groups on both sides, so what is hard for both cancels.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

MIN_RESAMPLES = 2_000  # below this the ends of a 95 % interval are themselves noisy


@dataclasses.dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    n: int
    groups: int


def mean_interval(
    values: Sequence[float], groups: Sequence[Hashable], *, seed: int, resamples: int
) -> Interval:
    """Mean of `values` with the 95 % percentile interval of a bootstrap over groups."""
    values = np.asarray(values, np.float64)
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values but {len(groups)} groups: one group a value")
    if not len(values):
        raise ValueError("no values: nothing was scored, so there is no interval")
    if resamples < MIN_RESAMPLES:
        raise ValueError(f"resamples is {resamples}; it must be at least {MIN_RESAMPLES}")
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    means = _resampled_means(
        np.bincount(member, values), np.bincount(member).astype(np.float64), seed, resamples
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values), len(index))


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable],
    *,
    seed: int,
    resamples: int,
) -> Interval:
    """Mean of after - before, item by item, with its 95 % interval over groups."""
    if len(before) != len(after):
        raise ValueError(
            f"{len(before)} scores before but {len(after)} after: a paired difference needs the "
            "same items"
        )
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return mean_interval(difference, groups, seed=seed, resamples=resamples)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent trials: 8 of 10 -> (0.490, 0.943)."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: must be 0 <= successes <= n and n > 0")
    z = 1.959963984540054  # the normal's 97.5 % point
    share, z2 = successes / n, z * z / n
    middle = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _resampled_means(
    sums: Float[np.ndarray, "g"], counts: Float[np.ndarray, "g"], seed: int, resamples: int
) -> Float[np.ndarray, "r"]:
    """Means of `resamples` draws of whole groups; a group drawn twice counts twice."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(resamples, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)
