"""Compares two arms of training by guidance scale: intervals, a table and a chart.

guidance.py and guidance_toy.py use it. Arms are paired by seed, and by prompt where there are any:

    values     [seeds] or [seeds, prompts]
    error      of the mean over seeds and over prompts: squared errors add up, as in a bootstrap
               that draws both with replacement. What a prompt has in one seed alone counts twice,
               so the error is too large rather than too small
    interval   as many errors as Student's t has for Satterthwaite's degrees of freedom
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from medmax_jax.eval.stats.intervals import TAIL
from medmax_jax.io import charts

ARMS = ("without dropout", "with dropout")


def crossed_interval(values: Any) -> dict[str, float | None]:
    """Return the mean of values [seeds] or [seeds, prompts] with its 95 % interval over both."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    mean, squared, degrees = float(values.mean()), 0.0, 0.0
    for axis in (0, 1):
        means, count = values.mean(1 - axis), values.shape[axis]
        if count > 1:
            error = means.var(ddof=1) / count
            squared, degrees = squared + error, degrees + error**2 / (count - 1)
    if len(values) < 2 or not degrees:  # one seed, or no variation
        return dict(value=mean, ci_low=None, ci_high=None)
    reach = special.stdtrit(squared**2 / degrees, 1 - TAIL) * np.sqrt(squared)
    return dict(value=mean, ci_low=mean - float(reach), ci_high=mean + float(reach))


def compare(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the interval of each arm, and of the difference that dropout makes."""
    without, dropped = (np.asarray(values[arm], np.float64) for arm in ARMS)
    return {arm: crossed_interval(values[arm]) for arm in ARMS} | dict(
        difference=crossed_interval(dropped - without)
    )


def table(rows: Sequence[Mapping[str, Any]], name: str, *, digits: int) -> str:
    """Return rows of `compare` by scale as a table of Markdown."""
    lines = [f"| scale | {' | '.join(f'{name} {arm}' for arm in ARMS)} | difference |"]
    lines.append("|---" * (len(ARMS) + 2) + "|")
    for row in rows:
        cells = [_cell(row[column], digits) for column in (*ARMS, "difference")]
        lines.append(f"| {row['scale']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(interval: Mapping[str, Any], digits: int) -> str:
    if interval["ci_low"] is None:
        return f"{interval['value']:.{digits}f}"
    value, low, high = (f"{interval[k]:.{digits}f}" for k in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


@charts.page_style()
def chart(
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    path: pathlib.Path,
    *,
    size: tuple[float, float],
    log: bool = False,
) -> None:
    """Draw one panel per measure, (its name, rows of `compare` by scale), and save it.

    Bars are 95 % intervals.
    """
    figure, axes = charts.subplots(1, len(panels), size=size, squeeze=False)
    for panel, (name, rows) in zip(axes[0], panels, strict=True):
        for number, arm in enumerate(ARMS):
            scales = np.array([row["scale"] for row in rows])
            value, low, high = (
                np.array([row[arm][k] for row in rows], np.float64)
                for k in ("value", "ci_low", "ci_high")
            )
            shift = (number - 0.5) * 0.06  # so that bars do not cover each other
            panel.errorbar(
                scales + shift, value, yerr=np.nan_to_num([value - low, high - value]),
                fmt="o-", markersize=3.5, linewidth=1.3, capsize=2, color=charts.SERIES[number],
                label=arm,
            )  # fmt: skip
        panel.set(title=name, xlabel="guidance scale")
        panel.set_xticks(scales, [f"{scale:g}" for scale in scales])
        if log:
            panel.set_yscale("log")
        panel.grid(axis="y")
    charts.legend(figure, axes[0][0])
    charts.save(figure, path)
