"""Exclude the images of evaluation sets: no pseudo document may show one.

    by codes    an evaluation image has the same codes
    by bytes    its file has the same bytes
    by look     the perceptual hashes of the decoded codes differ in at most 15 of 256 bits

The comparisons are those of `data.prepare check` (data/analysis). An image of the records that
matches in any of its views or crops is excluded as a whole. What is written is read again, and each
of its images must be one that was compared and did not match.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

from medmax_jax.data.analysis import eval_set, near_duplicates
from medmax_jax.data.analysis.eval_set import EvalItem
from medmax_jax.data.analysis.near_duplicates import code_hash
from medmax_jax.data.analysis.scan import images_of
from medmax_jax.data.annotation.questions import ImageFacts
from medmax_jax.data.image_tokens.encoder import LOG_SECONDS, Encoder, PrepareError
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.io.progress import ItemProgress

SAMPLE = Path(__file__).parents[1] / "sample"
SPLIT = "test"  # of the embedded sample, which is compared unless evaluation sets are given
REASONS = ("codes", "bytes", "look")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvalImages:
    """Hashes of the images of all evaluation sets."""

    codes: frozenset[str]
    files: frozenset[str]
    looks: UInt32[np.ndarray, "k 8"]
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """What may be annotated. `excluded`: image -> reason; `compared`: codes that did not match."""

    excluded: dict[int, str]
    compared: frozenset[str]
    evaluation: EvalImages

    def counts(self) -> dict[str, int]:
        """Return the numbers of the report."""
        by_reason = Counter(self.excluded.values())
        return dict(evaluation_images=self.evaluation.count) | {
            f"same_{reason}": by_reason[reason] for reason in REASONS
        }


def read_evaluation(against: Sequence[Path], folder: Path | None, encoder: Encoder) -> EvalImages:
    """Read the images of evaluation sets: folders of records, or items.jsonl with its images.

    `folder`: of the images of an items.jsonl; None: the folder it is in. Without `against`, the
    test split of the embedded sample is read. Raises PrepareError where an image cannot be
    compared, since it could be among those that are annotated.
    """
    if not encoder.vq.has_decoder:
        raise PrepareError(
            "the VQGAN has no decoder, so images cannot be compared with evaluation sets; convert "
            "the model again with --vqgan=vqgan.ckpt"
        )
    sets = [_read_set(path, folder, encoder) for path in against] or [_sample_items()]
    codes, files, looks, count = set(), set(), [], 0
    for name, items, images in sets:
        items, hashes, _, unread = eval_set.with_image_hashes(items, images, encoder)
        paths = {item.path for item in items if item.path}
        if unread or not paths:
            what = f"{unread} images cannot be read" if unread else "it has no image"
            raise PrepareError(
                f"--against {name}: {what}; set --eval_images to the folder of its images"
            )
        codes |= {code_hash(np.asarray(c)) for item in items for c in item.codes}
        files |= {item.sha for item in items if item.sha}
        looks.append(hashes)
        count += len(paths)
    return EvalImages(
        codes=frozenset(codes), files=frozenset(files), looks=np.concatenate(looks), count=count
    )


def _read_set(
    path: Path, folder: Path | None, encoder: Encoder
) -> tuple[str, list[EvalItem], Path | None]:
    items = eval_set.read(path, encoder.tokenizer)
    if not path.is_dir():
        return str(path), items, folder or path.parent
    if open_records(path).layout.vqgan != encoder.layout.vqgan:
        raise PrepareError(
            f"--against {path}: its images were encoded with another VQGAN than these records, so "
            "their codes cannot be compared; pass its items.jsonl with --eval_images"
        )
    return str(path), items, None


def _sample_items() -> tuple[str, list[EvalItem], Path]:
    rows = [r for r in read_manifest(SAMPLE / "manifest.jsonl") if r["split"] == SPLIT]
    items = [EvalItem(name=row["id"], words=(), path=row["file"], codes=(), sha="") for row in rows]
    return "the embedded test split", items, SAMPLE


def compare(
    images: Sequence[ImageFacts],
    evaluation: EvalImages,
    encoder: Encoder,
    progress: Callable[[str], None],
) -> Gate:
    """Compare each variant of each image with the evaluation images."""
    flat = [(n, name) for n, image in enumerate(images) for name in image.variants]
    codes = (images[n].variants[name] for n, name in flat)
    clock = ItemProgress(len(flat), "images", progress, every=LOG_SECONDS)
    owners, looks, reasons = [], [], {}
    decoded = near_duplicates.hash_codes(encoder, codes)
    for (n, name), look in zip(flat, decoded, strict=True):
        if name in evaluation.codes:
            reasons.setdefault(n, "codes")
        if images[n].image_sha256 in evaluation.files:
            reasons.setdefault(n, "bytes")
        if look is not None:
            owners.append(n)
            looks.append(look)
        clock.tick("compared with the evaluation sets", 1)
    table = np.array(looks, np.uint32).reshape(-1, near_duplicates.HASH_WORDS)
    for i, _, _ in near_duplicates.near_duplicate_pairs(
        table, evaluation.looks, near_duplicates.NEAR_DUPLICATE_BITS
    ):
        for position in i.tolist():
            reasons.setdefault(owners[position], "look")
    compared = frozenset(name for n, name in flat if n not in reasons)
    return Gate(excluded=reasons, compared=compared, evaluation=evaluation)


def assert_none(records: Records, gate: Gate) -> int:
    """Return the number of pseudo documents; raise PrepareError if one has an excluded image."""
    numbers = np.flatnonzero(records.index["pseudo"])
    for number in numbers.tolist():
        document = records[number]
        names = {code_hash(codes) for codes in images_of(document, records)}
        if not names <= gate.compared or document.image_sha256 in gate.evaluation.files:
            raise PrepareError(
                f"{records.folder}: pseudo document {number} shows an image of an evaluation set; "
                "delete the folder and report this as a bug"
            )
    return len(numbers)
