"""Defines the families of tasks: how a question is posed, and what kind of answer it has.

    vqa_closed, vqa_mcq, vqa_rationale,     images and a question -> text
    vqa_open, vqa_numeric
    captioning, visual_chat                 an image and a question -> text
    image_generation, multimodal            text -> an image; text and images
    image_editing, multimodal_generation    images and text -> an image; text and images

The metrics of each are in eval/metrics/per_record.py.
"""

import dataclasses
from collections.abc import Mapping


class TaskError(ValueError):
    """Raised for rows that cannot be evaluated; the message names the row and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Defines a kind of task. `tokens`: at most, of an answer's text, by generation mode."""

    mode: str  # text | image | mixed
    shows_image: bool
    answer_format: str  # of the prompt `chat`, and of exported items
    tokens: Mapping[str, int]


def _tokens(*, paper: int, strict: int) -> Mapping[str, int]:
    return {"paper": paper, "strict": strict}


FAMILIES = {  # the release's bounds: vqa.py:24-31, visual_chat.py, mm_out.py, image_text.py
    "vqa_closed": Family(mode="text", shows_image=True, answer_format="yes or no",
                         tokens=_tokens(paper=1, strict=16)),
    "vqa_mcq": Family(mode="text", shows_image=True, answer_format="the letter of one option",
                      tokens=_tokens(paper=1, strict=16)),
    "vqa_rationale": Family(mode="text", shows_image=True,
                            answer_format="'The answer is (A).', with the letter of one option, "
                            "then 'Solution:' and the reasons",
                            tokens=_tokens(paper=256, strict=512)),
    "vqa_open": Family(mode="text", shows_image=True, answer_format="a word or a short phrase",
                       tokens=_tokens(paper=60, strict=60)),
    "captioning": Family(mode="text", shows_image=True, answer_format="complete sentences",
                         tokens=_tokens(paper=4_096, strict=4_096)),
    "image_generation": Family(mode="image", shows_image=False, answer_format="an image",
                               tokens=_tokens(paper=60, strict=60)),
    "multimodal": Family(mode="mixed", shows_image=False, answer_format="text and images",
                         tokens=_tokens(paper=1_024, strict=1_024)),
    "visual_chat": Family(mode="text", shows_image=True, answer_format="complete sentences",
                          tokens=_tokens(paper=4_096, strict=4_096)),
    # Of benchmarks beyond the release; both modes have the same bounds.
    "vqa_numeric": Family(mode="text", shows_image=True, answer_format="one number",
                          tokens=_tokens(paper=32, strict=32)),
    "image_editing": Family(mode="image", shows_image=True, answer_format="an image",
                            tokens=_tokens(paper=60, strict=60)),
    "multimodal_generation": Family(mode="mixed", shows_image=True,
                                    answer_format="text and images",
                                    tokens=_tokens(paper=1_024, strict=1_024)),
}  # fmt: skip
MODES = ("paper", "strict")
# The release's task_name -> family; all others are by question_type.
FAMILY_BY_TASK = {
    "image_captioning": "captioning",
    "image_generation": "image_generation",
    "mm_out": "multimodal",
    "visual_chat": "visual_chat",
}
FAMILY_BY_QUESTION_TYPE = {
    **{"closed": "vqa_closed", "mcq": "vqa_mcq", "rationale": "vqa_rationale"},
    **{"open": "vqa_open", "numeric": "vqa_numeric"},
    **{"editing": "image_editing", "generation": "multimodal_generation"},
}
CHOICES = ("vqa_mcq", "vqa_rationale")  # families whose answer is the letter of an option
SEVERAL_IMAGES = tuple(FAMILY_BY_QUESTION_TYPE.values())  # families whose rows may show several
WITH_REFERENCE = ("image_editing", "multimodal_generation")  # an image shown, another expected
