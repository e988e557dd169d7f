"""The scoring of the MedMax release (its evaluation/ at 20b7055), as it is, errors and all.

    closed      "no" anywhere in the text is a no: normal, unknown, nodule; "eyes" says yes
    choice      the whole text is the letter
    open        the judge's reply holds "Correctness: 1" or "Correctness: 0", else it is dropped
    relative    first line of the reply is two numbers, else the whole task stops without a score
    pictures    mean cosine of what was drawn; samples without a picture are not counted
    intervals   none; a standard error as if all questions were independent

For numbers to set beside the published ones, and for nothing else; eval/strict.py is right. It has
no options. PaperError: the release stops here, and its task has no score.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prompts"
JUDGE = "gpt-4o-mini"  # called once, at the endpoint's own temperature
FIRST_ROWS = 100  # of each image generation task
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
SHOWN = ("conversation", "detailed_description", *DOMAINS, "overall")
SYSTEM = "'You are a helpful and precise assistant for checking the quality of the answer."
DETAILED = "Analyze the image in a comprehensive and detailed manner."


class PaperError(ValueError):
    """Where the release stops with an exception; the message says at what."""


def closed(raw: str, answer: str) -> bool:
    """Also ProbMed: one question at a time. closed("Normal", "no") -> True."""
    said = raw.lower()
    yes, no = "yes" in said, "no" in said
    return (answer == "yes" and yes and not no) or (answer == "no" and no and not yes)


def choice(raw: str, answer: str) -> bool:
    """choice(" b", "B") -> True; choice("B.", "B") -> False."""
    return raw.upper().strip() == answer


def judged(reply: str) -> bool | None:
    """Verdict of the judge on an open answer; None is dropped: "**Correctness:** 1", "1"."""
    if "Correctness: 1" in reply:
        return True
    return False if "Correctness: 0" in reply else None


def accuracy(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; nan where numpy gives nan. Cosines of captions too."""
    n = len(scores)
    if not n:
        return math.nan, math.nan
    mean = sum(scores) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in scores) / (n - 1)) / math.sqrt(n)


def generation(cosines: Sequence[float]) -> tuple[float, float]:
    """Of the first rows, not of a sample."""
    if len(cosines) < FIRST_ROWS:
        raise PaperError(f"{len(cosines)} rows: the release takes the first {FIRST_ROWS} or stops")
    return accuracy(cosines[:FIRST_ROWS])


def pair(reply: str) -> tuple[float, float]:
    """Scores of assistants 1 and 2 of a judge's reply; "8, 7", "8  7" and a refusal stop it."""
    words = reply.strip().split("\n")[0].strip().split(" ")
    if len(words) != 2:
        raise PaperError(f"{reply[:60]!r}: the first line is not two words")
    try:
        return float(words[0]), float(words[1])
    except ValueError as error:
        raise PaperError(f"{reply[:60]!r}: {error}") from error


def relative(replies: Sequence[str]) -> dict[str, float]:
    """Mean of ratios, in percent, and both means: one reply that cannot be read stops all."""
    pairs = [pair(reply) for reply in replies]
    if not pairs:
        raise PaperError("no replies: the release stops without samples")
    if any(first == 0 for first, _ in pairs):
        raise PaperError("a reference scored 0: the release divides by it")
    return {
        "gpt4_score": sum(first for first, _ in pairs) / len(pairs),
        "pred_score": sum(second for _, second in pairs) / len(pairs),
        "pred_relative_score": sum(second / first for first, second in pairs) / len(pairs) * 100,
        "data_size": len(pairs),
    }


def visual_chat(rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> dict[str, dict[str, float]]:
    """`rows`: (question type, domain flags, reply); scores by type, by domain and overall."""
    parts: dict[str | None, list[str]] = {}
    for kind, flags, reply in rows:
        domain = next((name for name in DOMAINS if flags[name]), None)
        for name in (kind, "overall", domain):
            parts.setdefault(name, []).append(reply)
    found = {name: relative(replies) for name, replies in parts.items()}
    return {name: found[name] for name in SHOWN if name in found}


def parts(outputs: Sequence[str]) -> tuple[str, str]:
    """Text and first picture of an interleaved answer; whatever ends in .png is a picture."""
    pictures = [out for out in outputs if out.endswith(".png")]
    text = " ".join(out for out in outputs if not out.endswith(".png"))
    return text, pictures[0] if pictures else ""


def multimodal(replies: Sequence[str], cosines: Sequence[float]) -> dict[str, float]:
    """`cosines`: of the answers that have a picture; 0 without any."""
    text = relative(replies)
    return {
        "text_score": text["pred_relative_score"],
        "num_text": text["data_size"],
        "image_score": sum(cosines) / len(cosines) if cosines else 0,
        "num_images": len(cosines),
    }


# What the judge is asked. The texts are the release's own (MIT), since replies depend on them.


def open_messages(question: str, answer: str, raw: str) -> list[dict[str, str]]:
    """Of an open question; the answer goes in lower case."""
    text = _prompt("release_correctness").format(
        question=question, answer=answer, generated=raw.lower()
    )
    return [{"role": "user", "content": text}]


def multimodal_messages(question: str, reference: str, text: str) -> list[dict[str, str]]:
    """The prompt speaks of a caption, and there is none."""
    return _relative("[Context]\n", question, reference, text)


def chat_messages(
    row: Mapping[str, Any], question: str, record: Mapping[str, Any]
) -> list[dict[str, str]]:
    """`row`: the benchmark's answer; `record`: the model's, whole, its name in it, as a dict."""
    context = (
        f"[Context]\nFigure Caption:\n{row['fig_label']}: {row['fig_caption']}\n\n"
        f"Figure Context:\n\t- {row['in_text_mention']}\n\n"
    )
    return _relative(context, question, row["gpt4_answer"], str(dict(record)))


def _relative(context: str, question: str, first: str, second: str) -> list[dict[str, str]]:
    answers = "".join(
        f"[Assistant {n}]\n{text}\n\n[End of Assistant {n}]\n\n"
        for n, text in ((1, first), (2, second))
    )
    asked = f"{context}[Question]\n{question}\n\n{answers}"
    content = f"{asked}[System]\n{_prompt('release_relative')}\n\n"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _prompt(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_bytes().decode()  # spaces and line ends as they are
