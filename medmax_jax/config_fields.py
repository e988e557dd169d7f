"""Builds frozen dataclasses from dicts, as config files and JSON contain them.

    {"rank": 8, "alpha": 16, "dropout": 0.05}  --build-->  Lora(rank=8, alpha=16.0, dropout=0.05)

The fields' types decide what is accepted: sections, lists of sections, names, numbers and texts.
Unknown, missing and mistyped fields raise ConfigError.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from medmax_jax.arguments import nearest
from medmax_jax.io.errors import FileError, printable, quoted

MAX_LIST = 8  # entries of a list of numbers; the levels of a VQGAN
MAX_SECTIONS = 64  # of a list of sections; the stages of a run


class ConfigError(FileError):
    """Raised for an unusable config; the message gives the field, the value and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the types do not state, by "class.field" in lower case."""

    bounds: Mapping[str, tuple[float, float]]  # smallest and largest value of a number
    added: Mapping[str, Any]  # value of a field that older settings lack


def build(cls: type, values: Any, where: str, rules: Rules) -> Any:
    """Return an object of `cls`; `where` is the name of `values` in messages."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} is {quoted(values)}; it must be a section with the fields {_names(cls)}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(map(str, set(values) - set(fields))):
        name = printable(unknown[0], 80)
        near = nearest(name, fields)
        hint = f"did you mean {where}.{near}? The" if near else "the"
        raise ConfigError(f"{where}.{name} is not a field; {hint} fields are {_names(cls)}")
    section, added = cls.__name__.lower(), rules.added
    values = {n: added[f"{section}.{n}"] for n in fields if f"{section}.{n}" in added} | values
    if missing := sorted(set(fields) - set(values)):
        raise ConfigError(
            f"{where}.{missing[0]} is missing; set it (configs/base.py lists all fields)"
        )
    return cls(**{n: _field(cls, f, values[n], f"{where}.{n}", rules) for n, f in fields.items()})


def check_bounds(bounds: tuple[float, float], value: Any, where: str) -> None:
    """Raise ConfigError unless `value` is within its bounds; `where` appears in the message.

    An integer is required where the bounds are integers. NaN is outside all bounds.
    """
    low, high = bounds
    types_allowed = (int,) if type(low) is int else (int, float)
    if type(value) not in types_allowed:
        kind = "an integer" if type(low) is int else "a number"
        raise ConfigError(f"{where} is {quoted(value)}; it must be {kind}")
    if not low <= value <= high:
        allowed = "above 0" if low == 1 and value < low else f"in {low}..{high}"
        raise ConfigError(f"{where} is {quoted(value)}; it must be {allowed}")


def merge(own: Any, given: Any) -> Any:
    """Return `own` with the values of `given`, of nested sections too; anything else unchanged."""
    if not isinstance(own, dict) or not isinstance(given, dict):
        return given
    return own | {name: merge(own.get(name), value) for name, value in given.items()}


def _field(cls: type, field: dataclasses.Field, value: Any, where: str, rules: Rules) -> Any:
    value = convert(field.type, value, where, rules)
    if bounds := rules.bounds.get(f"{cls.__name__.lower()}.{field.name}"):
        for number in value if isinstance(value, tuple) else (value,):
            check_bounds(bounds, number, where)
    return value


def convert(kind: Any, value: Any, where: str, rules: Rules) -> Any:
    """Return `value` as the type of a field; raise ConfigError if it is none."""
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where, rules)
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else convert(kind.__args__[0], value, where, rules)
    if typing.get_origin(kind) is tuple:
        return _convert_list(kind.__args__[0], value, where, rules)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{where} is {quoted(value)}; it must be a smaller number") from error
    if type(value) is not kind:
        raise ConfigError(
            f"{where} is {quoted(value)} ({type(value).__name__}); it must be {kind.__name__}"
        )
    return value


def _convert_list(kind: type, value: Any, where: str, rules: Rules) -> tuple[Any, ...]:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, (list, tuple)) or len(value) > MAX_SECTIONS:
            requirement = f"a list of at most {MAX_SECTIONS} sections"
            raise ConfigError(f"{where} is {quoted(value)}; it must be {requirement}")
        return tuple(build(kind, part, f"{where}[{n}]", rules) for n, part in enumerate(value))
    if kind is str:  # a list, or its names separated by commas
        names = [v for v in value.split(",") if v] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(type(v) is str for v in names):
            raise ConfigError(f"{where} is {quoted(value)}; it must be names separated by commas")
        return tuple(names)
    if not isinstance(value, (list, tuple)) or not all(type(v) is int for v in value):
        raise ConfigError(f"{where} is {quoted(value)}; it must be a list of integers")
    if not 0 < len(value) <= MAX_LIST:
        raise ConfigError(f"{where} has {len(value)} entries; it must have 1 to {MAX_LIST}")
    return tuple(value)


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))
