"""Intervals that know what they stand on: questions about one patient or volume are one cluster.

    scores    1 0 1 | 1 1 | 0 0 0 1        three groups, nine questions
    resample  draw three groups with replacement, mean of all questions drawn; 2,000 times or more
    interval  2.5 % and 97.5 % of those means

A paired difference resamples the same groups on both sides, so what is hard for both cancels.
A judge's votes enter as their mean: what would change if it were asked again is in the interval.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

MIN_RESAMPLES = 2_000  # below this the ends of a 95 % interval are themselves noisy
_DRAWN = 1 << 18  # groups drawn at a time; all of them at once would be 2,000 numbers a group
DETECT = 1.959963984540054 + 0.8416212335729143  # normal's 97.5 % and 80 % points: power 0.8 at 5 %


@dataclasses.dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    n: int
    groups: int

    def row(self, name: str = "value") -> dict[str, float]:
        """As columns of a table: {n, groups, NAME, ci_low, ci_high}."""
        ends = dict(ci_low=self.low, ci_high=self.high)
        return dict(n=self.n, groups=self.groups) | {name: self.mean} | ends


def mean_interval(
    values: Sequence[float], groups: Sequence[Hashable], *, seed: int, resamples: int
) -> Interval:
    """Mean of `values` with the 95 % percentile interval of a bootstrap over groups."""
    values = np.asarray(values, np.float64)
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values but {len(groups)} groups: one group a value")
    if not len(values):
        raise ValueError("no values: nothing was scored, so there is no interval")
    check_resamples(resamples)
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    means = _resampled_means(
        np.bincount(member, values), np.bincount(member).astype(np.float64), seed, resamples
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values), len(index))


def check_resamples(resamples: int) -> None:
    """Raises ValueError on too few of them for a 95 % interval."""
    if resamples < MIN_RESAMPLES:
        raise ValueError(f"resamples is {resamples}; it must be at least {MIN_RESAMPLES}")


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


def paired_row(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable],
    *,
    names: tuple[str, str] = ("before", "after"),
    seed: int,
    resamples: int,
) -> dict[str, float]:
    """The same as columns: {n, groups, BEFORE, AFTER, diff, ci_low, ci_high}, with both means."""
    found = paired_interval(before, after, groups, seed=seed, resamples=resamples)
    sides = {name: sum(side) / len(side) for name, side in zip(names, (before, after), strict=True)}
    return sides | found.row("diff")


def standard_error(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Of the mean, over groups; infinite with one group, which says nothing of others."""
    values = np.asarray(values, np.float64)
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    if len(index) < 2:
        return math.inf
    sums = np.bincount(member, values - values.mean())
    return float(math.sqrt(len(index) / (len(index) - 1) * np.sum(sums**2)) / len(values))


def detectable(values: Sequence[float], groups: Sequence[Hashable], *, paired: bool) -> float:
    """The least true difference that 80 % of such evaluations would find at the 5 % level.

    `values`: differences of two models when `paired`, else one model's scores, and then of a second
    model on other items as many. 500 independent answers, 60 % right: 0.087.
    """
    return DETECT * standard_error(values, groups) * (1 if paired else math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Judged:
    """`judge_sd`: how the mean would move if the judge were asked again; None with one vote each.

    It is part of `interval`, not to be added to it.
    """

    interval: Interval
    judge_sd: float | None


def judged_interval(
    votes: Sequence[Sequence[float]], groups: Sequence[Hashable], *, seed: int, resamples: int
) -> Judged:
    """Mean of a judge's votes on each item, with the interval over groups."""
    if empty := [n for n, some in enumerate(votes) if not len(some)]:
        raise ValueError(f"item {empty[0]} has no votes; count it as unscored, with bounds")
    means = [float(np.mean(some)) for some in votes]
    interval = mean_interval(means, groups, seed=seed, resamples=resamples)
    return Judged(interval, judge_sd(votes, len(votes)))


def judge_sd(votes: Sequence[Sequence[float]], n: int) -> float | None:
    """How the mean over `n` items would move if the judge were asked again about these of them."""
    again = [np.var(some, ddof=1) / len(some) for some in votes if len(some) > 1]
    return math.sqrt(float(np.mean(again)) * len(votes)) / n if again else None


def ratio_interval(
    above: Sequence[float],
    below: Sequence[float],
    groups: Sequence[Hashable],
    *,
    seed: int,
    resamples: int,
) -> Interval:
    """Mean of `above` over mean of `below`, with the 95 % interval of a bootstrap over groups."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if len(above) != len(below):
        raise ValueError(f"{len(above)} values above but {len(below)} below: one each")
    return statistic_interval(
        lambda some: float(above[some].sum() / below[some].sum()),
        groups,
        seed=seed,
        resamples=resamples,
    )


def statistic_interval(
    statistic: Callable[[Int[np.ndarray, "k"]], float],
    groups: Sequence[Hashable],
    *,
    seed: int,
    resamples: int,
) -> Interval:
    """Any number of items, by their places, with the interval of a bootstrap over groups."""
    (found,) = each_interval(
        lambda some: np.array([statistic(some)]), groups, seed=seed, resamples=resamples
    )
    return found


def each_interval(
    statistics: Callable[[Int[np.ndarray, "k"]], Float[np.ndarray, "s"]],
    groups: Sequence[Hashable],
    *,
    seed: int,
    resamples: int,
) -> list[Interval]:
    """The same of several numbers of the same items, such as a curve's: each has its own."""
    if not len(groups):
        raise ValueError("no values: nothing was scored, so there is no interval")
    check_resamples(resamples)
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    order = np.argsort(member, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(member))[:-1])
    rng = np.random.default_rng(seed)
    found = [
        statistics(np.concatenate([parts[g] for g in rng.integers(len(parts), size=len(parts))]))
        for _ in range(resamples)
    ]
    ends = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    value = statistics(np.arange(len(groups)))
    return [
        Interval(float(v), float(low), float(high), len(groups), len(index))
        for v, low, high in zip(value, *ends, strict=True)
    ]


def suite_interval(
    parts: Sequence[tuple[Sequence[float], Sequence[Hashable]]], *, seed: int, resamples: int
) -> Interval:
    """Mean over tasks of each task's mean; groups that tasks share are drawn together.

    `parts`: values and groups of each task. A draw without any item of a task goes without it.
    """
    if not parts:
        raise ValueError("no tasks: nothing was scored on both sides")
    check_resamples(resamples)
    names = dict.fromkeys(group for _, groups in parts for group in groups)
    index = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros((2, len(parts), len(index)))
    for row, (values, groups) in enumerate(parts):
        np.add.at(sums[row], [index[name] for name in groups], np.asarray(values, np.float64))
        np.add.at(counts[row], [index[name] for name in groups], 1.0)
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    for number in range(resamples):
        times = np.bincount(rng.integers(len(index), size=len(index)), minlength=len(index))
        total = counts @ times
        means[number] = np.mean((sums @ times)[total > 0] / total[total > 0])
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean(sums.sum(1) / counts.sum(1)))
    return Interval(value, float(low), float(high), int(counts.sum()), len(index))


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
    rng, found = np.random.default_rng(seed), []
    step = max(1, _DRAWN // len(sums))
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), len(sums))
        drawn = rng.integers(len(sums), size=size)
        found.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(found)
