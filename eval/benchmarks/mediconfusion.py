"""Reads and scores MediConfusion: one question about each of two images, with opposite answers.

    data/dataset.json  {"10001": {"im_1": "train/radiology/images/ROCO_28778.jpg", "im_2": ..,
                       "im_1_local": 20192, "im_2_local": .., "question": "..", "option_A": "..",
                       "option_B": "..", "im_1_correct": "A", "im_2_correct": "B",
                       "category_1": ["Cerebral", "Vascular"], "category_2": [..], ..}, ..}
    data/images/       20192.jpg .., as scripts/download.py of the repository writes them

--from names data/. A pair is one group, and right only if both answers are; it is left out as a
whole, and counted, where one of its images is missing. Read at: github.com/MShahabSepehri/
MediConfusion at 40a8b419, README.md, utils/answering.py (scoring, of mode mc), data/.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, SourceError
from medmax_jax.data.sources.row import RejectedRow, RowError, collect_rows, field_text, first_file
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, Published, TaskSpec
from medmax_jax.eval.metrics import question_sets
from medmax_jax.eval.metrics.question_sets import OwnScore, QuestionSets
from medmax_jax.eval.records import EvalRecord

NAME = "mediconfusion"
FILE = "dataset.json"
LETTERS = ("A", "B")
# Forms in which a letter counts; the published list also has two with a line break, which the
# published code has replaced by a space before.
FORMS = ("{0}", "{0}:", ".{0}", ".{0}:", "{0}.", '{0}")', '("{0}":', '("{0}")', '("{0}").')


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield two items for each pair, one about each of its images."""
    path = first_file(folder, (FILE,), "MediConfusion")
    pairs = fields.json_file(path)
    if not isinstance(pairs, dict):
        raise SourceError(f"{FILE}: not an object of pairs; use the file as it is published")
    rows = ((RowLocation(FILE, number), pair) for number, pair in enumerate(pairs.values(), 1))
    for items in collect_rows(rows, functools.partial(_pair, folder)):
        # A pair with a malformed half is rejected as a whole: two rows.
        yield from (items, items) if isinstance(items, RejectedRow) else items


def _pair(folder: pathlib.Path, place: RowLocation, pair: dict[str, Any]) -> list[Item]:
    items = [_item(number, place, pair) for number in (1, 2)]
    for item in items:
        fields.check_present(folder, item["image_path"], "what scripts/download.py writes")
    return items


def _item(number: int, place: RowLocation, pair: dict[str, Any]) -> Item:
    local = pair.get(f"im_{number}_local")
    if isinstance(local, bool) or not isinstance(local, int):
        raise RowError(f"im_{number}_local: missing or not a number")
    categories = pair.get(f"category_{number}")
    if not isinstance(categories, list) or not all(isinstance(c, str) for c in categories):
        raise RowError(f"category_{number}: not a list of texts")
    group = place.id(NAME).replace("/", "-")
    return fields.choice_row(
        NAME,
        place,
        question=field_text(pair, "question"),
        choices={letter: field_text(pair, f"option_{letter}") for letter in LETTERS},
        answer=pair.get(f"im_{number}_correct"),
        id=f"{group}-{number}",
        image_path=f"images/{local}.jpg",
        group=group,
        slices={"category": categories},
    )


def chosen_option(text: str) -> str:
    """Return the option that the published code reads from an answer; "" for none or both."""
    words = text.replace("\n", " ").split(" ")
    found = [c for c in LETTERS if any(form.format(c) in words for form in FORMS)]
    return found[0] if len(found) == 1 else ""


def own_scores(records: Sequence[EvalRecord]) -> dict[str, OwnScore]:
    """Return the published scores: confusion is over the pairs with two options that are read."""
    options: dict[str, list[str]] = {}
    right: dict[str, list[bool]] = {}
    for record in records:
        option = chosen_option(record.text)
        options.setdefault(record.group, []).append(option)
        right.setdefault(record.group, []).append(option == record.answer)
    pairs = [(options[group], right[group]) for group in options if len(options[group]) == 2]
    return {
        "accuracy": question_sets.share(correct for _, both in pairs for correct in both),
        "set_accuracy": question_sets.share(all(both) for _, both in pairs),
        "confusion": question_sets.share(a == b if a and b else None for (a, b), _ in pairs),
    }


LEADERBOARD = "README.md of github.com/MShahabSepehri/MediConfusion at 40a8b419"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="MediConfusion",
        family="vqa_mcq",
        source="github.com/MShahabSepehri/MediConfusion, data/dataset.json",
        revision="40a8b41970e9d858deb09a2ee00a9caddfd6635b",
        split="all",
        licence="MIT: its README.md; images of articles in PubMed Central, downloaded one by one",
        metric="set_accuracy",
        counts=352,
        counted="data/dataset.json at that revision: 176 pairs",
        sets=QuestionSets(metric="set_accuracy", key=("group",), confusion=True, size=2),
        differs="MediConfusion: each model with its own prompt and the best of up to four ways of "
        "asking; confusion only over pairs with two readable answers",
        published=tuple(
            Published(model=model, value=value, metric=metric, read=LEADERBOARD)
            for model, set_accuracy, confusion in (
                ("random", 25.00, 50.00),
                ("Gemini 1.5 Pro", 19.89, 58.52),
                ("GPT-4o (20240513)", 18.75, 75.00),
                ("Llama 3.2 90B Vision", 15.34, 78.41),
                ("InstructBLIP Vicuna 7B", 12.50, 80.35),
                ("LLaVA v1.6 Mistral 7B", 9.09, 85.80),
                ("Claude 3 Opus", 8.52, 84.09),
                ("RadFM", 5.68, 85.80),
                ("Med-Flamingo", 4.55, 98.30),
                ("LLaVA-Med v1.5 Mistral 7B", 1.14, 97.16),
            )
            for metric, value in (("set accuracy, %", set_accuracy), ("confusion, %", confusion))
        ),
        own_scores=own_scores,
        own_scorer="utils/answering.py of github.com/MShahabSepehri/MediConfusion at 40a8b419, "
        "mode mc: agrees on 1,200 of 1,200 outputs",
    ),
)
