"""Defines items, made from rows of the MedMax release's schema.

    {"task_name": "image_captioning", "question_type": "pmc_oa", "prompt": ..., "answer": ...,
     "image_path": ..., "id": ..., "group": ..., "template": ...}
         ->  Item(task="captioning_pmc_oa", family="captioning", ...)

A family (families.py) defines how a question is posed and scored; a task is one row of the tables.
`id`, `group` (patient or volume), `template`, `slices`, `shots` and `reference_image` are this
project's additions: without an id, a group and a template a row is identified by its number, its
image and its family.
"""

import collections
import dataclasses
import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.data.release import chat_answers
from medmax_jax.data.sample.phrases import NOUNS
from medmax_jax.data.sources.vqa import choice_text
from medmax_jax.endpoints import egress
from medmax_jax.eval.config import MAX_SHOTS
from medmax_jax.eval.metrics import strict as metrics_strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.records import Item, Shot, is_credentialed
from medmax_jax.eval.tasks import catalog
from medmax_jax.eval.tasks.families import (
    CHOICES,
    FAMILIES,
    FAMILY_BY_QUESTION_TYPE,
    FAMILY_BY_TASK,
    SEVERAL_IMAGES,
    WITH_REFERENCE,
    TaskError,
)
from medmax_jax.io.errors import printable
from medmax_jax.storage import image_paths
from medmax_jax.storage.image_paths import is_inside

CHAMELEON = {  # the release's wordings for the base model
    "vqa_closed": " and respond 'yes' or 'no'",
    "vqa_open": "",
    "vqa_mcq": " and respond 'A', 'B', 'C', or 'D'",
}
# Verbatim: part of the data.
CAPTION_PROMPT = "Please describe this picture."  # the release's prompt, whatever the row has
DETAILED_PROMPT = "Analyze the image in a comprehensive and detailed manner."  # likewise
CONFIDENCE_PROMPT = (  # this project's, of config.verbalized_confidence
    "How confident are you that this answer is correct? Reply with one number from 0 to 100 only, "
    "where 100 means certain.\nConfidence:"
)
IMAGE_PLACEHOLDER = "<image>"  # where a row places its image
_MARK = re.compile(r"<image(?:[ _]?(\d{1,3}))?>")  # also numbered, as MMMU writes them
_LETTERED = r"(?<!\w)([A-Ba-b])\s*[:.)]"  # options of a form that metrics/text.py may not read
OPTION_FIELDS = ("options", "choices")
# The first three are the release's prompt processors, eval_utils.py; `chat` is this project's.
PROMPTS = ("sft", "chameleon", "default", "chat")
ANSWER_FORMS = {  # that a reference must have
    "vqa_closed": "yes or no",
    "vqa_numeric": "one number",
} | dict.fromkeys(CHOICES, "one of the question's options (use its letter)")
FACTS = ("body_part", "organ", "view", "plane", "sequence", "stain", "finding")
SAMPLE = ("sample_vqa", "sample")  # names in the embedded rows: their task is their family


def from_rows(
    rows: Sequence[Mapping[str, Any]],
    manifest: Sequence[Mapping] | None = None,
    *,
    places: Sequence[str] | None = None,
) -> list[Item]:
    """Return the items of the rows; raise TaskError or OutgoingError at the first bad row.

    `manifest`: rows with the facts of the images, by `file`. `places`: the names in messages of
    the rows, like "items.jsonl line 3". An image that any credentialed row shows is credentialed in
    every row.
    """
    facts_by_file = {row["file"]: row for row in manifest or ()}
    places = places or [f"row {number}" for number in range(len(rows))]
    items = [
        _item(number, row, facts_by_file, place)
        for number, (row, place) in enumerate(zip(rows, places, strict=True))
    ]
    ids: set[str] = set()
    for item, place in zip(items, places, strict=True):
        if item.id in ids:
            credentialed = item.data_class == egress.CREDENTIALED
            shown = f"the id of {place}" if credentialed else f"id {item.id!r}"
            raise TaskError(f"{shown} occurs more than once; give every row a unique id")
        ids.add(item.id)
    credentialed = {i for item in items if is_credentialed(item) for i in item.files}
    return [
        dataclasses.replace(item, data_class=egress.CREDENTIALED)
        if credentialed & set(item.files)
        else item
        for item in items
    ]


def prompt_parts(item: Item, folder: Path, prompt: str = "sft") -> tuple[Path | str, ...]:
    """Return the request in order: the shots, the image's file if the family shows it, the text.

    `prompt`: one of PROMPTS, which sets the wording; `uses_end_of_turn` states what follows it.
    Where the release's `default` stops (captions without text, generation with no image to open)
    the wording of the other two is used. Images come before the text, or at the marks of the
    prompt:
        prompt_parts(Item(prompt="Is <image> older than <image>?", ...), f)
        ->  ("Is", f/a.png, "older than", f/b.png, "?")
    A shot is a question in the same wording, and its answer:
        prompt_parts(Item(prompt="And here?", shots=(Shot(prompt="What?", answer="A CT"),), ...), f)
        ->  (f/shot.png, "What?\nAnswer: A CT\n\n", f/a.png, "And here?")
    """
    parts: list[Path | str] = []
    for shot in item.shots:
        parts += _shot_parts(item, shot, folder, prompt)
    return (*parts, *_question_parts(item, folder, prompt))


def _shot_parts(item: Item, shot: Shot, folder: Path, prompt: str) -> list[Path | str]:
    first, *further = shot.images or ("",)
    fields = dict(prompt=shot.prompt, image=first, further_images=tuple(further), released=())
    question = dataclasses.replace(item, shots=(), **fields)
    parts = list(_question_parts(question, folder, prompt))
    return [*_answered(parts, shot.answer), *_resolved(item, shot.answer_images, folder)]


def confidence_parts(parts: Sequence[Path | str], answer: str) -> tuple[Path | str, ...]:
    """Return a request, the answer to it, and the question how confident the model is in it.

    (f/a.png, "Is it a CT?"), "Yes." -> (f/a.png, "Is it a CT?\nAnswer: Yes.\n\nHow confident ..")
    """
    *first, text = _answered(parts, answer)
    return (*first, text + CONFIDENCE_PROMPT)


def _answered(parts: Sequence[Path | str], answer: str) -> list[Path | str]:
    """Return a question with "Answer:" and the answer after its last part, which is a text then."""
    *first, text = parts if isinstance(parts[-1], str) else (*parts, "")
    text = text if text.endswith("Answer:") else f"{text}\nAnswer:".lstrip("\n")
    return [*first, text + (f" {answer}\n\n" if answer else "")]


def _resolved(item: Item, names: Sequence[str], folder: Path) -> tuple[Path, ...]:
    label = "an image of a credentialed item" if is_credentialed(item) else ""
    return tuple(image_paths.resolve(folder, name, label=label) for name in names)


def _question_parts(item: Item, folder: Path, prompt: str) -> tuple[Path | str, ...]:
    text = prompt_text(item, prompt)
    if not FAMILIES[item.family].shows_image:
        return (text,)
    images = _resolved(item, item.images, folder)
    if IMAGE_PLACEHOLDER in text:
        return _interleaved(text, images)
    row_prompt = dict(item.released).get("prompt", "")
    if row_prompt.endswith(IMAGE_PLACEHOLDER) and item.prompt != DETAILED_PROMPT:
        return text, *images
    return *images, text


def _interleaved(prompt: str, images: Sequence[Path]) -> tuple[Path | str, ...]:
    """Return the text between the marks, without the spaces next to them, and the images."""
    texts = prompt.split(IMAGE_PLACEHOLDER)
    if len(texts) != len(images) + 1:
        raise TaskError(
            f"a prompt has {len(texts) - 1} {IMAGE_PLACEHOLDER} marks for {len(images)} images; "
            "write one per image, or none"
        )
    parts: list[Path | str] = []
    for number, text in enumerate(texts):
        text = text.lstrip() if number else text
        text = text.rstrip() if number < len(images) else text
        parts += [text] if text else []
        parts += images[number : number + 1]
    return tuple(parts)


def prompt_text(item: Item, prompt: str) -> str:
    """Return the text of a question.

    `chameleon` adds instructions for a base model: the form of the answer, and the letters to use.
    `chat` adds the form of a text answer for a chat model, which has not been fine-tuned on it.
    """
    if prompt not in PROMPTS:
        raise TaskError(f"prompt is {prompt!r}; use one of {', '.join(PROMPTS)}")
    family = FAMILIES[item.family]
    if prompt == "chat" and family.mode == "text":
        # Verbatim: part of the data.
        return f"{item.prompt.rstrip()}\nAnswer with {family.answer_format} only."
    if prompt != "chameleon":
        return item.prompt
    if item.family == "multimodal":
        # Verbatim: part of the data.
        return f"{item.prompt} Answer the question with one picture."
    if item.family not in CHAMELEON:
        return item.prompt
    question = item.prompt if item.prompt.endswith("\n") else item.prompt + "\n"
    task = f"Answer the question based on this image{CHAMELEON[item.family]}."
    return f"{task}\nQuestion: {question}Answer:"


def uses_end_of_turn(family: str, prompt: str) -> bool:
    """Return whether SEP follows the text, as in MedMax's fine-tuning.

    `default` means a base model, and yet ends the turn of visual_chat: in the release its answer to
    "is this fine-tuned" is a pair of lists, which Python evaluates as true.
    """
    return prompt in ("sft", "chat") or (prompt == "default" and family == "visual_chat")


def sample_items(items: Sequence[Item], count: int, *, seed: int) -> list[Item]:
    """Return `count` items, taken from the groups in turn to cover all groups; -1: all."""
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


def _item(
    number: int, row: Mapping[str, Any], facts_by_file: Mapping[str, Mapping], place: str
) -> Item:
    if not isinstance(row, Mapping):
        raise TaskError(f"{place}: a JSON {type(row).__name__}; expected an object")
    stated = egress.data_class_of(row, place, default=egress.LICENCE_BOUND)
    where = _where(number, row, place, stated)
    family = _family(row, where, stated)
    task = _task(row, family)
    spec, chat_fields = catalog.task_spec(task, family), {}
    task_class = spec.data_class if spec else egress.LICENCE_BOUND
    data_class = egress.data_class_of(row, place, default=task_class)
    where = _where(number, row, place, data_class)
    images, prompt = _images_and_prompt(row, family, where, data_class)
    facts, slices = facts_by_file.get(images[0] if images else "", {}), row.get("slices") or {}
    if not isinstance(slices, Mapping):
        raise TaskError(f"{where}: slices is of type {type(slices).__name__}; expected an object")
    slices = dict(slices)
    if family == "visual_chat":
        chat_fields, domain = _chat(where, row, data_class)
        slices = {"domain": domain} | slices
    first = images[0] if images else ""
    fields = dict(
        prompt=CAPTION_PROMPT if family == "captioning" else prompt,
        answer=str(row["answer"]),
        context=str(row.get("context") or ""),
        data_class=data_class,
    )
    item = Item(
        id=str(number if row.get("id") is None else row["id"]),
        task=task,
        family=family,
        image=first,
        group=str(row.get("group") or first or number),
        template=str(row.get("template") or family),
        facts=_facts(facts),
        modality=str(facts.get("modality", "")),
        slices=_slices(slices),
        further_images=images[1:],
        reference_image=_reference_image(row, family, where, data_class),
        shots=_shots(row, family, where, data_class),
        **fields | chat_fields,
    )
    _check_reference(item, where)
    return item


def _slices(slices: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (name, value) pairs; a list of values is one pair each."""
    pairs = ((k, v if isinstance(v, list) else [v]) for k, v in slices.items())
    return tuple(sorted((str(k), str(value)) for k, values in pairs for value in values if value))


def _reference_image(row: Mapping[str, Any], family: str, where: str, data_class: str) -> str:
    """Return the expected image of a family that also shows one, "" for the others."""
    value = row.get("reference_image")
    if family not in WITH_REFERENCE:
        if value:
            raise TaskError(f"{where}: a {family} row has no reference_image; omit the field")
        return ""
    names = _image_names(value, "reference_image", where, data_class) if value else ()
    if len(names) != 1:
        raise TaskError(f"{where}: reference_image is missing; a {family} row requires one path")
    return names[0]


def _shots(row: Mapping[str, Any], family: str, where: str, data_class: str) -> tuple[Shot, ...]:
    """Return the row's own examples: a list of {"prompt", "answer", "image_path" or "images"}."""
    rows = row.get("shots")
    if not rows:
        return ()
    family = "vqa_open" if family in CHOICES else family  # a shot needs no options
    if not isinstance(rows, list) or len(rows) > MAX_SHOTS:
        raise TaskError(f"{where}: shots is not a list of at most {MAX_SHOTS} examples")
    shots = []
    for number, shot in enumerate(rows, start=1):
        place = f"{where}: shot {number}"
        if not isinstance(shot, Mapping) or not all(
            isinstance(shot.get(name), str) for name in ("prompt", "answer")
        ):
            raise TaskError(f"{place}: prompt or answer is missing; give both as strings")
        images, prompt = _images_and_prompt(shot, family, place, data_class)
        shots.append(Shot(id="", prompt=prompt, answer=shot["answer"], images=images))
    return tuple(shots)


def _where(number: int, row: Mapping[str, Any], place: str, data_class: str) -> str:
    """Return a row's name in messages: for a credentialed one nothing but its place."""
    if data_class == egress.CREDENTIALED or row.get("id") is None:
        return place
    name = printable(row["id"], 80)
    return f"row {name}" if place == f"row {number}" else f"{place}, id {name}"


def _family(row: Mapping[str, Any], where: str, data_class: str) -> str:
    """Return the family of a row whose fields have the types of the released schema."""
    missing = {"task_name", "question_type", "prompt", "answer"} - set(row)
    missing |= {"image_path"} if not {"image_path", "images"} & set(row) else set()
    if missing:
        raise TaskError(
            f"{where}: {sorted(missing)[0]} is missing; the schema of the MedMax release requires "
            "it"
        )
    for name in ("task_name", "question_type", "prompt", "answer"):
        value = row[name]
        kinds = (str, int, float) if name == "answer" else str
        if not isinstance(value, kinds) and not (name == "question_type" and value is None):
            raise TaskError(f"{where}: {name} is of type {type(value).__name__}; expected a string")
    family = FAMILY_BY_TASK.get(row["task_name"]) or FAMILY_BY_QUESTION_TYPE.get(
        row["question_type"]
    )
    if family is None:
        shown = f"{row['task_name']} / {row['question_type']}"
        shown = shown if data_class != egress.CREDENTIALED else "task_name / question_type"
        raise TaskError(
            f"{where}: {printable(shown)} is not a task of this suite "
            f"({', '.join((*FAMILY_BY_TASK, *FAMILY_BY_QUESTION_TYPE))}); leave such rows out"
        )
    return family


def _images_and_prompt(
    row: Mapping[str, Any], family: str, where: str, data_class: str
) -> tuple[tuple[str, ...], str]:
    """Return the images in the order of their marks, and the prompt with its options.

    Marks before all text are dropped, since images come first anyway; others stay in the prompt,
    where `prompt_parts` places the images.
        "<image> <image> Did it grow?", (a, b)      ->  (a, b), "Did it grow?"
        "Is <image 2> older than <image 1>?", (a, b)  ->  (b, a), "Is <image> older than <image>?"
    """
    images, prompt = _images(row, where, data_class), row["prompt"]
    shows = FAMILIES[family].shows_image
    if shows and not images:
        raise TaskError(f"{where}: image_path is missing; a {family} row requires an image")
    if len(images) > 1 and family not in SEVERAL_IMAGES:
        raise TaskError(
            f"{where}: {len(images)} images, but a {family} row accepts one; name one image"
        )
    if family in CHOICES:
        prompt = _with_options(row, prompt, where)
    if family in ("captioning", "visual_chat"):  # the release's own rules on marks: `prompt_parts`
        return images, prompt
    marks = list(_MARK.finditer(prompt))
    count = len(images) if shows else 0
    if marks and len(marks) != count:
        raise TaskError(
            f"{where}: the prompt has {len(marks)} image marks for {count} images that are shown; "
            f"write one {IMAGE_PLACEHOLDER} per image, or none"
        )
    if any(mark[1] for mark in marks):
        order = [int(mark[1] or 0) - 1 for mark in marks]
        if sorted(order) != list(range(count)):
            raise TaskError(
                f"{where}: the image marks of the prompt are not numbered 1 to {count}, each once"
            )
        images = tuple(images[place] for place in order)
    prompt = _MARK.sub(IMAGE_PLACEHOLDER, prompt)
    text_after_marks = re.sub(rf"^(?:\s*{IMAGE_PLACEHOLDER})+\s*", "", prompt)
    return images, prompt if IMAGE_PLACEHOLDER in text_after_marks else text_after_marks


def _images(row: Mapping[str, Any], where: str, data_class: str) -> tuple[str, ...]:
    """Return the paths in `image_path` or `images`, one or a list; () for none."""
    fields = [name for name in ("image_path", "images") if row.get(name) not in (None, "", [])]
    if not fields:
        return ()
    if len(fields) == 2 and row["image_path"] != row["images"]:
        raise TaskError(f"{where}: image_path and images differ; set only one of them")
    return _image_names(row[fields[0]], fields[0], where, data_class)


def _image_names(value: Any, field: str, where: str, data_class: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise TaskError(
            f"{where}: {field} is of type {type(value).__name__}; expected a path, or a list "
            "of paths"
        )
    for number, name in enumerate(names, start=1):
        if not is_inside(name):
            shown = f"image {number}" if len(names) > 1 else "the image"
            if data_class != egress.CREDENTIALED:
                shown = printable(repr(name))
            raise TaskError(
                f"{where}: {field}: {shown} leads out of the image folder; use a path "
                "relative to it, without '..'"
            )
    return tuple(names)


def _with_options(row: Mapping[str, Any], prompt: str, where: str) -> str:
    """Return the prompt of a multiple choice row with the options that a field of the row lists."""
    field = next((name for name in OPTION_FIELDS if row.get(name)), None)
    listed = text_metrics.options(prompt)
    lettered = {"A", "B"} <= {mark.upper() for mark in re.findall(_LETTERED, prompt)}
    if field is None:
        if not listed and not lettered:
            raise TaskError(
                f"{where}: no options can be read from the prompt of a multiple choice row; list "
                "them in it, one line each like 'A: CT', or in the field options"
            )
        return prompt
    options = _options(row[field], f"{where}: {field}")
    if listed:
        prompt_options, field_options = (
            [text_metrics.tokens(t) for t in o.values()] for o in (listed, options)
        )
        if prompt_options != field_options:
            raise TaskError(
                f"{where}: {field} differs from the options in the prompt; give only one of them"
            )
        return prompt
    if lettered and all(text in prompt for text in options.values()):
        return prompt
    prompt = choice_text(prompt, options)
    readable = text_metrics.options(prompt)
    if readable and len(readable) != len(options):
        raise TaskError(
            f"{where}: {field} has {len(options)} options, of which {len(readable)} can be read"
        )
    return prompt


def _options(value: Any, where: str) -> dict[str, str]:
    """Return letter -> text of a list of options, or of an object with the letters as its keys."""
    letters = list(string.ascii_uppercase)
    if isinstance(value, Mapping):
        if list(value) != letters[: len(value)]:
            raise TaskError(f"{where}: the keys are not A, B, C, ..; use these, or a list")
        value = list(value.values())
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= len(letters):
        raise TaskError(f"{where}: expected a list of 2 to {len(letters)} texts")
    options = {}
    for letter, text in zip(letters, value, strict=False):
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise TaskError(
                f"{where}: option {letter} is of type {type(text).__name__}; expected a string"
            )
        options[letter] = re.sub(rf"^\(?{letter}[).:]\s*", "", str(text).strip())
        if not options[letter]:
            raise TaskError(f"{where}: option {letter} is empty; expected a text")
    return options


def _check_reference(item: Item, where: str) -> None:
    """Raise TaskError where no answer could be correct, before any request is made and paid for."""
    try:
        if item.family == "vqa_closed":
            metrics_strict.closed(item.answer, item.answer)
        elif item.family in CHOICES:
            metrics_strict.choice(item.answer, item.answer, item.prompt)
        elif item.family == "vqa_numeric":
            metrics_strict.number(item.answer, item.answer)
    except metrics_strict.StrictError:
        shown = f"answer {printable(repr(item.answer), 60)}"
        if item.data_class == egress.CREDENTIALED:
            shown = "the answer"
        form = ANSWER_FORMS[item.family]
        raise TaskError(
            f"{where}: {shown} cannot be read as {form}, so no reply could be correct; fix it, or "
            "leave the row out"
        ) from None


def _chat(where: str, row: Mapping[str, Any], data_class: str) -> tuple[dict, str]:
    """Return the content of a visual_chat row's dictionary, and its domain."""
    try:
        chat = chat_answers.read(str(row["answer"]))
    except chat_answers.ChatAnswerError as error:
        credentialed = data_class == egress.CREDENTIALED
        why = "the answer is not the dictionary of the released schema" if credentialed else error
        raise TaskError(f"{where}: {why}") from (None if credentialed else error)
    question = str(row["prompt"]).replace(IMAGE_PLACEHOLDER, "").strip()
    detailed = row["question_type"] == "detailed_description"
    released = dict(
        prompt=str(row["prompt"]),
        fig_label=chat.label,
        fig_caption=chat.caption,
        in_text_mention=chat.mention,
    )
    fields = dict(
        prompt=DETAILED_PROMPT if detailed else question,
        answer=chat.reference,
        context=chat.context,
        released=tuple(released.items()),
    )
    return fields, chat.domain


def _task(row: Mapping[str, str], family: str) -> str:
    """Return the task's name as in eval/tasks/catalog.py.

    Examples: vqa_rad_closed, captioning_quilt, multimodal.
    """
    name, question_type = row["task_name"], row["question_type"]
    if name in SAMPLE or question_type in SAMPLE:
        return family
    if name in FAMILY_BY_TASK:
        return f"{family}_{question_type}" if question_type else family
    return f"{name}_{question_type}"


def _facts(row: Mapping) -> tuple[str, ...]:
    if not row:
        return ()
    return (NOUNS[row["modality"]], *(str(row[name]) for name in FACTS if row[name]))
