"""Computes baselines: answers that require no image and no model.

constant   yes, A, empty text, a gray image
majority   the most common reference of the task: the best score of any single answer
random     yes or no, a letter of the question, another item's reference; by the seed and id
blind      the most common training answer of the question's template
"""

import collections
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import PIL.Image

from medmax_jax.eval.metrics import aggregate, text
from medmax_jax.eval.models.base import ModelRequest, Segment
from medmax_jax.eval.records import EvalRecord, Item
from medmax_jax.eval.results import BaselineScores, MetricRow
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks.items import FAMILIES
from medmax_jax.models import images
from medmax_jax.storage import image_paths

BLIND = "the most common training answer of each question's template, without the image"
DESCRIPTIONS = {
    "constant": "yes, A, and an empty text",
    "majority": "the most common reference answer of each task: the best score of a single answer",
    "random": "yes or no, a letter, or another question's reference, by the seed",
}
KINDS = tuple(DESCRIPTIONS)
GRAY_SIDE = 256  # pixels


class BaselineError(ValueError):
    """Raised for an unknown or unavailable baseline; the message names the fix."""


def blind(train: Sequence[Item], items: Sequence[Item]) -> dict[str, str]:
    """Return id -> the most common training answer of the item's template; ties by alphabet.

    This is the score of a model that never uses an image. "" for a template without training items.
    """
    best = _most_common((item.template, item.answer) for item in train)
    return {item.id: best.get(item.template, "") for item in items}


def baseline_answers(kind: str, items: Sequence[Item], *, seed: int) -> dict[str, str]:
    """Return id -> text."""
    if kind not in KINDS:
        raise BaselineError(f"baseline is {kind!r}; use one of {', '.join(KINDS)}")
    best = _most_common((item.task, item.answer) for item in items)
    tasks: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        tasks[item.task].append(item)
    answers = {}
    for item in items:
        if kind == "constant":
            answers[item.id] = {"vqa_closed": "yes", "vqa_mcq": "A"}.get(item.family, "")
        elif kind == "majority":
            answers[item.id] = best[item.task]
        else:
            answers[item.id] = _random_answer(
                item, tasks[item.task], random.Random(f"{seed} {item.id}")
            )
    return answers


class Baseline:
    """Runs a baseline as a model, with images too."""

    no_options = "a baseline has no likelihoods"

    def __init__(self, kind: str, items: Sequence[Item], folder: Path, *, seed: int):
        self.name, self.fingerprint = kind, f"baseline:{kind}:{seed}"
        self._kind, self._seed, self._folder = kind, seed, folder
        self._answers = baseline_answers(kind, items, seed=seed)
        self._images = sorted({image for item in items for image in item.images})

    def generate(self, requests: Sequence[ModelRequest]) -> list[list[Segment]]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: ModelRequest) -> list[Segment]:
        texts = [] if request.mode == "image" else [self._answers[request.id]]
        return texts if request.mode == "text" else [*texts, self._image(request.id)]

    def _image(self, name: str) -> PIL.Image.Image:
        if self._kind != "random" or not self._images:
            return PIL.Image.new("RGB", (GRAY_SIDE, GRAY_SIDE), "gray")
        # Verbatim: part of the data.
        chosen = random.Random(f"{self._seed} picture {name}").choice(self._images)
        path = image_paths.resolve(self._folder, chosen)
        return images.load(path, max_pixels=images.MAX_PIXELS)


def baseline_scores(
    names: Sequence[str],
    items: Sequence[Item],
    records: Sequence[EvalRecord],
    *,
    mode: str,
    resampling: intervals.Resampling,
) -> list[BaselineScores]:
    """Return the text scores of each baseline on the records.

    Images have no baseline scores.
    """
    text_records = [r for r in records if FAMILIES[r.family].mode == "text"]
    if not text_records:
        return []
    baselines = []
    for name in (name for name in names if name != "blind"):
        answers = baseline_answers(name, items, seed=resampling.seed)
        answered = aggregate.with_answers(text_records, answers)
        scores = aggregate.summary(answered, mode=mode, resampling=resampling)
        baselines.append(BaselineScores(name=name, says=DESCRIPTIONS[name], scores=tuple(scores)))
    return baselines


def with_baselines(
    rows: Sequence[MetricRow], baselines: Sequence[BaselineScores]
) -> list[MetricRow]:
    """Return the rows with `baseline`, the best on their task and metric, and its name."""
    values: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for baseline in baselines:
        for score in baseline.scores:
            key = (score.task, score.metric)
            values.setdefault(key, []).append((score.value, baseline.name))
    attached = []
    for row in rows:
        best = min if row.metric in ("unparsed",) else max
        value, name = best(values.get((row.task, row.metric), []), default=(None, ""))
        attached.append(dataclasses.replace(row, baseline=value, baseline_name=name))
    return attached


def _random_answer(item: Item, task_items: Sequence[Item], rng: random.Random) -> str:
    if item.family == "vqa_closed":
        return rng.choice(("yes", "no"))
    if item.family == "vqa_mcq":
        return rng.choice(sorted(text.options(item.prompt)) or ["A", "B", "C", "D"])
    others = [other.answer for other in task_items if other.group != item.group]
    return rng.choice(others) if others else ""


def _most_common(pairs) -> dict[str, str]:
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for name, answer in pairs:
        counts[name][answer] += 1
    return {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}
