"""Records to numbers: one value an item and metric, then means with intervals over groups.

    family            metrics (the first is the headline of its tasks)
    vqa_closed        accuracy, unparsed
    vqa_mcq           accuracy, unparsed
    vqa_open          exact, token_f1
    captioning        token_f1, rouge_l, fact_recall
    image_generation  modality_match
    multimodal        token_f1, rouge_l, has_image, modality_match

All lie in 0..1; only `unparsed` is better low. An answer that cannot be parsed is wrong, a missing
picture matches nothing. `modality_match` is score_image.py's, and no BiomedCLIPScore.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval import score_text, stats, strict

Record = Mapping[str, Any]
PRIMARY = ("vqa_closed", "accuracy")


def values(record: Record) -> dict[str, float]:
    """Metric -> value of one record. {"family": "vqa_closed", "text": "Yes.", "answer": "yes"} ->
    {"accuracy": 1.0, "unparsed": 0.0}."""
    family, text, answer = record["family"], record["text"], record["answer"]
    if family in ("vqa_closed", "vqa_mcq"):
        read, expected = (strict.read(family, said, record["prompt"]) for said in (text, answer))
        if expected is None:
            raise ValueError(f"item {record['id']}: answer {answer!r} is no answer of a {family}")
        return {"accuracy": float(read == expected), "unparsed": float(read is None)}
    if family == "vqa_open":
        return {
            "exact": score_text.exact(text, answer),
            "token_f1": score_text.token_f1(text, answer),
        }
    pictured = {}
    if record["looks_like"] is not None and record["kind"]:
        pictured = {"modality_match": float(record["looks_like"] == record["kind"])}
    if family == "image_generation":
        return pictured
    written = {
        "token_f1": score_text.token_f1(text, answer),
        "rouge_l": score_text.rouge_l(text, answer),
    }
    if family == "captioning":
        known = {"fact_recall": score_text.recall(text, record["facts"])}
        return written | (known if record["facts"] else {})
    return written | {"has_image": float(bool(record["images"]))} | pictured


def summary(records: Sequence[Record], *, seed: int, resamples: int) -> list[dict[str, Any]]:
    """{task, metric, n, groups, value, ci_low, ci_high} for every task and metric."""
    rows = []
    for (task, metric), found in table(records).items():
        groups = [group for group, _ in found.values()]
        interval = stats.mean_interval(
            [value for _, value in found.values()], groups, seed=seed, resamples=resamples
        )
        rows.append(
            dict(
                task=task,
                metric=metric,
                n=interval.n,
                groups=interval.groups,
                value=interval.mean,
                ci_low=interval.low,
                ci_high=interval.high,
            )
        )
    return rows


def scores(
    before: Sequence[Record], after: Sequence[Record], *, seed: int, resamples: int
) -> list[dict[str, Any]]:
    """{task, metric, n, groups, before, after, diff, ci_low, ci_high}, the primary metric first.

    Over the items that both sides answered; the interval is of the paired difference.
    """
    one, two, rows = table(before), table(after), []
    for task, metric in two:
        first, second = one.get((task, metric), {}), two[task, metric]
        shared = [name for name in second if name in first]
        if not shared:
            continue
        old, new = ([side[name][1] for name in shared] for side in (first, second))
        groups = [second[name][0] for name in shared]
        interval = stats.paired_interval(old, new, groups, seed=seed, resamples=resamples)
        rows.append(
            dict(
                task=task,
                metric=metric,
                n=interval.n,
                groups=interval.groups,
                before=sum(old) / len(old),
                after=sum(new) / len(new),
                diff=interval.mean,
                ci_low=interval.low,
                ci_high=interval.high,
            )
        )
    return rows


def answered(records: Sequence[Record], answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """The records as if these texts had been the answers: for baselines without a model."""
    return [dict(record) | {"text": answers[record["id"]]} for record in records]


def table(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, tuple[str, float]]]:
    """(task, metric) -> id -> (group, value); tasks as they come, the primary one first."""
    found: dict[tuple[str, str], dict[str, tuple[str, float]]] = {}
    for record in sorted(records, key=lambda r: r["task"] != PRIMARY[0]):
        for metric, value in values(record).items():
            found.setdefault((record["task"], metric), {})[record["id"]] = (record["group"], value)
    return found
