"""Renders one evaluation as a page and as Markdown: eval/report.py is the program.

    summary.json, records.jsonl  ->  scores with intervals, published scores, baselines,
                                     probes, calibration, contamination, slices, failures, examples

The page is self-contained: no script, no request, images embedded. `markdown` returns its tables
for a shell.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.reporting import curves, tables
from medmax_jax.eval.reporting.tables import Values
from medmax_jax.eval.stats import intervals
from medmax_jax.io import html_page, image_paths, journal
from medmax_jax.io.atomic_folder import private_umask
from medmax_jax.models import image_headers, images

EXAMPLES = 3  # per task
THUMBNAIL = 256  # pixels
SEED, RESAMPLES = 0, 2_000  # of slices, for a summary without these settings
CREDENTIALED = "Some of these items are credentialed: keep this page where the items may be kept."
NOTES = (
    "Intervals are 95 % intervals over groups (patients or volumes), so several questions about "
    "one patient do not pass for several patients: Wilson's, of the effective number of items that "
    "a bootstrap over groups shows, with Student's t. Where all items score the same the interval "
    "bounds the share of groups that could still differ; one group alone has none.",
    f"{tables.FEW_MARK}: fewer than {intervals.FEW} groups. The interval allows for it, but few "
    "groups seldom have all that the others have: read it as a rough one.",
    "An answer that cannot be parsed, and one that the judge or a scorer failed on, counts as "
    "wrong; “at best” has them all right, and the truth lies between.",
    "“Can find” is the least true difference to another model's answers to other questions that "
    "this many groups would show four times of five: smaller ones are no claims.",
    "“As released” scores the same answers as the MedMax release does, with its errors; it is "
    "for setting beside published numbers and for nothing else.",
    "modality_match is the nearest centroid of training pictures in code and pixel statistics; it "
    "is not BiomedCLIPScore.",
)
UNDER = {  # notes on a section's rows
    "probes": "No judge is asked about probes. Their metric is the first that needs none: an exact "
    "match for open questions, words in common for chats and captions; where a scorer reads text, "
    "a caption's cosine with the true picture, whatever picture was shown. Flips: answers that say "
    "something else than before. A model that looks loses, and flips, by the first three.",
    "picture_sets": "Values and intervals are over pairs of two different groups. “subsets” are "
    "KID as it is published; their std is no error of the mean.",
}
SECTIONS = (  # keys of the summary that hold rows, or {"reason", "rows"}, shown unchanged
    ("probes", "Probes: the same questions asked in another way"),
    ("calibration", "Options by likelihood, and calibration"),
    ("contamination", "Contamination: the clean and the contaminated part"),
    ("picture_sets", "Whole sets of pictures"),
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows, with numbers as on the page."""
    if not rows:
        return ""
    head = _columns(rows)
    lines = [head, ["---"] * len(head)]
    lines += [
        [html_page.format_value(row.get(name)).replace("|", "\\|") for name in head] for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(
    path: str | Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    *,
    images_folder: str | Path,
) -> None:
    """Write the page of one run; `summary` as eval.run writes it, the rest from next to `path`."""
    path = Path(path)
    values = aggregate.scores_by_item(records, per_record.read(path.parent, judge=_judge(summary)))
    body = _who(summary) + _scores(summary) + _published(summary)
    for baseline in summary["baselines"]:
        body += html_page.section(
            f"Against: {baseline['name']}",
            html_page.paragraph(baseline["says"])
            + rows_table(tables.merge_interval_columns(baseline["scores"])),
        )
    if ceiling := summary["modality_ceiling"]:
        ceiling = rows_table(tables.merge_interval_columns([ceiling]))
        body += html_page.section("Ceiling of modality_match", ceiling)
    body += "".join(_section(summary, key, title) for key, title in SECTIONS)
    body += _slices(summary, records, values) + _failures(summary, records, values)
    if missing := tables.not_run(summary, records):
        body += html_page.section("Not run, or without a score", rows_table(missing))
    for task in dict.fromkeys(record["task"] for record in records):
        some = [record for record in records if record["task"] == task]
        body += html_page.section(
            f"Examples: {task}", examples(some, path.parent, Path(images_folder))
        )
    body += html_page.section("How to read this", "".join(html_page.paragraph(n) for n in NOTES))
    secret = any(map(per_record.is_credentialed, records))
    if secret:
        body = html_page.paragraph(CREDENTIALED) + body
    with private_umask() if secret else contextlib.nullcontext():
        journal.write_text(path, html_page.document("Evaluation", body))


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table; a missing value is a dash."""
    head = _columns(rows)
    return html_page.table(head, [[row.get(name) for name in head] for row in rows]) if rows else ""


def examples(records: Sequence[Mapping[str, Any]], workdir: Path, images_folder: Path) -> str:
    """Return the first items of different groups: image, question, reference, answer."""
    first = {record["group"]: record for record in reversed(records)}
    chosen = list(first.values())[::-1][:EXAMPLES]
    pictures, rows, problems = [], [], []
    for record in chosen:
        rows.append([record["id"], record["prompt"], record["answer"], record["text"]])
        what = "reference" if record["images"] else "shown"
        given = [record["image"], *record.get("further_images", ())] if record["image"] else []
        label = "an image of a credentialed item" if per_record.is_credentialed(record) else ""
        shown = [(image_paths.resolve(images_folder, name, label=label), what) for name in given]
        shown += [
            (image_paths.resolve(workdir, name, label=label), "generated")
            for name in record["images"]
        ]
        for file, what in shown:
            if file.is_file():
                try:
                    pictures.append((png(file, label), f"{record['id']}: {what}"))
                except image_headers.ImageError as error:
                    problems.append(f"{record['id']}: {what}: {error}")
    table = html_page.table(["id", "prompt", "reference", "answer"], rows)
    notes = "".join(html_page.paragraph(problem, note=True) for problem in problems)
    return table + notes + (html_page.figures(pictures) if pictures else "")


def png(path: Path, label: str = "") -> bytes:
    """Return an image file as a small PNG. `label` replaces the path in errors."""
    small = images.load(path, max_pixels=images.MAX_PIXELS, name=label)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


def _who(summary: Mapping[str, Any]) -> str:
    settings, judge = summary.get("settings", {}), summary.get("judge")
    lines = [f"Model: {summary['model']}"]
    if summary["adapter"]:
        lines.append(f"Adapter: {summary['adapter']}")
    if "mode" in settings:
        prompt = settings.get("prompt", "sft")
        lines.append(f"Generation: {settings['mode']}; prompts: {prompt}")
    lines.append(f"Judge: {_said(judge) or 'nobody: open answers have text metrics only'}")
    scorers = _said(summary.get("scorers"))
    lines.append(f"Scorer of pictures: {scorers or 'none, so no BiomedCLIPScore'}")
    return "".join(html_page.paragraph(line, note=True) for line in lines)


def _judge(summary: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the verdicts that the summary counts; None: the last judge."""
    judge = summary.get("judge")
    return judge.get("judge") if isinstance(judge, Mapping) else None


def _said(value: Any) -> str:
    """Return a value of the summary as text: a dictionary as "name value, name value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items() if v not in (None, "", {}))
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return "" if value is None else str(value)


def _scores(summary: Mapping[str, Any]) -> str:
    body = rows_table(tables.main_table(summary))
    if unjudged := summary.get("not_judged"):
        said = f"Not judged, so with metrics of the words only: {', '.join(unjudged)}."
        body += html_page.paragraph(said, note=True)
    body = html_page.section("Scores", body)
    if floors := tables.floors(summary):
        said = [f"{floor['name']}: {floor['says']}." for floor in summary["floors"]]
        notes = "".join(html_page.paragraph(line, note=True) for line in said)
        body += html_page.section("Floors", rows_table(floors) + notes)
    if others := tables.other_metrics(summary):
        body += html_page.section("Other metrics", rows_table(others))
    return body


def _published(summary: Mapping[str, Any]) -> str:
    body = ""
    for kind, rows, differs in tables.published(summary):
        body += html_page.table(
            list(rows[0]),
            [[_rounded(cell, kind) for cell in row.values()] for row in rows],
            caption=kind,
        )
        body += "".join(html_page.paragraph(f"Theirs: {line}.", note=True) for line in differs)
    if not body:
        return ""
    mode = summary.get("settings", {}).get("mode", "")
    body += html_page.paragraph(
        f"Generated here in {mode or 'an unknown'} mode. Numbers can be compared only where "
        "decoding, rows and scoring are the same; “as released” has the release's scoring, and "
        "its decoding only in paper mode. Charts were read by eye: ±0.01, ±0.5.",
        note=True,
    )
    return html_page.section("Beside the published numbers", body)


def _rounded(cell: Any, kind: str) -> Any:
    """Return a rounded cell: percent to one digit, cosines to two."""
    if not isinstance(cell, float):
        return cell
    return f"{cell:.2f}" if "cosine" in kind else f"{cell:.1f}"


def _section(summary: Mapping[str, Any], key: str, title: str) -> str:
    found = summary.get(key)
    if not found:
        return ""
    reason = found.get("reason", "") if isinstance(found, Mapping) else ""
    rows = found.get("rows", []) if isinstance(found, Mapping) else found
    body = html_page.paragraph(f"Not available: {reason}") if reason else ""
    body += "".join(rows_table(tables.merge_interval_columns(some)) for some in _tables(key, rows))
    if key == "calibration":
        body += curves.render_curves(found)
    if key in UNDER and rows:
        body += html_page.paragraph(UNDER[key], note=True)
    if isinstance(found, Mapping) and found.get("compared"):
        body += html_page.paragraph(f"Compared: {_said(found['compared'])}.", note=True)
    return html_page.section(title, body) if body else ""


def _tables(key: str, rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return rows as one table; rows of image sets have different columns, so one per metric."""
    if key != "picture_sets":
        return [list(rows)]
    kept = [{k: v for k, v in row.items() if k != "fingerprint"} for row in rows]
    metrics = dict.fromkeys(row["metric"] for row in kept)
    return [[row for row in kept if row["metric"] == metric] for metric in metrics]


def _slices(summary, records, values: Values) -> str:
    settings = summary.get("settings", {})
    numbers = dict(seed=settings.get("seed", SEED), resamples=settings.get("resamples", RESAMPLES))
    rows, few = tables.slices(records, values, summary, **numbers)
    if not rows and not few:
        return ""
    body = rows_table(rows)
    if few:
        said = f"Left out, with fewer than {tables.LEAST} items: {few}."
        body += html_page.paragraph(said, note=True)
    return html_page.section("By slice", body)


def _failures(summary, records, values: Values) -> str:
    if not records:
        return ""
    body = rows_table(tables.failures(records, values, summary))
    body += rows_table(tables.failed_examples(records, values, summary))
    return html_page.section("Failures", body)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
