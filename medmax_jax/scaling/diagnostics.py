"""Compute bootstrap intervals by resampling runs, and check the fit with them.

Runs are resampled, not rows: checkpoints of one run share its noise. Each resample is fitted from
the end of the complete table's fit, all resamples together (fit.refit).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float

from medmax_jax.scaling import fit as fitting
from medmax_jax.scaling.fit import Fit, refit, values
from medmax_jax.scaling.laws import Law, ScalingError
from medmax_jax.scaling.table import Table

LEVEL = 0.95
SAME = 1e-6  # relative: draws nearer to each other count as one number
RUNS = 1_000  # left out one by one in one batch: their weights are [RUNS, rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapSamples:
    """`vectors` [draws, parameters] as in fit.Fit; `poor`: draws with one size or amount.

    `stuck`: draws whose fit had not converged when the minimizer ran out of steps.
    """

    fit: Fit
    vectors: np.ndarray
    poor: int
    stuck: int

    def __len__(self) -> int:
        return len(self.vectors)

    def named(self) -> dict[str, np.ndarray]:
        """Return each parameter's draws."""
        samples = [values(self.fit.law, v, self.fit.middle) for v in self.vectors]
        return {name: np.array([v[name] for v in samples]) for name in self.fit.values}

    def at_bound(self) -> dict[str, float]:
        """Return, for each exponent that ends at a bound of the search, the share of such draws."""
        count, shares = len(self.fit.law.names), {}
        for i, e in enumerate(self.fit.law.exponents):
            if e.name not in self.fit.fixed:
                near = 1e-3 * (e.high - e.low)
                column = self.vectors[:, count + i]
                shares[e.name] = float(np.mean((column < e.low + near) | (column > e.high - near)))
        return {name: share for name, share in shares.items() if share}


def bootstrap(
    fitted: Fit,
    table: Table,
    *,
    count: int,
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> BootstrapSamples:
    """Return `count` fits to tables whose runs are drawn with replacement.

    `progress` receives how many more are done.
    """
    rng, runs = np.random.default_rng(seed), table.runs
    number, drawn, poor = int(runs.max()) + 1, [], 0
    while len(drawn) < count:
        weights = counts(rng, number)[runs]
        if _too_poor(fitted, table, weights):
            poor += 1
            if poor > 20 * count:
                break
            continue
        drawn.append(weights)
    vectors, done = np.zeros((0, len(fitted.vector))), np.zeros(0, bool)
    if drawn:
        vectors, done = refit(fitted, table.x, table.y, np.array(drawn), progress)
    return BootstrapSamples(fit=fitted, vectors=vectors, poor=poor, stuck=int((~done).sum()))


def counts(rng: np.random.Generator, number: int) -> Float[np.ndarray, "_"]:
    """Return how often each of `number` runs is drawn; the counts sum to `number`."""
    return np.bincount(rng.integers(0, number, number), minlength=number).astype(np.float64)


def interval(draws: Float[np.ndarray, "n"], level: float) -> tuple[float, float]:
    """Return the middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def parameter_interval(draws: Float[np.ndarray, "n"]) -> tuple[float, float] | None:
    """Return the middle LEVEL of a parameter's draws; None if they are all equal.

    That is so for a fixed parameter, and for one that every draw leaves at a bound of its search.
    Their interval would have no width and suggest exact knowledge.
    """
    low, high = interval(draws, LEVEL)
    return (low, high) if high - low > SAME * max(abs(low), abs(high)) else None


def influence(
    fitted: Fit, table: Table, *, progress: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[str, Fit]]:
    """Yield (label, the fit without it) of every run; `progress` receives how many remain."""
    number = int(table.runs.max()) + 1
    for start in range(0, number, RUNS):
        runs = np.arange(start, min(start + RUNS, number))
        weights = (table.runs != runs[:, None]).astype(np.float64)
        vectors, _ = refit(fitted, table.x, table.y, weights, progress)
        for run, vector in zip(runs, vectors, strict=True):
            label = table.labels[int(np.flatnonzero(table.runs == run)[0])]
            yield label, dataclasses.replace(fitted, vector=vector)


def _too_poor(fitted: Fit, table: Table, weights: np.ndarray) -> bool:
    drawn = weights > 0
    columns = {e.column for e in fitted.law.exponents if e.name not in fitted.fixed}
    return any(len(np.unique(table.x[c][drawn])) < 2 for c in columns)


# ---- Errors of a law fitted to small runs on larger runs that it has not seen ----
#
# by compute   the fifth of the runs with the most params x tokens is held out
# by a column  the runs of its largest value: the largest size, the most data; the fifth with the
#              largest values if nearly every run has a value of its own

SHARE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoldoutErrors:
    """Errors are prediction / truth - 1; `why` is set if there is no such fit."""

    name: str
    count: int
    errors: np.ndarray
    why: str

    @property
    def mean_size(self) -> float | None:
        return None if self.why else float(np.abs(self.errors).mean())


def all_holdouts(
    law: Law, table: Table, *, delta: float, fixed: Mapping[str, float]
) -> list[HoldoutErrors]:
    """Return every holdout that the table's columns allow."""
    ways = {"the fifth with the most compute": _top(_compute(table))}
    for name in ("params", "tokens"):
        if name in table.x and len(np.unique(table.x[name])) > 1:
            ways[f"the largest {name}"] = _largest(table.x[name])
    return [fit_without(law, table, keep, n, delta=delta, fixed=fixed) for n, keep in ways.items()]


def fit_without(
    law: Law, table: Table, held_out: Bool[np.ndarray, "n"], name: str, *, delta: float,
    fixed: Mapping[str, float],
) -> HoldoutErrors:  # fmt: skip
    """Return the law fitted without the rows `held_out`, and its errors on them."""
    rest, none = table.part(~held_out), np.zeros(0)
    try:
        check(law, rest, fixed)
        fitted = fitting.fit(law, rest.x, rest.y, delta=delta, fixed=fixed)
    except ScalingError as error:
        return HoldoutErrors(name=name, count=int(held_out.sum()), errors=none, why=str(error))
    truth = table.part(held_out)
    return HoldoutErrors(
        name=name, count=int(held_out.sum()), errors=fitted.predict(truth.x) / truth.y - 1, why=""
    )


def _compute(table: Table) -> Float[np.ndarray, "n"]:
    if "loss" in table.x:  # a better model has less
        return -table.x["loss"]
    return table.x.get("params", 1.0) * table.x["tokens"]


def _largest(column: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    if 2 * len(np.unique(column)) > len(column):
        return _top(column)
    return column == column.max()


def _top(size: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    count = max(1, round(SHARE * len(size)))
    return size >= np.sort(size)[-count]


# ---- Whether a table can identify a law's parameters: checked before the fit, and at its end ----
#
# chinchilla on runs of one size        A and alpha are one number: rejected
# chinchilla where tokens = 20 params   alpha and beta are one number: rejected, `tied` is not
# finetune on one model size            rejected; the fix is the law `power`

FEW = 3  # distinct values of a column; with fewer its exponent depends on the other columns
ALIGNED = 1e-6  # 1 - r^2 of ln params and ln tokens


def check(law: Law, table: Table, fixed: Mapping[str, float]) -> list[str]:
    """Return warnings; raise ScalingError if parameters cannot be identified."""
    free = [p for p in law.parameters if p not in fixed]
    if len(table) <= len(free):
        raise ScalingError(
            f"too few points for law {law.name}: {len(table)} runs, {len(free)} parameters "
            f"({', '.join(free)}); use at least {len(free) + 1} runs, or a law with fewer "
            "parameters"
        )
    warnings = []
    searched = [e for e in law.exponents if e.name not in fixed]
    for column in dict.fromkeys(e.column for e in searched):
        distinct = len(np.unique(table.x[column]))
        names = " and ".join(e.name for e in searched if e.column == column)
        if distinct < 2:
            raise ScalingError(
                f"law {law.name} is not identified: every run has {column} = "
                f"{table.x[column][0]:g}, so {names} and its coefficient cannot be separated; "
                + _suggestion(law, column)
            )
        if distinct < FEW:
            warnings.append(
                f"only {distinct} distinct values of {column}: {names} cannot be checked"
            )
    if law.name in ("chinchilla", "finetune") and len(searched) == 2:
        _check_aligned(law, table)
    if law.name == "data_constrained" and "R_D" not in fixed:
        if (table.x["tokens"] <= table.x["unique_tokens"]).all():
            raise ScalingError(
                "law data_constrained is not identified: no run repeats its data, so R_D "
                "is undetermined; use the law tied, or add runs that repeat data"
            )
    return warnings


def check_end(fitted: Fit, table: Table) -> None:
    """Raise ScalingError if a parameter does not change any prediction at the fit's end."""
    slope = np.abs(fitted.jacobian(table.x)).max(axis=1)
    for name, max_slope in zip(fitted.law.parameters, slope, strict=True):
        if max_slope < 1e-12 and name not in fitted.fixed and name not in fitted.law.names:
            raise ScalingError(
                f"law {fitted.law.name} is not identified: {name} affects no prediction on this "
                f"table; set it with --fix {name}=VALUE"
                + (" (5.31 in Muennighoff et al.)" if name == "R_N" else "")
            )


def _suggestion(law: Law, column: str) -> str:
    if law.name == "finetune" and column == "params":
        return "use --law power (E + B/D^beta), or add runs of another size or rank"
    if law.name == "finetune":
        return "add runs of another amount of data"
    return f"add runs with other {column}, or use --law power on what varies"


def _check_aligned(law: Law, table: Table) -> None:
    n, d = (np.log(table.x[name]) for name in ("params", "tokens"))
    if 1 - np.corrcoef(n, d)[0, 1] ** 2 < ALIGNED:
        alternative = (
            "--law tied has one exponent" if law.name == "chinchilla" else "--law power has one"
        )
        raise ScalingError(
            f"law {law.name} is not identified: tokens are a power of params in every run, so "
            f"alpha and beta cannot be separated; add runs off that line, or {alternative}"
        )
