"""Define the laws: losses as sums of power laws, each with the paper that it is from.

    name              y =                                                        columns
    chinchilla        E + A / N^alpha + B / D^beta                               params tokens
    tied              E + A / N^alpha + B / D^alpha                              params tokens
    power             E + B / D^beta                                             tokens
    data_constrained  E + A / N'^alpha + B / D'^alpha, N' and D' of repeats      + unique_tokens
    finetune          E + A / (N^alpha D^beta)                                   params tokens
    rectified         E + B / (D_l + D^beta)                                     tokens
    accuracy          E - A exp(-gamma L)                                        loss

Every law is sum_j coefficient_j * term_j(x; exponents) with coefficients >= 0: a few exponents are
searched for, and the coefficients given the exponents are a small linear problem (fit.py).
The mixed-modal law builds on two of these and has its own module (mixed.py).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Shaped

Columns = Mapping[str, np.ndarray]  # name -> float64 [n]
Terms = tuple[np.ndarray, ...]  # each [..., n]


class ScalingError(ValueError):
    """A table, law or option that cannot be used; the message names it and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponent:
    """A parameter that terms depend on in a nonlinear way."""

    name: str
    low: float  # of the search; a fit that ends here is reported
    high: float
    points: int  # of the first grid
    log: bool  # the fit uses its logarithm, and the table of results its value
    column: str  # whose spread distinguishes its term from a constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """`terms(exponents, columns)`: ln |term_j|; `names`: of the coefficients."""

    name: str
    formula: str
    paper: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    signs: tuple[int, ...]
    exponents: tuple[Exponent, ...]
    terms: Callable[[tuple[Shaped[np.ndarray, "..."], ...], Columns], Terms]
    log: bool  # residuals of ln y; otherwise of y itself
    zeros: tuple[str, ...] = ()  # columns that may be 0

    @property
    def parameters(self) -> tuple[str, ...]:
        return (*self.names, *(e.name for e in self.exponents))


def _exponent(name: str, column: str, *, points: int = 46, high: float = 2.5) -> Exponent:
    """Return an exponent whose lower bound makes its term almost a constant."""
    return Exponent(name=name, low=1e-3, high=high, points=points, log=False, column=column)


def _zero(like: np.ndarray) -> np.ndarray:
    return np.zeros_like(like)


def _chinchilla(e: tuple, x: Columns) -> Terms:
    n, d = -e[0] * np.log(x["params"]), -e[1] * np.log(x["tokens"])
    return _zero(n), n, d


def _tied(e: tuple, x: Columns) -> Terms:
    return _chinchilla((e[0], e[0]), x)


def _power(e: tuple, x: Columns) -> Terms:
    d = -e[0] * np.log(x["tokens"])
    return _zero(d), d


def _finetune(e: tuple, x: Columns) -> Terms:
    term = -e[0] * np.log(x["params"]) - e[1] * np.log(x["tokens"])
    return _zero(term), term


def _rectified(e: tuple, x: Columns) -> Terms:
    d = -np.log(np.exp(e[1]) + np.exp(e[0] * np.log(x["tokens"])))
    return _zero(d), d


def _accuracy(e: tuple, x: Columns) -> Terms:
    shrunk = -e[0] * x["loss"]
    return _zero(shrunk), shrunk


def _data_constrained(e: tuple, x: Columns) -> Terms:
    """Return the terms of Muennighoff et al.

    Their G is computed from ln(A/B) here, so that E and B are the linear coefficients.
    """
    alpha, ratio, r_d, r_n = e
    params, unique = x["params"], x["unique_tokens"]
    epochs = np.maximum(x["tokens"] / unique - 1, 0)  # R_D: repeats beyond the first
    optimal = np.exp(ratio / alpha) * unique  # N that is compute-optimal for `unique` tokens
    base = np.where(np.real(optimal) < params, optimal, params)
    excess = params / base - 1  # R_N
    n = base * (1 - np.exp(r_n) * np.expm1(-excess * np.exp(-r_n)))
    d = unique * (1 - np.exp(r_d) * np.expm1(-epochs * np.exp(-r_d)))
    data, model = -alpha * np.log(d), ratio - alpha * np.log(n)
    return _zero(data), np.log(np.exp(data) + np.exp(model))


def _law(
    name: str,
    formula: str,
    paper: str,
    terms: Callable,
    *,
    columns: tuple[str, ...],
    names: tuple[str, ...],
    exponents: tuple[Exponent, ...],
    signs: tuple[int, ...] = (),
    log: bool = True,
) -> Law:
    """Return a law of losses, all of whose terms are added unless `signs` are given."""
    return Law(
        name=name, formula=formula, paper=paper, terms=terms, columns=columns, names=names,
        signs=signs or (1,) * len(names), exponents=exponents, log=log,
    )  # fmt: skip


LAWS = {
    law.name: law
    for law in (
        _law(
            "chinchilla",
            "E + A/N^alpha + B/D^beta",
            "Hoffmann et al. 2022, arXiv 2203.15556",
            _chinchilla,
            columns=("params", "tokens"),
            names=("E", "A", "B"),
            exponents=(_exponent("alpha", "params"), _exponent("beta", "tokens")),
        ),
        _law(
            "tied",
            "E + A/N^alpha + B/D^alpha",
            "Gadre et al. 2024, arXiv 2403.08540",
            _tied,
            columns=("params", "tokens"),
            names=("E", "A", "B"),
            exponents=(_exponent("alpha", "params", points=400),),
        ),
        _law(
            "power",
            "E + B/D^beta",
            "Hestness et al. 2017, arXiv 1712.00409",
            _power,
            columns=("tokens",),
            names=("E", "B"),
            exponents=(_exponent("beta", "tokens", points=400),),
        ),
        _law(
            "data_constrained",
            "E + A/N'^alpha + B/D'^alpha; D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' alike",
            "Muennighoff et al. 2023, arXiv 2305.16264",
            _data_constrained,
            columns=("params", "tokens", "unique_tokens"),
            names=("E", "B"),
            exponents=(
                _exponent("alpha", "params", points=16, high=1.5),
                Exponent(name="A/B", low=-12.0, high=12.0, points=16, log=True, column="params"),
                Exponent(
                    name="R_D", low=-3.0, high=7.0, points=8, log=True, column="unique_tokens"
                ),
                Exponent(
                    name="R_N", low=-3.0, high=7.0, points=4, log=True, column="unique_tokens"
                ),
            ),
        ),
        _law(
            "finetune",
            "E + A/(N^alpha D^beta)",
            "Zhang et al. 2024, arXiv 2402.17193",
            _finetune,
            columns=("params", "tokens"),
            names=("E", "A"),
            exponents=(_exponent("alpha", "params"), _exponent("beta", "tokens")),
        ),
        _law(
            "rectified",
            "E + B/(D_l + D^beta)",
            "Lin et al. 2024, arXiv 2402.02314",
            _rectified,
            columns=("tokens",),
            names=("E", "B"),
            exponents=(
                _exponent("beta", "tokens", points=60),
                Exponent(name="D_l", low=-5.0, high=45.0, points=100, log=True, column="tokens"),
            ),
        ),
        _law(
            "accuracy",
            "E - A exp(-gamma L)",
            "Gadre et al. 2024, arXiv 2403.08540",
            _accuracy,
            columns=("loss",),
            names=("E", "A"),
            signs=(1, -1),
            exponents=(_exponent("gamma", "loss", points=400, high=10.0),),
            log=False,
        ),
    )
}
