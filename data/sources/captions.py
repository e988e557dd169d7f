"""Read sources of images with captions: PMC-OA and Quilt-1M.

    source    file in the folder                               images
    PMC-OA    pmc_oa.jsonl, or train/valid/test.jsonl          images/, or what images.zip has:
              a folder caption_T060_filtered_top4_sep_v0_subfigures
              {"image": "PMC212319_Fig3_4.jpg", "caption": "A. Real time ..", "pmcid": ".."}
    Quilt-1M  quilt_1M_lookup.csv                              quilt_1m/
              ,caption,image_path,subset,split,pathology,roi_text,noisy_text,corrected_text,
              med_umls_ids,magnification,height,width          split: train or val

pmc_oa.jsonl has no splits and no pmcid: all is "train", the article is in the image's name.
Read at: huggingface.co/datasets/axiong/pmc_oa README.md (both forms; the folder as its users read
it); github.com/wisdomikezogwo/quilt1m README.md, whose table is described by its users (columns
and the names ID_image_UUID.jpg).
MedMax dropped statistical figures and poor captions with models and a threshold that are not
published; this module drops nothing.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, csv_rows, json_lines
from medmax_jax.data.sources.row import (
    Plan,
    RejectedRow,
    Row,
    RowError,
    caption_task,
    collect_rows,
    field_image_path,
    field_text,
    find_root,
    first_file,
)

_PMC = {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"}
_SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"
PMC_ROOTS = (f"images/{_SUBFIGURES}", _SUBFIGURES, "images")
_QUILT_SPLITS = {"train": "train", "val": "validation"}


def read_pmc_oa(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read PMC-OA: one pair per line."""
    path = first_file(folder, ("pmc_oa.jsonl", _PMC[plan.split]), plan.source)
    split = "train" if path.name == "pmc_oa.jsonl" else plan.split
    root = find_root(folder, PMC_ROOTS)
    return collect_rows(json_lines(path), functools.partial(_pmc_oa, plan, split, root))


def read_quilt(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Read Quilt-1M: one pair per line of the table; an image may have several captions."""
    path = first_file(folder, ("quilt_1M_lookup.csv",), plan.source)
    rows = csv_rows(path, ("caption", "image_path", "split"))
    return collect_rows(rows, functools.partial(_quilt, plan))


def _pmc_oa(plan: Plan, split: str, root: str, place: RowLocation, item: dict[str, Any]) -> Row:
    image = field_image_path(item, "image", root)
    name = pathlib.PurePosixPath(image).name
    article = field_text(item, "pmcid") if item.get("pmcid") else name.split("_")[0]
    caption = field_text(item, "caption")
    return caption_task(
        plan, place, caption, question=None, image=image, split=split, group=article
    )


def _quilt(plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    if item["split"] not in _QUILT_SPLITS:
        raise RowError("split: expected train or val")
    image = field_image_path(item, "image_path", "quilt_1m")
    name = pathlib.PurePosixPath(image).name
    video = re.split(r"_(?:image|roi)_", name)[0]
    caption = field_text(item, "caption")
    split = _QUILT_SPLITS[item["split"]]
    return caption_task(plan, place, caption, question=None, image=image, split=split, group=video)
