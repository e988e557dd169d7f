"""Matches the answers of a prediction file to items, by id or by content; nothing is guessed.

    id        the key is the id of an item, and the question that the row holds is the item's; an
              index, which may be of another set of items, decides only between equal contents
    content   the question, and where the row has them its images and its reference, are those of
              exactly one item; the question may be one line of the row's complete prompt

A row without an item, and rows of which several are possible, are counted by reason and place.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.prediction_files.formats import Answer, PredictionFile
from medmax_jax.eval.records import Item

NO_QUESTION = "no item has its question"
NO_IMAGE = "no item has its question and its images"
NO_REFERENCE = "no item has its question and its reference"
SEVERAL_ITEMS = "several items have its question, and nothing in the row tells them apart"
SEVERAL_ROWS = "several rows are of one item"
OTHER_QUESTION = "an item has its id and another question"
UNCHECKED = "its index is the id of an item, and the row has no question to check it with"
MAX_LINES = 200  # of a prompt that are compared with questions


def match(
    file: PredictionFile, items: Sequence[Item]
) -> tuple[dict[str, Answer], dict[str, list[str]]]:
    """Return item's id -> answer, and reason -> places of the rows that match no item."""
    by_id = {item.id: item for item in items}
    by_question: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        for text in dict.fromkeys((_words(item.prompt), _words(_question(item)))):
            by_question[text].append(item)
    unmatched: dict[str, list[str]] = {reason: list(at) for reason, at in file.left_out.items()}
    claims: dict[str, list[Answer]] = collections.defaultdict(list)
    for answer in file.answers:
        found = _item_of(answer, by_id, by_question)
        if isinstance(found, str):
            unmatched.setdefault(found, []).append(answer.place)
        else:
            claims[found.id].append(answer)
    for answers in claims.values():
        if len(answers) > 1:
            unmatched.setdefault(SEVERAL_ROWS, []).extend(answer.place for answer in answers)
    return {name: answers[0] for name, answers in claims.items() if len(answers) == 1}, unmatched


def _item_of(
    answer: Answer, by_id: Mapping[str, Item], by_question: Mapping[str, Sequence[Item]]
) -> Item | str:
    """Return the item of an answer, or why there is none."""
    texts, item = list(_texts(answer)), by_id.get(answer.key)
    if item is not None and not answer.key.isdecimal():
        same = not texts or {_words(_question(item)), _words(item.prompt)} & set(texts)
        return item if same else OTHER_QUESTION
    if item is not None and not texts:
        return UNCHECKED
    found = {item.id: item for text in texts for item in by_question.get(text, ())}
    candidates = list(found.values())
    for narrowed, reason in ((_same_images, NO_IMAGE), (_same_reference, NO_REFERENCE)):
        kept = [item for item in candidates if narrowed(answer, item)]
        if candidates and not kept:
            return reason
        candidates = kept
    if item in candidates:  # an index may be of another set of items, unless the content agrees
        return item
    if len(candidates) != 1:
        return SEVERAL_ITEMS if candidates else NO_QUESTION
    return candidates[0]


def _texts(answer: Answer) -> Iterable[str]:
    """Yield the words of the question, and of each line of it: a prompt may have several."""
    lines = answer.question.split("\n", MAX_LINES)[:MAX_LINES]
    for text in dict.fromkeys((answer.question, *lines)):
        if words := _words(text):
            yield words


def _words(text: str) -> str:
    return " ".join(text_metrics.tokens(text))


def _question(item: Item) -> str:
    """Return the prompt of an item without its options; the mark "A:" is no word of `_words`."""
    spans = text_metrics.option_spans(item.prompt) if item.family == "vqa_mcq" else []
    return item.prompt[: spans[0][1]] if spans else item.prompt


def _same_images(answer: Answer, item: Item) -> bool:
    """Return whether the names of the files are those of the item, if the row has any."""
    names = [PurePosixPath(name).name for name in answer.images]
    return not names or names == [PurePosixPath(name).name for name in item.images]


def _same_reference(answer: Answer, item: Item) -> bool:
    """Return whether the reference is the item's, as a letter or in words, if the row has one."""
    if not answer.reference:
        return True
    options = text_metrics.options(item.prompt) if item.family == "vqa_mcq" else {}
    theirs = answer.options.get(answer.reference, answer.reference)
    ours = options.get(item.answer.strip().upper(), item.answer)
    wanted = {_words(ours), item.answer.strip().lower()}
    return bool({_words(theirs), answer.reference.strip().lower()} & wanted)
