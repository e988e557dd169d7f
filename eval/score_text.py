"""Scores of one answer against one reference; plain Python, checked on values worked out by hand.

| score    | of              | is                                                             |
|----------|-----------------|----------------------------------------------------------------|
| yes_no   | closed          | the one of yes / no that the answer states; None: unparsed     |
| letter   | multiple choice | the option letter that the answer states; None: unparsed       |
| choice   | multiple choice | that letter, or the one option whose text is stated            |
| exact    | open            | equal after normalising (case, punctuation, articles, spaces)  |
| token_f1 | open, caption   | harmonic mean of token precision and recall, as in SQuAD       |
| rouge_l  | caption         | F1 of the longest common subsequence of tokens                 |
| recall   | caption         | share of the stated facts whose words all appear               |

An unparsed answer is wrong in every headline number, and its rate is reported beside it.
"""

import re
from collections import Counter
from collections.abc import Mapping

ARTICLES = {"a", "an", "the"}
_STATED = re.compile(r"\b(yes|no)\b(?!-)")
# All of them but a "no" before a noun.
_ALONE = re.compile(r"\byes\b(?!-)|\bno\b(?!-)(?=\s*(?:[^\w\s]|$|\n|(?:or|and|nor|but)\b))")
_NO_ANSWER = re.compile(
    r"\bno (?:idea|answer|clue|opinion|comment|way (?:to|of))\b|\bneither yes nor no\b"
    r"|\b(?:cannot|can't|could not|not) (?:\w+ )?(?:yes or no|yes|no)\b(?! )"
)


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers without articles: "The X-ray, 3.5 cm" -> x ray 3.5 cm."""
    found = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.lower())
    return [word for word in found if word not in ARTICLES]


def yes_no(answer: str) -> str | None:
    """ "yes" or "no" when the answer states exactly one of them as a whole word, else None.

    A "no" before a noun is no statement beside a "yes": "Yes, there is no fracture" is yes. Nor is
    "no idea", or "cannot say yes". The released rule looks for substrings, so there "normal" and
    "unknown" count as no; not here.
    """
    text = _NO_ANSWER.sub(" ", answer.lower())
    alone = set(_ALONE.findall(text))
    found = alone or set(_STATED.findall(text))
    return found.pop() if len(found) == 1 else None


def letter(answer: str, *, options: str) -> str | None:
    """The option letter if exactly one is stated: "B", "(b)", "B: CT", "it is B"; else None.

    A capital that stands alone always counts; a small one only when it is the whole answer, because
    "a" is mostly an article. So is a leading "A " before a word: "A lung nodule" names no option.
    """
    bare = answer.strip().strip("().:").upper()
    if len(bare) == 1 and bare in options:
        return bare
    text = re.sub(r"\bA(?= (?!or\b|and\b)[a-z])", " ", answer)
    found = {found for found in re.findall(r"\b([A-Z])\b", text) if found in options}
    return found.pop() if len(found) == 1 else None


def options(prompt: str) -> dict[str, str]:
    """Letter -> text of the options a question lists, "A: CT" or "B) MRI", one a line or in turn.

    {} unless they are A, B, C ... without a gap: then nothing is known of them.
    """
    return {letter: prompt[start:end] for letter, start, end in spans(prompt)}


def spans(prompt: str) -> list[tuple[str, int, int]]:
    """(letter, start, end) of the texts of the options, [] where they cannot be told."""
    marks = list(re.finditer(r"(?:^|(?<=[\s(]))([A-H])\s*[:.)]\s*", prompt))
    first = next((n for n, mark in enumerate(marks) if mark[1] == "A"), None)
    if first is None:
        return []
    marks, found = marks[first:], []
    ends = [mark.start() for mark in marks[1:]] + [len(prompt)]
    for mark, end in zip(marks, ends, strict=True):
        text = prompt[mark.end() : end]
        inner = text.strip(" \n\t,;(")
        start = mark.end() + text.find(inner)
        found.append((mark[1], start, start + len(inner)))
    gapless = [mark[1] for mark in marks] == list("ABCDEFGH"[: len(marks)])
    return found if gapless and len(found) > 1 and all(a < b for _, a, b in found) else []


def choice(answer: str, known: Mapping[str, str], *, letters: str) -> str | None:
    """The letter stated, else that of the one option whose whole text the answer has; else None.

    `known`: letter -> text, {} where the question's options cannot be read; then any of `letters`.
    """
    stated = letter(answer, options="".join(known) or letters)
    if stated or not known:
        return stated
    said = f" {' '.join(tokens(answer))} "
    named = {x for x, text in known.items() if f" {' '.join(tokens(text))} " in said}
    # "left lung" is also in "left lung base": an option inside another named one is not named.
    texts = {x: f" {' '.join(tokens(known[x]))} " for x in named}
    named = {x for x in named if not any(texts[x] in t != texts[x] for t in texts.values())}
    return named.pop() if len(named) == 1 else None


def exact(answer: str, reference: str) -> float:
    """1.0 when both are the same tokens, else 0.0."""
    return float(tokens(answer) == tokens(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the token multisets. "left lung" against "the left lower lung": P 1, R 2/3, F1 0.8."""
    ours, theirs = tokens(answer), tokens(reference)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence. "y x" against "x y": LCS 1, so 0.5."""
    ours, theirs = tokens(answer), tokens(reference)
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs, start=1):
            best = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], best
    return _f1(row[-1], len(ours), len(theirs))


def recall(answer: str, facts: list[str]) -> float:
    """Share of `facts` all of whose words are in the answer; 1.0 without facts."""
    if not facts:
        return 1.0
    said = set(tokens(answer))
    return sum(set(tokens(fact)) <= said for fact in facts) / len(facts)


def _f1(common: int, ours: int, theirs: int) -> float:
    if not ours and not theirs:
        return 1.0  # nothing asked and nothing said
    return 2 * common / (ours + theirs)
