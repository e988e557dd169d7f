"""Compares generated images with the reference image of their item: PSNR and SSIM.

    records of image_editing and multimodal_generation -> reference_scores.jsonl
    {"id": .., "psnr": 23.1, "ssim": 0.71}   of the first image, as MedGEN-Bench compares one
    {"id": ..}                               an answer without an image: both are 0
    {"id": .., "problem": ".."}              an image that cannot be read: unscored

This needs no weights, so it is part of every evaluation that has such records.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import full_reference, per_record
from medmax_jax.eval.records import EvalRecord, is_credentialed
from medmax_jax.io import journal
from medmax_jax.io.progress import report_waiting
from medmax_jax.models import image_headers, images
from medmax_jax.storage import image_paths


def score_references(
    records: Sequence[EvalRecord],
    workdir: Path,
    *,
    images_folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Write reference_scores.jsonl, unless no record has a reference image."""
    compared = [r for r in records if r.reference_image and not r.error]
    if not compared:
        return
    with report_waiting("comparing images with their references", progress):
        lines = [_line(record, workdir, images_folder) for record in compared]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    journal.write_text(workdir / per_record.REFERENCE_SCORES, text)


def _line(record: EvalRecord, workdir: Path, images_folder: Path) -> Mapping[str, Any]:
    line: dict[str, Any] = dict(id=record.id)
    if not record.generated:
        return line
    label = "an image of a credentialed item" if is_credentialed(record) else ""
    try:
        generated, reference = (
            images.load(
                image_paths.resolve(folder, name, label=label),
                max_pixels=images.MAX_PIXELS,
                name=label,
            )
            for folder, name in (
                (workdir, record.generated[0]),
                (images_folder, record.reference_image),
            )
        )
        return line | full_reference.scores(generated, reference)
    except (image_headers.ImageError, ValueError) as error:
        return line | dict(problem=label or str(error))
