"""Reads and scores DeepTumorVQA v2 with one axial CT slice per question (its input 2d_image).

    benchmark/test_qa.json             {"questions": [{"qid": "bench_00017", "image_id":
                                       "BDMAP_00008446", "spacing": "[0.83 0.83 5.0]", "shape":
                                       "(512, 512, 116)", "sex": null, "age": null,
                                       "question": "..", "answer": "..", "mc_question":
                                       ".. A: .. B: ..", "correct_option": "A", "organ": "spleen",
                                       "question_type": "medical reasoning",
                                       "question_subtype": ".."}, ..]};
                                       test_qa.jsonl has the same objects, one per line
    benchmark/images_2d/whole/         BDMAP_00008446.png ..

Each question is posed twice: as multiple choice, and in free form, whose answer is a number, yes or
no, or a phrase, by its subtype. Read at: github.com/Schuture/DeepTumorVQA at 1df7460d, README.md,
HF_README.md (fields), src/deeptumorvqa/data/ (files, prompt), eval/metrics.py (subtypes, scoring),
metadata/ (counts, results). The prompt's sentences are that code's (Apache-2.0).
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmax_jax.data.records.row_streams import RowLocation, SourceError, json_lines
from medmax_jax.data.sources.row import (
    ExcludedRow,
    RejectedRow,
    RowError,
    collect_rows,
    field_image_path,
    field_text,
    first_file,
)
from medmax_jax.eval.benchmarks import fields
from medmax_jax.eval.benchmarks.card import (
    NO_NUMBER,
    YES_NO,
    Item,
    TaskSpec,
    item_row,
    published_scores,
)
from medmax_jax.eval.metrics import per_record, question_sets, strict
from medmax_jax.eval.metrics.question_sets import OwnScore
from medmax_jax.eval.records import EvalRecord

NAME = "deeptumorvqa"
FILES = ("benchmark/test_qa.json", "benchmark/test_qa.jsonl")
IMAGES = "benchmark/images_2d/whole"
COUNTS = {  # question_subtype -> number of test questions, by the kind of its free-form answer
    "numeric": {
        "organ volume measurement": 852,
        "organ HU measurement": 746,
        "lesion volume measurement": 210,
        "organ HU ratio": 89,
        "tumor burden percentage": 126,
        "largest lesion diameter": 146,
        "largest lesion slice": 136,
        "lesion counting": 523,
        "lesion count by location": 232,
        "organ aggregation": 977,
        "tumor organ HU difference": 151,
    },
    "closed": {
        "pancreatic lesion existence": 212,
        "liver lesion existence": 284,
        "kidney lesion existence": 296,
        "kidney tumor existence": 238,
        "kidney cyst existence": 202,
        "colon lesion existence": 198,
        "PDAC existence": 194,
        "PNET existence": 195,
        "lesion outlier": 101,
        "organ enlargement": 459,
        "pancreatic steatosis": 45,
        "pancreatic cyst resectability": 144,
        "pseudocyst determination": 3,
        "splenomegaly detection": 204,
        "portal hypertension assessment": 44,
    },
    "open": {
        "liver lesion clustering": 113,
        "kidney volume comparison": 181,
        "largest lesion attenuation": 183,
        "largest lesion location": 125,
        "inter-segment comparison": 358,
        "adjacent organ": 109,
        "bilateral kidney asymmetry": 109,
        "multi-organ lesion burden comparison": 146,
        "fatty liver": 99,
        "hepatic steatosis grading": 53,
        "pancreatic tumor staging": 201,
        "pancreatic lesion resectability": 98,
        "PDAC vs PNET classification": 311,
        "lesion type classification": 42,
        "splenomegaly grading": 842,
        "renal mass characterization": 23,
    },
}
KIND = {subtype: kind for kind, subtypes in COUNTS.items() for subtype in subtypes}
# Verbatim: part of the data.
SLICE = (
    "The image is a single axial CT slice from the patient's abdomen (window width 400, level 50)."
)
PATIENT = ("sex", "age", "scanner", "contrast")


def read(folder: pathlib.Path) -> Iterator[Item | RejectedRow]:
    """Yield the multiple choice and the free-form item of each question."""
    path = first_file(folder, FILES, "DeepTumorVQA")
    for form in ("mcq", "free"):
        yield from collect_rows(_rows(path), functools.partial(_item, folder, form))


def _rows(path: pathlib.Path) -> Iterator[tuple[RowLocation, Any]]:
    if path.suffix == ".jsonl":
        yield from json_lines(path)
        return
    content = fields.json_file(path)
    questions = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(questions, list):
        raise SourceError(f"{path.name}: no list named questions; use the file as it is published")
    for number, question in enumerate(questions, 1):
        yield RowLocation(path.name, number), question


def _item(folder: pathlib.Path, form: str, place: RowLocation, row: dict[str, Any]) -> Item:
    subtype = field_text(row, "question_subtype")
    if subtype not in KIND:
        raise RowError("question_subtype: not one of the 42 that are published")
    image_id = field_text(row, "image_id")
    image = field_image_path({"image_id": f"{image_id}.png"}, "image_id", IMAGES)
    fields.check_present(folder, image, "images_2d/whole")
    kind = "mcq" if form == "mcq" else KIND[subtype]
    question = field_text(row, "mc_question" if kind == "mcq" else "question")
    answer = field_text(row, "correct_option" if kind == "mcq" else "answer")
    if kind == "closed":
        found = re.match(r"(yes|no)\b", answer.lower())
        if not found:
            raise ExcludedRow(YES_NO)
        answer = found[1]
    if kind == "numeric" and strict.parse_number(answer) is None:
        raise ExcludedRow(NO_NUMBER)
    names = {"question_type": "question_type", "subtype": "question_subtype", "organ": "organ"}
    return item_row(
        NAME,
        place,
        kind,
        prompt="\n".join([*_facts(row, subtype), question]),
        answer=answer,
        image_path=image,
        id=f"{place.id(NAME).replace('/', '-')}-{form}",
        group=image_id,
        slices={ours: row.get(theirs) for ours, theirs in names.items()},
    )


def _facts(row: Mapping[str, Any], subtype: str) -> list[str]:
    """Return what the published prompt states before a question."""
    patient = ", ".join(f"{name}={row[name]}" for name in PATIENT if row.get(name))
    lines = [SLICE, f"Patient: {patient}." if patient else ""]
    if KIND[subtype] == "numeric" and row.get("spacing"):
        lines.append(f"Voxel spacing (mm): {row['spacing']}.  Volume shape: {row.get('shape')}.")
    return [line for line in lines if line]


# ---- The published scoring ----


def without_reasoning(text: str) -> str:
    """Return the text without <think> blocks; one that is not closed reaches to the end."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return text.partition("<think>")[0].strip()


def own_letter(text: str) -> str:
    """Return the letter that the published code reads: the first character, or the first alone."""
    text = without_reasoning(text).upper()
    if text[:1] and text[0] in "ABCD":
        return text[0]
    found = re.search(r"\b([A-D])\b", text)
    return found[1] if found else ""


def own_number(text: str) -> float | None:
    """Return the first number, as the published code reads it: without exponent and commas."""
    found = re.search(r"-?\d+\.?\d*", text)
    return float(found[0]) if found else None


def own_yes_no(text: str) -> str:
    """Return yes or no by how the text begins, "normal" is a no, else by the word; "" for none."""
    text = text.strip().lower()
    for word in ("yes", "no"):
        if text.startswith(word):
            return word
    return next((word for word in ("yes", "no") if re.search(rf"\b{word}\b", text)), "")


def own_phrase(text: str) -> str:
    """Return a phrase as the published code compares it."""
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s\-]", "", text.strip().lower()))


def own_correct_mcq(text: str, record: EvalRecord) -> bool:
    """Return whether the letter that is read is the correct one."""
    return own_letter(text) == record.answer.strip().upper()


def own_correct_closed(text: str, record: EvalRecord) -> bool:
    """Return whether the yes or no that is read is the correct one."""
    answer = own_yes_no(without_reasoning(text))
    return bool(answer) and answer == own_yes_no(record.answer)


def own_correct_open(text: str, record: EvalRecord) -> bool:
    """Return whether the phrase is the correct one."""
    return own_phrase(without_reasoning(text)) == own_phrase(record.answer)


def own_accuracy(text: str, record: EvalRecord) -> float | None:
    """Return the published relative accuracy; None where the reference has no number."""
    reference, value = own_number(record.answer), own_number(without_reasoning(text))
    if reference is None:
        return None
    return 0.0 if value is None else strict.relative_accuracy(value, reference)


def own_scores_numeric(records: Sequence[EvalRecord]) -> dict[str, OwnScore]:
    """Return the published relative accuracy, and the shares within its tolerances."""
    scores = {"mra": question_sets.share(own_accuracy(r.text, r) for r in records)}
    for percent in per_record.TOLERANCES:
        verdicts = (own_within(record.text, record, percent) for record in records)
        scores[f"within_{percent}"] = question_sets.share(verdicts)
    return scores


def own_within(text: str, record: EvalRecord, percent: int) -> bool | None:
    """Return whether a number is within a tolerance; None where the reference has no number."""
    reference, value = own_number(record.answer), own_number(without_reasoning(text))
    if reference is None or value is None:
        return None if reference is None else False
    if reference == 0:
        return value == 0
    return abs(value - reference) / abs(reference) <= percent / 100


def own_scores_open(records: Sequence[EvalRecord]) -> dict[str, OwnScore]:
    """Return the published exact match of phrases."""
    verdicts = (own_correct_open(record.text, record) for record in records)
    return {"exact": question_sets.share(verdicts)}


RESULTS = "metadata/leaderboard.csv of github.com/Schuture/DeepTumorVQA at 1df7460d"
SCHEMA = "metadata/subtype_schema.csv of github.com/Schuture/DeepTumorVQA at 1df7460d"
CODE = "src/deeptumorvqa/eval/metrics.py of github.com/Schuture/DeepTumorVQA at 1df7460d"


def _card(kind: str, title: str, family: str, metric: str, **changes: Any) -> TaskSpec:
    return TaskSpec(
        task=f"{NAME}_{kind}",
        title=f"DeepTumorVQA v2, 2D, {title}",
        family=family,
        source="huggingface.co/datasets/tumor-vqa/DeepTumorVQA_2.0, benchmark/",
        split="benchmark",
        licence="CC BY 4.0: questions; the images have the licenses of their CT sources",
        metric=metric,
        counts=10_000 if kind == "mcq" else sum(COUNTS[kind].values()),
        counted=SCHEMA,
        prompt="the published facts of the scan, then the row's question",
        own_scorer=f"{CODE}: agrees on 1,200 of 1,200 outputs",
        **changes,
    )


CARDS = (
    _card(
        "mcq",
        "multiple choice",
        "vqa_mcq",
        "accuracy",
        differs="DeepTumorVQA: an instruction to write the letter alone; any text that begins with "
        "a letter from A to D is that option",
        own_correct=own_correct_mcq,
        published=published_scores(
            "DeepTumorVQA accuracy, %",
            RESULTS,
            *(("Meissa-4B FT (organ)", 66.3), ("Qwen3-VL-4B FT (organ)", 64.6)),
            *(("Qwen3.5-35B-A3B", 39.9), ("LLaVA-OneVision 7B", 38.9)),
            *(("Gemini-3-Flash", 38.8), ("Qwen3-VL-4B", 37.8), ("InternVL3-8B", 34.4)),
            *(("HuatuoGPT-Qwen2.5VL", 36.0), ("LLaVA-Med 7B", 32.3)),
            *(("MedGemma 4B (2D)", 30.8), ("junior radiologist, 3D, 200 questions", 45.0)),
        ),
    ),
    _card(
        "numeric",
        "free form, numbers",
        "vqa_numeric",
        "mra",
        differs="DeepTumorVQA: the first number of the answer; results over all free forms",
        own_scores=own_scores_numeric,
    ),
    _card(
        "closed",
        "free form, yes or no",
        "vqa_closed",
        "accuracy",
        differs="DeepTumorVQA: what the answer begins with; results over all free forms",
        own_correct=own_correct_closed,
    ),
    _card(
        "open",
        "free form, phrases",
        "vqa_open",
        "judge_correct",
        differs="DeepTumorVQA: exact match of the complete answer; results over all free forms",
        own_scores=own_scores_open,
    ),
)
