"""Reproduces the scoring of the MedMax release (its evaluation/ at 20b7055), errors included.

    closed      "no" anywhere in the text is a no: normal, unknown, nodule; "eyes" counts as yes
    choice      the complete text is the letter
    open        the judge's reply holds "Correctness: 1" or "Correctness: 0", else it is dropped
    relative    first line of the reply is two numbers, else the whole task stops without a score
    images      mean cosine of the generated images; samples without an image are not counted
    intervals   none; a standard error as if all questions were independent

Use it only for comparison with the published numbers; eval/metrics/strict.py has the correct
scores. It has no options. PaperError: the release stops here, and its task has no score.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import per_record, strict
from medmax_jax.eval.metrics.per_record import ScoringInputs
from medmax_jax.eval.records import EvalRecord

FOLDER = Path(__file__).parents[1] / "prompts"
JUDGE = "gpt-4o-mini"  # called once, at the endpoint's own temperature
FIRST_ROWS = 100  # of each image generation task
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
REPORTED = ("conversation", "detailed_description", *DOMAINS, "overall")
# Verbatim: part of the data.
SYSTEM = "'You are a helpful and precise assistant for checking the quality of the answer."
# Verbatim: part of the data.
DETAILED = "Analyze the image in a comprehensive and detailed manner."


class PaperError(ValueError):
    """Raised where the release stops with an exception; the message names the cause."""


def closed(raw: str, answer: str) -> bool:
    """Score a closed question, also of ProbMed: one question at a time.

    closed("Normal", "no") -> True.
    """
    lowered = raw.lower()
    yes, no = "yes" in lowered, "no" in lowered
    return (answer == "yes" and yes and not no) or (answer == "no" and no and not yes)


def choice(raw: str, answer: str) -> bool:
    """Score a multiple choice question.

    choice(" b", "B") -> True; choice("B.", "B") -> False.
    """
    return raw.upper().strip() == answer


def parse_judgment(reply: str) -> bool | None:
    """Return the judge's verdict on an open answer, or None, which is dropped.

    None: "**Correctness:** 1", "1".
    """
    if "Correctness: 1" in reply:
        return True
    return False if "Correctness: 0" in reply else None


def accuracy(scores: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error; nan where numpy gives nan. Cosines of captions too."""
    n = len(scores)
    if not n:
        return math.nan, math.nan
    mean = sum(scores) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in scores) / (n - 1)) / math.sqrt(n)


def generation(cosines: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of the first rows, not of a sample."""
    if len(cosines) < FIRST_ROWS:
        raise PaperError(f"{len(cosines)} rows: the release takes the first {FIRST_ROWS} or stops")
    return accuracy(cosines[:FIRST_ROWS])


def pair(reply: str) -> tuple[float, float]:
    """Return the scores of assistants 1 and 2 of a judge's reply.

    "8, 7", "8  7" and a refusal raise PaperError.
    """
    words = reply.strip().split("\n")[0].strip().split(" ")
    if len(words) != 2:
        raise PaperError(f"{reply[:60]!r}: the first line is not two words")
    try:
        return float(words[0]), float(words[1])
    except ValueError as error:
        raise PaperError(f"{reply[:60]!r}: {error}") from error


def relative(replies: Sequence[str]) -> dict[str, float]:
    """Return the mean of ratios, in percent, and both means.

    One unreadable reply raises PaperError for the complete task.
    """
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
    """Return the scores of visual chat by type, by domain and overall.

    `rows`: (question type, domain flags, reply).
    """
    parts: dict[str | None, list[str]] = {}
    for kind, flags, reply in rows:
        domain = next((name for name in DOMAINS if flags[name]), None)
        for name in (kind, "overall", domain):
            parts.setdefault(name, []).append(reply)
    scores_by_name = {name: relative(replies) for name, replies in parts.items()}
    return {name: scores_by_name[name] for name in REPORTED if name in scores_by_name}


def text_and_image(outputs: Sequence[str]) -> tuple[str, str]:
    """Return text and first image of an interleaved answer; any .png ending is an image."""
    image_names = [out for out in outputs if out.endswith(".png")]
    text = " ".join(out for out in outputs if not out.endswith(".png"))
    return text, image_names[0] if image_names else ""


def multimodal(replies: Sequence[str], cosines: Sequence[float]) -> dict[str, float]:
    """Return the interleaved scores. `cosines`: of the answers with an image; 0 without any."""
    text = relative(replies)
    return {
        "text_score": text["pred_relative_score"],
        "num_text": text["data_size"],
        "image_score": sum(cosines) / len(cosines) if cosines else 0,
        "num_images": len(cosines),
    }


# Messages for the judge. The texts are the release's own (MIT), since replies depend on them.


def open_messages(question: str, answer: str, text: str) -> list[dict[str, str]]:
    """Return the messages for an open question; the answer is sent in lower case."""
    text = _prompt("release_correctness").format(
        question=question, answer=answer, generated=text.lower()
    )
    return [{"role": "user", "content": text}]


def multimodal_messages(question: str, reference: str, text: str) -> list[dict[str, str]]:
    """Return the messages for an interleaved answer.

    The prompt mentions a caption, and there is none.
    """
    return _relative("[Context]\n", question, reference, text)


def chat_messages(
    row: Mapping[str, Any], question: str, record: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return the messages for a visual chat answer.

    `row`: the benchmark's answer; `record`: the model's complete record, with its name, as a dict.
    """
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
    question_part = f"{context}[Question]\n{question}\n\n{answers}"
    content = f"{question_part}[System]\n{_prompt('release_relative')}\n\n"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _prompt(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_bytes().decode()  # spaces and line ends unchanged


# ---- The release's score of a task's records, keyed by the corresponding metric here ----
#
#     accuracy         closed: substrings; choice: the text is the letter
#     judge_correct    the release's one call, unreadable replies dropped
#     judge_relative   mean of ratios of the release's one call, reference first; one bad reply
#                      leaves the task without a score, as it stops the release
#     clip_image_text  captions: the raw cosine; images: of the first 100 rows, else none
#     clip_image_image multimodal: of the first image, over the answers with an image
#
# Each is a share, as here: the published numbers are in percent, except for cosines.

CLIP = "biomedclip"  # the only scorer that the release has


def release_scores(
    records: Sequence[EvalRecord], inputs: ScoringInputs
) -> dict[str, dict[str, Any]]:
    """Return metric -> {paper, paper_n, paper_why} of the records of one task."""
    family = records[0].family
    if family == "vqa_closed":
        return {"accuracy": _score(_mean, [closed(r.text, r.answer) for r in records])}
    if family == "vqa_mcq":
        return {"accuracy": _score(_mean, [choice(r.text, r.answer) for r in records])}
    if family == "vqa_open":
        replies = _replies(records, inputs, per_record.PAPER_OPEN)
        if replies is None:
            return {}
        verdicts = [verdict for verdict in map(parse_judgment, replies) if verdict is not None]
        return {"judge_correct": _score(_mean, verdicts)}
    scores = {}
    if family in per_record.PAIRWISE_FAMILIES:
        replies = _replies(records, inputs, per_record.PAPER_RELATIVE)
        if replies is not None:
            scores["judge_relative"] = _score(_ratio, replies)
    lines = inputs.image_scores.get(CLIP)
    if lines is not None and family in ("captioning", "image_generation"):
        cosines = _cosines(records, lines, "image_text")
        score = _mean if family == "captioning" else lambda values: generation(values)[0]
        scores["clip_image_text"] = _score(score, cosines)
    if lines is not None and family == "multimodal":
        scores["clip_image_image"] = _score(_mean, _cosines(records, lines, "image_image"))
    return scores


def _score(score: Callable[[Sequence], float], values: Sequence) -> dict[str, Any]:
    try:
        value, why = score(values), ""
    except PaperError as error:
        value, why = math.nan, str(error)
    if math.isnan(value):
        why = why or "no reply or answer that the release can parse"
        return {"paper": None, "paper_n": len(values), "paper_why": why}
    return {"paper": float(value), "paper_n": len(values), "paper_why": ""}


def _mean(values: Sequence[float]) -> float:
    return accuracy(values)[0]


def _ratio(replies: Sequence[str]) -> float:
    return relative(replies)["pred_relative_score"] / 100


def _replies(records: Sequence[EvalRecord], inputs: ScoringInputs, kind: str) -> list[str] | None:
    """Return the unchanged replies; None where no judge received the release's messages."""
    lines = inputs.judgments.get(kind)
    if lines is None:
        return None
    return [lines[r.id]["votes"][0] for r in records if lines.get(r.id, {}).get("votes")]


def _cosines(records: Sequence[EvalRecord], lines: Mapping[str, Mapping], name: str) -> list[float]:
    """Return the cosines of the first images; as the release prepares them, where that differs."""
    cosines = []
    for record in records:
        line = lines.get(record.id, {})
        values = line.get(f"{name}_released", line.get(name))
        cosines += values[:1] if values else []
    return cosines


# ---- The content of an answer where no judge is needed, as both scorings parse it ----


def parse_and_judge(family: str, text: str, answer: str, prompt: str) -> dict[str, Any]:
    """Return {parsed, strict, paper}: the parsed answer ("yes", "B", None) and both verdicts.

    strict: right, wrong or unparsed. paper: right or not, by the release. {} for other families.
    """
    if family not in ("vqa_closed", "vqa_mcq"):
        return {}
    parsed, expected = (strict.parse_answer(family, content, prompt) for content in (text, answer))
    if parsed is None:
        verdict = "unparsed"
    else:
        verdict = "right" if parsed == expected else "wrong"
    right = closed if family == "vqa_closed" else choice
    return {"parsed": parsed, "strict": verdict, "paper": right(text, answer)}
