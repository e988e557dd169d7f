"""Separate the answer of a reasoning model from the reasoning text that some servers leave in it.

    "<think>It may be A or C.</think>\\n\\nB"                  -> "B"
    "It may be A or C.</think>B"                              -> "B"    the prompt opened the tag
    "<answer>B</answer><reason>C is dark.</reason>"           -> "<answer>B</answer>"
    "<|channel|>analysis<|message|>..<|channel|>final<|message|>B<|return|>"  -> "B"
    "<think>It may be A, or"                                  -> None   the reasoning does not end

Tags: DeepSeek-R1, Qwen and GLM (think), Magistral ([THINK]), Seed-OSS (seed:think), Kimi-VL
(◁think▷), Sky-T1 (begin_of_thought), Command A (START_THINKING), MedGemma (unused94), gpt-oss
(channels, also where a server dropped the special tokens), and the XML names that prompts commonly
request.
"""

import re

_EXPLANATIONS = "reason|reasoning|rationale|reflection|analysis"  # may also follow the answer
_NAMES = (
    "think|thinking|thought|thoughts|scratchpad|cot|chain_of_thought|inner_monologue|seed:think|"
    f"long_cot|{_EXPLANATIONS}"
)
_OPEN = re.compile(
    rf"<\s*(?:{_NAMES})(?:\s[^<>/]{{0,80}})?>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|START_THINKING\|>|<\|thinking\|>|<unused94>|<\|channel\|>\s*(?:analysis|commentary)\b",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"<\s*/\s*(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|/thinking\|>|<unused95>|<\|channel\|>\s*final\b[^<]{0,80}<\|message\|>",
    re.IGNORECASE,
)
_EXPLAINED = re.compile(rf"<\s*/\s*(?:{_EXPLANATIONS})\s*>", re.IGNORECASE)
# gpt-oss without its special tokens: the names of its channels are joined to the text.
_BARE_CHANNEL = re.compile(r"\s*analysis(?=[A-Z\"'])")
_BARE_FINAL = "assistantfinal"
_END = re.compile(
    r"<\|(?:return|end|im_end|eot_id|endoftext|begin_of_solution|end_of_solution|START_RESPONSE"
    r"|END_RESPONSE)\|>",
    re.IGNORECASE,
)


def final_answer(text: str) -> str | None:
    """Return what follows the last closing tag of reasoning; None if the reasoning does not end.

    A text without any tag is returned unchanged. If an explanation ends the text and follows an
    answer, the answer is returned.
    """
    if _BARE_CHANNEL.match(text):
        _, separator, answer = text.rpartition(_BARE_FINAL)
        return answer.strip() if separator else None
    opens, closes = list(_OPEN.finditer(text)), list(_CLOSE.finditer(text))
    end = closes[-1].end() if closes else 0
    if opens and opens[-1].start() >= end:
        return None
    if not closes:
        return text
    answer = _END.sub("", text[end:]).strip()
    if not answer and opens and _EXPLAINED.fullmatch(closes[-1][0]):
        start = opens[-1].start()
        others = [match.end() for match in closes[:-1] if match.end() <= start]
        return text[others[-1] if others else 0 : start].strip()
    return answer
