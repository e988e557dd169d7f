"""Minimize many small functions of one kind at once, within bounds, by damped Newton steps.

    starts [m, p] --steps of all that are not done, together--> vectors [m, p], values [m]

A bootstrap needs a thousand fits of one table; m separate minimizations spend their time between
calls of NumPy. The damping is Levenberg's, relative to a diagonal that bounds the curvature from
above, so that a large damping always descends; a direction of negative curvature is followed
downwards. No call of BLAS or LAPACK here is large enough to start threads.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

ROUNDS = 2_000
TOLERANCE = 1e-12  # of the value: what an undamped step would still gain
EXACT = 1e-24  # a value below is 0
DAMPING = 1e-2  # at the start, of the scaled Hessian
EASED, RAISED = 1 / 2, 4.0  # after a step that descends, and after one that does not
LEAST, MOST = 1e-14, 1e8  # of the damping; beyond MOST rounding hides any descent
FLAT = 1e-10  # an eigenvalue of the scaled Hessian below which a direction is flat


@dataclasses.dataclass(frozen=True)
class Local:
    """Functions around m vectors. `diagonal`: positive, at least as large as the curvature."""

    value: Float[np.ndarray, "m"]
    gradient: Float[np.ndarray, "m p"]
    hessian: Float[np.ndarray, "m p p"]
    diagonal: Float[np.ndarray, "m p"]

    def part(self, keep: Bool[np.ndarray, "m"]) -> "Local":
        """Return the functions selected by `keep`."""
        return Local(*(each[keep] for each in self._arrays()))

    def take(self, other: "Local", where: Bool[np.ndarray, "m"]) -> None:
        """Overwrite the functions selected by `where` with those of `other`."""
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            mine[where] = theirs[where]

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.value, self.gradient, self.hessian, self.diagonal


def minimize(
    evaluate: Callable[[Float[np.ndarray, "k p"], Int[np.ndarray, "k"]], Local],
    starts: Float[np.ndarray, "m p"],
    low: Float[np.ndarray, "p"],
    high: Float[np.ndarray, "p"],
) -> tuple[Float[np.ndarray, "m p"], Float[np.ndarray, "m"], Bool[np.ndarray, "m"]]:
    """Return (vectors, values, which have converged).

    `evaluate(vectors, which)` returns the functions numbered `which` around `vectors`.
    """
    vectors = np.clip(starts, low, high)
    todo, damping = np.arange(len(vectors)), np.full(len(vectors), DAMPING)
    now = evaluate(vectors, todo)
    values = now.value.copy()
    for _ in range(ROUNDS):
        step, gain = _step(now, vectors[todo], low, high, damping)
        trial = np.clip(vectors[todo] + step, low, high)
        new = evaluate(trial, todo)
        better = new.value < now.value
        vectors[todo[better]] = trial[better]
        now.take(new, better)
        values[todo] = now.value
        damping = np.where(better, np.maximum(damping * EASED, LEAST), damping * RAISED)
        left = (gain > TOLERANCE * now.value) & (damping < MOST) & (now.value > EXACT)
        todo, damping, now = todo[left], damping[left], now.part(left)
        if not len(todo):
            break
    return vectors, values, ~np.isin(np.arange(len(vectors)), todo)


def _step(
    now: Local,
    vectors: Float[np.ndarray, "m p"],
    low: Float[np.ndarray, "p"],
    high: Float[np.ndarray, "p"],
    damping: Float[np.ndarray, "m"],
) -> tuple[Float[np.ndarray, "m p"], Float[np.ndarray, "m"]]:
    """Return (the damped step, what an undamped one would gain); bounds hold parameters fixed."""
    at_bound = (
        (vectors <= low) & (now.gradient > 0)
        | (vectors >= high) & (now.gradient < 0)
        | (low == high)
    )
    scale = np.where(at_bound, 0.0, 1 / np.sqrt(now.diagonal + 1e-300))
    curvature, basis = np.linalg.eigh(now.hessian * scale[:, :, None] * scale[:, None, :])
    curvature = np.abs(curvature)
    pull = np.einsum("mpk,mp->mk", basis, now.gradient * scale)
    step = np.einsum("mpk,mk->mp", basis, -pull / (curvature + damping[:, None])) * scale
    return step, 0.5 * (pull**2 / np.maximum(curvature, FLAT)).sum(1)
