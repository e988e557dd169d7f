"""Reads the results of judges and scorers, and computes each record's scores by metric.

    judged.jsonl    {id, kind, votes, why, judge, case}     the last line of an (id, kind) counts
    pictures.jsonl  {id, scorer, fingerprint, ...}          one line per record and scorer

    family            metrics, those of a judge or scorer only where one is configured
    vqa_closed        accuracy
    vqa_mcq           accuracy
    vqa_open          judge_correct, exact, token_f1
    captioning        S_image_text, S_caption_caption, S_combined, S_recall_1, S_recall_5,
                      token_f1, rouge_l, fact_recall
    image_generation  S_image_text, S_image_image, S_recall_1, S_recall_5, modality_match
    multimodal        judge_preference, S_image_image, S_image_image_best, token_f1, rouge_l,
                      has_image, modality_match
    visual_chat       judge_preference, token_f1, rouge_l

S is `clip` for BiomedCLIP and `efficientnet` for EfficientNet-Lite0, which reads no text. A record
on which a judge or scorer failed is unscored; a metric without its judge or scorer is absent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medmax_jax.endpoints import egress, reasoning
from medmax_jax.eval.metrics import strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.stats import intervals
from medmax_jax.io import journal

Record = Mapping[str, Any]
JUDGED, PICTURES = "judged.jsonl", "pictures.jsonl"
CORRECT, RELATIVE = "correct", "relative"
PAPER_OPEN, PAPER_RELATIVE = "paper_open", "paper_relative"
PAIRWISE_FAMILIES = ("multimodal", "visual_chat")  # families that a judge compares with a reference
RECALLS = (1, 5)
PREFIX = {"biomedclip": "clip", "efficientnet_lite0": "efficientnet"}
PICTURES_ONLY = ("efficientnet_lite0",)
IMAGE_METRICS = {
    "captioning": ("image_text", "caption_caption", "combined", "recall_1", "recall_5"),
    "image_generation": ("image_text", "image_image", "recall_1", "recall_5"),
    "multimodal": ("image_image", "image_image_best"),
}
OF_PICTURES = ("image_image", "image_image_best")
COSINES = ("image_text", "caption_caption", *OF_PICTURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """Holds the results of judges and scorers.

    judged: kind -> id -> line. seen: scorer's name -> id -> line. `judge`, `scorers`: their
    fingerprints.
    """

    judgments: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)
    image_scores: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)
    judge: str = ""
    scorers: Mapping[str, str] = dataclasses.field(default_factory=dict)


NO_INPUTS = ScoringInputs()


def is_credentialed(record: Record) -> bool:
    """Return whether a record's content must not leave the private workdir."""
    return record.get("data_class") == egress.CREDENTIALED


def read(workdir: str | Path, *, judge: str | None = None) -> ScoringInputs:
    """Read the results of a workdir.

    `judge`: fingerprint of the verdicts that count; None: that of the last line.
    """
    workdir = Path(workdir)
    lines = journal.read_jsonl(workdir / JUDGED, ("id", "judge", "kind", "votes"))
    if judge is None:
        judge = lines[-1]["judge"] if lines else ""
    judged: dict[str, dict[str, Mapping]] = {}
    for line in lines:
        if line["judge"] == judge:
            judged.setdefault(line["kind"], {})[line["id"]] = line
    return dataclasses.replace(load_image_scores(workdir / PICTURES), judgments=judged, judge=judge)


def probe_scores_file(name: str) -> str:
    """Return the file of scores of a probe's captions, in the form of pictures.jsonl."""
    return f"probe_{name}_{PICTURES}"


def load_image_scores(path: Path) -> ScoringInputs:
    """Read the scores in a file of the form of pictures.jsonl, without judgments."""
    seen: dict[str, dict[str, Mapping]] = {}
    scorers = {}
    for line in journal.read_jsonl(path, ("id", "scorer", "fingerprint")):
        seen.setdefault(line["scorer"], {})[line["id"]] = line
        scorers[line["scorer"]] = line["fingerprint"]
    return ScoringInputs(image_scores=seen, scorers=scorers)


def answer_text(record: Record) -> str:
    """Return the text of a record that is its answer: "" where the model never left its reasoning.

    The scoring of the MedMax release reads the complete text (eval/metrics/release.py).
    """
    return reasoning.final_answer(record["text"]) or ""


def record_scores(record: Record, known: ScoringInputs = NO_INPUTS) -> dict[str, ItemScore]:
    """Return metric -> verdict of one record, the headline first.

    Verdicts are unscored where the model failed.
    """
    family, text, answer = record["family"], answer_text(record), record["answer"]
    if family in ("vqa_closed", "vqa_mcq"):
        found = {"accuracy": _matched(record)}
    elif family == "vqa_open":
        found = _opened(record, known)
        found["exact"] = strict.scored(text_metrics.exact(text, answer))
        found["token_f1"] = strict.scored(text_metrics.token_f1(text, answer))
    else:
        found = _compared(record, known) if family in PAIRWISE_FAMILIES else {}
        for scorer, lines in known.image_scores.items():
            found |= _seen(record, scorer, lines.get(record["id"]))
        found |= _written(record)
    if record.get("error"):
        return {name: strict.unscored(record["error"], low=minimum_score(name)) for name in found}
    return found


def minimum_score(metric: str) -> float:
    """Return the lowest possible value of a metric: cosines reach -1."""
    return -1.0 if metric.endswith(COSINES) else 0.0


def span(metric: str) -> intervals.Span:
    """Return the lowest and the highest possible value of a metric."""
    return minimum_score(metric), 1.0


def pairs(record: Record, known: ScoringInputs, kind: str) -> list[tuple[float, float]]:
    """Return the judge's (reference, model) votes on a record; [] for none."""
    line = known.judgments.get(kind, {}).get(record["id"])
    return [(a, b) for a, b in line["votes"]] if line else []


def _matched(record: Record) -> ItemScore:
    text, answer, prompt = record["text"], record["answer"], record["prompt"]
    try:
        if record["family"] == "vqa_closed":
            return strict.closed(text, answer, prompt)
        return strict.choice(text, answer, prompt)
    except strict.StrictError as error:  # the row is invalid: report it after all others
        return strict.unscored(str(error))


def _opened(record: Record, known: ScoringInputs) -> dict[str, ItemScore]:
    if CORRECT not in known.judgments:
        return {}
    line = known.judgments[CORRECT].get(record["id"])
    if line is None or not line["votes"]:
        return {"judge_correct": strict.unscored(_why(line))}
    return {"judge_correct": strict.scored(sum(line["votes"]) / len(line["votes"]))}


def _compared(record: Record, known: ScoringInputs) -> dict[str, ItemScore]:
    """Return 1 for an answer that the judge rates above the reference, 0.5 for equal ones."""
    if RELATIVE not in known.judgments:
        return {}
    votes = pairs(record, known, RELATIVE)
    if not votes:
        line = known.judgments[RELATIVE].get(record["id"])
        return {"judge_preference": strict.unscored(_why(line))}
    better = sum((b > a) + (b == a) / 2 for a, b in votes)
    return {"judge_preference": strict.scored(better / len(votes))}


def _why(line: Mapping | None) -> str:
    return "; ".join(line["why"]) if line else "not judged"


def _seen(record: Record, scorer: str, line: Mapping | None) -> dict[str, ItemScore]:
    """Return the image scores of a record.

    An answer without an image has the blank image's similarity, so not drawing gains nothing.
    """
    names = IMAGE_METRICS.get(record["family"], ())
    if scorer in PICTURES_ONLY:
        names = [name for name in names if name in OF_PICTURES]
    if line is None or line.get("problem"):
        why = line["problem"] if line else "the scorer has not seen it"
        return {
            f"{PREFIX[scorer]}_{name}": strict.unscored(why, low=minimum_score(name))
            for name in names
        }
    values = {
        "image_text": _one(line, "image_text", lambda some: some[0]),
        "image_image": _one(line, "image_image", lambda some: some[0]),
        "image_image_best": _one(line, "image_image", max),
        "caption_caption": line.get("text_text"),
        "combined": line.get("combined"),
    }
    if line.get("rank") is not None:
        values |= {f"recall_{k}": float(line["rank"] <= k) for k in RECALLS}
    return {
        f"{PREFIX[scorer]}_{name}": strict.scored(values[name])
        for name in names
        if values.get(name) is not None
    }


def _one(line: Mapping, name: str, choose: Callable) -> float | None:
    cosines = line.get(name)
    if cosines is None:
        return None
    return choose(cosines) if cosines else line[f"blank_{name}"]


def _written(record: Record) -> dict[str, ItemScore]:
    family, text, answer = record["family"], answer_text(record), record["answer"]
    found = {}
    if family != "image_generation":
        found["token_f1"] = text_metrics.token_f1(text, answer)
        found["rouge_l"] = text_metrics.rouge_l(text, answer)
    if family == "captioning" and record["facts"]:
        found["fact_recall"] = text_metrics.recall(text, record["facts"])
    if family == "multimodal":
        found["has_image"] = float(bool(record["images"]))
    drew = family in ("image_generation", "multimodal")
    if drew and record["looks_like"] is not None and record["kind"]:
        found["modality_match"] = float(record["looks_like"] == record["kind"])
    return {name: strict.scored(value) for name, value in found.items()}
