"""Read the answer of a visual_chat row: a dictionary written as text, without running any of it.

    "{'fig_label': 'Fig. 3', 'fig_caption': '..', 'in_text_mention': [{'tokens': ..}] or None,
      'gpt4_answer': '..', 'domain': {'mri': True, ..}}"   ->   ChatAnswer(reference="..", ...)

The text is JSON, or literals of Python: text, numbers, lists, dictionaries, True, False, None.
Anything else, such as a call, is rejected. The longest of the 193 published ones has 4,273
characters.
"""

import ast
import dataclasses
from typing import Any

from medmax_jax.io.text_files import TextFileError, parse_json

MAX_TEXT = 1 << 16  # characters of a complete dictionary
DOMAINS = (
    "chest_xray",
    "mri",
    "histology",
    "gross",
    "ct_scan",
)  # a row has the first that is on
DAMAGE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


class ChatAnswerError(ValueError):
    """Text that is not such a dictionary; the message repeats nothing of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """The fields of a row. `mention`: of the figure in the article, as MedMax's judge reads it."""

    reference: str
    label: str
    caption: str
    mention: str
    domain: str

    @property
    def context(self) -> str:
        """Return the description of the image that a judge receives, as text."""
        text = f"Figure Caption:\n{self.label}: {self.caption}"
        return (
            text if self.mention in ("", "None") else f"{text}\n\nFigure Context:\n{self.mention}"
        )


def read(text: str) -> ChatAnswer:
    """Return the dictionary, checked."""
    row = _parsed(text)
    if not isinstance(row, dict):
        raise ChatAnswerError(
            "answer is not a dictionary; see data/release/chat_answers.py for its format"
        )
    texts = {name: row.get(name) for name in ("gpt4_answer", "fig_label", "fig_caption")}
    if missing := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ChatAnswerError(f"answer: field {missing[0]!r} is missing or not text")
    if not texts["gpt4_answer"].strip():
        raise ChatAnswerError("answer: field 'gpt4_answer' is empty, so there is no reference")
    flags = row.get("domain", {})
    if not isinstance(flags, dict):
        raise ChatAnswerError("answer: field 'domain' is not a dictionary of flags")
    return ChatAnswer(
        reference=texts["gpt4_answer"],
        label=texts["fig_label"],
        caption=texts["fig_caption"],
        mention=str(row.get("in_text_mention")),
        domain=next((name for name in DOMAINS if flags.get(name) is True), ""),
    )


def _parsed(text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise ChatAnswerError(f"answer has {len(text)} characters; the limit is {MAX_TEXT}")
    try:
        # Numbers and characters are not checked here: the literals of Python have the same ones.
        return parse_json(text, "answer", allow_nonfinite=True, allow_lone_surrogates=True)
    except TextFileError:
        pass  # Python's literals, as published
    try:
        return ast.literal_eval(text)
    except DAMAGE as error:
        raise ChatAnswerError(
            "answer is neither JSON nor Python literals; see data/release/chat_answers.py for its "
            "format"
        ) from error
