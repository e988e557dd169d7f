"""Reads and scores MedXpertQA-MM: examination questions about one to six images, five options.

    MM/test.jsonl    id, question (ending with "Answer Choices: (A) .. (B) .."), options ({letter:
                     text}), label (letter), images (list of file names), medical_task,
                     body_system, question_type
    images/          images.zip, unpacked

medxpertqa_mm_input.jsonl of the authors' code is the same rows in another form: options
[{letter, content}], label [letter], images [{image_path}]. Both are read.
Read at: github.com/TsinghuaC3I/MedXpertQA at f21247d, eval/data/prepare_medxpertqa.ipynb (how the
second form is made of the first), medxpertqa_mm_input.jsonl (2,000 rows), eval/utils.py, main.py.
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, json_lines
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
    first_file,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, Published, TaskSpec, published_scores
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.records import EvalRecord

NAME = "medxpertqa_mm"
FILES = ("MM/test.jsonl", "test.jsonl", "medxpertqa_mm_input.jsonl")
CHOICES = "\nAnswer Choices: "  # the options again, at the end of each question
SLICES = ("medical_task", "body_system", "question_type")
TRIGGER = "Therefore, among A through {last}, the answer is"
UNWANTED = ("I understand", "A through J", "A through E", "A through D")


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of the multimodal test split."""
    path = first_file(folder, FILES, "MedXpertQA-MM")
    yield from collect_rows(json_lines(path), functools.partial(_row, folder))


def _row(folder: pathlib.Path, place: RowLocation, row: dict[str, Any]) -> Item:
    images = [_image(folder, value) for value in _list(row, "images")]
    if not 1 <= len(images) <= fields.MAX_IMAGES:
        raise RowError(f"images: not 1 to {fields.MAX_IMAGES} images")
    question = field_text(row, "question").partition(CHOICES)[0]
    label = row.get("label")
    return fields.choice_row(
        NAME,
        place,
        question=question,
        choices=_options(row.get("options")),
        answer=label[0] if isinstance(label, list) and len(label) == 1 else label,
        image_path=images,
        group=images[0],
        slices={name: row.get(name) for name in SLICES} | {"images": len(images)},
    )


def _list(row: Mapping[str, Any], field: str) -> list[Any]:
    if not isinstance(row.get(field), list):
        raise RowError(f"{field}: not a list")
    return row[field]


def _image(folder: pathlib.Path, value: Any) -> str:
    item = value if isinstance(value, dict) else {"image_path": value}
    path = field_image_path(item, "image_path", "images")
    fields.check_present(folder, path, "images.zip")
    return path


def _options(value: Any) -> dict[str, str]:
    if isinstance(value, list) and all(isinstance(option, dict) for option in value):
        value = {option.get("letter"): option.get("content") for option in value}
    if not isinstance(value, dict):
        raise RowError("options: neither {letter: text} nor [{letter, content}]")
    choices = fields.options(list(value.values()), "options")
    if list(value) != list(choices):
        raise RowError("options: the letters are not A, B, C, ..")
    return choices


def own_correct(text: str, record: EvalRecord) -> bool:
    """Return whether the published zero-shot evaluation finds the right letter in a response.

    The response is what follows the trigger, else " answer is ", up to their next occurrence; the
    first letter of an option in it that is a word counts, also an article: "A CT" is A.
    """
    letters = list(text_metrics.options(record.prompt))
    response = text.strip()
    for trigger in (TRIGGER.format(last=letters[-1]), " answer is "):
        parts = response.split(trigger)
        if len(parts) > 1:
            response = parts[1].strip()
            break
    for phrase in UNWANTED:
        response = response.replace(phrase, "")
    found = re.search(rf"\b({'|'.join(letters)})\b", response)
    return found is not None and found[1] == record.answer


TABLE = "figs/leaderboard1.png of github.com/TsinghuaC3I/MedXpertQA at f21247d, column AvgMM"
KIT = "assets/mm_eval.png of github.com/alibaba-damo-academy/MedEvalKit at 9b12e3b"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="MedXpertQA-MM",
        family="vqa_mcq",
        source="huggingface.co/datasets/TsinghuaC3I/MedXpertQA, MM",
        licence="MIT; the images belong to their publishers",
        metric="accuracy",
        counts=2_000,
        counted="medxpertqa_mm_input.jsonl of github.com/TsinghuaC3I/MedXpertQA at f21247d; 2,852 "
        "images",
        prompt="the row's, its options one per line",
        differs="MedXpertQA: two turns, the reasoning and then the answer after a fixed sentence; "
        "the first letter that is a word counts",
        published=(
            *published_scores(
                "MedXpertQA-MM accuracy, %",
                TABLE,
                *(("QVQ-72B-Preview", 33.55), ("GPT-4o", 42.80), ("Claude-3.5-Sonnet", 33.20)),
                *(("Gemini-1.5-Pro", 34.10), ("GPT-4o-mini", 28.05)),
                *(("Gemini-2.0-Flash", 37.20), ("Qwen2.5-VL-72B", 29.95)),
                ("Qwen2-VL-72B", 28.35),
            ),
            Published(
                model="o1",
                value=56.28,
                metric="MedXpertQA-MM accuracy, %",
                read=f"{TABLE}; of a random sample of the questions",
            ),
            *published_scores(
                "MedXpertQA-MM accuracy by MedEvalKit, %",
                KIT,
                *(("HealthGPT-14B", 24.7), ("Lingshu-7B", 26.7), ("Lingshu-32B", 30.9)),
                *(("MedGemma-27B-IT", 33.9), ("HuatuoGPT-V-7B", 21.6), ("LLaVA-Med-7B", 20.3)),
            ),
        ),
        own_correct=own_correct,
        own_scorer="eval/utils.py and main.py of github.com/TsinghuaC3I/MedXpertQA at f21247d: "
        "agrees on 1,200 of 1,200 outputs",
        run_by="MedEvalKit, VLMEvalKit",
    ),
)
