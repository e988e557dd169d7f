"""Writes every item of a run: a page that filters them, and a table for other programs.

    items.html     one entry per item, with its image, answer and score; filters by task, verdict
                   and tag
    items.csv      one row per item; a text that a spreadsheet would run as a formula begins with '
    item_images/   small copies of the images that are not in the workdir, by digest

verdict: correct (a score of 1), wrong (0), partial (between), unparsed, unscored (the judge or a
scorer failed), error (the request failed) or not scored. Tags are the slices of an item.

Both files have the texts of records.jsonl, and are for the same readers. Images of credentialed
items are neither copied nor linked.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from medmax_jax.eval.metrics import per_record, strict
from medmax_jax.eval.records import EvalRecord, is_credentialed
from medmax_jax.eval.reporting import definitions, tables
from medmax_jax.eval.results import Summary
from medmax_jax.io import csv_files, html_page, journal
from medmax_jax.models import image_headers, images
from medmax_jax.storage import image_paths
from medmax_jax.storage.folder import file_sha256

REPORT, PAGE, TABLE, IMAGES = "report.html", "items.html", "items.csv", "item_images"
SIZE, QUALITY = 256, 85  # pixels of the longer side, and JPEG quality, of a copy
ENTRIES = "<!-- entries -->"
TITLE_CHARS = 90  # of the prompt in the title of an entry
CORRECT, WRONG, PARTIAL, ERROR, NOT_SCORED = "correct", "wrong", "partial", "error", "not scored"
READ_CORRECT, READ_WRONG = (f"{v}, {strict.JUDGE_READ}" for v in (CORRECT, WRONG))
STATUS: Mapping[str, html_page.Status] = {
    CORRECT: "good", WRONG: "bad", ERROR: "bad", strict.UNPARSED: "bad",
    READ_CORRECT: "good", READ_WRONG: "bad",
}  # fmt: skip
COLUMNS = ("id", "task", "family", "group", "verdict", "metric", "score", "tags", "prompt",
           "reference", "answer", "error", "images", "generated_images")  # fmt: skip
LEAD = (
    "Verdicts are by the headline metric of the task. correct: a score of 1; wrong: 0; partial: "
    "between; unparsed: no option can be read from the answer; read by judge: only the judge "
    "could; unscored: the judge or a scorer failed; error: the request failed."
)


def write(
    workdir: Path,
    summary: Summary,
    records: Sequence[EvalRecord],
    inputs: per_record.ScoringInputs,
    *,
    images_folder: Path,
    head: str,
) -> None:
    """Write both files; head: markup above the items."""
    metrics = {row.task: row.metric for row in tables.headlines(summary.scores)}
    filtered = _filtered_tags(records)
    links: dict[Path, str] = {}
    entries, rows = [], []
    for record in records:
        metric = metrics.get(record.task, "")
        score = per_record.record_scores(record, inputs).get(metric)
        row = _row(record, metric, score)
        rows.append([row[name] for name in COLUMNS])
        values = {"task": [record.task], "verdict": [row["verdict"]]}
        values["tag"] = [tag for tag in _tags(record) if tag in filtered]
        entries.append(
            html_page.Entry(
                title=f"{record.task}: {_first_line(record.prompt)}",
                label=row["verdict"],
                status=STATUS.get(row["verdict"], "neutral"),
                values=values,
                body=_body(row) + _figures(record, workdir, images_folder, links),
            )
        )
    terms = {name: definitions.metric_definition(name) for name in metrics.values()}
    body = head + html_page.links({REPORT: "the report", TABLE: "the items as CSV"})
    body += html_page.paragraph(LEAD)
    body += html_page.details(
        "Definitions of the metrics", html_page.table(["", ""], list(terms.items()))
    )
    title = f"Items of {summary.model}"
    document = html_page.document(title, body + ENTRIES, script=html_page.SCRIPT)
    before, after = document.split(ENTRIES)  # other text is escaped, so the mark is there once
    parts = itertools.chain([before], html_page.browser(entries), [after])
    journal.write_text(workdir / PAGE, parts)
    journal.write_text(workdir / TABLE, csv_files.csv_text(COLUMNS, rows))


def image_files(record: EvalRecord, workdir: Path, images_folder: Path) -> list[tuple[Path, str]]:
    """Return (file, role) of the images of a record, those that the model generated last."""
    label = "an image of a credentialed item" if is_credentialed(record) else ""
    role = "real image (reference)" if record.generated else "shown to the model"
    role = "shown to the model" if record.reference_image else role
    files = [
        (image_paths.resolve(images_folder, name, label=label), role) for name in record.images
    ]
    if expected := record.reference_image:
        files.append((image_paths.resolve(images_folder, expected, label=label), "reference"))
    files += [
        (image_paths.resolve(workdir, name, label=label), "generated by the model")
        for name in record.generated
    ]
    return [(file, role) for file, role in files if file.is_file()]


def link(file: Path, workdir: Path) -> str:
    """Return the path of a file relative to the page; "" for a file outside the workdir."""
    file, workdir = file.resolve(), workdir.resolve()
    return file.relative_to(workdir).as_posix() if file.is_relative_to(workdir) else ""


def item_verdict(record: EvalRecord, score: strict.ItemScore | None) -> str:
    """Return the verdict on one item, as defined above."""
    if record.error:
        return ERROR
    if score is None:
        return NOT_SCORED
    if score.value is None or score.status == strict.UNPARSED:
        return score.status
    if score.status == strict.JUDGE_READ:
        return READ_CORRECT if score.value else READ_WRONG
    return {0.0: WRONG, 1.0: CORRECT}.get(score.value, PARTIAL)


def _row(record: EvalRecord, metric: str, score: strict.ItemScore | None) -> dict[str, Any]:
    """Return the cells of an item by the names of COLUMNS."""
    return {
        "id": record.id,
        "task": record.task,
        "family": record.family,
        "group": record.group,
        "verdict": item_verdict(record, score),
        "metric": metric,
        "score": None if score is None else score.lower,
        "tags": "; ".join(_tags(record)),
        "prompt": record.prompt,
        "reference": record.answer,
        "answer": record.text,
        "error": record.error,
        "images": "; ".join(record.images),
        "generated_images": "; ".join(record.generated),
    }


def _tags(record: EvalRecord) -> list[str]:
    return [f"{name}: {value}" for name, value in tables.record_slices(record)]


def _filtered_tags(records: Sequence[EvalRecord]) -> set[str]:
    """Return the tags with a filter: those whose name has few values, as in the page's slices."""
    by_name: dict[str, set[str]] = {}
    for record in records:
        for name, value in tables.record_slices(record):
            by_name.setdefault(name, set()).add(f"{name}: {value}")
    kept = (tags for tags in by_name.values() if len(tags) <= tables.MAX_SLICE_VALUES)
    return set().union(*kept)


def _first_line(prompt: str) -> str:
    """Return the start of a prompt for a title."""
    line = " ".join(prompt.split())
    return line if len(line) <= TITLE_CHARS else f"{line[:TITLE_CHARS]} …"


def _body(row: Mapping[str, Any]) -> str:
    """Return the facts of an item; those without a value are left out."""
    shown = row | {"answer": row["answer"] or "(empty)"}
    names = ("id", "group", "metric", "score", "tags", "prompt", "reference", "answer", "error")
    rows = [[name, shown[name]] for name in names if shown[name] not in (None, "")]
    return html_page.table(["", ""], rows)


def _figures(record: EvalRecord, workdir: Path, images_folder: Path, links: dict[Path, str]) -> str:
    """Return the images of an item; `links` has those of earlier items, by file."""
    files = image_files(record, workdir, images_folder)
    if is_credentialed(record):
        note = "The images of a credentialed item are not on this page."
        return html_page.paragraph(note, note=True) if files else ""
    figures, notes = [], ""
    for file, role in files:
        try:
            if file not in links:
                links[file] = link(file, workdir) or _copy(file, workdir)
            figures.append((links[file], role))
        except image_headers.ImageError as error:
            notes += html_page.paragraph(f"{role}: {error}", note=True)
    return (html_page.linked_figures(figures) if figures else "") + notes


def _copy(file: Path, workdir: Path) -> str:
    """Return the path of a small copy of an image, which is written unless it exists."""
    name = f"{IMAGES}/{file_sha256(file)[:16]}.jpg"
    if not (workdir / name).exists():
        small = images.load(file, max_pixels=images.MAX_PIXELS)
        small.thumbnail((SIZE, SIZE), PIL.Image.Resampling.LANCZOS)
        (workdir / IMAGES).mkdir(exist_ok=True)
        partial = workdir / f"{name}.partial"
        small.convert("RGB").save(partial, format="JPEG", quality=QUALITY)
        partial.replace(workdir / name)
    return name
