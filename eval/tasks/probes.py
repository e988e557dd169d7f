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
    ScoringInputs,
    answer_text,
)
from medmax_jax.eval.records import EvalRecord, Item, is_credentialed
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks.items import FAMILIES, TaskError

NAMES = ("blank", "shuffled", "swapped", "rotated")
IMAGE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.shows_image)
ROTATED = "rotated_"
BLANK, BLANK_SIDE, GRAY = "blank.png", 256, 128


def swapped(items: Sequence[Item], *, seed: int, among: Sequence[Item] | None = None) -> list[Item]:
    """Return the same questions, each with an image of another group; ids stay, so scores pair.

    A model that uses the image should lose its advantage over chance. Each item gets an image drawn
    by the seed and its id from the images of all other groups of `among`, by default the items
    themselves; one per image, if it has several. With one group only there is nothing to swap with,
    which raises.
    """
    among = among or items
    credentialed = _credentialed_images(among)
    images = sorted({(item.group, image) for item in among for image in item.images})
    by_group: dict[str, list[int]] = {}
    for number, (group, _) in enumerate(images):
        by_group.setdefault(group, []).append(number)
    if len(by_group) < 2:
        raise TaskError(
            "all items are of one group, so their images cannot be swapped; leave swapped out of "
            "config.probes"
        )

    def other(item: Item, number: int) -> str:
        first, count = by_group[item.group][0], len(by_group[item.group])  # its own are adjacent
        name = f"{seed} {item.id} {number}" if number else f"{seed} {item.id}"
        index = random.Random(name).choice(range(len(images) - count))
        return images[index if index < first else index + count][1]

    return [
        _with_images(item, [other(item, n) for n in range(len(item.images))], credentialed)
        for item in items
    ]


def shuffled(items: Sequence[Item], *, seed: int) -> list[Item]:
    """Return the items with the images of each task permuted, each used as often as before.

    Items in an order by the seed are moved on by as many places as the most common image has, with
    equal images together, so none gets its own; a task where one image is more than half of all
    raises.
    """
    new_images = {}
    for task in dict.fromkeys(item.task for item in items):
        task_items = [item for item in items if item.task == task]
        count = collections.Counter(item.images for item in task_items)
        shift = max(count.values())
        if 2 * shift > len(task_items):
            raise TaskError(
                f"{task}: more than half of its {len(task_items)} questions are about one image, "
                "so the images cannot be shuffled; leave shuffled out of config.probes, or the "
                "family out of config.probe_families"
            )
        rng = random.Random(f"{seed} {task}")
        rank = {images: rng.random() for images in sorted(count)}
        order = sorted(task_items, key=lambda item: (rank[item.images], item.id))
        moved = order[shift:] + order[:shift]
        new_images |= {a.id: b.images for a, b in zip(order, moved, strict=True)}
    # If the drawn item has another number of images, some repeat to match the question's number.
    credentialed = _credentialed_images(items)
    cycles = {name: itertools.cycle(images) for name, images in new_images.items()}
    return [
        _with_images(item, list(itertools.islice(cycles[item.id], len(item.images))), credentialed)
        for item in items
    ]


def _credentialed_images(items: Sequence[Item]) -> set[str]:
    return {image for item in items if is_credentialed(item) for image in item.images}


def _with_images(item: Item, images: Sequence[str], credentialed: set[str]) -> Item:
    """Return the item with other images; it is credentialed if one of these is."""
    data_class = egress.CREDENTIALED if credentialed & set(images) else item.data_class
    return dataclasses.replace(
        item, image=images[0], further_images=tuple(images[1:]), data_class=data_class
    )


def blank(items: Sequence[Item], folder: Path | None) -> list[Item]:
    """Return all items with one gray image, which is written into `folder`, their new image folder.

    None: nothing is written, and the items can only be counted.
    """
    if folder is not None and not (folder / BLANK).exists():
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), (GRAY,) * 3).save(folder / BLANK)
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
    rotated_items = []
    for item in items:
        spans = text_metrics.option_spans(item.prompt) if item.family == "vqa_mcq" else []
        answer_letter = (
            strict.parse_answer(item.family, item.answer, item.prompt)
            if places < len(spans)
            else None
        )
        if answer_letter is None:
            continue
        letters = [letter for letter, _, _ in spans]
        texts = [item.prompt[start:end] for _, start, end in spans]
        if any("\n" in text for text in texts):
            continue
        prompt = item.prompt
        for index in reversed(range(len(spans))):
            _, start, end = spans[index]
            prompt = prompt[:start] + texts[(index - places) % len(spans)] + prompt[end:]
        answer = letters[(letters.index(answer_letter) + places) % len(letters)]
        rotated_items.append(dataclasses.replace(item, prompt=prompt, answer=answer))
    return rotated_items


def probe_items(
    items: Sequence[Item], names: Sequence[str], families: Sequence[str]
) -> dict[str, Callable[..., list[Item]]]:
    """Return probe -> a function that makes its items, for the names in a config.

    Each rotation is a probe. Called with `seed` and the `folder` of `blank`. `families`: of the
    items to probe.
    """
    if wrong := set(names) - set(NAMES):
        raise TaskError(
            f"config.probes has {sorted(wrong)[0]!r}, which is not a probe; use {', '.join(NAMES)}"
        )
    probed_items = _questions(items, families)
    makers: dict[str, Callable[..., list[Item]]] = {}
    if not probed_items:
        return makers
    if "blank" in names:
        makers["blank"] = lambda seed, folder: blank(probed_items, folder)
    if "shuffled" in names:
        makers["shuffled"] = lambda seed, folder: shuffled(probed_items, seed=seed)
    if "swapped" in names:
        # Among the images of all families: the set of probed families changes no other question.
        image_items = _questions(items, IMAGE_FAMILIES)
        makers["swapped"] = lambda seed, folder: swapped(probed_items, seed=seed, among=image_items)
    most = max(
        (len(text_metrics.option_spans(i.prompt)) for i in probed_items if i.family == "vqa_mcq"),
        default=0,
    )
    for places in range(1, most if "rotated" in names else 1):
        makers[f"{ROTATED}{places}"] = lambda seed, folder, k=places: rotated(probed_items, k)
    return makers


def captions_to_score(
    records: Sequence[EvalRecord], probed: Mapping[str, Sequence[EvalRecord]]
) -> dict[str, list[EvalRecord]]:
    """Return probe -> its captions for a scorer: with the true image, not the one shown."""
    true_images = {record.id: record.image for record in records if record.family in IMAGE_METRICS}
    captions = {
        probe: [
            dataclasses.replace(r, image=true_images[r.id])
            for r in probe_records
            if r.id in true_images
        ]
        for probe, probe_records in probed.items()
    }
    return {probe: probe_records for probe, probe_records in captions.items() if probe_records}


def summary(
    records: Sequence[EvalRecord],
    probed: Mapping[str, Sequence[EvalRecord]],
    inputs: ScoringInputs = NO_INPUTS,
    probe_inputs: Mapping[str, ScoringInputs] | None = None,
    *,
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    """Return the scores of each probe and task; `after` is the score of the probe.

    Rows are {probe, task, metric, n, groups, few_groups, before, after, diff, ci_low, ci_high,
    flips, flips_low, flips_high}. Flips: answers with another content than before, an option by its
    text and not its letter. inputs, probe_inputs: the image scores of the records, and of each
    probe's records.
    """
    rows = []
    before = {record.id: record for record in records}
    for probe, probe_records in probed.items():
        after_inputs = (probe_inputs or {}).get(probe, NO_INPUTS)
        for task, after in aggregate.tasks_of(probe_records).items():
            pairs = [(before[r.id], r) for r in after if r.id in before]
            if pairs:
                row = _row(pairs, inputs, after_inputs, resampling)
                rows.append(dict(probe=probe, task=task) | row)
    return rows + _rotations(records, probed, resampling)


def _row(
    pairs: Sequence[tuple[EvalRecord, EvalRecord]],
    inputs: ScoringInputs,
    probe_inputs: ScoringInputs,
    resampling: intervals.Resampling,
) -> dict[str, Any]:
    old = [aggregate.record_values(record, inputs) for record, _ in pairs]
    new = [aggregate.record_values(record, probe_inputs) for _, record in pairs]
    metric = next(name for name in old[0] if all(name in values for values in (*old, *new)))
    flips = [float(parsed_answer(first) != parsed_answer(second)) for first, second in pairs]
    groups = [record.group for record, _ in pairs]
    old, new = ([values[metric] for values in side] for side in (old, new))
    return {"metric": metric} | _paired(metric, old, new, flips, groups, resampling)


def _rotations(records, probed, resampling: intervals.Resampling) -> list[dict[str, Any]]:
    """Return rotated_all: correct under every rotation, next to correct as originally posed."""
    rotations = [
        {r.id: r for r in rotation} for name, rotation in probed.items() if ROTATED in name
    ]
    rows = []
    for task, task_records in aggregate.tasks_of(records).items():
        by_item = [[r, *(by_id[r.id] for by_id in rotations if r.id in by_id)]
                   for r in task_records]  # fmt: skip
        by_item = [answers for answers in by_item if len(answers) > 1]
        if not by_item:
            continue
        accuracies = [[aggregate.record_values(r)["accuracy"] for r in part] for part in by_item]
        old, new = [values[0] for values in accuracies], [min(values) for values in accuracies]
        flips = [float(len({parsed_answer(r) for r in answers}) > 1) for answers in by_item]
        groups = [answers[0].group for answers in by_item]
        head = dict(probe="rotated_all", task=task, metric="accuracy")
        rows.append(head | _paired("accuracy", old, new, flips, groups, resampling))
    return rows


def _paired(
    metric: str, old, new, flips, groups, resampling: intervals.Resampling
) -> dict[str, Any]:
    row = intervals.paired_row(
        old, new, groups, span=per_record.span(metric), resampling=resampling
    )
    flipped = intervals.mean_interval(flips, groups, resampling=resampling)
    low, high = intervals.finite(flipped.low), intervals.finite(flipped.high)
    return row | dict(flips=flipped.mean, flips_low=low, flips_high=high)


def parsed_answer(record: EvalRecord) -> str:
    """Return the content of an answer: yes, an option's text, other text; "" if unparsed."""
    family, text = record.family, record.text
    if family == "vqa_mcq":
        letter = strict.parse_answer(family, text, record.prompt)
        return text_metrics.options(record.prompt).get(letter or "", letter or "")
    if family == "vqa_closed":
        return strict.parse_answer(family, text, record.prompt) or ""
    return " ".join(text_metrics.tokens(answer_text(record)))


def _questions(items: Sequence[Item], families: Sequence[str]) -> list[Item]:
    """Return the items to be probed: those about an image."""
    if wrong := [name for name in families if name not in IMAGE_FAMILIES]:
        raise TaskError(
            f"config.probe_families has {wrong[0]!r}, which is not a family that shows an image; "
            f"use one or more of {', '.join(IMAGE_FAMILIES)}"
        )
    return [item for item in items if item.family in families]
