"""Renders one evaluation as a page and as Markdown: eval/report.py is the program.

    summary.json, records.jsonl  ->  the result in sentences and one chart; scores with intervals,
                                     published scores, baselines, probes, calibration by
                                     likelihood and by stated confidence, contamination, slices,
                                     failures, examples

The page is self-contained: no script, no request, images embedded; each image links to its file if
that is in the workdir. `markdown` returns its tables for a shell.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, captions, per_record
from medmax_jax.eval.records import EvalRecord, is_credentialed
from medmax_jax.eval.reporting import curves, definitions, item_browser, tables, verdict
from medmax_jax.eval.reporting.tables import Values
from medmax_jax.eval.results import MetricRow, Summary
from medmax_jax.eval.stats import intervals
from medmax_jax.io import html_page, journal
from medmax_jax.models import image_headers, images
from medmax_jax.storage.atomic_folder import private_umask

EXAMPLES = 3  # per task
THUMBNAIL = 384  # pixels of the longer side of an image on the page
SEED, RESAMPLES = 0, 2_000  # of slices, for a summary without these settings
CREDENTIALED = (
    "Some of these items are credentialed: store this page only where the items may be stored."
)
IMAGE_SETS = "image_sets"
NOTES = (
    "Intervals are 95 % intervals over groups (patients or volumes), so several questions about "
    "one patient do not count as several patients: Wilson's, of the effective number of items that "
    "a bootstrap over groups gives, with Student's t. Where all items score the same, the interval "
    "bounds the share of groups that could still differ; a single group has no interval.",
    f"{tables.FEW_MARK}: fewer than {intervals.FEW} groups. The interval accounts for the number "
    "of groups, but few groups rarely represent all others: treat it as approximate.",
    "An answer that cannot be parsed, or that the judge or a scorer failed to score, counts as "
    "wrong; “at best” counts all of these as right. The true value is between the two.",
    "“Above” and “below the baseline”: the 95 % interval excludes the score of the best baseline "
    "of the task. For the baseline “blind” it is the interval of the paired difference, for the "
    "others that of the model's score. Verdicts are not adjusted for the number of tasks.",
    "modality_match is the nearest centroid of training images in code and pixel statistics; it "
    "is not BiomedCLIPScore.",
)
SECTION_NOTES = {  # notes on a section's rows
    "probes": "Differences are the modified questions minus the original ones. Probes "
    "are not judged. Their metric is the first that requires no judge: exact "
    "match for open questions, token overlap for chats and captions; where a scorer reads text, "
    "the cosine of a caption with the true image, whichever image was shown. Flips: answers whose "
    "content changed. The first three probes lower the score, and flip answers, of a model that "
    "uses the image.",
    "verbalized": "After its answer, the model was asked how confident it is in that answer. An "
    "answer is correct where the headline accuracy counts it as correct. Replies without one "
    "number are left out of every number of this section. “likelihoods” and “verbalized” are of "
    "the items that have both; each has its own answer, the most likely option or the text.",
    IMAGE_SETS: "Values and intervals are over pairs of two different groups. “subsets” are KID as "
    "it is published; their std is not an error of the mean.",
}
COLUMN_NAMES = {  # section -> column of the summary -> as shown
    "probes": {"before": "original", "after": "modified", "diff": "modified minus original"},
    "verbalized": {"diff": "verbalized minus likelihoods"},
}
SECTIONS = (  # fields of the summary that hold rows, or {"reason", "rows"}, shown unchanged
    ("recorded", "Rows of the predictions that are not of an item"),
    ("probes", "Probes: the same questions in modified form"),
    ("calibration", "Options by likelihood, and calibration"),
    ("verbalized", "Stated confidence, and calibration"),
    ("contamination", "Contamination: the clean and the contaminated part"),
    (IMAGE_SETS, "Complete sets of images"),
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
    summary: Summary,
    records: Sequence[EvalRecord],
    *,
    images_folder: str | Path,
) -> None:
    """Write the page of one run, and the files of item_browser.py next to it.

    summary: as eval.run writes it; the judgments and scores are read from next to `path`.
    """
    path = Path(path)
    inputs = per_record.read(path.parent, judge=_judge(summary))
    values = aggregate.scores_by_item(records, inputs)
    head = html_page.provenance(provenance(summary))
    body = html_page.links({item_browser.PAGE: "all items", item_browser.TABLE: "as CSV"})
    if result := verdict.render(summary):
        body += html_page.section("Result", result)
    body += _scores(summary) + _published(summary)
    if cards := tables.card_table(summary):
        body += html_page.section("Cards of the tasks", rows_table(cards))
    for baseline in summary.baselines:
        names = {"before": baseline["name"], "after": "the model", "diff": "model minus baseline"}
        rows = tables.rename_columns(tables.merge_interval_columns(baseline["scores"]), names)
        body += html_page.section(
            f"Compared with: {baseline['name']}",
            html_page.paragraph(f"{baseline['says']}.") + rows_table(rows),
        )
    if accuracy := summary.modality_ceiling:
        accuracy_table = rows_table(tables.merge_interval_columns([accuracy]))
        body += html_page.section("Upper bound of modality_match", accuracy_table)
    body += "".join(_section(summary, key, title) for key, title in SECTIONS)
    body += _slices(summary, records, values) + _failures(summary, records, values)
    if missing := tables.not_run(summary, records):
        body += html_page.section("Tasks not run, or without a score", rows_table(missing))
    for task in dict.fromkeys(record.task for record in records):
        task_records = [record for record in records if record.task == task]
        body += html_page.section(
            f"Examples: {task}", examples(task_records, path.parent, Path(images_folder))
        )
    notes = "".join(html_page.paragraph(note) for note in NOTES)
    body += html_page.section("Notes", notes + _definitions(summary))
    credentialed = any(map(is_credentialed, records))
    if credentialed:
        head += html_page.paragraph(CREDENTIALED)
    with private_umask() if credentialed else contextlib.nullcontext():
        item_browser.write(
            path.parent, summary, records, inputs, images_folder=Path(images_folder), head=head
        )
        title = f"Evaluation of {summary.model}"
        journal.write_text(path, html_page.document(title, head + body))


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table; a missing value is a dash."""
    if not rows:
        return ""
    head = _columns(rows)
    return html_page.table(
        head,
        [[row.get(name) for name in head] for row in rows],
        definitions=definitions.of_table({str(row.get("metric")) for row in rows}),
    )


def examples(records: Sequence[EvalRecord], workdir: Path, images_folder: Path) -> str:
    """Return the first items of different groups: image, question, reference, answer."""
    first = {record.group: record for record in reversed(records)}
    chosen = list(first.values())[::-1][:EXAMPLES]
    rows = [[r.id, r.prompt, r.answer, r.text] for r in chosen]
    figures, problems = [], []
    for record in chosen:
        record_figures, record_problems = _images(record, workdir, images_folder)
        figures.append(record_figures)
        problems += record_problems
    if not any(record.generated for record in chosen):  # no pairs to keep in one row
        figures = [[figure for record_figures in figures for figure in record_figures]]
    body = html_page.table(["id", "prompt", "reference", "answer"], rows)
    body += "".join(html_page.paragraph(problem, note=True) for problem in problems)
    for row in filter(None, figures):
        body += html_page.figures(
            [(data, caption) for data, caption, _ in row], links=[link for *_, link in row]
        )
    return body


def _images(
    record: EvalRecord, workdir: Path, images_folder: Path
) -> tuple[list[tuple[bytes, str, str]], list[str]]:
    """Return (PNG, caption, link) of a record's images, and the errors of those without one."""
    figures, problems = [], []
    label = "an image of a credentialed item" if is_credentialed(record) else ""
    for file, role in item_browser.image_files(record, workdir, images_folder):
        caption = f"{record.id}: {role}"
        try:
            target = "" if label else item_browser.link(file, workdir)
            figures.append((png(file, label), caption, target))
        except image_headers.ImageError as error:
            problems.append(f"{caption}: {error}")
    return figures, problems


def png(path: Path, label: str = "") -> bytes:
    """Return an image file as a small PNG. `label` replaces the path in errors."""
    small = images.load(path, max_pixels=images.MAX_PIXELS, name=label)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return html_page.png(small)


def provenance(summary: Summary) -> dict[str, Any]:
    """Return the facts below the title of a page: what was evaluated, on which data, by what."""
    settings = summary.settings
    facts = {
        "model": summary.model,
        "adapter": summary.adapter,
        "data": _as_text(settings.get("questions")),
        "split": settings.get("split"),
        "digest": summary.fingerprints.get("data"),
        "generation": settings.get("mode"),
        "prompts": settings.get("prompt"),
        "view": view_text(summary),
        "seed": settings.get("seed"),
    }
    return facts | summary.environment


def view_text(summary: Summary) -> str:
    """Return the view of the images if the release has another one, and of the training if other.

    "" | "pad" | "pad, but trained on released"
    """
    if summary.view != summary.trained_view:
        return f"{summary.view}, but trained on {summary.trained_view}"
    return "" if summary.view == "released" else summary.view


def _definitions(summary: Summary) -> str:
    """Return the definitions of metrics and columns as a table that can be opened."""
    names = {row.metric for row in summary.scores}
    terms = html_page.table(["", ""], list(definitions.of_table(names).items()))
    return html_page.details("Definitions of the columns and metrics", terms)


def _judge(summary: Summary) -> str | None:
    """Return the fingerprint of the verdicts that the summary counts; None: the last judge."""
    return summary.judge.get("judge") if summary.judge else None


def _as_text(value: Any) -> str:
    """Return a value of the summary as text: a dictionary as "name value, name value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_as_text(v)}" for k, v in value.items() if v not in (None, "", {}))
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value))
    return "" if value is None else str(value)


def _scores(summary: Summary) -> str:
    body = rows_table(tables.main_table(summary))
    if summary.not_judged:
        names = ", ".join(summary.not_judged)
        note = f"Not judged, so these have text metrics only: {names}."
        body += html_page.paragraph(note, note=True)
    judge, scorers = _as_text(summary.judge), _as_text(summary.scorers)
    for note in (
        f"Judge: {judge or 'none; open answers have text metrics only'}.",
        f"Scorer of images: {scorers or 'none, so there is no BiomedCLIPScore'}.",
    ):
        body += html_page.paragraph(note, note=True)
    body = html_page.section("Scores", body)
    if rows := tables.baseline_table(summary):
        lines = [f"{floor.name}: {floor.says}." for floor in summary.floors]
        notes = "".join(html_page.paragraph(line, note=True) for line in lines)
        body += html_page.section("Baselines", rows_table(rows) + notes)
    if others := tables.other_metrics(summary):
        body += html_page.section("Other metrics", rows_table(others))
    return body + caption_metrics_not_run(summary.scores)


def caption_metrics_not_run(scores: Sequence[MetricRow]) -> str:
    """Return the table of the metrics of captions and reports that this suite does not compute."""
    if not any(row.family == "captioning" for row in scores):
        return ""
    rows = [dict(metric=k, reason=why) for k, why in captions.METRICS_NOT_RUN.items()]
    return html_page.section("Metrics of captions that are not run", rows_table(rows))


def _published(summary: Summary) -> str:
    body = ""
    for kind, rows, differs in tables.published(summary):
        body += html_page.table(
            list(rows[0]),
            [[_rounded(cell, kind) for cell in row.values()] for row in rows],
            caption=kind,
            definitions=definitions.COLUMNS,
        )
        body += "".join(
            html_page.paragraph(f"Published evaluation: {line}.", note=True) for line in differs
        )
    if not body:
        return ""
    mode = summary.settings.get("mode", "")
    body += html_page.paragraph(
        f"Generated here in {mode or 'an unknown'} mode. Numbers can be compared only where "
        "decoding, rows and scoring are the same; “as released” uses the scoring of the MedMax "
        "release, and its decoding only in paper mode. Charts were read by eye: ±0.01, ±0.5.",
        note=True,
    )
    return html_page.section("Comparison with published numbers", body)


def _rounded(cell: Any, kind: str) -> Any:
    """Return a rounded cell: percent to one digit, cosines to two."""
    if not isinstance(cell, float):
        return cell
    return f"{cell:.2f}" if "cosine" in kind else f"{cell:.1f}"


def _section(summary: Summary, key: str, title: str) -> str:
    content = getattr(summary, key)
    if not content:
        return ""
    reason = content.get("reason", "") if isinstance(content, Mapping) else ""
    rows = content.get("rows", []) if isinstance(content, Mapping) else content
    body = html_page.paragraph(f"Not available: {reason}") if reason else ""
    paired = content.get("paired", ()) if isinstance(content, Mapping) else ()
    for table_rows in (*_tables(key, rows), paired):
        merged = tables.merge_interval_columns(table_rows)
        body += rows_table(tables.rename_columns(merged, COLUMN_NAMES.get(key, {})))
    if key in ("calibration", "verbalized"):
        body += curves.render_curves(content)
    if key == "verbalized" and "n_unparsed" in content:
        counts = "Replies without one number: {n_unparsed}. Items that were not asked: {left_out}."
        body += html_page.paragraph(counts.format(**content), note=True)
    if key in SECTION_NOTES and rows:
        body += html_page.paragraph(SECTION_NOTES[key], note=True)
    if isinstance(content, Mapping) and content.get("compared"):
        body += html_page.paragraph(f"Compared: {_as_text(content['compared'])}.", note=True)
    return html_page.section(title, body) if body else ""


def _tables(key: str, rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return rows as one table; rows of image sets have different columns, so one per metric."""
    if key != IMAGE_SETS:
        return [list(rows)]
    kept = [{k: v for k, v in row.items() if k != "fingerprint"} for row in rows]
    metrics = dict.fromkeys(row["metric"] for row in kept)
    return [[row for row in kept if row["metric"] == metric] for metric in metrics]


def _slices(summary: Summary, records: Sequence[EvalRecord], values: Values) -> str:
    settings = summary.settings
    resampling = intervals.Resampling(
        settings.get("seed", SEED), settings.get("resamples", RESAMPLES)
    )
    rows, few = tables.slices(records, values, summary, resampling=resampling)
    if not rows and not few:
        return ""
    body = rows_table(rows)
    if few:
        note = f"Slices with fewer than {tables.MIN_SLICE_ITEMS} items, left out: {few}."
        body += html_page.paragraph(note, note=True)
    return html_page.section("By slice", body)


def _failures(summary: Summary, records: Sequence[EvalRecord], values: Values) -> str:
    if not records:
        return ""
    body = rows_table(tables.failures(records, values, summary))
    if failed := tables.failed_examples(records, values, summary):  # model text: no definitions
        body += html_page.table(list(failed[0]), [list(row.values()) for row in failed])
    return html_page.section("Failures", body)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
