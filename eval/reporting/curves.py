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
RELIABILITY = (
    "Reliability: a dot a bin of equally many answers, a smaller one where ties leave fewer, with "
    "the 95 % interval of its accuracy. On the dashed line the model is as sure as it is right; "
    "below it, too sure. A bin of one group has a whisker from 0 to 1: it tells nothing of others."
)
RISK = (
    "Risk and coverage: how many are wrong among the surest share of the answers, with the 95 % "
    "interval at each. The dashed line is the risk of a random share; a curve that falls to the "
    "left belongs to a model that knows when to abstain."
)


def render_curves(calibration: Mapping[str, Any]) -> str:
    """Return both charts of every task, and the numbers of the bins; "" if there are none."""
    bins, curves = calibration.get("bins", {}), calibration.get("curves", {})
    body = ""
    if bins:
        body += html_page.paragraph(RELIABILITY) + svg_charts.side_by_side(_reliability(bins))
        body += html_page.details("The bins in numbers", _table(bins))
    if curves:
        body += html_page.paragraph(RISK) + svg_charts.side_by_side(_risk(curves))
    return body


def _reliability(bins: Rows) -> list[str]:
    ends = [one[end] for some in bins.values() for one in some for end in ("low", "high")]
    low, high = svg_charts.axis_limits(ends, step=STEP, least=LEAST)
    found = []
    for task, some in bins.items():
        most = max(one["n"] for one in some)
        points = [
            svg_charts.Point(
                x=one["confidence"],
                y=one["accuracy"],
                low=0.0 if one["ci_low"] is None else one["ci_low"],
                high=1.0 if one["ci_high"] is None else one["ci_high"],
                tooltip=f"{one['n']} answers, sure {one['low']:.3f} to {one['high']:.3f} "
                f"(mean {one['confidence']:.3f}): {one['accuracy']:.3f} right",
                size=one["n"] / most,
            )
            for one in some
        ]
        found.append(
            svg_charts.chart(
                task,
                _counted(some),
                x=svg_charts.Axis("confidence", low, high),
                y=svg_charts.Axis("accuracy", 0.0, 1.0),
                points=points,
                guides=[(low, low, high, high)],
            )
        )
    return found


def _counted(bins: Sequence[Mapping[str, Any]]) -> str:
    """Return a text like "105 answers in 10 bins of 10 or 11"."""
    counts = sorted({one["n"] for one in bins})
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    noun = "bin" if len(bins) == 1 else "bins"
    return f"{sum(one['n'] for one in bins)} answers in {len(bins)} {noun} of {of}"


def _risk(curves: Rows) -> list[str]:
    ends = [point["ci_high"] for some in curves.values() for point in some]
    highest = max(1.0 if end is None else end for end in ends)
    _, high = svg_charts.axis_limits([0.0, highest], step=STEP, least=LEAST)
    found = []
    for task, some in curves.items():
        points = [
            svg_charts.Point(
                x=one["coverage"],
                y=one["risk"],
                low=0.0 if one["ci_low"] is None else one["ci_low"],
                high=highest if one["ci_high"] is None else one["ci_high"],
                tooltip=f"the surest {100 * one['coverage']:.0f} %: {one['risk']:.3f} wrong, "
                f"{tables.interval(one)}",
                size=0.4,
            )
            for one in some
        ]
        whole, half = (next(p for p in some if p["coverage"] == c)["risk"] for c in (1.0, 0.5))
        found.append(
            svg_charts.chart(
                task,
                f"{whole:.3f} of all are wrong, {half:.3f} of the surest half",
                x=svg_charts.Axis("coverage", 0.0, 1.0),
                y=svg_charts.Axis("risk", 0.0, high),
                points=points,
                guides=[(0.0, whole, 1.0, whole)],
                joined=True,
            )
        )
    return found


def _table(bins: Rows) -> str:
    rows = [
        [
            task,
            one["n"],
            one["groups"],
            f"{one['low']:.3f}–{one['high']:.3f}",
            one["confidence"],
            one["accuracy"],
            tables.interval(one),
        ]
        for task, some in bins.items()
        for one in some
    ]
    head = ["task", "n", "groups", "confidences", "mean", "accuracy", "95 % interval"]
    return html_page.table(head, rows)
