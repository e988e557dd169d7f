"""Build the prompt for each caption and validate the replies: two prompts and their rules.

    caption_filter   {"keep": true, "reason": "..."}                     -> keep | drop
    instruction      {"question": "...", "answer": "#### a) ... <image> ..."}  -> written | invalid

A reply that is not such a JSON object is `unparsable`; one that is but breaks a rule is `invalid`.
Nothing is repaired: content that is missing from a model's reply is not guessed.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import reasoning
from medmax_jax.endpoints.chat_api import Messages
from medmax_jax.io.text_files import TextFileError, parse_json, read_text

IMAGE, SEPARATOR = "<image>", "<reserved08706>"
FOLDER = Path(__file__).parent / "prompts"
NAMES = ("caption_filter", "instruction")
SPLIT, PLACEHOLDER = "\n=== user ===\n", "<<caption>>"
QUESTION_CHARS = (10, 600)
ANSWER_CHARS = (
    200,
    3_600,
)  # 900 tokens at 4 each; with 1,026 of an image, under the 2,048 of a row
MIN_SECTIONS = 2
REASON_CHARS = 500
MAX_PROMPT_BYTES = 1 << 20
MAX_REPLY_CHARS = 100_000  # longer text is not a reply to these prompts
_HEADING = re.compile(r"^#### (?:([a-z])\) )?(.*)$", re.MULTILINE)
_CONTROL = re.compile(r"<(?:reserved\d+|s|/s|pad|unk|eoss|racm3:break|sentinel:\d+|image)>")
_BAD_CHARS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # all but tab, line feed


class PromptError(ValueError):
    """A prompt file that cannot be used; the message names it and the fix."""


class Unparsable(ValueError):
    """A reply that is not the requested JSON object."""


class Invalid(ValueError):
    """A reply in the right form that breaks a rule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A system message, and a user message with a placeholder for the caption."""

    system: str
    user: str

    def messages(self, caption: str) -> Messages:
        """Return the prompt about one caption, which it contains as a JSON string."""
        quoted = json.dumps(caption, ensure_ascii=False)
        user = self.user.replace(PLACEHOLDER, quoted)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def load_prompts(folder: str | Path) -> dict[str, Prompt]:
    """Load the prompts of a folder by name."""
    prompts = {}
    for name in NAMES:
        path = Path(folder) / f"{name}.txt"
        try:
            text = read_text(path, max_bytes=MAX_PROMPT_BYTES).replace("\r\n", "\n").strip()
        except TextFileError as error:
            raise PromptError(f"{error}: cannot be read; create the file") from error
        if text.count(SPLIT) != 1 or text.split(SPLIT)[1].count(PLACEHOLDER) != 1:
            raise PromptError(
                f"{path}: expected exactly one line {SPLIT.strip()!r} and below it exactly one "
                f"{PLACEHOLDER}"
            )
        system, user = text.split(SPLIT)
        prompts[name] = Prompt(system=system.strip(), user=user.strip())
    return prompts


def read_verdict(text: str) -> tuple[bool, str]:
    """Return (keep, reason) of a reply to caption_filter; raise Unparsable."""
    reply = _object(text)
    keep, reason = reply.get("keep"), reply.get("reason")
    if not isinstance(keep, bool):
        raise Unparsable(f"keep is {_short(keep)}; expected true or false")
    if not isinstance(reason, str) or not reason.strip():
        raise Unparsable("reason is missing or empty")
    return keep, reason.strip()[:REASON_CHARS]


def read_instruction(text: str) -> tuple[str, str]:
    """Return (question, answer) of a reply to instruction; raise Unparsable or Invalid."""
    reply = _object(text)
    for name in ("question", "answer"):
        if not isinstance(reply.get(name), str):
            raise Unparsable(f"{name} is {_short(reply.get(name))}; expected a string")
    question, answer = (
        reply[name].replace("\r\n", "\n").strip() for name in ("question", "answer")
    )
    _check_text("question", question, QUESTION_CHARS, images=0)
    _check_text("answer", answer, ANSWER_CHARS, images=1)
    _check_sections(answer)
    return question, answer


def _object(text: str) -> dict[str, Any]:
    """Return the one JSON object of a reply, alone or in a Markdown fence, after any reasoning."""
    if len(text) > MAX_REPLY_CHARS:
        raise Unparsable(f"the reply is longer than {MAX_REPLY_CHARS} characters")
    text = reasoning.final_answer(text)
    if text is None:
        raise Unparsable("the reply ends within its reasoning")
    text = text.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, re.DOTALL):
        text = fenced[1]
    try:
        # The rules for texts report half a character, with its position.
        value = parse_json(text, "reply", allow_lone_surrogates=True)
    except TextFileError as error:
        raise Unparsable("the reply is not a single JSON object without other text") from error
    if not isinstance(value, dict):
        raise Unparsable("the reply is not a JSON object")
    return value


def _check_text(name: str, text: str, bounds: tuple[int, int], images: int) -> None:
    if not bounds[0] <= len(text) <= bounds[1]:
        raise Invalid(f"{name} has {len(text)} characters; expected {bounds[0]} to {bounds[1]}")
    if (count := text.count(IMAGE)) != images:
        raise Invalid(f"{name} contains {IMAGE} {count} times; expected {images}")
    if control := _CONTROL.search(text.replace(IMAGE, "")):
        raise Invalid(f"{name} contains the control token {control[0]}")
    if bad := _BAD_CHARS.search(text):
        raise Invalid(f"{name} contains the character U+{ord(bad[0]):04X}")


def _check_sections(answer: str) -> None:
    headings = list(_HEADING.finditer(answer))
    if not headings or headings[0].start():
        raise Invalid("answer does not begin with a heading '#### a) Title'")
    if len(headings) < MIN_SECTIONS:
        raise Invalid(f"answer has {len(headings)} section; expected {MIN_SECTIONS} or more")
    ends = [heading.start() for heading in headings[1:]] + [len(answer)]
    for n, (heading, end) in enumerate(zip(headings, ends, strict=True)):
        letter, title = chr(ord("a") + n), heading[2]
        if heading[1] != letter or not title.strip() or IMAGE in title:
            raise Invalid(
                f"the heading of section {n + 1} is {heading[0][:60]!r}; expected "
                f"'#### {letter}) Title'"
            )
        if not answer[heading.end() : end].replace(IMAGE, "").strip():
            raise Invalid(f"section {n + 1} has no text")


def _short(value: Any) -> str:
    return repr(value)[:60]
