"""Scores one answer strictly; totals drop no answer and guess no verdict.

scored     the answer states something that can be compared with the reference
unparsed   the model's answer cannot be parsed: wrong, and at best right
unscored   the judge or the scorer failed, not the model: counted as worst, and at best right

value      unparsed and unscored at their worst  ]  the truth is between `value` and `best`;
best       unparsed and unscored at their best   ]  `of_scored` is the value if they are dropped
"""

import dataclasses
import re
from collections.abc import Hashable, Sequence

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.metrics import answer_parser, yes_no_parser
from medmax_jax.eval.metrics import text as text_metrics

SCORED, UNPARSED, UNSCORED = "scored", "unparsed", "unscored"
MIN_SCORE, MAX_SCORE = 1.0, 10.0  # the range of a judge's score in a comparison


class StrictError(ValueError):
    """Raised for scores that cannot be computed; the message names the value and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemScore:
    """Holds the score of one answer; `value` is None unless it is scored.

    `low`, `high`: the possible range of an unscored value.
    """

    status: str
    value: float | None
    low: float
    high: float
    why: str = ""

    @property
    def lower(self) -> float:
        return self.low if self.value is None else self.value

    @property
    def upper(self) -> float:
        return self.high if self.value is None else self.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """Holds the total of many verdicts; `of_scored` is None when nothing was scored."""

    n: int
    n_unparsed: int
    n_unscored: int
    value: float
    best: float
    of_scored: float | None


def scored(value: float) -> ItemScore:
    """Return the score of a known value."""
    return ItemScore(status=SCORED, value=float(value), low=float(value), high=float(value))


def unparsed(why: str) -> ItemScore:
    """Return the score of an answer that the model wrote and that cannot be parsed."""
    return ItemScore(status=UNPARSED, value=None, low=0.0, high=1.0, why=why)


def unscored(why: str, *, low: float = 0.0, high: float = 1.0) -> ItemScore:
    """Return the score of an answer that a judge or scorer failed to score."""
    return ItemScore(status=UNSCORED, value=None, low=low, high=high, why=why)


def parse_answer(task: str, text: str, prompt: str) -> str | None:
    """Return the parsed answer to a closed or multiple choice question; None: unparsed."""
    if task == "vqa_closed":
        return yes_no_parser.parse_yes_no(text, prompt)
    return answer_parser.parse_choice(text, text_metrics.options(prompt))


def closed(raw: str, answer: str, prompt: str = "") -> ItemScore:
    """Score a closed question.

    closed("Normal", "no") is unparsed; closed("No.", "no") is 1.
    """
    return _matched("vqa_closed", raw, answer, prompt)


def choice(raw: str, answer: str, prompt: str) -> ItemScore:
    """Score a multiple choice question.

    choice("It is MRI", "B", "Which?\\nA: CT\\nB: MRI") is 1.
    """
    return _matched("vqa_mcq", raw, answer, prompt)


def parse_correctness(reply: str) -> ItemScore:
    """Parse a judge's reply in the MedMax release's form: the last "Correctness: 0" or "1".

    Bold marks are allowed. "**Correctness:** 1" is 1, "Correctness: 1 ... Correctness: 0" is 0;
    "Correctness: 10" and "0.5" are no verdicts, nor is a verdict inside a judge's reasoning text.
    Replies of eval/metrics/llm_judge.py have a form of their own.
    """
    plain = re.sub(r"[*_`\"']", "", reasoning.final_answer(reply) or "")
    found = re.findall(r"\bcorrectness\s*:\s*([01])(?![\w.]*\d)\b", plain, re.IGNORECASE)
    return scored(float(found[-1])) if found else unscored(f"{reply[:60]!r} has no verdict")


def parse_score_pair(reply: str) -> tuple[float, float] | None:
    """Parse the scores of assistants 1 and 2 in the release's form: two numbers from 1 to 10.

    "8, 7", "8  7", "**8 7**" and "Assistant 1: 8 Assistant 2: 7" too; "8/10 7/10" has four numbers
    and is rejected: an ambiguous reply is not guessed.
    """
    final = reasoning.final_answer(reply) or ""
    line = next((line for line in final.splitlines() if line.strip()), "")
    text = re.sub(r"\bassistant [12]\b", " ", line, flags=re.IGNORECASE)
    found = re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w])", text, re.ASCII)
    scores = [float(number) for number in found]
    if len(scores) != 2 or not all(MIN_SCORE <= score <= MAX_SCORE for score in scores):
        return None
    return scores[0], scores[1]


def total(verdicts: Sequence[ItemScore]) -> Total:
    """Return the mean with bounds over all verdicts."""
    if not verdicts:
        raise StrictError("no verdicts: nothing was asked, so there is no score")
    known = [v.value for v in verdicts if v.value is not None]
    states = [v.status for v in verdicts]
    return Total(
        n=len(verdicts),
        n_unparsed=states.count(UNPARSED),
        n_unscored=states.count(UNSCORED),
        value=sum(v.lower for v in verdicts) / len(verdicts),
        best=sum(v.upper for v in verdicts) / len(verdicts),
        of_scored=sum(known) / len(known) if known else None,
    )


def all_correct_by_key(
    verdicts: Sequence[ItemScore], keys: Sequence[Hashable]
) -> dict[Hashable, ItemScore]:
    """Return key -> right only if all of its questions are: ProbMed's pairs.

    ProbMed poses one question about each thing in an image and one about a thing that is absent, so
    the key is (image, question type): a model that answers yes to everything scores nothing. One
    wrong answer decides, even if others are unscored.
    """
    if len(verdicts) != len(keys):
        raise StrictError(f"{len(verdicts)} verdicts but {len(keys)} keys: one key a verdict")
    found: dict[Hashable, list[ItemScore]] = {}
    for key, verdict in zip(keys, verdicts, strict=True):
        found.setdefault(key, []).append(verdict)
    return {key: _all(some) for key, some in found.items()}


def grouped_accuracy(
    verdicts: Sequence[ItemScore], pictures: Sequence[str], kinds: Sequence[str]
) -> dict[str, Total]:
    """Return question type -> accuracy over images of `all_correct_by_key`, and "overall"."""
    keys = list(zip(pictures, kinds, strict=True))
    merged = all_correct_by_key(verdicts, keys)
    parts = {
        kind: [v for (_, k), v in merged.items() if k == kind] for kind in dict.fromkeys(kinds)
    }
    return {kind: total(some) for kind, some in parts.items()} | {
        "overall": total(list(merged.values()))
    }


def comparison(pairs: Sequence[tuple[float, float] | None]) -> dict[str, float | int | None]:
    """Summarize a judge's (reference, model) scores, None for an unscored answer.

    `ratio_of_means` does not become large when one reference is rated low, as the mean of ratios
    does; its bounds give unscored answers 1 of 10 against 10 of 10, and the reverse.
    """
    if not pairs:
        raise StrictError("no pairs: nothing was judged, so there is no score")
    known = [pair for pair in pairs if pair is not None]
    for pair in known:
        if not all(MIN_SCORE <= score <= MAX_SCORE for score in pair):
            raise StrictError(f"scores {pair}: must lie between {MIN_SCORE:g} and {MAX_SCORE:g}")
    missing = len(pairs) - len(known)
    return {
        "n": len(pairs),
        "n_unscored": missing,
        "mean_of_ratios": sum(b / a for a, b in known) / len(known) if known else None,
        "ratio_of_means": _ratio(known),
        "worst": _ratio(known + [(MAX_SCORE, MIN_SCORE)] * missing),
        "best": _ratio(known + [(MIN_SCORE, MAX_SCORE)] * missing),
        "win": sum(b > a for a, b in known),
        "tie": sum(b == a for a, b in known),
        "loss": sum(b < a for a, b in known),
    }


def image_similarity_summary(
    cosines: Sequence[Sequence[float]], *, floor: float
) -> dict[str, float | None]:
    """Summarize the similarities of each answer's images, () for none; missing ones get `floor`.

    `first` is the first image over the answers with an image, as published; `with_missing` is over
    all.
    """
    if not cosines:
        raise StrictError("no answers: nothing was asked, so there is no score")
    drew = [some for some in cosines if some]
    return {
        "coverage": len(drew) / len(cosines),
        "first": sum(some[0] for some in drew) / len(drew) if drew else None,
        "with_missing": sum(some[0] if some else floor for some in cosines) / len(cosines),
        "best_of_all": sum(max(some) if some else floor for some in cosines) / len(cosines),
    }


def _matched(task: str, raw: str, answer: str, prompt: str) -> ItemScore:
    expected = parse_answer(task, answer, prompt)
    if expected is None:
        raise StrictError(f"answer {answer!r} is no answer of a {task}; mend the row")
    said = parse_answer(task, raw, prompt)
    return scored(said == expected) if said else unparsed(f"{raw[:60]!r} states no answer")


def _all(verdicts: Sequence[ItemScore]) -> ItemScore:
    if any(v.value == 0 for v in verdicts):
        return scored(0.0)
    open_ = [v for v in verdicts if v.value is None]
    return open_[0] if open_ else scored(1.0)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    if not pairs:
        return None
    return sum(second for _, second in pairs) / sum(first for first, _ in pairs)
