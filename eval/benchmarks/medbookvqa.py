"""Reads and scores MedBookVQA: questions about figures of open-access textbooks, four options.

    data.json        one array: _id, QAtype, Question, Answer, Distractors [3], correct_choice
                     (letter of Answer), other_choices (letters of Distractors), image_path
                     "./figures/c115..jpg", LABEL {Modality [category, modality], Anatomy [system,
                     subsystem, body part, organ], Department [category, department]}
    figures/         figures.zip, unpacked

Read at: github.com/slyipae1/MedBookVQA at 180c222, README.md (fields, a row), evaluation/
eval_utils.py (how the options are composed), summerize_utlis.py and summerize_result.ipynb
(scoring). The sample entry has spaces around Question and Answer; they are removed.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, json_array
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
    first_file,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, published_scores
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.records import EvalRecord

NAME = "medbookvqa"
LETTERS = ["A", "B", "C", "D"]
LABELS = {  # field of LABEL -> the slice of each of its levels
    "Modality": ("modality_category", "modality"),
    "Anatomy": ("system", "subsystem", "body_part", "organ"),
    "Department": ("department_category", "department"),
}


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of data.json, all of which are for evaluation."""
    path = first_file(folder, ("data.json",), "MedBookVQA")
    yield from collect_rows(json_array(path), functools.partial(_row, folder))


def _row(folder: pathlib.Path, place: RowLocation, row: dict[str, Any]) -> Item:
    distractors, others = row.get("Distractors"), row.get("other_choices")
    if not isinstance(distractors, list) or not isinstance(others, list):
        raise RowError("Distractors, other_choices: not lists")
    if len(distractors) != 3 or len(others) != 3:
        raise RowError("Distractors, other_choices: not three of each")
    answer = row.get("correct_choice")
    letters = [answer, *others]
    if not all(isinstance(letter, str) for letter in letters) or sorted(letters) != LETTERS:
        raise RowError("correct_choice, other_choices: not A to D, each once")
    texts = dict(zip(letters, [row.get("Answer"), *distractors], strict=True))
    image = field_image_path(row, "image_path", "")
    fields.check_present(folder, image, "figures.zip")
    return fields.choice_row(
        NAME,
        place,
        question=field_text(row, "Question"),
        choices=fields.options([texts[letter] for letter in LETTERS], "Answer, Distractors"),
        answer=answer,
        image_path=image,
        group=image,
        slices=_slices(row.get("LABEL")) | {"question_type": row.get("QAtype")},
    )


def _slices(labels: Any) -> dict[str, Any]:
    slices = {}
    for name, levels in LABELS.items():
        values = labels.get(name) if isinstance(labels, dict) else None
        if not isinstance(values, list) or len(values) != len(levels):
            raise RowError(f"LABEL: {name} has not {len(levels)} levels")
        slices |= dict(zip(levels, values, strict=True))
    return slices


def own_correct(text: str, record: EvalRecord) -> bool:
    """Return whether a response is the letter that the published evaluation expects.

    It expects the first option whose line ends with the answer's words, so that an answer "MRI"
    is that of an earlier option "functional MRI" too; the response has to be the letter alone.
    """
    options = text_metrics.options(record.prompt)
    ending = f" {options[record.answer]}"
    expected = next(
        letter for letter, option in options.items() if f"{letter}. {option}".endswith(ending)
    )
    return text == expected


TABLE = "evaluation/visualize/Result_summary.csv of github.com/slyipae1/MedBookVQA at 180c222"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="MedBookVQA",
        family="vqa_mcq",
        source="huggingface.co/datasets/slyipae1/MedBookVQA",
        licence="MIT: LICENSE of the code; of the data, not stated; figures of open-access books",
        metric="accuracy",
        counts=5_000,
        counted="evaluation/summerize_result.ipynb of github.com/slyipae1/MedBookVQA at 180c222",
        differs="MedBookVQA: the options in one line with | between them, an instruction to write "
        "the letter alone; any other text is wrong",
        published=published_scores(
            "MedBookVQA accuracy, %",
            TABLE,
            *(("Gemini2.5-Pro(03-25)", 81.24), ("GPT4.1", 77.98), ("GPT-4o", 74.94)),
            *(("InternVL3-78B", 72.92), ("LLaVA-OV-72B", 72.86), ("Ovis2-34B", 71.42)),
            *(("Claude3.7-Sonnet-Thinking", 70.50), ("Qwen2.5-VL-72B-Instruct", 70.06)),
            *(("HealthGPT-L14", 68.58), ("HealthGPT-M3", 64.52)),
            *(("HuatuoGPT-Vision-34B", 66.10), ("HuatuoGPT-Vision-7B", 62.82)),
            ("MedVLM-R1", 57.68),
        ),
        own_correct=own_correct,
        own_scorer="evaluation/summerize_utlis.py and summerize_result.ipynb of "
        "github.com/slyipae1/MedBookVQA at 180c222: agrees on 1,200 of 1,200 outputs",
    ),
)
