"""Draws calibration charts per task, by likelihoods or by stated confidences.

reliability      x: confidence of a bin of answers, y: the share of correct ones; on the dashed
                 diagonal the model is calibrated, below it overconfident
risk, coverage   x: the share of the answers that are kept, the most confident first, y: the share
                 of these that are wrong; the dashed line is keeping a random share
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from medmax_jax.eval.reporting import tables
from medmax_jax.eval.stats import intervals
from medmax_jax.io import charts, html_page

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> its bins, or its curve
STEP, LEAST = 0.1, 0.3  # of the axes that are fitted to the values
NEAR = 1e-9
LARGEST_DOT, SMALLEST_DOT = 6.0, 2.5  # points
RELIABILITY_NOTE = (
    "Reliability: one dot per bin of equally many answers, smaller where ties leave fewer, with "
    "the 95 % interval of its accuracy. On the dashed line the confidence equals the accuracy; "
    f"below it the model is overconfident. A bin of fewer than {intervals.FEW} groups has no "
    f"whisker: its interval is in the table, marked {tables.FEW_MARK}."
)
RISK_NOTE = (
    "Risk and coverage: the error rate among the most confident share of the answers, with the "
    "95 % interval of each point where there are enough groups. The dashed line is the risk of a "
    "random share. A curve that falls to the left is that of a model whose confidence indicates "
    "when to abstain."
)


def render_curves(calibration: Mapping[str, Any]) -> str:
    """Return both charts of every task, and the numbers of the bins; "" if there are none."""
    bins, curves = calibration.get("bins", {}), calibration.get("curves", {})
    body = ""
    if bins:
        body += html_page.paragraph(RELIABILITY_NOTE) + _reliability(bins)
        body += html_page.details("Table of the bins", _table(bins))
    if curves:
        body += html_page.paragraph(RISK_NOTE) + _risk(curves)
    return body


def _reliability(bins: Rows) -> str:
    ends = [
        bin_[end] for task_bins in bins.values() for bin_ in task_bins for end in ("low", "high")
    ]
    low, high = axis_limits(ends, step=STEP, least=LEAST)
    items = []
    for task, task_bins in bins.items():
        largest = max(bin_["n"] for bin_ in task_bins)
        points = [
            _Point(
                x=bin_["confidence"],
                y=bin_["accuracy"],
                interval=_drawn_interval(bin_),
                tooltip=f"{bin_['n']} answers, confidence {bin_['low']:.3f} to {bin_['high']:.3f} "
                f"(mean {bin_['confidence']:.3f}): accuracy {bin_['accuracy']:.3f}",
                size=bin_["n"] / largest,
            )
            for bin_ in task_bins
        ]
        svg = _draw(
            points, guide=((low, high), (low, high)), xlabel="confidence", ylabel="accuracy",
            xlim=(low, high), ylim=(0.0, 1.0),
        )  # fmt: skip
        items.append((svg, task, _count_text(task_bins)))
    return html_page.charts(items)


def _count_text(bins: Sequence[Mapping[str, Any]]) -> str:
    """Return a text like "105 answers in 10 bins of 10 or 11"."""
    counts = sorted({bin_["n"] for bin_ in bins})
    sizes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    noun = "bin" if len(bins) == 1 else "bins"
    return f"{sum(bin_['n'] for bin_ in bins)} answers in {len(bins)} {noun} of {sizes}"


def _risk(curves: Rows) -> str:
    points = [point for curve in curves.values() for point in curve]
    highest = max((_drawn_interval(point) or (0.0, point["risk"]))[1] for point in points)
    _, high = axis_limits([0.0, highest], step=STEP, least=LEAST)
    items = []
    for task, curve in curves.items():
        points = [
            _Point(
                x=point["coverage"],
                y=point["risk"],
                interval=_drawn_interval(point),
                tooltip=f"the most confident {100 * point['coverage']:.0f} %: risk "
                f"{point['risk']:.3f}, {tables.interval(point)}",
                size=0.4,
            )
            for point in curve
        ]
        of_all, of_half = (next(p for p in curve if p["coverage"] == c)["risk"] for c in (1.0, 0.5))
        svg = _draw(
            points, guide=((0.0, 1.0), (of_all, of_all)), xlabel="coverage", ylabel="risk",
            xlim=(0.0, 1.0), ylim=(0.0, high), joined=True,
        )  # fmt: skip
        caption = f"risk {of_all:.3f} of all answers, {of_half:.3f} of the most confident half"
        items.append((svg, task, caption))
    return html_page.charts(items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    """A data point with its interval, if drawn; size: share of the largest dot's area."""

    x: float
    y: float
    interval: tuple[float, float] | None
    tooltip: str
    size: float


def _drawn_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the ends of a row's interval; None for an interval of few groups, or without ends."""
    if tables.has_few_groups(row) or row["ci_low"] is None or row["ci_high"] is None:
        return None
    return row["ci_low"], row["ci_high"]


@charts.page_style()
def _draw(
    points: Sequence[_Point],
    *,
    guide: tuple[tuple[float, float], tuple[float, float]],
    xlabel: str,
    ylabel: str,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    joined: bool = False,
) -> str:
    """Draw dots with whiskers and a dashed guide; joined: a line and a band instead of whiskers."""
    figure, axes = charts.subplots(size=(3.4, 2.5))
    axes.plot(*guide, "--", color=charts.SOFT, linewidth=1)
    with_interval = [(p.x, *p.interval) for p in points if p.interval]
    if joined:
        axes.plot([p.x for p in points], [p.y for p in points], color=charts.MARK)
    if with_interval:
        x, low, high = np.array(with_interval).T
        if joined:
            axes.fill_between(x, low, high, color=charts.MARK, alpha=0.16, linewidth=0)
        else:
            axes.vlines(x, low, high, color=charts.MARK, alpha=0.6)
    tooltips = {}
    for number, point in enumerate(points):
        gid = f"{charts.TOOLTIP}{number}"
        tooltips[gid] = point.tooltip
        size = max(LARGEST_DOT * math.sqrt(point.size), SMALLEST_DOT)
        axes.plot(point.x, point.y, "o", color=charts.MARK, markersize=size, gid=gid, clip_on=False)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=xlim, ylim=ylim)
    axes.grid(linewidth=0.6)
    axes.locator_params(nbins=5)
    return charts.svg(figure, tooltips=tooltips)


def draw_scores(
    axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, *, label: str = ""
) -> None:
    """Draw `column` of each row as a dot, top down, with its interval over enough groups.

    label: of the dots in a legend. The gid of dot y is `charts.TOOLTIP` and y.
    """
    for y, row in enumerate(rows):
        if not tables.has_few_groups(row) and row["ci_low"] is not None:
            axes.hlines(y, row["ci_low"], row["ci_high"], color=charts.MARK, linewidth=2)
        axes.plot(row[column], y, "o", color=charts.MARK, markersize=7, clip_on=False,
                  gid=f"{charts.TOOLTIP}{y}", label="" if y else label)  # fmt: skip
    labels = [f"{tables.marked(row, row['task'])}\n{row['metric']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, color=charts.INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(labelsize=9, length=0, pad=8)
    axes.grid(axis="x", linewidth=0.6)
    axes.locator_params(axis="x", nbins=5)


def axis_limits(values: Sequence[float], *, step: float, least: float) -> tuple[float, float]:
    """Return the ends of an axis in 0..1 that contains all values.

    The ends are multiples of step and differ by at least `least`: [0.52, 0.58] by 0.1, at least
    0.2: (0.4, 0.6).
    """
    first, top = math.floor(min(values) / step + NEAR), round(1 / step)
    last = max(math.ceil(max(values) / step - NEAR), first + 1)
    missing = max(round(least / step) - (last - first), 0)
    up = min(missing // 2, top - last)
    first = max(first - (missing - up), 0)
    return first * step, max(last + up, min(first + round(least / step), top)) * step


def _table(bins: Rows) -> str:
    rows = [
        [
            task,
            bin_["n"],
            bin_["groups"],
            f"{bin_['low']:.3f}–{bin_['high']:.3f}",
            bin_["confidence"],
            bin_["accuracy"],
            tables.interval(bin_),
        ]
        for task, task_bins in bins.items()
        for bin_ in task_bins
    ]
    head = ["task", "n", "groups", "confidences", "mean", "accuracy", "95 % interval"]
    return html_page.table(head, rows)
