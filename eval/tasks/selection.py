"""Selects items of the embedded sample or of JSONL files by the settings' counts."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from medmax_jax.data.sample.documents import eval_items
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.records import Item
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.generation.model_bundle import MAX_PIXELS
from medmax_jax.io import text_files
from medmax_jax.models import image_headers, images
from medmax_jax.storage import hub, image_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Describes part `index` of `count`: every count-th item."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> "Shard":
        """Parse "i/n"; "" is the complete set."""
        if not text:
            return WHOLE
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise EvalError(f"--shard is {text!r}; write i/n with i from 0 to n - 1, like 0/4")
        return cls(index=int(match[1]), count=int(match[2]))

    def file(self, out: Path) -> Path:
        """Return the file of this part's records."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}.shard_{self.index}_of_{self.count}.jsonl")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(index=0, count=1)

SAMPLE = Path(__file__).parents[2] / "data" / "sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
    """Holds the items, the training items of the blind baseline, and training images with modality.

    A training image is (path, modality).
    """

    items: list[Item]
    train: list[Item]
    training_images: list[tuple[str, str]]
    folder: Path


def load_eval_set(settings: Settings) -> EvalSet:
    """Load the embedded sample's items, or those of JSONL files in the MedMax schema."""
    if settings.questions == ("sample",):
        return load_sample(settings)
    if not settings.questions or "sample" in settings.questions:
        raise EvalError(
            f"config.questions is {','.join(settings.questions)!r}; set it to JSONL files, or to "
            "sample alone"
        )
    files = [Path(hub.locate(path)) for path in settings.questions]
    rows = [row for path in files for row in read_rows(path)]
    items = task_items.from_rows([row for _, row in rows], places=[place for place, _ in rows])
    folder = Path(hub.locate(settings.images)) if settings.images else files[0].parent
    return EvalSet(items=_chosen(items, settings), train=[], training_images=[], folder=folder)


def load_sample(settings: Settings) -> EvalSet:
    """Load the embedded sample's items, with its training half."""
    manifest = read_manifest(SAMPLE / "manifest.jsonl")
    eval_rows, train = (
        task_items.from_rows(eval_items(manifest, settings.seed, split=split), manifest)
        for split in (settings.split, "train")
    )
    return EvalSet(
        items=_chosen(eval_rows, settings),
        train=train,
        training_images=[
            (row["file"], row["modality"]) for row in manifest if row["split"] == "train"
        ],
        folder=Path(hub.locate(settings.images)) if settings.images else SAMPLE,
    )


def check_images(eval_set: EvalSet) -> None:
    """Raise, before any request is made, where an image that is shown or compared is unusable.

    That is an image with a path that leaves the folder or that is missing. Images of credentialed
    items are opened too: a later error would name the file.
    """
    labels: dict[str, str] = {}  # image -> its name in messages, "" for its path
    for number, item in enumerate(eval_set.items, start=1):
        label = f"the image of item number {number}" if task_items.is_credentialed(item) else ""
        for image in item.images:
            labels[image] = labels.get(image) or label
    files = {i: image_paths.resolve(eval_set.folder, i, label=label) for i, label in labels.items()}
    missing = [labels[image] or image for image, file in files.items() if not file.is_file()]
    if missing:
        raise EvalError(
            f"{len(missing)} of {len(labels)} images are missing under {eval_set.folder} (first: "
            f"{missing[0]}); set --config.images to their folder"
        )
    for image, label in labels.items():
        if label:
            _check_readable(files[image], label)


def _check_readable(file: Path, label: str) -> None:
    try:
        images.load(file, max_pixels=MAX_PIXELS, name=label)
    except image_headers.ImageError:
        raise EvalError(
            f"{label} cannot be read as an image of at most {MAX_PIXELS:,} pixels; replace the "
            "file, or leave the item out"
        ) from None  # Pillow may repeat the content of the file


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (place, row) of each row of a JSONL file; place is like "items.jsonl line 3"."""
    try:
        rows = text_files.read_objects(path)
    except text_files.TextFileError as error:
        raise EvalError(
            f"config.questions is {str(path)!r}: {error}; name a JSONL file, or sample"
        ) from error
    return [(place.replace(str(path), path.name, 1), row) for place, row in rows]


def _chosen(items: list[Item], settings: Settings) -> list[Item]:
    counts = dataclasses.asdict(settings.counts)
    return [
        item
        for family, count in counts.items()
        for item in task_items.sample_items(
            [item for item in items if item.family == family], count, seed=settings.seed
        )
    ]
