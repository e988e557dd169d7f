"""Draws calibration charts per task from the results of eval/pipeline/option_likelihoods.py.

reliability      x: confidence of a bin of answers, y: the share of correct ones; on the dashed
                 diagonal the model is calibrated, below it overconfident
risk, coverage   x: the share of the answers that are kept, the most confident first, y: the share
                 of these that are wrong; the dashed line is keeping a random share
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.eval.reporting import tables
from medmax_jax.io import html_page, svg_charts

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> its bins, or its curve
STEP, LEAST = 0.1, 0.3  # of the axes that are fitted to the values
RELIABILITY_NOTE = (
    "Reliability: one dot per bin of equally many answers, smaller where ties leave fewer, with "
    "the 95 % interval of its accuracy. On the dashed line the confidence equals the accuracy; "
    "below it the model is overconfident. A bin of one group has a whisker from 0 to 1, because "
    "one group carries no information about others."
)
RISK_NOTE = (
    "Risk and coverage: the error rate among the most confident share of the answers, with the "
    "95 % interval of each point. The dashed line is the risk of a random share. A curve that "
    "falls to the left is that of a model whose confidence indicates when to abstain."
)


def render_curves(calibration: Mapping[str, Any]) -> str:
    """Return both charts of every task, and the numbers of the bins; "" if there are none."""
    bins, curves = calibration.get("bins", {}), calibration.get("curves", {})
    body = ""
    if bins:
        body += html_page.paragraph(RELIABILITY_NOTE) + svg_charts.side_by_side(_reliability(bins))
        body += html_page.details("Table of the bins", _table(bins))
    if curves:
        body += html_page.paragraph(RISK_NOTE) + svg_charts.side_by_side(_risk(curves))
    return body


def _reliability(bins: Rows) -> list[str]:
    ends = [
        bin_[end] for task_bins in bins.values() for bin_ in task_bins for end in ("low", "high")
    ]
    low, high = svg_charts.axis_limits(ends, step=STEP, least=LEAST)
    charts = []
    for task, task_bins in bins.items():
        largest = max(bin_["n"] for bin_ in task_bins)
        points = [
            svg_charts.Point(
                x=bin_["confidence"],
                y=bin_["accuracy"],
                low=0.0 if bin_["ci_low"] is None else bin_["ci_low"],
                high=1.0 if bin_["ci_high"] is None else bin_["ci_high"],
                tooltip=f"{bin_['n']} answers, confidence {bin_['low']:.3f} to {bin_['high']:.3f} "
                f"(mean {bin_['confidence']:.3f}): accuracy {bin_['accuracy']:.3f}",
                size=bin_["n"] / largest,
            )
            for bin_ in task_bins
        ]
        charts.append(
            svg_charts.chart(
                task,
                _count_text(task_bins),
                x=svg_charts.Axis("confidence", low, high),
                y=svg_charts.Axis("accuracy", 0.0, 1.0),
                points=points,
                guides=[(low, low, high, high)],
            )
        )
    return charts


def _count_text(bins: Sequence[Mapping[str, Any]]) -> str:
    """Return a text like "105 answers in 10 bins of 10 or 11"."""
    counts = sorted({bin_["n"] for bin_ in bins})
    sizes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    noun = "bin" if len(bins) == 1 else "bins"
    return f"{sum(bin_['n'] for bin_ in bins)} answers in {len(bins)} {noun} of {sizes}"


def _risk(curves: Rows) -> list[str]:
    ends = [point["ci_high"] for curve in curves.values() for point in curve]
    highest = max(1.0 if end is None else end for end in ends)
    _, high = svg_charts.axis_limits([0.0, highest], step=STEP, least=LEAST)
    charts = []
    for task, curve in curves.items():
        points = [
            svg_charts.Point(
                x=point["coverage"],
                y=point["risk"],
                low=0.0 if point["ci_low"] is None else point["ci_low"],
                high=highest if point["ci_high"] is None else point["ci_high"],
                tooltip=f"the most confident {100 * point['coverage']:.0f} %: risk "
                f"{point['risk']:.3f}, "
                f"{tables.interval(point)}",
                size=0.4,
            )
            for point in curve
        ]
        of_all, of_half = (next(p for p in curve if p["coverage"] == c)["risk"] for c in (1.0, 0.5))
        charts.append(
            svg_charts.chart(
                task,
                f"risk {of_all:.3f} of all answers, {of_half:.3f} of the most confident half",
                x=svg_charts.Axis("coverage", 0.0, 1.0),
                y=svg_charts.Axis("risk", 0.0, high),
                points=points,
                guides=[(0.0, of_all, 1.0, of_all)],
                joined=True,
            )
        )
    return charts


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
