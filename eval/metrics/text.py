"""Scores one answer against one reference, and reads the options of a question.

| score    | of            | is                                                                    |
|----------|---------------|-----------------------------------------------------------------------|
| exact    | open          | 1 if both are the same tokens                                         |
| token_f1 | open, caption | harmonic mean of the precision and recall of tokens                   |
| rouge_l  | caption, chat | ROUGE-L of the package rouge-score without stemming: F-measure of the |
|          |               | longest common subsequence of [a-z0-9]+, articles included            |
| recall   | caption       | share of the stated facts all of whose tokens are in the answer       |

`tokens` are of this project (no articles, numbers with decimals, "x-ray" is two), so exact and
token_f1 are not those of SQuAD's script, which joins "x-ray" to one. Only rouge_l has other tokens.
The parsers of options and of yes and no are eval/parsing/answer_parser.py and
eval/parsing/yes_no_parser.py.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
_LINE_MARK = re.compile(
    r"^[ \t]*(?:[-*•][ \t]+)?[(\[]?\**([A-Za-z])\**[ \t]*([:.)\]：．）、])\**[ \t]*", re.MULTILINE
)
_MARK = re.compile(r"(?:^|(?<=[\s(\[]))([A-Z])\s*([:.)\]：．）、])\s*")


def tokens(text: str) -> list[str]:
    """Return lower-case words and numbers without articles.

    "The X-ray, 3.5 cm" -> x ray 3.5 cm.
    """
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.lower())
    return [word for word in words if word not in ARTICLES]


def options(prompt: str) -> dict[str, str]:
    """Return letter -> text of the options of a question, like "A: CT" or "B) MRI".

    Options are one per line or consecutive. {} unless they are A, B, C ... without a gap: then
    nothing is known of them.
    """
    return {letter: prompt[start:end] for letter, start, end in option_spans(prompt)}


def option_spans(prompt: str) -> list[tuple[str, int, int]]:
    """Return (letter, start, end) of the texts of the options, [] where they cannot be determined.

    The options are the last list of the prompt: lines that begin with A, B, C ... in one style
    ("A:", "B)", "(c)"), else such marks in running text, else marks of several styles. So "type A."
    in the question is no option, nor is the "E." of the option "E. coli".
    """
    lines, inline = list(_LINE_MARK.finditer(prompt)), list(_MARK.finditer(prompt))
    for marks in (lines, inline):
        for style in dict.fromkeys(mark[2] for mark in reversed(marks)):
            same = [mark for mark in marks if mark[2] == style]
            for first in reversed(range(len(same))):
                if spans := _listed(prompt, same[first:]):
                    return spans
    starts = [n for n, mark in enumerate(inline) if mark[1] == "A"]
    return _listed(prompt, inline[starts[0] :]) if starts else []


def _listed(prompt: str, marks: Sequence[re.Match]) -> list[tuple[str, int, int]]:
    """Return the texts after marks that are A, B, C ... to the end; [] for any other marks."""
    letters = [mark[1] for mark in marks]
    alphabets = (string.ascii_uppercase, string.ascii_lowercase)
    if len(marks) < 2 or not any(letters == list(abc[: len(letters)]) for abc in alphabets):
        return []
    spans = []
    ends = [mark.start() for mark in marks[1:]] + [len(prompt)]
    for mark, end in zip(marks, ends, strict=True):
        text = prompt[mark.end() : end]
        inner = text.strip(" \n\t,;([")
        start = mark.end() + text.find(inner)
        spans.append((mark[1].upper(), start, start + len(inner)))
    return spans if all(start < end for _, start, end in spans) else []


def exact(answer: str, reference: str) -> float:
    """Return 1.0 when both are the same tokens, else 0.0."""
    return float(tokens(answer) == tokens(reference))


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of the token multisets.

    "left lung" against "the left lower lung": P 1, R 2/3, F1 0.8.
    """
    answer_tokens, reference_tokens = tokens(answer), tokens(reference)
    return _f1(
        sum((Counter(answer_tokens) & Counter(reference_tokens)).values()),
        len(answer_tokens),
        len(reference_tokens),
    )


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L (F-measure, no stemming) as the PyPI package rouge-score computes it.

    "the lung" against "the heart": the longest common subsequence is 1 of 2 and 2, so 0.5. As
    there, letters other than a to z separate tokens, and a text without tokens has 0.
    """
    answer_words, reference_words = (
        re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference)
    )
    if not answer_words or not reference_words:
        return 0.0
    row = [0] * (len(reference_words) + 1)
    for word in answer_words:
        diagonal = 0
        for j, other in enumerate(reference_words, start=1):
            best = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], best
    return _f1(row[-1], len(answer_words), len(reference_words))


def recall(answer: str, facts: list[str]) -> float:
    """Return the share of `facts` all of whose tokens are in the answer; 1.0 without facts."""
    if not facts:
        return 1.0
    answer_tokens = set(tokens(answer))
    return sum(set(tokens(fact)) <= answer_tokens for fact in facts) / len(facts)


def _f1(common: int, n_answer: int, n_reference: int) -> float:
    if not n_answer and not n_reference:
        return 1.0  # nothing expected and nothing stated
    return 2 * common / (n_answer + n_reference)
