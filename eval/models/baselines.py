"""Computes baselines: answers that require no image and no model.

constant   yes, A, empty text, a gray image
majority   the most common reference of the task: the best score of any single answer
random     yes or no, a letter of the question, another item's reference; by the seed and id
blind      the most common training answer of the question's template
"""

import collections
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from medmax_jax.eval.metrics import aggregate, text
from medmax_jax.eval.models.base import ModelRequest, Segment
from medmax_jax.eval.tasks.items import FAMILIES, Item
from medmax_jax.io import image_paths
from medmax_jax.models import images

BLIND = "the commonest training answer of each question's template, without looking"
DESCRIPTIONS = {
    "constant": "yes, A, and no words",
    "majority": "the commonest reference answer of each task: the most that one answer can get",
    "random": "yes or no, a letter, or another question's reference, by the seed",
}
KINDS = tuple(DESCRIPTIONS)
GREY = 256  # pixels per side


class BaselineError(ValueError):
    """Raised for an unknown or unavailable baseline; the message names the fix."""


def blind(train: Sequence[Item], items: Sequence[Item]) -> dict[str, str]:
    """Return id -> the most common training answer of the item's template; ties by alphabet.

    This is the score of a model that never uses an image. "" for a template without training items.
    """
    best = _commonest((item.template, item.answer) for item in train)
    return {item.id: best.get(item.template, "") for item in items}


def baseline_answers(kind: str, items: Sequence[Item], *, seed: int) -> dict[str, str]:
    """Return id -> text."""
    if kind not in KINDS:
        raise BaselineError(f"baseline {kind!r}: use one of {', '.join(KINDS)}")
    best = _commonest((item.task, item.answer) for item in items)
    tasks: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        tasks[item.task].append(item)
    found = {}
    for item in items:
        if kind == "constant":
            found[item.id] = {"vqa_closed": "yes", "vqa_mcq": "A"}.get(item.family, "")
        elif kind == "majority":
            found[item.id] = best[item.task]
        else:
            found[item.id] = _drawn(item, tasks[item.task], random.Random(f"{seed} {item.id}"))
    return found


class Baseline:
    """Runs a baseline as a model, with images too."""

    no_options = "a baseline has no likelihoods"

    def __init__(self, kind: str, items: Sequence[Item], folder: Path, *, seed: int):
        self.name, self.fingerprint = kind, f"baseline:{kind}:{seed}"
        self._kind, self._seed, self._folder = kind, seed, folder
        self._answers = baseline_answers(kind, items, seed=seed)
        self._images = sorted({image for item in items for image in item.images})

    def generate(self, asks: Sequence[ModelRequest]) -> list[list[Segment]]:
        return [self._answer(ask) for ask in asks]

    def _answer(self, ask: ModelRequest) -> list[Segment]:
        words = [] if ask.mode == "image" else [self._answers[ask.id]]
        return words if ask.mode == "text" else [*words, self._picture(ask.id)]

    def _picture(self, name: str) -> PIL.Image.Image:
        if self._kind != "random" or not self._images:
            return PIL.Image.new("RGB", (GREY, GREY), "gray")
        chosen = random.Random(f"{self._seed} picture {name}").choice(self._images)
        path = image_paths.resolve(self._folder, chosen)
        return images.load(path, max_pixels=images.MAX_PIXELS)


def baseline_scores(
    names: Sequence[str],
    items: Sequence[Item],
    records: Sequence[Mapping[str, Any]],
    *,
    mode: str,
    **numbers: Any,
) -> list[dict[str, Any]]:
    """Return the text scores of each baseline on the records: {name, says, scores}.

    Images have no baseline scores.
    """
    asked = [r for r in records if FAMILIES[r["family"]].mode == "text"]
    if not asked:
        return []
    seed, found = numbers["seed"], []
    for name in (name for name in names if name != "blind"):
        said = baseline_answers(name, items, seed=seed)
        scores = aggregate.summary(aggregate.with_answers(asked, said), mode=mode, **numbers)
        found.append(dict(name=name, says=DESCRIPTIONS[name], scores=scores))
    return found


def attach_baselines(rows: Sequence[dict[str, Any]], floors: Sequence[Mapping[str, Any]]) -> None:
    """Add to each row `floor`, the best baseline on its task and metric, and its name."""
    for row in rows:
        known = [
            (one["value"], floor["name"])
            for floor in floors
            for one in floor["scores"]
            if (one["task"], one["metric"]) == (row["task"], row["metric"])
        ]
        least = min if row["metric"] in ("unparsed",) else max
        row["floor"], row["floor_of"] = least(known) if known else (None, "")


def _drawn(item: Item, same: Sequence[Item], rng: random.Random) -> str:
    if item.family == "vqa_closed":
        return rng.choice(("yes", "no"))
    if item.family == "vqa_mcq":
        return rng.choice(sorted(text.options(item.prompt)) or ["A", "B", "C", "D"])
    others = [one.answer for one in same if one.group != item.group]
    return rng.choice(others) if others else ""


def _commonest(pairs) -> dict[str, str]:
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for name, answer in pairs:
        counts[name][answer] += 1
    return {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}
