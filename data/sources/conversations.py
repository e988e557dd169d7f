"""Read sources in LLaVA's format: two of LLaVA-Med, two of PubMedVision, Quilt-Instruct.

    source                  file in the folder (one JSON array)                   images
    LLaVA-Med-PMC           llava_med_alignment_500k.json                         images/
    LLaVA-Med-IT            llava_med_instruct_60k_inline_mention.json, or 60k    images/
    PubMedVision-Alignment  PubMedVision_Alignment_VQA.json                       paths in the file
    PubMedVision-IT         PubMedVision_InstructionTuning_VQA.json               paths in the file
    Quilt-Instruct          quilt_instruct_107k.json                              quilt_instruct/

    {"id": "..", "image": "a.jpg" or ["images/a.jpg", ..],
     "conversations": [{"from": "human", "value": "<image>\\n.."}, {"from": "gpt", "value": ".."}]}

Some files of LLaVA-Med misspell the key as "conversatons". None has splits: all is "train".
Read at: github.com/microsoft/LLaVA-Med README.md, llava/data/download_images.py (an image is named
pair_id.jpg), llava/instruct/instruct_postprocess.py (<image> before or after the first question);
huggingface.co/datasets/FreedomIntelligence/PubMedVision README.md, and mtybilly/
PubMedVision-Alignment-VQA README.md (several images per row); github.com/aldraus/quilt-llava
docs/Data.md. Whether MedMax took its 37K captions of LLaVA-Med from the alignment file is not
published.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from medmax_jax.data.mixture import CHAT
from medmax_jax.data.records.row_streams import RowLocation, json_array
from medmax_jax.data.sources.row import (
    ExcludedRow,
    Plan,
    RejectedRow,
    Row,
    RowError,
    caption_task,
    clean,
    collect_rows,
    field_image_path,
    first_file,
    join_turns,
)
from medmax_jax.models.tokenizer import IMAGE_NAME


@dataclasses.dataclass(frozen=True)
class Layout:
    """One source: its file, its image folder, and which part of an image's name is its origin."""

    files: tuple[str, ...]
    root: str
    origin: str
    chat: bool


_ARTICLE, _VIDEO, _PMC = r"([^_]+)_", r"(.+?)_(?:image|roi)_", r"(pmc_\d+)_"
_IT = (
    "llava_med_instruct_60k_inline_mention.json",
    "llava_med_instruct_60k.json",
    "llava_med_instruct_10k.json",
)
LAYOUTS = {
    "LLaVA-Med-PMC": Layout(("llava_med_alignment_500k.json",), "images", _ARTICLE, False),
    "LLaVA-Med-IT": Layout(_IT, "images", _ARTICLE, True),
    "PubMedVision-Alignment": Layout(("PubMedVision_Alignment_VQA.json",), "", _PMC, False),
    "PubMedVision-IT": Layout(("PubMedVision_InstructionTuning_VQA.json",), "", _PMC, True),
    "Quilt-Instruct": Layout(("quilt_instruct_107k.json",), "quilt_instruct", _VIDEO, True),
}


def read(folder: pathlib.Path, plan: Plan) -> Iterator[Row | RejectedRow]:
    """Yield rows of one of LAYOUTS; captions become captioning or generation, talks Visual Chat."""
    layout = LAYOUTS[plan.source]
    path = first_file(folder, layout.files, plan.source)
    return collect_rows(json_array(path), functools.partial(_row, layout, plan))


def _row(layout: Layout, plan: Plan, place: RowLocation, item: dict[str, Any]) -> Row:
    image = _image_path(item, layout.root)
    name = pathlib.PurePosixPath(image).name
    origin = re.match(layout.origin, name)
    group = origin.group(1) if origin else name
    turns, image_at = _turns(item)
    if layout.chat:
        return Row(
            id=place.id(plan.source),
            text=join_turns(turns, image=image_at),
            image=image,
            image_path=image,
            task=CHAT,
            source=plan.source,
            split="train",
            group=group,
            turns=len(turns),
        )
    (question, caption), *further = turns
    if further:
        raise ExcludedRow("a caption of several turns")
    return caption_task(
        plan, place, caption, question=question, image=image, split="train", group=group
    )


def _image_path(item: dict[str, Any], root: str) -> str:
    paths = item.get("image")
    if isinstance(paths, list):
        if len(paths) > 1:
            raise ExcludedRow("several images; a document of MedMax has one")
        item = {"image": paths[0] if paths else None}
    return field_image_path(item, "image", root)


def _turns(item: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Return questions with answers, and at which end of the first question the image is placed."""
    messages = item.get("conversations", item.get("conversatons"))
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise RowError("conversations: expected a list of questions with answers")
    parts, image_at = [], "start"
    for n, message in enumerate(messages):
        speaker = message.get("from") if isinstance(message, dict) else None
        if speaker != ("human", "gpt")[n % 2] or not isinstance(message.get("value"), str):
            raise RowError("conversations: expected human and gpt in turn")
        value = message["value"].strip()
        if n == 0 and value.endswith(IMAGE_NAME):
            image_at, value = "end", value[: -len(IMAGE_NAME)]
        elif n == 0:
            value = value.removeprefix(IMAGE_NAME)
        parts.append(clean(value, "conversations"))
    return list(zip(parts[::2], parts[1::2], strict=True)), image_at
