"""Whether a table can tell a law's parameters at all: asked before the fit, and of its end.

chinchilla on runs of one size        A and alpha are one number: refused
chinchilla where tokens = 20 params   alpha and beta are one number: refused, `tied` is not
finetune on one model size            refused; the mend is the law `power`
"""

from collections.abc import Mapping

import numpy as np

from medmax_jax.scaling.fit import Fit
from medmax_jax.scaling.laws import Law, ScalingError
from medmax_jax.scaling.table import Table

FEW = 3  # distinct values of a column below which its exponent leans on the other columns alone
ALIGNED = 1e-6  # 1 - r^2 of ln params and ln tokens


def check(law: Law, table: Table, fixed: Mapping[str, float]) -> list[str]:
    """Warnings; raises ScalingError where parameters cannot be told apart."""
    free = [p for p in law.parameters if p not in fixed]
    if len(table) <= len(free):
        raise ScalingError(
            f"too few points for law {law.name}: {len(table)} runs, {len(free)} parameters "
            f"({', '.join(free)}); give at least {len(free) + 1}, or a law with fewer parameters"
        )
    warnings = []
    searched = [e for e in law.exponents if e.name not in fixed]
    for column in dict.fromkeys(e.column for e in searched):
        distinct = len(np.unique(table.x[column]))
        named = " and ".join(e.name for e in searched if e.column == column)
        if distinct < 2:
            raise ScalingError(
                f"law {law.name} is not identified: every run has {column} = "
                f"{table.x[column][0]:g}, so that {named} and its coefficient are one number; "
                + _mend(law, column)
            )
        if distinct < FEW:
            warnings.append(f"only {distinct} distinct {column}: {named} has no check")
    if law.name in ("chinchilla", "finetune") and len(searched) == 2:
        _check_aligned(law, table)
    if law.name == "data_constrained" and "R_D" not in fixed:
        if (table.x["tokens"] <= table.x["unique_tokens"]).all():
            raise ScalingError(
                "law data_constrained is not identified: no run has seen its data twice, so that "
                "R_D is free; use the law tied, or give repeated runs"
            )
    return warnings


def check_end(found: Fit, table: Table) -> None:
    """Raises ScalingError where a parameter does not change one prediction at the fit's end."""
    slope = np.abs(found.jacobian(table.x)).max(axis=1)
    for name, most in zip(found.law.parameters, slope, strict=True):
        if most < 1e-12 and name not in found.fixed and name not in found.law.names:
            raise ScalingError(
                f"law {found.law.name} is not identified: {name} changes no prediction on this "
                f"table; hold it with --fix {name}=VALUE"
                + (" (5.31 in Muennighoff et al.)" if name == "R_N" else "")
            )


def _mend(law: Law, column: str) -> str:
    if law.name == "finetune" and column == "params":
        return "use --law power (E + B/D^beta), or add runs of another size or rank"
    if law.name == "finetune":
        return "add runs of another amount of data"
    return f"add runs with other {column}, or use --law power on what varies"


def _check_aligned(law: Law, table: Table) -> None:
    n, d = (np.log(table.x[name]) for name in ("params", "tokens"))
    if 1 - np.corrcoef(n, d)[0, 1] ** 2 < ALIGNED:
        other = "--law tied has one exponent" if law.name == "chinchilla" else "--law power has one"
        raise ScalingError(
            f"law {law.name} is not identified: tokens are a power of params in every run, so "
            f"that alpha and beta cannot be told apart; add runs off that line, or {other}"
        )
