"""Compares two evaluations: which is better on which task, and where the result is inconclusive.

    D1/records.jsonl  D2/records.jsonl -> items both answered -> scores both have
      -> each task's headline: paired interval, sign flips over groups, Holm over the tasks
      -> verdict

A task is decided when Holm's p is below 0.05. Other metrics have numbers and no verdict.
`can_find`: the smallest true difference that such a comparison finds four times of five.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.config import RECORD
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.stats import intervals, paired_tests
from medmax_jax.io import journal

LOWER_IS_BETTER = ("unparsed",)
INCONCLUSIVE = "nobody can say"
ASKED = ("task", "prompt", "answer", "image", "further_images", "group")


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
    records: dict[str, dict[str, Any]]
    known: per_record.ScoringInputs


def compare(first: str | Path, second: str | Path, *, seed: int, resamples: int) -> Comparison:
    """Compare two workdirs of eval.run; differences are second minus first."""
    sides = [_Evaluation(_records(Path(f)), per_record.read(f)) for f in (first, second)]
    shared = [name for name in sides[0].records if name in sides[1].records]
    for name in shared:
        _check_same(sides[0].records[name], sides[1].records[name])
    told = _other_scorers(*(side.known for side in sides))
    one, two = (
        _without(
            aggregate.scores_by_item([side.records[name] for name in shared], side.known), told
        )
        for side in sides
    )
    both = [key for key in one if key in two]
    if not both:
        raise ComparisonError(f"{first} and {second}: no item has a score on both sides")
    rows = [_row(key, one[key], two[key], seed=seed, resamples=resamples) for key in both]
    heads = {row["task"]: row for row in reversed(rows)}  # the first metric of each task
    adjusted = paired_tests.holm({task: row["p"] for task, row in heads.items()})
    for row in rows:
        if row is heads[row["task"]]:
            row["p_holm"] = adjusted[row["task"]]
            row["claim"] = _claim(row, (str(first), str(second)))
    suite = _suite(heads, one, two, seed=seed, resamples=resamples)
    return Comparison(
        rows=rows, suite=suite, left_out=_left_out(sides, shared, one, two) + list(told.values())
    )


def _suite(heads: Mapping, one: Mapping, two: Mapping, *, seed: int, resamples: int) -> dict:
    """Return both means over the common tasks, with equal weights, and their paired difference."""
    keys = [(task, row["metric"]) for task, row in heads.items()]
    found: dict[str, Any] = dict(tasks=len(keys))
    numbers = dict(seed=seed, resamples=resamples)
    span = min(per_record.span(metric) for _, metric in keys)
    for name, side in (("first", one), ("second", two)):
        parts = [_pairs(side[key], one[key], two[key]) for key in keys]
        mean = intervals.suite_interval(parts, **numbers, span=span)
        ends = {
            f"{name}_low": intervals.finite(mean.low),
            f"{name}_high": intervals.finite(mean.high),
        }
        found |= {name: mean.mean} | ends
    signed = [_signed(one[key], two[key]) for key in keys]
    mean = intervals.suite_interval(signed, **numbers, span=intervals.of_differences(span))
    return found | mean.row("diff")


def _pairs(side: Mapping, one: Mapping, two: Mapping) -> tuple[list[float], list[str]]:
    names = [name for name in one if name in two]
    return [side[name][1] for name in names], [one[name][0] for name in names]


def _other_scorers(one: per_record.ScoringInputs, two: per_record.ScoringInputs) -> dict[str, str]:
    """Return prefix of metric names -> why they are left out: another judge or scorer files."""
    told = {}
    if one.judge and two.judge and one.judge != two.judge:
        told["judge_"] = (
            f"judge_*: judged by {one.judge} and by {two.judge}, which differ in model, "
            "parameters, prompts or repeats"
        )
    for name in one.scorers.keys() & two.scorers.keys():
        if one.scorers[name] != two.scorers[name]:
            prefix = f"{per_record.PREFIX[name]}_"
            told[prefix] = f"{prefix}*: {name} of other files on each side"
    return told


def _without(found: Mapping, told: Mapping[str, str]) -> dict:
    return {key: side for key, side in found.items() if not key[1].startswith(tuple(told))}


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "records.jsonl"
    if not path.exists():
        raise ComparisonError(f"{path} is missing; name a --workdir that eval.run wrote")
    return {record["id"]: record for record in journal.read_jsonl(path, RECORD)}


def _check_same(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    secret = per_record.is_credentialed(one) or per_record.is_credentialed(two)
    for name in ASKED:
        first, second = one.get(name), two.get(name)
        if first != second:
            shown = f"item {one['id']}: {name} is {first!r} and {second!r}"
            if secret:
                shown = f"{name} of a credentialed item differs"
            raise ComparisonError(f"{shown}; evaluate both on the same items")


def _row(key, one: Mapping, two: Mapping, *, seed: int, resamples: int) -> dict[str, Any]:
    (task, metric), names = key, [name for name in one if name in two]
    groups = [one[name][0] for name in names]
    before, after = ([side[name][1] for name in names] for side in (one, two))
    numbers = dict(seed=seed, resamples=resamples)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    binary = set(before) | set(after) <= {0.0, 1.0}
    found = intervals.paired_row(
        before, after, groups, names=("first", "second"), span=per_record.span(metric), **numbers
    )
    least = intervals.minimum_detectable_effect(
        differences, groups, paired=True, span=per_record.span(metric)
    )
    return (
        dict(task=task, metric=metric)
        | found
        | dict(
            can_find=intervals.finite(least),
            p=paired_tests.sign_flip(differences, groups, **numbers),
            p_mcnemar=paired_tests.mcnemar(before, after).p if binary else None,
            p_holm=None,
            claim="",
        )
    )


def _claim(row: Mapping[str, Any], names: tuple[str, str]) -> str:
    if row["p_holm"] >= paired_tests.ALPHA:
        return INCONCLUSIVE
    better = row["diff"] * (-1 if row["metric"] in LOWER_IS_BETTER else 1) > 0
    return f"{names[better]} wins"


def _signed(one: Mapping, two: Mapping) -> tuple[list[float], list[str]]:
    names = [name for name in one if name in two]
    return [two[name][1] - one[name][1] for name in names], [one[name][0] for name in names]


def _left_out(sides: Sequence[_Evaluation], shared: Sequence[str], one, two) -> list[str]:
    tasks = [{r["task"] for r in side.records.values()} for side in sides]
    told = []
    for name, ours, theirs in (("first", *tasks), ("second", *reversed(tasks))):
        told += [f"{task}: not run by the {name}" for task in sorted(theirs - ours)]
    told += [
        f"{len(side.records) - len(shared)} items that only the {name} answered"
        for name, side in zip(("first", "second"), sides, strict=True)
        if len(side.records) > len(shared)
    ]
    for name, ours, theirs in (("first", one, two), ("second", two, one)):
        told += [
            f"{task} {metric}: only the {name} has it"
            for task, metric in ours
            if (task, metric) not in theirs
        ]
    return told
