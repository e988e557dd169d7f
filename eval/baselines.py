"""The floor of every table: answers that need no picture, and no model."""

import collections
from collections.abc import Sequence

from eval.tasks import Item


def blind(train: Sequence[Item], items: Sequence[Item]) -> dict[str, str]:
    """Id -> the commonest answer of the item's template in the training items; ties by alphabet.

    Says what a model could score that never looks at a picture. "" for a template never seen.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for item in train:
        counts[item.template][item.answer] += 1
    best = {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}
    return {item.id: best.get(item.template, "") for item in items}
