"""What is asked: items of the embedded sample or of JSONL files, chosen by the settings' counts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data.sample.documents import eval_items
from data.sample.manifest import read_manifest
from eval import loop, tasks
from eval.settings import Settings

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
    folder = Path(settings.images or Path(settings.questions[0]).parent)
    return Suite(
        items=_chosen(tasks.from_rows(rows), settings), train=[], pictures=[], folder=folder
    )


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
    """Raises, before anything is asked, if a picture that is shown or compared is missing."""
    wanted = dict.fromkeys(item.image for item in found.items if item.image)
    lost = [image for image in wanted if not (found.folder / image).is_file()]
    if lost:
        raise loop.EvalError(
            f"{len(lost)} of {len(wanted)} pictures are not under {found.folder}, the first is "
            f"{lost[0]}; name their folder with --config.images"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise loop.EvalError(
            f"config.questions is {str(path)!r}: {error}; name a JSONL file, or sample"
        ) from error


def _chosen(items: list[tasks.Item], settings: Settings) -> list[tasks.Item]:
    counts = dataclasses.asdict(settings.counts)
    return [
        item
        for family, count in counts.items()
        for item in tasks.choose(
            [item for item in items if item.family == family], count, seed=settings.seed
        )
    ]
