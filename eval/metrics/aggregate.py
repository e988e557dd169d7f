"""Aggregates records into rows per task and metric: values, intervals, the MedMax release's score.

    records + inputs -> item scores (per_record.py) -> totals with every unread answer at its worst
                       -> 95 % intervals over groups, and the difference they could detect
    the same records   -> the scoring of the release (release.py), next to them

A row is a MetricRow of eval/results.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.eval.metrics import captions, per_record, question_sets, release, strict
from medmax_jax.eval.metrics.per_record import NO_INPUTS, ScoringInputs
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.results import MetricRow
from medmax_jax.eval.stats import intervals

PRIMARY = ("vqa_closed", "accuracy")
NO_CARDS: Mapping[str, question_sets.Card] = {}


def record_values(record: EvalRecord, inputs: ScoringInputs = NO_INPUTS) -> dict[str, float]:
    """Return metric -> value of one record.

    {"family": "vqa_closed", "text": "Yes.", "answer": "yes"} ->
    {"accuracy": 1.0, "unparsed": 0.0}.
    """
    item_scores = per_record.record_scores(record, inputs)
    values = {metric: verdict.lower for metric, verdict in item_scores.items()}
    if "accuracy" in item_scores:
        values["unparsed"] = float(item_scores["accuracy"].status == strict.UNPARSED)
    return values


def summary(
    records: Sequence[EvalRecord],
    inputs: ScoringInputs = NO_INPUTS,
    *,
    mode: str,
    resampling: intervals.Resampling,
    cards: Mapping[str, question_sets.Card] = NO_CARDS,
) -> list[MetricRow]:
    """Return the rows of every task and metric. `mode`: of the generation of the records.

    cards: of the tasks, by name: the sets of their questions, and their benchmark's own scores.
    """
    rows = []
    for task, task_records in tasks_of(records).items():
        scores_by_metric: dict[str, list[tuple[EvalRecord, ItemScore]]] = {}
        for record in task_records:
            for metric, verdict in per_record.record_scores(record, inputs).items():
                scores_by_metric.setdefault(metric, []).append((record, verdict))
        task_rows = relative_score_row(task_records, inputs, resampling=resampling)
        task_rows += [
            metric_row(metric, inputs, scored_records, resampling=resampling)
            for metric, scored_records in scores_by_metric.items()
        ]
        card = cards.get(task)
        if card and card.sets:
            task_rows += [
                metric_row(metric, inputs, scored_sets, resampling=resampling)
                for metric, scored_sets in question_sets.set_scores(
                    task_records, inputs, card.sets
                ).items()
            ]
        task_rows += caption_rows(task_records, resampling=resampling)
        headline = task_rows[0].metric if task_rows else ""
        own_by_metric = question_sets.own_scores(card, task_records, headline)
        # Those of another benchmark's own code take the place of the MedMax release's.
        release_by_metric = {} if own_by_metric else release.release_scores(task_records, inputs)
        for number, row in enumerate(task_rows):
            other = release_by_metric.get(row.metric, {})
            if own := own_by_metric.get(row.metric):
                other = dataclasses.asdict(own)
            rows.append(dataclasses.replace(row, mode=mode, headline=number == 0, **other))
    return rows


def not_judged(records: Sequence[EvalRecord], inputs: ScoringInputs = NO_INPUTS) -> list[str]:
    """Return the tasks that require a judge and have none: they have text metrics only."""
    judgment_kinds = {"vqa_open": per_record.CORRECT} | dict.fromkeys(
        per_record.PAIRWISE_FAMILIES, per_record.RELATIVE
    )
    return [
        task
        for task, task_records in tasks_of(records).items()
        if (kind := judgment_kinds.get(task_records[0].family)) and kind not in inputs.judgments
    ]


def not_scored(records: Sequence[EvalRecord], inputs: ScoringInputs = NO_INPUTS) -> list[str]:
    """Return the tasks without any metric: those of images without a configured scorer."""
    return [
        task
        for task, task_records in tasks_of(records).items()
        if not any(per_record.record_scores(record, inputs) for record in task_records)
    ]


def tasks_of(records: Sequence[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """Return task -> its records, the primary task first."""
    by_task: dict[str, list[EvalRecord]] = {}
    for record in sorted(records, key=lambda r: r.task != PRIMARY[0]):
        by_task.setdefault(record.task, []).append(record)
    return by_task


def metric_row(
    metric: str,
    inputs: ScoringInputs,
    scored_records: Sequence[tuple[EvalRecord, ItemScore]],
    *,
    resampling: intervals.Resampling,
) -> MetricRow:
    """Return the row of one metric: mean, confidence interval and counts."""
    first = scored_records[0][0]
    item_scores, groups = [v for _, v in scored_records], [r.group for r, _ in scored_records]
    total, worst = strict.total(item_scores), [v.lower for v in item_scores]
    span = per_record.span(metric)
    interval = intervals.mean_interval(worst, groups, resampling=resampling, span=span)
    votes = None
    if metric == "judge_correct":
        lines = [inputs.judgments[per_record.CORRECT].get(r.id) for r, _ in scored_records]
        votes = [line["votes"] for line in lines if line and line["votes"]]
    mde = intervals.minimum_detectable_effect(worst, groups, paired=False, span=span)
    return MetricRow(
        task=first.task,
        family=first.family,
        metric=metric,
        **interval.row(),
        best=total.best,
        n_unparsed=total.n_unparsed,
        n_unscored=total.n_unscored,
        n_errors=sum(bool(r.error) for r, _ in scored_records),
        scored_only=total.scored_only,
        **_judge_read_columns(item_scores),
        judge_sd=intervals.judge_sd(votes, len(scored_records)) if votes else None,
        mde=intervals.finite(mde),
    )


def _judge_read_columns(item_scores: Sequence[strict.ItemScore]) -> dict[str, Any]:
    """Return how many answers only a judge could read, and the value without these reads."""
    read = [score.status == strict.JUDGE_READ for score in item_scores]
    parsed = [0.0 if r else score.lower for r, score in zip(read, item_scores, strict=True)]
    return dict(
        n_judge_read=sum(read),
        value_parsed=sum(parsed) / len(parsed) if any(read) else None,
    )


def relative_score_row(
    records: Sequence[EvalRecord], inputs: ScoringInputs, *, resampling: intervals.Resampling
) -> list[MetricRow]:
    """Return the judge's mean score of the model over its mean score of the reference.

    Returns [] without a judge.
    """
    if (
        per_record.RELATIVE not in inputs.judgments
        or records[0].family not in per_record.PAIRWISE_FAMILIES
    ):
        return []
    means = [_mean(per_record.pairs(r, inputs, per_record.RELATIVE)) for r in records]
    comparison = strict.comparison(means)
    worst = [pair or (strict.MAX_SCORE, strict.MIN_SCORE) for pair in means]
    interval = intervals.ratio_interval(
        [b for _, b in worst],
        [a for a, _ in worst],
        [r.group for r in records],
        resampling=resampling,
        span=(strict.MIN_SCORE / strict.MAX_SCORE, strict.MAX_SCORE / strict.MIN_SCORE),
    )
    row = dataclasses.replace(
        _row_of_task("judge_relative", interval, records),
        best=comparison["best"],
        n_unscored=comparison["n_unscored"],
        scored_only=comparison["ratio_of_means"],
        **{name: comparison[name] for name in ("mean_of_ratios", "win", "tie", "loss")},
    )
    return [row]


def caption_rows(
    records: Sequence[EvalRecord], *, resampling: intervals.Resampling
) -> list[MetricRow]:
    """Return BLEU and CIDEr-D of a captioning task; a failed answer is an empty one."""
    if records[0].family != "captioning":
        return []
    answers = ["" if r.error else per_record.answer_text(r) for r in records]
    references, groups = [r.answer for r in records], [r.group for r in records]
    bleu = captions.bleu_interval(answers, references, groups, resampling=resampling)
    cider = intervals.mean_interval(
        captions.cider(answers, references),
        groups,
        resampling=resampling,
        span=captions.CIDER_SPAN,
    )
    return [_row_of_task("bleu", bleu, records), _row_of_task("cider", cider, records)]


def _row_of_task(
    metric: str, interval: intervals.Interval, records: Sequence[EvalRecord]
) -> MetricRow:
    """Return the row of a number that is of all records of a task together."""
    return MetricRow(
        task=records[0].task,
        family=records[0].family,
        metric=metric,
        **interval.row(),
        best=interval.mean,
        n_unparsed=0,
        n_unscored=0,
        n_errors=sum(bool(r.error) for r in records),
        scored_only=interval.mean,
    )


def scores(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], *, resampling: intervals.Resampling
) -> list[dict[str, Any]]:
    """Return the paired scores of two sets of records, the primary metric first.

    Rows are {task, metric, n, groups, few_groups, before, after, diff, ci_low, ci_high}, over the
    items that both sides answered.
    """
    before_scores, after_scores, rows = scores_by_item(before), scores_by_item(after), []
    for task, metric in after_scores:
        before_items, after_items = (
            before_scores.get((task, metric), {}),
            after_scores[task, metric],
        )
        shared = [name for name in after_items if name in before_items]
        if not shared:
            continue
        old, new = ([side[name][1] for name in shared] for side in (before_items, after_items))
        groups = [after_items[name][0] for name in shared]
        interval_columns = intervals.paired_row(
            old, new, groups, resampling=resampling, span=per_record.span(metric)
        )
        rows.append(dict(task=task, metric=metric) | interval_columns)
    return rows


def with_answers(records: Sequence[EvalRecord], answers: Mapping[str, str]) -> list[EvalRecord]:
    """Return the records with these texts as their answers and no failures: for baselines."""
    return [dataclasses.replace(r, text=answers[r.id], error="") for r in records]


def scores_by_item(
    records: Sequence[EvalRecord], inputs: ScoringInputs = NO_INPUTS
) -> dict[tuple[str, str], dict[str, tuple[str, float]]]:
    """Return (task, metric) -> id -> (group, value); tasks in order, the primary one first."""
    table: dict[tuple[str, str], dict[str, tuple[str, float]]] = {}
    for task, task_records in tasks_of(records).items():
        for record in task_records:
            for metric, value in record_values(record, inputs).items():
                by_item = table.setdefault((task, metric), {})
                by_item[record.id] = (record.group, value)
    return table


def _mean(votes: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not votes:
        return None
    return tuple(sum(side) / len(votes) for side in zip(*votes, strict=True))
