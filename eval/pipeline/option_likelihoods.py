"""Scores the options of a question by likelihood, and measures the model's calibration.

    closed            yes, no
    multiple choice   the letters that the question lists, A B C ..

    items -> model.score_options -> options.jsonl -> accuracy by likelihood, ECE, Brier, risk
             against coverage; each with an interval over groups. The curves of these too, which
             eval/reporting/curves.py draws

The letters are scored, not the options' texts: the question requires a letter, as the rows'
answers are, and a letter is one token whatever its text is, so totals are compared as they are,
without length normalization. Where the options cannot be parsed from the question the item is left
out and counted. Models without `score_options` have no such scores: n/a, with that reason.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import strict, text
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.records import Item, item_name
from medmax_jax.eval.stats import calibration, intervals
from medmax_jax.io.journal import open_journal
from medmax_jax.io.progress import SECONDS, ItemProgress, report_waiting

OPTIONS = "options.jsonl"
ABSENT = "n/a: this model has no method score_options"


def parse_options(item: Item) -> list[str]:
    """Return ["yes", "no"], or the letters a question lists; [] where they cannot be read."""
    if item.family == "vqa_closed":
        return ["yes", "no"]
    return list(text.options(item.prompt)) if item.family == "vqa_mcq" else []


def correct_option(item: Item) -> int | None:
    """Return the index of the correct option; None where the row's answer is not an option."""
    options, answer = (
        parse_options(item),
        strict.parse_answer(item.family, item.answer, item.prompt),
    )
    return options.index(answer) if answer in options else None


def score(
    model: Any,
    items: Sequence[Item],
    *,
    mode: str,
    prompt: str,
    images_folder: str | Path,
    out: str | Path,
    progress: Callable[[str], None],
    window: int,
    perturbed: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one line per item with options, in order; [] for models without likelihoods.

    The lines that `out` already holds are kept. perturbed: as in inference.run_items.
    """
    scorer = getattr(model, "score_options", None)
    if scorer is None:
        progress(f"options: {unsupported_reason(model)}")
        return []
    with_options = [i for i in items if parse_options(i) and correct_option(i) is not None]
    with open_journal(out) as journal:
        lines_by_id = {line["id"]: line for line in journal.rows}
        for number, item in enumerate(with_options, start=1):
            line = lines_by_id.get(item.id)
            if line is not None and (line["prompt"], line["image"]) != (item.prompt, item.image):
                raise EvalError(
                    f"{out}: item {item_name(item, number)} differs from the item that "
                    "was scored before; use a new workdir"
                )
        todo = [item for item in with_options if item.id not in lines_by_id]
        for start in range(0, len(todo), window):
            window_items = todo[start : start + window]
            requests = [
                inference.make_request(item, Path(images_folder), mode, prompt, perturbed=perturbed)
                for item in window_items
            ]
            with report_waiting("options: scoring", progress):
                likelihoods = scorer(requests, [parse_options(item) for item in window_items])
            pairs = zip(window_items, likelihoods, strict=True)
            lines = [_line(model, item, of_options) for item, of_options in pairs]
            journal.append(*lines)
            lines_by_id |= {line["id"]: line for line in lines}
            progress(f"options: {start + len(window_items)} of {len(todo)} items")
    return [lines_by_id[item.id] for item in with_options]


def unsupported_reason(model: Any) -> str:
    """Return why a model has no likelihoods; "" if it has them."""
    if getattr(model, "score_options", None) is not None:
        return ""
    reason = getattr(model, "no_options", "")
    return f"n/a: {reason}" if reason else ABSENT


def summary(
    lines: Sequence[dict[str, Any]],
    *,
    n_items: int,
    reason: str,
    resampling: intervals.Resampling,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {reason, rows, left_out, bins, curves}, as `summarize_tasks` does.

    `n_items`: closed and multiple choice items of the run. `reason`: why there are no lines.
    """
    if not lines:
        return dict(reason=reason or "no item has options that can be parsed", rows=[])
    tasks = dict.fromkeys(line["task"] for line in lines)
    answers = {task: scored_answers([x for x in lines if x["task"] == task]) for task in tasks}
    names = {"accuracy": "accuracy_by_likelihood"}
    result = summarize_tasks(answers, names, resampling=resampling, progress=progress)
    return dict(reason="", left_out=n_items - len(lines)) | result


def summarize_tasks(
    answers: Mapping[str, calibration.ScoredAnswers],
    names: Mapping[str, str],
    *,
    resampling: intervals.Resampling,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return {rows, bins, curves} of the answers by task, the last two by task.

    rows {task, metric, n, groups, few_groups, value, ci_low, ci_high}
    bins as calibration.reliability_bins has them
    curves {coverage, n, groups, few_groups, risk, ci_low, ci_high} at coverage 0.1, 0.2 .. 1

    names: of measures whose metric has another name. `progress` gets a line every few seconds: tens
    of thousands of items take half a minute.
    """
    rows, bins, curves = [], {}, {}
    for task, task_answers in answers.items():
        item_progress = ItemProgress(resampling.resamples, "resamples", progress, every=SECONDS)
        tick = functools.partial(item_progress.tick, f"calibration of {task}", 1)
        measures, risks = calibration.measures(task_answers, tick=tick, resampling=resampling)
        rows += [
            dict(task=task, metric=names.get(name, name)) | value.row()
            for name, value in measures.items()
        ]
        curves[task] = [dict(coverage=at) | risk.row("risk") for at, risk in risks.items()]
        bins[task] = calibration.reliability_bins(task_answers, resampling=resampling)
    return dict(rows=rows, bins=bins, curves=curves)


def scored_answers(lines: Sequence[dict[str, Any]]) -> calibration.ScoredAnswers:
    """Return the most likely option of each line as its answer, with its probability."""
    probabilities = [calibration.option_probabilities(line["log_likelihoods"]) for line in lines]
    answers = [line["answer"] for line in lines]
    choices = [calibration.top_option(of_line) for of_line in probabilities]
    correct = [best == answer for (best, _), answer in zip(choices, answers, strict=True)]
    pairs = zip(probabilities, answers, strict=True)
    brier = [calibration.brier([of_line], [answer]) for of_line, answer in pairs]
    return calibration.ScoredAnswers(
        confidence=np.array([confidence for _, confidence in choices]),
        correct=np.array(correct, np.float64),
        brier=np.array(brier),
        brier_max=2.0,
        groups=[line["group"] for line in lines],
    )


def _line(model: Any, item: Item, log_likelihoods: Sequence[float]) -> dict[str, Any]:
    return dict(
        id=item.id,
        task=item.task,
        group=item.group,
        prompt=item.prompt,
        image=item.image,
        options=parse_options(item),
        log_likelihoods=[float(value) for value in log_likelihoods],
        answer=correct_option(item),
        model=str(getattr(model, "fingerprint", type(model).__name__)),
    )
