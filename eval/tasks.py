"""What the suite asks: families of tasks, and items made from rows of the released schema.

    {"task_name": "image_captioning", "question_type": "pmc_oa", "prompt": ..., "answer": ...,
     "image_path": ..., "id": ..., "group": ..., "template": ...}
         ->  Item(task="captioning_pmc_oa", family="captioning", ...)

A family says how a question is asked and scored, a task is one row of the tables. `id`, `group`
(patient or volume) and `template` are this project's additions: without them a row is its number,
its image and its family.
"""

import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import chat_answers, outgoing
from data.sample.phrases import NOUNS
from eval import cards


class TaskError(ValueError):
    """Rows that cannot be evaluated; the message names the row and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a kind of task is asked. `tokens`: at most, of an answer's text, by generation mode."""

    mode: str  # text | image | mixed
    shows_image: bool
    tokens: Mapping[str, int]


def _tokens(*, paper: int, strict: int) -> Mapping[str, int]:
    return {"paper": paper, "strict": strict}


FAMILIES = {  # the release's bounds: vqa.py:24-31, visual_chat.py, mm_out.py, image_text.py
    "vqa_closed": Family(mode="text", shows_image=True, tokens=_tokens(paper=1, strict=16)),
    "vqa_mcq": Family(mode="text", shows_image=True, tokens=_tokens(paper=1, strict=16)),
    "vqa_open": Family(mode="text", shows_image=True, tokens=_tokens(paper=60, strict=60)),
    "captioning": Family(mode="text", shows_image=True, tokens=_tokens(paper=4_096, strict=4_096)),
    "image_generation": Family(
        mode="image", shows_image=False, tokens=_tokens(paper=60, strict=60)
    ),
    "multimodal": Family(
        mode="mixed", shows_image=False, tokens=_tokens(paper=1_024, strict=1_024)
    ),
    "visual_chat": Family(mode="text", shows_image=True, tokens=_tokens(paper=4_096, strict=4_096)),
}
MODES = ("paper", "strict")
NAMED = {  # released task_name -> family; all others are question answering, by question_type
    "image_captioning": "captioning",
    "image_generation": "image_generation",
    "mm_out": "multimodal",
    "visual_chat": "visual_chat",
}
CHAMELEON = {  # the release's wordings for the base model
    "vqa_closed": " and respond 'yes' or 'no'",
    "vqa_open": "",
    "vqa_mcq": " and respond 'A', 'B', 'C', or 'D'",
}
ASKED = {"closed": "vqa_closed", "mcq": "vqa_mcq", "open": "vqa_open"}
CAPTION_PROMPT = "Please describe this picture."  # what the release asks whatever the row says
DETAILED_PROMPT = "Analyze the image in a comprehensive and detailed manner."  # likewise
PICTURE = "<image>"  # where a row of visual_chat wants its picture
PROMPTS = ("sft", "chameleon", "default")  # the release's prompt processors, eval_utils.py
FACTS = ("body_part", "organ", "view", "plane", "sequence", "stain", "finding")
SAMPLE = ("sample_vqa", "sample")  # names in the embedded rows: there a task is its family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `image`: shown, or for generation tasks the reference. `kind`: its modality.

    task: its row in the tables, as in eval/cards.py. slices: (name, value) pairs that numbers are
    also told apart by. context: what a judge is told of the picture. data_class: what
    data/outgoing.py asks before anything leaves the machine. released: (name, value) of the row
    that only the release's scoring wants, and where its picture stands.
    """

    id: str
    task: str
    family: str
    prompt: str
    answer: str
    image: str
    group: str
    template: str
    facts: tuple[str, ...]  # what a caption should say; () where the rows do not tell
    kind: str
    slices: tuple[tuple[str, str], ...]
    context: str
    data_class: str
    released: tuple[tuple[str, str], ...] = ()


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


def parts(item: Item, folder: Path, prompt: str = "sft") -> tuple[Path | str, ...]:
    """What is asked, in order: the picture's file if the family shows it, and the words.

    `prompt`: one of PROMPTS, whose words these are; `ends_turn` says what comes after them. Where
    the release's `default` stops (captions without words, generation with no picture to open) the
    words are asked that the other two ask.
    """
    words = worded(item, prompt)
    if not FAMILIES[item.family].shows_image:
        return (words,)
    asked = dict(item.released).get("prompt", "")
    if asked.endswith(PICTURE) and words != DETAILED_PROMPT:
        return words, folder / item.image
    return folder / item.image, words


def worded(item: Item, prompt: str) -> str:
    """The words of a question; `chameleon` tells a base model what to answer, with what letters."""
    if prompt not in PROMPTS:
        raise TaskError(f"prompt is {prompt!r}; use one of {', '.join(PROMPTS)}")
    if prompt != "chameleon":
        return item.prompt
    if item.family == "multimodal":
        return f"{item.prompt} Answer the question with one picture."
    if item.family not in CHAMELEON:
        return item.prompt
    question = item.prompt if item.prompt.endswith("\n") else item.prompt + "\n"
    task = f"Answer the question based on this image{CHAMELEON[item.family]}."
    return f"{task}\nQuestion: {question}Answer:"


def ends_turn(family: str, prompt: str) -> bool:
    """Whether the end of turn follows the words, as it did in MedMax's fine-tuning.

    `default` means a base model, and yet ends the turn of visual_chat: in the release its answer to
    "is this fine-tuned" is a pair of lists, which Python takes for yes.
    """
    return prompt == "sft" or (prompt == "default" and family == "visual_chat")


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


def _item(number: int, row: Mapping[str, str], known: Mapping[str, Mapping]) -> Item:
    where = f"row {row.get('id', number)}"
    if missing := {"task_name", "question_type", "prompt", "answer", "image_path"} - set(row):
        raise TaskError(f"{where}: {sorted(missing)[0]} is missing; the released schema has it")
    family = NAMED.get(row["task_name"]) or ASKED.get(row["question_type"])
    if family is None:
        raise TaskError(
            f"{where}: {row['task_name']} / {row['question_type']} is no task of this suite "
            f"({', '.join((*NAMED, *ASKED))}); leave such rows out"
        )
    if FAMILIES[family].shows_image and not row["image_path"]:
        raise TaskError(f"{where}: {family} needs image_path; name the picture")
    facts = known.get(row["image_path"], {})
    task, slices = _task(row, family), dict(row.get("slices", {}))
    card, said = cards.card_of(task, family), {}
    of_task = card.data_class if card else outgoing.LICENCE_BOUND
    if family == "visual_chat":
        said, domain = _chat(where, row)
        slices = {"domain": domain} | slices
    fields = dict(
        prompt=CAPTION_PROMPT if family == "captioning" else str(row["prompt"]),
        answer=str(row["answer"]),
        context=str(row.get("context", "")),
        data_class=str(row.get("data_class") or of_task),
    )
    return Item(
        id=str(row.get("id", number)),
        task=task,
        family=family,
        image=str(row["image_path"]),
        group=str(row.get("group") or row["image_path"] or number),
        template=str(row.get("template") or family),
        facts=_facts(facts),
        kind=str(facts.get("modality", "")),
        slices=tuple(sorted((str(k), str(v)) for k, v in slices.items() if v)),
        **fields | said,
    )


def _chat(where: str, row: Mapping[str, str]) -> tuple[dict, str]:
    """What a visual_chat row's dictionary says, and its domain."""
    try:
        found = chat_answers.read(str(row["answer"]))
    except chat_answers.ChatAnswerError as error:
        raise TaskError(f"{where}: {error}") from error
    asked = str(row["prompt"]).replace(PICTURE, "").strip()
    detailed = row["question_type"] == "detailed_description"
    released = dict(
        prompt=str(row["prompt"]),
        fig_label=found.label,
        fig_caption=found.caption,
        in_text_mention=found.mention,
    )
    said = dict(
        prompt=DETAILED_PROMPT if detailed else asked,
        answer=found.reference,
        context=found.context,
        released=tuple(released.items()),
    )
    return said, found.domain


def _task(row: Mapping[str, str], family: str) -> str:
    """vqa_rad_closed, captioning_quilt, multimodal: as eval/cards.py names them."""
    name, kind = row["task_name"], row["question_type"]
    if name in SAMPLE or kind in SAMPLE:
        return family
    if name in NAMED:
        return f"{family}_{kind}" if kind else family
    return f"{name}_{kind}"


def _facts(row: Mapping) -> tuple[str, ...]:
    if not row:
        return ()
    return (NOUNS[row["modality"]], *(str(row[name]) for name in FACTS if row[name]))
