"""What is asked: items of the embedded sample or of JSONL files, chosen by the settings' counts."""

import dataclasses
from pathlib import Path
from typing import Any

from data.sample.documents import eval_items
from data.sample.manifest import read_manifest
from eval import loop, tasks
from eval.settings import Settings
from medmax_jax import images
from medmax_jax.generator import MAX_PIXELS
from medmax_jax.io import image_paths, text_files

SAMPLE = Path(__file__).parent.parent / "data" / "sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Items, training items for the blind baseline, training pictures as (path, modality)."""

    items: list[tasks.Item]
    train: list[tasks.Item]
    pictures: list[tuple[str, str]]
    folder: Path


def suite(settings: Settings) -> Suite:
    """The embedded sample's items, or those of JSONL files in the released schema."""
    if settings.questions == ("sample",):
        return sample(settings)
    if not settings.questions or "sample" in settings.questions:
        raise loop.EvalError(
            f"config.questions is {','.join(settings.questions)!r}; name JSONL files, or sample "
            "alone"
        )
    rows = [row for path in settings.questions for row in read_rows(Path(path))]
    items = tasks.from_rows([row for _, row in rows], places=[place for place, _ in rows])
    folder = Path(settings.images or Path(settings.questions[0]).parent)
    return Suite(items=_chosen(items, settings), train=[], pictures=[], folder=folder)


def sample(settings: Settings) -> Suite:
    """The embedded sample's, with its training half."""
    manifest = read_manifest(SAMPLE / "manifest.jsonl")
    held, train = (
        tasks.from_rows(eval_items(manifest, settings.seed, split=split), manifest)
        for split in (settings.split, "train")
    )
    return Suite(
        items=_chosen(held, settings),
        train=train,
        pictures=[(row["file"], row["modality"]) for row in manifest if row["split"] == "train"],
        folder=Path(settings.images or SAMPLE),
    )


def check_images(found: Suite) -> None:
    """Raise, before anything is asked, where an image that is shown or compared cannot be used.

    That is an image whose path leads out of the folder or that is missing. Images of credentialed
    items are opened too: an error later on would name the file.
    """
    wanted: dict[str, str] = {}  # image -> what messages call it, "" for its path
    for number, item in enumerate(found.items, start=1):
        label = f"the image of item number {number}" if tasks.is_credentialed(item) else ""
        for image in item.images:
            wanted[image] = wanted.get(image) or label
    files = {i: image_paths.resolve(found.folder, i, label=label) for i, label in wanted.items()}
    lost = [wanted[image] or image for image, file in files.items() if not file.is_file()]
    if lost:
        raise loop.EvalError(
            f"{len(lost)} of {len(wanted)} pictures are not under {found.folder}, the first is "
            f"{lost[0]}; name their folder with --config.images"
        )
    for image, label in wanted.items():
        if label:
            _check_readable(files[image], label)


def _check_readable(file: Path, label: str) -> None:
    try:
        images.load(file, max_pixels=MAX_PIXELS, name=label)
    except images.ImageError:
        raise loop.EvalError(
            f"{label} cannot be read as an image of at most {MAX_PIXELS:,} pixels; replace the "
            "file, or leave the item out"
        ) from None  # Pillow may repeat what it found in the file


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, row) of each row of a JSONL file; place is like "items.jsonl line 3"."""
    try:
        rows = text_files.read_objects(path)
    except text_files.TextFileError as error:
        raise loop.EvalError(
            f"config.questions is {str(path)!r}: {error}; name a JSONL file, or sample"
        ) from error
    return [(place.replace(str(path), path.name, 1), row) for place, row in rows]


def _chosen(items: list[tasks.Item], settings: Settings) -> list[tasks.Item]:
    counts = dataclasses.asdict(settings.counts)
    return [
        item
        for family, count in counts.items()
        for item in tasks.choose(
            [item for item in items if item.family == family], count, seed=settings.seed
        )
    ]
