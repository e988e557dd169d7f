"""Computes intervals over groups: questions about one patient or volume are one cluster.

    scores    1 0 1 | 1 1 | 0 0 0 1        three groups, nine questions
    resample  three groups with replacement, the mean of all questions drawn; 2,000 times or more
    error     the spread of these means x sqrt(G / (G - 1)), at least that of independent items
              and, for a mean, that of leaving out one group at a time
    interval  Wilson's, of the effective number of items that this error implies, with Student's
              t of G - 1 degrees of freedom; G: groups, fewer where some have most of the items

Percentiles of the resampled means are too narrow with few groups and near 0 and 1 (3 groups: 77 %
instead of 95 %); `python benchmarks/intervals.py` shows both over a table of designs.

    no variation   all items score the same: the resamples do too. The share of groups that could
                   still differ is bounded as Clopper and Pearson do: at most 1 - 0.025^(1/G)
    one group      carries no information on others: the interval is infinite, missing in tables

A paired difference resamples the same groups on both sides, so what is hard for both cancels.
A judge's votes enter as their mean: the variation between its votes is part of the interval.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import special

MIN_RESAMPLES = 2_000  # below this the error of an interval is itself noisy
FEW = 20  # groups; with fewer an interval depends on Student's t, and tables mark it
SHARE = (0.0, 1.0)  # the span of most scores
TAIL = 0.025  # on each side of a 95 % interval
POWER = 0.8  # of the comparison that `detectable` describes
SLACK = 1e-6  # of a span: the size of float32 rounding errors, as in cosines
_DRAWN = 1 << 18  # groups drawn at a time; all of them at once would be 2,000 numbers per group
Span = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Configures the bootstrap: `resamples` draws of groups, by the seed."""

    seed: int
    resamples: int

    def __post_init__(self):
        if self.resamples < MIN_RESAMPLES:
            raise ValueError(f"resamples is {self.resamples}; it must be at least {MIN_RESAMPLES}")


@dataclasses.dataclass(frozen=True)
class Interval:
    """Holds a value with its 95 % interval.

    `low` and `high` are infinite where nothing is known of other groups.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int

    def row(self, name: str = "value") -> dict[str, float | None]:
        """Return the columns of a table: {n, groups, few_groups, NAME, ci_low, ci_high}.

        few_groups: fewer than FEW. Infinite ends are None, as JSON has no infinity.
        """
        ends = dict(ci_low=finite(self.low), ci_high=finite(self.high))
        counts = dict(n=self.n, groups=self.groups, few_groups=self.groups < FEW)
        return counts | {name: self.mean} | ends


def finite(number: float) -> float | None:
    """Return the number; None for an infinite one."""
    return number if math.isfinite(number) else None


def mean_interval(
    values: Sequence[float],
    groups: Sequence[Hashable],
    *,
    resampling: Resampling,
    span: Span | None = SHARE,
) -> Interval:
    """Return the mean of `values` with its 95 % interval over groups.

    span: the smallest and the largest possible value; None if there are no such bounds.
    """
    values = np.asarray(values, np.float64)
    member, count = _members(len(values), groups)
    _check_span(values, span)
    sizes = np.bincount(member).astype(np.float64)
    sums = np.bincount(member, values)
    means = _resampled_means(sums, sizes, resampling)
    error = _error_of(means, count, span)
    error = max(error, _independent(values, span), _jackknife(sums, sizes) if error else 0.0)
    mean = float(values.mean())
    low, high = _ends(mean, error, sizes / len(values), span, proportion=True)
    return Interval(mean, low, high, len(values), count)


def paired_interval(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable],
    *,
    resampling: Resampling,
    span: Span | None = SHARE,
) -> Interval:
    """Return the mean of after - before, paired by item, with its 95 % interval over groups.

    span: of the scores, as in mean_interval; their differences reach up to its width.
    """
    if len(before) != len(after):
        raise ValueError(
            f"before has {len(before)} scores and after has {len(after)}; a paired difference "
            "requires the same items"
        )
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return mean_interval(difference, groups, resampling=resampling, span=of_differences(span))


def of_differences(span: Span | None) -> Span | None:
    """Return the span of differences of two scores: (0, 1) -> (-1, 1)."""
    return None if span is None else (span[0] - span[1], span[1] - span[0])


def paired_row(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable],
    *,
    names: tuple[str, str] = ("before", "after"),
    resampling: Resampling,
    span: Span | None = SHARE,
) -> dict[str, float | None]:
    """Return `paired_interval` as columns.

    {BEFORE, AFTER, n, groups, few_groups, diff, ci_low, ci_high}.
    """
    interval = paired_interval(before, after, groups, resampling=resampling, span=span)
    means = {name: sum(side) / len(side) for name, side in zip(names, (before, after), strict=True)}
    return means | interval.row("diff")


def standard_error(
    values: Sequence[float], groups: Sequence[Hashable], *, span: Span | None = SHARE
) -> float:
    """Return the standard error of the mean, over groups; infinite with one group.

    It is never 0: where all values are equal it corresponds to the width of their interval.
    """
    values = np.asarray(values, np.float64)
    member, count = _members(len(values), groups)
    if count < 2:
        return math.inf
    sums = np.bincount(member, values - values.mean())
    error = math.sqrt(count / (count - 1) * np.sum(sums**2)) / len(values)
    if error := max(0.0 if _same(values, span) else error, _independent(values, span)):
        return error
    weights = np.bincount(member) / len(values)
    low, high = _ends(float(values.mean()), 0.0, weights, span, proportion=True)
    return (high - low) / 2 / _quantile(weights, 1 - TAIL)


def minimum_detectable_effect(
    values: Sequence[float],
    groups: Sequence[Hashable],
    *,
    paired: bool,
    span: Span | None = SHARE,
) -> float:
    """Return the smallest true difference that 80 % of such evaluations find at the 5 % level.

    `values`: differences of two models when `paired`, else one model's scores, and then of a second
    model on as many other items; `span`: of the scores. 500 independent answers, 60 % right: 0.087.
    """
    member, count = _members(len(values), groups)
    if count < 2:
        return math.inf
    error = standard_error(values, groups, span=of_differences(span) if paired else span)
    weights = np.bincount(member) / len(values)
    reach = _quantile(weights, 1 - TAIL) + _quantile(weights, POWER)
    return reach * error * (1 if paired else math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class JudgedInterval:
    """Holds an interval with `judge_sd`, the spread of the mean over repeated judging.

    `judge_sd` is None with one vote each. It is part of `interval`, not to be added to it.
    """

    interval: Interval
    judge_sd: float | None


def judged_interval(
    votes: Sequence[Sequence[float]], groups: Sequence[Hashable], *, resampling: Resampling
) -> JudgedInterval:
    """Return the mean of a judge's votes on each item, with the interval over groups."""
    if empty := [n for n, item_votes in enumerate(votes) if not len(item_votes)]:
        raise ValueError(f"item {empty[0]} has no votes; count it as unscored, with bounds")
    means = [float(np.mean(item_votes)) for item_votes in votes]
    interval = mean_interval(means, groups, resampling=resampling)
    return JudgedInterval(interval, judge_sd(votes, len(votes)))


def judge_sd(votes: Sequence[Sequence[float]], n: int) -> float | None:
    """Return the spread of the mean over `n` items if the judge voted again on these of them."""
    variances = [np.var(repeats, ddof=1) / len(repeats) for repeats in votes if len(repeats) > 1]
    return math.sqrt(float(np.mean(variances)) * len(votes)) / n if variances else None


def ratio_interval(
    above: Sequence[float],
    below: Sequence[float],
    groups: Sequence[Hashable],
    *,
    resampling: Resampling,
    span: Span,
) -> Interval:
    """Return mean of `above` over mean of `below`, with its 95 % interval over groups.

    span: the smallest and the largest possible ratio.
    """
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if len(above) != len(below):
        raise ValueError(
            f"above has {len(above)} values and below has {len(below)}; pass one of each per item"
        )
    (interval,) = pointwise_intervals(
        lambda indices: np.array([above[indices].sum() / below[indices].sum()]),
        groups,
        resampling=resampling,
        spans=[span],
    )
    return interval


def pointwise_intervals(
    statistics: Callable[[Int[np.ndarray, "k"]], Float[np.ndarray, "s"]],
    groups: Sequence[Hashable],
    *,
    resampling: Resampling,
    spans: Sequence[Span | None],
    tick: Callable[[], None] = lambda: None,
) -> list[Interval]:
    """Return intervals over groups for several numbers of the same items, as of a curve.

    `statistics` gets indices of items, twice for a group drawn twice. spans: the smallest and
    the largest possible value of each number. `tick` is called after each resample.
    """
    member, count = _members(len(groups), groups)
    order, sizes = np.argsort(member, kind="stable"), np.bincount(member)
    firsts, rng = np.cumsum(sizes) - sizes, np.random.default_rng(resampling.seed)
    draws = np.empty((resampling.resamples, len(spans)))
    for number in range(resampling.resamples):
        drawn = rng.integers(count, size=count)
        ends = np.cumsum(sizes[drawn])
        shift = np.repeat(firsts[drawn] - (ends - sizes[drawn]), sizes[drawn])
        draws[number] = statistics(order[shift + np.arange(ends[-1])])
        tick()
    value, weights = statistics(np.arange(len(groups))), sizes / len(groups)
    return [
        from_draws(float(v), column, weights, n=len(groups), span=span)
        for v, column, span in zip(value, draws.T, spans, strict=True)
    ]


def from_draws(
    value: float,
    draws: Float[np.ndarray, "r"],
    weights: Float[np.ndarray, "g"],
    *,
    n: int,
    span: Span | None,
) -> Interval:
    """Return the interval of a number that is not a mean, from its bootstrap draws over groups.

    It extends as many errors to each side as Student's t has, within `span`. weights: the groups'
    shares of the items, which sum to 1.
    """
    error = _error_of(draws, len(weights), span)
    low, high = _ends(value, error, weights, span, proportion=False)
    return Interval(value, low, high, n, len(weights))


def suite_interval(
    parts: Sequence[tuple[Sequence[float], Sequence[Hashable]]],
    *,
    resampling: Resampling,
    span: Span | None = SHARE,
) -> Interval:
    """Return the mean over tasks of each task's mean; shared groups are drawn together.

    `parts`: values and groups of each task. A draw without any item of a task leaves the task out.
    """
    if not parts:
        raise ValueError("parts is empty: no task has scores on both sides")
    names = dict.fromkeys(group for _, groups in parts for group in groups)
    index = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros((2, len(parts), len(index)))
    for row, (values, groups) in enumerate(parts):
        _check_span(np.asarray(values, np.float64), span)
        np.add.at(sums[row], [index[name] for name in groups], np.asarray(values, np.float64))
        np.add.at(counts[row], [index[name] for name in groups], 1.0)
    rng, means = np.random.default_rng(resampling.seed), np.empty(resampling.resamples)
    for number in range(resampling.resamples):
        times = np.bincount(rng.integers(len(index), size=len(index)), minlength=len(index))
        total = counts @ times
        means[number] = np.mean((sums @ times)[total > 0] / total[total > 0])
    least = [_independent(np.asarray(values, np.float64), span) for values, _ in parts]
    error = max(_error_of(means, len(index), span), math.hypot(*least) / len(parts))
    value = float(np.mean(sums.sum(1) / counts.sum(1)))
    weights = (counts / counts.sum(1, keepdims=True)).mean(0)
    low, high = _ends(value, error, weights, span, proportion=True)
    return Interval(value, low, high, int(counts.sum()), len(index))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of independent trials: 8 of 10 -> (0.490, 0.943)."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"successes is {successes} and n is {n}; required: 0 <= successes <= n and n > 0"
        )
    z = 1.959963984540054  # the normal's 97.5 % point
    return _wilson(successes / n, z * z / n)


def _wilson(share: float, z2: float) -> tuple[float, float]:
    """Return Wilson's interval. `z2`: the squared quantile over the number of trials."""
    middle = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def _ends(
    value: float,
    error: float,
    weights: Float[np.ndarray, "g"],
    span: Span | None,
    *,
    proportion: bool,
) -> tuple[float, float]:
    """Return the interval of a number whose standard error is known.

    proportion: it is a mean of values within `span`; its variance falls towards the ends of it as
    that of a share does.
    """
    t = _quantile(weights, 1 - TAIL)
    if not math.isfinite(t) or (span is None and error == 0):
        return -math.inf, math.inf
    if span is None:
        return value - t * error, value + t * error
    least, most = span
    if error == 0:  # no group differs; at most this share of others does
        share = 1 - TAIL ** (1 / len(weights))
        return value - share * (value - least), value + share * (most - value)
    position = (value - least) / (most - least)
    if not proportion or not 0 < position < 1:
        return max(least, value - t * error), min(most, value + t * error)
    effective = position * (1 - position) * ((most - least) / error) ** 2  # effective items
    low, high = (min(max(end, 0.0), 1.0) for end in _wilson(position, t * t / effective))
    return least + low * (most - least), least + high * (most - least)


def _quantile(weights: Float[np.ndarray, "g"], level: float) -> float:
    """Return Student's t with groups - 1 degrees of freedom; infinite with one group.

    Groups that hold most of the items leave fewer to compare. Their number is Satterthwaite's: G
    for equal groups. The variance of a group's sum grows with its size where its items are
    independent, and with the square where they agree; the power in between is assumed.
    """
    if len(weights) < 2:
        return math.inf
    variances = weights**1.5
    number = float(np.sum(variances)) ** 2 / float(np.sum(variances**2))
    return float(special.stdtrit(max(number - 1, 1.0), level))


def _error_of(draws: Float[np.ndarray, "r"], groups: int, span: Span | None) -> float:
    """Return the standard error of a bootstrap's draws; 0 where all are equal."""
    if groups < 2 or _same(draws, span):
        return 0.0
    return float(np.std(draws)) * math.sqrt(groups / (groups - 1))


def _jackknife(sums: Float[np.ndarray, "g"], sizes: Float[np.ndarray, "g"]) -> float:
    """Return the standard error from leaving out one group at a time.

    It equals the bootstrap's for groups of one size, and is larger where some have many items:
    these draw the mean of every resample towards their own, and seem to vary less than they do.
    """
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    shifts = without - sums.sum() / sizes.sum()
    return math.sqrt((len(sums) - 1) / len(sums) * float(np.sum(shifts**2)))


def _independent(values: Float[np.ndarray, "n"], span: Span | None) -> float:
    """Return the standard error for independent items, a lower bound for groups."""
    if len(values) < 2 or _same(values, span):
        return 0.0
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _same(values: Float[np.ndarray, "n"], span: Span | None) -> bool:
    """Return whether values differ by no more than float32 rounding does."""
    scale = span[1] - span[0] if span else float(np.max(np.abs(values)))
    return float(np.ptp(values)) <= SLACK * scale


def _members(n: int, groups: Sequence[Hashable]) -> tuple[Int[np.ndarray, "n"], int]:
    """Return the index of each item's group, groups in their order, and how many there are."""
    if n != len(groups):
        raise ValueError(f"{n} values but {len(groups)} groups; pass one group per value")
    if not n:
        raise ValueError("no values: nothing was scored, so there is no interval")
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    return np.array([index[name] for name in groups]), len(index)


def _check_span(values: Float[np.ndarray, "n"], span: Span | None) -> None:
    if span is None:
        return
    low, high = float(values.min()), float(values.max())
    slack = SLACK * (span[1] - span[0])
    if low < span[0] - slack or high > span[1] + slack:
        raise ValueError(
            f"values from {low:g} to {high:g} are outside the span {span[0]:g} to {span[1]:g}; "
            "pass span=(smallest, largest), or span=None for values without bounds"
        )


def _resampled_means(
    sums: Float[np.ndarray, "g"], counts: Float[np.ndarray, "g"], resampling: Resampling
) -> Float[np.ndarray, "r"]:
    """Return the means of `resamples` draws of groups; a group drawn twice counts twice."""
    rng, means = np.random.default_rng(resampling.seed), []
    step = max(1, _DRAWN // len(sums))
    for start in range(0, resampling.resamples, step):
        size = (min(step, resampling.resamples - start), len(sums))
        drawn = rng.integers(len(sums), size=size)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)
