"""Compares the models of several prediction files, and renders the page of eval.rescore.

    files with items in common  ->  paired differences of the strict scores, sign flips, Holm
    rows of rescoring.py        ->  published and strict scores, and the reasons of the differences

An item is the same in two files where its id, its question and its reference are. Up to
MAX_ALL_PAIRS files are compared each with each; of more, each with the first one, or with the one
that is named: Holm's correction of all pairs of many files would hide every difference.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.prediction_files import rescoring
from medmax_jax.eval.prediction_files.formats import JUDGE, Answer, PredictionFile
from medmax_jax.eval.reporting import comparison, page, tables
from medmax_jax.eval.stats import intervals, paired_tests
from medmax_jax.io import html_page

MAX_ALL_PAIRS = 8  # files
SHOWN = 3  # places of rows that are left out
REASON = "reasons"
TERMS = {
    "published": "mean of the verdicts in the file, or in the file next to it that it belongs to",
    "strict": "the same answers scored here: an unparsed one counts as wrong; exact match of open "
    "questions, without a judge",
    "difference": "strict minus published, on the same items",
    "unparsed": "answers from which no option can be read",
    "published, 95 %": "95 % confidence interval of the published score over groups",
    "strict, 95 %": "95 % confidence interval of the strict score over groups",
    "difference, 95 %": "95 % confidence interval of the difference over groups",
    "groups": "patients, images or problems: what the interval resamples; else the items",
    "not the same": "ids of both files whose question or reference differs; they are not compared",
    "second minus first": "difference of the strict scores on the items of both files",
    "p, Holm": "p of the sign-flip test, adjusted for the number of comparisons of the table",
}
Scores = Mapping[str, Mapping[str, ItemScore]]  # family -> key -> score


def comparisons(
    files: Sequence[PredictionFile],
    scores: Sequence[Scores],
    *,
    against: str = "",
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    """Return the paired tests of the files that share items; `scores`: of each file.

    A row is {set, first, second, task, metric, first_score, second_score, n, not_same, groups,
    few_groups, diff, ci_low, ci_high, mde, p, p_mcnemar, p_holm, claim}.
    """
    rows = []
    for family in dict.fromkeys(family for one in scores for family in one):
        items = {
            number: _items(file, family, scores[number])
            for number, file in enumerate(files)
            if family in scores[number]
        }
        for members in _sets(files, items):
            names = _names([files[number] for number in members])
            rows += _paired_rows(
                [items[number] for number in members], names, family,
                base=_base([files[number] for number in members], against), resampling=resampling,
            )  # fmt: skip
    return rows


def render(
    rows: Sequence[Mapping[str, Any]],
    files: Sequence[PredictionFile],
    compared: Sequence[Mapping[str, Any]],
    *,
    facts: Mapping[str, Any],
) -> str:
    """Return the page. rows: of rescoring.py; compared: of `comparisons`."""
    body = html_page.provenance(facts) + html_page.section("Result", _result(rows))
    for title, group in by_kind(rows).items():
        body += html_page.section(title, _table(score_table(group)))
    if reasons := _reasons(rows):
        body += html_page.section("Differences, by reason", _table(reasons))
    for title, group in _grouped(compared, lambda row: row["set"]).items():
        body += html_page.section(f"Paired tests: {title}", _table(_compared_table(group)))
    if left_out := _left_out(files):
        body += html_page.section("Left out, and notes", _table(left_out))
    return html_page.document("Predictions, scored again", body)


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return title -> the rows of one benchmark, family and verdict."""

    def title(row: Mapping[str, Any]) -> str:
        judged = row["verdict"] or "no verdicts in the file"
        judged = "verdicts of its judge, recorded" if judged == JUDGE else judged
        return ", ".join(part for part in (row["benchmark"], row["family"], judged) if part)

    return _grouped(rows, title)


def score_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of one kind as they are shown."""
    names = short_names([row["file"] for row in rows])
    shown = [
        {
            "file": names[row["file"]],
            "n": row["n"],
            "groups": row["groups"],
            "published": row["published"],
            "published, 95 %": tables.bounds(row["published_low"], row["published_high"], 1.0),
            "strict": row["strict"],
            "strict, 95 %": tables.interval(row),
            "unparsed": row["n_unparsed"] if row["metric"] == "accuracy" else None,
            "difference": row["diff"],
            REASON: "; ".join(f"{n} {why}" for why, n in row["reasons"].items()) or None,
        }
        for row in rows
    ]
    return tables.drop_empty_columns(shown)


def short_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of one kind in five columns, with each interval after its score."""
    names = short_names([row["file"] for row in rows])
    shown = []
    for row in rows:
        reasons = "; ".join(f"{n} {why}" for why, n in row["reasons"].items())
        unparsed = f", {row['n_unparsed']} unparsed" if row["n_unparsed"] else ""
        ends = tables.bounds(row["published_low"], row["published_high"], 1.0)
        groups = f" of {row['groups']:,} groups" if row["groups"] != row["n"] else ""
        shown.append(
            {
                "file": names[row["file"]],
                "items": f"{row['n']:,}{groups}",
                "published": f"{row['published']:.3f} ({ends or '–'})" if row["judged"] else None,
                "strict": f"{row['strict']:.3f} ({tables.interval(row)}){unparsed}",
                "difference": f"{row['diff']:+.3f}: {reasons}" if reasons else None,
            }
        )
    return shown


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> the shortest end of it that is unique among the paths."""
    parts = {path: Path(path).parts for path in dict.fromkeys(paths)}
    names = {}
    for path, own in parts.items():
        ends = range(1, len(own) + 1)
        others = [other for name, other in parts.items() if name != path]
        count = next((n for n in ends if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[path] = "/".join(own[-count:])
    return names


def _result(rows: Sequence[Mapping[str, Any]]) -> str:
    judged = [row for row in rows if row["published"] is not None and row["verdict"] != JUDGE]
    same = [row for row in judged if not row["reasons"]]
    low = [row for row in judged if row["diff"] < 0]
    lead = (
        f"{len({row['file'] for row in rows})} files. Of {len(judged)} published scores without a "
        f"judge, {len(same)} are the same item by item when the answers are scored strictly; "
        f"{len(low)} are lower and {sum(row['diff'] > 0 for row in judged)} are higher."
    )
    return html_page.paragraph(lead)


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = short_names([row["file"] for row in rows])
    return [
        {"file": names[row["file"]], "verdict": row["verdict"], "items": n, "reason": why}
        for row in rows
        for why, n in row["reasons"].items()
    ]


def _compared_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "first": row["first"],
            "second": row["second"],
            "n": row["n"],
            "not the same": row["not_same"],
            "groups": row["groups"],
            "score of the first": row["first_score"],
            "score of the second": row["second_score"],
            "second minus first": row["diff"],
            "difference, 95 %": tables.interval(row),
            "p, Holm": row["p_holm"],
            "verdict": row["claim"],
        }
        for row in rows
    ]


def _left_out(files: Sequence[PredictionFile]) -> list[dict[str, Any]]:
    names = short_names([str(file.path) for file in files])
    rows = []
    for file in files:
        for reason, places in file.left_out.items():
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            where = f"{', '.join(places[:SHOWN])}{more}"
            rows.append((names[str(file.path)], len(places), f"{reason}: {where}"))
        rows += [(names[str(file.path)], None, note) for note in rescoring.notes_of(file)]
    return [dict(zip(("file", "rows", "why"), row, strict=True)) for row in rows]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return html_page.table(
        list(rows[0]), [list(row.values()) for row in rows], definitions=TERMS
    )  # fmt: skip


def _grouped(rows: Sequence[Mapping[str, Any]], title) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    return groups


def _items(file: PredictionFile, family: str, scores: Scores) -> dict[Any, tuple[str, float]]:
    """Return identity of an item -> (group, strict score)."""
    return {
        _identity(answer): (rescoring.group_of(answer), scores[family][answer.key].lower)
        for answer in file.answers
        if answer.family == family
    }


def _identity(answer: Answer) -> tuple[str, ...]:
    """Return what is the same for one item in all files; letters of options may differ."""
    words = answer.options.get(answer.reference, answer.reference)
    question = text_metrics.tokens(answer.question)
    return answer.key, " ".join(question), " ".join(text_metrics.tokens(words))


def _sets(
    files: Sequence[PredictionFile], items: Mapping[int, Mapping[Any, Any]]
) -> list[list[int]]:
    """Return the numbers of files of one format that share items, two or more together."""
    sets: list[list[int]] = []
    for number, own in items.items():
        linked = [
            members
            for members in sets
            if files[members[0]].format == files[number].format
            and any(own.keys() & items[other].keys() for other in members)
        ]
        joined = sorted([number, *itertools.chain(*linked)])
        sets = [members for members in sets if members not in linked] + [joined]
    return [members for members in sets if len(members) > 1]


def _names(files: Sequence[PredictionFile]) -> list[str]:
    """Return the models, or the files where several are of one model."""
    models = [file.model for file in files]
    if len(set(models)) == len(models):
        return models
    names = short_names([str(file.path) for file in files])
    return [names[str(file.path)] for file in files]


def _base(files: Sequence[PredictionFile], against: str) -> int | None:
    """Return the file that the others are compared with; None: each with each."""
    found = [n for n, file in enumerate(files) if against and Path(against) == file.path]
    return found[0] if found else None if len(files) <= MAX_ALL_PAIRS else 0


def _paired_rows(
    items: Sequence[Mapping[Any, tuple[str, float]]],
    names: Sequence[str],
    family: str,
    *,
    base: int | None,
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    pairs = list(itertools.combinations(range(len(items)), 2))
    if base is not None:
        pairs = [(base, other) for other in range(len(items)) if other != base]
    key, rows = (family, rescoring.METRICS[family]), {}
    for first, second in pairs:
        if not items[first].keys() & items[second].keys():
            continue
        row = comparison.paired_test(key, items[first], items[second], resampling=resampling)
        row |= dict(first_score=row.pop("first"), second_score=row.pop("second"))
        ids = {item[0] for item in items[first]} & {item[0] for item in items[second]}
        row |= dict(not_same=len(ids) - row["n"])
        rows[first, second] = dict(first=names[first], second=names[second]) | row
    adjusted = paired_tests.holm({pair: row["p"] for pair, row in rows.items()})
    title = f"{family}, {len(items)} files"
    for pair, row in rows.items():
        row["p_holm"] = adjusted[pair]
        row["claim"] = comparison.verdict_of(row, (row["first"], row["second"]))
        row["set"] = title if base is None else f"{title}, each against {names[base]}"
    return list(rows.values())


def markdown(rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of scores and of paired tests for a terminal."""
    parts = [f"## {title}\n\n{page.markdown(short_table(g))}" for title, g in by_kind(rows).items()]
    groups = _grouped(compared, lambda row: row["set"])
    parts += [f"## {title}\n\n{page.markdown(_compared_table(g))}" for title, g in groups.items()]
    return "\n".join(parts)
