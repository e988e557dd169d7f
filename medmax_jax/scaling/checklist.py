"""Write the text of a fit: its parameters, its checks, and the checklist needed to repeat it.

The questions are those of the survey "(Mis)Fitting: A Survey of Scaling Laws" (Li et al. 2025,
arXiv 2502.18969), which finds that few papers answer them. Facts that a table cannot contain, such
as whether embeddings count as parameters, are taken from --say or from the .json file next to the
table; otherwise they appear as "not stated".
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.io import html_page
from medmax_jax.io.text_files import read_json_object
from medmax_jax.scaling import allocation, diagnostics, fit
from medmax_jax.scaling.laws import ScalingError
from medmax_jax.scaling.study import Study

# Statements that the user may provide, and the question that each answers.
STATEMENTS = {
    "params": "what counts as a parameter (embeddings, head, adapters)",
    "tokens": "what counts as a token (seen or unique, padding, modality)",
    "flops": "the formula of compute",
    "schedule": "is the schedule matched to each run's amount of data",
    "tuning": "which hyper-parameters were tuned, at which sizes",
    "checkpoints": "final checkpoints only, or intermediate ones",
    "split": "which split the loss is of",
}


def read_statements(table: str | Path, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return answers to STATEMENTS: the command line overrides the .json next to the table."""
    path, statements = Path(table).with_suffix(".json"), {}
    if path.exists():
        try:
            statements = read_json_object(path)["said"]
            if not (
                isinstance(statements, dict)
                and all(isinstance(v, str) for v in statements.values())
            ):
                raise ValueError("'said' must map names to strings")
        except (ValueError, KeyError) as error:
            raise ScalingError(f"{path}: not a file of `sweep collect` ({error})") from error
    for name in overrides:
        if name not in STATEMENTS:
            raise ScalingError(f"--say {name}: use one of {', '.join(STATEMENTS)}")
    return {**statements, **overrides}


def checklist(study: Study, statements: Mapping[str, str]) -> dict[str, str]:
    """Return question -> answer."""
    table, law, o = study.table, study.law, study.options
    answers = {"law": f"{law.formula} ({law.paper})", "fitted to": table.target}
    answers |= {
        f"{n}: {question}": statements.get(n, "not stated") for n, question in STATEMENTS.items()
    }
    answers["runs"] = f"{int(table.runs.max()) + 1} runs, {len(table)} rows"
    for name, column in table.x.items():
        distinct = len(np.unique(column))
        answers[f"range of {name}"] = f"{column.min():.4g} to {column.max():.4g}, {distinct} values"
    answers["excluded points"] = "; ".join(table.excluded) or "none"
    residual = "ln loss" if law.log else "the loss itself"
    answers["objective"] = f"sum of Huber({o.delta:g}) of residuals of {residual}, equal weights"
    answers["optimizer"] = (
        f"grid of exponents with non-negative coefficients solved for, its best {fit.STARTS} "
        "points polished by damped Newton steps; float64"
    )
    fixed = ", ".join(f"{k} = {v:g}" for k, v in o.fixed.items())
    answers["fixed parameters"] = fixed or "none"
    answers["intervals"] = (
        f"{diagnostics.LEVEL:.0%} percentiles of {len(study.draws)} bootstraps over runs, "
        f"seed {o.seed}"
    )
    return answers


def format_fit(study: Study, statements: Mapping[str, str]) -> str:
    """Return the text that the program prints."""
    lines = [f"{study.law.name}: {study.table.target} = {study.law.formula}"]
    for name, value in study.fit.values.items():
        fixed = "  fixed" if name in study.options.fixed else ""
        lines.append(f"  {name:8} {value:<12.6g} {ends(study.intervals[name])}{fixed}")
    if study.law.name in allocation.LAWS:
        low, high = diagnostics.interval(allocation.exponent(study.named), diagnostics.LEVEL)
        exponent = allocation.exponent(study.fit.values)
        lines.append(f"  best size grows as compute^{exponent:.3f} [{low:.3f}, {high:.3f}]")
    lines += [f"  objective {study.fit.objective:.9g}, condition number {study.condition:.3g}"]
    lines += ["holdouts", *(f"  {line}" for line in format_holdout(study))]
    if study.allocation:
        lines += [f"compute-optimal ({study.options.flops:g} N D)"]
        lines += [f"  {line}" for line in map(allocation_line, study.allocation)]
    lines += ["warnings", *(f"  {w}" for w in study.warnings)] if study.warnings else []
    lines += ["checklist", *(f"  {q}: {a}" for q, a in checklist(study, statements).items())]
    return "\n".join(lines)


def ends(interval: Sequence[float] | None) -> str:
    """Format "[1.8, 2.1]"; a dash for a parameter that no draw moves."""
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else html_page.NOTHING


def format_holdout(study: Study) -> list[str]:
    """Return one line per way of holding out."""
    return [
        f"{holdout.name}: {holdout.count} runs held out, no fit"
        if holdout.why
        else f"{holdout.name}: {holdout.count} runs held out, mean error {holdout.mean_size:.2%}, "
        f"maximum {np.abs(holdout.errors).max():.2%}"
        for holdout in study.holdouts
    ]


def allocation_line(row: Mapping[str, Any]) -> str:
    """Format compute 1e+21: params 2.1e+09 [..], tokens 7.9e+10 [..], loss 2.3 [..]."""
    parts = [
        f"{name} {row[name]:.4g} [{row[f'{name}_interval'][0]:.3g}, "
        f"{row[f'{name}_interval'][1]:.3g}]"
        for name in ("params", "tokens", "tokens_per_param", "loss")
    ]
    return f"compute {row['compute']:.3g}: {', '.join(parts)}"


def as_json(study: Study, statements: Mapping[str, str]) -> dict[str, Any]:
    """Return all of it as JSON."""
    result: dict[str, Any] = dict(study.fit.values)
    result |= dict(
        law=study.law.name, formula=study.law.formula, paper=study.law.paper,
        target=study.table.target, rows=len(study.table), runs=int(study.table.runs.max()) + 1,
        intervals={
            name: list(interval) if interval else None for name, interval in study.intervals.items()
        },
        level=diagnostics.LEVEL, bootstraps=len(study.draws), objective=study.fit.objective,
        condition=study.condition if math.isfinite(study.condition) else None,
        held_out={
            holdout.name: dict(
                runs=holdout.count, why=holdout.why,
                mean_error=holdout.mean_size, errors=holdout.errors.tolist(),
            )
            for holdout in study.holdouts
        },
        allocation=list(study.allocation), warnings=list(study.warnings),
        influential=study.influential, checklist=checklist(study, statements),
    )  # fmt: skip
    if study.law.name in allocation.LAWS:
        result["size_exponent"] = allocation.exponent(study.fit.values)
        interval = diagnostics.interval(allocation.exponent(study.named), diagnostics.LEVEL)
        result["intervals"]["size_exponent"] = list(interval)
    return result
