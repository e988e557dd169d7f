"""Parses which option, or which of yes and no, an answer states; None where it states none.

    1  the complete answer   "B", "(b)", "B: MRI", "MRI"
    2  the last explicit     <answer>B</answer>, \\boxed{B}, "Answer: B", "the answer is MRI",
       statement             "I choose B", "B is correct"
    3  lines and labels      "B" alone on a line, "B. Pneumothorax. ..." at the start
    4  the one letter        "It is B because ..."; without any letter, the one option whose
       mentioned             complete text is there

A wrong parse is worse than none: a phrase that the answer denies, asks about or assumes
(eval/parsing/answer_context.py) is never read, several candidates at one level are not decided by
the next
level, and the article "a" and letters of other names (hepatitis B, Kerley B lines) are no letters.
Reasoning text is left out first (medmax_jax/endpoints/reasoning.py).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.parsing import answer_context as context
from medmax_jax.eval.parsing import option_words, yes_no_parser
from medmax_jax.eval.parsing.answer_context import ANSWER, END_ANSWER

LETTERS = "ABCDEFGHIJ"  # of options that cannot be read from the question
AMBIGUOUS = "?"
MAX_LISTED = 30  # options in the sentence of a statement
MAX_MENTIONS = 300  # of options; of an answer with more, only explicit statements are read

_CHOOSE = re.compile(
    r"\b(?:choose|chose|choosing|select|selected|selecting|pick|picked|opt for|go with|going with|"
    r"vote for|settle (?:on|for)|"
    r"(?:leaves|leaving)(?: us)?(?: with)?(?: only| just)?|elijo|wähle|choisis|scelgo)\s+"
    r"|(?<![不没未别])(?:故选|应选|应该选|选择|選擇|我选|选|選)(?![项項])\s*:?\s*",
    re.IGNORECASE,
)
_HENCE = re.compile(
    r"\b(?:therefore|thus|hence|so|in conclusion|in summary|to conclude|overall|finally|ergo|"
    r"deshalb|"
    r"also|por lo tanto|donc|quindi)\b[,:]?\s*(?:(?:it|this)(?:'s| is| must be)\s+)?",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:[\s\"'(\[{<:]|\b(?:option|choice|letter|answer|alternative|alternativa|opción|opção|letra|"
    r"the|indeed|clearly|probably|likely|most likely|definitely|therefore|thus|still|simply|just|"
    r"actually|"
    r"certainly|obviously|la|die|選択肢|选项|選項)\b(?!-))*",
    re.IGNORECASE,
)
_CONNECT = (
    r"because|since|as|for|due|and|or|nor|but|is|was|are|were|would|could|can|should|will|must|"
    r"seems?|"
    r"looks?|appears?|fits?|matches|shows?|has|have|does|doesn't|isn't|rather|over|than|then|not|"
    r"which|"
    r"based|given|here|instead|more|most|best|correct|right|wrong|incorrect|therefore|in|it is|y|"
    r"et|und|oder|"
    r"e|ou|porque|parce|weil|denn|perché|ist|es|est|è|é|sein|입니다|이다|です|だ|でしょう"
)
# What may follow a letter that stands for an option, unlike "B cell" or "A CT scan".
_BOUND = (
    r"(?=\s*(?:$|[.,;:!?()\]}\"\n\u0002\u0003。、！？]|'(?!\w)|[=→&/|]|[是为為正对對项項不错錯非だでがはをと입이가은는]))"
    rf"|(?=\s+[-–—])|(?=[-–—](?!\w))|(?=\s+(?:{_CONNECT})(?![\w-]))"
)
_HARD = r"(?=\s*(?:$|[.:;!?)\]}\"\n\u0002\u0003]))"  # after the letter I, which is mostly a pronoun
_ALONE_WITH_TEXT = re.compile(  # "A (CT)" and not "A (large) mass"
    r"\s*\([^()\n]*\)\s*(?:$|[.,;:!?\n\u0003]|(?:is|was|would|because|since|and|or|but)\b)"
)
_JOIN = (
    r"\s*[)\]\"']*\s*(?:,|/|&|\+|\band/or\b|\band\b|\bor\b|\bnor\b|\by\b|\bet\b|\bund\b|\boder\b"
    r"|\bou\b|和|与|或|、)+\s*"
)
_JOINED = re.compile(
    rf"{_JOIN}(?:(?:the|a|an|option|choice|also|maybe|both)\s+)*[(\[\"']*$", re.IGNORECASE
)
_SINGULAR = re.compile(r"\s*(?:\([^()]*\)\s*)?(?:is|was|isn't|does|has)\b", re.IGNORECASE)
_NAME_BEFORE = re.compile(  # names that end in a letter: "vitamin D", "Stanford type B", "panel A"
    r"\b(?:vitamins?|hepatitis|types?|groups?|class|grades?|stages?|panels?|fig(?:ure|s)?\.?|"
    r"images?|"
    r"arrows?|labels?|labell?ed|structures?|regions?|zones?|lines?|points?|segments?|factors?|"
    r"parts?|"
    r"plan|leads?|levels?|areas?|lobes?|stanford|kerley|protein|influenza|strain|serotype|subtype|"
    r"phase|variant|views?|series|cases?|patients?|position|row|column|slides?|box|marker|marked|"
    r"sites?|section|category|score|pattern|child|pugh|dukes|borrmann|weber|complex|antigen|nerve|"
    r"immunoglobulin|ig|troponin|hemoglobin|streptococcus|strep|interleukin|schedule)\s*$",
    re.IGNORECASE,
)
_NAME_AFTER = re.compile(
    r"[)\]\"']*\s+in the (?:figure|images?|photograph|panel|legend)\b"
    r"|\s+(?:cells?|lines?|mode|waves?|lymphocytes?|symptoms?|arm|section|dimers?|virus|scan|"
    r"fibers?)\b"
    r"|\.\s?[a-z]{3,}|\.[A-Z]\b",
)
_LABEL = re.compile(
    r"\s*(?:[-*•]\s+)?[(\[\"']*(?:(?:option|choice)\s+)?([A-Za-z])[\"']*\s*(?:[)\]]\s*[:.\-–—,]?|"
    r"[:.;,]|[-–—](?=\s))\s*",
    re.I,
)
_BARE = re.compile(
    r"[\s\"'(\[{<.:\-•]*(?:\b(?:option|choice|"
    r"letter)\b\s*[:.]?\s*[(\[\"']*)?([A-Za-z])[\s\"')\]}>.:,;!?。]*",
    re.I,
)


_NUMERALS = "zero one two three four five six seven eight nine ten".split()


@dataclasses.dataclass(frozen=True)
class _Question:
    """Holds the letters of a question, and the words of each option; {} where not known."""

    letters: str
    words: Mapping[str, tuple[str, ...]]


def parse_choice(answer: str, options: Mapping[str, str], *, letters: str = LETTERS) -> str | None:
    """Return the letter of the option that an answer states, or None.

    `known`: letter -> text, {} where the question's options cannot be read; then any of `letters`.

    With A: CT and B: MRI: "A CT scan" -> A, "Not A but B" -> B, "an MRI" -> B, "A or B" -> None.
    """
    final = reasoning.final_answer(answer)
    if final is None or not final.strip():
        return None
    question = _Question("".join(options) or letters, option_words.words_by_letter(options))
    letter = _choice(context.normalize(final), question)
    return None if letter == AMBIGUOUS else letter


def _choice(text: str, question: _Question) -> str | None:
    """Return the letter, AMBIGUOUS, or None, of a normalized text."""
    plain = _unmarked(text)
    complete = _complete_answer(plain, question)
    if complete:
        return complete
    cut = len(text) > context.MAX_CHARS
    text = text[-context.MAX_CHARS :]
    mentions = _mentions(text, question)
    cut = cut or len(mentions) > MAX_MENTIONS
    mentions = mentions[-MAX_MENTIONS:]
    stated = _last_statement(text, mentions, question)
    if stated:
        return stated
    if cut:
        return None  # what the rest mentions is not known
    letter = _from_lines(text, mentions, question)
    if letter or not {("yes",), ("no",)} <= set(question.words.values()):
        return letter or _from_mentions(text, mentions, question)
    letters = [mention for mention in mentions if mention.by_letter]
    return _from_mentions(text, letters, question) or _yes_no_option(plain, question)


def _complete_answer(text: str, question: _Question) -> str | None:
    """Return the letter if the complete answer is a letter, an option's text, or both."""
    letters = set(re.sub(r"[\s.,;:!?()\[\]{}\"'✓✔✅☑→=>-]", "", text))
    if len(letters) == 1 and letters <= set(question.letters) and not re.search(r"\w\w", text):
        return letters.pop()  # "B", "(B)", and "B B B" of a model that repeats itself
    bare = _BARE.fullmatch(text)
    if bare and bare[1].upper() in question.letters:
        return bare[1].upper()
    if "\n" in text or len(text) > 1_000:
        return None
    label = _label(text, question)
    if label:
        rest = option_words.words_of(text[label.end :])
        if rest == question.words.get(label.letter):
            return label.letter
        if rest in question.words.values():
            return AMBIGUOUS  # "B: CT" where CT is A
    words = option_words.words_of(text)
    if len(words) == 1 and words[0] in _NUMERALS and words not in question.words.values():
        words = (str(_NUMERALS.index(words[0])),)
    named = [letter for letter, own in question.words.items() if own == words]
    if len(named) > 1:
        return AMBIGUOUS
    return named[0] if named else None


def _label(text: str, question: _Question, start: int = 0) -> option_words.Mention | None:
    """Return the letter that labels a line: "B. ", "(b) ", "C: "; not the "E. " of "E. coli"."""
    match = _LABEL.match(text, start)
    if not match or match[1].upper() not in question.letters:
        return None
    letter, rest = match[1].upper(), text[match.end() :]
    mark = match[0].rstrip()[-1]
    own = option_words.begins_with(rest, question.words.get(letter))
    if mark in ".;," and not own and (match[1].islower() or re.match(r"[a-z]", rest)):
        return None
    if mark == "," and (letter == "I" or not rest):
        return None
    if match[1].islower() and not own and mark not in ")]:":
        return None
    return option_words.Mention(letter, match.start(1), match.end(), True)


# Mentions, and what the text does with them.


@functools.lru_cache(maxsize=64)
def _letter_patterns(letters: str) -> tuple[re.Pattern, re.Pattern]:
    """Return (letters that stand for options, any capital of them)."""
    upper = f"[{letters}]"
    both = f"[{letters}{letters.lower()}]"
    noun = (
        r"(?i:\b(?:option|choice|answer|letter|alternative|alternativa|opción|opção|letra|réponse|"
        r"antwort)s?\b|选项|選項|選択肢)"
    )
    before = (
        r"(?i:\b(?:is|was|be|it's|that's|am|say|guess|think|believe|probably|likely|definitely|"
        r"maybe|"
        r"perhaps|certainly|surely|clearly|obviously|only|not|but|and|or|nor|neither|either|both|"
        r"than|"
        r"points? to|over|exclude|"
        r"excludes|reject|eliminate|choose|select|pick|with|favou?rs?|thus|so|hence|"
        r"therefore|versus|vs|except|like|towards?|sondern|sino|mais|mas|es|est|ist|è|é|oder|und|"
        r"ni|weder|noch)\b|[:,;=]|->|=>|→|\s[-–—]|"
        r"[是为為选選项項案择擇即故はが이가은는])"
    )
    certain = re.compile(
        rf"{noun}\s*[\"'(\[]*\s*(?P<a>{both})(?![\w'])(?:{_BOUND})"
        rf"|[(\[\"'](?P<b>{upper})[)\]\"']"
        rf"|{before}\s*[\"'(\[]*(?P<c>{upper})(?![\w'])(?:{_BOUND})"
        rf"|(?:^|[.!?\n\u0002]\s*|\s[-*•]\s+)[\"'(\[]*(?P<d>{upper})(?![\w'])(?:{_BOUND})"
        rf"|(?<![\w'\-])(?P<e>{upper})(?=[)\]])"
        rf"|(?<![\w'\-/])(?P<f>{upper})(?=\s+(?:is|was|would|seems|looks|appears|because|since|"
        rf"fits|matches|can|cannot|could)\b)",
    )
    return certain, re.compile(rf"(?<![\w'\-])({upper})(?![\w'])(?!-\w)")


def _mentions(text: str, question: _Question) -> list[option_words.Mention]:
    """Return all mentions in order; letters inside an option's text are part of that text."""
    named = option_words.named_options(text, question.words)
    certain, any_capital = _letter_patterns(question.letters)
    taken = [(m.start, m.end) for m in named if m.end - m.start > 1]
    inside = lambda position: any(start <= position < end for start, end in taken)  # noqa: E731
    places: dict[int, option_words.Mention] = {}
    position = 0
    while match := certain.search(text, position):
        group = match.lastgroup or "a"
        start, end = match.span(group)
        position = end
        if not inside(start) and _is_option_letter(text, start, end, group):
            places[start] = option_words.Mention(text[start].upper(), start, end, True)
    for match in any_capital.finditer(text):
        start, end = match.span(1)
        if start not in places and not inside(start) and _may_be_letter(text, start, end):
            places[start] = option_words.Mention(match[1], start, end, True, certain=False)
    return sorted([*places.values(), *named], key=lambda m: (m.start, m.end))


def _is_option_letter(text: str, start: int, end: int, group: str) -> bool:
    if _NAME_BEFORE.search(text, max(0, start - 24), start) or _NAME_AFTER.match(text, end):
        return group in "ab" and not _NAME_AFTER.match(text, end)
    if text[start] == "A" and group in "cd" and text[end : end + 2].strip()[:1] == "(":
        return _ALONE_WITH_TEXT.match(text, end) is not None
    if text[start] == "I" and group in "cdf":
        return re.compile(rf"{_HARD}|\s+is\b").match(text, end) is not None  # never a pronoun
    return True


def _may_be_letter(text: str, start: int, end: int) -> bool:
    if _NAME_BEFORE.search(text, max(0, start - 24), start) or _NAME_AFTER.match(text, end):
        return False
    if text[start] == "I":
        return re.compile(_HARD).match(text, end) is not None
    if text[start] == "A" and text[end : end + 2].strip()[:1] == "(":
        return _ALONE_WITH_TEXT.match(text, end) is not None
    return text[start] != "A" or re.compile(_BOUND).match(text, end) is not None


def _status(text: str, mentions: list[option_words.Mention]) -> list[str]:
    """Return "denied", "hypothetical", "possible" or "stated"; "A and B are wrong" denies both."""
    statuses = []
    for mention in mentions:
        if context.is_denied(text, mention.start, mention.end):
            statuses.append("denied")
        elif context.is_hypothetical(text, mention.start, mention.end):
            statuses.append("hypothetical")
        elif context.is_possible_after(text, mention.end):
            statuses.append("possible")
        else:
            statuses.append("stated")
    shared = False  # the predicate after the next mention is of several: "A, B and C are wrong"
    for index in range(len(mentions) - 2, -1, -1):
        mention, other = mentions[index], mentions[index + 1]
        between = text[mention.end : other.start]
        after = shared or context.is_denied_after(text, other.end)
        one = not shared and "," in between and not re.search(r"and|or|&", between)
        one = one and _SINGULAR.match(text, other.end)
        shared = bool(after and statuses[index + 1] == "denied" and not one)
        shared = shared and _is_same(text, mention, other, between)
        if shared:
            statuses[index] = "denied"
    return statuses


def _is_same(
    text: str, mention: option_words.Mention, other: option_words.Mention, between: str
) -> bool:
    """Return whether one predicate is of both: "A and B", "A (CT)", "A. CT"."""
    if _JOINED.match(between):
        return True
    attached = re.fullmatch(r"\s*[)\]]?\s*[:.(,\-–—\[]?\s*(?:the |a |an )?", between)
    return (
        mention.by_letter != other.by_letter and mention.letter == other.letter and bool(attached)
    )


# Explicit statements.


def _last_statement(
    text: str, mentions: list[option_words.Mention], question: _Question
) -> str | None:
    """Return the letter of the last explicit statement; AMBIGUOUS where it names several."""
    statements: list[tuple[int, str]] = []
    for match in re.finditer(f"{ANSWER}([^{ANSWER}{END_ANSWER}]*)", text):
        inner = match[1].strip()
        letter = _choice(inner, question) if inner else None
        statements.append((match.start(), letter or AMBIGUOUS))
    for pattern, words in ((context.CUE, True), (_CHOOSE, True), (_HENCE, False)):
        for match in list(pattern.finditer(text))[-context.MAX_CUES :]:
            if context.is_statement(text, match.start()):
                letter = _head(text, match.end(), mentions, question, words=words)
                if letter:
                    statements.append((match.start(), letter))
    statements += _affirmed(text, mentions)
    if not statements:
        return None
    position, letter = max(statements)
    if context.is_retracted(text, position):
        return AMBIGUOUS
    for mention in mentions:
        later = mention.start > position and mention.by_letter and mention.letter == letter
        if later and context.is_denied_after(text, mention.end):
            return AMBIGUOUS
    return letter


def _head(
    text: str, start: int, mentions: list[option_words.Mention], question: _Question, *, words: bool
) -> str | None:
    """Return what follows a cue: a letter, or an option's text at once or alone in the sentence."""
    end = context.sentence_span(text, min(start, len(text) - 1))[1] if start < len(text) else start
    at = _FILLER.match(text, start).end()
    letter = re.compile(
        rf"([{question.letters}{question.letters.lower()}])(?![\w'])(?:{_BOUND})"
    ).match(text, at)
    if letter and not _NAME_AFTER.match(text, letter.end()):
        return _labelled(text, letter.start(), letter.end(), mentions, question)
    own = re.compile(rf"([{question.letters}])\s+").match(text, at)
    if own and option_words.begins_with(text[own.end() :], question.words.get(own[1])):
        return own[1]  # "B pneumothorax"
    if not words:
        return None
    within = [m for m in mentions if at <= m.start < end]
    if all(m.by_letter for m in within) or len(within) > MAX_LISTED:
        return None
    pairs = zip(within, _status(text, within), strict=True)
    here = [m for m, status in pairs if status == "stated" and not m.by_letter]
    first = [m for m in here if text[at : m.start].strip(" \"'(").lower() in ("", "a", "an", "the")]
    if first and _first_alone(text, first[0], here):
        return first[0].letter
    named = {m.letter for m in here}
    return (named.pop() if len(named) == 1 else AMBIGUOUS) if named else None


def _first_alone(
    text: str, first: option_words.Mention, others: list[option_words.Mention]
) -> bool:
    """Return whether the first option after a cue is the only one of its list: not "CT or MRI"."""
    after = [m for m in others if m.start >= first.end]
    same = [m for m in others if m.start == first.start and m.letter != first.letter]
    return not same and not (after and _JOINED.match(text[first.end : after[0].start]))


def _labelled(
    text: str, start: int, end: int, mentions: list[option_words.Mention], question: _Question
) -> str | None:
    """Return a letter, unless it is denied, one of several, or has the text of another option."""
    letter = text[start].upper()
    if context.is_denied_after(text, end):
        return None
    after = [m for m in mentions if m.start >= end]
    letters = [m for m in after if m.by_letter]
    if letters and _JOINED.match(text[end : letters[0].start]):
        comma = "," in text[end : letters[0].start] and not re.search(
            r"and|or|&|/", text[end : letters[0].start]
        )
        if not (comma and context.is_hypothetical(text, letters[0].start, letters[0].end)):
            if not context.is_denied(text, letters[0].start, letters[0].end):
                return AMBIGUOUS
    if letters and re.fullmatch(r"[\s)\]\"']*[:.]\s*[(\[\"']*", text[end : letters[0].start]):
        if _status(text, letters[:1]) == ["stated"] and letters[0].letter != letter:
            return AMBIGUOUS  # "B.C"
    texts = [m for m in after if not m.by_letter]
    if texts and re.fullmatch(
        r"[\s)\]\"']*[:.,(\-–—]?\s*(?:the |a |an )?", text[end : texts[0].start]
    ):
        same = {m.letter for m in texts if m.start == texts[0].start}
        if letter not in same and not context.is_denied(text, texts[0].start, texts[0].end):
            return AMBIGUOUS
        further = [m for m in letters if m.start >= texts[0].end]
        if further and _JOINED.match(text[texts[0].end : further[0].start]):
            if _status(text, further[:1]) == ["stated"]:
                return AMBIGUOUS  # "B: MRI, A: CT"
    return letter


def _affirmed(text: str, mentions: list[option_words.Mention]) -> list[tuple[int, str]]:
    """Return (position, letter) of "B is the correct answer"; AMBIGUOUS where several are."""
    statements = []
    for index, mention in enumerate(mentions):
        if not mention.certain or not context.is_affirmed_after(text, mention.end):
            continue
        if context.is_denied(text, mention.start, mention.end) or _is_questioned(text, mention):
            continue
        before = mentions[index - 1] if index else None
        joined = before and _JOINED.match(text[before.end : mention.start])
        if joined and before.letter != mention.letter:
            statements.append((mention.start, AMBIGUOUS))
        else:
            statements.append((mention.start, mention.letter))
    return statements


def _is_questioned(text: str, mention: option_words.Mention) -> bool:
    return context.is_hypothetical(text, mention.start, mention.start)


# Lines and single mentions.


def _from_lines(text: str, mentions: list[option_words.Mention], question: _Question) -> str | None:
    """Return the letter of lines of one letter that agree, else of labelled lines not denied."""
    if context.is_retracted(text):
        return AMBIGUOUS
    lines = [line for line in re.split(f"[\n{ANSWER}{END_ANSWER}]", text) if line.strip()]
    bare = [
        m[1] for line in lines if (m := re.fullmatch(r"[\s\"'(\[]*([A-Z])[\s\"')\].:!]*", line))
    ]
    letters = {letter for letter in bare if letter in question.letters}
    if letters:
        if len(letters) > 1:
            return AMBIGUOUS
        letter = letters.pop()
        denied = [m for m in mentions if m.letter == letter and m.by_letter
                  and context.is_denied_after(text, m.end)]  # fmt: skip
        return AMBIGUOUS if denied else letter
    labels = [(line, label) for line in lines if (label := _label(line, question))]
    if not labels or labels[0][0] is not lines[0]:
        return AMBIGUOUS if len({label.letter for _, label in labels}) > 1 else None
    first, label = labels[0]
    kept = {label_.letter for line, label_ in labels if not _is_denied_line(line, label_, question)}
    if kept != {label.letter}:
        return AMBIGUOUS
    inner = _mentions(first, question)
    if any(m.letter != label.letter and context.is_possible_after(text, m.end) for m in mentions):
        return AMBIGUOUS  # "A; B is also possible"
    if any(m.letter != label.letter and _is_labelling(first, m) for m in inner):
        return AMBIGUOUS  # "A: 10 %, B: 80 %"
    return _labelled(first, label.start, label.start + 1, inner, question) or AMBIGUOUS


def _is_denied_line(line: str, label: option_words.Mention, question: _Question) -> bool:
    """Return whether a labelled line is denied: "A. Incorrect", "A: CT is wrong", "A. Mass: no"."""
    if context.is_denied_after(line, label.start + 1) or context.is_denied_after(line, label.end):
        return True
    own = [m for m in option_words.named_options(line, question.words) if m.letter == label.letter]
    return any(context.is_denied(line, m.start, m.end) for m in own)


def _is_labelling(text: str, mention: option_words.Mention) -> bool:
    """Return whether a letter labels something within a line, and is not denied."""
    labels = mention.by_letter and text[mention.end : mention.end + 1] in (":", "=")
    return labels and not context.is_denied(text, mention.start, mention.end)


def _from_mentions(
    text: str, mentions: list[option_words.Mention], question: _Question
) -> str | None:
    """Return the one option that is mentioned and not denied."""
    if context.is_refusal(text):
        return None
    by_status: dict[str, set[str]] = {"stated": set(), "denied": set(), "hypothetical": set()}
    loose, words = set(), set()
    for mention, status in zip(mentions, _status(text, mentions), strict=True):
        if status == "possible":
            return AMBIGUOUS
        if mention.by_letter and not mention.certain:
            loose |= {mention.letter} if status == "stated" else set()
        elif mention.by_letter:
            by_status[status].add(mention.letter)
        elif status == "stated":
            words.add(mention.letter)
        elif status == "denied":
            by_status["denied"].add(mention.letter)
    stated = by_status["stated"]
    if len(stated | loose) > 1 or (stated | loose | words) & by_status["denied"]:
        return AMBIGUOUS
    if stated:
        letter = next(iter(stated))
        return letter if not words or letter in words else AMBIGUOUS
    if len(words) == 1 and loose <= words:
        return next(iter(words))
    return AMBIGUOUS if words else None


def _unmarked(text: str) -> str:
    return text.replace(ANSWER, " ").replace(END_ANSWER, " ").strip()


def _yes_no_option(text: str, question: _Question) -> str | None:
    """Return the letter of yes or no, where these are the options of the question."""
    value = yes_no_parser.parse_yes_no(text)
    named = [letter for letter, words in question.words.items() if words == (value,)]
    return named[0] if len(named) == 1 else None
