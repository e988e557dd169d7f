"""Reads the results of judges and scorers, and computes each record's scores by metric.

    judgments.jsonl     {id, kind, votes, why, judge, case}   the last line of an (id, kind) counts
    image_scores.jsonl  {id, scorer, fingerprint, ...}        one line per record and scorer

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
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medmax_jax.endpoints import reasoning
from medmax_jax.eval.config import EvalError
from medmax_jax.eval.metrics import strict
from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.metrics.strict import ItemScore
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.stats import intervals
from medmax_jax.io import journal

JUDGMENTS, IMAGE_SCORES = "judgments.jsonl", "image_scores.jsonl"
CORRECT, RELATIVE = "correct", "relative"
PAPER_OPEN, PAPER_RELATIVE = "paper_open", "paper_relative"
PAIRWISE_FAMILIES = ("multimodal", "visual_chat")  # families that a judge compares with a reference
RECALLS = (1, 5)
PREFIX = {"biomedclip": "clip", "efficientnet_lite0": "efficientnet"}
IMAGE_ONLY_SCORERS = ("efficientnet_lite0",)
IMAGE_METRICS = {
    "captioning": ("image_text", "caption_caption", "combined", "recall_1", "recall_5"),
    "image_generation": ("image_text", "image_image", "recall_1", "recall_5"),
    "multimodal": ("image_image", "image_image_best"),
}
IMAGE_PAIR_METRICS = ("image_image", "image_image_best")
COSINES = ("image_text", "caption_caption", *IMAGE_PAIR_METRICS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringInputs:
    """Holds the results of judges and scorers.

    judgments: kind -> id -> line. image_scores: scorer's name -> id -> line. `judge`, `scorers`:
    their fingerprints.
    """

    judgments: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)
    image_scores: Mapping[str, Mapping[str, Mapping]] = dataclasses.field(default_factory=dict)
    judge: str = ""
    scorers: Mapping[str, str] = dataclasses.field(default_factory=dict)


NO_INPUTS = ScoringInputs()


def read(workdir: str | Path, *, judge: str | None = None) -> ScoringInputs:
    """Read the results of a workdir.

    `judge`: fingerprint of the verdicts that count; None: that of the last line.
    """
    workdir = Path(workdir)
    lines = journal.read_jsonl(workdir / JUDGMENTS, ("id", "judge", "kind", "votes"))
    if judge is None:
        judge = lines[-1]["judge"] if lines else ""
    judgments: dict[str, dict[str, Mapping]] = {}
    for line in lines:
        if line["judge"] == judge:
            judgments.setdefault(line["kind"], {})[line["id"]] = line
    inputs = load_image_scores(workdir / IMAGE_SCORES)
    return dataclasses.replace(inputs, judgments=judgments, judge=judge)


def probe_scores_file(name: str) -> str:
    """Return the file of scores of a probe's captions, in the form of image_scores.jsonl."""
    return f"probe_{name}_{IMAGE_SCORES}"


def load_image_scores(path: Path) -> ScoringInputs:
    """Read the scores in a file of the form of image_scores.jsonl, without judgments."""
    by_scorer: dict[str, dict[str, Mapping]] = {}
    scorers = {}
    for line in journal.read_jsonl(path, ("id", "scorer", "fingerprint")):
        by_scorer.setdefault(line["scorer"], {})[line["id"]] = line
        scorers[line["scorer"]] = line["fingerprint"]
    return ScoringInputs(image_scores=by_scorer, scorers=scorers)


def answer_text(record: EvalRecord) -> str:
    """Return the text of a record that is its answer: "" where the model never left its reasoning.

    The scoring of the MedMax release reads the complete text (eval/metrics/release.py).
    """
    return reasoning.final_answer(record.text) or ""


def record_scores(record: EvalRecord, inputs: ScoringInputs = NO_INPUTS) -> dict[str, ItemScore]:
    """Return metric -> score of one record, the headline first; unscored where the model failed."""
    family, text, answer = record.family, answer_text(record), record.answer
    if family in ("vqa_closed", "vqa_mcq"):
        scores = {"accuracy": _accuracy(record)}
    elif family == "vqa_open":
        scores = _correctness_score(record, inputs)
        scores["exact"] = strict.scored(text_metrics.exact(text, answer))
        scores["token_f1"] = strict.scored(text_metrics.token_f1(text, answer))
    else:
        scores = _preference_score(record, inputs) if family in PAIRWISE_FAMILIES else {}
        for scorer, lines in inputs.image_scores.items():
            scores |= _image_scores(record, scorer, lines.get(record.id))
        scores |= _text_scores(record)
    if record.error:
        return {name: strict.unscored(record.error, low=minimum_score(name)) for name in scores}
    return scores


def minimum_score(metric: str) -> float:
    """Return the lowest possible value of a metric: cosines reach -1."""
    return -1.0 if metric.endswith(COSINES) else 0.0


def span(metric: str) -> intervals.Span:
    """Return the lowest and the highest possible value of a metric."""
    return minimum_score(metric), 1.0


def pairs(record: EvalRecord, inputs: ScoringInputs, kind: str) -> list[tuple[float, float]]:
    """Return the judge's (reference, model) votes on a record; [] for none."""
    line = inputs.judgments.get(kind, {}).get(record.id)
    return [(a, b) for a, b in line["votes"]] if line else []


def _accuracy(record: EvalRecord) -> ItemScore:
    text, answer, prompt = record.text, record.answer, record.prompt
    try:
        if record.family == "vqa_closed":
            return strict.closed(text, answer, prompt)
        return strict.choice(text, answer, prompt)
    except strict.StrictError as error:  # the row is invalid: report it after all others
        return strict.unscored(str(error))


def _correctness_score(record: EvalRecord, inputs: ScoringInputs) -> dict[str, ItemScore]:
    if CORRECT not in inputs.judgments:
        return {}
    line = inputs.judgments[CORRECT].get(record.id)
    if line is None or not line["votes"]:
        return {"judge_correct": strict.unscored(_why(line))}
    return {"judge_correct": strict.scored(sum(line["votes"]) / len(line["votes"]))}


def _preference_score(record: EvalRecord, inputs: ScoringInputs) -> dict[str, ItemScore]:
    """Return 1 for an answer that the judge rates above the reference, 0.5 for equal ones."""
    if RELATIVE not in inputs.judgments:
        return {}
    votes = pairs(record, inputs, RELATIVE)
    if not votes:
        line = inputs.judgments[RELATIVE].get(record.id)
        return {"judge_preference": strict.unscored(_why(line))}
    better = sum((b > a) + (b == a) / 2 for a, b in votes)
    return {"judge_preference": strict.scored(better / len(votes))}


def _why(line: Mapping | None) -> str:
    return "; ".join(line["why"]) if line else "not judged"


def _image_scores(record: EvalRecord, scorer: str, line: Mapping | None) -> dict[str, ItemScore]:
    """Return the image scores of a record.

    An answer without an image has the blank image's similarity, so not drawing gains nothing.
    """
    names = IMAGE_METRICS.get(record.family, ())
    if scorer in IMAGE_ONLY_SCORERS:
        names = [name for name in names if name in IMAGE_PAIR_METRICS]
    if line is None or line.get("problem"):
        why = line["problem"] if line else "not scored by the scorer"
        return {
            f"{PREFIX[scorer]}_{name}": strict.unscored(why, low=minimum_score(name))
            for name in names
        }
    values = {
        "image_text": _cosine(line, "image_text", lambda cosines: cosines[0]),
        "image_image": _cosine(line, "image_image", lambda cosines: cosines[0]),
        "image_image_best": _cosine(line, "image_image", max),
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


def _cosine(line: Mapping, name: str, select: Callable) -> float | None:
    cosines = line.get(name)
    if cosines is None:
        return None
    return select(cosines) if cosines else line[f"blank_{name}"]


def _text_scores(record: EvalRecord) -> dict[str, ItemScore]:
    family, text, answer = record.family, answer_text(record), record.answer
    values = {}
    if family != "image_generation":
        values["token_f1"] = text_metrics.token_f1(text, answer)
        values["rouge_l"] = text_metrics.rouge_l(text, answer)
    if family == "captioning" and record.facts:
        values["fact_recall"] = text_metrics.recall(text, record.facts)
    if family == "multimodal":
        values["has_image"] = float(bool(record.generated))
    generates_image = family in ("image_generation", "multimodal")
    if generates_image and record.predicted_modality is not None and record.modality:
        values["modality_match"] = float(record.predicted_modality == record.modality)
    return {name: strict.scored(value) for name, value in values.items()}


# ---- Files and columns of a workdir that earlier versions wrote under other names ----

OLD_FILES = {  # the end of a name -> as it is now
    "judged.jsonl": JUDGMENTS,
    # Verbatim: part of the data.
    "pictures.jsonl": IMAGE_SCORES,
}
OLD_COLUMNS = {  # files -> column -> as it is now
    "*.jsonl": {"looks_like": "predicted_modality", "kind": "modality"},
    "summary.json": {
        "can_find": "mde",
        "of_scored": "scored_only",
        "floor": "baseline",
        "floor_of": "baseline_name",
    },
}


def check_names(files: Iterable[Path]) -> None:
    """Raise EvalError where an earlier version wrote one of these files of a workdir.

    The message has a command that renames all of them. Files that do not exist are skipped.
    """
    changes, commands = [], []
    for path in sorted(path for path in files if path.is_file()):
        for old, new in OLD_FILES.items():
            if path.name == old or (
                path.name.startswith("probe_") and path.name.endswith(f"_{old}")
            ):
                target = path.with_name(path.name.removesuffix(old) + new)
                changes.append(f"{path} is named {target.name} now")
                commands.append(shlex.join(["mv", str(path), str(target)]))
        for pattern, columns in OLD_COLUMNS.items():
            first = next(iter(columns))
            if path.match(pattern) and _has_column(path, first):
                changes.append(f"column {first} of {path} is named {columns[first]} now")
                script = "; ".join(f's/"{a}": /"{b}": /' for a, b in columns.items())
                commands.append(shlex.join(["sed", "-i.bak", script, str(path)]))
    if changes:
        count = f" ({len(changes)} such names in total)" if len(changes) > 1 else ""
        raise EvalError(
            f"{changes[0]}{count}; use a new workdir, or rename: {' && '.join(commands)}"
        )


def _has_column(path: Path, name: str) -> bool:
    """Return whether a column is in the first line of a JSONL file, or in a JSON file."""
    with open(path, "rb") as file:
        text = file.readline() if path.suffix == ".jsonl" else file.read()
    return f'"{name}": '.encode() in text
