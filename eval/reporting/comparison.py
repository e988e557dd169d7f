"""Compares two evaluations: which is better on which task, and where the result is inconclusive.

    D1/records.jsonl  D2/records.jsonl -> items both answered -> scores both have
      -> each task's headline: paired interval, sign flips over groups, Holm over the tasks
      -> verdict

A task is decided when Holm's p is below 0.05. Other metrics have numbers and no verdict.
`mde`, the minimum detectable effect: the smallest true difference that 80 % of such comparisons
find. `render` is the page: the verdicts first, then a chart of the differences and the tables.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.records import EvalRecord, is_credentialed, read_records
from medmax_jax.eval.reporting import curves, definitions, tables
from medmax_jax.eval.stats import intervals, paired_tests
from medmax_jax.io import charts, html_page

LOWER_IS_BETTER = ("unparsed",)
INCONCLUSIVE = "inconclusive"
WIDTH, ROW_HEIGHT, MARGIN = 4.0, 0.42, 0.7  # inches of the chart
COLUMNS = {
    "difference": "second minus first, on the same items; above 0: the second is better, except "
    "for unparsed",
    "p": "p of the sign-flip test over groups; lower: less likely to be chance",
    "p, Holm": "p adjusted for the number of tasks; below 0.05 a task is decided",
    "p, McNemar": "McNemar's exact p, too small where several questions share an image",
    "MDE": "minimum detectable effect: the smallest true difference that 80 % of such comparisons "
    "find; lower is better",
    "verdict": "which evaluation is better on the task, by p, Holm",
}
ITEM_FIELDS = ("task", "prompt", "answer", "image", "further_images", "group")


class ComparisonError(ValueError):
    """Raised for workdirs that cannot be compared.

    The message names the difference and the fix.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Holds a comparison of two evaluations.

    `rows`: one per task and metric, `suite`: the mean over headlines, `left_out`: with the reason.
    """

    rows: list[dict[str, Any]]
    suite: dict[str, Any]
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    records: dict[str, EvalRecord]
    inputs: per_record.ScoringInputs


def compare(
    first: str | Path,
    second: str | Path,
    *,
    seed: int,
    resamples: int,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """Compare two workdirs of eval.run; differences are second minus first.

    names: what the result calls them; None: their paths.
    """
    resampling = intervals.Resampling(seed, resamples)
    sides = [_Evaluation(_records(Path(f)), per_record.read(f)) for f in (first, second)]
    shared = [name for name in sides[0].records if name in sides[1].records]
    for name in shared:
        _check_same(sides[0].records[name], sides[1].records[name])
    left_out_scorers = _different_scorers(*(side.inputs for side in sides))
    scores = [
        aggregate.scores_by_item([side.records[name] for name in shared], side.inputs)
        for side in sides
    ]
    first_scores, second_scores = (_without(side, left_out_scorers) for side in scores)
    keys = [key for key in first_scores if key in second_scores]
    if not keys:
        raise ComparisonError(
            f"{first} and {second}: no item has a score on both sides; compare evaluations of the "
            "same items"
        )
    rows = [_row(key, first_scores[key], second_scores[key], resampling=resampling) for key in keys]
    headlines = {row["task"]: row for row in reversed(rows)}  # the first metric of each task
    adjusted = paired_tests.holm({task: row["p"] for task, row in headlines.items()})
    for row in rows:
        if row is headlines[row["task"]]:
            row["p_holm"] = adjusted[row["task"]]
            row["claim"] = _verdict(row, names or (str(first), str(second)))
    suite = _suite(headlines, first_scores, second_scores, resampling=resampling)
    left_out = _left_out(sides, shared, first_scores, second_scores)
    return Comparison(rows=rows, suite=suite, left_out=left_out + list(left_out_scorers.values()))


def render(
    comparison: Comparison, first: str, second: str, *, facts: Sequence[Mapping[str, Any]]
) -> str:
    """Return the page of a comparison of two evaluations, by the names of both.

    facts: of the first, of the second, and of the comparison, for `html_page.provenance`.
    """
    decided = [row for row in comparison.rows if row["claim"]]
    counts = [sum(row["claim"] == f"{name} wins" for row in decided) for name in (first, second)]
    names = ({"first:": first}, {"second:": second}, {})
    body = "".join(html_page.provenance(n | f) for n, f in zip(names, facts, strict=True))
    lead = (
        f"Of {len(decided)} tasks, {second} is better on {counts[1]}, {first} is better on "
        f"{counts[0]}, and {len(decided) - sum(counts)} are inconclusive. Differences are the "
        f"second minus the first."
    )
    verdicts = [_page_verdict(row, first, second) for row in decided]
    result = html_page.paragraph(lead) + html_page.verdicts(verdicts) + _chart(decided)
    body += html_page.section("Result", result)
    names = {
        **{"first": f"first: {first}", "second": f"second: {second}", "diff": "difference"},
        **{"mde": "MDE", "p_mcnemar": "p, McNemar", "p_holm": "p, Holm", "claim": "verdict"},
    }
    for title, rows in (
        ("All metrics", comparison.rows),
        ("Mean over the tasks", [comparison.suite]),
    ):
        merged = tables.rename_columns(tables.merge_interval_columns(rows), names)
        terms = definitions.of_table({row.get("metric", "") for row in rows}) | COLUMNS
        cells = [list(row.values()) for row in merged]
        body += html_page.section(title, html_page.table(list(merged[0]), cells, definitions=terms))
    if comparison.left_out:
        lines = "".join(html_page.paragraph(f"{line}.") for line in comparison.left_out)
        body += html_page.section("Left out", lines)
    return html_page.document(f"Comparison of {first} and {second}", body)


def _page_verdict(row: Mapping[str, Any], first: str, second: str) -> html_page.Verdict:
    """Return the verdict on one task; it is good where the second is better."""
    text = (
        f"{row['task']}: {row['metric']} {row['first']:.3f} ({first}) and {row['second']:.3f} "
        f"({second}), difference {row['diff']:.3f}"
    )
    text += tables.interval_text(row)
    text += f", on {row['n']:,} items of {row['groups']:,} groups; p {row['p_holm']:.3f}, by Holm."
    if row["claim"] == INCONCLUSIVE:
        return html_page.Verdict("neutral", "Inconclusive", text)
    better = row["claim"] == f"{second} wins"
    label = f"{second if better else first} is better"
    return html_page.Verdict("good" if better else "bad", label, text)


@charts.page_style()
def _chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the differences of the tasks, with their intervals over enough groups."""
    figure, axes = charts.subplots(size=(WIDTH, MARGIN + ROW_HEIGHT * len(rows)))
    axes.axvline(0, color=charts.SOFT, linewidth=1)
    axes.spines["left"].set_visible(False)
    curves.draw_scores(axes, rows, "diff")
    axes.set_xlabel("second minus first")
    caption = "Differences of the headline scores; to the right of 0 the second is better."
    caption += tables.few_groups_note(rows)
    return html_page.chart(charts.svg(figure), caption)


def _suite(
    headlines: Mapping, first: Mapping, second: Mapping, *, resampling: intervals.Resampling
) -> dict:
    """Return both means over the common tasks, with equal weights, and their paired difference."""
    keys = [(task, row["metric"]) for task, row in headlines.items()]
    suite: dict[str, Any] = dict(tasks=len(keys))
    span = min(per_record.span(metric) for _, metric in keys)
    for name, scores in (("first", first), ("second", second)):
        parts = [_pairs(scores[key], first[key], second[key]) for key in keys]
        mean = intervals.suite_interval(parts, resampling=resampling, span=span)
        ends = {
            f"{name}_low": intervals.finite(mean.low),
            f"{name}_high": intervals.finite(mean.high),
        }
        suite |= {name: mean.mean} | ends
    signed = [_differences(first[key], second[key]) for key in keys]
    mean = intervals.suite_interval(
        signed, resampling=resampling, span=intervals.of_differences(span)
    )
    return suite | mean.row("diff")


def _pairs(side: Mapping, first: Mapping, second: Mapping) -> tuple[list[float], list[str]]:
    names = [name for name in first if name in second]
    return [side[name][1] for name in names], [first[name][0] for name in names]


def _different_scorers(
    first: per_record.ScoringInputs, second: per_record.ScoringInputs
) -> dict[str, str]:
    """Return prefix of metric names -> why they are left out: another judge or scorer files."""
    reasons = {}
    if first.judge and second.judge and first.judge != second.judge:
        reasons["judge_"] = (
            f"judge_*: judged by {first.judge} and by {second.judge}, which differ in model, "
            "parameters, prompts or repeats"
        )
    for name in first.scorers.keys() & second.scorers.keys():
        if first.scorers[name] != second.scorers[name]:
            prefix = f"{per_record.PREFIX[name]}_"
            reasons[prefix] = f"{prefix}*: the files of {name} differ between the sides"
    return reasons


def _without(scores: Mapping, prefixes: Mapping[str, str]) -> dict:
    return {key: side for key, side in scores.items() if not key[1].startswith(tuple(prefixes))}


def _records(folder: Path) -> dict[str, EvalRecord]:
    path = folder / "records.jsonl"
    if not path.exists():
        raise ComparisonError(f"{path} is missing; name a workdir that eval.run wrote")
    per_record.check_names(folder.glob("*.jsonl"))
    return {record.id: record for record in read_records(path)}


def _check_same(first_record: EvalRecord, second_record: EvalRecord) -> None:
    credentialed = is_credentialed(first_record) or is_credentialed(second_record)
    for name in ITEM_FIELDS:
        first, second = getattr(first_record, name), getattr(second_record, name)
        if first != second:
            difference = f"item {first_record.id}: {name} is {first!r} and {second!r}"
            if credentialed:
                difference = f"{name} of a credentialed item differs"
            raise ComparisonError(f"{difference}; evaluate both on the same items")


def _row(
    key, first: Mapping, second: Mapping, *, resampling: intervals.Resampling
) -> dict[str, Any]:
    (task, metric), names = key, [name for name in first if name in second]
    groups = [first[name][0] for name in names]
    before, after = ([side[name][1] for name in names] for side in (first, second))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    binary = set(before) | set(after) <= {0.0, 1.0}
    columns = intervals.paired_row(
        before,
        after,
        groups,
        names=("first", "second"),
        span=per_record.span(metric),
        resampling=resampling,
    )
    mde = intervals.minimum_detectable_effect(
        differences, groups, paired=True, span=per_record.span(metric)
    )
    return (
        dict(task=task, metric=metric)
        | columns
        | dict(
            mde=intervals.finite(mde),
            p=paired_tests.sign_flip(differences, groups, resampling=resampling),
            p_mcnemar=paired_tests.mcnemar(before, after).p if binary else None,
            p_holm=None,
            claim="",
        )
    )


def _verdict(row: Mapping[str, Any], names: tuple[str, str]) -> str:
    if row["p_holm"] >= paired_tests.ALPHA:
        return INCONCLUSIVE
    better = row["diff"] * (-1 if row["metric"] in LOWER_IS_BETTER else 1) > 0
    return f"{names[better]} wins"


def _differences(first: Mapping, second: Mapping) -> tuple[list[float], list[str]]:
    names = [name for name in first if name in second]
    return [second[name][1] - first[name][1] for name in names], [first[name][0] for name in names]


def _left_out(sides: Sequence[_Evaluation], shared: Sequence[str], first, second) -> list[str]:
    tasks = [{r.task for r in side.records.values()} for side in sides]
    lines = []
    for name, own, other in (("first", *tasks), ("second", *reversed(tasks))):
        lines += [f"{task}: not run by the {name}" for task in sorted(other - own)]
    lines += [
        f"{len(side.records) - len(shared)} items that only the {name} answered"
        for name, side in zip(("first", "second"), sides, strict=True)
        if len(side.records) > len(shared)
    ]
    for name, own, other in (("first", first, second), ("second", second, first)):
        lines += [
            f"{task} {metric}: only the {name} has it"
            for task, metric in own
            if (task, metric) not in other
        ]
    return lines
