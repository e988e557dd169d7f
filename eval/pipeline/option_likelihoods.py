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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import strict, text
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.stats import calibration, intervals
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.io.journal import open_journal
from medmax_jax.io.progress import SECONDS, ItemProgress

OPTIONS = "options.jsonl"
BINS = 10  # of the calibration error, with equally many answers each
COVERAGE = 0.8
STEPS = 10  # coverages of a curve: 0.1, 0.2 .. 1
ABSENT = "n/a: this model has no score_options"


def parse_options(item: task_items.Item) -> list[str]:
    """Return ["yes", "no"], or the letters a question lists; [] where they cannot be read."""
    if item.family == "vqa_closed":
        return ["yes", "no"]
    return list(text.options(item.prompt)) if item.family == "vqa_mcq" else []


def correct_option(item: task_items.Item) -> int | None:
    """Return the index of the correct option; None where the row's answer is not an option."""
    known, said = parse_options(item), strict.parse_answer(item.family, item.answer, item.prompt)
    return known.index(said) if said in known else None


def score(
    model: Any,
    items: Sequence[task_items.Item],
    *,
    mode: str,
    prompt: str,
    images_folder: str | Path,
    out: str | Path,
    progress: Callable[[str], None],
    window: int,
) -> list[dict[str, Any]]:
    """Return one line per item with options, in order; [] for models without likelihoods.

    The lines that `out` already holds are kept.
    """
    scorer = getattr(model, "score_options", None)
    if scorer is None:
        progress(f"options: {unsupported_reason(model)}")
        return []
    asked = [item for item in items if parse_options(item) and correct_option(item) is not None]
    with open_journal(out) as journal:
        known = {line["id"]: line for line in journal.rows}
        for number, item in enumerate(asked, start=1):
            line = known.get(item.id)
            if line is not None and (line["prompt"], line["image"]) != (item.prompt, item.image):
                raise EvalError(
                    f"{out}: item {task_items.item_name(item, number)} was another question when "
                    f"it was "
                    "scored; use a fresh workdir"
                )
        todo = [item for item in asked if item.id not in known]
        for start in range(0, len(todo), window):
            some = todo[start : start + window]
            asks = [
                inference.make_request(item, Path(images_folder), mode, prompt) for item in some
            ]
            found = scorer(asks, [parse_options(item) for item in some])
            lines = [_line(model, i, logs) for i, logs in zip(some, found, strict=True)]
            journal.append(*lines)
            known |= {line["id"]: line for line in lines}
            progress(f"options: {start + len(some)} of {len(todo)} items")
    return [known[item.id] for item in asked]


def unsupported_reason(model: Any) -> str:
    """Return why a model has no likelihoods; "" if it has them."""
    if getattr(model, "score_options", None) is not None:
        return ""
    why = getattr(model, "no_options", "")
    return f"n/a: {why}" if why else ABSENT


def summary(
    lines: Sequence[dict[str, Any]],
    *,
    n_items: int,
    reason: str,
    seed: int,
    resamples: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {reason, rows, left_out, bins, curves}, the last two by task.

    rows {task, metric, n, groups, few_groups, value, ci_low, ci_high}
    bins {n, groups, few_groups, confidence, low, high, accuracy, ci_low, ci_high}, least confident
    first; low and high are the ends of the confidences in it
    curves {coverage, n, groups, few_groups, risk, ci_low, ci_high} at coverage 0.1, 0.2 .. 1

    `n_items`: closed and multiple choice items of the run. `reason`: why there are no lines.
    `progress` gets a line every few seconds: tens of thousands of items take half a minute.
    """
    if not lines:
        return dict(reason=reason or "no item has options that can be read", rows=[])
    rows, bins, curves = [], {}, {}
    numbers = dict(seed=seed, resamples=resamples)
    for task in dict.fromkeys(line["task"] for line in lines):
        some = [line for line in lines if line["task"] == task]
        done = ItemProgress(resamples, "resamples", progress, every=SECONDS)
        tick = functools.partial(done.tick, f"calibration of {task}", 1)
        measures, risks = _measures(some, tick, **numbers)
        rows += [dict(task=task, metric=name) | one.row() for name, one in measures.items()]
        curves[task] = [dict(coverage=at) | one.row("risk") for at, one in risks.items()]
        bins[task] = _bins(some, **numbers)
    left_out = n_items - len(lines)
    return dict(reason="", rows=rows, left_out=left_out, bins=bins, curves=curves)


def _line(model: Any, item: task_items.Item, logs: Sequence[float]) -> dict[str, Any]:
    return dict(
        id=item.id,
        task=item.task,
        group=item.group,
        prompt=item.prompt,
        image=item.image,
        options=parse_options(item),
        log_likelihoods=[float(one) for one in logs],
        answer=correct_option(item),
        model=str(getattr(model, "fingerprint", type(model).__name__)),
    )


def _sure(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the confidence, the correctness and the Brier score of each line."""
    shares = [calibration.option_probabilities(line["log_likelihoods"]) for line in lines]
    said = [calibration.top_option(share) for share in shares]
    right = [best == line["answer"] for (best, _), line in zip(said, lines, strict=True)]
    brier = [
        calibration.brier([s], [line["answer"]]) for s, line in zip(shares, lines, strict=True)
    ]
    return np.array([c for _, c in said]), np.array(right, np.float64), np.array(brier)


def _measures(
    lines: Sequence[dict[str, Any]], tick: Callable[[], None], *, seed: int, resamples: int
) -> tuple[dict[str, intervals.Interval], dict[float, intervals.Interval]]:
    """Return (measures by name, risk at coverage 0.1, 0.2 .. 1) from one shared bootstrap.

    `tick` is called at each resample.
    """
    sure, right, brier = _sure(lines)
    groups, numbers = [line["group"] for line in lines], dict(seed=seed, resamples=resamples)
    at = [step / STEPS for step in range(1, STEPS + 1)]

    def statistics(some: np.ndarray) -> np.ndarray:
        curve = calibration.risk_coverage(sure[some], right[some])
        error = calibration.ece(sure[some], right[some], bins=BINS)
        kept = [calibration.accuracy_at_coverage(curve, coverage) for coverage in (COVERAGE, *at)]
        return np.array([error, curve.area, kept[0], *(1 - one for one in kept[1:])])

    spans = [intervals.SHARE] * (3 + len(at))
    ece, area, kept, *risks = intervals.pointwise_intervals(
        statistics, groups, spans=spans, tick=tick, **numbers
    )
    measures = {
        "accuracy_by_likelihood": intervals.mean_interval(right, groups, **numbers),
        "confidence": intervals.mean_interval(sure, groups, **numbers),
        "ece": ece,
        "brier": intervals.mean_interval(brier, groups, span=(0.0, 2.0), **numbers),
        "risk_coverage_area": area,
        "accuracy_at_80": kept,
    }
    return measures, dict(zip(at, risks, strict=True))


def _bins(lines: Sequence[dict[str, Any]], *, seed: int, resamples: int) -> list[dict[str, Any]]:
    """Return a reliability diagram: the accuracy of each bin with its interval."""
    sure, right, _ = _sure(lines)
    chosen = calibration.equal_mass_bins(sure, bins=BINS)
    found = []
    for number in np.unique(chosen):
        some = chosen == number
        groups = [line["group"] for line, one in zip(lines, some, strict=True) if one]
        row = intervals.mean_interval(right[some], groups, seed=seed, resamples=resamples)
        ends = dict(low=float(sure[some].min()), high=float(sure[some].max()))
        found.append(dict(confidence=float(sure[some].mean())) | ends | row.row("accuracy"))
    return found
