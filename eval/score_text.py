"""Scores of one answer against one reference; plain Python, checked on values worked out by hand.

| score    | of              | is                                                             |
|----------|-----------------|----------------------------------------------------------------|
| yes_no   | closed          | the one of yes / no that appears as a word; None: unparsed     |
| letter   | multiple choice | the option letter that the answer states; None: unparsed       |
| exact    | open            | equal after normalising (case, punctuation, articles, spaces)  |
| token_f1 | open, caption   | harmonic mean of token precision and recall, as in SQuAD       |
| rouge_l  | caption         | F1 of the longest common subsequence of tokens                 |
| recall   | caption         | share of the stated facts whose words all appear               |

An unparsed answer is wrong in every headline number, and its rate is reported beside it.
"""

import re
from collections import Counter

ARTICLES = {"a", "an", "the"}


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers without articles: "The X-ray, 3.5 cm" -> x ray 3.5 cm."""
    found = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text.lower())
    return [word for word in found if word not in ARTICLES]


def yes_no(answer: str) -> str | None:
    """ "yes" or "no" when exactly one of them appears as a whole word, else None.

    The released rule looks for substrings, so there "normal" and "unknown" count as no; not here.
    """
    found = {word for word in re.findall(r"[^\W\d_]+", answer.lower()) if word in ("yes", "no")}
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
