"""Scores the cells of a reproduction from the records that its parts have on disk.

    WORKDIR/paper/choices/{records,judgments,image_scores}.jsonl
        -> the release's score of these answers, with an interval over groups     "released"
        -> this suite's score of the same answers                                  "strict"

Everything here is a function of these files, so that a citation can be checked against them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, per_record, release
from medmax_jax.eval.records import EvalRecord, read_records
from medmax_jax.eval.reproduction import published
from medmax_jax.eval.reproduction.published import Cell
from medmax_jax.eval.results import SUMMARY, Summary, read_summary
from medmax_jax.eval.stats import intervals
from medmax_jax.io.text_files import read_json_object

REPRODUCED, DIFFERS, FEW = "reproduced", "differs", "too few items"
NO_SCORE, NOT_RUN = "no score", "not run"
NO_ROWS = "no rows of it in --rows"
NO_JUDGE = "no judge; set --config.judge.endpoint=NAME@URL"
NO_SCORER = "no scorer weights; set --config.scorers=biomedclip:FOLDER"
UNREADABLE = "a reply of the judge does not begin with two scores, at which the release stops"
WIDEST = 0.1  # half an interval, as a share or a cosine; a wider one includes most other models too
_PLACES = 9  # decimals of a number in a citation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Holds the answers of one finished part, and what their scores depend on."""

    records: Sequence[EvalRecord]
    inputs: per_record.ScoringInputs
    resampling: intervals.Resampling
    summary: Summary
    run: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what the model answered, by item."""
        lines = [[r.id, r.text, list(r.generated), r.error] for r in self.records]
        return hashlib.sha256(json.dumps(sorted(lines)).encode()).hexdigest()


def read_answers(folder: Path) -> Answers | None:
    """Return the answers of a part; None where it was not run to its end."""
    if not (folder / SUMMARY).is_file():
        return None
    summary = read_summary(folder)
    judge, settings = summary.judge or {}, summary.settings
    return Answers(
        records=read_records(folder / "records.jsonl"),
        inputs=per_record.read(folder, judge=judge.get("judge")),
        resampling=intervals.Resampling(settings["seed"], settings["resamples"]),
        summary=summary,
        run=read_json_object(folder / "run.json"),
    )


def score_cells(cells: Sequence[Cell], parts: Sequence[Answers]) -> list[dict[str, Any]]:
    """Return {task, metric, published, status, reason, released, strict} of each cell.

    `released` and `strict` are {value, low, high, n, groups} in the unit of the published number,
    or None. parts: the finished parts of one mode of generation.
    """
    return [_scored(cell, parts) for cell in cells]


def _scored(cell: Cell, parts: Sequence[Answers]) -> dict[str, Any]:
    facts = {
        "table": cell.table,
        "task": cell.task,
        "metric": cell.metric,
        "published": cell.published.value,
        "tolerance": cell.tolerance,
        "source": cell.published.read,
    }
    if cell.task == published.AVERAGE:
        released, strict, reason = _average(parts)
    else:
        released, strict, reason = _of_task(cell, parts)
    released, strict = (_in_unit(score, cell.scale) for score in (released, strict))
    return facts | {
        "status": _status(cell, released, strict),
        "reason": reason,
        "released": released,
        "strict": strict,
    }


def _of_task(cell: Cell, parts: Sequence[Answers]) -> tuple[Any, Any, str]:
    """Return the released score, the strict one, and why one of them is missing."""
    for answers in parts:
        records = [record for record in answers.records if _belongs(record, cell)]
        if records:
            break
    else:
        stated = [row for part in parts for row in part.summary.not_run]
        return None, None, next((row["why"] for row in stated if row["task"] == cell.task), NO_ROWS)
    inputs, resampling = answers.inputs, answers.resampling
    strict = _strict_row(records, cell.metric, inputs, resampling)
    items = release.release_items(records, inputs, cell.metric)
    if not items:
        score = release.release_scores(records, inputs).get(cell.metric)
        missing = NO_JUDGE if cell.metric.startswith("judge_") else NO_SCORER
        if score and cell.metric == "judge_relative":
            return None, strict, UNREADABLE  # the reason in `score` repeats the reply
        return None, strict, score["paper_why"] if score else missing
    span = None if cell.metric == "judge_relative" else per_record.span(cell.metric)
    groups, values = zip(*items, strict=True)
    return _mean(values, groups, resampling, span).row(), strict, ""


def _belongs(record: EvalRecord, cell: Cell) -> bool:
    """Return whether a record is of a cell; one published number is over all of a family."""
    if cell.task == published.CHAT_OVERALL or cell.family == "multimodal":
        return record.family == cell.family
    return record.task == cell.task


def _strict_row(
    records: Sequence[EvalRecord],
    metric: str,
    inputs: per_record.ScoringInputs,
    resampling: intervals.Resampling,
) -> dict[str, Any] | None:
    if metric == "judge_relative":
        rows = aggregate.relative_score_row(records, inputs, resampling=resampling)
        return rows[0].to_json() if rows else None
    items = _strict_items(records, metric, inputs)
    if not items:
        return None
    groups, values = zip(*items, strict=True)
    return _mean(values, groups, resampling, per_record.span(metric)).row()


def _strict_items(
    records: Sequence[EvalRecord], metric: str, inputs: per_record.ScoringInputs
) -> list[tuple[str, float]]:
    values = [(record, aggregate.record_values(record, inputs)) for record in records]
    return [(record.group, scores[metric]) for record, scores in values if metric in scores]


def _average(parts: Sequence[Answers]) -> tuple[Any, Any, str]:
    """Return the mean over the twelve tasks of the table, where each has a released score."""
    released, strict = [], []
    for task in published.ACCURACY_TASKS:
        metric = "judge_correct" if task.endswith("_open") else "accuracy"
        for answers in parts:
            records = [record for record in answers.records if record.task == task]
            if records and (items := release.release_items(records, answers.inputs, metric)):
                released.append(tuple(zip(*items, strict=True))[::-1])
                items = _strict_items(records, metric, answers.inputs)
                strict.append(tuple(zip(*items, strict=True))[::-1])
    missing = len(published.ACCURACY_TASKS) - len(released)
    if missing:
        return None, None, f"{missing} of the {len(published.ACCURACY_TASKS)} tasks have no score"
    resampling = parts[0].resampling
    means = (intervals.suite_interval(side, resampling=resampling) for side in (released, strict))
    return *(mean.row() for mean in means), ""


def _mean(values, groups, resampling, span) -> intervals.Interval:
    return intervals.mean_interval(values, groups, resampling=resampling, span=span)


def _in_unit(row: Mapping[str, Any] | None, scale: float) -> dict[str, Any] | None:
    if row is None:
        return None
    ends = {"value": row["value"], "low": row["ci_low"], "high": row["ci_high"]}
    scaled = {k: None if end is None else round(end * scale, _PLACES) for k, end in ends.items()}
    return scaled | {"n": row["n"], "groups": row["groups"]}


def _status(cell: Cell, released: Mapping[str, Any] | None, strict: Any) -> str:
    """Return whether the published number is within the interval of the released score."""
    if released is None:
        return NO_SCORE if strict else NOT_RUN
    low, high = released["low"], released["high"]
    if low is None or released["groups"] < intervals.FEW:
        return FEW
    if not low - cell.tolerance <= cell.published.value <= high + cell.tolerance:
        return DIFFERS
    return REPRODUCED if (high - low) / 2 <= WIDEST * cell.scale else FEW
