"""Aggregates records into rows per task and metric: values, intervals, the MedMax release's score.

    records + evidence -> verdicts (per_record.py) -> totals with every unread answer at its worst
                       -> 95 % intervals over groups, and the difference they could detect
    the same records   -> the scoring of the release (release.py), next to them

A row is {task, family, metric, mode, n, groups, few_groups, value, ci_low, ci_high, best,
n_unparsed, n_unscored, n_errors, of_scored, judge_sd, can_find, paper, paper_n, headline}. `value`
counts what could not be parsed or judged as wrong, `best` as right; `of_scored` is the value if it
were dropped. One group has no interval and no can_find (None).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.eval.metrics import per_record, release, strict
from medmax_jax.eval.metrics.per_record import NO_INPUTS, Record, ScoringInputs
from medmax_jax.eval.stats import intervals

PRIMARY = ("vqa_closed", "accuracy")
PROBMED = "probmed_closed"
KIND = "question_type"  # the slice with the question type of ProbMed


def record_values(record: Record, known: ScoringInputs = NO_INPUTS) -> dict[str, float]:
    """Return metric -> value of one record.

    {"family": "vqa_closed", "text": "Yes.", "answer": "yes"} ->
    {"accuracy": 1.0, "unparsed": 0.0}.
    """
    found = per_record.record_scores(record, known)
    numbers = {metric: verdict.lower for metric, verdict in found.items()}
    if "accuracy" in found:
        numbers["unparsed"] = float(found["accuracy"].status == strict.UNPARSED)
    return numbers


def summary(
    records: Sequence[Record],
    known: ScoringInputs = NO_INPUTS,
    *,
    mode: str,
    seed: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """Return the rows of every task and metric. `mode`: of the generation of the records."""
    rows = []
    for task, some in tasks_of(records).items():
        found: dict[str, list[tuple[Record, strict.ItemScore]]] = {}
        for record in some:
            for metric, verdict in per_record.record_scores(record, known).items():
                found.setdefault(metric, []).append((record, verdict))
        numbers = dict(seed=seed, resamples=resamples)
        made = relative_score_row(some, known, **numbers)
        made += [metric_row(metric, known, asked, **numbers) for metric, asked in found.items()]
        if task == PROBMED:
            made += paired_accuracy(some, known, **numbers)
        told = release.release_scores(some, known)
        for number, one in enumerate(made):
            paper = told.get(one["metric"], {"paper": None, "paper_n": None, "paper_why": ""})
            head = dict(task=task, family=some[0]["family"], metric=one.pop("metric"), mode=mode)
            rows.append(head | one | paper | {"headline": number == 0})
    return rows


def not_judged(records: Sequence[Record], known: ScoringInputs = NO_INPUTS) -> list[str]:
    """Return the tasks that require a judge and have none: they have text metrics only."""
    wanted = {"vqa_open": per_record.CORRECT} | dict.fromkeys(
        per_record.PAIRWISE_FAMILIES, per_record.RELATIVE
    )
    return [
        task
        for task, some in tasks_of(records).items()
        if (kind := wanted.get(some[0]["family"])) and kind not in known.judgments
    ]


def not_scored(records: Sequence[Record], known: ScoringInputs = NO_INPUTS) -> list[str]:
    """Return the tasks without any metric: those of images without a configured scorer."""
    return [
        task
        for task, some in tasks_of(records).items()
        if not any(per_record.record_scores(record, known) for record in some)
    ]


def tasks_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return task -> its records, the primary task first."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: r["task"] != PRIMARY[0]):
        found.setdefault(record["task"], []).append(record)
    return found


def metric_row(
    metric: str,
    known: ScoringInputs,
    asked: Sequence[tuple[Record, strict.ItemScore]],
    *,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """Return the summary row of one metric: mean, confidence interval and counts."""
    verdicts, groups = [v for _, v in asked], [r["group"] for r, _ in asked]
    total, worst = strict.total(verdicts), [v.lower for v in verdicts]
    span = per_record.span(metric)
    interval = intervals.mean_interval(worst, groups, seed=seed, resamples=resamples, span=span)
    votes = None
    if metric == "judge_correct":
        lines = [known.judgments[per_record.CORRECT].get(r["id"]) for r, _ in asked]
        votes = [line["votes"] for line in lines if line and line["votes"]]
    return (
        dict(metric=metric)
        | interval.row()
        | dict(
            best=total.best,
            n_unparsed=total.n_unparsed,
            n_unscored=total.n_unscored,
            n_errors=sum(bool(r.get("error")) for r, _ in asked),
            of_scored=total.of_scored,
            judge_sd=intervals.judge_sd(votes, len(asked)) if votes else None,
            can_find=intervals.finite(
                intervals.minimum_detectable_effect(worst, groups, paired=False, span=span)
            ),
        )
    )


def relative_score_row(
    records: Sequence[Record], known: ScoringInputs, *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """Return the judge's mean score of the model over its mean score of the reference.

    Returns [] without a judge.
    """
    if (
        per_record.RELATIVE not in known.judgments
        or records[0]["family"] not in per_record.PAIRWISE_FAMILIES
    ):
        return []
    means = [_mean(per_record.pairs(r, known, per_record.RELATIVE)) for r in records]
    whole = strict.comparison(means)
    worst = [pair or (strict.MAX_SCORE, strict.MIN_SCORE) for pair in means]
    interval = intervals.ratio_interval(
        [b for _, b in worst],
        [a for a, _ in worst],
        [r["group"] for r in records],
        seed=seed,
        resamples=resamples,
        span=(strict.MIN_SCORE / strict.MAX_SCORE, strict.MAX_SCORE / strict.MIN_SCORE),
    )
    return [
        dict(metric="judge_relative")
        | interval.row()
        | dict(
            best=whole["best"],
            n_unparsed=0,
            n_unscored=whole["n_unscored"],
            n_errors=sum(bool(r.get("error")) for r in records),
            of_scored=whole["ratio_of_means"],
            judge_sd=None,
            can_find=None,
        )
        | {name: whole[name] for name in ("mean_of_ratios", "win", "tie", "loss")}
    ]


def paired_accuracy(
    records: Sequence[Record], known: ScoringInputs, *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """Return ProbMed's paired accuracy, overall and by question type.

    An image counts as right only if all questions of one type about it are answered correctly.
    """
    kinds = [dict(r["slices"]).get(KIND, "") for r in records]
    verdicts = [per_record.record_scores(r, known)["accuracy"] for r in records]
    keys = [(r["image"], kind) for r, kind in zip(records, kinds, strict=True)]
    first = {key: r for key, r in reversed(list(zip(keys, records, strict=True)))}
    merged = strict.all_correct_by_key(verdicts, keys)
    made = []
    for kind in ("", *sorted({k for k in kinds if k})):
        asked = [(first[key], v) for key, v in merged.items() if not kind or key[1] == kind]
        name = f"paired_accuracy {kind}".strip()
        made.append(metric_row(name, known, asked, seed=seed, resamples=resamples))
    return made


def scores(
    before: Sequence[Record], after: Sequence[Record], *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """Return the paired scores of two sets of records, the primary metric first.

    Rows are {task, metric, n, groups, few_groups, before, after, diff, ci_low, ci_high}, over the
    items that both sides answered.
    """
    one, two, rows = scores_by_item(before), scores_by_item(after), []
    for task, metric in two:
        first, second = one.get((task, metric), {}), two[task, metric]
        shared = [name for name in second if name in first]
        if not shared:
            continue
        old, new = ([side[name][1] for name in shared] for side in (first, second))
        groups = [second[name][0] for name in shared]
        found = intervals.paired_row(
            old, new, groups, seed=seed, resamples=resamples, span=per_record.span(metric)
        )
        rows.append(dict(task=task, metric=metric) | found)
    return rows


def with_answers(records: Sequence[Record], answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the records with these texts as their answers and no failures: for baselines."""
    return [dict(record) | {"text": answers[record["id"]], "error": ""} for record in records]


def scores_by_item(
    records: Sequence[Record], known: ScoringInputs = NO_INPUTS
) -> dict[tuple[str, str], dict[str, tuple[str, float]]]:
    """Return (task, metric) -> id -> (group, value); tasks in order, the primary one first."""
    found: dict[tuple[str, str], dict[str, tuple[str, float]]] = {}
    for task, some in tasks_of(records).items():
        for record in some:
            for metric, value in record_values(record, known).items():
                one = found.setdefault((task, metric), {})
                one[record["id"]] = (record["group"], value)
    return found


def _mean(votes: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not votes:
        return None
    return tuple(sum(side) / len(votes) for side in zip(*votes, strict=True))
