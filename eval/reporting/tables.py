"""Builds the tables of the page: headlines, published scores, slices and failures.

summary["scores"]  rows of a task and metric  ->  one row per task, its headline metric
records            items and answers          ->  rows by slice; wrong, unread and failed ones
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medmax_jax.eval.metrics import per_record, strict
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import catalog

Row = Mapping[str, Any]
Values = Mapping[tuple[str, str], Mapping[str, tuple[str, float]]]  # see aggregate.scores_by_item
LEAST = 20  # items of a slice: with fewer the interval is too wide to be useful
MOST = 40  # values of a slice's name: with more it names images and not kinds of them
WRONG = 3  # examples of each kind
SHOWN = 200  # characters of an example
FEW_MARK = "†"  # of intervals over fewer groups than intervals.FEW
PERCENT = 100.0
OURS = {"BiomedCLIP image-image cosine": "clip_image_image"}  # where it is not the headline
CLOSED = ("vqa_closed", "vqa_mcq")


def headlines(scores: Sequence[Row]) -> list[Row]:
    """Return the headline row of each task: as marked, else its first."""
    found: dict[str, Row] = {}
    for row in scores:
        if row.get("headline") or row["task"] not in found:
            found[row["task"]] = row
    return list(found.values())


def main_table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per task; columns that no task has are left out."""
    rows = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "n": row["n"],
            "groups": row["groups"],
            "value": row["value"],
            "95 % interval": interval(row),
            "at best": row.get("best"),
            "can find": row.get("can_find"),
            "as released": row.get("paper"),
            "floor": row.get("floor"),
        }
        for row in headlines(summary["scores"])
    ]
    return drop_empty_columns(rows)


def floors(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return task by baseline: the scores of answers without an image or a model."""
    known = {
        (floor["name"], row["task"], row["metric"]): row["value"]
        for floor in summary.get("floors", ())
        for row in floor["scores"]
    }
    names = dict.fromkeys(name for name, _, _ in known)
    rows = [
        {"task": row["task"], "metric": row["metric"], "the model": row["value"]}
        | {name: known.get((name, row["task"], row["metric"])) for name in names}
        for row in headlines(summary["scores"])
    ]
    return [row for row in rows if any(row[name] is not None for name in names)]


def other_metrics(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all other metrics."""
    first = {(row["task"], row["metric"]) for row in headlines(summary["scores"])}
    rows = [row for row in summary["scores"] if (row["task"], row["metric"]) not in first]
    return drop_empty_columns(
        [
            {
                "task": row["task"],
                "metric": row["metric"],
                "n": row["n"],
                "value": row["value"],
                "95 % interval": interval(row),
                "release's score": row.get("paper"),
            }
            for row in rows
        ]
    )


def published(summary: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]], list[str]]]:
    """Return (metric, rows, differences) for the tasks that have published scores.

    The metric is the published one, and the rows have the scores of both.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    families: dict[str, list[str]] = {}
    for head in headlines(summary["scores"]) if is_suite(summary) else ():
        card = catalog.task_spec(head["task"], head.get("family", ""))
        for kind in dict.fromkeys(p.metric for p in card.published) if card else ():
            metric = OURS.get(kind, card.metric)
            same = [
                r for r in summary["scores"] if (r["task"], r["metric"]) == (head["task"], metric)
            ]
            row = same[0] if same else None
            scale = 1.0 if "cosine" in kind else PERCENT
            released = row.get("paper") if row else None
            cells = {
                "task": head["task"],
                "here": format_metric(row["value"], scale) if row else None,
                "95 %": interval(row, scale) if row else None,
                "as released": None if released is None else format_metric(released, scale),
            }
            cells |= {p.model: p.value for p in card.published if p.metric == kind}
            found.setdefault(kind, []).append(cells)
            families.setdefault(kind, []).append(card.family)
    return [
        (kind, _equal(rows), [catalog.DIFFERS[f] for f in dict.fromkeys(families[kind])])
        for kind, rows in found.items()
    ]


def is_suite(summary: Mapping[str, Any]) -> bool:
    """Return whether the items are of the suite, not of the embedded sample."""
    return list(summary["settings"]["questions"]) != ["sample"]


def not_run(summary: Mapping[str, Any], records: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tasks of the suite that have no score here, and why."""
    have = {row["task"] for row in summary["scores"]}
    told = {one["task"]: one["why"] for one in summary.get("not_run", ())}
    if is_suite(summary):
        absent = {task: "no items of it were given" for task in catalog.TASKS if task not in have}
        told = absent | told
    asked = dict.fromkeys(record["task"] for record in records if record["task"] not in have)
    told |= {task: "answered, but no scorer said how well; see config.scorers" for task in asked}
    return [
        {
            "task": task,
            "why": why,
            "its rows": catalog.TASKS[task].source if task in catalog.TASKS else None,
        }
        for task, why in told.items()
    ]


def slices(
    records: Sequence[Row], values: Values, summary: Mapping[str, Any], *, seed: int, resamples: int
) -> tuple[list[dict[str, Any]], int]:
    """Return the headline metric by slice, and how many slices have too few items."""
    metric = {row["task"]: row["metric"] for row in headlines(summary["scores"])}
    parts: dict[tuple[str, str], dict[str, list[tuple[str, float]]]] = {}
    for record in records:
        known = values.get((record["task"], metric.get(record["task"], "")), {})
        if record["id"] not in known:
            continue
        for name, value in record_slices(record):
            by_value = parts.setdefault((record["task"], name), {})
            by_value.setdefault(value, []).append(known[record["id"]])
    rows, few = [], 0
    for (task, name), by_value in parts.items():
        if len(by_value) < 2 or len(by_value) > MOST:
            continue
        for value, some in sorted(by_value.items()):
            if len(some) < LEAST:
                few += 1
                continue
            groups, numbers = zip(*some, strict=True)
            found = intervals.mean_interval(
                numbers, groups, seed=seed, resamples=resamples, span=per_record.span(metric[task])
            )
            rows.append(
                {
                    "task": task,
                    "metric": metric[task],
                    "slice": f"{name}: {value}",
                    "n": found.n,
                    "groups": found.groups,
                    "value": found.mean,
                    "95 % interval": interval(found.row()),
                }
            )
    return rows, few


def record_slices(record: Row) -> list[tuple[str, str]]:
    """Return (name, value) of a record's slices; the modality of embedded images is one."""
    found = [(str(name), str(value)) for name, value in record.get("slices", ())]
    if record.get("kind") and not any(name == "modality" for name, _ in found):
        found.append(("modality", str(record["kind"])))
    return found


def failures(records: Sequence[Row], values: Values, summary: Mapping[str, Any]) -> list[dict]:
    """Return counts by task of the failures of the answers, by the headline."""
    rows = []
    for row in headlines(summary["scores"]):
        some = [record for record in records if record["task"] == row["task"]]
        if not some:
            continue
        known = values.get((row["task"], row["metric"]), {})
        kinds = collections.Counter(failure(record, known) for record in some)
        rows.append(
            {
                "task": row["task"],
                "items": len(some),
                "answered": len(some) - kinds["error"],
                "empty": sum(not r["text"] and not r["images"] for r in some),
                "unparsed": kinds["unparsed"],
                "unscored": row.get("n_unscored") or 0,
                "wrong": kinds["wrong"],
                "errors": kinds["error"],
            }
        )
    return rows


def failed_examples(
    records: Iterable[Row], values: Values, summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a few answers of each task and kind of failure."""
    metric = {row["task"]: row["metric"] for row in headlines(summary["scores"])}
    told: collections.Counter[tuple[str, str]] = collections.Counter()
    rows = []
    for record in records:
        task = record["task"]
        why = failure(record, values.get((task, metric.get(task, "")), {}))
        if not why or told[task, why] == WRONG:
            continue
        told[task, why] += 1
        rows.append(
            {
                "task": task,
                "what": why,
                "id": record["id"],
                "prompt": truncate(record["prompt"]),
                "reference": truncate(record["answer"]),
                "answer": truncate(record.get("error") or record["text"]),
            }
        )
    return sorted(rows, key=lambda row: (row["task"], row["what"]))


def failure(record: Row, known: Mapping[str, tuple[str, float]]) -> str:
    """Return error, unparsed or wrong; "" for a correct answer, or one scored by degrees."""
    if record.get("error"):
        return "error"
    if record["family"] in CLOSED:
        if strict.parse_answer(record["family"], record["text"], record["prompt"]) is None:
            return "unparsed"
    value = known.get(record["id"], ("", 1.0))[1]
    return "wrong" if value == 0.0 else ""


def interval(row: Row, scale: float = 1.0) -> str:
    """Return "0.412–0.534" of a row; "0.412–0.534 †" where it has few groups."""
    found = bounds(row["ci_low"], row["ci_high"], scale)
    return marked(row, found) if found else "–"


def marked(row: Row, text: str) -> str:
    """Return the text of an interval, with FEW_MARK where the row has few groups."""
    return f"{text} {FEW_MARK}" if row.get("groups", intervals.FEW) < intervals.FEW else text


def format_metric(value: float, scale: float) -> str:
    """Return a number as published tables write it: percent to one digit, cosines to three."""
    return f"{value * scale:.1f}" if scale == PERCENT else f"{value * scale:.3f}"


def merge_interval_columns(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows with each pair of bounds as one column.

    The pairs are ci_low and ci_high, flips_low and flips_high. FEW_MARK in these replaces the
    column few_groups.
    """
    found = []
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
        found.append(kept)
    return found


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
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _equal(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the keys of all of them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]
