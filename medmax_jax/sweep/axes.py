"""Convert the axes of a sweep file, dicts of one key, to lists of overrides: their product.

    {"grid": {"optim.peak_lr": (1e-3, 1e-4), "lora.rank": (8, 16)}}          every combination: 4
    {"zip": {"model.num_layers": (2, 4), "model.hidden_size": (64, 128)}}    in parallel: 2
    {"fixed": {"train.eval_every": 0}}                                       1
    {"log_range": {"field": "optim.peak_lr", "low": 1e-4, "high": 1e-2, "count": 3}}
    {"random": {"count": 8, "seed": 0, "fields": {"optim.peak_lr": ("log", 1e-4, 1e-2),
                "lora.dropout": ("uniform", 0.0, 0.2), "lora.rank": ("choice", 4, 8, 16)}}}
    {"data_fraction": {"fractions": (0.25, 0.5, 1.0), "steps": 551_000}}     steps go with the data
    {"n_by_d": {"sizes": ({"model.num_layers": 2}, ...), "tokens": (1e6, 4e6)}}
    {"isoflop": {"sizes": (...), "flops": (1e12, 1e13)}}                     each size at equal cost
    {"lora_rank": {"ranks": (4, 8, 16), "alpha_over_rank": 1.0}}
    {"leave_out": {"by": "task", "names": ("", "VQA")}}                      with and without
    {"seeds": (0, 1, 2)}                                                     of training and order
    {"product": (axis, axis)}  {"union": (axis, axis)}                       of other axes

`tokens` and `flops` are not fields of a run: expand.py turns them into train.steps.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Overrides = dict[str, Any]  # dotted field -> value
DERIVED_FIELDS = ("tokens", "flops")  # converted to train.steps


class SweepError(ValueError):
    """A sweep that cannot be expanded, run or collected; the message names the part and the fix."""


def expand(axes: Sequence[Mapping[str, Any]]) -> list[Overrides]:
    """Return every combination of the axes, in their order, the last axis fastest."""
    combinations = []
    for parts in itertools.product(*(_axis(axis) for axis in axes)):
        names = [name for part in parts for name in part]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise SweepError(f"axes: {twice[0]} is set by two axes; set it in only one")
        combinations.append({name: value for part in parts for name, value in part.items()})
    return combinations


def _axis(axis: Mapping[str, Any]) -> list[Overrides]:
    if not isinstance(axis, Mapping) or len(axis) != 1:
        raise SweepError(
            f"axes: {axis!r} is not an axis; use a dict with one key of {', '.join(KINDS)}"
        )
    ((kind, given),) = axis.items()
    if kind not in KINDS:
        raise SweepError(f"axes: {kind!r} is unknown; use one of {', '.join(KINDS)}")
    return KINDS[kind](given)


def _grid(given: Mapping[str, Any]) -> list[Overrides]:
    columns = [_values("grid", name, values) for name, values in given.items()]
    return [dict(zip(given, row, strict=True)) for row in itertools.product(*columns)]


def _zip(given: Mapping[str, Any]) -> list[Overrides]:
    columns = [_values("zip", name, values) for name, values in given.items()]
    if len({len(c) for c in columns}) != 1:
        sizes = ", ".join(f"{n} {len(c)}" for n, c in zip(given, columns, strict=True))
        raise SweepError(
            f"axes: zip requires the same number of values for each field; it has {sizes}"
        )
    return [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]


def _fixed(given: Mapping[str, Any]) -> list[Overrides]:
    return [dict(given)]


def _log_range(given: Mapping[str, Any]) -> list[Overrides]:
    field, low, high, count = _fields("log_range", given, ("field", "low", "high", "count"))
    if not (0 < low < high and count >= 2):
        raise SweepError(
            f"axes: log_range of {field} is {given}; it requires 0 < low < high and count >= 2"
        )
    return [{field: _rounded(v)} for v in np.geomspace(low, high, count)]


def _random(given: Mapping[str, Any]) -> list[Overrides]:
    count, seed, fields = _fields("random", given, ("count", "seed", "fields"))
    rng = np.random.default_rng(seed)
    return [{name: _sample(rng, name, how) for name, how in fields.items()} for _ in range(count)]


def _sample(rng: np.random.Generator, name: str, how: Sequence) -> Any:
    kind, *rest = how
    if kind == "choice" and rest:
        return rest[int(rng.integers(len(rest)))]
    if kind == "uniform" and len(rest) == 2:
        return _rounded(rng.uniform(*rest))
    if kind == "log" and len(rest) == 2 and rest[0] > 0:
        return _rounded(math.exp(rng.uniform(*map(math.log, rest))))
    raise SweepError(
        f"axes: random {name} is {how!r}; use ('log', low, high), ('uniform', low, high) or "
        "('choice', a, b, ...)"
    )


def _data_fraction(given: Mapping[str, Any]) -> list[Overrides]:
    fractions, steps = _fields("data_fraction", given, ("fractions", "steps"))
    return [
        {"mixing.fraction": f, "train.steps": max(1, round(f * steps))}
        for f in _values("data_fraction", "fractions", fractions)
    ]


def _sizes_by(amount: str) -> Callable[[Mapping[str, Any]], list[Overrides]]:
    kind = {"tokens": "n_by_d", "flops": "isoflop"}[amount]

    def axis(given: Mapping[str, Any]) -> list[Overrides]:
        sizes, amounts = _fields(kind, given, ("sizes", amount))
        amounts = _values(kind, amount, amounts)
        return [{**size, amount: float(a)} for size in sizes for a in amounts]

    return axis


def _lora_rank(given: Mapping[str, Any]) -> list[Overrides]:
    ranks, ratio = _fields("lora_rank", given, ("ranks", "alpha_over_rank"))
    ranks = _values("lora_rank", "ranks", ranks)
    return [{"lora.rank": r, "lora.alpha": float(r * ratio)} for r in ranks]


def _leave_out(given: Mapping[str, Any]) -> list[Overrides]:
    by, names = _fields("leave_out", given, ("by", "names"))
    return [{"mixing.by": by, "mixing.leave_out": n} for n in _values("leave_out", "names", names)]


def _seeds(given: Any) -> list[Overrides]:
    return [{"train.seed": s, "data.seed": s} for s in _values("seeds", "seeds", given)]


def _product(given: Sequence[Mapping[str, Any]]) -> list[Overrides]:
    return expand(given)


def _union(given: Sequence[Mapping[str, Any]]) -> list[Overrides]:
    return [overrides for axis in given for overrides in _axis(axis)]


KINDS: dict[str, Callable[[Any], list[Overrides]]] = {
    "grid": _grid,
    "zip": _zip,
    "fixed": _fixed,
    "log_range": _log_range,
    "random": _random,
    "data_fraction": _data_fraction,
    "n_by_d": _sizes_by("tokens"),
    "isoflop": _sizes_by("flops"),
    "lora_rank": _lora_rank,
    "leave_out": _leave_out,
    "seeds": _seeds,
    "product": _product,
    "union": _union,
}


def _values(kind: str, name: str, values: Any) -> list:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise SweepError(f"axes: {kind} {name} is {values!r}; it must be a tuple of values")
    return list(values)


def _fields(kind: str, given: Any, names: Sequence[str]) -> list[Any]:
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise SweepError(f"axes: {kind} has {sorted(given)}; it must have {', '.join(names)}")
    return [given[name] for name in names]


def _rounded(value: float) -> float:
    """Round to six digits: a drawn value can be written on a command line and read back."""
    return float(f"{value:.6g}")
