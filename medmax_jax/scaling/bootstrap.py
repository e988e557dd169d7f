"""Intervals by drawing runs again, and what they say about the fit.

Runs are drawn, not rows: checkpoints of one run share its noise. Each draw is fitted from where the
whole table's fit ended, all draws together (fit.refit).
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from medmax_jax.scaling.fit import Fit, refit, values
from medmax_jax.scaling.table import Table

LEVEL = 0.95
SAME = 1e-6  # relative: draws nearer to each other are one number
RUNS = 1_000  # left out one by one at a time: their weights are [RUNS, rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """`vectors` [draws, parameters] as in fit.Fit; `poor`: draws with one size or amount.

    `stuck`: draws whose fit had not converged when the minimizer ran out of steps.
    """

    found: Fit
    vectors: np.ndarray
    poor: int
    stuck: int

    def __len__(self) -> int:
        return len(self.vectors)

    def named(self) -> dict[str, np.ndarray]:
        """Each parameter's draws."""
        each = [values(self.found.law, v, self.found.middle) for v in self.vectors]
        return {name: np.array([v[name] for v in each]) for name in self.found.values}

    def at_bound(self) -> dict[str, float]:
        """The share of draws in which an exponent ends at a bound of the search, where any does."""
        count, shares = len(self.found.law.names), {}
        for i, e in enumerate(self.found.law.exponents):
            if e.name not in self.found.fixed:
                near = 1e-3 * (e.high - e.low)
                column = self.vectors[:, count + i]
                shares[e.name] = float(np.mean((column < e.low + near) | (column > e.high - near)))
        return {name: share for name, share in shares.items() if share}


def draw(
    found: Fit,
    table: Table,
    *,
    count: int,
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> Draws:
    """`count` fits to tables whose runs are drawn with replacement.

    `progress` gets how many more are done.
    """
    rng, runs = np.random.default_rng(seed), table.runs
    number, drawn, poor = int(runs.max()) + 1, [], 0
    while len(drawn) < count:
        weights = counts(rng, number)[runs]
        if _too_poor(found, table, weights):
            poor += 1
            if poor > 20 * count:
                break
            continue
        drawn.append(weights)
    vectors, done = np.zeros((0, len(found.vector))), np.zeros(0, bool)
    if drawn:
        vectors, done = refit(found, table.x, table.y, np.array(drawn), progress)
    return Draws(found=found, vectors=vectors, poor=poor, stuck=int((~done).sum()))


def counts(rng: np.random.Generator, number: int) -> Float[np.ndarray, "_"]:
    """How often each of `number` runs is drawn; they sum to `number`."""
    return np.bincount(rng.integers(0, number, number), minlength=number).astype(np.float64)


def interval(draws: Float[np.ndarray, "n"], level: float) -> tuple[float, float]:
    """The middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def parameter_interval(draws: Float[np.ndarray, "n"]) -> tuple[float, float] | None:
    """The middle LEVEL of a parameter's draws; None where they all are one number.

    So are those of a parameter that is held, and of one that every draw leaves at a bound of its
    search. Their interval would have no width and claim to be known exactly.
    """
    low, high = interval(draws, LEVEL)
    return (low, high) if high - low > SAME * max(abs(low), abs(high)) else None


def influence(
    found: Fit, table: Table, *, progress: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[str, Fit]]:
    """(label, the fit without it) of every run; `progress` gets how many more are done."""
    number = int(table.runs.max()) + 1
    for start in range(0, number, RUNS):
        runs = np.arange(start, min(start + RUNS, number))
        weights = (table.runs != runs[:, None]).astype(np.float64)
        vectors, _ = refit(found, table.x, table.y, weights, progress)
        for run, vector in zip(runs, vectors, strict=True):
            label = table.labels[int(np.flatnonzero(table.runs == run)[0])]
            yield label, dataclasses.replace(found, vector=vector)


def _too_poor(found: Fit, table: Table, weights: np.ndarray) -> bool:
    drawn = weights > 0
    columns = {e.column for e in found.law.exponents if e.name not in found.fixed}
    return any(len(np.unique(table.x[c][drawn])) < 2 for c in columns)
