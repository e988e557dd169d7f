"""Parses which of yes and no an answer states; None where it states neither, or both.

    1  the last explicit statement   "Answer: No", "the answer is yes", <answer>no</answer>
    2  sentences that begin with it  "No, it is not.", "Yes. ..."; those that disagree state nothing
    3  the one that stands alone     "I would say yes."
    4  no before a finding           "No pneumothorax is seen."
    5  the question as a statement   "The heart is not enlarged.", "There is a fracture."

"No" before what is no finding ("no image was provided", "no idea", "no doubt") is no answer. With
the question known, the finding must be one that it asks about, and a question about normality or
absence ("Are the lungs clear?") is not answered by "no effusion".
"""

import re
from collections import Counter

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.parsing import answer_context as context
from medmax_jax.eval.parsing.answer_context import ANSWER, END_ANSWER

AMBIGUOUS = "?"
YES, NO = "yes", "no"
# Of a complete answer, or before a comma or a full stop.
_FOREIGN = {
    YES: "yes|yep|yeah|sí|oui|ja|sim|sì|да|是|是的|对|對|はい|ええ|네|예|نعم|हाँ|evet|tak|vâng|ya",
    NO: "no|nope|nein|non|não|nao|нет|否|不是|不|不对|いいえ|아니요|아니오|아니|لا|नहीं|hayır|nie|"
    "không|"
    "tidak|nee",
}
_VALUE = {word: value for value, words in _FOREIGN.items() for word in words.split("|")}
# Of a complete answer only.
_COMPLETE = {
    **dict.fromkeys(
        ("y", "si", "true", "correct", "that's correct", "absolutely", "certainly"), YES
    ),
    **dict.fromkeys(("definitely", "of course", "it is", "there is", "indeed", "there are"), YES),
    **dict.fromkeys(("n", "false", "incorrect", "not seen", "none seen", "probably not"), NO),
    **dict.fromkeys(("absolutely not", "definitely not", "certainly not", "it is not"), NO),
    **dict.fromkeys(("there is not", "there isn't", "it isn't", "no evidence", "not present"), NO),
}
_WORDS = "|".join(sorted(_VALUE, key=len, reverse=True))
_STOP = r"(?!\.\s*\d)(?=\s*(?:$|[.,;:!)\]}\"\n\u0002\u0003。、！]|[-–—](?!\w)|\s[-–—]|'(?!\w)))"
_GO_ON = r"(?=\s+(?:because|since|as|it|it's|there|this|that|the|these|they|he|she|i|we|in)\b)"
_FIRST = r"(?:[\s\"'(\[{:>*•\-–—]|\b(?:wait|actually|hmm|well|sorry|correction)\b[,.:]?)*"
_LEAD = re.compile(rf"{_FIRST}(?P<word>{_WORDS})(?![\w-]){_STOP}", re.IGNORECASE)
_FIRST_LEAD = re.compile(rf"{_FIRST}(?P<word>{_WORDS})(?![\w-])(?:{_STOP}|{_GO_ON})", re.IGNORECASE)
_HEAD = re.compile(
    rf"[\s\"'(\[{{:]*(?:(?:a|an|indeed|clearly|probably|likely|most likely|definitely|therefore|"
    rf"thus|still|"
    rf"simply|certainly|also)\s+)*[\"'(]*(?P<word>{_WORDS})(?![\w-])",
    re.IGNORECASE,
)
_HENCE = re.compile(
    rf"\b(?:therefore|thus|hence|so|in conclusion|overall|finally|final)\b[,:]?\s*(?P<word>yes|"
    rf"no)\b{_STOP}",
    re.IGNORECASE,
)
_BOTH = re.compile(
    r"\b(?:yes|no)\s*(?:/|\\|,?\s*\b(?:or|nor|and)\b)\s*(?:a\s+)?(?:yes|no)\b(?!\s+\w)|"
    r"\bneither yes nor no\b"
    r"|\bno yes\b",
    re.IGNORECASE,
)
_ALONE = re.compile(
    rf"(?<![\w\-'])(?P<word>yes|no)\b(?!-)(?:{_STOP}|(?=\s+(?:because|since|here|or|and|nor|but|"
    rf"then)\b)|"
    r"(?<=yes)(?=\s))",
    re.IGNORECASE,
)
_COMMA = re.compile(r"\s*[,;:.]?\s*(?:(?:or|and|but)\s)?")
_BEFORE_FINDING = re.compile(r"(?<![\w\-'])no\s+(?=[^\W\d_])", re.IGNORECASE)
_WHICH = (
    r"(?:(?:clear|definite|definitive|reliable|specific|actual|further|additional|visible|attached|"
    r"enough|"
    r"sufficient|relevant|medical|clinical|uploaded|accompanying|firm|certain|direct|useful|such|"
    r"other|visual|"
    r"diagnostic|x-?ray|ct|mri|chest|lateral|valid|good|real|obvious|single|simple|corresponding|"
    r"actionable|"
    r"radiological|radiographic|meaningful|straightforward)\s+){0,3}"
)
# Verbatim: part of the data.
_NO_FINDING = re.compile(
    rf"\s*{_WHICH}(?:images?|pictures?|photos?|photographs?|scans?|x-?rays?|radiographs?|films?|"
    rf"files?|"
    r"attachments?|uploads?|figures?|conclusions?|information|data|details|context|descriptions?|"
    r"idea|answers?|"
    r"clues?|opinions?|comments?|way|doubts?|questions?|matter|wonder|one|longer|more|less|fewer|"
    r"other|"
    r"need|reason|access|ability|visual|visuals|text|history|diagnosis|judge?ment|determination|"
    r"assessment|"
    r"statements?|views?|means|certainty|confidence|guarantee|such thing|point|sense|response|"
    r"reply|input|content|"
    r"links?|url|prior|priors|comparison|labels?|annotations?|options?|choices?|sooner|thanks|"
    r"worries|yes|no|"
    r"different|better|worse|bigger|larger|smaller|wait|not|hay|se|es|hay)\b",
    re.IGNORECASE,
)
_NEEDS = re.compile(
    r"\s*[\"')]*\s*(?:would|could|might|requires?|needs?|means|implies|answer (?:would|could|needs|"
    r"requires))\b|"
    r"\s*-?\s*(?:or|and|/)\s*-?\s*no\b|-no\b|\s+question",
    re.IGNORECASE,
)
# Verbatim: part of the data.
_NOT_ANSWERING = re.compile(
    r"[\s,.;:\-–—]*(?:sorry,?\s*)?(?:but\s*)?(?:i|we)(?:'m| am| are)?\s*(?:cannot|can't|can not|"
    r"could not|couldn't|"
    r"unable to|not able to|do not|don't)\s+(?:\w+ly\s+)?(?:determine|tell|say|answer|access|open|"
    r"display|analy[sz]e|"
    r"interpret|process|provide|assist|help|comment|diagnose|give|know|judge|have|view|"
    r"(?:see|identify|find|receive) (?:an?|any|the|your|this|that) (?:image|picture|photo|scan|"
    r"attachment|file))\b",
    re.IGNORECASE,
)
_ABSENCE = re.compile(  # questions that a finding's absence answers with yes
    r"\b(?:normal|unremarkable|healthy|clear|intact|benign|within normal limits|absent|absence|"
    r"free|without|lacks?|"
    r"lacking|negative|no|not|exclude[ds]?|ruled? out|symmetric(?:al)?|sharp|patent|preserved|well|"
    r"none|"
    r"isn't|aren't|doesn't|fail|fails)\b",
    re.IGNORECASE,
)
_EVIDENCE = re.compile(
    r"^\s*(?:\w+\s+)?(?:evidence|signs?|indications?|suggestion|features|findings?|presence)\s+"
    r"(?:of|for)\s+",
    re.IGNORECASE,
)
_OR = re.compile(r"\b(?:or|nor)\b|/", re.IGNORECASE)
_CONTRAST = re.compile(r"\b(?:but|however|although|though|not|no|wait)\b", re.IGNORECASE)
_LEFT_OUT = frozenset(
    "a an the any there seen visible present identified noted shown detected evident".split()
)
_VERBS = Counter("is are was were has have does do can".split())
_END_OF_FINDING = re.compile(
    r"[,;:.!?()\n]|\b(?:is|are|was|were|in|on|at|of|for|from|seen|noted|identified|"
    r"but|and|with|within|under|to|that|which|can|could|here|has|have|appears?|detected|found)\b",
    re.IGNORECASE,
)
# Verbatim: part of the data.
_COMMON = frozenset(
    "is are was were be there the a an of any in on at this that these it and or with to for from "
    "evidence sign signs seen see visible image picture present presence show shows shown does do "
    "did have has can you patient appear appears noted identified acute any which what by "
    "ct mri xray scan radiograph ultrasound".split()
)


def parse_yes_no(answer: str, question: str = "") -> str | None:
    """Return "yes" or "no" where an answer states one of them, else None.

    "No. Yes would require a fracture line." -> "no"; "Normal", "No image was provided",
    "I cannot say yes" -> None. `question`: "" where it is not known.
    """
    final = reasoning.final_answer(answer)
    if final is None or not final.strip():
        return None
    value = _yes_no(context.normalize(final), question)
    return None if value == AMBIGUOUS else value


def _yes_no(text: str, question: str) -> str | None:
    """Return "yes", "no", AMBIGUOUS or None of a normalized text."""
    plain = text.replace(ANSWER, "").replace(END_ANSWER, "").strip(" \n\"'().,:;!?。").lower()
    if complete := _VALUE.get(plain) or ("?" not in text and _COMPLETE.get(plain)):
        return complete
    if (words := set(re.findall(r"\w+", text.lower()))) in ({YES}, {NO}):
        return words.pop()  # "no no no", of a model that repeats itself
    cut = len(text) > context.MAX_CHARS
    text = _BOTH.sub(" ", text[-context.MAX_CHARS :])
    stated = _last_statement(text, question)
    if stated or cut:
        return stated
    lead = _leads(text)
    if lead:
        return lead
    if context.is_refusal(text):
        return None
    return _alone(text) or _no_finding(text, question) or _restated(text, question)


def _last_statement(text: str, question: str) -> str | None:
    statements: list[tuple[int, str]] = []
    for match in re.finditer(f"{ANSWER}([^{ANSWER}{END_ANSWER}]*)", text):
        inner = match[1].strip()
        statements.append(
            (match.start(), (_yes_no(inner, question) if inner else None) or AMBIGUOUS)
        )
    for match in list(context.CUE.finditer(text))[-context.MAX_CUES :]:
        if not context.is_statement(text, match.start()):
            continue
        head = _HEAD.match(text, match.end())
        value = _VALUE[head["word"].lower()] if head else None
        if value and _states(text, head, value, question):
            statements.append((match.start(), value))
    statements += [
        (match.start(), match["word"].lower())
        for match in _HENCE.finditer(text)
        if context.is_statement(text, match.start())
    ]
    if not statements:
        return None
    position, value = max(statements)
    return AMBIGUOUS if context.is_retracted(text, position) else value


def _states(text: str, head: re.Match, value: str, question: str) -> bool:
    """Return whether yes or no after a cue is the answer, unlike in "no image was provided"."""
    end = head.end()
    if _NEEDS.match(text, end):
        return False
    if value == YES or re.compile(_STOP).match(text, end) or re.compile(_GO_ON).match(text, end):
        return True
    return _is_finding(text, end, question)


def _leads(text: str) -> str | None:
    """Return the yes or no with which sentences begin."""
    values, start = set(), 0
    while start < len(text):
        end = context.sentence_span(text, start)[1]
        match = (_LEAD if start else _FIRST_LEAD).match(text, start)
        is_question = "?" in text[max(start, end - 2) : end]
        if match and context.is_denied_after(text, match.end()):
            return AMBIGUOUS  # "Yes: incorrect"
        if match and not is_question and not _NOT_ANSWERING.match(text, match.end()):
            values.add(_VALUE[match["word"].lower()])
            if again := _LEAD.match(text, _COMMA.match(text, match.end()).end()):
                values.add(_VALUE[again["word"].lower()])  # "No, yes"
        start = max(end, start + 1)
    return (values.pop() if len(values) == 1 else AMBIGUOUS) if values else None


def _alone(text: str) -> str | None:
    """Return the yes or no that is mentioned on its own."""
    values = set()
    for match in _ALONE.finditer(text):
        start, end = match.span("word")
        if _NEEDS.match(text, end) or context.is_hypothetical(text, start, end):
            continue
        if context.is_denied_after(text, end):
            return AMBIGUOUS
        before = text[context.clause_start(text, start) : start]
        if context.NEGATORS.search(before) or re.search(r"\b(?:yes|no)\s+or\s*$", before, re.I):
            return AMBIGUOUS  # "not yes" is neither
        values.add(match["word"].lower())
    if len(values) > 1:
        return AMBIGUOUS
    return values.pop() if values else None


def _no_finding(text: str, question: str) -> str | None:
    """Return "no" where a statement negates a finding that the question is about."""
    for match in _BEFORE_FINDING.finditer(text):
        start, end = match.start(), match.end()
        if not _is_finding(text, end, question) or context.is_hypothetical(text, start, start):
            continue
        if not context.NEGATORS.search(text[context.clause_start(text, start) : start]):
            return NO
    return None


def _restated(text: str, question: str) -> str | None:
    """Return the answer of a first sentence that has the question's words, with or without "not".

    "Is the heart enlarged?": "The heart is enlarged." -> "yes", "The heart isn't enlarged" -> "no".
    """
    asked = re.findall(r"[^.?!\n]+(?=\?)", question)
    first = text[: context.sentence_span(text, 0)[1]]
    if not asked or "?" in first or _CONTRAST.search(text, len(first)):
        return None
    expected, words = _plain_words(asked[-1]), _plain_words(first)
    if not expected & _VERBS or "not" in expected or "or" in expected:
        return None
    if words == expected:
        return YES
    return NO if words == expected | Counter(["not"]) and words["not"] == 1 else None


def _plain_words(text: str) -> Counter[str]:
    """Return the words: "There's a mass." and "A mass is seen." both as (mass, is)."""
    text = re.sub(r"n't\b", " not", text.lower().replace("cannot", "can not"))
    text = re.sub(r"\b(there|it|that|this)'s\b", r"\1 is", text)
    return Counter(w for w in re.findall(r"[^\W_]+", text) if w not in _LEFT_OUT)


def _is_finding(text: str, start: int, question: str) -> bool:
    """Return whether what follows a "no" is a finding, and one that the question asks about."""
    if _NO_FINDING.match(text, start):
        return False
    if not question.strip():
        return True
    if _ABSENCE.search(question):
        return False
    phrase = text[start : context.sentence_span(text, start)[1]]
    phrase = _END_OF_FINDING.split(_EVIDENCE.sub("", phrase, count=1), maxsplit=1)[0]
    heads = {_stem(words[-1]) for part in _OR.split(phrase) if (words := _content(part))}
    return bool(heads & set(map(_stem, _content(question))))


def _content(text: str) -> list[str]:
    """Return the words that name something."""
    return [w for w in re.findall(r"[^\W\d_]{2,}", text.lower()) if w not in _COMMON]


def _stem(word: str) -> str:
    """Return a word without its plural ending: masses, effusions."""
    if word.endswith(("sses", "xes", "ches", "shes", "ies")):
        return word[:-3] + "y" if word.endswith("ies") else word[:-2]
    return word if word.endswith("ss") else word.removesuffix("s")
