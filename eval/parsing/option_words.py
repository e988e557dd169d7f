"""Finds the options of a question by their words in an answer.

    A: left lung, B: CT, C: 2     "The left lung." -> A     "a PET-CT" -> none     "2 cm" -> none

Articles are left out, and an option's text inside a longer name is not that option.
"""

import dataclasses
import re
from collections.abc import Mapping

from medmax_jax.eval.parsing import answer_context as context

_QUANTITY = re.compile(  # "2 cm", "5 years": a measurement, not the option "2"
    r"\s*(?:-\s*)?(?:[cm]?m|%|°|kg|g|mg|ml|l|hu|t|tesla|kv|years?|months?|weeks?|days?|hours?|"
    r"minutes?|times|x)(?!\w)",
    re.IGNORECASE,
)
_DISTANCE = re.compile(r" (?:away|from|above|below|proximal|distal|anterior|posterior)\b", re.I)
_NUMBERED = re.compile(r"(?:(?:^|\n)\s*|\b(?:step|figure|fig\.?|slice|image|panel|part) )$", re.I)
_EVALUATED = re.compile(r"\b(?:that's|that is|you're|you are|all|quite) $", re.I)  # "right"
_WORD = re.compile(r"\d+(?:[.,]\d+)?|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+")


@dataclasses.dataclass(frozen=True)
class Mention:
    """An option in a text: by its letter, or by its words."""

    letter: str
    start: int
    end: int
    by_letter: bool
    certain: bool = True  # not certain: a capital that may stand for something else


def words_of(text: str) -> tuple[str, ...]:
    """Return the lower-case words without articles: "The left lung." -> (left, lung)."""
    return tuple(word for word, _, _ in word_spans(text))


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """Return lower-case words and positions, without articles; "Hepatitis A" keeps its letter."""
    spans = []
    for match in _WORD.finditer(text):
        word = match[0]
        if word.lower() in ("the", "an"):
            continue
        if word == "a" and re.match(r"\s+\w", text[match.end() : match.end() + 3]):
            continue
        if word == "A" and re.search(
            r"(?:^|[.!?:\n])\s*$", text[max(0, match.start() - 3) : match.start()]
        ):
            if re.match(r"\s+\w", text[match.end() : match.end() + 3]):
                continue
        spans.append((word.lower(), match.start(), match.end()))
    return spans


def words_by_letter(options: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return letter -> words; where all other options have one line, the last has one too."""
    letters = list(options)
    single = all("\n" not in options[letter].strip() for letter in letters[:-1])
    words_by_letter = {}
    for letter in letters:
        text = options[letter].strip()
        text = text.split("\n")[0] if letter == letters[-1] and single else text
        words = words_of(context.normalize(text))
        if words:
            words_by_letter[letter] = words
    return words_by_letter


def begins_with(text: str, words: tuple[str, ...] | None) -> bool:
    """Return whether a text begins with an option's words."""
    return bool(words) and words_of(text[: 40 + 20 * len(words)])[: len(words)] == words


def named_options(text: str, options: Mapping[str, tuple[str, ...]]) -> list[Mention]:
    """Return the options whose complete text is there; one inside a longer one is left out."""
    spans, mentions = word_spans(text), []
    places: dict[str, list[int]] = {}
    for index, (word, _, _) in enumerate(spans):
        places.setdefault(word, []).append(index)
    for letter, words in options.items():
        for index in places.get(words[0], ()):
            candidate = spans[index : index + len(words)]
            if tuple(word for word, _, _ in candidate) != words:
                continue
            if not re.search(r"[;!?\n]", text[candidate[0][1] : candidate[-1][2]]):
                mentions.append(Mention(letter, candidate[0][1], candidate[-1][2], False))
    return [mention for mention in mentions if not _is_part(text, mention, mentions)]


def _is_part(text: str, mention: Mention, mentions: list[Mention]) -> bool:
    """Return whether an option's text is only part of a longer name: "PET-CT", "left lung base"."""
    size = mention.end - mention.start
    if any(
        other.start <= mention.start and mention.end <= other.end and other.end - other.start > size
        for other in mentions
    ):
        return True
    if _has_other_sense(text, mention):
        return True
    before = re.search(r"\w[-/+&]$", text[max(0, mention.start - 2) : mention.start])
    after = re.match(r"[/+&]\w|-(?!Aufnahme|Bild|Untersuchung|Scan)[A-Z]", text[mention.end :][:14])
    return bool(
        (before and not any(other.end == mention.start - 1 for other in mentions))
        or (after and not any(other.start == mention.end + 1 for other in mentions))
    )


def _has_other_sense(text: str, mention: Mention) -> bool:
    """Return whether a number or "right" is no option: "T2", "2. Liver", "that's right".

    A measurement is no count ("2 cm" where the option is "2") and a distance no size.
    """
    named = text[mention.start : mention.end]
    before = text[max(0, mention.start - 12) : mention.start]
    if named.lower() == "right":
        return _EVALUATED.search(before) is not None
    if not named.isdecimal():
        return named[0].isdecimal() and _DISTANCE.match(text, mention.end) is not None
    listed = _NUMBERED.search(before) and re.match(r"[.):]\s", text[mention.end : mention.end + 2])
    joined = re.search(r"[^\W\d_]-?$", before)
    return bool(listed or joined or _QUANTITY.match(text, mention.end))
