"""Study one law on one table: parameters, intervals, and the evidence against them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from medmax_jax.io.progress import SECONDS, ItemProgress, report_waiting
from medmax_jax.scaling import allocation, diagnostics
from medmax_jax.scaling import fit as fitting
from medmax_jax.scaling.diagnostics import BootstrapSamples, HoldoutErrors
from medmax_jax.scaling.fit import Fit
from medmax_jax.scaling.laws import Law
from medmax_jax.scaling.table import Table

POOR_SHARE = 0.05  # of draws at a bound of the search: the interval's end is the bound's
CONDITION = 1e5  # of the normal matrix with columns of length 1
NOTHING = 1e-4  # of every prediction: a smaller term is negligible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to fit: the numbers of the command line."""

    delta: float
    fixed: Mapping[str, float]
    draws: int
    seed: int
    flops: float  # of one token, per parameter: 6 for training all of them
    budgets: tuple[float, ...]  # empty: the largest run's, ten and a hundred times that


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A fit, its draws and its checks."""

    law: Law
    table: Table
    options: Options
    fit: Fit
    draws: BootstrapSamples
    named: Mapping[str, np.ndarray]  # the draws by parameter
    holdouts: Sequence[HoldoutErrors]
    condition: float
    influential: str  # the run that moves the fit most, and by how much
    warnings: Sequence[str]
    allocation: Sequence[Mapping[str, Any]]

    @property
    def intervals(self) -> dict[str, tuple[float, float] | None]:
        """Return intervals by parameter.

        An interval is None if the draws are equal (diagnostics.parameter_interval).
        """
        return {name: diagnostics.parameter_interval(v) for name, v in self.named.items()}

    def band(self, x: Mapping[str, np.ndarray]) -> Float[np.ndarray, "2 n"]:
        """Return the interval of the prediction at each row of `x`."""
        middle = self.fit.middle
        predictions = np.real(fitting.predict(self.law, self.draws.vectors.T, x, middle))
        tail = (1 - diagnostics.LEVEL) / 2
        return np.quantile(predictions, [tail, 1 - tail], axis=0)


def run_study(
    law: Law, table: Table, options: Options, *, progress: Callable[[str], None] = lambda line: None
) -> Study:
    """Fit, resample and check; raise ScalingError if the table cannot identify the parameters.

    `progress` receives a line of text every few seconds: how many fits are done, their rate, the
    rest.
    """
    delta, fixed = options.delta, options.fixed
    warnings = [*table.notes, *diagnostics.check(law, table, fixed)]
    with report_waiting(f"{table.target}: fitting", progress):
        fitted = fitting.fit(law, table.x, table.y, delta=delta, fixed=fixed)
    diagnostics.check_end(fitted, table)
    fits = ItemProgress(options.draws + int(table.runs.max()) + 1, "fits", progress, every=SECONDS)
    draws = diagnostics.bootstrap(
        fitted, table, count=options.draws, seed=options.seed,
        progress=lambda count: fits.tick(f"{table.target}: bootstraps", count),
    )  # fmt: skip
    named = draws.named()
    condition = condition_number(fitted, table)
    with report_waiting(f"{table.target}: fitting without the largest runs", progress):
        holdouts = diagnostics.all_holdouts(law, table, delta=delta, fixed=fixed)
    influential, share = _influence(
        fitted, table, named, lambda count: fits.tick(f"{table.target}: without each run", count)
    )
    warnings += _warnings(fitted, table, draws, condition, holdouts)
    if share > 1:
        warnings.append(f"a single run dominates the fit: without {influential}")
    return Study(
        law=law, table=table, options=options, fit=fitted, draws=draws, named=named,
        holdouts=holdouts, condition=condition, influential=influential, warnings=warnings,
        allocation=_allocation(law, table, options, fitted.values, named),
    )  # fmt: skip


def condition_number(fitted: Fit, table: Table) -> float:
    """Return the condition number of the normal matrix of ln coefficients and exponents.

    Each column is scaled to length 1.
    """
    free = [i for i, name in enumerate(fitted.law.parameters) if name not in fitted.fixed]
    slope = fitted.jacobian(table.x)[free]
    length = np.linalg.norm(slope, axis=1, keepdims=True)
    if (length < 1e-12).any():
        return float("inf")
    values = np.linalg.svd(slope / length, compute_uv=False)
    return float((values[0] / max(values[-1], 1e-300)) ** 2)


def _warnings(
    fitted: Fit,
    table: Table,
    draws: BootstrapSamples,
    condition: float,
    holdouts: Sequence[HoldoutErrors],
) -> list[str]:
    warnings = []
    count = len(fitted.law.names)
    for i, e in enumerate(fitted.law.exponents):
        value, near = fitted.vector[count + i], 1e-3 * (e.high - e.low)
        if e.name not in fitted.fixed and not e.low + near < value < e.high - near:
            warnings.append(
                f"{e.name} ended at a bound of its search; the law does not fit this table"
            )
    for name, share in shares(fitted, table).items():
        if share < NOTHING:
            warnings.append(
                f"{name} is negligible: its term is at most {share:.1e} of a prediction"
            )
    for name, share in draws.at_bound().items():
        if share > POOR_SHARE:
            warnings.append(f"{name} ends at a bound of its search in {share:.0%} of the draws")
    if len(draws) and draws.poor > POOR_SHARE * len(draws):
        warnings.append(
            f"{draws.poor} draws in addition to the {len(draws)} had a single size or amount of "
            "data and were drawn again: the table has few distinct values"
        )
    if draws.stuck:
        warnings.append(f"{draws.stuck} of the {len(draws)} draws had not converged")
    if condition > CONDITION:
        warnings.append(
            f"condition number {condition:.1e}: some parameters are nearly interchangeable"
        )
    warnings += [
        f"no fit without {holdout.name}: {holdout.why}" for holdout in holdouts if holdout.why
    ]
    return warnings


def shares(fitted: Fit, table: Table) -> dict[str, float]:
    """Return the largest share of a prediction that each coefficient's term has on the table."""
    slope = np.abs(fitted.jacobian(table.x)[: len(fitted.law.names)])  # d / d u is the term
    scale = 1.0 if fitted.law.log else np.abs(fitted.predict(table.x))
    return dict(zip(fitted.law.names, (slope / scale).max(axis=1).tolist(), strict=True))


def _influence(
    fitted: Fit,
    table: Table,
    named: Mapping[str, np.ndarray],
    progress: Callable[[int], None],
) -> tuple[str, float]:
    """Return (text, the move in half-widths of the interval) of the most influential run."""
    best = ("", 0.0)
    ends = {name: diagnostics.parameter_interval(each) for name, each in named.items()}
    for label, without in diagnostics.influence(fitted, table, progress=progress):
        for name, value in without.values.items():
            if ends[name] is None:  # fixed, or at a bound in every draw
                continue
            low, high = ends[name]
            move = abs(value - fitted.values[name]) / ((high - low) / 2)
            if move > best[1]:
                before = fitted.values[name]
                best = (f"{label}, {name} changes from {before:.4g} to {value:.4g}", move)
    return best


def _allocation(
    law: Law, table: Table, options: Options, values: Mapping[str, float], named: Mapping
) -> Sequence[Mapping[str, Any]]:
    if law.name not in allocation.LAWS:
        return ()
    flops = options.flops
    own = allocation.default_budgets(table.x["params"], table.x["tokens"], flops=flops)
    return allocation.table(values, named, options.budgets or own, flops=flops)
