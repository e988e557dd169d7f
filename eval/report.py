"""One evaluation as a page and as a Markdown table: scores with intervals, baselines, examples."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medmax_jax import page

EXAMPLES = 3  # of each task
THUMBNAIL = 256  # pixels
NOTES = (
    "Intervals are 95 % percentile bootstraps over groups (patients or volumes), so several "
    "questions about one patient do not pass for several patients.",
    "An answer that cannot be parsed counts as wrong. modality_match is the nearest centroid of "
    "training pictures in code and pixel statistics; it is not BiomedCLIPScore.",
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with equal keys; numbers as on the page."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)]
    lines += [[page.shown(row[name]).replace("|", "\\|") for name in head] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(
    path: str | Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    *,
    images_folder: str | Path,
) -> None:
    """The page of one run: `summary` as eval.run writes it, pictures from beside `path`."""
    path = Path(path)
    body = page.paragraph(f"Model: {summary['model']}", note=True)
    if summary["adapter"]:
        body += page.paragraph(f"Adapter: {summary['adapter']}", note=True)
    body += page.section("Scores", rows_table(summary["scores"]))
    for baseline in summary["baselines"]:
        body += page.section(
            f"Against: {baseline['name']}",
            page.paragraph(baseline["says"]) + rows_table(baseline["scores"]),
        )
    if ceiling := summary["modality_ceiling"]:
        body += page.section("Ceiling of modality_match", rows_table([ceiling]))
    body += page.section("How to read this", "".join(page.paragraph(n) for n in NOTES))
    for task in dict.fromkeys(record["task"] for record in records):
        some = [record for record in records if record["task"] == task]
        body += page.section(f"Examples: {task}", examples(some, path.parent, Path(images_folder)))
    path.write_text(page.document("Evaluation", body), encoding="utf-8")


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as an HTML table."""
    return page.table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def examples(records: Sequence[Mapping[str, Any]], workdir: Path, images_folder: Path) -> str:
    """The first items of different groups: picture, question, reference, answer."""
    first = {record["group"]: record for record in reversed(records)}
    chosen = list(first.values())[::-1][:EXAMPLES]
    pictures, rows = [], []
    for record in chosen:
        rows.append([record["id"], record["prompt"], record["answer"], record["text"]])
        if record["image"]:
            reference = "reference" if record["images"] else "shown"
            pictures.append((png(images_folder / record["image"]), f"{record['id']}: {reference}"))
        drawn = f"{record['id']}: generated"
        pictures += [(png(workdir / name), drawn) for name in record["images"]]
    return page.table(["id", "prompt", "reference", "answer"], rows) + page.figures(pictures)


def png(path: Path) -> bytes:
    """A picture file, made small, as PNG."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()
