"""Puts examples (shots) before questions, for in-context learning, and modifies them for probes.

    config.shots     a row with its own shots (SMMILE)   any other row
    0, the default   none                                none
    k                the first k of its own              k items of its task, by seed and id
    -1               all of its own                      none

Drawn items are never of the question's group (patient, volume) nor about one of its images. The
item, and so its record, states the shots: of drawn ones the id, of all of them the content.
"""

import dataclasses
import random
from collections.abc import Sequence

from medmax_jax.endpoints import egress
from medmax_jax.eval.config import MAX_SHOTS
from medmax_jax.eval.records import Item, Shot, is_credentialed, item_name
from medmax_jax.eval.tasks.families import FAMILIES, WITH_REFERENCE, TaskError

TRIES = 20  # draws per shot before all candidates are listed


def with_shots(items: Sequence[Item], pool: Sequence[Item], count: int, *, seed: int) -> list[Item]:
    """Return the items with their shots; `pool`: all items of the same tasks."""
    by_task: dict[str, list[Item]] = {}
    for item in pool:
        by_task.setdefault(item.task, []).append(item)
    shown = []
    for number, item in enumerate(items, start=1):
        own = item.shots if count < 0 else item.shots[:count]
        if own or count <= 0:
            shown.append(dataclasses.replace(item, shots=own))
            continue
        rng = random.Random(f"{seed} shots {item.id}")
        place = f"item {item_name(item, number)}"
        drawn = _draw(item, by_task[item.task], count, rng, place, "reduce config.shots")
        shown.append(_with(item, drawn))
    return shown


def without_shots(items: Sequence[Item]) -> list[Item]:
    """Return the items that have shots, without them: the question alone."""
    return [dataclasses.replace(item, shots=()) for item in items if item.shots]


def reversed_shots(items: Sequence[Item]) -> list[Item]:
    """Return the items with several shots, with these in the reverse order."""
    return [
        dataclasses.replace(item, shots=item.shots[::-1]) for item in items if len(item.shots) > 1
    ]


def with_distractor(items: Sequence[Item], pool: Sequence[Item], *, seed: int) -> list[Item]:
    """Return the items that have shots, each with one more that is irrelevant, at a random place.

    It is an item of another group: of another task of the same family if there is one, since its
    question differs.
    """
    tasks = dict.fromkeys((other.task, other.family) for other in pool)
    others = {
        task: [other for other in pool if other.family == family and other.task != task]
        or [other for other in pool if other.task == task]
        for task, family in tasks
    }
    changed = []
    for number, item in enumerate(items, start=1):
        if not item.shots or len(item.shots) == MAX_SHOTS:
            continue
        rng = random.Random(f"{seed} distractor {item.id}")
        place = f"shot_distractor of item {item_name(item, number)}"
        fix = "leave shot_distractor out of config.probes"
        (drawn,) = _draw(item, others[item.task], 1, rng, place, fix)
        shots = list(item.shots)
        shots.insert(rng.randint(0, len(shots)), _shot(drawn))
        changed.append(_classified(item, tuple(shots), [drawn]))
    return changed


def _draw(
    item: Item, pool: Sequence[Item], count: int, rng: random.Random, place: str, fix: str
) -> list[Item]:
    """Return items of other groups; few draws suffice unless most of the pool is of one group."""
    chosen: dict[str, Item] = {}
    for _ in range(TRIES * count):
        other = rng.choice(pool)
        if _allowed(item, other):
            chosen[other.id] = other
        if len(chosen) == count:
            return list(chosen.values())
    candidates = [other for other in pool if _allowed(item, other)]
    if len(candidates) < count:
        raise TaskError(
            f"{place}: {count} shots of other groups and images are needed, but {len(candidates)} "
            f"can be drawn; {fix}"
        )
    return rng.sample(candidates, count)


def _allowed(item: Item, other: Item) -> bool:
    images = set(item.images) & set(other.images) if FAMILIES[item.family].shows_image else set()
    shown = {shot.id for shot in item.shots}
    return other.group != item.group and other.id not in shown and not images


def _with(item: Item, drawn: Sequence[Item]) -> Item:
    return _classified(item, tuple(map(_shot, drawn)), drawn)


def _classified(item: Item, shots: tuple[Shot, ...], drawn: Sequence[Item]) -> Item:
    """Return the item with shots; it is credentialed if one of these is."""
    credentialed = any(map(is_credentialed, drawn))
    data_class = egress.CREDENTIALED if credentialed else item.data_class
    return dataclasses.replace(item, shots=shots, data_class=data_class)


def _shot(item: Item) -> Shot:
    shows = FAMILIES[item.family].shows_image
    expected = (item.reference_image,) if item.family in WITH_REFERENCE else item.images
    return Shot(
        id=item.id,
        prompt=item.prompt,
        answer=item.answer,
        images=item.images if shows else (),
        answer_images=() if FAMILIES[item.family].mode == "text" else expected,
    )
