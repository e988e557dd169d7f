"""Reads the cards and the items of a user's own benchmark: `eval.run --cards=my_cards.py`.

my_cards.py     CARDS = (TaskSpec(task="own_mcq", family="vqa_mcq", metric="accuracy", ..),)
items.jsonl     {"question": "Which?", "options": ["CT", "MRI"], "answer": "B", "images": ["a.png"],
                 "group": "patient 7", "tags": {"organ": "lung"}, "task": "own_mcq"}

The file of the cards is executed, like a config file. `task` may be left out with one card, and
`tags` may be a list: {"portable": "yes"} for items that have the tag, "no" for the others.
"""

import dataclasses
import hashlib
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax import arguments
from medmax_jax.endpoints import egress
from medmax_jax.eval.benchmarks.card import Published, TaskSpec
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics.question_sets import QuestionSets
from medmax_jax.eval.records import Item
from medmax_jax.eval.tasks import catalog
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks.families import FAMILIES, FAMILY_BY_QUESTION_TYPE, FAMILY_BY_TASK
from medmax_jax.io.errors import printable

QUESTION_TYPES = {name: kind for kind, name in FAMILY_BY_QUESTION_TYPE.items()}
TASK_NAMES = {name: kind for kind, name in FAMILY_BY_TASK.items()}
METRICS = {  # family -> metrics that its first row can have, with and without a judge or a scorer
    "vqa_closed": ("accuracy",),
    "vqa_mcq": ("accuracy",),
    "vqa_rationale": ("accuracy",),
    "vqa_open": ("judge_correct", "exact"),
    "vqa_numeric": ("mra",),
    "captioning": ("clip_image_text", "token_f1"),
    "image_generation": ("clip_image_text", "efficientnet_image_image"),
    "multimodal": ("judge_relative", "clip_image_image", "efficientnet_image_image", "token_f1"),
}
FIELDS = ("id", "task", "question", "options", "answer", "images", "group", "tags", "template",
          "context", "data_class")  # fmt: skip
MAX_TAGS = 100  # different tags of the items of one card
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}")


def load_cards(path: str | Path) -> tuple[TaskSpec, ...]:
    """Execute a file of cards and return its CARDS; raise EvalError where one is unusable."""
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"--cards is {str(path)!r}, which is not a file; name a Python file")
    try:
        cards = runpy.run_path(str(path), run_name="cards").get("CARDS")
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise EvalError(f"--cards {path}: {type(error).__name__}: {printable(error)}") from error
    if not isinstance(cards, tuple | list) or not cards:
        raise EvalError(f"--cards {path} has no CARDS; write CARDS = (TaskSpec(...),)")
    for card in cards:
        if not isinstance(card, TaskSpec):
            raise EvalError(
                f"--cards {path}: CARDS holds a {type(card).__name__}; use TaskSpec of "
                "medmax_jax.eval.benchmarks.card"
            )
        if problem := _problem(card):
            raise EvalError(f"--cards {path}: card {printable(card.task, 80)!r}: {problem}")
    names = [card.task for card in cards]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise EvalError(f"--cards {path}: two cards are named {twice[0]!r}; rename one")
    return tuple(cards)


def digest(cards: Sequence[TaskSpec]) -> str:
    """Return the digest of the cards' fields, on which answers may depend."""
    content = json.dumps([card.fields() for card in cards], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_items(
    rows: Sequence[tuple[str, Mapping[str, Any]]], cards: Sequence[TaskSpec]
) -> list[Item]:
    """Return the items of (place, row); rows in the MedMax schema may be among them."""
    by_name = {card.task: card for card in cards}
    tags = _listed_tags(rows, by_name)
    converted, tasks = [], []
    for place, row in rows:
        card = _card_of(row, by_name, place) if is_plain(row) else None
        tasks.append(card.task if card else "")
        converted.append(_to_row(row, card, tags[card.task], place) if card else row)
    items = task_items.from_rows(converted, places=[place for place, _ in rows])
    items = [
        dataclasses.replace(item, task=task) if task else item
        for item, task in zip(items, tasks, strict=True)
    ]
    for card in cards:
        if card.counts is not None and tasks.count(card.task) != card.counts:
            raise EvalError(
                f"card {card.task!r}: counts is {card.counts:,}, and the files have "
                f"{tasks.count(card.task):,} items of it; fix one of them"
            )
    return items


def is_plain(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the fields of an own item, not of the MedMax schema."""
    return "question" in row and "prompt" not in row


def _problem(card: TaskSpec) -> str:
    """Return why a card cannot be used, or ""."""
    texts = {
        field.name: getattr(card, field.name)
        for field in dataclasses.fields(card)
        if field.type in (str, "str")
    }
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        return f"{wrong[0]} is a {type(texts[wrong[0]]).__name__}; expected a string"
    if not _NAME.fullmatch(card.task):
        return "the name has other characters than letters, digits, '_', '.' and '-'; rename it"
    if card.task in catalog.TASKS or card.task in FAMILIES:
        return "the name is that of a built-in task; choose another one"
    if card.family not in METRICS:
        near = arguments.nearest(card.family, METRICS)
        hint = f"did you mean {near}?" if near else f"use one of {', '.join(METRICS)}"
        return f"family is {printable(card.family, 40)!r}; {hint}"
    if card.metric not in METRICS[card.family]:
        allowed = " or ".join(METRICS[card.family])
        return f"metric is {printable(card.metric, 40)!r}; expected {allowed} for {card.family}"
    if card.data_class not in egress.CLASSES:
        return f"data_class is {card.data_class!r}; use one of {', '.join(egress.CLASSES)}"
    if card.counts is not None and (type(card.counts) is not int or card.counts < 1):
        return f"counts is {card.counts!r}; expected the number of its items, or None"
    if not all(isinstance(score, Published) for score in card.published):
        return "published holds other values than Published(model, value, metric, read)"
    values = [score.value for score in card.published]
    if wrong := [value for value in values if type(value) not in (int, float)]:
        return f"published has the value {printable(repr(wrong[0]), 40)}; expected a number"
    if card.sets is not None and not isinstance(card.sets, QuestionSets):
        return f"sets is a {type(card.sets).__name__}; expected QuestionSets(metric, key), or None"
    return ""


def _card_of(row: Mapping[str, Any], by_name: Mapping[str, TaskSpec], place: str) -> TaskSpec:
    if not by_name:
        raise EvalError(
            f"{place}: the row has the fields of an own item; name the file of its card with "
            "--cards=FILE"
        )
    name = row.get("task", next(iter(by_name)) if len(by_name) == 1 else None)
    if not isinstance(name, str) or name not in by_name:
        shown = "missing" if name is None else printable(repr(name), 80)
        raise EvalError(f"{place}: task is {shown}; use one of the cards {', '.join(by_name)}")
    return by_name[name]


def _to_row(
    row: Mapping[str, Any], card: TaskSpec, tags: Sequence[str], place: str
) -> dict[str, Any]:
    """Return an own item in the MedMax schema. tags: those that items of the card list."""
    if unknown := [name for name in row if name not in FIELDS]:
        near = arguments.nearest(unknown[0], FIELDS)
        hint = f"did you mean {near}?" if near else f"the fields are {', '.join(FIELDS)}"
        raise EvalError(f"{place}: {printable(unknown[0], 40)!r} is not a field of an item; {hint}")
    if missing := [name for name in ("question", "answer") if row.get(name) is None]:
        raise EvalError(f"{place}: {missing[0]} is missing; every item requires it")
    if row.get("options") and card.family == "vqa_open":
        raise EvalError(
            f"{place}: options are not shown for card {card.task!r} of the family vqa_open; leave "
            "them out, or use the family vqa_mcq"
        )
    own = row.get("tags") or {}
    if isinstance(own, Mapping):
        own = dict.fromkeys(tags, "no") | {str(name): value for name, value in own.items()}
    else:
        own = {name: "yes" if name in own else "no" for name in tags}
    names = ("id", "group", "options", "template", "context")
    return {name: row[name] for name in names if name in row} | dict(
        # a colon is in no name of the suite, so no card of it is taken for this one
        task_name=TASK_NAMES.get(card.family, f"own:{card.task}"),
        question_type=QUESTION_TYPES.get(card.family, f"own:{card.task}"),
        prompt=row["question"],
        answer=row["answer"],
        image_path=row.get("images") or "",
        slices=own,
        data_class=row.get("data_class", card.data_class),
    )


def _listed_tags(
    rows: Sequence[tuple[str, Mapping[str, Any]]], by_name: Mapping[str, TaskSpec]
) -> dict[str, list[str]]:
    """Return card -> the tags that its items list."""
    tags: dict[str, dict[str, None]] = {name: {} for name in by_name}
    for place, row in rows:
        own = row.get("tags") if is_plain(row) else None
        if own is None or isinstance(own, Mapping):
            continue
        if not isinstance(own, list) or not all(isinstance(tag, str) and tag for tag in own):
            raise EvalError(f"{place}: tags is not a list of texts, nor an object; fix it")
        card = _card_of(row, by_name, place)
        tags[card.task] |= dict.fromkeys(own)
        if len(tags[card.task]) > MAX_TAGS:
            raise EvalError(
                f"card {card.task!r}: more than {MAX_TAGS} different tags in lists; write values "
                'as an object, {"name": "value"}'
            )
    return {name: list(own) for name, own in tags.items()}
