"""Fit a law to a table: variable projection over a grid of exponents, then refine all parameters.

    minimize   sum_i w_i Huber_delta(ln prediction_i - ln y_i)      summed, never averaged

The sum matters to minimizers whose tolerances are relative to max(|f|, 1), such as scipy's
L-BFGS-B: a mean of about 1e-6 counts as converged wherever it starts, which "confirms" any
published constants given as a start. The tolerance here is relative to the objective itself
(newton.py).

Internally, a coefficient is the logarithm u of its term at the table's middle point, not ln A: ln A
and alpha of A / N^alpha with N near 1e10 are almost one parameter, u and alpha are not.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from medmax_jax.scaling import newton
from medmax_jax.scaling.laws import Columns, Law, ScalingError

STEP = 1e-20  # of the complex step: derivatives exact to rounding
LOWEST = -25.0  # of u: a term of e^-25 of the prediction is negligible
CHUNK = 2_000_000  # numbers of one array of the grid
CACHE = 60_000  # numbers of one [m, n] array of a refinement: the data of a step fits in the cache
STARTS = 6  # of the grid's points, refined
IRLS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """`vector`: u of each coefficient, then each exponent in the search's form."""

    law: Law
    delta: float
    vector: np.ndarray
    middle: Columns  # [1] each
    objective: float
    fixed: Mapping[str, float]

    @property
    def values(self) -> dict[str, float]:
        return values(self.law, self.vector, self.middle)

    def predict(self, x: Columns) -> np.ndarray:
        return np.real(predict(self.law, self.vector[:, None], x, self.middle))[0]

    def jacobian(self, x: Columns) -> np.ndarray:
        """Return d ln prediction (or prediction) / d vector: [parameters, n]."""
        return _model(self.law, self.vector, x, self.middle)[1]


def fit(
    law: Law,
    x: Columns,
    y: Float[np.ndarray, "n"],
    *,
    delta: float,
    fixed: Mapping[str, float],
) -> Fit:
    """Return the best fit of the law. `fixed`: given exponents, by name, as in the table."""
    middle = {n: np.array([_middle(law, n, v)]) for n, v in x.items() if n in law.columns}
    fixed_values = _fixed_values(law, fixed, middle)
    problem = Problem(law=law, x=x, y=y, middle=middle, delta=delta, fixed_values=fixed_values)
    weights = np.ones_like(y)
    starts = problem.starts(weights)
    ends, objectives, _ = problem.polish(starts, np.tile(weights, (len(starts), 1)))
    best = int(np.argmin(objectives))
    return Fit(
        law=law, delta=delta, vector=ends[best], middle=middle,
        objective=float(objectives[best]), fixed=dict(fixed),
    )  # fmt: skip


def refit(
    fitted: Fit,
    x: Columns,
    y: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "m n"],
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Float[np.ndarray, "m p"], Bool[np.ndarray, "m"]]:
    """Return (vectors, which have converged) of the same law under each row of weights.

    Each starts where the complete table's fit ended. `progress`: see Problem.polish.
    """
    fixed_values = _fixed_values(fitted.law, fitted.fixed, fitted.middle)
    problem = Problem(
        law=fitted.law, x=x, y=y, middle=fitted.middle, delta=fitted.delta,
        fixed_values=fixed_values,
    )  # fmt: skip
    starts = np.tile(fitted.vector, (len(weights), 1))
    vectors, _, done = problem.polish(starts, weights, progress)
    return vectors, done


def values(law: Law, vector: np.ndarray, middle: Columns) -> dict[str, float]:
    """Return the parameters as the papers write them, by name."""
    count = len(law.names)
    there = law.terms(tuple(vector[count:, None]), middle)
    named = {
        name: float(np.exp(u - t[0])) for name, u, t in zip(law.names, vector, there, strict=False)
    }
    for exponent, value in zip(law.exponents, vector[count:], strict=True):
        named[exponent.name] = float(np.exp(value) if exponent.log else value)
    if "A/B" in named:
        named["A"] = named["A/B"] * named["B"]
    return named


def predict(
    law: Law, vectors: Shaped[np.ndarray, "p m"], x: Columns, middle: Columns
) -> Shaped[np.ndarray, "m n"]:
    """Return the prediction of each column of `vectors`; complex in, complex out."""
    count = len(law.names)
    terms = _relative_terms(law, tuple(vectors[count:, :, None]), x, middle)
    signed = zip(law.signs, vectors[:count, :, None], terms, strict=True)
    return sum(sign * np.exp(u + term) for sign, u, term in signed)


def huber(r: Float[np.ndarray, "*n"], delta: float) -> Float[np.ndarray, "*n"]:
    """Return r^2 / 2 up to delta, linear beyond. [0.5, 3], delta 1 -> [0.125, 2.5]."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One law and table. A column of `x` may be [m, n]: different for each row of the weights."""

    law: Law
    x: Columns
    y: np.ndarray
    middle: Columns
    delta: float
    fixed_values: dict[int, float]  # index in the vector -> value

    def evaluate(
        self, vectors: Float[np.ndarray, "m p"], weights: Float[np.ndarray, "m n"]
    ) -> newton.Local:
        """Return the objective around each vector, under its row of weights.

        The Hessian is that of the Huber loss: a row beyond delta has a constant gradient and
        curves only through the law. Second derivatives of ln |term| are left out; they are 0 except
        for the laws `rectified` and `data_constrained`.
        """
        log = self.law.log
        with np.errstate(all="ignore"):
            terms, slopes = parts(self.law, vectors, self.x, self.middle)
            prediction = terms.sum(1)
            r = np.log(prediction) - np.log(self.y) if log else prediction - self.y
        lost = ~np.isfinite(r).all(1)  # outside the law's domain: no step goes there
        terms[lost], slopes[lost], prediction[lost], r[lost] = 0.0, 0.0, 1.0, 0.0
        slope = jacobian(terms, slopes) / (prediction[:, None] if log else 1.0)
        pull = weights * np.clip(r, -self.delta, self.delta)
        curvature = weights * (np.abs(r) <= self.delta) - (pull if log else 0.0)
        reweighted = weights * self.delta / np.maximum(np.abs(r), self.delta)
        return newton.Local(
            value=np.where(lost, np.inf, (weights * huber(r, self.delta)).sum(1)),
            gradient=np.einsum("mpn,mn->mp", slope, pull),
            hessian=(slope * curvature[:, None]) @ np.swapaxes(slope, 1, 2)
            + _second(terms * (pull / prediction if log else pull)[:, None], slopes),
            diagonal=np.einsum("mpn,mn->mp", slope**2, reweighted),
        )

    def polish(
        self,
        starts: Float[np.ndarray, "m p"],
        weights: Float[np.ndarray, "m n"],
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[Float[np.ndarray, "m p"], Float[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
        """Return (vectors, objectives, which have converged) from each start.

        Each start has its own row of weights. `progress` receives how many more are done.
        """
        low, high = np.array(self.bounds()).T
        size, results = max(1, CACHE // weights.shape[1]), []
        for first in range(0, len(weights), size):
            indices = np.arange(first, min(first + size, len(weights)))
            results.append(
                newton.minimize(
                    lambda vectors, which, indices=indices: self._only(indices[which]).evaluate(
                        vectors, weights[indices[which]]
                    ),
                    starts[indices],
                    low,
                    high,
                )
            )
            progress(len(indices))
        return tuple(np.concatenate(each) for each in zip(*results, strict=True))

    def _only(self, rows: Int[np.ndarray, "k"]) -> "Problem":
        """Return the problem with these rows of the columns that are per row of the weights."""
        if all(column.ndim == 1 for column in self.x.values()):
            return self
        x = {name: c if c.ndim == 1 else c[rows] for name, c in self.x.items()}
        return dataclasses.replace(self, x=x)

    def bounds(self) -> list[tuple[float, float]]:
        count = len(self.law.names)
        each = [(LOWEST, 25.0)] * count + [(e.low, e.high) for e in self.law.exponents]
        return [
            (self.fixed_values.get(i, lo), self.fixed_values.get(i, hi))
            for i, (lo, hi) in enumerate(each)
        ]

    def starts(self, weights: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m p"]:
        """Return the best points of the grid of exponents, with their coefficients."""
        count = len(self.law.names)
        axes = [
            np.array([self.fixed_values[count + i]])
            if count + i in self.fixed_values
            else np.linspace(e.low, e.high, e.points + 1)[1:]  # at 0 a term is a constant
            for i, e in enumerate(self.law.exponents)
        ]
        grid = np.array(list(itertools.product(*axes))).T  # [exponents, points]
        size = max(1, CHUNK // (len(self.y) * count))
        projected = [
            self._project(grid[:, i : i + size], weights) for i in range(0, grid.shape[1], size)
        ]
        coefficients, reached = (np.concatenate(arrays) for arrays in zip(*projected, strict=True))
        order = np.argsort(reached)[:STARTS]
        u = np.log(np.maximum(coefficients[order], np.exp(LOWEST)))
        return np.concatenate([u, grid.T[order]], axis=1)

    def _project(self, grid: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, per point of the grid: coefficients by reweighted least squares, objective."""
        terms = _relative_terms(self.law, tuple(grid[:, :, None]), self.x, self.middle)
        shape = (grid.shape[1], len(self.y))
        signed = zip(self.law.signs, terms, strict=True)
        basis = np.stack([s * np.broadcast_to(np.exp(t), shape) for s, t in signed], axis=-1)
        scale = 1 / self.y if self.law.log else np.ones_like(self.y)
        basis, target = basis * scale[:, None], self.y * scale  # relative errors, about ln ratios
        pull = np.broadcast_to(weights, shape)
        for _ in range(IRLS):
            coefficients = nonnegative(basis, target, pull)
            r = (basis @ coefficients[:, :, None])[:, :, 0] - target
            pull = weights * self.delta / np.maximum(np.abs(r), self.delta)
        if self.law.log:
            r = np.log(np.maximum(1 + r, 1e-300))
        return coefficients, huber(r, self.delta) @ weights


def nonnegative(
    basis: Float[np.ndarray, "g n k"],
    target: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "g n"],
) -> Float[np.ndarray, "g k"]:
    """Solve weighted least squares with coefficients >= 0, trying all sets of zeros (k <= 3)."""
    weighted = basis * weights[:, :, None]
    gram = np.swapaxes(weighted, 1, 2) @ basis
    right = np.swapaxes(weighted, 1, 2) @ target
    k = basis.shape[2]
    ridge = 1e-13 * np.einsum("gii->g", gram)[:, None, None]
    best, reached = np.zeros((len(basis), k)), np.full(len(basis), np.inf)
    for used in (s for r in range(1, k + 1) for s in itertools.combinations(range(k), r)):
        at = np.array(used)
        square = gram[:, at[:, None], at] + ridge * np.eye(len(at))
        solution = np.linalg.solve(square, right[:, at, None])[:, :, 0]
        gain = -np.einsum("gk,gk->g", solution, right[:, at])  # the objective up to a constant
        better = (solution >= 0).all(1) & (gain < reached)
        reached = np.where(better, gain, reached)
        padded = np.zeros_like(best)
        padded[:, at] = solution
        best = np.where(better[:, None], padded, best)
    return best


def _fixed_values(law: Law, fixed: Mapping[str, float], middle: Columns) -> dict[int, float]:
    """Return index in the vector -> its value; a coefficient only if its term has no exponent."""
    names, fixed_values = {e.name: e for e in law.exponents}, {}
    ones = tuple(np.ones((1, 1)) for _ in law.exponents)
    twos = tuple(np.full((1, 1), 2.0) for _ in law.exponents)
    there = list(zip(law.names, law.terms(ones, middle), law.terms(twos, middle), strict=True))
    constant = {name: float(t.item()) for name, t, other in there if t.item() == other.item()}
    for name, value in fixed.items():
        if value <= 0:
            raise ScalingError(f"--fix {name}={value:g}: it must be above 0")
        if name in constant:
            fixed_values[law.names.index(name)] = float(np.log(value) + constant[name])
        elif name in names:
            internal = float(np.log(value) if names[name].log else value)
            fixed_values[law.parameters.index(name)] = internal
        else:
            allowed = ", ".join((*constant, *names))
            raise ScalingError(f"--fix {name}: law {law.name} can fix only {allowed}")
    return fixed_values


def _middle(law: Law, name: str, column: np.ndarray) -> float:
    """Return the geometric mean; for a loss in an exponential the arithmetic mean."""
    return float(np.mean(column) if name == "loss" else np.exp(np.mean(np.log(column))))


def _relative_terms(law: Law, exponents: tuple, x: Columns, middle: Columns) -> list[np.ndarray]:
    there = law.terms(exponents, middle)
    return [t - m for t, m in zip(law.terms(exponents, x), there, strict=True)]


def parts(
    law: Law, vectors: Float[np.ndarray, "m p"], x: Columns, middle: Columns
) -> tuple[Float[np.ndarray, "m k n"], Float[np.ndarray, "m e k n"]]:
    """Return each signed term of the prediction, and d ln |term| / d exponent by a complex step."""
    count, shape = len(law.names), (len(vectors), next(iter(x.values())).shape[-1])

    def relative(exponents: list[np.ndarray]) -> np.ndarray:
        terms = _relative_terms(law, tuple(exponents), x, middle)
        return np.stack([np.broadcast_to(term, shape) for term in terms], axis=1)

    exponents = [vectors[:, i, None] for i in range(count, vectors.shape[1])]
    signs = np.array(law.signs)[:, None]
    terms = signs * np.exp(vectors[:, :count, None] + relative(exponents))
    slopes = [
        relative([e + 1j * STEP if i == j else e for j, e in enumerate(exponents)]).imag / STEP
        for i in range(len(exponents))
    ]
    return terms, np.stack(slopes, axis=1)


def jacobian(
    terms: Float[np.ndarray, "m k n"], slopes: Float[np.ndarray, "m e k n"]
) -> Float[np.ndarray, "m p n"]:
    """Return d prediction / d vector: the terms themselves for each u, then the exponents."""
    return np.concatenate([terms, np.einsum("mkn,mekn->men", terms, slopes)], axis=1)


def _second(
    pulled: Float[np.ndarray, "m k n"], slopes: Float[np.ndarray, "m e k n"]
) -> Float[np.ndarray, "m p p"]:
    """Return second derivatives of the prediction, summed over rows; `pulled`: weighted terms."""
    m, k, _ = pulled.shape
    hessian = np.zeros((m, k + slopes.shape[1], k + slopes.shape[1]))
    hessian[:, np.arange(k), np.arange(k)] = pulled.sum(2)
    hessian[:, :k, k:] = np.einsum("mkn,mekn->mke", pulled, slopes)
    hessian[:, k:, :k] = np.swapaxes(hessian[:, :k, k:], 1, 2)
    hessian[:, k:, k:] = np.einsum("mkn,mekn,mfkn->mef", pulled, slopes, slopes)
    return hessian


def _model(
    law: Law, vector: np.ndarray, x: Columns, middle: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """Return (prediction or its logarithm [n], its derivatives [parameters, n])."""
    with np.errstate(all="ignore"):
        terms, slopes = parts(law, vector[None], x, middle)
        value, slope = terms[0].sum(0), jacobian(terms, slopes)[0]
        return (np.log(value), slope / value) if law.log else (value, slope)
