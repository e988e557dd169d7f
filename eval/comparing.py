"""Two evaluations side by side: who wins where, and where nobody can say.

    D1/records.jsonl  D2/records.jsonl -> items both answered -> scores both have
      -> each task's headline: paired interval, sign flips over groups, Holm over the tasks -> claim

A task is won when Holm's p is below 0.05. Metrics beside the headline have numbers and no claim.
`can_find`: the least true difference that such a comparison finds four times of five.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import loop, paired, scoring, stats

LOWER_IS_BETTER = ("unparsed",)
NOBODY = "nobody can say"
ASKED = ("task", "prompt", "answer", "image", "group")


class ComparisonError(ValueError):
    """Two workdirs that cannot be compared; the message names what differs and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`rows`: one a task and metric, `suite`: the mean over headlines, `left_out`: and why."""

    rows: list[dict[str, Any]]
    suite: dict[str, Any]
    left_out: list[str]


def compare(first: str | Path, second: str | Path, *, seed: int, resamples: int) -> Comparison:
    """Of two workdirs of eval.run; differences are second minus first."""
    sides = [_records(Path(folder)) for folder in (first, second)]
    shared = [name for name in sides[0] if name in sides[1]]
    for name in shared:
        _check_same(sides[0][name], sides[1][name])
    one, two = (scoring.table([side[name] for name in shared]) for side in sides)
    both = [key for key in one if key in two]
    if not both:
        raise ComparisonError(f"{first} and {second}: no item has a score on both sides")
    rows = [_row(key, one[key], two[key], seed=seed, resamples=resamples) for key in both]
    heads = {row["task"]: row for row in reversed(rows)}  # the first metric of each task
    adjusted = paired.holm({task: row["p"] for task, row in heads.items()})
    for row in rows:
        if row is heads[row["task"]]:
            row["p_holm"] = adjusted[row["task"]]
            row["claim"] = _claim(row, (str(first), str(second)))
    parts = [
        _signed(one[task, row["metric"]], two[task, row["metric"]]) for task, row in heads.items()
    ]
    mean = stats.suite_interval(parts, seed=seed, resamples=resamples)
    suite = dict(tasks=len(parts), diff=mean.mean, ci_low=mean.low, ci_high=mean.high)
    return Comparison(rows=rows, suite=suite, left_out=_left_out(sides, shared, one, two))


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "records.jsonl"
    if not path.exists():
        raise ComparisonError(f"{path} is missing; name a --workdir that eval.run wrote")
    return {record["id"]: record for record in loop.read(path)}


def _check_same(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    for name in ASKED:
        if one[name] != two[name]:
            raise ComparisonError(
                f"item {one['id']}: {name} is {one[name]!r} and {two[name]!r}; evaluate both on "
                "the same items"
            )


def _row(key, one: Mapping, two: Mapping, *, seed: int, resamples: int) -> dict[str, Any]:
    (task, metric), names = key, [name for name in one if name in two]
    groups = [one[name][0] for name in names]
    before, after = ([side[name][1] for name in names] for side in (one, two))
    interval = stats.paired_interval(before, after, groups, seed=seed, resamples=resamples)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    binary = set(before) | set(after) <= {0.0, 1.0}
    return dict(
        task=task,
        metric=metric,
        n=interval.n,
        groups=interval.groups,
        first=sum(before) / len(before),
        second=sum(after) / len(after),
        diff=interval.mean,
        ci_low=interval.low,
        ci_high=interval.high,
        can_find=stats.detectable(differences, groups, paired=True),
        p=paired.sign_flip(differences, groups, seed=seed, resamples=resamples),
        p_mcnemar=paired.mcnemar(before, after).p if binary else None,
        p_holm=None,
        claim="",
    )


def _claim(row: Mapping[str, Any], names: tuple[str, str]) -> str:
    if row["p_holm"] >= paired.ALPHA:
        return NOBODY
    better = row["diff"] * (-1 if row["metric"] in LOWER_IS_BETTER else 1) > 0
    return f"{names[better]} wins"


def _signed(one: Mapping, two: Mapping) -> tuple[list[float], list[str]]:
    names = [name for name in one if name in two]
    return [two[name][1] - one[name][1] for name in names], [one[name][0] for name in names]


def _left_out(sides: Sequence[Mapping], shared: Sequence[str], one, two) -> list[str]:
    told = [
        f"{len(side) - len(shared)} items that only the {name} answered"
        for name, side in zip(("first", "second"), sides, strict=True)
        if len(side) > len(shared)
    ]
    for name, ours, theirs in (("first", one, two), ("second", two, one)):
        told += [
            f"{task} {metric}: only the {name} has it"
            for task, metric in ours
            if (task, metric) not in theirs
        ]
    return told
