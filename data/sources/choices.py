"""Sources of multiple-choice questions: PMC-VQA and OmniMedVQA.

    source      file in the folder                            pictures
    PMC-VQA     train_2.csv, test_2.csv (version 2)           images_2/figures/, figures/
                index,Figure_path,Caption,Question,Choice A,..,Choice D,Answer,split
                Answer is a letter, a choice reads " A: Brain "
                or train.csv, test.csv (version 1)            images/
                Figure_path,Question,Answer,Choice A,..,Choice D,Answer_label
                Answer is words, Answer_label the letter
    OmniMedVQA  QA_information/Open-access/*.json             paths in the files
                {"dataset": "ACRIMA", "question_id": "ACRIMA_0000", "question_type": "..",
                 "question": "..", "gt_answer": "..", "image_path": "Images/ACRIMA/..png",
                 "option_A": "..", "option_B": "..", .., "modality_type": ".."}  two to four options

A document asks as the release does, and answers with the letter:
    <image>Which organ is this?\\nA: Liver B: Brain\\nC: Heart D: Lung<reserved08706>B
(its figure breaks lines after the question, B and C; ours has one choice a line). Version 2 of
PMC-VQA has 176,948 train rows, which is MedMax's 178K but for rounding. OmniMedVQA publishes no
split; MedMax trained on 81K of its 88,996 open questions, so 9 % of its pictures, by hash, are test
here: not the released split. Restricted-access questions come without pictures and are not read.
Read at: huggingface.co/datasets/xmcmic/PMC-VQA README.md (version 1) and files; public loaders of
train_2.csv (version 2); huggingface.co/datasets/foreverbeliever/OmniMedVQA README.md, github.com/
GiovanniCornejo/MediVision-OmniMedVQA reports/draft_reports/part1_dataexploration.md (counts).
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from data.sources.questions import asked
from data.sources.row import (
    Bad,
    Place,
    Plan,
    Row,
    RowError,
    SourceError,
    collect,
    drawn,
    first_file,
    picture_path,
    root_of,
    text_of,
)
from data.sources.stream import csv_rows, json_array

LETTERS = ("A", "B", "C", "D")
OMNI_TEST = 0.09  # 1 - 81K / 88,996: the share that MedMax did not train on
_PMC = {"train": ("train_2.csv", "train.csv"), "test": ("test_2.csv", "test.csv")}


def read_pmc_vqa(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """PMC-VQA, version 2 where the folder has it."""
    if plan.split not in _PMC:
        raise SourceError(f"{plan.source}: has no split {plan.split}; use train or test")
    path = first_file(folder, _PMC[plan.split], plan.source)
    second = path.stem.endswith("_2")
    columns = ["Figure_path", "Question", *(f"Choice {c}" for c in LETTERS)]
    columns.append("Answer" if second else "Answer_label")
    rows = csv_rows(path, tuple(columns))
    root = root_of(folder, ("images_2/figures", "figures", "images_2")) if second else "images"
    return collect(rows, functools.partial(pmc_vqa, plan, root, columns[-1]))


def read_omnimedvqa(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """OmniMedVQA's open-access questions, file by file."""
    paths = sorted((folder / "QA_information" / "Open-access").glob("*.json"))
    if not paths:
        raise SourceError(f"{plan.source}: no QA_information/Open-access/*.json; see --from")
    for path in paths:
        yield from collect(json_array(path), functools.partial(omnimedvqa, plan))


def choice_text(question: str, choices: dict[str, str]) -> str:
    """The question with its choices, one a line."""
    return "\n".join([question, *(f"{letter}: {text}" for letter, text in choices.items())])


def pmc_vqa(plan: Plan, root: str, answer: str, place: Place, item: dict[str, Any]) -> Row:
    """One question of PMC-VQA; `answer`: the column with the letter."""
    choices = {}
    for letter in LETTERS:
        text = re.sub(rf"^{letter}\s*:\s*", "", text_of(item, f"Choice {letter}"))
        choices[letter] = text_of({"choice": text}, "choice")
    right = text_of(item, answer).upper()
    if right not in choices:
        raise RowError(f"{answer}: none of A, B, C, D")
    image = picture_path(item, "Figure_path", root)
    group = pathlib.PurePosixPath(image).name.split("_")[0]
    fields = dict(image=image, image_path=image, split=plan.split, group=group)
    return asked(plan, place, choice_text(text_of(item, "Question"), choices), right, **fields)


def omnimedvqa(plan: Plan, place: Place, item: dict[str, Any]) -> Row:
    """One question of OmniMedVQA."""
    given = [letter for letter in LETTERS if item.get(f"option_{letter}") not in (None, "")]
    choices = {letter: text_of(item, f"option_{letter}") for letter in given}
    if given != list(LETTERS[: len(given)]) or len(given) < 2:
        raise RowError("option_A..D: fewer than two, or with a gap")
    right = [c for c, text in choices.items() if text == text_of(item, "gt_answer")]
    if len(right) != 1:
        raise RowError("gt_answer: not one of the options, or several")
    image = picture_path(item, "image_path", "")
    split = "test" if drawn("OmniMedVQA", image).random() < OMNI_TEST else "train"
    fields = dict(image=image, image_path=image, split=split, group=image)
    return asked(plan, place, choice_text(text_of(item, "question"), choices), right[0], **fields)
