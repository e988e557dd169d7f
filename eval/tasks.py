"""The tasks of the suite as one table, and items made from rows of the released evaluation schema.

    {"task_name": "image_captioning", "question_type": "pmc_oa", "prompt": ..., "answer": ...,
     "image_path": ..., "id": ..., "group": ..., "template": ...}  ->  Item(task="captioning", ...)

`id`, `group` (patient or volume) and `template` are this project's additions: without them a row is
its number, its image and its task. Two baselines live here too: answering without looking at all,
and the same model looking at a picture of somebody else.
"""

import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence

from data.sample.phrases import NOUNS


class TaskError(ValueError):
    """Rows that cannot be evaluated; the message names the row and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """How a task is asked. `tokens`: bound on an answer's text, beside sample.max_gen_len."""

    mode: str
    shows_image: bool
    tokens: int


TASKS = {
    # The release lets closed and mcq write one token; 4 leave room where "yes" is several pieces.
    "vqa_closed": Task(mode="text", shows_image=True, tokens=4),
    "vqa_mcq": Task(mode="text", shows_image=True, tokens=4),
    "vqa_open": Task(mode="text", shows_image=True, tokens=60),
    "captioning": Task(mode="text", shows_image=True, tokens=4_096),
    "image_generation": Task(mode="image", shows_image=False, tokens=60),
    "multimodal": Task(mode="mixed", shows_image=False, tokens=1_024),
}
NAMED = {  # released task_name -> task; all others are question answering, by question_type
    "image_captioning": "captioning",
    "image_generation": "image_generation",
    "mm_out": "multimodal",
}
ASKED = {"closed": "vqa_closed", "mcq": "vqa_mcq", "open": "vqa_open"}
CAPTION_PROMPT = "Please describe this picture."  # what the release asks whatever the row says
FACTS = ("body_part", "organ", "view", "plane", "sequence", "stain", "finding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `image`: shown, or for generation tasks the reference. `kind`: its modality."""

    id: str
    task: str
    prompt: str
    answer: str
    image: str
    group: str
    template: str
    facts: tuple[str, ...]  # what a caption should say; () where the rows do not tell
    kind: str


def from_rows(
    rows: Sequence[Mapping[str, str]], manifest: Sequence[Mapping] | None = None
) -> list[Item]:
    """Items of released rows. `manifest`: rows that know the facts of the pictures, by `file`."""
    known = {row["file"]: row for row in manifest or ()}
    items = [_item(number, row, known) for number, row in enumerate(rows)]
    twice = [name for name, n in collections.Counter(i.id for i in items).items() if n > 1]
    if twice:
        raise TaskError(f"id {twice[0]!r} comes more than once; give every row its own id")
    return items


def prompt(item: Item, picture: object) -> list:
    """The parts of MedMax's fine-tuned prompt, END-OF-TURN to follow: [picture, question]."""
    return [picture, item.prompt] if TASKS[item.task].shows_image else [item.prompt]


def choose(items: Sequence[Item], count: int, *, seed: int) -> list[Item]:
    """`count` items, taken from the groups in turn so that each is there; -1: all."""
    if count < 0 or count >= len(items):
        return list(items)
    rng = random.Random(seed)
    groups: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    for members in groups.values():
        rng.shuffle(members)
    order = sorted(groups)
    rng.shuffle(order)
    turns = [groups[g][i] for i in range(len(items)) for g in order if i < len(groups[g])]
    kept = {item.id for item in turns[:count]}
    return [item for item in items if item.id in kept]


def blind(train: Sequence[Item], items: Sequence[Item]) -> dict[str, str]:
    """Id -> the commonest answer of the item's template in the training items; ties by alphabet.

    Says what a model could score that never looks at a picture. "" for a template never seen.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for item in train:
        counts[item.template][item.answer] += 1
    best = {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}
    return {item.id: best.get(item.template, "") for item in items}


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


def _item(number: int, row: Mapping[str, str], known: Mapping[str, Mapping]) -> Item:
    where = f"row {row.get('id', number)}"
    if missing := {"task_name", "question_type", "prompt", "answer", "image_path"} - set(row):
        raise TaskError(f"{where}: {sorted(missing)[0]} is missing; the released schema has it")
    task = NAMED.get(row["task_name"]) or ASKED.get(row["question_type"])
    if task is None:
        raise TaskError(
            f"{where}: {row['task_name']} / {row['question_type']} is no task of this suite "
            f"({', '.join((*NAMED, *ASKED))}); leave such rows out"
        )
    if TASKS[task].shows_image and not row["image_path"]:
        raise TaskError(f"{where}: {task} needs image_path; name the picture")
    facts = known.get(row["image_path"], {})
    return Item(
        id=str(row.get("id", number)),
        task=task,
        prompt=CAPTION_PROMPT if task == "captioning" else str(row["prompt"]),
        answer=str(row["answer"]),
        image=str(row["image_path"]),
        group=str(row.get("group") or row["image_path"] or number),
        template=str(row.get("template") or task),
        facts=_facts(facts),
        kind=str(facts.get("modality", "")),
    )


def _facts(row: Mapping) -> tuple[str, ...]:
    if not row:
        return ()
    return (NOUNS[row["modality"]], *(str(row[name]) for name in FACTS if row[name]))
