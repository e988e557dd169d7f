"""Reads and scores R-RAD and R-SLAKE of MedThink: questions with an answer and its rationale.

    R-RAD/closed-end/testset.json    {id: {question, choices ["yes", "no"], answer (index),
    R-RAD/open-end/testset.json       solution, image "synpic1.jpg"}}; open: choices [answer]
    R-SLAKE/closed-end/test.json     the same, with img_name "xmlab1/source.jpg", or img_id 1
    R-SLAKE/open-end/test.json
    */images/                        the images

Closed questions ask for both the answer and the rationale; the published code has no score for
open ones, so those ask for the answer alone.
Read at: github.com/Tang-xiaoxiao/Medthink at d92dd5d, Medthink_Code/dataset.py (fields, prompts),
closed_end_train.py (scoring), gemini.py (img_name). Its data files are in Git LFS.
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, SourceError
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
)
from medmax_jax.endpoints.egress import OPEN
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, Published, TaskSpec, item_row
from medmax_jax.eval.records import EvalRecord
from medmax_jax.io import text_files
from medmax_jax.io.text_files import TextFileError

MAX_JSON = 1 << 26  # bytes; the largest has 3.2 MB
FILES = {"r_rad": "testset.json", "r_slake": "test.json"}
SLICES = ("modality", "location", "content_type")  # of SLAKE's rows, where they are kept
_POINTER = b"version https://git-lfs"
_STATED = re.compile(r"The answer is \(([A-Z])\)")


def read(name: str, folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of the test files of R-RAD or R-SLAKE: closed, then open."""
    for kind in ("closed", "open"):
        path = folder / f"{kind}-end" / FILES[name]
        if not path.is_file():
            raise SourceError(
                f"{name}: the folder contains none of {kind}-end/{FILES[name]}; check --from"
            )
        rows = (
            (RowLocation(f"{kind}.json", number), row)
            for number, row in enumerate(_rows(path).values(), 1)
        )
        yield from collect_rows(rows, functools.partial(_row, name, kind, folder))


def _rows(path: pathlib.Path) -> Mapping[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    try:
        data = text_files.read_bytes(path, max_bytes=MAX_JSON)
        if data.startswith(_POINTER):
            raise SourceError(f"{where}: a pointer of Git LFS; fetch the file with git lfs pull")
        # The rows are checked one by one, so that one invalid row does not reject the file.
        lenient = dict(allow_nonfinite=True, allow_lone_surrogates=True)
        rows = text_files.parse_json(data, where, **lenient)
    except TextFileError as error:
        raise SourceError(f"{error}; use the file as it is published") from error
    if not isinstance(rows, dict):
        raise SourceError(f"{where}: not {{id: row}}; use the file as it is published")
    return rows


def _row(
    name: str, kind: str, folder: pathlib.Path, place: RowLocation, row: dict[str, Any]
) -> Item:
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) != (2 if kind == "closed" else 1):
        raise RowError("choices: not two of a closed question, or one of an open one")
    if kind == "closed" and (isinstance(answer, bool) or answer not in (0, 1)):
        raise RowError("answer: not the index of a choice")
    image = _image(name, row)
    fields.check_present(folder, image, "the images (git lfs pull)")
    question = field_text(row, "question")
    shared = dict(
        image_path=image,
        group=image,
        data_class=OPEN,
        slices={label: row.get(label) for label in SLICES},
    )
    if kind == "open":
        answer = field_text({"choices": choices[0]}, "choices")
        return item_row(name, place, "open", prompt=question, answer=answer, **shared)
    listed = fields.options(choices, "choices")
    shown = " ".join(f"({letter}) {text}" for letter, text in listed.items())
    return item_row(
        name,
        place,
        "rationale",
        prompt=f"Question: {question}\nOptions: {shown}",  # as published, without "Answer:"
        answer="AB"[answer],
        context=field_text(row, "solution"),
        **shared,
    )


def _image(name: str, row: dict[str, Any]) -> str:
    if name == "r_rad":
        return field_image_path(row, "image", "images")
    if row.get("img_name") is None and row.get("img_id") is not None:
        row = {"img_name": f"xmlab{field_text(row, 'img_id')}/source.jpg"}
    return field_image_path(row, "img_name", "images")


def own_correct(text: str, record: EvalRecord) -> bool:
    """Return whether the published evaluation reads the same letter as from its target.

    "The answer is (A)" must occur once; where the target's rationale repeats it, a response that
    states no answer is right.
    """
    target = f"The answer is ({record.answer}).\nSolution: {record.context}"
    return _stated(text) == _stated(target)


def _stated(text: str) -> str | None:
    found = _STATED.findall(text)
    return found[0] if len(found) == 1 else None


def _cards(name: str, title: str, licence: str, trained: float) -> tuple[TaskSpec, ...]:
    shared = dict(
        source=f"github.com/Tang-xiaoxiao/Medthink, Medthink_Dataset/{title}",
        revision="d92dd5d",
        licence=licence,
        data_class=OPEN,
        counted="its files are in Git LFS and could not be read",
    )
    return (
        TaskSpec(
            task=f"{name}_rationale",
            title=f"{title}, closed with a rationale",
            family="vqa_rationale",
            metric="accuracy",
            differs="MedThink: three orders of answer and rationale, each of a model that is "
            "trained on it; here that of its Explanation, the answer first, without training and "
            "without the cue 'Answer:'. Its ROUGE-L stems words",
            prompt="as in MedThink: 'Question: .. Options: (A) yes (B) no'",
            published=(
                Published(
                    model="MedThink, trained on it",
                    value=trained,
                    metric=f"{title} accuracy of a trained model, %",
                    read="aclanthology.org/2025.findings-naacl.415, abstract",
                ),
            ),
            own_correct=own_correct,
            own_scorer="Medthink_Code/closed_end_train.py, extract_ans, of "
            "github.com/Tang-xiaoxiao/Medthink at d92dd5d: agrees on 1,200 of 1,200 outputs",
            **shared,
        ),
        TaskSpec(
            task=f"{name}_open",
            title=f"{title}, open",
            family="vqa_open",
            metric="judge_correct",
            differs="MedThink: its code has no score for open questions",
            **shared,
        ),
    )


CARDS = (
    *_cards("r_rad", "R-RAD", "Apache-2.0; images of VQA-RAD, CC0 1.0", 83.5),
    *_cards("r_slake", "R-SLAKE", "Apache-2.0; images of SLAKE, CC BY 4.0", 86.3),
)
