"""The release's score of a task's records, by metric of ours that it belongs beside.

    accuracy         closed: substrings; choice: the text is the letter
    judge_correct    the release's one call, what cannot be read dropped
    judge_relative   mean of ratios of the release's one call, reference first; a reply that cannot
                     be read leaves the task without a score, as it stops the release
    clip_image_text  captions: the raw cosine; pictures: of the first 100 rows, else none
    clip_image_image multimodal: of the first picture, over those who drew

Each is a share, as ours: the published numbers are in percent, but for cosines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval import evidence, paper
from eval.evidence import Evidence, Record

CLIP = "biomedclip"  # the only scorer that the release has


def of(records: Sequence[Record], known: Evidence) -> dict[str, dict[str, Any]]:
    """Metric -> {paper, paper_n, paper_why} of the records of one task."""
    family = records[0]["family"]
    if family == "vqa_closed":
        return {"accuracy": _tell(_mean, [paper.closed(r["text"], r["answer"]) for r in records])}
    if family == "vqa_mcq":
        return {"accuracy": _tell(_mean, [paper.choice(r["text"], r["answer"]) for r in records])}
    if family == "vqa_open":
        replies = _replies(records, known, evidence.PAPER_OPEN)
        if replies is None:
            return {}
        read = [verdict for verdict in map(paper.judged, replies) if verdict is not None]
        return {"judge_correct": _tell(_mean, read)}
    found = {}
    if family in evidence.COMPARED:
        replies = _replies(records, known, evidence.PAPER_RELATIVE)
        if replies is not None:
            found["judge_relative"] = _tell(_ratio, replies)
    lines = known.seen.get(CLIP)
    if lines is not None and family in ("captioning", "image_generation"):
        cosines = _cosines(records, lines, "image_text")
        score = _mean if family == "captioning" else lambda some: paper.generation(some)[0]
        found["clip_image_text"] = _tell(score, cosines)
    if lines is not None and family == "multimodal":
        found["clip_image_image"] = _tell(_mean, _cosines(records, lines, "image_image"))
    return found


def _tell(score: Callable[[Sequence], float], some: Sequence) -> dict[str, Any]:
    try:
        value, why = score(some), ""
    except paper.PaperError as error:
        value, why = math.nan, str(error)
    if math.isnan(value):
        return {"paper": None, "paper_n": len(some), "paper_why": why or "nothing that it can read"}
    return {"paper": float(value), "paper_n": len(some), "paper_why": ""}


def _mean(some: Sequence[float]) -> float:
    return paper.accuracy(some)[0]


def _ratio(replies: Sequence[str]) -> float:
    return paper.relative(replies)["pred_relative_score"] / 100


def _replies(records: Sequence[Record], known: Evidence, kind: str) -> list[str] | None:
    """The replies as they were; None where nobody was asked in the release's words."""
    lines = known.judged.get(kind)
    if lines is None:
        return None
    return [lines[r["id"]]["votes"][0] for r in records if lines.get(r["id"], {}).get("votes")]


def _cosines(records: Sequence[Record], lines: Mapping[str, Mapping], name: str) -> list[float]:
    """Of the first pictures; as the release prepares them, where that differs."""
    found = []
    for record in records:
        line = lines.get(record["id"], {})
        some = line.get(f"{name}_released", line.get(name))
        found += some[:1] if some else []
    return found
