"""Prepares an answer for parsing, and finds what denies or hedges a phrase of it.

`normalize` removes markup, so that "**B**", "`B`", "$\\text{B}$" and a full-width B are all "B",
and turns the forms that mark a final answer into one: <answer>B</answer>, \\boxed{B}, [[B]].

A phrase is denied where its clause negates it, before ("neither A nor B", "rather than A") or after
("A is incorrect", "A: no"). It is hypothetical in a question, after "if", and before "would show".
"""

import re
import unicodedata

MAX_CHARS = 20_000  # of the end of an answer; the final answer is there
MAX_CUES = 100  # the last ones of an answer
REACH = 500  # characters of a clause or a sentence that are looked at, so that time is bounded

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm)\s*\{([^{}]*)\}"
)
_BOXED = re.compile(
    r"\\f?boxed\s*\{([^{}]*)\}|<\|begin_of_box\|>([^<]*)<\|end_of_box\|>|\[\[([^\[\]]{1,200})\]\]"
)
_ANSWER_NAMES = r"(?:answer|final_answer|final-answer|finalanswer|ans|choice|option|final)"
_TAG = re.compile(rf"<\s*({_ANSWER_NAMES})\s*>", re.IGNORECASE)
_END_TAG = re.compile(rf"<\s*/\s*{_ANSWER_NAMES}\s*>", re.IGNORECASE)
_STRUCK = re.compile(r"~~[^~\n]{0,500}~~|<(s|del|strike)>[^<]{0,500}</\1>", re.IGNORECASE)
_HTML = re.compile(
    r"</?(?:b|i|u|em|strong|span|div|p|mark|code|sup|sub|h[1-6]|li|ul|ol)(?:\s[^<>]{0,80})?>", re.I
)
_QUOTES = str.maketrans("‘’‚‛“”„‟«»「」『』′″\u00a0", '\'\'\'\'""""""""""\'" ')
ANSWER, END_ANSWER = "\u0002", "\u0003"  # around a marked final answer in a normalized text

# Words after which a clause begins, so that a negation before them does not reach what follows.
_STARTERS = (
    r"but|it|it's|es|c'est|its|this|that|that's|these|so|rather|instead|however|though|although|"
    r"therefore|"
    r"thus|hence|then|because|since|i|i'd|i'll|i'm|we|my|the|there|which|while|whereas|making|only|"
    r"just|must|should|more|most|sondern|sino|mais|mas|ma|maar|а|но|但|而是|而|应|應|因此|所以|故|选|選|答|应该|正|"
    r"\w+\s+(?:is|was)"
)
_CLAUSE = re.compile(
    r"[.!?](?=[\s\"')\]\u0003]|$)|[;\n。！？；\u0002\u0003]"
    rf"|(?:,|\band\b|\by\b|\bet\b|\bund\b|、)(?=\s*(?:{_STARTERS})(?![\w']))"
    r"|,(?=\s*(?:但|而是|应|因此|所以|故|选|答案))"
    r"|\b(?:but|however|though|although|instead(?! of)|because|since|so|therefore|thus|hence|"
    r"whereas|"
    r"sondern|sino|mais|mas|porque|weil|parce)\b|但|而是|因此|所以",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?](?=[\s\"')\]\u0003]|$)|[;\n。！？；\u0002\u0003]")

NEGATORS = re.compile(
    r"\b(?:not|never|neither|nor|no|none|(?<!\ba )few|scant|scarce\w*|without|cannot|"
    r"exclud\w*|rules? out|ruled out|ruling out|"
    r"eliminat\w*|reject\w*|dismiss\w*|discard\w*|except|excepting|instead of|rather than|than|"
    r"unlike|as opposed to|opposed to|compared (?:to|with)|unlikely|unable|against|"
    r"r/o|(?:incorrect|wrong|false|worst)(?=\s*(?:options?|answers?|choices?|one|is|[:\-]))|least|"
    r"lacks?|lacking|absence of|absent(?=\s+(?:\w+\s+)?$)|(?:at least|at most|up to)(?=\s*$)|"
    r"free of|negative for|den(?:y|ies|ied)|"
    r"(?:different|differentiated?|distinguish\w*|distinct) from|other than|apart from|aside from|"
    r"opposite of|mistaken for|confused with|doubt\w*|hardly|fails?|failed|improbable|impossible|"
    r"nicht|keine?[nrsm]?|weder|noch|ohne|pas|ni|sans|sin|não|nao|nem|sem|non(?!-)|né|senza|niet|"
    r"geen|не|ни|нет|nie|değil|tidak|bukan|không|ليس)\b|n't\b"
    r"|[不非没沒無无未]|排除|除了|아니|않",
    re.IGNORECASE,
)
_CONDITIONS = re.compile(
    r"\b(?:if(?! (?:i|we|you) (?:had|have|must|were to|was to)\b| (?:forced|pressed|asked|"
    r"anything))"
    r"|unless|suppose|supposing|assuming|were (?:it|there|this)|had (?:it|there|this|the)|in case|"
    r"when(?! (?:i|we|you|\w+ing)\b)|wenn|ob)\b|\bwhether\b(?!.*,)"
    r"|如果|假如|是否|もし",
    re.IGNORECASE,
)
_OTHERS_SAY = (
    re.compile(  # "One might think it is A", "Initially I thought that", "Differential: A"
        r"\b(?:one|some|someone|people|others|they|many|you)\s+(?:\w+\s+){0,2}?(?:think|thinks|say|"
        r"says|said|"
        r"argue|argued|believe|assume|guess|suggest|expect|consider|considered|answer|answered|"
        r"thought)\b"
        r"|\bi\s+(?:\w+\s+)?(?:thought|assumed|expected|considered)\b|\bdifferentials?\b",
        re.IGNORECASE,
    )
)
_REASON = re.compile(r"[,;]|\b(?:because|since|as|but|so|and)\b", re.IGNORECASE)
_CONSEQUENCE = re.compile(  # after these, an assumption of the same sentence is over
    r"[;,]?\s*\b(?:so|therefore|thus|hence|but|however|although|though)\b|;|但|因此|所以",
    re.IGNORECASE,
)
_NOT_NEGATIVE = re.compile(
    r"\b(?:no|without(?: a| any)?|beyond(?: a| any)?|not in) doubt(?: that)?\b|\bnot only\b"
    r"|\bwithout (?:question|hesitation)\b|\bno (?:question|wonder)(?: that)\b|\bcannot but\b"
    r"|\bnot (?:just|merely)\b|\bundoubtedly\b",
    re.IGNORECASE,
)

# What may stand between a phrase and its predicate: "B) (CT) is", "A. Incorrect".
_AFTER = (
    r"(?:[)\]}\"':]|[^\S\n])*(?:\.[^\S\n]*(?=incorrect|wrong|false|correct|true))?"
    r"(?:\([^()\n]{0,80}\)[^\S\n]*)?"
)
_EXCEPT = re.compile(
    r"\b(everything|anything|everyone|any|all(?: (?:of|the|options|answers|them)){0,3}) but\b",
    re.IGNORECASE,
)
_HEADING = re.compile(  # 【答案】B, [Answer] B
    r"[【\[]\s*((?:最终|正确)?答案|(?:final |correct )?answer)\s*[】\]]\s*[::]?", re.IGNORECASE
)
_NEXT_QUESTION = re.compile(  # of a base model that continues with a question of its own
    r"\n\s*(?:(?:next )?question|q|user|human|问题|題目|题目|pregunta|frage)\s*\d{0,3}\s*[:：]",
    re.IGNORECASE,
)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|pad|end_of_turn|unused\d+)>")
_BE = (
    r"(?:is|are|was|were|seems?|looks?|appears?|being|(?:would|can|could|should|may|might|must|"
    r"will) be"
    r"|(?:has|have) been|gets?|remains?)"
)
_BAD = (
    r"(?:not|never|incorrect|wrong|false|unlikely|excluded|ruled out|eliminated|rejected|dismissed|"
    r"discarded|less|least|out\b|inconsistent|incompatible|implausible|impossible|absent|"
    r"normal(?=\s*(?:$|[.,;:!)\n]|and\b|in (?:size|appearance|position)\b))|unremarkable|"
    r"contraindicated|only (?:indicated|used|given|needed) if|"
    r"inappropriate|improbable|untrue|invalid|inaccurate|unsupported|unrelated|irrelevant|"
    r"a distractor|contradicted|no longer|neither|missing|negative)"
)
_DENIED_AFTER = re.compile(
    rf"{_AFTER}(?:[:=\-–—]\s*|,\s*(?=which\b|{_BE}\b))?(?:which\s+)?(?:"
    rf"{_BE}\s+(?:(?:the|a|an)\s+)?(?:(?!the\b|most\b|correct\b|right\b|"
    rf"best\b)\w+\s+){{0,2}}?{_BAD}"
    r"|(?:is|are|was|were|do|does|did|has|have|had|can|could|would|should|will|must)(?:n't|\s+not|"
    r"\s+never|\s+neither)\b|cannot\b|can't\b|won't\b"
    r"|(?:no|not)(?=\s*(?:$|[.,;:!\n\u0003)]))"
    r"|not\s+(?:correct|right|the|a|an|consistent|likely|supported|seen|present|visible|possible|"
    r"compatible|true|valid|applicable|appropriate|here)\b"
    r"|(?:incorrect|wrong|false|unlikely|excluded|ruled out|eliminated|rejected|absent)\b|[✗✘❌×☒]"
    r"|(?:fails?|lacks?|contradicts?)\b"
    r"|(?:no|non|não|nao|ne|n')\s*(?:es|è|é|est|sono|son)\b|ist\s+(?:falsch|nicht|kein)|falsch\b"
    r"|(?:es|è|é|est)\s+(?:incorrect|fals|fauss|faux|pas\b|errad|sbagliat|errón)"
    r"|(?:не|неверн|неправильн)|(?:选项|項|项)?\s*(?:是|は|が|가|이|은|는)?\s*(?:不|错|錯|非|未|没|"
    r"被排除|可排除|可以排除|排除|では|じゃ|違|間違|誤|아니|아닙|틀)"
    r")",
    re.IGNORECASE,
)
_GOOD = (
    r"(?:correct|true|accurate|the answer|my answer|"
    r"my (?:first |top |best |final )?choice|right(?=\s*(?:$|[.,;:!)\n\u0003]|answer|option|"
    r"choice|one|because|since|as\b|and\b))|"
    r"(?:best|most (?:likely|probable|appropriate|consistent|suitable|accurate|plausible|fitting))"
    r"(?=\s*(?:$|[.,;:!)\n\u0003]|answer|option|choice|one|fit|match|diagnosis|explanation|"
    r"description|"
    r"because|since|as\b|and\b|here|given|based|with)))"
)
_AFFIRMED_AFTER = re.compile(
    rf"{_AFTER}(?:[,=\-–—]\s*)?(?:"
    r"(?:is|are|was|would be|must be|seems?(?: to be)?|appears?(?: to be)?|should be|will be)\s+"
    rf"(?:(?:clearly|therefore|thus|indeed|definitely|most likely|likely|probably|obviously|still|"
    rf"the|"
    rf"only|my|single|a|overall)\s+){{0,3}}{_GOOD}"
    r"|(?:is|are)\s+(?:\w+ly\s+)?(?:favou?red|preferred)(?=\s*(?:$|[.,;\n]|over\b|to\b))"
    r"|fits best\b|(?:[:\-–—]\s*)?(?:correct|true|yes)(?=\s*(?:$|[.,;:!\n\u0003)]))|[✓✔✅☑]"
    r"|es (?:la )?(?:respuesta )?correct\w*|é a (?:resposta )?corret\w*|est (?:la )?(?:bonne|"
    r"correcte)"
    r"|ist (?:die )?(?:richtig|korrekt)\w*|è (?:la )?(?:risposta )?corrett\w*|верн|правильн"
    r"|(?:项|項)?\s*(?:是|为|為)?\s*(?:正确|正確|对的|對的|最佳)|が正解|が正しい|が最も"
    r"|(?:가|이) (?:정답|맞)"
    r")",
    re.IGNORECASE,
)
_POSSIBLE_AFTER = re.compile(
    rf"{_AFTER}(?:is|are|could be|may be|might be|remains?|seems)\s+(?:also\b|too\b|(?:a |another |"
    rf"equally )*"
    r"(?:possible|possibilit|plausible|alternative|likely too))",
    re.IGNORECASE,
)
_HYPOTHETICAL_AFTER = re.compile(
    rf"{_AFTER}(?:would|could|might|may|should)\b"
    rf"(?!\s+be\s+(?:(?:the|my|a|most|clearly|therefore)\s+){{0,2}}{_GOOD})",
    re.IGNORECASE,
)

_RETRACTED = re.compile(
    r"\b(?:scratch that|no,? (?:wait|actually)|wait,? no|(?:just )?kidding|actually,? no|"
    r"on second thoughts?|i take (?:that|it) back|correction)\b",
    re.IGNORECASE,
)
# What introduces a final answer.
CUE = re.compile(
    r"(?<!\w)(?:answers?|ans|choice|option|selection|response|verdict|prediction|diagnosis|"
    r"conclusion|"
    r"respuesta|resposta|réponse|reponse|antwort|lösung|risposta|antwoord|odpowiedź|svar|ответ|"
    r"cevap|"
    r"yanıt|đáp án|jawaban|الإجابة|الجواب|उत्तर|opción|opção|alternativa|letra|"
    r"答案|正解|答え|回答|解答|正确选项|正確選項|정답|답)(?!\w*['’]s)"
    r"(?:\s+(?!not\b|never\b|choices\b|options\b|cannot\b|if\b|isn't|can't|no\b|non\b|não\b|nao\b|"
    r"nicht\b|ne\b|pas\b|не\b)[^\W\d_]+){0,4}?"
    r"[\"']*\s*(?:(?:\bis\b|\bwas\b|\bwould be\b|\bshould be\b|\bmust be\b|\bwill be\b|\bes\b|"
    r"\bé\b|\best\b|"
    r"\bist\b|\blautet\b|\bè\b|\bto\b|\blà\b|\badalah\b|هي|هو|应该是|应为|應為|应是|应选|是|为|為|は|은|는|"
    r"[:=→—–]|->|=>|-(?=\s))\s*){1,3}",
    re.IGNORECASE,
)
_DENIED_CUE = re.compile(  # "I don't think the answer is", "I would not choose"
    r"(?:\b(?:not|never|cannot|neither|nor|hardly|doubt|rather than|instead of|nicht|kein\w*|pas|"
    r"incorrect|wrong|false|worst|least|unlikely|initial|initially|original|previous)\b|n't\b|"
    r"[不非没])(?:\s+[^\W\d_]+){0,4}\s*$|\b(?:no|não|nao|non|ne|не)\s*$",
    re.IGNORECASE,
)
# Verbatim: part of the data.
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to|"
    r"(?:not )?(?:im)?possible to|"
    r"difficult to|hard to|won't|will not|am not going to)\s+(?:\w+\s+){0,2}?"
    r"(?:be\s+)?(?:determine|tell|say|said|answer|seen? (?:(?:the|an|any|your|this|that) )?"
    r"(?:image|picture|photo|scan|x-?ray|attachment|file)|view|access|open|display|analy[sz]e|interpret|process|provide|"
    r"assist|help|confirm|conclude|comment|diagnose|give|know|assess|evaluate|decide|choose|select|"
    r"pick|drawn|made|judge|read|review|examine|offer|identify (?:the|which|what))"
    r"|\b(?:i|we) (?:do not|don't) (?:have|see|know|receive)\b(?! (?:any )?(?:evidence|sign))"
    r"|\b(?:i'm|i am|we are|we're) (?:not (?:sure|certain)|unsure|uncertain|unable)|\bnot enough\b"
    r"|\binsufficient\b|\bplease (?:provide|upload|share|attach|consult|send|re-?upload)"
    r"|\bi(?:'m| am) (?:very |so )?sorry\b|\bi apologi[sz]e\b|\bas an ai\b|^\s*sorry\b|\bunclear\b"
    r"|\bno (?:\w+ ){0,2}?(?:image|images|picture|pictures|photo|attachment|file)s?\b"
    r"|\b(?:image|picture|scan|photo|x-?ray|attachment|file)s? (?:was|is|were|are|has|have)(?: not|"
    r"n't)"
    r"|无法|無法|不能确定|不能確定|看不到|没有图|沒有圖|分かりません|わかりません|判断できません",
    re.IGNORECASE,
)


def normalize(text: str) -> str:
    """Return an answer without markup; marked final answers are between ANSWER and END_ANSWER."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    text = text.replace(ANSWER, " ").replace(END_ANSWER, " ")
    text = _STRUCK.sub(" ", text)
    for _ in range(2):  # \boxed{\textbf{\text{B}}}
        text = _TEXT_COMMAND.sub(r"\1", text)
    text = _BOXED.sub(lambda m: f"{ANSWER}{m[1] or m[2] or m[3] or ''}{END_ANSWER}", text)
    text = _SPECIAL.sub(" ", text)
    text = _TAG.sub(ANSWER, _HTML.sub("", re.sub(r"<br\s*/?>", "\n", text, flags=re.IGNORECASE)))
    text = _END_TAG.sub(END_ANSWER, text)
    text = _HEADING.sub(r"\1: ", text)
    text = re.sub(r"\\[()\[\]]|[*`$]+|(?<!\w)_+|_+(?!\w)|(?m:^\s*(?:#+|>)\s*)", "", text)
    text = re.sub(rf"(?<=[{_CJK}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{_CJK}])", " ", text)
    text = _EXCEPT.sub(r"\1 except", _NOT_NEGATIVE.sub("certainly", text))
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"\r\n?", "\n", text)).strip()
    following = _NEXT_QUESTION.search(text)
    return text[: following.start()].strip() if following else text


def clause_start(text: str, start: int) -> int:
    """Return where the clause of a phrase begins that starts at `start`."""
    end = begin = max(0, start - REACH)
    for match in _CLAUSE.finditer(text, begin, start + 40):  # 40: what a clause may begin with
        if match.end() > start:
            break
        end = match.end()
    return end


def sentence_span(text: str, position: int) -> tuple[int, int]:
    """Return (start, end) of the sentence around a place, its closing mark included."""
    begin = max(0, position - REACH)
    for match in _SENTENCE.finditer(text, begin, position):
        begin = match.end()
    close = _SENTENCE.search(text, position, position + REACH)
    return begin, close.end() if close else min(len(text), position + REACH)


def is_denied(text: str, start: int, end: int) -> bool:
    """Return whether the clause of text[start:end] negates it.

    "Neither A nor B", "A is incorrect", "more likely than A", "A: no".
    """
    before = text[clause_start(text, start) : start]
    return bool(NEGATORS.search(before)) or is_denied_after(text, end)


def is_denied_after(text: str, end: int) -> bool:
    """Return whether a predicate right after a phrase negates it: "A is incorrect", "A: no"."""
    return _DENIED_AFTER.match(text, end) is not None


def is_affirmed_after(text: str, end: int) -> bool:
    """Return whether a predicate right after a phrase affirms it: "B is the correct answer"."""
    return _AFFIRMED_AFTER.match(text, end) is not None


def is_possible_after(text: str, end: int) -> bool:
    """Return whether a phrase is only called possible: "B is also possible"."""
    return _POSSIBLE_AFTER.match(text, end) is not None


def is_hypothetical(text: str, start: int, end: int) -> bool:
    """Return whether a phrase is in a question, in a condition, or subject of "would"."""
    if _HYPOTHETICAL_AFTER.match(text, end):
        return True
    first, last = sentence_span(text, start)
    if "?" in text[max(first, last - 2) : last]:
        return True
    before = _CONSEQUENCE.split(text[first:start])[-1]
    if _CONDITIONS.search(before) or _OTHERS_SAY.search(text[clause_start(text, start) : start]):
        return True
    after = _REASON.split(text[end:last])[0]
    return _CONDITIONS.search(after) is not None


def is_retracted(text: str, start: int = 0) -> bool:
    """Return whether an answer takes back something after `start`: "C, no wait, D"."""
    return _RETRACTED.search(text, start) is not None


def is_refusal(text: str) -> bool:
    """Return whether an answer states that it cannot answer: "I cannot determine ..."."""
    return _REFUSAL.search(text) is not None


def is_statement(text: str, start: int) -> bool:
    """Return whether a cue at `start` states an answer, not a question, condition or denial."""
    if is_hypothetical(text, start, start):
        return False
    return not _DENIED_CUE.search(text[clause_start(text, start) : start])
