"""What an answer says where no judge is needed: as both scorings read it."""

from typing import Any

from eval import paper, strict


def read(family: str, text: str, answer: str, prompt: str) -> dict[str, Any]:
    """{parsed, strict, paper}: what was read ("yes", "B", None) and each scoring's verdict.

    strict: right, wrong or unparsed. paper: right or not, by the release. {} for other families.
    """
    if family not in ("vqa_closed", "vqa_mcq"):
        return {}
    said, expected = (strict.read(family, words, prompt) for words in (text, answer))
    if said is None:
        verdict = "unparsed"
    else:
        verdict = "right" if said == expected else "wrong"
    right = paper.closed if family == "vqa_closed" else paper.choice
    return {"parsed": said, "strict": verdict, "paper": right(text, answer)}
