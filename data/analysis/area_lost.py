"""Measure which share of the images of records their views do not show (models/images.py).

    source   images  prompts  answers  largest     prompts, answers: the mean over the images that
    X-ray        19    0.233    0.233    0.423     occur there, largest: of a single image

Only the headers of the files are read, except of DICOM files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.data.image_tokens.encoder import LOG_SECONDS, log, open_image
from medmax_jax.data.records.reader import Records
from medmax_jax.data.records.writer import has_credentialed
from medmax_jax.io.progress import ItemProgress
from medmax_jax.models import image_headers, images
from medmax_jax.storage import image_paths

Lost = dict[str, float]  # prompts, answers -> share, of one image where it occurs


def area_lost(records: Records, folder: Path, modality_of: Mapping[str, str]) -> dict[str, Any]:
    """Return the tables by source and, where `modality_of` has the path of an image, by modality.

    `folder`: of the image files. An image of several sources is in the row of each. Files that
    cannot be read are counted, and are in no row.
    """
    image_of = np.asarray(records.index["image_path"])
    source_of, names = np.asarray(records.index["source"]), records.names("source")
    paths, lost = _measure(records, folder)
    pairs = np.unique(np.stack([source_of, image_of], axis=1), axis=0).tolist()
    sources = [(names[source], lost[image]) for source, image in pairs if image in lost]
    modalities = [
        (modality_of[paths[image]], found)
        for image, found in lost.items()
        if paths[image] in modality_of
    ]
    every = [("all", found) for found in lost.values()]
    tables = {
        f"area_lost_by_{kind}": _rows(sorted(rows, key=lambda row: row[0])) | _rows(every)
        for kind, rows in (("source", sources), ("modality", modalities))
        if rows
    }
    return tables | dict(unreadable_images=len(paths) - len(lost))


def _measure(records: Records, folder: Path) -> tuple[dict[int, str], dict[int, Lost]]:
    """Return the path of each image by its number, and what is lost of those that can be read."""
    index = {n: np.asarray(records.index[n]) for n in ("image", "answers_image", "image_path")}
    layout, image_of = records.layout, index["image_path"]
    in_prompts, in_answers = index["image"] > index["answers_image"], index["answers_image"] > 0
    shown = {
        "prompts": (set(image_of[in_prompts].tolist()), layout.view),
        "answers": (set(image_of[in_answers].tolist()), layout.answer_view),
    }
    secret, paths, lost = has_credentialed(records), {}, {}
    measured = set().union(*(of_place for of_place, _ in shown.values()))
    numbers, first = np.unique(image_of, return_index=True)
    progress = ItemProgress(len(numbers), "images", log.info, every=LOG_SECONDS)
    for image, document in zip(numbers.tolist(), first.tolist(), strict=True):
        progress.tick("measured", 1)
        if image not in measured:  # -1: documents without an image
            continue
        paths[image] = records[document].image_path
        label = f"the image of document {document}" if secret else ""
        if (size := _size(folder, paths[image], label)) is not None:
            lost[image] = {
                name: images.area_lost(*size, view)
                for name, (of_place, view) in shown.items()
                if image in of_place
            }
    return paths, lost


def _rows(named: Iterable[tuple[str, Lost]]) -> dict[str, dict[str, Any]]:
    """Return the row of each name, in the order of the names."""
    by_name: dict[str, list[Lost]] = {}
    for name, found in named:
        by_name.setdefault(name, []).append(found)
    rows = {}
    for name, lost in by_name.items():
        rows[name] = {"images": len(lost)}
        for place in ("prompts", "answers"):
            shares = [found[place] for found in lost if place in found]
            rows[name][place] = round(float(np.mean(shares)), 3) if shares else None
        rows[name]["largest"] = round(max(max(found.values()) for found in lost), 3)
    return rows


def _size(folder: Path, path: str, label: str) -> tuple[int, int] | None:
    """Return width and height; None, which is logged, where the file cannot be read."""
    file = image_paths.resolve(folder, path, label=label)
    name = label or path
    try:
        if file.suffix.lower() == ".dcm":
            return open_image(file, name=name, burned_in=True, secret=bool(label)).size
        with images.open_image(file, max_pixels=images.MAX_PIXELS, name=name) as image:
            return image.size
    except image_headers.ImageError as error:
        log.warning("not measured: %s", label or error)
        return None
