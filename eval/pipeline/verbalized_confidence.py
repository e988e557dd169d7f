"""Asks a model how confident it is in each closed or multiple choice answer, and measures that.

    records with an answer -> the same question, the answer, CONFIDENCE_PROMPT (tasks/items.py)
    -> confidence.jsonl    -> "85", "85 %", "85/100", "0.85" -> 0.85; anything else is unparsed
    -> the measures of option_likelihoods.py, and the paired difference from the likelihoods

It is a stage after the answers, so it changes none of them. An answer counts as correct where the
headline accuracy counts it: an unparsed answer is wrong. Answers without text and failed requests
are not asked about; replies without exactly one number are counted and left out of every measure.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics.per_record import CLOSED_FAMILIES, answer_text
from medmax_jax.eval.models import base
from medmax_jax.eval.pipeline import inference, option_likelihoods
from medmax_jax.eval.records import EvalRecord, Item, item_name
from medmax_jax.eval.stats import calibration, intervals
from medmax_jax.eval.tasks.items import confidence_parts
from medmax_jax.io import journal as io_journal
from medmax_jax.io.progress import ItemProgress, report_waits

CONFIDENCE = "confidence.jsonl"
MAX_TOKENS = 16  # of a reply; an endpoint's own bound, as of a reasoning model, replaces it
NAMES = {"brier": "binary_brier"}  # of measures that the likelihoods define otherwise
NO_TEXT = "n/a: the model generates no text"
NO_REPLIES = {  # kind of the model -> why it is not asked
    "predictions": "n/a: the answers are recorded, so the model cannot be asked about them",
    "baseline": "n/a: a baseline has no confidence",
}
_FIELDS = ("id", "task", "group", "prompt", "image", "answer", "text")
_TAG = re.compile(r"</?\w{1,20}>")  # <answer>85</answer>
_BOUND = re.compile(r"[<>≤≥]")  # "> 90" states no number
_NUMBER = re.compile(
    r"(?<![\w.,/+\-−–])([0-9]{1,3}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})(\s*(?:[%％]|/\s*100))?(?![\w%％/])"
)


def parse_confidence(reply: str) -> float | None:
    """Return the confidence that a reply states, in 0..1; None for no number or several.

    A number is of 100, unless it has a decimal point, no unit, and is at most 1: "85" -> 0.85,
    "0.85" -> 0.85, "1" -> 0.01, "1.0" -> 1.0, "0.85 %" -> 0.0085. Any digits that are no such
    number ("-5", "8,5", "3/4", "T2") make the reply unparsed.
    """
    text = _TAG.sub(" ", reasoning.final_answer(reply) or "")
    values = {_share(number, unit) for number, unit in _NUMBER.findall(text)}
    if len(values) != 1 or _BOUND.search(text) or re.search(r"\d", _NUMBER.sub(" ", text)):
        return None
    (value,) = values
    return value if value <= 1 else None


def _share(number: str, unit: str) -> float:
    value = float(number)
    return value if "." in number and not unit and value <= 1 else round(value / 100, 8)


def unsupported_reason(kind: str, model: Any = None) -> str:
    """Return why a model of this kind (eval/models/loading.py) is not asked; "" if it is."""
    modes = getattr(model, "modes", None)
    return NO_REPLIES.get(kind, "") or (NO_TEXT if modes and "text" not in modes else "")


def answer_of(record: EvalRecord) -> str:
    """Return the answer that the model is asked about, without reasoning; "" for none."""
    return "" if record.error else answer_text(record).strip()


def make_request(
    item: Item,
    answer: str,
    folder: Path,
    mode: str,
    prompt: str,
    *,
    perturbed: Path | None = None,
) -> base.ModelRequest:
    """Return the request of inference.make_request, with the answer and the question about it."""
    request = inference.make_request(item, folder, mode, prompt, perturbed=perturbed)
    parts = confidence_parts(request.parts, answer)
    return dataclasses.replace(request, parts=parts, max_tokens=MAX_TOKENS)


def ask(
    model: base.Model,
    records: Sequence[EvalRecord],
    *,
    mode: str,
    prompt: str,
    images_folder: str | Path,
    out: str | Path,
    progress: Callable[[str], None],
    window: int,
    perturbed: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one line per closed or multiple choice record with an answer, in order.

    The lines that `out` already holds are kept. perturbed: as in inference.run_items. Raises
    Interrupted where requests had no reply, so that the same command requests them again.
    """
    asked = [r for r in records if r.family in CLOSED_FAMILIES and answer_of(r)]
    folder = Path(images_folder)
    with io_journal.open_journal(out) as journal:
        rows = io_journal.checked(journal.rows, _FIELDS, journal.path)
        lines_by_id = {line["id"]: line for line in rows}
        for number, record in enumerate(asked, start=1):
            line = lines_by_id.get(record.id)
            if line is not None and any(line[k] != v for k, v in _asked_fields(record).items()):
                raise EvalError(
                    f"{out}: item {item_name(record, number)} or its answer differs from what the "
                    "confidence was asked about; use a new workdir, or delete this file"
                )
        todo = [record for record in asked if record.id not in lines_by_id]
        item_progress = ItemProgress(len(todo), "items", progress, every=0.0)
        for start in range(0, len(todo), window):
            part = todo[start : start + window]
            requests = [
                make_request(r, answer_of(r), folder, mode, prompt, perturbed=perturbed)
                for r in part
            ]
            batches = inference.answer_batches(model, requests)
            for batch in report_waits(batches, "confidence: waiting for replies", progress):
                lines = [_line(model, part[index], reply) for index, reply in batch]
                journal.append(*lines)
                lines_by_id |= {line["id"]: line for line in lines}
                item_progress.tick("confidence", len(lines))
    inference.check_complete(asked, lines_by_id, model, progress)
    return [lines_by_id[record.id] for record in asked]


def _asked_fields(record: EvalRecord) -> dict[str, Any]:
    return dict(prompt=record.prompt, image=record.image, answer=answer_of(record))


def _line(model: base.Model, record: EvalRecord, reply: Any) -> dict[str, Any]:
    text, error = "", {}
    if isinstance(reply, base.FailedResponse):
        error = dict(error=reply.why)
    else:
        texts, _, _ = base.split_segments(reply, where=inference.item_label(record))
        text = " ".join(part.strip() for part in texts).strip()
    fields = dict(id=record.id, task=record.task, group=record.group) | _asked_fields(record)
    fingerprint = str(getattr(model, "fingerprint", type(model).__name__))
    return fields | dict(text=text) | error | dict(model=fingerprint)


def summary(
    lines: Sequence[Mapping[str, Any]],
    correct: Mapping[str, float],
    option_lines: Sequence[Mapping[str, Any]] = (),
    *,
    n_items: int,
    reason: str,
    resampling: intervals.Resampling,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {reason, rows, left_out, n_unparsed, bins, curves, paired}.

    paired {task, metric, n, groups, few_groups, likelihoods, verbalized, diff, ci_low, ci_high}
    over the items that also have likelihoods. The others are those of option_likelihoods.summary.

    `correct`: id -> accuracy of the answer. option_lines: of options.jsonl. `n_items`: closed and
    multiple choice items of the run; left_out: those not asked about. `reason`: why there are no
    lines.
    """
    if not lines:
        return dict(reason=reason or "no closed or multiple choice item has an answer", rows=[])
    stated = {line["id"]: parse_confidence(line["text"]) for line in lines}
    parsed = [line for line in lines if stated[line["id"]] is not None]
    counts = dict(left_out=n_items - len(lines), n_unparsed=len(lines) - len(parsed))
    if not parsed:
        why = f"none of the {len(lines)} replies states one number from 0 to 100"
        return dict(reason=why, rows=[]) | counts
    by_id = {line["id"]: line for line in option_lines}
    answers, paired = {}, []
    for task in dict.fromkeys(line["task"] for line in parsed):
        task_lines = [line for line in parsed if line["task"] == task]
        answers[task] = _scored_answers(task_lines, stated, correct)
        if both := [line for line in task_lines if line["id"] in by_id]:
            likelihoods = option_likelihoods.scored_answers([by_id[line["id"]] for line in both])
            verbalized = _scored_answers(both, stated, correct)
            rows = _paired(likelihoods, verbalized, resampling=resampling)
            paired += [dict(task=task) | row for row in rows]
    result = option_likelihoods.summarize_tasks(
        answers, NAMES, resampling=resampling, progress=progress
    )
    return dict(reason="") | counts | result | dict(paired=paired)


def _scored_answers(
    lines: Sequence[Mapping[str, Any]],
    stated: Mapping[str, float | None],
    correct: Mapping[str, float],
) -> calibration.ScoredAnswers:
    confidence = np.array([stated[line["id"]] for line in lines], np.float64)
    right = np.array([correct[line["id"]] for line in lines], np.float64)
    return calibration.ScoredAnswers(
        confidence=confidence,
        correct=right,
        brier=(confidence - right) ** 2,
        brier_max=1.0,
        groups=[line["group"] for line in lines],
    )


def _paired(
    likelihoods: calibration.ScoredAnswers,
    verbalized: calibration.ScoredAnswers,
    *,
    resampling: intervals.Resampling,
) -> list[dict[str, Any]]:
    """Return the ECE and the binary Brier score of both on the same items, and the difference."""
    sides, groups = (likelihoods, verbalized), verbalized.groups

    def errors(indices: np.ndarray) -> list[float]:
        return [
            calibration.ece(s.confidence[indices], s.correct[indices], bins=calibration.BINS)
            for s in sides
        ]

    (difference,) = intervals.pointwise_intervals(
        lambda indices: np.diff(errors(indices)),
        groups,
        spans=[intervals.of_differences(intervals.SHARE)],
        resampling=resampling,
    )
    names = ("likelihoods", "verbalized")
    ece = dict(zip(names, errors(np.arange(len(groups))), strict=True)) | difference.row("diff")
    brier = intervals.paired_row(
        *((side.confidence - side.correct) ** 2 for side in sides),
        groups,
        names=names,
        resampling=resampling,
    )
    return [dict(metric="ece") | ece, dict(metric="binary_brier") | brier]
