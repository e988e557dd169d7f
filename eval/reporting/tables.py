"""Builds the tables of the page: headlines, published scores, slices and failures.

summary.scores     rows of a task and metric  ->  one row per task, its headline metric
records            items and answers          ->  rows by slice; wrong, unread and failed ones
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medmax_jax.eval.metrics import per_record, strict
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.results import MetricRow, Summary
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import catalog

Row = Mapping[str, Any]  # of a table: column -> value
Values = Mapping[tuple[str, str], Mapping[str, tuple[str, float]]]  # see aggregate.scores_by_item
MIN_SLICE_ITEMS = 20  # items of a slice: with fewer the interval is too wide to be useful
MAX_SLICE_VALUES = 40  # values of a slice's name: with more it names images and not kinds of them
EXAMPLES_PER_KIND = 3  # examples of each kind
EXAMPLE_CHARS = 200  # characters of an example
FEW_MARK = "†"  # of intervals over fewer groups than intervals.FEW
PERCENT = 100.0
OURS = {"BiomedCLIP image-image cosine": "clip_image_image"}  # where it is not the headline
BLIND = "blind"  # the entry of Summary.baselines that another model answered
CLOSED = ("vqa_closed", "vqa_mcq")


def headlines(scores: Sequence[MetricRow]) -> list[MetricRow]:
    """Return the headline row of each task: as marked, else its first."""
    by_task: dict[str, MetricRow] = {}
    for row in scores:
        if row.headline or row.task not in by_task:
            by_task[row.task] = row
    return list(by_task.values())


def baseline_scores(summary: Summary) -> dict[tuple[str, str], dict[str, float]]:
    """Return (task, metric) -> name of a baseline -> its score.

    Baselines are answers without an image or a model, and those of BLIND.
    """
    by_key: dict[tuple[str, str], dict[str, float]] = {}
    for floor in summary.floors:
        for row in floor.scores:
            by_key.setdefault((row.task, row.metric), {})[floor.name] = row.value
    for entry in summary.baselines:
        for row in entry["scores"] if entry["name"] == BLIND else ():
            by_key.setdefault((row["task"], row["metric"]), {})[BLIND] = row["before"]
    return by_key


def main_table(summary: Summary) -> list[dict[str, Any]]:
    """Return one row per task; columns that no task has are left out."""
    baselines = baseline_scores(summary)
    rows = [
        {
            "task": row.task,
            "metric": row.metric,
            "n": row.n,
            "groups": row.groups,
            "value": row.value,
            "95 % interval": interval(vars(row)),
            "unparsed": format_share(unparsed_share(row)),
            "at best": row.best,
            "MDE": row.mde,
            "as released": row.paper,
            "best baseline": max(baselines.get((row.task, row.metric), {}).values(), default=None),
        }
        for row in headlines(summary.scores)
    ]
    return drop_empty_columns(rows)


def unparsed_share(row: MetricRow) -> float | None:
    """Return the share of a row's answers that cannot be parsed; None where none are parsed."""
    if row.family not in CLOSED or not row.n or row.n_unparsed is None:
        return None
    return row.n_unparsed / row.n


def format_share(share: float | None) -> str | None:
    """Return a share in percent: 0.035 -> "3.5%"."""
    return None if share is None else f"{100 * share:.1f}%"


def baseline_table(summary: Summary) -> list[dict[str, Any]]:
    """Return task by baseline, of the tasks that have a score of one."""
    baselines = baseline_scores(summary)
    heads = [row for row in headlines(summary.scores) if (row.task, row.metric) in baselines]
    names = dict.fromkeys(name for row in heads for name in baselines[row.task, row.metric])
    return [
        {"task": row.task, "metric": row.metric, "the model": row.value}
        | {name: baselines[row.task, row.metric].get(name) for name in names}
        for row in heads
    ]


def other_metrics(summary: Summary) -> list[dict[str, Any]]:
    """Return the rows of all other metrics."""
    first = {(row.task, row.metric) for row in headlines(summary.scores)}
    rows = [row for row in summary.scores if (row.task, row.metric) not in first]
    return drop_empty_columns(
        [
            {
                "task": row.task,
                "metric": row.metric,
                "n": row.n,
                "value": row.value,
                "95 % interval": interval(vars(row)),
                "as released": row.paper,
            }
            for row in rows
        ]
    )


def published(summary: Summary) -> list[tuple[str, list[dict[str, Any]], list[str]]]:
    """Return (metric, rows, differences) for the tasks that have published scores.

    The metric is the published one, and the rows have the scores of both.
    """
    tables_by_metric: dict[str, list[dict[str, Any]]] = {}
    families: dict[str, list[str]] = {}
    for head in headlines(summary.scores) if is_suite(summary) else ():
        spec = catalog.task_spec(head.task, head.family)
        for metric_name in dict.fromkeys(p.metric for p in spec.published) if spec else ():
            metric = OURS.get(metric_name, spec.metric)
            matching = [r for r in summary.scores if (r.task, r.metric) == (head.task, metric)]
            row = matching[0] if matching else None
            scale = 1.0 if "cosine" in metric_name else PERCENT
            released = row.paper if row else None
            cells = {
                "task": head.task,
                "here": format_metric(row.value, scale) if row else None,
                "95 % interval": interval(vars(row), scale) if row else None,
                "as released": None if released is None else format_metric(released, scale),
            }
            cells |= {p.model: p.value for p in spec.published if p.metric == metric_name}
            tables_by_metric.setdefault(metric_name, []).append(cells)
            families.setdefault(metric_name, []).append(spec.family)
    return [
        (metric, _equal(rows), [catalog.DIFFERS[name] for name in dict.fromkeys(families[metric])])
        for metric, rows in tables_by_metric.items()
    ]


def is_suite(summary: Summary) -> bool:
    """Return whether the items are of the suite, not of the embedded sample."""
    return list(summary.settings["questions"]) != ["sample"]


def not_run(summary: Summary, records: Sequence[EvalRecord]) -> list[dict[str, Any]]:
    """Return the tasks of the suite that have no score here, and why."""
    scored_tasks = {row.task for row in summary.scores}
    reasons = {entry["task"]: entry["why"] for entry in summary.not_run}
    if is_suite(summary):
        absent = dict.fromkeys(catalog.TASKS, "the evaluation has no items of it")
        reasons = absent | reasons
    answered = dict.fromkeys(record.task for record in records)
    reasons |= dict.fromkeys(answered, "answered, but not scored; see config.scorers")
    return [
        {
            "task": task,
            "why": reason,
            "source of its rows": catalog.TASKS[task].source if task in catalog.TASKS else None,
        }
        for task, reason in reasons.items()
        if task not in scored_tasks
    ]


def slices(
    records: Sequence[EvalRecord],
    values: Values,
    summary: Summary,
    *,
    resampling: intervals.Resampling,
) -> tuple[list[dict[str, Any]], int]:
    """Return the headline metric by slice, and how many slices have too few items."""
    metric = {row.task: row.metric for row in headlines(summary.scores)}
    by_slice: dict[tuple[str, str], dict[str, list[tuple[str, float]]]] = {}
    for record in records:
        values_by_id = values.get((record.task, metric.get(record.task, "")), {})
        if record.id not in values_by_id:
            continue
        for name, value in record_slices(record):
            by_value = by_slice.setdefault((record.task, name), {})
            by_value.setdefault(value, []).append(values_by_id[record.id])
    rows, few = [], 0
    for (task, name), by_value in by_slice.items():
        if len(by_value) < 2 or len(by_value) > MAX_SLICE_VALUES:
            continue
        for value, members in sorted(by_value.items()):
            if len(members) < MIN_SLICE_ITEMS:
                few += 1
                continue
            groups, scores = zip(*members, strict=True)
            estimate = intervals.mean_interval(
                scores, groups, resampling=resampling, span=per_record.span(metric[task])
            )
            rows.append(
                {
                    "task": task,
                    "metric": metric[task],
                    "slice": f"{name}: {value}",
                    "n": estimate.n,
                    "groups": estimate.groups,
                    "value": estimate.mean,
                    "95 % interval": interval(estimate.row()),
                }
            )
    return rows, few


def record_slices(record: EvalRecord) -> list[tuple[str, str]]:
    """Return (name, value) of a record's slices; the modality of embedded images is one."""
    parts = list(record.slices)
    if record.modality and not any(name == "modality" for name, _ in parts):
        parts.append(("modality", record.modality))
    return parts


def failures(
    records: Sequence[EvalRecord], values: Values, summary: Summary
) -> list[dict[str, Any]]:
    """Return counts by task of the failures of the answers, by the headline."""
    rows = []
    for row in headlines(summary.scores):
        task_records = [record for record in records if record.task == row.task]
        if not task_records:
            continue
        scores = values.get((row.task, row.metric), {})
        counts = collections.Counter(failure(record, scores) for record in task_records)
        rows.append(
            {
                "task": row.task,
                "items": len(task_records),
                "answered": len(task_records) - counts["error"],
                "empty": sum(not r.text and not r.generated for r in task_records),
                "unparsed": counts["unparsed"],
                "unscored": row.n_unscored or 0,
                "wrong": counts["wrong"],
                "errors": counts["error"],
            }
        )
    return rows


def failed_examples(
    records: Iterable[EvalRecord], values: Values, summary: Summary
) -> list[dict[str, Any]]:
    """Return a few answers of each task and kind of failure."""
    metric = {row.task: row.metric for row in headlines(summary.scores)}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    rows = []
    for record in records:
        task = record.task
        kind = failure(record, values.get((task, metric.get(task, "")), {}))
        if not kind or counts[task, kind] == EXAMPLES_PER_KIND:
            continue
        counts[task, kind] += 1
        rows.append(
            {
                "task": task,
                "kind": kind,
                "id": record.id,
                "prompt": truncate(record.prompt),
                "reference": truncate(record.answer),
                "answer": truncate(record.error or record.text),
            }
        )
    return sorted(rows, key=lambda row: (row["task"], row["kind"]))


def failure(record: EvalRecord, scores: Mapping[str, tuple[str, float]]) -> str:
    """Return error, unparsed or wrong; "" for a correct answer, or one scored by degrees."""
    if record.error:
        return "error"
    if record.family in CLOSED:
        if strict.parse_answer(record.family, record.text, record.prompt) is None:
            return "unparsed"
    value = scores.get(record.id, ("", 1.0))[1]
    return "wrong" if value == 0.0 else ""


def interval(row: Row, scale: float = 1.0) -> str:
    """Return "0.412–0.534" of a row; "0.412–0.534 †" where it has few groups."""
    text = bounds(row["ci_low"], row["ci_high"], scale)
    return marked(row, text) if text else "–"


def marked(row: Row, text: str) -> str:
    """Return the text of an interval, with FEW_MARK where the row has few groups."""
    return f"{text} {FEW_MARK}" if has_few_groups(row) else text


def interval_text(row: Row) -> str:
    """Return ", 95 % interval 0.412–0.534" for a sentence; "" for a row without an interval."""
    ends = bounds(row["ci_low"], row["ci_high"], 1.0)
    few = " (approximate: few groups)" if has_few_groups(row) else ""
    return f", 95 % interval {ends}{few}" if ends else ""


def few_groups_note(rows: Sequence[Row]) -> str:
    """Return the sentence of a caption on rows whose interval is not drawn; "" without any."""
    if not any(map(has_few_groups, rows)):
        return ""
    return (
        f" {FEW_MARK}: fewer than {intervals.FEW} groups; the interval is in the table and not "
        "drawn."
    )


def has_few_groups(row: Row) -> bool:
    """Return whether the interval of a row is approximate: it is marked, and not drawn."""
    return row.get("groups", intervals.FEW) < intervals.FEW


def format_metric(value: float, scale: float) -> str:
    """Return a number as published tables write it: percent to one digit, cosines to three."""
    return f"{value * scale:.1f}" if scale == PERCENT else f"{value * scale:.3f}"


def merge_interval_columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows with each pair of bounds as one column.

    The pairs are ci_low and ci_high, flips_low and flips_high. FEW_MARK in these replaces the
    column few_groups.
    """
    merged = []
    for row in rows:
        kept = {}
        for key, value in row.items():
            if key.endswith("_low"):
                name = key.removesuffix("_low")
                title = "95 % interval" if name == "ci" else f"{name}, 95 %"
                text = bounds(value, row[f"{name}_high"], 1.0)
                kept[title] = marked(row, text) if text else None
            elif not key.endswith("_high") and key != "few_groups":
                kept[key] = value
        merged.append(kept)
    return merged


def rename_columns(rows: Sequence[Row], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return rows with columns under other names; names: old -> new."""
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def bounds(low: float | None, high: float | None, scale: float) -> str | None:
    """Return "0.412–0.534"; "-0.1 to 0.2" where a dash could be a minus."""
    if low is None or high is None:
        return None
    return f"{format_metric(low, scale)}{' to ' if low < 0 else '–'}{format_metric(high, scale)}"


def drop_empty_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without the columns that are None in every row."""
    kept = [name for name in rows[0] if any(r[name] is not None for r in rows)] if rows else []
    return [{name: row[name] for name in kept} for row in rows]


def truncate(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= EXAMPLE_CHARS else f"{text[: EXAMPLE_CHARS - 1]}…"


def _equal(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the keys of all of them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]
