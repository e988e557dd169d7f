"""Renders reproduction.json as a page: each published number next to the one computed here.

    the result in words  ->  a table per table of the paper  ->  settings that differ, cells that
    were not run and why  ->  the numbers of other models  ->  digests of what computed all this

The page has no script.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.eval.reporting import tables
from medmax_jax.eval.reproduction import published, scores
from medmax_jax.eval.reproduction.citation import FILE
from medmax_jax.eval.stats import intervals
from medmax_jax.io import html_page

_STATUS: Mapping[str, html_page.Status] = {
    scores.REPRODUCED: "good", scores.DIFFERS: "bad",
}  # fmt: skip
_WORDS = {
    scores.REPRODUCED: "the published number is within the 95 % interval of the number computed "
    "here, which is scored as the release does",
    scores.DIFFERS: "the published number is outside of the interval; the settings that differ are "
    "listed below",
    scores.FEW: f"fewer than {intervals.FEW} groups (patients or volumes), or an interval that "
    "includes the published number and is wider than ±10 points (cosines: ±0.1), so it decides "
    "nothing",
    scores.NO_SCORE: "answered, but the release's scoring gives no number; the reason is listed "
    "below",
    scores.NOT_RUN: "no answers; the reason is listed below",
}
_COLUMNS = {
    "published": "the number in the paper, in its unit",
    "here": "the same protocol here: generation as published, scored as the release does, "
    "including its errors",
    "95 % interval": "95 % confidence interval of “here” over groups of items; the release states "
    "none",
    "n": "items that the number is a mean of",
    "benchmark": "rows of the task in its own benchmark; the number of released rows per task is "
    "not public",
    "strict": "the same answers, scored by this suite: what cannot be parsed counts as wrong",
    "strict mode": "answers generated and scored by this suite's strict mode, on the same items",
}
_NOTES = (
    "“Reproduced” means that the difference is no larger than chance explains on these items, with "
    "half a printed digit added (tables), or ±0.01 for cosines and ±0.5 for scores (charts, read "
    "by eye).",
    f"{tables.FEW_MARK}: fewer than {intervals.FEW} groups; the interval is approximate.",
    "Which rows the paper evaluated is known only to those with access to the released parquet. "
    "With rows from elsewhere, the items differ from the paper's.",
)


def render(content: Mapping[str, Any]) -> str:
    """Return the page. content: of reproduction.json."""
    cells = content["cells"]
    body = html_page.provenance(_head(content)) + html_page.links({FILE: f"{FILE}, for citing"})
    body += html_page.section("Result", _result(content, cells))
    for name, title in published.TABLES.items():
        own = [cell for cell in cells if cell["table"] == name]
        body += html_page.section(title, _table(own)) if own else ""
    body += html_page.section("Not run, or without a score", _missing(content, cells))
    if differing := _differing(cells):
        body += html_page.section("Settings that differ from the published evaluation", differing)
    body += html_page.section("Published numbers of other models", _others(content, cells))
    notes = "".join(html_page.paragraph(note) for note in _NOTES)
    body += html_page.section("Notes", notes + html_page.details("Digests", _digests(content)))
    model = content["model"].get("model", "no model")
    return html_page.document(f"Reproduction of {content['published_model']} by {model}", body)


def _head(content: Mapping[str, Any]) -> dict[str, Any]:
    model, judge = content["model"], content["scorers"]["judge"] or {}
    return {
        "paper": content["paper"],
        "model": model.get("model"),
        "adapter": model.get("adapter"),
        "data": ", ".join(f"{file['file']} {file['sha256'][:12]}" for file in content["data"]),
        "judge": judge.get("model"),
        "seed": content["settings"]["seed"],
    } | content["environment"]


def _result(content: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    counts = collections.Counter(cell["status"] for cell in cells)
    lead = (
        f"Of {len(cells)} published numbers of {content['published_model']}, "
        f"{counts[scores.REPRODUCED]} are reproduced, {counts[scores.DIFFERS]} differ, and "
        f"{len(cells) - counts[scores.REPRODUCED] - counts[scores.DIFFERS]} are undecided."
    )
    verdicts = [
        html_page.Verdict(
            _STATUS.get(status, "neutral"),
            f"{status.capitalize()}: {counts[status]} of {len(cells)}",
            f"{words[0].upper()}{words[1:]}.",
        )
        for status, words in _WORDS.items()
        if counts[status]
    ]
    return html_page.paragraph(lead) + html_page.verdicts(verdicts)


def _table(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        released, strict = cell["released"] or {}, cell["strict"] or {}
        rows.append(
            {
                "task": _title(cell),
                "published": _number(cell, cell["published"]),
                "here": _number(cell, released.get("value")),
                "95 % interval": _interval(cell, released),
                "n": released.get("n") or strict.get("n"),
                "benchmark": None if cell["rows"] is None else f"{cell['rows']:,}",
                "status": cell["status"],
                "strict": _number(cell, strict.get("value")),
                "95 %, strict": _interval(cell, strict),
                "strict mode": _number(cell, (cell["strict_generation"] or {}).get("value")),
            }
        )
    rows = tables.drop_empty_columns(rows)
    sources = "; ".join(dict.fromkeys(cell["source"] for cell in cells))
    markup = html_page.table(
        list(rows[0]), [list(row.values()) for row in rows], definitions=_COLUMNS | _WORDS
    )
    return markup + html_page.paragraph(f"Published: {sources}.", note=True)


def _title(cell: Mapping[str, Any]) -> str:
    image = " (image)" if cell["metric"] == "clip_image_image" else ""
    return f"{cell['title']}{image}"


def _is_cosine(cell: Mapping[str, Any]) -> bool:
    return cell["metric"].startswith("clip_")


def _number(cell: Mapping[str, Any], value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2f}" if _is_cosine(cell) else f"{value:.1f}"


def _interval(cell: Mapping[str, Any], score: Mapping[str, Any]) -> str | None:
    if score.get("low") is None:
        return None
    scale = 1.0 if _is_cosine(cell) else tables.PERCENT  # bounds() writes shares in percent
    text = tables.bounds(score["low"] / scale, score["high"] / scale, scale) or ""
    return tables.marked(score, text)


def _missing(content: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [_title(cell), _number(cell, cell["published"]), cell["status"], cell["reason"]]
        for cell in cells
        if cell["reason"]
    ]
    rows += [
        [one["what"], one["published"], scores.NOT_RUN, one["reason"]]
        for one in content["unreproduced"]
    ]
    return html_page.table(["task", "published", "status", "reason"], rows)


def _differing(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the differences, each with the tasks that it applies to."""
    run = [cell for cell in cells if cell["settings_differ"]]
    by_difference: dict[str, list[str]] = {}
    for cell in run:
        for line in cell["settings_differ"]:
            by_difference.setdefault(line, []).append(_title(cell))
    scored = sum(bool(cell["released"] or cell["strict"]) for cell in cells)
    rows = [
        [line, "all" if len(titles) == scored else "; ".join(titles)]
        for line, titles in by_difference.items()
    ]
    return html_page.table(["setting", "numbers"], rows) if rows else ""


def _others(content: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    body = ""
    for name, title in published.TABLES.items():
        own = [cell for cell in cells if cell["table"] == name]
        models = list(dict.fromkeys(o["model"] for cell in own for o in cell["others"]))
        rows, notes = [], ""
        for cell in own:
            values = {o["model"]: _number(cell, o["value"]) for o in reversed(cell["others"])}
            rows.append([_title(cell), _number(cell, cell["published"]), *map(values.get, models)])
            stated = set()
            for other in cell["others"]:
                if other["model"] in stated:
                    also = f"{_title(cell)}, {other['model']}: also {_number(cell, other['value'])}"
                    notes += html_page.paragraph(f"{also}, by {other['source']}.", note=True)
                stated.add(other["model"])
        if rows:
            head = ["task", content["published_model"], *models]
            body += html_page.table(head, rows, caption=title) + notes
    return body


def _digests(content: Mapping[str, Any]) -> str:
    scorers = content["scorers"]
    rows = [["suite", f"{content['suite']['medmax_jax']} {content['suite']['commit']}"]]
    rows += [["model", content["model"].get("digest")]]
    rows += [["adapter", content["model"].get("adapter_digest") or None]]
    rows += [[f"code of {name}", digest] for name, digest in scorers["code"].items()]
    rows += [["prompts of the judge", scorers["prompts"]]]
    rows += [[f"weights of {name}", digest] for name, digest in scorers["encoders"].items()]
    rows += [[f"file {file['file']}", file["sha256"]] for file in content["data"]]
    rows += [[f"answers of {name}", part["answers"]] for name, part in content["parts"].items()]
    return html_page.table(["", ""], [row for row in rows if row[1]])
