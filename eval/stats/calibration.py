"""Measures calibration from confidences: likelihoods of a question's options, or stated ones.

    log p(option)  --softmax-->  0.7 0.2 0.1    answers option 0 with confidence 0.7
    ece            |confidence - accuracy|, weighted, in bins of equally many answers
    equal_mass_bins  the bin of each answer, from which a reliability diagram is drawn
    brier          squared distance of the shares from the truth: 0 is best, 2 the worst
    risk_coverage  error rate among the most confident share of the answers

Answers of equal confidence are treated together: their order in a file changes no number.
`measures` and `reliability_bins` have these with intervals over groups.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from medmax_jax.eval.stats import intervals

BINS = 10  # of the calibration error, with equally many answers each
COVERAGE = 0.8
STEPS = 10  # coverages of a curve: 0.1, 0.2 .. 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredAnswers:
    """Holds the answers of one task. brier: the score of each answer, from 0 to `brier_max`."""

    confidence: Float[np.ndarray, "n"]
    correct: Float[np.ndarray, "n"]
    brier: Float[np.ndarray, "n"]
    brier_max: float
    groups: Sequence[Hashable]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Holds the risk at each coverage 1/n .. 1.

    `area`: mean risk, lower is better; 0 for no errors.
    """

    coverage: Float[np.ndarray, "n"]
    risk: Float[np.ndarray, "n"]
    area: float


def option_probabilities(log_likelihoods: Sequence[float]) -> Float[np.ndarray, "o"]:
    """Return probabilities over the options; [0, log 3] -> [0.25, 0.75]."""
    logs = np.asarray(log_likelihoods, np.float64)
    if len(logs) < 2 or np.isnan(logs).any() or (logs == np.inf).any() or (logs == -np.inf).all():
        raise ValueError(
            f"log likelihoods {list(log_likelihoods)}: required are two or more options and "
            "numbers below infinity, one of them finite"
        )
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def top_option(probabilities: Float[np.ndarray, "o"]) -> tuple[int, float]:
    """Return the most likely option and its probability."""
    best = int(np.argmax(probabilities))
    return best, float(probabilities[best])


def ece(confidence: Sequence[float], right: Sequence[float], *, bins: int) -> float:
    """Return the expected calibration error over `bins` bins, of equal size up to ties."""
    confidence, right = _checked(confidence, right)
    chosen = equal_mass_bins(confidence, bins=bins)
    gaps = [abs((confidence - right)[chosen == b].sum()) for b in np.unique(chosen)]
    return float(sum(gaps) / len(confidence))


def equal_mass_bins(confidence: Float[np.ndarray, "n"], *, bins: int) -> Int[np.ndarray, "n"]:
    """Return the bin of each answer; bins that ties leave empty are not used.

    [0.9, 0.5, 0.5, 0.8] in 2 bins -> [1, 0, 0, 1].
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    _, where, count = np.unique(confidence, return_inverse=True, return_counts=True)
    # All answers of one confidence go to the bin of their middle rank.
    middle = np.cumsum(count) - (count + 1) / 2
    return np.minimum((middle * bins / len(confidence)).astype(int), bins - 1)[where]


def brier(probabilities: Sequence[Float[np.ndarray, "o"]], truth: Sequence[int]) -> float:
    """Return the mean over answers of sum_o (share_o - [o is true])^2."""
    if len(probabilities) != len(truth) or not len(truth):
        raise ValueError(
            f"{len(probabilities)} answers but {len(truth)} truths; pass one truth per answer, and "
            "at least 1 answer"
        )
    total = 0.0
    for share, option in zip(probabilities, truth, strict=True):
        if not 0 <= option < len(share):
            raise ValueError(f"truth {option}: the answer has options 0 to {len(share) - 1}")
        total += float(np.sum((share - np.eye(len(share))[option]) ** 2))
    return total / len(truth)


def risk_coverage(confidence: Sequence[float], right: Sequence[float]) -> Curve:
    """Return the risk-coverage curve.

    Within one confidence, errors are spread evenly: the average of a random order.
    """
    confidence, right = _checked(confidence, right)
    order = np.argsort(-confidence, kind="stable")
    _, where = np.unique(-confidence[order], return_inverse=True)
    errors = 1 - right[order]
    even = (np.bincount(where, errors) / np.bincount(where))[where]
    n = np.arange(1, len(errors) + 1)
    risk = np.cumsum(even) / n
    return Curve(n / len(n), risk, float(risk.mean()))


def accuracy_at_coverage(curve: Curve, coverage: float) -> float:
    """Return the accuracy among the most confident `coverage` of the answers, at least one."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}; it must be in (0, 1]")
    kept = max(1, round(coverage * len(curve.risk)))
    return float(1 - curve.risk[kept - 1])


def measures(
    answers: ScoredAnswers,
    *,
    resampling: intervals.Resampling,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Mapping[str, intervals.Interval], Mapping[float, intervals.Interval]]:
    """Return (measures by name, risk at coverage 0.1, 0.2 .. 1) from one shared bootstrap.

    `tick` is called at each resample.
    """
    confidence, correct, groups = answers.confidence, answers.correct, answers.groups
    coverages = [step / STEPS for step in range(1, STEPS + 1)]

    def statistics(indices: np.ndarray) -> np.ndarray:
        curve = risk_coverage(confidence[indices], correct[indices])
        error = ece(confidence[indices], correct[indices], bins=BINS)
        accuracy = accuracy_at_coverage(curve, COVERAGE)
        risks = [1 - accuracy_at_coverage(curve, coverage) for coverage in coverages]
        return np.array([error, curve.area, accuracy, *risks])

    spans = [intervals.SHARE] * (3 + len(coverages))
    error, area, accuracy_at_80, *risks = intervals.pointwise_intervals(
        statistics, groups, spans=spans, tick=tick, resampling=resampling
    )
    brier_span = (0.0, answers.brier_max)
    by_name = {
        "accuracy": intervals.mean_interval(correct, groups, resampling=resampling),
        "confidence": intervals.mean_interval(confidence, groups, resampling=resampling),
        "ece": error,
        "brier": intervals.mean_interval(
            answers.brier, groups, span=brier_span, resampling=resampling
        ),
        "risk_coverage_area": area,
        "accuracy_at_80": accuracy_at_80,
    }
    return by_name, dict(zip(coverages, risks, strict=True))


def reliability_bins(
    answers: ScoredAnswers, *, resampling: intervals.Resampling
) -> list[dict[str, Any]]:
    """Return a reliability diagram: the accuracy of each bin with its interval.

    Rows are {n, groups, few_groups, confidence, low, high, accuracy, ci_low, ci_high}, least
    confident first; low and high are the ends of the confidences in it.
    """
    confidence, correct = answers.confidence, answers.correct
    chosen = equal_mass_bins(confidence, bins=BINS)
    rows = []
    for number in np.unique(chosen):
        members = chosen == number
        groups = [name for name, member in zip(answers.groups, members, strict=True) if member]
        row = intervals.mean_interval(correct[members], groups, resampling=resampling)
        ends = dict(low=float(confidence[members].min()), high=float(confidence[members].max()))
        rows.append(dict(confidence=float(confidence[members].mean())) | ends | row.row("accuracy"))
    return rows


def _checked(confidence: Sequence[float], right: Sequence[float]):
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if len(confidence) != len(right) or not len(right):
        raise ValueError(
            f"{len(confidence)} confidences but {len(right)} answers; pass one confidence per "
            "answer, and at least 1 answer"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(
            f"confidences are {confidence.min()} to {confidence.max()}; they must be in 0..1"
        )
    return confidence, right
