"""Reads MedGEN-Bench: questions, edits and generations from medical images and an instruction.

    VQA/multiple-choice/data.jsonl, ImageEditing/style-transfer/data.jsonl,
    MultimodalGeneration/../data.jsonl    one row per line: sample_id, instruction, input_image
                                          (list), ground_truth_image (list or path), answer (text
                                          or object), paper_task, category, sub-category, modality
    images                                relative to the folder of each data.jsonl

A question shows all of its images; the published runs show them as one sheet. PSNR and SSIM are
those of its code (eval/metrics/full_reference.py). LPIPS, RAD-DINO similarity, RadGraph F1,
BERTScore and BLEU are not computed here. Read at: github.com/yangjj007/MedGEN-Bench-eval at
3450b8ef, README.md, prepare_medgen_tableiv.py (files, fields), util/metrics.py (scoring), eval.py.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, SourceError, json_lines
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, item_row

NAME = "medgen_bench"
FORMATS = {"VQA": "open", "ImageEditing": "editing", "MultimodalGeneration": "generation"}


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of all tasks that the folder has."""
    paths = [path for name in FORMATS for path in sorted((folder / name).glob("*/data.jsonl"))]
    if not paths:
        raise SourceError("MedGEN-Bench: none of VQA/*/data.jsonl and others; check --from")
    for path in paths:
        make = functools.partial(_item, folder, path.parent.relative_to(folder))
        name = f"{path.parent.parent.name}-{path.parent.name}.jsonl"
        rows = ((RowLocation(name, place.number), row) for place, row in json_lines(path))
        yield from collect_rows(rows, make)


def _item(
    folder: pathlib.Path, task: pathlib.Path, place: RowLocation, row: dict[str, Any]
) -> Item:
    kind = FORMATS[task.parts[0]]
    shown = _images(folder, task, row, "input_image")
    expected = _images(folder, task, row, "ground_truth_image")
    if not shown:
        raise RowError("input_image: empty")
    if len(expected) != (kind != "open"):
        raise RowError("ground_truth_image: not one image of an edit or a generation")
    reference = dict(reference_image=expected[0]) if expected else {}
    return item_row(
        NAME,
        place,
        kind,
        prompt=field_text(row, "instruction"),
        answer=_answer(row, kind),
        image_path=shown,
        group=shown[0],
        slices={
            "task": task.parts[1],
            "category": row.get("category"),
            "sub_category": row.get("sub-category"),
            "modality": row.get("modality"),
        },
        **reference,
    )


def _images(folder: pathlib.Path, task: pathlib.Path, row: dict[str, Any], field: str) -> list[str]:
    values = row.get(field) or []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list):
        raise RowError(f"{field}: not a list of paths")
    paths = [field_image_path({field: value}, field, str(task)) for value in values]
    for path in paths:
        fields.check_present(folder, path, "the complete data set")
    return paths


def _answer(row: dict[str, Any], kind: str) -> str:
    """Return the reference text; an object, of structured findings, as JSON; "" of an edit."""
    answer = row.get("answer")
    if isinstance(answer, dict):
        return json.dumps(answer, ensure_ascii=False, sort_keys=True)
    return field_text(row, "answer") if kind != "editing" or answer else ""


CODE = "util/metrics.py of github.com/yangjj007/MedGEN-Bench-eval at 3450b8ef"


def _card(kind: str, title: str, family: str, metric: str, counts: int, **changes) -> TaskSpec:
    return TaskSpec(
        task=f"{NAME}_{kind}",
        title=f"MedGEN-Bench, {title}",
        family=family,
        source="huggingface.co/datasets/Jack04810/MedGEN-Bench",
        split="all",
        licence="not stated",
        metric=metric,
        counts=counts,
        counted="README.md of github.com/yangjj007/MedGEN-Bench-eval at 3450b8ef",
        **changes,
    )


NOT_RUN = "LPIPS, RAD-DINO similarity, RadGraph F1, BERTScore, BLEU and its judge are not run here"
IMAGES_AGREE = f"{CODE}, PSNR and SSIM: agrees on 1,000 of 1,000 pairs of images"
CARDS = (
    _card(
        *("open", "questions", "vqa_open", "judge_correct", 1_100),
        differs=f"MedGEN-Bench: several images of a question as one sheet; {NOT_RUN}",
        own_scorer="none: the metrics of its texts are not run here",
    ),
    _card(
        *("editing", "image editing", "image_editing", "psnr", 3_872),
        differs=f"MedGEN-Bench: {NOT_RUN}",
        own_scorer=IMAGES_AGREE,
    ),
    _card(
        *("generation", "text and image", "multimodal_generation", "psnr", 1_651),
        differs=f"MedGEN-Bench: {NOT_RUN}",
        own_scorer=IMAGES_AGREE,
    ),
)
