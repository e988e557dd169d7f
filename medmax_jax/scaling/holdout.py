"""What a law fitted to small runs says of larger ones that it has not seen.

by compute   the fifth of the runs with the most params x tokens is held out
by a column  the runs of the largest value of it: the largest size, the most data; the
                 fifth with the largest where nearly every run has a value of its own
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from medmax_jax.scaling import fit as fitting
from medmax_jax.scaling import identify
from medmax_jax.scaling.laws import Law, ScalingError
from medmax_jax.scaling.table import Table

SHARE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Errors are prediction / truth - 1; `why` is set where there is no such fit."""

    name: str
    count: int
    errors: np.ndarray
    why: str

    @property
    def mean_size(self) -> float | None:
        return None if self.why else float(np.abs(self.errors).mean())


def all_of(law: Law, table: Table, *, delta: float, fixed: Mapping[str, float]) -> list[Held]:
    """Every way of holding out that the table's columns give."""
    ways = {"the fifth with the most compute": _top(_compute(table))}
    for name in ("params", "tokens"):
        if name in table.x and len(np.unique(table.x[name])) > 1:
            ways[f"the largest {name}"] = _largest(table.x[name])
    return [hold(law, table, keep, n, delta=delta, fixed=fixed) for n, keep in ways.items()]


def hold(
    law: Law, table: Table, out: Bool[np.ndarray, "n"], name: str, *, delta: float,
    fixed: Mapping[str, float],
) -> Held:  # fmt: skip
    """The law fitted without the rows `out`, and its errors on them."""
    rest, none = table.part(~out), np.zeros(0)
    try:
        identify.check(law, rest, fixed)
        found = fitting.fit(law, rest.x, rest.y, delta=delta, fixed=fixed)
    except ScalingError as error:
        return Held(name=name, count=int(out.sum()), errors=none, why=str(error))
    left = table.part(out)
    return Held(name=name, count=int(out.sum()), errors=found.predict(left.x) / left.y - 1, why="")


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
