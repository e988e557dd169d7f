"""Read the manifest of the sample: one row per image, with every field checked.

{"id": "ct-head_00", "file": "images/ct-head_00.jpg", "modality": "CT", "body_part": "head",
 "stain": null, ..., "facts": {"modality": "hdr", "body_part": "hdr"}, "split": "train"}
"""

import hashlib
from pathlib import Path

from medmax_jax.io.text_files import read_objects
from medmax_jax.storage import image_paths

FACTS = (
    "modality",
    "body_part",
    "organ",
    "plane",
    "view",
    "sequence",
    "contrast",
    "stain",
    "sex",
    "age",
    "age_group",
    "species",
    "finding",
    "lesion",
    "side",
    "count",
)
SOURCES = (
    "hdr",
    "label",
    "mask",
    "doc",
)  # header, file name or caption, label volume, documentation
SPLITS = ("train", "validation", "test")
TEXTS = ("id", "file", "source_package", "source_path", "sha256", "licence", "group", "split")
NUMBERS = ("frame", "width", "height")


def read_manifest(path: str | Path, check_files: bool = False) -> list[dict]:
    """Return the rows of a manifest; `check_files` also compares every image with its sha256."""
    path = Path(path)
    rows, seen = [], set()
    for number, (_, row) in enumerate(read_objects(path), start=1):
        check_row(row, f"{path.name} row {number}")
        if row["id"] in seen:
            raise ValueError(
                f"{path.name} row {number}: id: {row['id']!r} occurs twice; rename one of them"
            )
        seen.add(row["id"])
        if check_files:
            check_image(row, path.parent)
        rows.append(row)
    check_groups(rows)
    return rows


def check_row(row: dict, where: str) -> None:
    """Raise unless every field exists, has its type, and every fact names an allowed source."""
    expected = {*TEXTS, *NUMBERS, *FACTS, "facts"}
    if set(row) != expected:
        raise ValueError(
            f"{where}: missing fields {sorted(expected - set(row))}, unknown fields "
            f"{sorted(set(row) - expected)}; build the manifest again with data.sample.build"
        )
    for field in (*TEXTS, *NUMBERS):
        kind = str if field in TEXTS else int
        if type(row[field]) is not kind or row[field] == "":
            raise ValueError(f"{where}: {field}: {row[field]!r} must be a {kind.__name__}")
    if row["split"] not in SPLITS:
        raise ValueError(f"{where}: split: {row['split']!r} must be one of {SPLITS}")
    with_value = {field for field in FACTS if row[field] is not None}
    if with_value != set(row["facts"]):
        raise ValueError(
            f"{where}: facts: {sorted(with_value ^ set(row['facts']))} must have both a value and "
            "a source"
        )
    for field, source in row["facts"].items():
        if source not in SOURCES:
            raise ValueError(f"{where}: facts.{field}: {source!r} must be one of {SOURCES}")
    if row["modality"] is None:
        raise ValueError(
            f"{where}: modality: null; every image must have a modality, remove the row"
        )


def check_image(row: dict, folder: Path) -> None:
    """Raise unless the image's file is below `folder` and has the sha256 of its row."""
    try:
        path = image_paths.resolve(folder, row["file"])
    except image_paths.ImagePathError:
        path = folder  # no file
    if not path.is_file():
        raise FileNotFoundError(f"{row['id']}: file: {row['file']!r} is not a file in {folder}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != row["sha256"]:
        raise ValueError(
            f"{row['id']}: sha256: the file has {digest}, not the SHA-256 of the manifest; restore "
            f"{row['file']!r}"
        )


def check_groups(rows: list[dict]) -> None:
    """Raise if a group (patient, volume, slide or animal) is in two splits."""
    split: dict[str, str] = {}
    for row in rows:
        first = split.setdefault(row["group"], row["split"])
        if first != row["split"]:
            raise ValueError(
                f"{row['id']}: group: {row['group']!r} is in {first!r} and {row['split']!r}; "
                "a group belongs to one split"
            )


# ---- Splits ----
#
# These constants state which group (patient, volume, slide or animal) is held out, so that a split
# never changes.
#
# `test` holds 19 groups; every modality and, but for the pelvis, every body part in it also has a
# train group. A modality with only one group is in train.

TEST = frozenset({
    "film-child-1427", "film-child-1431", "film-child-1438",  # normal
    "film-child-1947", "film-child-1950", "film-child-1952",  # bacterial pneumonia
    "film-chest-rg1",
    "mri-brain-2", "mri-pd-brain", "mri-colin27", "mri-liver",
    "ct-lung-2", "ct-iv-contrast",
    "us-pelvis", "echo-cardiology", "echo-doppler",
    "slide-cmu",
    "nuclei-dsb",
    "fundus-hrf",
})  # fmt: skip
VALIDATION = frozenset({
    "film-child-1436", "film-child-1949", "mri-flair-head", "ct-scout-chest", "slide-stardist",
})  # fmt: skip


def split_of(group: str) -> str:
    """Return the split of a group: "test", "validation" or "train"."""
    return "test" if group in TEST else "validation" if group in VALIDATION else "train"
