"""Validate generated answers and decide which are kept: three filters, each with its threshold.

    filter      closed, mcq, count, location, open       caption, report, generation (free text)
    margin      nats per token by which the answer is more likely than the best distractor
    agreement   share of the other samples that equal it     mean F1 of its words with theirs
    order       share of the orders in which it is chosen over its distractors: mcq: each option
                is once in each place; others: the image before and after the question

    distractors the other options; other values, which       answers to the same kind of question
                exclude the answer                           about other images

The answer is the sample that agrees most with the others, the first of several. Every score is
computed from evidence that does not depend on a threshold.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from medmax_jax.data.analysis.near_duplicates import normalized_words
from medmax_jax.data.annotation import kinds
from medmax_jax.data.annotation.kinds import KINDS, LETTERS
from medmax_jax.data.annotation.questions import Question
from medmax_jax.endpoints import reasoning
from medmax_jax.models.tokenizer import Tokenizer

FILTERS = ("margin", "agreement", "order")
CHARS_PER_TOKEN = (
    8  # an answer of an endpoint with more characters per token of its bound is not read
)
_BAD_CHARACTERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff\ufffd]")  # all but line feed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The least score of each filter; margin None: not measured."""

    margin: float | None
    agreement: float
    order: float


def read_answer(question: Question, reply: str | None, tokenizer: Tokenizer | None) -> str:
    """Return the answer in a reply, or "" where it is not a usable answer to the question.

    It must be complete, without control tokens or characters, and within the bound of its kind; a
    closed question requires yes or no, one with options a letter of theirs, a count a number.
    Without a tokenizer, tokens are not counted.
        (mcq, "B: CT")  ->  "B";  (closed, "Yes.")  ->  "yes";  (count, "many")  ->  ""
    """
    kind = KINDS[question.kind]
    if reply is None or len(reply) > kind.max_tokens * CHARS_PER_TOKEN:
        return ""
    text = (reasoning.final_answer(reply) or "").replace("\r\n", "\n").strip()
    if not text or _BAD_CHARACTERS.search(text):
        return ""
    match question.kind:
        case "closed":
            word = re.match(r"(yes|no)\b", text, re.IGNORECASE)
            return word[1].lower() if word else ""
        case "mcq":
            letter = read_letter(text, len(question.options))
            return "" if letter is None else LETTERS[letter]
        case "count":
            number = re.fullmatch(r"(\d{1,4})(?: [a-z]+)?\.?", text, re.IGNORECASE)
            return number[1] if number else ""
        case "location":
            side = re.search(r"\b(left|right)\b", text, re.IGNORECASE)
            return side[1].lower() if side else ""
    complete = tokenizer is None or _is_text(text, kind.max_tokens, tokenizer)
    return text if complete else ""


def _is_text(text: str, max_tokens: int, tokenizer: Tokenizer) -> bool:
    """Return whether a text has only text tokens, and no more than the bound allows."""
    ids = tokenizer.encode(text)
    return len(ids) <= max_tokens and min(ids, default=0) >= tokenizer.vocab.text_start


def read_letter(text: str, count: int) -> int | None:
    """Return the number of the option whose letter begins a reply; None if none does."""
    match = re.match(r"\(?([A-Za-z])(?![A-Za-z])", text.strip())
    number = LETTERS.find(match[1].upper()) if match else -1
    return number if 0 <= number < count else None


def similarity(question: Question, one: str, other: str) -> float:
    """Return how much two answers agree: 1 or 0, of free text the F1 of their words."""
    if KINDS[question.kind].is_free_text:
        return word_f1(one, other)
    return float(normalized_words(one) == normalized_words(other))


def word_f1(one: str, other: str) -> float:
    """Return the F1 of the words of two texts, counted with their number.

    ("a CT of the chest", "CT of the head")  ->  3 common words of 5 and of 4: 2/3
    """
    a, b = Counter(normalized_words(one)), Counter(normalized_words(other))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


def agreement(question: Question, answers: Sequence[str]) -> tuple[str, float]:
    """Return (answer, mean agreement with the other samples); an unusable sample agrees with none.

    ["MRI", "CT", "MRI", ""]  ->  ("MRI", 1/3)
    """
    best = ("", -1.0)
    for n, answer in enumerate(answers):
        if answer:
            others = [*answers[:n], *answers[n + 1 :]]
            total = sum(similarity(question, answer, other) for other in others if other)
            score = total / len(others)
            best = (answer, score) if score > best[1] else best
    return best if best[0] else ("", 0.0)


def margin(likelihoods: Sequence[float]) -> float:
    """Return the first log-likelihood less the largest of the others."""
    return likelihoods[0] - max(likelihoods[1:])


def nearest(question: Question, reply: str | None, texts: Sequence[str]) -> int | None:
    """Return which of the texts agrees most with a reply; None if none does.

    ("Yes, it is.", ["yes", "no"]) of a closed question  ->  0
    """
    answer = read_answer(question, reply, None)
    scores = [similarity(question, answer, text) for text in texts]
    return scores.index(max(scores)) if answer and max(scores) > 0 else None


def order_share(picks: Sequence[int | None]) -> float:
    """Return the share of the orders in which option 0, the answer, was chosen."""
    return sum(pick == 0 for pick in picks) / len(picks)


def failed(scores: dict[str, float], thresholds: Thresholds) -> list[str]:
    """Return the filters that reject an answer with these scores, in the order of FILTERS."""
    limits = dataclasses.asdict(thresholds)
    return [
        name for name in FILTERS if limits[name] is not None and not scores[name] >= limits[name]
    ]


def contradicted(question: Question, answer: str, stated: dict[str, set[str]]) -> bool:
    """Return whether an answer contradicts what the documents of the image state."""
    if question.kind == "mcq":
        answer = question.options[LETTERS.index(answer)]
    if question.stated:
        return answer != question.stated
    return question.kind != "closed" and kinds.contradicts(stated, answer)
