"""States the result of an evaluation: one sentence per headline, and all of them in one chart.

    score, interval  |  the baseline with the highest score  ->  above it, below it, inconclusive

The interval is that of the paired difference where the baseline is "blind", whose answers to the
same items are known, and that of the score elsewhere; a verdict requires that it excludes the
baseline.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.eval.reporting import curves, tables
from medmax_jax.eval.results import MetricRow, Summary
from medmax_jax.io import charts, html_page

ABOVE, BELOW, INCONCLUSIVE = "Above the baseline", "Below the baseline", "Inconclusive"
NO_BASELINE = "No baseline"
STATUS: Mapping[str, html_page.Status] = {
    ABOVE: "good", BELOW: "bad", INCONCLUSIVE: "neutral", NO_BASELINE: "neutral",
}  # fmt: skip
SAME = 5e-4  # smaller differences are 0.000 on the page
MARKERS = "sD^vPX"  # of the baselines, each in a color of its own as well
WIDTH, ROW_HEIGHT, MARGIN = 4.0, 0.42, 0.95  # inches of the chart
BELOW_MODEL = 0.3  # rows between a model's dot and its baselines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline:
    """Holds the headline row of one task, and the score of every baseline on it by name.

    paired: the row of the paired comparison with the blind baseline, if there is one.
    """

    row: MetricRow
    baselines: Mapping[str, float]
    paired: Mapping[str, Any] | None

    @property
    def best(self) -> str:
        """Return the name of the baseline with the highest score; "" without any."""
        scores = self.baselines
        return max(scores, key=lambda name: (scores[name], name == tables.BLIND), default="")

    @property
    def paired_with_best(self) -> Mapping[str, Any] | None:
        """Return the paired comparison with the best baseline; None where only its mean exists."""
        return self.paired if self.best == tables.BLIND else None

    @property
    def outcome(self) -> str:
        """Return ABOVE, BELOW, INCONCLUSIVE or NO_BASELINE."""
        if not self.best:
            return NO_BASELINE
        paired = self.paired_with_best
        ends, limit = (paired, 0.0) if paired else (vars(self.row), self.baselines[self.best])
        if ends["ci_low"] is not None and ends["ci_low"] > limit:
            return ABOVE
        if ends["ci_high"] is not None and ends["ci_high"] < limit:
            return BELOW
        return INCONCLUSIVE


def headlines(summary: Summary) -> list[Headline]:
    """Return the headline of each task with its baselines."""
    compared = [entry for entry in summary.baselines if entry["name"] == tables.BLIND]
    paired = {(r["task"], r["metric"]): r for entry in compared for r in entry["scores"]}
    baselines = tables.baseline_scores(summary)
    return [
        Headline(row=row, baselines=baselines.get(key, {}), paired=paired.get(key))
        for row in tables.headlines(summary.scores)
        for key in [(row.task, row.metric)]
    ]


def render(summary: Summary) -> str:
    """Return the count of outcomes, a sentence per task, and the chart; "" without scores."""
    heads = headlines(summary)
    if not heads:
        return ""
    verdicts = [html_page.Verdict(STATUS[h.outcome], h.outcome, sentence(h)) for h in heads]
    return html_page.paragraph(_lead(heads)) + html_page.verdicts(verdicts) + _forest(heads)


def sentence(head: Headline) -> str:
    """Return what was measured, its value with the interval, and the comparison."""
    row = head.row
    text = f"{row.task}: {row.metric} {row.value:.3f}{tables.interval_text(vars(row))}"
    text += f", on {_count(row.n, 'item')} of {_count(row.groups, 'group')}"
    if (share := tables.unparsed_share(row)) is not None:
        text += f"; {tables.format_share(share)} of the answers are unparsed"
    text += f". {_comparison(head)}" if head.best else "."
    return text if row.groups > 1 else f"{text} A single group has no interval."


def _comparison(head: Headline) -> str:
    difference = head.row.value - head.baselines[head.best]
    name = f"the baseline “{head.best}” ({head.baselines[head.best]:.3f})"
    paired = head.paired_with_best
    if abs(difference) < SAME:
        return f"The model scores the same as {name}."
    side = "above" if difference > 0 else "below"
    text = f"The model is {abs(difference):.3f} {side} {name}"
    if paired and (bounds := tables.bounds(paired["ci_low"], paired["ci_high"], 1.0)):
        text += f", 95 % interval of the difference {bounds}"
    if head.outcome != INCONCLUSIVE:
        return f"{text}."
    return f"{text}, and the interval does not exclude that both are equal."


def _lead(heads: Sequence[Headline]) -> str:
    """Return the counts of the outcomes in words."""
    counts = collections.Counter(head.outcome for head in heads)
    with_baseline = len(heads) - counts[NO_BASELINE]
    text = f"Measured on {_count(len(heads), 'task')}. "
    if not with_baseline:
        return f"{text}No task has a baseline."
    text += (
        f"Compared with the best baseline of each task, the model is above it on {counts[ABOVE]} "
        f"of {with_baseline}, below it on {counts[BELOW]}, and inconclusive on "
        f"{counts[INCONCLUSIVE]}."
    )
    if without := counts[NO_BASELINE]:
        text += f" {_count(without, 'task')} {'has' if without == 1 else 'have'} no baseline."
    return text


@charts.page_style()
def _forest(heads: Sequence[Headline]) -> str:
    """Return the chart of the scores, with intervals over enough groups, and of the baselines."""
    height = MARGIN + ROW_HEIGHT * len(heads)
    figure, axes = charts.subplots(size=(WIDTH, height))
    names = list(dict.fromkeys(name for head in heads for name in head.baselines))
    for number, name in enumerate(names):
        points = [
            (h.baselines[name], y + BELOW_MODEL) for y, h in enumerate(heads) if name in h.baselines
        ]
        marker, color = MARKERS[number % len(MARKERS)], charts.SERIES[1 + number % 7]
        axes.plot(*zip(*points, strict=True), marker, color=color, markersize=5, label=name,
                  fillstyle="none", clip_on=False)  # fmt: skip
    rows = [vars(head.row) for head in heads]
    curves.draw_scores(axes, rows, "value", label="the model")
    ends = [0.0, 1.0, *(row["value"] for row in rows)]
    for row in rows:
        if not tables.has_few_groups(row) and row["ci_low"] is not None:
            ends += [row["ci_low"], row["ci_high"]]
    axes.set_xlim(min(ends), max(ends))
    tooltips = {f"{charts.TOOLTIP}{y}": sentence(head) for y, head in enumerate(heads)}
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return html_page.chart(charts.svg(figure, tooltips=tooltips), _caption(heads))


def _caption(heads: Sequence[Headline]) -> str:
    text = "Scores of each task; further to the right is better."
    if any(not tables.has_few_groups(vars(head.row)) for head in heads):
        text += " Lines: 95 % intervals over groups."
    return text + tables.few_groups_note([vars(head.row) for head in heads])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
