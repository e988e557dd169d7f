"""A law to a table: variable projection over a grid of exponents, then a polish of all parameters.

    minimise   sum_i w_i Huber_delta(ln prediction_i - ln y_i)      summed, never averaged

The sum matters: scipy's tolerances are relative to max(|f|, 1), so that a mean of about 1e-6 counts
as converged wherever it starts, which "confirms" any published constants given as a start.

Inside, a coefficient is the logarithm u of its term at the table's middle point, not ln A: ln A and
alpha of A / N^alpha with N near 1e10 are all but one parameter, u and alpha are not.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Shaped
from scipy import optimize

from medmax_jax.scaling.laws import Columns, Law, ScalingError

STEP = 1e-20  # of the complex step: derivatives exact to rounding
LOWEST = -25.0  # of u: a term of e^-25 of the prediction is none
CHUNK = 2_000_000  # numbers of one array of the grid
STARTS = 6  # of the grid's points, polished
IRLS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """`vector`: u of each coefficient, then each exponent as the search holds it."""

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
        """d ln prediction (or prediction) / d vector: [parameters, n]."""
        return _model(self.law, self.vector, x, self.middle)[1]


def fit(
    law: Law,
    x: Columns,
    y: Float[np.ndarray, "n"],
    *,
    delta: float,
    fixed: Mapping[str, float],
) -> Fit:
    """The best fit of the law. `fixed`: exponents that are given, by name, as the table shows."""
    middle = {n: np.array([_middle(law, n, v)]) for n, v in x.items() if n in law.columns}
    held = _held(law, fixed, middle)
    problem = Problem(law=law, x=x, y=y, middle=middle, delta=delta, held=held)
    weights = np.ones_like(y)
    ends = [problem.polish(start, weights) for start in problem.starts(weights)]
    best = min(ends, key=lambda end: end[1])
    return Fit(
        law=law, delta=delta, vector=best[0], middle=middle, objective=best[1], fixed=dict(fixed)
    )


def refit(
    found: Fit, x: Columns, y: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"]
) -> Fit:
    """The same law with weights of the rows, from where the whole table's fit ended."""
    held = _held(found.law, found.fixed, found.middle)
    problem = Problem(
        law=found.law, x=x, y=y, middle=found.middle, delta=found.delta, held=held
    )  # fmt: skip
    vector, objective = problem.polish(found.vector, weights, rounds=2)
    return dataclasses.replace(found, vector=vector, objective=objective)


def values(law: Law, vector: np.ndarray, middle: Columns) -> dict[str, float]:
    """The parameters as the papers write them, by name."""
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
    """Of each column of `vectors`; a complex vector gives a complex prediction."""
    count = len(law.names)
    terms = _relative_terms(law, tuple(vectors[count:, :, None]), x, middle)
    signed = zip(law.signs, vectors[:count, :, None], terms, strict=True)
    return sum(sign * np.exp(u + term) for sign, u, term in signed)


def huber(r: Float[np.ndarray, "*n"], delta: float) -> Float[np.ndarray, "*n"]:
    """r^2 / 2 up to delta, then as steep as there. [0.5, 3], delta 1 -> [0.125, 2.5]."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One law and table; only the weights of the rows change."""

    law: Law
    x: Columns
    y: np.ndarray
    middle: Columns
    delta: float
    held: dict[int, float]  # place in the vector -> value

    def value(self, vector: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """(objective, gradient)."""
        prediction, slope = _model(self.law, vector, self.x, self.middle)
        r = prediction - (np.log(self.y) if self.law.log else self.y)
        if not np.isfinite(r).all():
            return np.inf, np.zeros_like(vector)
        pull = weights * np.clip(r, -self.delta, self.delta)
        return float(weights @ huber(r, self.delta)), slope @ pull

    def polish(
        self, start: np.ndarray, weights: np.ndarray, *, rounds: int = 6
    ) -> tuple[np.ndarray, float]:
        """L-BFGS with bounds, begun anew until it finds nothing more; (vector, objective)."""
        tolerance = 1e-13 if rounds > 2 else 1e-10  # draws of a bootstrap need less
        best = np.clip(start, *np.array(self.bounds()).T)
        reached = self.value(best, weights)[0]
        for _ in range(rounds):
            scale = 1.0 / max(reached, 1e-300)

            def scaled(vector: np.ndarray, scale: float = scale) -> tuple[float, np.ndarray]:
                value, slope = self.value(vector, weights)
                return min(value * scale, 1e30), slope * scale

            end = optimize.minimize(
                scaled, best, jac=True, method="L-BFGS-B", bounds=self.bounds(),
                options=dict(maxiter=500, maxfun=1_500, ftol=tolerance, gtol=1e-9, maxcor=20),
            )  # fmt: skip
            gained = end.fun < 1 - 1e-9
            if end.fun <= 1:
                best, reached = end.x, float(end.fun / scale)
            if not gained or reached < 1e-24:  # an exact table
                break
        return best, reached

    def bounds(self) -> list[tuple[float, float]]:
        count = len(self.law.names)
        each = [(LOWEST, 25.0)] * count + [(e.low, e.high) for e in self.law.exponents]
        return [(self.held.get(i, lo), self.held.get(i, hi)) for i, (lo, hi) in enumerate(each)]

    def starts(self, weights: np.ndarray) -> list[np.ndarray]:
        """The best points of the grid of exponents, with their coefficients."""
        count = len(self.law.names)
        axes = [
            np.array([self.held[count + i]])
            if count + i in self.held
            else np.linspace(e.low, e.high, e.points + 1)[1:]  # at 0 a term is a constant
            for i, e in enumerate(self.law.exponents)
        ]
        grid = np.array(list(itertools.product(*axes))).T  # [exponents, points]
        size = max(1, CHUNK // (len(self.y) * count))
        parts = [
            self._project(grid[:, i : i + size], weights) for i in range(0, grid.shape[1], size)
        ]
        coefficients, reached = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.argsort(reached)[:STARTS]
        u = np.log(np.maximum(coefficients[order], np.exp(LOWEST)))
        return list(np.concatenate([u, grid.T[order]], axis=1))

    def _project(self, grid: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each point of the grid: coefficients by reweighted least squares, objective."""
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
    """Weighted least squares with coefficients >= 0: every choice of zeros is tried (k <= 3)."""
    weighted = basis * weights[:, :, None]
    gram = np.swapaxes(weighted, 1, 2) @ basis
    right = np.swapaxes(weighted, 1, 2) @ target
    k = basis.shape[2]
    ridge = 1e-13 * np.einsum("gii->g", gram)[:, None, None]
    best, reached = np.zeros((len(basis), k)), np.full(len(basis), np.inf)
    for used in (s for r in range(1, k + 1) for s in itertools.combinations(range(k), r)):
        at = np.array(used)
        square = gram[:, at[:, None], at] + ridge * np.eye(len(at))
        found = np.linalg.solve(square, right[:, at, None])[:, :, 0]
        gain = -np.einsum("gk,gk->g", found, right[:, at])  # the objective but for a constant
        better = (found >= 0).all(1) & (gain < reached)
        reached = np.where(better, gain, reached)
        whole = np.zeros_like(best)
        whole[:, at] = found
        best = np.where(better[:, None], whole, best)
    return best


def _held(law: Law, fixed: Mapping[str, float], middle: Columns) -> dict[int, float]:
    """Place in the vector -> its value there; a coefficient only where its term has no exponent."""
    names, held = {e.name: e for e in law.exponents}, {}
    ones = tuple(np.ones((1, 1)) for _ in law.exponents)
    twos = tuple(np.full((1, 1), 2.0) for _ in law.exponents)
    there = list(zip(law.names, law.terms(ones, middle), law.terms(twos, middle), strict=True))
    constant = {name: float(t.item()) for name, t, other in there if t.item() == other.item()}
    for name, value in fixed.items():
        if value <= 0:
            raise ScalingError(f"--fix {name}={value:g}: it must be above 0")
        if name in constant:
            held[law.names.index(name)] = float(np.log(value) + constant[name])
        elif name in names:
            given = float(np.log(value) if names[name].log else value)
            held[law.parameters.index(name)] = given
        else:
            can = ", ".join((*constant, *names))
            raise ScalingError(f"--fix {name}: law {law.name} can hold {can}, nothing else")
    return held


def _middle(law: Law, name: str, column: np.ndarray) -> float:
    """Geometric mean; of a loss in an exponential the plain one."""
    return float(np.mean(column) if name == "loss" else np.exp(np.mean(np.log(column))))


def _relative_terms(law: Law, exponents: tuple, x: Columns, middle: Columns) -> list[np.ndarray]:
    there = law.terms(exponents, middle)
    return [t - m for t, m in zip(law.terms(exponents, x), there, strict=True)]


def _model(
    law: Law, vector: np.ndarray, x: Columns, middle: Columns
) -> tuple[np.ndarray, np.ndarray]:
    """(prediction or its logarithm [n], its derivatives [parameters, n]) by a complex step."""
    steps = vector[:, None] + 1j * STEP * np.eye(len(vector))
    with np.errstate(all="ignore"):
        out = predict(law, steps, x, middle)
        value, slope = out[0].real, out.imag / STEP
        return (np.log(value), slope / value) if law.log else (value, slope)
