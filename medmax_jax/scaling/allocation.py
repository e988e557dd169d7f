"""Find the size and tokens of least loss for compute C = f N D under E + A/N^alpha + B/D^beta.

    N = G (C/f)^(beta/(alpha+beta))     D = (C/f) / N     G = (alpha A / (beta B))^(1/(alpha+beta))

Intervals come from the bootstrap's draws. A law of a product, A/(N^alpha D^beta), has no interior
optimum: all compute goes to the larger exponent, so none is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from medmax_jax.scaling import diagnostics

LAWS = ("chinchilla", "tied")
Values = Mapping[str, Float[np.ndarray, "..."] | float]


def optimal_allocation(
    values: Values, compute: Float[np.ndarray, "..."] | float, *, flops: float
) -> dict[str, Float[np.ndarray, "..."] | float]:
    """Return size, tokens, tokens per parameter and loss; `flops`: of one token, per parameter."""
    alpha, beta = values["alpha"], values.get("beta", values["alpha"])
    ratio = (alpha * values["A"] / (beta * values["B"])) ** (1 / (alpha + beta))
    product = compute / flops
    params = ratio * product ** (beta / (alpha + beta))
    tokens = product / params
    loss = values["E"] + values["A"] / params**alpha + values["B"] / tokens**beta
    return dict(params=params, tokens=tokens, tokens_per_param=tokens / params, loss=loss)


def table(
    fitted: Mapping[str, float],
    draws: Mapping[str, np.ndarray],
    budgets: Sequence[float],
    *,
    flops: float,
) -> list[dict[str, Any]]:
    """Return one row per budget: each number with its interval."""
    rows = []
    for budget in budgets:
        best, spread = (optimal_allocation(v, budget, flops=flops) for v in (fitted, draws))
        row: dict[str, Any] = {"compute": budget}
        for name, value in best.items():
            row[name] = float(value)
            row[f"{name}_interval"] = list(diagnostics.interval(spread[name], diagnostics.LEVEL))
        rows.append(row)
    return rows


def default_budgets(params: np.ndarray, tokens: np.ndarray, *, flops: float) -> list[float]:
    """Return the largest run's compute, ten and a hundred times that."""
    largest = float((flops * params * tokens).max())
    return [largest, 10 * largest, 100 * largest]


def exponent(values: Values) -> Float[np.ndarray, "..."] | float:
    """Return beta / (alpha + beta): by which power of compute the best size grows."""
    alpha, beta = values["alpha"], values.get("beta", values["alpha"])
    return beta / (alpha + beta)
