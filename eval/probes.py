"""Questions asked in another way, to see whether a model looks."""

import dataclasses
import random
from collections.abc import Sequence

from eval.tasks import Item, TaskError


def swapped(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The same questions with a picture of another group each; ids stay, so scores pair.

    A model that looks should lose what it won over chance. Each item gets a picture drawn by the
    seed and its id from the pictures of all other groups. With one group only there is nothing to
    swap with, which raises.
    """
    pictures = sorted({(item.group, item.image) for item in items})
    if len({group for group, _ in pictures}) < 2:
        raise TaskError("all items are of one group: nothing to swap pictures with")
    others = {
        group: [image for other, image in pictures if other != group]
        for group in {group for group, _ in pictures}
    }
    return [
        dataclasses.replace(
            item, image=random.Random(f"{seed} {item.id}").choice(others[item.group])
        )
        for item in items
    ]
