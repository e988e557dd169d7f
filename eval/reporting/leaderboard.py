"""Ranks several evaluations in one table: which differences are significant, and which are not.

    D1, D2, D3, ..  ->  items that all of them answered, scored by the same judge and scorers
      ->  each task: the headline of each model with its interval over groups
      ->  every pair: sign flips over groups on the shared items, Holm over the pairs of the task
      ->  letters: two models share one if they do not differ significantly
      ->  the same for the mean over the tasks that all models have; it orders the table

A run of other items is named and not in the table; scores by another judge or scorer are named and
left out, so that every column compares like with like.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.reporting import comparison, definitions, tables
from medmax_jax.eval.stats import intervals, paired_tests
from medmax_jax.io import csv_files, html_page

MEAN = "mean"  # the column of the mean over the tasks
_TERMS = {
    "rank": "by the mean over the tasks; the letters show which ranks are significant",
    MEAN: "mean of the headline scores over the tasks that all models have, with equal weights",
}
_LEAD = (
    "Each cell has the score, its 95 % interval over groups (patients or volumes), and letters: "
    "two models that share a letter in a column do not differ significantly (paired sign flips "
    "over groups on the same items, Holm over all pairs of the column, 5 %)."
)
Scores = Mapping[str, tuple[str, float]]  # id -> (group, value)
Part = tuple[Sequence[float], Sequence[str]]  # values and groups of a task's items


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Holds the table. rows: one per model, best first; `left_out`: with the reason.

    A row is {rank, model, workdir, mean: CELL, tasks: {task: CELL}}; CELL is {value, low, high, n,
    groups, letters}, or None. tasks: task -> metric. pairs: {column, first, second, p_holm}.
    """

    tasks: dict[str, str]
    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    left_out: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    where: str
    model: str
    records: Mapping[str, EvalRecord]
    inputs: per_record.ScoringInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Column:
    """A column: for each run, the values of the same items; of MEAN one part per task."""

    metric: str
    span: intervals.Span
    parts: Mapping[str, Sequence[Part]]


def build(folders: Mapping[str, Path], *, seed: int, resamples: int) -> Leaderboard:
    """Rank finished evaluations; folders: workdir as it was given -> its local folder."""
    n_pairs = len(folders) * (len(folders) - 1) // 2
    if resamples * paired_tests.ALPHA < n_pairs:
        raise comparison.ComparisonError(
            f"--resamples is {resamples}, too few for {n_pairs} pairs: no adjusted p could be "
            f"below {paired_tests.ALPHA}; use at least {int(n_pairs / paired_tests.ALPHA) + 1}"
        )
    resampling = intervals.Resampling(seed, resamples)
    runs, left_out = _of_the_same_items([_read(*pair) for pair in folders.items()])
    if len(runs) < 2:
        reasons = "".join(f"; {line}" for line in left_out)
        raise comparison.ComparisonError(
            f"{len(runs)} evaluation can be in the table; required: 2 or more of the same items"
            f"{reasons}"
        )
    scores, lines = _with_the_same_scorers(runs)
    columns, more = _columns(scores)
    left_out += lines + more
    if mean := _mean_column(columns, list(scores)):
        columns = {MEAN: mean} | columns
    cells, pairs = {}, []
    for name, column in columns.items():
        cells[name], tested = _cells(column, resampling)
        pairs += [{"column": name} | pair for pair in tested]
    rows = [
        {
            "model": run.model,
            "workdir": run.where,
            "mean": cells.get(MEAN, {}).get(run.where),
            "tasks": {name: cells[name].get(run.where) for name in columns if name != MEAN},
        }
        for run in runs
    ]
    rows.sort(key=_order)
    return Leaderboard(
        tasks={name: column.metric for name, column in columns.items() if name != MEAN},
        rows=[{"rank": number} | row for number, row in enumerate(rows, start=1)],
        pairs=pairs,
        left_out=left_out,
    )


def render(board: Leaderboard, *, facts: Mapping[str, Any]) -> str:
    """Return the page, which one script sorts; facts: for `html_page.provenance`."""
    best, *others = board.rows
    body = html_page.provenance(facts | {"evaluations": len(board.rows)})
    if best["mean"]:
        shared = [row["model"] for row in others if _share(best["mean"], row["mean"])]
        lead = f"{best['model']} has the highest mean, {best['mean']['value']:.3f}"
        lead += f", and does not differ significantly from {', '.join(shared)}." if shared else "."
        body += html_page.paragraph(lead)
    body += html_page.paragraph(_LEAD)
    names = [*([MEAN] if best["mean"] else []), *board.tasks]
    head = ["model", "rank", *names, "workdir"]
    rows = [
        [
            html_page.SortedCell(row["model"], row["model"]),
            html_page.SortedCell(str(row["rank"]), row["rank"]),
            *(_page_cell(row["mean"] if name == MEAN else row["tasks"][name]) for name in names),
            html_page.SortedCell(row["workdir"], row["workdir"]),
        ]
        for row in board.rows
    ]
    metrics = {
        task: f"{metric}: {definitions.metric_definition(metric)}"
        for task, metric in board.tasks.items()
    }
    table = html_page.sortable_table(head, rows, definitions=_TERMS | metrics)
    body += html_page.section("Leaderboard", table)
    terms = [[task, metric, definitions.metric_definition(metric)]
             for task, metric in board.tasks.items()]  # fmt: skip
    body += html_page.section("Metrics", html_page.table(["task", "metric", "definition"], terms))
    if board.left_out:
        lines = "".join(html_page.paragraph(f"{line}.") for line in board.left_out)
        body += html_page.section("Left out", lines)
    return html_page.document("Leaderboard", body, script=html_page.SORT_SCRIPT)


def as_csv(board: Leaderboard) -> str:
    """Return the table as CSV: each score with its interval and letters in columns of their own."""
    names = [MEAN, *board.tasks]
    fields = ("value", "low", "high", "letters")
    head = ["rank", "model", "workdir", *(f"{n} {f}" for n in names for f in fields)]
    rows = []
    for row in board.rows:
        cells = [row["mean"], *row["tasks"].values()]
        values = [(cell or {}).get(field) for cell in cells for field in fields]
        rows.append([row["rank"], row["model"], row["workdir"], *values])
    return csv_files.csv_text(head, rows)


def _read(where: str, folder: Path) -> _Run:
    summary = tables.finished_summary(folder, where)
    judge, names = summary.judge or {}, (summary.model, summary.adapter)
    return _Run(
        where=where,
        model=" + ".join(tables.without_folder(name) for name in names if name),
        records=comparison.records_by_id(folder),
        inputs=per_record.read(folder, judge=judge.get("judge")),
    )


def _of_the_same_items(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """Return the runs whose items are those of the first run, and why others are left out."""
    first, kept, left_out = runs[0], [runs[0]], []
    for run in runs[1:]:
        shared = [name for name in first.records if name in run.records]
        try:
            for name in shared:
                comparison.check_same(first.records[name], run.records[name])
        except comparison.ComparisonError as error:
            left_out.append(f"{run.where}: not compared with {first.where}: {error}")
            continue
        if shared:
            kept.append(run)
        else:
            left_out.append(f"{run.where}: not compared: it has no item of {first.where}")
    return kept, left_out


def _with_the_same_scorers(
    runs: Sequence[_Run],
) -> tuple[dict[str, Mapping[tuple[str, str], Scores]], list[str]]:
    """Return workdir -> (task, metric) -> scores, without those of another judge or scorer.

    The judge and the files of a scorer are those of most runs; the first one where two are equal.
    """
    by_run = {run.where: _fingerprints(run.inputs) for run in runs}
    prefixes = dict.fromkeys(prefix for found in by_run.values() for prefix in found)
    usual = {
        prefix: collections.Counter(
            found[prefix] for found in by_run.values() if prefix in found
        ).most_common(1)[0][0]
        for prefix in prefixes
    }
    scores, left_out = {}, []
    for run in runs:
        found = by_run[run.where]
        other = [prefix for prefix in found if found[prefix] != usual[prefix]]
        table = aggregate.scores_by_item(list(run.records.values()), run.inputs)
        scores[run.where] = {
            key: values for key, values in table.items() if not key[1].startswith(tuple(other))
        }
        left_out += [
            f"{run.where}: {prefix}*: by {found[prefix]}, and by {usual[prefix]} elsewhere"
            for prefix in other
        ]
    return scores, left_out


def _fingerprints(inputs: per_record.ScoringInputs) -> dict[str, str]:
    """Return prefix of metrics -> fingerprint of what computed them."""
    found = {f"{per_record.PREFIX[name]}_": value for name, value in inputs.scorers.items()}
    return ({"judge_": inputs.judge} if inputs.judgments else {}) | found


def _columns(
    scores: Mapping[str, Mapping[tuple[str, str], Scores]],
) -> tuple[dict[str, _Column], list[str]]:
    """Return task -> column: the first metric of the task that two runs have, on shared items."""
    columns: dict[str, _Column] = {}
    left_out = []
    for task, metric in dict.fromkeys(key for table in scores.values() for key in table):
        having = {
            where: table[task, metric] for where, table in scores.items() if (task, metric) in table
        }
        if task in columns or len(having) < 2:
            continue
        ids = set.intersection(*map(set, having.values()))
        if not ids:
            left_out.append(
                f"{task} {metric}: no item has a score in all {len(having)} of its runs"
            )
            continue
        parts = {}
        for where, table in having.items():
            groups, values = zip(*(table[name] for name in sorted(ids)), strict=True)
            parts[where] = [(values, groups)]
            if len(table) > len(ids):
                only = len(table) - len(ids)
                left_out.append(f"{where}: {only} items of {task} that another run did not answer")
        left_out += [f"{where}: no {metric} of {task}" for where in scores if where not in having]
        columns[task] = _Column(metric=metric, span=per_record.span(metric), parts=parts)
    if not columns:
        raise comparison.ComparisonError("no task has a score in two of the evaluations")
    return columns, left_out


def _mean_column(columns: Mapping[str, _Column], runs: Sequence[str]) -> _Column | None:
    """Return the column of the mean over the tasks that all runs have; None without any."""
    shared = [column for column in columns.values() if len(column.parts) == len(runs)]
    if not shared:
        return None
    parts = {run: [column.parts[run][0] for column in shared] for run in runs}
    return _Column(metric=MEAN, span=min(column.span for column in shared), parts=parts)


def _cells(
    column: _Column, resampling: intervals.Resampling
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return workdir -> cell, and the adjusted p of every pair."""
    means = {
        where: intervals.suite_interval(parts, resampling=resampling, span=column.span)
        for where, parts in column.parts.items()
    }
    order = sorted(means, key=lambda where: -means[where].mean)
    p_values = {
        pair: _p_value(*(column.parts[where] for where in pair), resampling)
        for pair in itertools.combinations(order, 2)
    }
    adjusted = paired_tests.holm(p_values)
    different = [pair for pair, p in adjusted.items() if p < paired_tests.ALPHA]
    letters = paired_tests.letters(order, different)
    cells = {}
    for where in order:
        row = means[where].row()
        ends = {"value": row["value"], "low": row["ci_low"], "high": row["ci_high"]}
        counts = {"n": row["n"], "groups": row["groups"]}
        cells[where] = ends | counts | {"letters": letters[where]}
    pairs = [{"first": a, "second": b, "p_holm": p} for (a, b), p in adjusted.items()]
    return cells, pairs


def _p_value(
    first: Sequence[Part], second: Sequence[Part], resampling: intervals.Resampling
) -> float:
    """Return p of sign flips over groups, of the difference of the means over the parts."""
    differences, groups = [], []
    for (before, names), (after, _) in zip(first, second, strict=True):
        differences += [(b - a) / len(before) for a, b in zip(before, after, strict=True)]
        groups += names
    return paired_tests.sign_flip(differences, groups, resampling=resampling)


def _order(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the key that sorts rows: by the mean, else by the first task; missing ones last."""
    cells = [row["mean"], *row["tasks"].values()]
    return tuple(-cell["value"] if cell else float("inf") for cell in cells)


def _share(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(set(_letters(first)) & set(_letters(second)))


def _letters(cell: Mapping[str, Any]) -> list[str]:
    return re.findall(r"[a-z]\d*", cell["letters"])


def _page_cell(cell: Mapping[str, Any] | None) -> html_page.SortedCell:
    if cell is None:
        return html_page.SortedCell(html_page.NOTHING, None)
    text = tables.bounds(cell["low"], cell["high"], 1.0)
    lines = (tables.marked(cell, text) if text else html_page.NOTHING, cell["letters"])
    return html_page.SortedCell(f"{cell['value']:.3f}", cell["value"], lines)
