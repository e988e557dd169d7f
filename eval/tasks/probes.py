"""Modifies questions to test whether a model uses the image and the option order.

    blank      the same gray image for every question
    shuffled   the images of the task in a new order, none at its own question
    swapped    an image of another group (patient, volume)
    rotated_k  options of a multiple choice question rotated by k places, and the answer's letter

Ids are kept, so that scores pair: each probe has records of its own, probe_NAME.jsonl, next to
records.jsonl. The first three lower the scores of a model that uses the image; the last does not
change those of a model that reads the options.

Probes have no judge, since each would cost as much as the evaluation. Their metric is the first
that both sides have without a judge: exact for open questions, token overlap for chats; for
captions the cosine with the true image where a scorer reads text, else token overlap. The number of
changed answers (flips) is reported for all.
"""

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from medmax_jax.endpoints import egress
from medmax_jax.eval.metrics import aggregate, per_record, strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.per_record import (
    IMAGE_METRICS,
    NO_INPUTS,
    Record,
    ScoringInputs,
    answer_text,
)
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks.items import FAMILIES, Item, TaskError, is_credentialed

NAMES = ("blank", "shuffled", "swapped", "rotated")
IMAGE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.shows_image)
ROTATED = "rotated_"
BLANK, SIDE, GREY = "blank.png", 256, 128


def swapped(items: Sequence[Item], *, seed: int, among: Sequence[Item] | None = None) -> list[Item]:
    """Return the same questions, each with an image of another group; ids stay, so scores pair.

    A model that uses the image should lose its advantage over chance. Each item gets an image drawn
    by the seed and its id from the images of all other groups of `among`, by default the items
    themselves; one per image, if it has several. With one group only there is nothing to swap with,
    which raises.
    """
    among = among or items
    secret = _credentialed_images(among)
    pictures = sorted({(item.group, image) for item in among for image in item.images})
    own: dict[str, list[int]] = {}
    for number, (group, _) in enumerate(pictures):
        own.setdefault(group, []).append(number)
    if len(own) < 2:
        raise TaskError("all items are of one group: nothing to swap pictures with")

    def other(item: Item, number: int) -> str:
        first, count = own[item.group][0], len(own[item.group])  # its own are adjacent
        name = f"{seed} {item.id} {number}" if number else f"{seed} {item.id}"
        place = random.Random(name).choice(range(len(pictures) - count))
        return pictures[place if place < first else place + count][1]

    return [
        _showing(item, [other(item, n) for n in range(len(item.images))], secret) for item in items
    ]


def shuffled(items: Sequence[Item], *, seed: int) -> list[Item]:
    """Return the items with the images of each task permuted, each used as often as before.

    Items in an order by the seed are moved on by as many places as the most common image has, with
    equal images together, so none gets its own; a task where one image is more than half of all
    raises.
    """
    found = {}
    for task in dict.fromkeys(item.task for item in items):
        some = [item for item in items if item.task == task]
        count = collections.Counter(item.images for item in some)
        most = max(count.values())
        if 2 * most > len(some):
            raise TaskError(
                f"{task}: one picture has over half of its {len(some)} questions: cannot shuffle; "
                "leave shuffled out of config.probes, or the family out of config.probe_families"
            )
        rng = random.Random(f"{seed} {task}")
        place = {images: rng.random() for images in sorted(count)}
        order = sorted(some, key=lambda item: (place[item.images], item.id))
        moved = order[most:] + order[:most]
        found |= {a.id: b.images for a, b in zip(order, moved, strict=True)}
    # If the drawn item has another number of images, some repeat to match the question's number.
    secret = _credentialed_images(items)
    again = {name: itertools.cycle(images) for name, images in found.items()}
    return [
        _showing(item, list(itertools.islice(again[item.id], len(item.images))), secret)
        for item in items
    ]


def _credentialed_images(items: Sequence[Item]) -> set[str]:
    return {image for item in items if is_credentialed(item) for image in item.images}


def _showing(item: Item, images: Sequence[str], secret: set[str]) -> Item:
    """Return the item with other images; it is credentialed if one of these is."""
    data_class = egress.CREDENTIALED if secret & set(images) else item.data_class
    return dataclasses.replace(
        item, image=images[0], further_images=tuple(images[1:]), data_class=data_class
    )


def blank(items: Sequence[Item], folder: Path | None) -> list[Item]:
    """Return all items with one gray image, which is written into `folder`, their new image folder.

    None: nothing is written, and the items can only be counted.
    """
    if folder is not None and not (folder / BLANK).exists():
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (SIDE, SIDE), (GREY,) * 3).save(folder / BLANK)
    return [
        dataclasses.replace(item, image=BLANK, further_images=(BLANK,) * len(item.further_images))
        for item in items
    ]


def rotated(items: Sequence[Item], places: int) -> list[Item]:
    """Return items with rotated options and answers: by one place, the option at A moves to B.

    Only items with more than `places` options of one line each and an answer among them are used:
    lines after the last option cannot be assigned to it reliably.
    "Which?\\nA: CT\\nB: MRI", "A" -> "Which?\\nA: MRI\\nB: CT", "B"
    """
    found = []
    for item in items:
        spans = text_metrics.option_spans(item.prompt) if item.family == "vqa_mcq" else []
        right = (
            strict.parse_answer(item.family, item.answer, item.prompt)
            if places < len(spans)
            else None
        )
        if right is None:
            continue
        letters = [letter for letter, _, _ in spans]
        texts = [item.prompt[start:end] for _, start, end in spans]
        if any("\n" in text for text in texts):
            continue
        prompt = item.prompt
        for place in reversed(range(len(spans))):
            _, start, end = spans[place]
            prompt = prompt[:start] + texts[(place - places) % len(spans)] + prompt[end:]
        answer = letters[(letters.index(right) + places) % len(letters)]
        found.append(dataclasses.replace(item, prompt=prompt, answer=answer))
    return found


def probe_items(
    items: Sequence[Item], names: Sequence[str], families: Sequence[str]
) -> dict[str, Callable[..., list[Item]]]:
    """Return probe -> a function that makes its items, for the names in a config.

    Each rotation is a probe. Called with `seed` and the `folder` of `blank`. `families`: of the
    items to probe.
    """
    if wrong := set(names) - set(NAMES):
        raise TaskError(f"probes: {sorted(wrong)[0]!r} is none; use {', '.join(NAMES)}")
    some = _questions(items, families)
    made: dict[str, Callable[..., list[Item]]] = {}
    if not some:
        return made
    if "blank" in names:
        made["blank"] = lambda seed, folder: blank(some, folder)
    if "shuffled" in names:
        made["shuffled"] = lambda seed, folder: shuffled(some, seed=seed)
    if "swapped" in names:
        # Among the images of all families: the set of probed families changes no other question.
        shown = _questions(items, IMAGE_FAMILIES)
        made["swapped"] = lambda seed, folder: swapped(some, seed=seed, among=shown)
    most = max(
        (len(text_metrics.option_spans(i.prompt)) for i in some if i.family == "vqa_mcq"), default=0
    )
    for places in range(1, most if "rotated" in names else 1):
        made[f"{ROTATED}{places}"] = lambda seed, folder, k=places: rotated(some, k)
    return made


def captions_to_score(
    records: Sequence[Record], probed: Mapping[str, Sequence[Record]]
) -> dict[str, list[dict[str, Any]]]:
    """Return probe -> its captions for a scorer: with the true image, not the one shown."""
    true = {
        record["id"]: record["image"] for record in records if record["family"] in IMAGE_METRICS
    }
    found = {
        probe: [dict(r) | {"image": true[r["id"]]} for r in some if r["id"] in true]
        for probe, some in probed.items()
    }
    return {probe: some for probe, some in found.items() if some}


def summary(
    records: Sequence[Record],
    probed: Mapping[str, Sequence[Record]],
    known: ScoringInputs = NO_INPUTS,
    looked: Mapping[str, ScoringInputs] | None = None,
    *,
    seed: int,
    resamples: int,
) -> list[dict[str, Any]]:
    """Return the scores of each probe and task; `after` is the score of the probe.

    Rows are {probe, task, metric, n, groups, few_groups, before, after, diff, ci_low, ci_high,
    flips, flips_low, flips_high}. Flips: answers with another content than before, an option by its
    text and not its letter. known, looked: the image scores of the records, and of each probe's.
    """
    rows = []
    for probe, some in probed.items():
        before, of_probe = {r["id"]: r for r in records}, (looked or {}).get(probe, NO_INPUTS)
        for task, after in aggregate.tasks_of(some).items():
            both = [(before[r["id"]], r) for r in after if r["id"] in before]
            if both:
                row = _row(both, known, of_probe, seed, resamples)
                rows.append(dict(probe=probe, task=task) | row)
    return rows + _rotations(records, probed, seed, resamples)


def _row(
    both: Sequence[tuple[Record, Record]],
    known: ScoringInputs,
    of_probe: ScoringInputs,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    old = [aggregate.record_values(record, known) for record, _ in both]
    new = [aggregate.record_values(record, of_probe) for _, record in both]
    metric = next(name for name in old[0] if all(name in one for one in (*old, *new)))
    flips = [float(parsed_answer(one) != parsed_answer(two)) for one, two in both]
    groups = [record["group"] for record, _ in both]
    old, new = ([one[metric] for one in side] for side in (old, new))
    return {"metric": metric} | _paired(metric, old, new, flips, groups, seed, resamples)


def _rotations(records, probed, seed: int, resamples: int) -> list[dict[str, Any]]:
    """Return rotated_all: correct under every rotation, next to correct as originally posed."""
    turns = [{r["id"]: r for r in some} for name, some in probed.items() if ROTATED in name]
    rows = []
    for task, some in aggregate.tasks_of(records).items():
        each = [[r, *(turn[r["id"]] for turn in turns if r["id"] in turn)] for r in some]
        each = [again for again in each if len(again) > 1]
        if not each:
            continue
        old = [aggregate.record_values(again[0])["accuracy"] for again in each]
        new = [min(aggregate.record_values(r)["accuracy"] for r in again) for again in each]
        flips = [float(len({parsed_answer(r) for r in again}) > 1) for again in each]
        groups = [again[0]["group"] for again in each]
        head = dict(probe="rotated_all", task=task, metric="accuracy")
        rows.append(head | _paired("accuracy", old, new, flips, groups, seed, resamples))
    return rows


def _paired(metric: str, old, new, flips, groups, seed: int, resamples: int) -> dict[str, Any]:
    numbers = dict(seed=seed, resamples=resamples)
    found = intervals.paired_row(old, new, groups, span=per_record.span(metric), **numbers)
    flipped = intervals.mean_interval(flips, groups, **numbers)
    low, high = intervals.finite(flipped.low), intervals.finite(flipped.high)
    return found | dict(flips=flipped.mean, flips_low=low, flips_high=high)


def parsed_answer(record: Record) -> str:
    """Return the content of an answer: yes, an option's text, other text; "" if unparsed."""
    family, text = record["family"], record["text"]
    if family == "vqa_mcq":
        found = strict.parse_answer(family, text, record["prompt"])
        return text_metrics.options(record["prompt"]).get(found or "", found or "")
    if family == "vqa_closed":
        return strict.parse_answer(family, text, record["prompt"]) or ""
    return " ".join(text_metrics.tokens(answer_text(record)))


def _questions(items: Sequence[Item], families: Sequence[str]) -> list[Item]:
    """Return the items to be probed: those about an image."""
    if wrong := [name for name in families if name not in IMAGE_FAMILIES]:
        raise TaskError(
            f"probe_families: {wrong[0]!r} shows no picture or is none; use some of "
            f"{', '.join(IMAGE_FAMILIES)}"
        )
    return [item for item in items if item.family in families]
