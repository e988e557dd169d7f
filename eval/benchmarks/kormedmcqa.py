"""Reads and scores KorMedMCQA-V: the Korean medical licensing examination, with images.

    doctor/test_full-*.parquet   subject, year, period, q_number, question, A .. E, answer (1 to 5,
                                 or a letter), images: a list, or the JSON of one, of {pic_num,
                                 modality, image_base64}

Read at: github.com/baeseongsu/kormedmcqa_v at 9c6c6ce, README.md (counts, results, license),
kormedeval/datasets/kormedmcqa_v.py (fields, prompt, scoring), kormedeval/utils.py.
"""

import ast
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, parquet_rows
from medmax_jax.data.sources.row import RejectedRow, RowError, collect_rows, field_text
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, published_scores
from medmax_jax.eval.records import EvalRecord
from medmax_jax.io import text_files

NAME = "kormedmcqa_v"
LETTERS = "ABCDE"
WHERE = ("subject", "year", "period", "q_number")
COLUMNS = (*WHERE, "question", *LETTERS, "answer", "images")
THINKING = (  # the marks that the published evaluation removes; each first one counts
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("...thinking...", "....thinking...."),
    ("[THINK]", "[/THINK]"),
)
_KEYS = ("정답", "answer")
_LETTER = r"([A|B|C|D|E])"  # as published: a "|" matches, and is no answer


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of the split test_full of `doctor`."""
    paths = fields.split_files(folder, "test_full", "KorMedMCQA-V")
    rows = parquet_rows(paths, COLUMNS, "test_full.parquet", batch=8)
    yield from collect_rows(rows, _row)


def _row(place: RowLocation, row: dict[str, Any]) -> Item:
    given = [letter for letter in LETTERS if row[letter] not in (None, "")]
    if given != list(LETTERS[: len(given)]):
        raise RowError("A to E: an option before the last one is missing")
    images = _images(row["images"])
    modalities = {str(image.get("modality") or "") for image in images}
    return fields.choice_row(
        NAME,
        place,
        question=field_text(row, "question"),
        choices=fields.options([row[letter] for letter in given], "A to E"),
        answer=_answer(row["answer"]),
        group="-".join(field_text(row, name) for name in WHERE),
        slices={
            "year": row["year"],
            "modality": modalities.pop() if len(modalities) == 1 else "several",
            "images": len(images),
        },
        **fields.embedded(
            [fields.image_of_base64(image.get("image_base64"), "image_base64") for image in images],
            "images",
        ),
    )


def _images(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = text_files.parse_json(value.encode(), "images")  # bounded by the Parquet row
        except ValueError as error:
            raise RowError("images: not JSON") from error
    if not isinstance(value, list) or not all(isinstance(image, dict) for image in value):
        raise RowError("images: not a list of {pic_num, modality, image_base64}")
    return value


def _answer(value: Any) -> Any:
    """Return the letter of a number from 1 to 5, also as text; other values as they are."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return LETTERS[value - 1] if is_number and 1 <= value <= len(LETTERS) else value


def own_correct(text: str, record: EvalRecord) -> bool:
    """Return whether the published evaluation reads the right letter from a response."""
    for start, end in THINKING:
        if start in text and end in text:
            text = text.partition(end)[2].strip()
            break
    return _parsed(text) == record.answer


def _parsed(response: str) -> str | None:
    """Return the letter of the last {"정답": "A"} or {"answer": "A"}, else of \\boxed{A}.

    Of a fenced block of JSON, only that block is read.
    """
    fenced = re.search(r"```json\s*(\{.*?\})\s*```", response, re.DOTALL | re.IGNORECASE)
    blocks = [fenced[1]] if fenced else re.findall(r"\{.*?\}", response, re.DOTALL)
    for block in reversed(blocks):
        content = _literal(block)
        for key in _KEYS if isinstance(content, dict) else ():
            found = re.search(_LETTER, str(content.get(key, "")), re.IGNORECASE)
            if content.get(key) is not None and found and found[1] != "|":
                return found[1].upper()
    found = re.search(rf"\\boxed\{{{_LETTER}\}}", response, re.IGNORECASE)
    return found[1].upper() if found and found[1] != "|" else None


def _literal(block: str) -> Any:
    """Return the value of JSON, or of a Python literal, which is parsed and never run."""
    for parse in (_json, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an invalid escape in the model's text
                return parse(block)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _json(block: str) -> Any:
    lenient = dict(allow_nonfinite=True, allow_lone_surrogates=True)
    return text_files.parse_json(block.encode(), "an answer", **lenient)


README = "README.md of github.com/baeseongsu/kormedmcqa_v at 9c6c6ce"
CARDS = (
    TaskSpec(
        task=f"{NAME}_mcq",
        title="KorMedMCQA-V, in Korean",
        family="vqa_mcq",
        source="huggingface.co/datasets/seongsubae/KorMedMCQA-V, doctor",
        revision="v1.0.0",
        split="test_full",
        licence="CC BY-NC-SA 4.0",
        metric="accuracy",
        counts=1_534,
        counted=f"{README}: all questions; its commands evaluate test_full. 2,043 images",
        differs="KorMedMCQA-V: an instruction in Korean asks for one JSON object; other forms, "
        "except \\boxed{}, are wrong; temperature 0.7; failed requests are left out",
        published=published_scores(
            "KorMedMCQA-V accuracy, %",
            README,
            ("Gemini-3.0-Pro", 96.9),
            ("Qwen3-VL-32B-Thinking", 83.7),
            ("VARCO-VISION-2.0-14B", 43.2),
        ),
        own_correct=own_correct,
        own_scorer="kormedeval/datasets/kormedmcqa_v.py and utils.py of "
        "github.com/baeseongsu/kormedmcqa_v at 9c6c6ce: agrees on 1,200 of 1,200 outputs",
    ),
)
