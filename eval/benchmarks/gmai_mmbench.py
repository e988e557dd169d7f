"""Reads and scores GMAI-MMBench VAL: one question about one image, of 284 data sets.

    GMAI-MMBench_VAL.tsv   9.3 GB, with tabs: index, image (base64), question, A .. E (fewer are
                           empty), answer (letter), category, split, and clinical vqa task,
                           department, perceptual granularity, modality where the file has them

The file is read line by line, with one image in memory. As in other files of VLMEvalKit, an image
of at most 64 characters is the index of the row that has it. TEST has no answers and is not read.
Read at: github.com/open-compass/VLMEvalKit at e8e78f0, vlmeval/dataset/image_mcq.py (address, MD5,
groups of the report), vlmeval/utils/matching_util.py (scoring); github.com/uni-medical/
GMAI-MMBench at df68547, README.md (columns, results).
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, csv_rows
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_text,
    first_file,
)
from medmax_jax.data.sources.vqa import MAX_IMAGE_BYTES
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, published_scores
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.records import EvalRecord

NAME = "gmai_mmbench"
FILE = "GMAI-MMBench_VAL.tsv"
LETTERS = "ABCDE"
COLUMNS = ("index", "image", "question", "A", "B", "answer")
SLICES = {  # a column's name in lower case, as the published report groups -> the slice
    "clinical vqa task": "clinical_task",
    "department": "department",
    "perceptual granularity": "granularity",
    "modality": "modality",
    "category": "category",
    "l2-category": "category_2",
}
MAX_ROW = MAX_IMAGE_BYTES * 4 // 3 + (1 << 16)  # characters of one line
MAX_REFERENCE = 64  # characters of an index in place of an image
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED_REQUEST = "Failed to obtain answer via API"
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of VAL."""
    path = first_file(folder, (FILE,), "GMAI-MMBench")
    rows = csv_rows(path, COLUMNS, delimiter="\t", max_chars=MAX_ROW)
    yield from collect_rows(rows, functools.partial(_row, {}))


def _row(paths: dict[str, str], place: RowLocation, row: dict[str, Any]) -> Item:
    """Return the item of a row; `paths`: the images of the rows before it, by index."""
    given = [letter for letter in LETTERS if row.get(letter)]
    if given != list(LETTERS[: len(given)]):
        raise RowError("A to E: an option before the last one is empty")
    choices = fields.options([row[letter] for letter in given], "A to E")
    image, index = row["image"], field_text(row, "index")
    if len(image) <= MAX_REFERENCE:
        if image not in paths:
            raise RowError("image: neither base64 nor the index of a row before it")
        shown: dict[str, Any] = {"image_path": paths[image]}
    else:
        shown = fields.embedded([fields.image_of_base64(image, "image")], "image")
        shown = {name: values[0] for name, values in shown.items()}
    by_name = {column.lower(): value for column, value in row.items()}
    item = fields.choice_row(
        NAME,
        place,
        question=field_text(row, "question"),
        choices=choices,
        answer=row["answer"],
        group=shown["image_path"],
        slices={ours: by_name.get(theirs) for theirs, ours in SLICES.items()},
        **shown,
    )
    paths[index] = shown["image_path"]
    return item


def own_correct(text: str, record: EvalRecord) -> bool:
    """Return whether VLMEvalKit's exact matching, without a judge, infers the right letter."""
    return _inferred(text, text_metrics.options(record.prompt)) == record.answer


def _inferred(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that VLMEvalKit infers; "Z" for a refusal, None for nothing.

    A letter that is the only one among the words, and one of the last four; else "answer is B";
    else the only option whose text occurs in an answer of less than about its options' length.
    """
    if FAILED_REQUEST not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
        found = [letter for letter in options if letter in words]
        if len(found) == 1 and words.index(found[0]) > len(words) - 5:
            return found[0]
        if not found and "Z" in words:
            return "Z"
        stated = _ANSWER_IS.search(answer)
        if stated and stated[1].upper() in options:
            return stated[1].upper()
    lowered = answer.lower()
    if len(lowered) > 2 * sum(map(len, options.values())):
        return None
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


BOARD = "README.md of github.com/uni-medical/GMAI-MMBench at df68547, Leaderboard, Val"
UNIMEDVL = "README.md of github.com/uni-medical/UniMedVL at 64a9915"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="GMAI-MMBench VAL",
        family="vqa_mcq",
        source="huggingface.co/datasets/VLMEval/GMAI-MMBench, GMAI-MMBench_VAL.tsv",
        revision="MD5 254bd581627866f1c499d3d6b4422324",
        split="VAL",
        licence="Apache-2.0: tag of the source; the images belong to its 284 data sets",
        metric="accuracy",
        counted="1,000 to 10,000: page of the source",
        differs="GMAI-MMBench: VLMEvalKit's prompt; where it infers no letter a GPT-4 judge "
        "chooses one, here the own rule is that of its exact matching",
        published=(
            *published_scores(
                "GMAI-MMBench VAL accuracy, %",
                BOARD,
                *(("Random", 25.70), ("GPT-4o", 53.53), ("Gemini 1.5", 47.42)),
                *(("GPT-4V", 42.50), ("MedDr", 41.95), ("DeepSeek-VL-7B", 41.73)),
                *(("Claude3-Opus", 32.37), ("RadFM", 22.95), ("LLaVA-Med", 20.54)),
                ("Med-Flamingo", 12.74),
            ),
            *published_scores(
                "GMAI-MMBench accuracy by UniMedVL's authors, %",
                f"{UNIMEDVL}; split not stated",
                *(("UniMedVL", 60.75), ("HealthGPT-L14", 43.1), ("GMAI-VL", 61.74)),
                *(("HuatuoGPT-Vision 7B", 50.22), ("Bagel", 48.11)),
            ),
        ),
        own_correct=own_correct,
        own_scorer="vlmeval/utils/matching_util.py of github.com/open-compass/VLMEvalKit at "
        "e8e78f0: agrees on 1,200 of 1,200 outputs",
        run_by="VLMEvalKit",
    ),
)
