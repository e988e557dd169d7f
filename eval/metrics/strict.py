"""Scores one answer strictly; totals drop no answer and guess no verdict.

scored     the answer states something that can be compared with the reference
unparsed   the model's answer cannot be parsed: wrong, and at best right
unscored   the judge or the scorer failed, not the model: counted as worst, and at best right
read by judge  cannot be parsed, and all votes of a judge agree on what it states: scored

value      unparsed and unscored at their worst  ]  the truth is between `value` and `best`;
best       unparsed and unscored at their best   ]  `scored_only` is the value if they are dropped
"""

import dataclasses
import functools
import re
from collections.abc import Hashable, Sequence

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.parsing import answer_parser, yes_no_parser

SCORED, UNPARSED, UNSCORED = "scored", "unparsed", "unscored"
JUDGE_READ = "read by judge"
MIN_SCORE, MAX_SCORE = 1.0, 10.0  # the range of a judge's score in a comparison

# Not a digit of a word or a unit: T2, cm3, mm^2.
_NUMBER = re.compile(r"(?<![\w.^])[-+]?(?:\d[\d,.]*|\.\d+)(?:[eE][-+]?\d{1,2}\b)?", re.ASCII)
_NUMERAL = re.compile(
    r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,30})?(?:\.\d{0,30})?(?:[eE][-+]?\d{1,2})?", re.ASCII
)


class StrictError(ValueError):
    """Raised for scores that cannot be computed; the message names the value and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemScore:
    """Holds the score of one answer; `value` is None where it is unparsed or unscored.

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
    """Holds the total of many scores; `scored_only` is None when nothing was scored."""

    n: int
    n_unparsed: int
    n_unscored: int
    value: float
    best: float
    scored_only: float | None


def scored(value: float) -> ItemScore:
    """Return the score of a known value."""
    return ItemScore(status=SCORED, value=float(value), low=float(value), high=float(value))


def read_by_judge(value: float) -> ItemScore:
    """Return the score of an answer that only a judge could read."""
    return dataclasses.replace(scored(value), status=JUDGE_READ)


def unparsed(why: str) -> ItemScore:
    """Return the score of an answer that the model wrote and that cannot be parsed."""
    return ItemScore(status=UNPARSED, value=None, low=0.0, high=1.0, why=why)


def unscored(why: str, *, low: float = 0.0, high: float = 1.0) -> ItemScore:
    """Return the score of an answer that a judge or scorer failed to score."""
    return ItemScore(status=UNSCORED, value=None, low=low, high=high, why=why)


# The same answers are scored for the records, the summary, its baselines, slices and pages.
@functools.lru_cache(maxsize=2**16)
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


def number(raw: str, answer: str) -> ItemScore:
    """Score a numeric question by its relative accuracy, max(0, 1 - |x - reference| / |reference|).

    number("about 90 mL", "100") is 0.9; number("3 to 5 cm", "4") is unparsed. A reference of 0
    accepts 0 alone.
    """
    expected = parse_number(answer)
    if expected is None:
        raise StrictError(f"answer {answer!r} is not one number; fix the row")
    parsed = parse_number(raw)
    if parsed is None:
        return unparsed(f"{raw[:60]!r} does not state one number")
    return scored(relative_accuracy(parsed, expected))


def relative_accuracy(value: float, reference: float) -> float:
    """Return max(0, 1 - |value - reference| / |reference|); of a reference of 0 whether equal."""
    if reference == 0:
        return float(value == 0)
    return max(0.0, 1.0 - abs(value - reference) / abs(reference))


def parse_number(text: str) -> float | None:
    """Parse the number that an answer states; None for none, for several and for a range.

    "1,234.5 mm" is 1234.5, and "-2e3" is -2000; "12 of 20", "3-5" and "1.234,5" are None. The same
    number may be repeated. A digit of a word or a unit is no number: "T2", "cm3", "mm^2".
    """
    text = re.sub(r"(?<=\d)\s*[x×*]\s*(?=\d)", " ", text.replace("\u2212", "-"))
    if re.search(r"\d\s*\^", text):
        return None
    found = [match.rstrip(".,") for match in _NUMBER.findall(text)]
    if not found or not all(map(_NUMERAL.fullmatch, found)):
        return None
    values = {float(numeral.replace(",", "")) for numeral in found}
    return values.pop() if len(values) == 1 else None


def parse_correctness(reply: str) -> ItemScore:
    """Parse a judge's reply in the MedMax release's form: the last "Correctness: 0" or "1".

    Bold marks are allowed. "**Correctness:** 1" is 1, "Correctness: 1 ... Correctness: 0" is 0;
    "Correctness: 10" and "0.5" are no verdicts, nor is a verdict inside a judge's reasoning text.
    Replies of eval/metrics/llm_judge.py have a form of their own.
    """
    plain = re.sub(r"[*_`\"']", "", reasoning.final_answer(reply) or "")
    verdicts = re.findall(r"\bcorrectness\s*:\s*([01])(?![\w.]*\d)\b", plain, re.IGNORECASE)
    return (
        scored(float(verdicts[-1])) if verdicts else unscored(f"{reply[:60]!r} contains no verdict")
    )


def parse_score_pair(reply: str) -> tuple[float, float] | None:
    """Parse the scores of assistants 1 and 2 in the release's form: two numbers from 1 to 10.

    "8, 7", "8  7", "**8 7**" and "Assistant 1: 8 Assistant 2: 7" too; "8/10 7/10" has four numbers
    and is rejected: an ambiguous reply is not guessed.
    """
    final = reasoning.final_answer(reply) or ""
    line = next((line for line in final.splitlines() if line.strip()), "")
    text = re.sub(r"\bassistant [12]\b", " ", line, flags=re.IGNORECASE)
    numbers = re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w])", text, re.ASCII)
    scores = [float(number) for number in numbers]
    if len(scores) != 2 or not all(MIN_SCORE <= score <= MAX_SCORE for score in scores):
        return None
    return scores[0], scores[1]


def total(item_scores: Sequence[ItemScore]) -> Total:
    """Return the mean with bounds over all item scores."""
    if not item_scores:
        raise StrictError("item_scores is empty: there are no answers to score")
    values = [v.value for v in item_scores if v.value is not None]
    states = [v.status for v in item_scores]
    return Total(
        n=len(item_scores),
        n_unparsed=states.count(UNPARSED),
        n_unscored=states.count(UNSCORED),
        value=sum(v.lower for v in item_scores) / len(item_scores),
        best=sum(v.upper for v in item_scores) / len(item_scores),
        scored_only=sum(values) / len(values) if values else None,
    )


def all_correct_by_key(
    item_scores: Sequence[ItemScore], keys: Sequence[Hashable]
) -> dict[Hashable, ItemScore]:
    """Return key -> right only if all of its questions are: ProbMed's pairs.

    ProbMed poses one question about each thing in an image and one about a thing that is absent, so
    the key is (image, question type): a model that answers yes to everything scores nothing. One
    wrong answer decides, even if others are unscored.
    """
    if len(item_scores) != len(keys):
        raise StrictError(f"{len(item_scores)} scores but {len(keys)} keys; pass one key per score")
    by_key: dict[Hashable, list[ItemScore]] = {}
    for key, item_score in zip(keys, item_scores, strict=True):
        by_key.setdefault(key, []).append(item_score)
    return {key: _all(key_scores) for key, key_scores in by_key.items()}


def grouped_accuracy(
    item_scores: Sequence[ItemScore], image_names: Sequence[str], kinds: Sequence[str]
) -> dict[str, Total]:
    """Return question type -> accuracy over images of `all_correct_by_key`, and "overall"."""
    keys = list(zip(image_names, kinds, strict=True))
    by_key = all_correct_by_key(item_scores, keys)
    by_kind = {
        kind: [v for (_, k), v in by_key.items() if k == kind] for kind in dict.fromkeys(kinds)
    }
    return {kind: total(kind_scores) for kind, kind_scores in by_kind.items()} | {
        "overall": total(list(by_key.values()))
    }


def comparison(pairs: Sequence[tuple[float, float] | None]) -> dict[str, float | int | None]:
    """Summarize a judge's (reference, model) scores, None for an unscored answer.

    `ratio_of_means` does not become large when one reference is rated low, as the mean of ratios
    does; its bounds give unscored answers 1 of 10 against 10 of 10, and the reverse.
    """
    if not pairs:
        raise StrictError("pairs is empty: there are no judged answers to compare")
    scored_pairs = [pair for pair in pairs if pair is not None]
    for pair in scored_pairs:
        if not all(MIN_SCORE <= score <= MAX_SCORE for score in pair):
            raise StrictError(f"scores {pair} must be between {MIN_SCORE:g} and {MAX_SCORE:g}")
    missing, ratios = len(pairs) - len(scored_pairs), [b / a for a, b in scored_pairs]
    return {
        "n": len(pairs),
        "n_unscored": missing,
        "mean_of_ratios": sum(ratios) / len(ratios) if ratios else None,
        "ratio_of_means": _ratio(scored_pairs),
        "worst": _ratio(scored_pairs + [(MAX_SCORE, MIN_SCORE)] * missing),
        "best": _ratio(scored_pairs + [(MIN_SCORE, MAX_SCORE)] * missing),
        "win": sum(b > a for a, b in scored_pairs),
        "tie": sum(b == a for a, b in scored_pairs),
        "loss": sum(b < a for a, b in scored_pairs),
    }


def image_similarity_summary(
    cosines: Sequence[Sequence[float]], *, missing_score: float
) -> dict[str, float | None]:
    """Summarize the similarities of each answer's images, () for none.

    An answer without an image gets `missing_score`. `first` is the first image over the answers
    with an image, as published; `with_missing` is over all.
    """
    if not cosines:
        raise StrictError("cosines is empty: there are no answers to score")
    present = [answer_cosines for answer_cosines in cosines if answer_cosines]
    best = [max(answer_cosines, default=missing_score) for answer_cosines in cosines]
    first = [answer_cosines[0] if answer_cosines else missing_score for answer_cosines in cosines]
    return {
        "coverage": len(present) / len(cosines),
        "first": sum(values[0] for values in present) / len(present) if present else None,
        "with_missing": sum(first) / len(cosines),
        "best_of_all": sum(best) / len(cosines),
    }


def _matched(task: str, raw: str, answer: str, prompt: str) -> ItemScore:
    expected = parse_answer(task, answer, prompt)
    if expected is None:
        raise StrictError(f"answer {answer!r} is not an answer to a {task} question; fix the row")
    parsed = parse_answer(task, raw, prompt)
    return scored(parsed == expected) if parsed else unparsed(f"{raw[:60]!r} states no answer")


def _all(item_scores: Sequence[ItemScore]) -> ItemScore:
    if any(v.value == 0 for v in item_scores):
        return scored(0.0)
    undecided = [v for v in item_scores if v.value is None]
    return undecided[0] if undecided else scored(1.0)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    if not pairs:
        return None
    return sum(second for _, second in pairs) / sum(first for first, _ in pairs)
