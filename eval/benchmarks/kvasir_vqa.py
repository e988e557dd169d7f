"""Reads Kvasir-VQA-x1: open questions about endoscopic images of the digestive tract.

    data/test-*.parquet, or Kvasir-VQA-x1-test.jsonl   img_id, complexity (1 to 3), question,
                       answer, original (the atomic questions), question_class (list of texts)
    images/            clb0kvxvm90y4074yf50vf5nq.jpg .., as README.md of the repository saves them

The transformed track is config.perturbation=kvasir, which applies to any card. The repository has
no evaluation code ("will be released soon"), so there is no scorer to compare with. Read at:
github.com/simula/Kvasir-VQA-x1 at 67903e52, README.md (fields, script of the images, license).
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, json_lines, parquet_rows
from medmax_jax.data.sources.row import (
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import Item, TaskSpec, item_row

NAME = "kvasir_vqa_x1"
JSONL = "Kvasir-VQA-x1-test.jsonl"
COLUMNS = ("img_id", "complexity", "question", "answer", "question_class")


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the items of the test split."""
    if (folder / JSONL).is_file():
        rows = json_lines(folder / JSONL)
    else:
        paths = fields.split_files(folder, "test", "Kvasir-VQA-x1")
        rows = parquet_rows(paths, COLUMNS, "test.parquet", batch=1_024)
    yield from collect_rows(rows, functools.partial(_item, folder))


def _item(folder: pathlib.Path, place: RowLocation, row: dict[str, Any]) -> Item:
    complexity, classes = row.get("complexity"), row.get("question_class")
    if isinstance(complexity, bool) or complexity not in (1, 2, 3):
        raise RowError("complexity: not 1, 2 or 3")
    classes = [classes] if isinstance(classes, str) else classes
    if not isinstance(classes, list) or not all(isinstance(c, str) and c for c in classes):
        raise RowError("question_class: not a list of texts")
    image_id = field_text(row, "img_id")
    image = field_image_path({"img_id": f"{image_id}.jpg"}, "img_id", "images")
    fields.check_present(folder, image, "the images of SimulaMet-HOST/Kvasir-VQA")
    return item_row(
        NAME,
        place,
        "open",
        prompt=field_text(row, "question"),
        answer=field_text(row, "answer"),
        image_path=image,
        group=image_id,
        slices={"complexity": complexity, "question_class": classes},
    )


CARDS = (
    TaskSpec(
        task=f"{NAME}_open",
        title="Kvasir-VQA-x1",
        family="vqa_open",
        source="huggingface.co/datasets/SimulaMet/Kvasir-VQA-x1; images of "
        "huggingface.co/datasets/SimulaMet-HOST/Kvasir-VQA, raw",
        licence="CC BY-NC 4.0",
        metric="judge_correct",
        counted="159,549 with the training split: README.md of github.com/simula/Kvasir-VQA-x1",
        differs="Kvasir-VQA-x1: text metrics and a judge by class and complexity, whose code is "
        "not published. Its transformed track draws the perturbations with torch's generator in "
        "four processes that the script does not seed; config.perturbation=kvasir has the same "
        "operations, drawn by the item's id",
        own_scorer="none: the repository at 67903e52 has no evaluation code",
    ),
)
