"""Sources of open and closed questions in their own JSON: VQA-RAD and SLAKE.

    source   file in the folder                       pictures
    VQA-RAD  VQA_RAD Dataset Public.json              VQA_RAD Image Folder/
             {"qid": 1, "image_name": "synpic54610.jpg", "image_organ": "HEAD", "answer": "Yes",
              "answer_type": "CLOSED", "question_type": "PRES", "question": "Are regions of ..?",
              "phrase_type": "freeform"}              test_freeform and test_para are the test set
    SLAKE    train.json, validation.json, test.json   imgs/
             {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "..", "answer": "..",
              "q_lang": "en", "location": "..", "modality": "CT", "answer_type": "OPEN",
              "base_type": "vqa", "content_type": "Modality", "triple": [..], "qid": 0}

Both are JSON arrays. VQA-RAD as parquet is read by parquet.py. Its test questions share pictures
with its train questions, as published. SLAKE is in English and Chinese; which MedMax took is not
published, its other sources are English, and English is taken.
Read at: osf.io/89kps through huggingface.co/datasets/flaviagiammarino/vqa-rad README.md (the
counts), public loaders of the JSON (its fields); huggingface.co/datasets/BoKelvin/SLAKE files.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from data.mixture import VQA
from data.sources.row import (
    Bad,
    LeftOut,
    Place,
    Plan,
    Row,
    RowError,
    collect,
    first_file,
    joined,
    picture_path,
    text_of,
)
from data.sources.stream import json_array

VQA_RAD = "VQA_RAD Dataset Public.json"
_SLAKE = {
    "train": ("train.json",),
    "validation": ("validation.json", "validate.json"),
    "test": ("test.json",),
}


def read_vqa_rad(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """VQA-RAD of the Open Science Framework."""
    path = first_file(folder, (VQA_RAD,), plan.source)
    return collect(json_array(path), functools.partial(vqa_rad, plan))


def read_slake(folder: pathlib.Path, plan: Plan) -> Iterator[Row | Bad]:
    """SLAKE's questions in English."""
    path = first_file(folder, _SLAKE[plan.split], plan.source)
    return collect(json_array(path), functools.partial(slake, plan))


def asked(plan: Plan, place: Place, question: str, answer: str, **fields: Any) -> Row:
    """One question about one picture."""
    text = joined([(question, answer)], image="start")
    return Row(id=place.id(plan.source), text=text, task=VQA, source=plan.source, turns=1, **fields)


def vqa_rad(plan: Plan, place: Place, item: dict[str, Any]) -> Row:
    """One question of VQA-RAD."""
    kind = item.get("phrase_type")
    if not isinstance(kind, str) or kind not in ("freeform", "para", "test_freeform", "test_para"):
        raise RowError("phrase_type: unknown, so the split is not known")
    image = picture_path(item, "image_name", "VQA_RAD Image Folder")
    split = "test" if kind.startswith("test_") else "train"
    fields = dict(image=image, image_path=image, split=split, group=pathlib.Path(image).stem)
    return asked(plan, place, text_of(item, "question"), text_of(item, "answer"), **fields)


def slake(plan: Plan, place: Place, item: dict[str, Any]) -> Row:
    """One question of SLAKE."""
    if item.get("q_lang") not in ("en", "zh"):
        raise RowError("q_lang: neither en nor zh")
    if item["q_lang"] == "zh":
        raise LeftOut("a question in Chinese")
    image = picture_path(item, "img_name", "imgs")
    group = pathlib.PurePosixPath(image).parent.name
    fields = dict(image=image, image_path=image, split=plan.split, group=group)
    return asked(plan, place, text_of(item, "question"), text_of(item, "answer"), **fields)
