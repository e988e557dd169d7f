"""Reads predictions in the formats of four evaluation programs, found by the columns of the file.

    smmile      result_MODEL_{0-shot,ICL}[_open,_mcqa].csv, with *_evaluation.json next to it
                eth-medical-ai-lab/smmile at ab004d2f, inference_*.py and evaluate_EM.py
    lmms_eval   DATE_samples_TASK.jsonl, with DATE_results.json
                EvolvingLMMs-Lab/lmms-eval at 75571cfe, loggers/evaluation_tracker.py
    vlmevalkit  MODEL_DATASET.{xlsx,tsv,json} and MODEL_DATASET_JUDGE_result.xlsx
                open-compass/VLMEvalKit at e8e78f05, vlmeval/inference.py, smp/file.py
    medevalkit  MODEL/DATASET/results.json, with metrics.json
                alibaba-damo-academy/MedEvalKit at 9b12e3b3, utils/base_dataset.py

An answer has what its row holds: the text of the model, question, options and reference where
these are there, and the verdicts of the program that wrote it.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import text as text_metrics
from medmax_jax.eval.prediction_files import tables
from medmax_jax.eval.prediction_files.tables import PredictionFileError, cell_number, cell_text
from medmax_jax.io import text_files
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError

JUDGE = "judge"  # verdicts of a language model
EXACT_MATCH = "exact match"
MAX_VERDICTS = 50  # scores of a task in lmms-eval
MAX_NAME = 1_024  # characters of an image's path
OPTION_FIELDS = ("choices", "options")
IMAGE_FIELDS = ("image_path", "image_name", "img_name", "img_path", "Figure_path", "images")
_LETTERED = re.compile(r"\s*\(?([A-Z])\s*[.:)]\s*")
_PERMUTED = "_perm_"  # SMMILE++: the problem, and the number of the order of its examples
# LLaVA and Llama files of SMMILE repeat the prompt; inference_llava_mcqa.py reads what follows.
_PROMPT_REPEATED = re.compile(r"\s*(?:USER:|user\b)")
_ASSISTANT = re.compile(r"ASSISTANT:|assistant[ \t]*\n")
_OPTION_LINE = re.compile(r"([A-Z])\. ")
_LISTED = re.compile(r"following options:\n(.*?)\n\nYour task", re.S)
LMMS_KEYS = (  # of a sample; all other numbers are scores of the task
    *("doc_id", "doc", "input", "target", "arguments", "resps", "filtered_resps"),
    *("token_counts", "doc_hash", "prompt_hash", "target_hash", "input_media", "task_name"),
)
LMMS_VERDICTS = ("score", "is_correct", "correct")  # of a score that is an object
NO_ANSWERS = "no row holds an answer that can be read"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """Holds one row. `key`: its id or index, unique in the file.

    options: letter -> text, those that the row holds; all_options: these are all that the question
    has. reference: a letter of a multiple choice question, else the text; "" for none. recorded:
    the option that the other program read from the text. verdicts: its scores, 0 to 1. group: what
    several rows share, which makes them one cluster of an interval.
    """

    key: str
    place: str
    family: str
    text: str
    question: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    all_options: bool = True
    reference: str = ""
    recorded: str = ""
    group: str = ""
    images: tuple[str, ...] = ()
    verdicts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """Holds the answers of one file.

    stated: name of a verdict -> total that a file next to it publishes. left_out: reason -> the
    places of the rows that cannot be used.
    """

    path: Path
    format: str
    model: str
    benchmark: str
    answers: tuple[Answer, ...]
    stated: Mapping[str, float] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Defines how a format is found and read. `needs`: columns, of each tuple at least one."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[tables.Table], PredictionFile]

    def fits(self, columns: Iterable[str]) -> bool:
        present = set(columns)
        return all(present & set(names) for names in self.needs)


def read_predictions(path: str | Path) -> PredictionFile:
    """Read a file in one of FORMATS; raise PredictionFileError."""
    table = tables.read_table(Path(path))
    if not table.rows:
        first = printable(table.malformed[0], 120) if table.malformed else ""
        why = f"no row can be read; {first}" if first else "it has no rows"
        raise PredictionFileError(f"{path}: {why}; name a file of predictions")
    found = [each for each in FORMATS if each.fits(table.columns)]
    if len(found) != 1:
        needs = "; ".join(
            f"{each.name}: {', '.join('|'.join(names) for names in each.needs)}" for each in FORMATS
        )
        shown = printable(", ".join(table.columns[:12]) or "none", 200)
        raise PredictionFileError(
            f"{path}: no known format of predictions; it has the columns {shown}, expected are "
            f"those of one of {needs}"
        )
    result = found[0].read(table)
    if not result.answers:
        reasons = "; ".join(f"{why} ({len(at)})" for why, at in result.left_out.items())
        raise PredictionFileError(f"{path}: {NO_ANSWERS}: {reasons or 'the file has no rows'}")
    return _with_scores_of_one(result)


def _with_scores_of_one(file: PredictionFile) -> PredictionFile:
    """Return the file without the scores that are on another scale than 0 to 1 in any row."""
    other = {
        name: value
        for answer in file.answers
        for name, value in answer.verdicts.items()
        if not 0 <= value <= 1
    }
    if not other:
        return file
    answers = [
        dataclasses.replace(a, verdicts={k: v for k, v in a.verdicts.items() if k not in other})
        for a in file.answers
    ]
    notes = [f"{name} has values like {v:g}: no score from 0 to 1" for name, v in other.items()]
    stated = {name: value for name, value in file.stated.items() if name not in other}
    return dataclasses.replace(
        file, answers=tuple(answers), stated=stated, notes=(*file.notes, *notes)
    )


# ---- SMMILE


def _read_smmile(table: tables.Table) -> PredictionFile:
    stem = table.path.stem
    name = re.sub(r"_(?:open|mcqa)$", "", stem.removeprefix("result_"))
    is_choice = bool({"correct_option", "correct_letter"} & set(table.columns))
    stated, by_problem = _smmile_published(table.path)
    to_answer = _smmile_choice if is_choice else _smmile_open
    answers, left_out = _collect(
        table, lambda place, row, n: to_answer(place, row, by_problem.get(_problem(row), {}))
    )
    notes = []
    if is_choice and "full_response" not in table.columns:
        notes.append("the file has no text of the model: the letters that it recorded are scored")
    repeated = sum(bool(_PROMPT_REPEATED.match(_raw(row))) for _, row in table.rows)
    if is_choice and repeated:
        notes.append(f"{repeated} texts repeat the prompt; what follows it is scored")
    benchmark = "SMMILE++" if any(_PERMUTED in answer.key for answer in answers) else "SMMILE"
    return PredictionFile(
        path=table.path, format="smmile", model=name.replace("_", " "), benchmark=benchmark,
        answers=answers, stated=stated, left_out=left_out, notes=tuple(notes),
    )  # fmt: skip


def _problem(row: Mapping[str, Any]) -> str:
    return cell_text(row.get("problem_id"))


def _raw(row: Mapping[str, Any]) -> str:
    return cell_text(row.get("full_response"))


def _smmile_open(place: str, row: Mapping[str, Any], verdicts: Mapping[str, float]) -> Answer:
    return Answer(
        key=_problem(row), place=place, family="vqa_open",
        text=cell_text(row.get("generated_answer")),
        question=_first(row, "final_question", "original_question"),
        reference=_first(row, "true_answer", "correct_answer"),
        group=_problem(row).split(_PERMUTED)[0], verdicts=verdicts,
    )  # fmt: skip


def _smmile_choice(
    place: str, row: Mapping[str, Any], verdicts: Mapping[str, float]
) -> Answer | str:
    reference = _first(row, "correct_option", "correct_letter").strip()
    recorded = _first(row, "selected_option", "extracted_answer").strip()
    if not re.fullmatch("[A-Z]", reference):
        return "the reference is not the letter of an option"
    text, options = recorded, {reference: _first(row, "true_answer", "correct_answer").strip()}
    all_options = False
    if "full_response" in row:
        text, listed = _without_prompt(_raw(row))
        chosen = cell_text(row.get("generated_answer")).strip()
        if re.fullmatch("[A-Z]", recorded) and chosen:
            options.setdefault(recorded, chosen)
        if listed:
            options, all_options = listed, True
    correct = cell_number(row.get("is_correct"))
    return Answer(
        key=_problem(row), place=place, family="vqa_mcq", text=text, recorded=recorded,
        question=_first(row, "final_question", "original_question"), options=options,
        all_options=all_options, reference=reference, group=_problem(row).split(_PERMUTED)[0],
        verdicts=dict(verdicts) | ({} if correct is None else {"is_correct": correct}),
    )  # fmt: skip


def _without_prompt(text: str) -> tuple[str, dict[str, str]]:
    """Return what the model added to a repeated prompt, and the options that the prompt lists."""
    marks = list(_ASSISTANT.finditer(text)) if _PROMPT_REPEATED.match(text) else []
    if not marks:
        return text, {}
    listed = _LISTED.findall(text[: marks[-1].start()])
    return text[marks[-1].end() :].strip(), _listed_options(listed[-1]) if listed else {}


def _listed_options(text: str) -> dict[str, str]:
    """Return letter -> text of lines like "A. CT", in any order; other lines continue an option."""
    options: dict[str, str] = {}
    for line in text.split("\n"):
        mark = _OPTION_LINE.match(line)
        if mark and mark[1] not in options:
            options[mark[1]] = line[mark.end() :].strip()
        elif options:
            options[list(options)[-1]] += f"\n{line}"
    return dict(sorted(options.items()))


def _smmile_published(path: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the published totals, and problem -> verdicts, of the files next to a CSV."""
    stated: dict[str, float] = {}
    by_problem: dict[str, dict[str, float]] = {}
    for name, ending in ((EXACT_MATCH, "_evaluation.json"), (JUDGE, "_evaluationllm.json")):
        content = _read_next_to(path.with_name(f"{path.stem}{ending}"))
        total, verdicts = content.get("accuracy"), content.get("problem_accuracies")
        if isinstance(total, int | float) and isinstance(verdicts, dict):
            stated[name] = total / 100
            for problem, percent in verdicts.items():
                if (number := cell_number(percent)) is not None:
                    by_problem.setdefault(problem, {})[name] = number / 100
    summary = path.with_name(f"{path.stem.replace('result_', 'accuracy_summary_', 1)}.txt")
    if summary.is_file():
        try:
            text = text_files.read_text(summary)
        except TextFileError as error:
            raise PredictionFileError(str(error)) from error
        found = re.search(r"^Accuracy: ([01]\.\d{1,10})\b", text, re.M)
        stated |= {"is_correct": float(found[1])} if found else {}
    return stated, by_problem


# ---- lmms-eval


def _read_lmms_eval(table: tables.Table) -> PredictionFile:
    match = re.fullmatch(r"(.*)_samples_(.*)", table.path.stem)
    date, task = match.groups() if match else ("", table.path.stem)
    answers, left_out = _collect(table, lambda place, row, n: _lmms_answer(place, row))
    names = {name for answer in answers for name in answer.verdicts}
    if len(names) > MAX_VERDICTS:
        raise PredictionFileError(f"{table.path}: more than {MAX_VERDICTS} scores in a row")
    results = _read_next_to(table.path.with_name(f"{date}_results.json")).get("results", {})
    totals = results.get(task, {}) if isinstance(results, dict) else {}
    stated = {
        key.partition(",")[0]: float(value)
        for key, value in (totals.items() if isinstance(totals, dict) else ())
        if key.partition(",")[0] in names and isinstance(value, int | float)
    }
    return PredictionFile(
        path=table.path, format="lmms_eval", model=table.path.absolute().parent.name,
        benchmark=task, answers=answers, stated=stated, left_out=left_out,
    )  # fmt: skip


def _lmms_answer(place: str, row: Mapping[str, Any]) -> Answer | str:
    text = _single_text(row["resps"] if "resps" in row else row.get("filtered_resps"))
    if text is None:
        return "several responses, or likelihoods instead of a text"
    doc = row["doc"] if isinstance(row.get("doc"), dict) else {}
    prompt = cell_text(row.get("input"))
    options = _options_of(doc) or text_metrics.options(prompt)
    verdicts = {}
    for name, value in row.items():
        if isinstance(value, dict) and name not in LMMS_KEYS:
            value = next((value[key] for key in LMMS_VERDICTS if key in value), None)
        if name not in LMMS_KEYS and isinstance(value, bool | int | float):
            verdicts[name] = float(value)
    return _answer(
        key=cell_text(row.get("doc_id")), place=place, text=text, options=options,
        question=_first(doc, "question", "query") or prompt,
        reference=cell_text(row.get("target")), images=_images(doc), verdicts=verdicts,
    )  # fmt: skip


def _single_text(value: Any) -> str | None:
    """Return the one text in nested lists; None for several different ones, or other values."""
    while isinstance(value, list) and value and all(part == value[0] for part in value):
        value = value[0]
    if isinstance(value, list):
        return "" if not value else None
    return value if isinstance(value, str) else None


# ---- VLMEvalKit


def _read_vlmevalkit(table: tables.Table) -> PredictionFile:
    path = table.path
    stem = re.sub(r"_[^_]+_result$", "", path.stem)
    folders = [folder.name for folder in list(path.absolute().parents)[:2]]
    model = next((name for name in folders if stem.startswith(f"{name}_")), "")
    answers, left_out = _collect(table, lambda place, row, n: _vlm_answer(place, row))
    cut = sum(len(answer.text) == tables.MAX_CELL for answer in answers)
    notes = []
    if cut:
        notes.append(f"{cut} texts have the {tables.MAX_CELL:,} characters of a full cell: cut off")
    if "g_index" in table.columns:
        notes.append("a hit may stand for all rotations of a question; here each row is scored")
    score = _read_accuracy_csv(path.with_name(f"{stem}_acc.csv"))
    return PredictionFile(
        path=path, format="vlmevalkit", model=model or stem,
        benchmark=stem.removeprefix(f"{model}_") if model else "", answers=answers,
        stated={} if score is None else {"hit": score}, left_out=left_out,
        notes=tuple(notes),
    )  # fmt: skip


def _vlm_answer(place: str, row: Mapping[str, Any]) -> Answer | str:
    if "prediction" not in row:  # an empty cell is an empty answer: XLSX has no other form of it
        return "no prediction"
    options = {
        letter: cell_text(row[letter]).strip()
        for letter in string.ascii_uppercase
        if cell_text(row.get(letter)).strip()
    }
    names = {"hit": "hit", "score": "score", "verifier_match": JUDGE}
    found = {names[name]: cell_number(row[name]) for name in names if name in row}
    return _answer(
        key=cell_text(row.get("index")), place=place, text=cell_text(row["prediction"]),
        question=cell_text(row.get("question")), options=options,
        reference=cell_text(row.get("answer")), images=_images(row),
        group=cell_text(row.get("g_index")),
        verdicts={name: v for name, v in found.items() if v is not None},
    )  # fmt: skip


def _read_accuracy_csv(path: Path) -> float | None:
    """Return the score Overall of a file with one split; None without such a file."""
    if not path.is_file():
        return None
    rows = tables.read_table(path).rows
    return cell_number(rows[0][1].get("Overall")) if len(rows) == 1 else None


# ---- MedEvalKit


def _read_medevalkit(table: tables.Table) -> PredictionFile:
    folder = table.path.absolute().parent
    answers, left_out = _collect(table, _medeval_answer)
    total = _read_next_to(folder / "metrics.json").get("total metrics", {})
    score = total.get("acc") if isinstance(total, dict) else None
    by_position = any(answer.key.startswith("#") for answer in answers)
    notes = ("rows have no id: they are named by their position in the file",)
    return PredictionFile(
        path=table.path, format="medevalkit", model=folder.parent.name, benchmark=folder.name,
        answers=answers, stated={"correct": score} if isinstance(score, int | float) else {},
        left_out=left_out, notes=notes if by_position else (),
    )  # fmt: skip


def _medeval_answer(place: str, row: Mapping[str, Any], number: int) -> Answer | str:
    if not isinstance(row.get("response"), str):
        return "no text of the model"
    correct = cell_number(row.get("correct"))
    return _answer(
        key=_first(row, "id", "question_id", "qid") or f"#{number}", place=place,
        text=row["response"], question=_first(row, "question", "prompt"),
        options=_options_of(row), reference=cell_text(row.get("answer")), images=_images(row),
        verdicts={} if correct is None else {"correct": correct},
    )  # fmt: skip


# ---- Shared


def _answer(*, reference: str, options: Mapping[str, str], images: Sequence[str], **fields: Any):
    """Return an answer, its family by its options and its reference, its group by its image."""
    reference = reference.strip()
    family = "vqa_mcq" if options else "vqa_open"
    if not options and reference.lower() in ("yes", "no"):
        family = "vqa_closed"
    group = fields.pop("group", "") or (images[0] if images else "")
    return Answer(
        family=family, reference=reference, options=options, images=tuple(images), group=group,
        **fields,
    )  # fmt: skip


def _collect(
    table: tables.Table, to_answer: Callable[[str, Mapping[str, Any], int], Answer | str]
) -> tuple[tuple[Answer, ...], dict[str, list[str]]]:
    """Return the answers, and reason -> places of the rows that are left out.

    A row that repeats another one is left out; of rows with one key and different texts, all are.
    """
    left_out: dict[str, list[str]] = {}
    for line in table.malformed:
        place, _, why = line.partition(": ")
        left_out.setdefault(why or "cannot be read", []).append(place)
    by_key: dict[str, Answer] = {}
    conflicting: dict[str, list[str]] = {}
    for number, (place, row) in enumerate(table.rows):
        answer = to_answer(place, row, number)
        if isinstance(answer, str) or not answer.key:
            why = answer if isinstance(answer, str) else "no id or index"
            left_out.setdefault(why, []).append(place)
        elif (first := by_key.setdefault(answer.key, answer)) is not answer:
            if dataclasses.replace(answer, place=first.place) == first:
                left_out.setdefault("a row occurs twice", []).append(place)
            else:
                conflicting.setdefault(answer.key, [first.place]).append(place)
    for key, places in conflicting.items():
        del by_key[key]
        left_out.setdefault("one id has different rows", []).extend(places)
    return tuple(by_key.values()), left_out


def _first(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of these cells that is not empty, as text."""
    return next((text for name in names if (text := cell_text(row.get(name)))), "")


def _options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Return letter -> text of a list or an object of options, or of the cells A, B, C, ..."""
    value = next((row[name] for name in OPTION_FIELDS if row.get(name)), None)
    if isinstance(value, Mapping):
        texts = {cell_text(k).strip().upper(): cell_text(v).strip() for k, v in value.items()}
    elif isinstance(value, list):
        texts = {}
        for letter, option in zip(string.ascii_uppercase, value, strict=False):
            text = cell_text(option).strip()
            mark = _LETTERED.match(text)
            texts[letter] = text[mark.end() :] if mark and mark[1] == letter else text
    else:
        texts = {
            letter: cell_text(row[letter]).strip()
            for letter in string.ascii_uppercase
            if cell_text(row.get(letter)).strip()
        }
    letters = list(string.ascii_uppercase[: len(texts)])
    return texts if len(texts) > 1 and list(texts) == letters and all(texts.values()) else {}


def _images(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the paths of images that a row names."""
    value = next((row[name] for name in IMAGE_FIELDS if row.get(name)), None)
    parts = value if isinstance(value, list) else [value]
    names = [part for part in parts if isinstance(part, str)]
    return tuple(name for name in names if name.isprintable() and 0 < len(name) <= MAX_NAME)


def _read_next_to(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file next to the predictions; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        return text_files.read_json_object(path)
    except TextFileError as error:
        raise PredictionFileError(
            f"{error}; it belongs to the predictions next to it: fix it, or move it away"
        ) from error


FORMATS = (
    Format(
        name="smmile",
        needs=(("problem_id",), ("true_answer", "correct_answer"),
               ("generated_answer", "selected_option", "extracted_answer")),
        read=_read_smmile,
    ),
    Format(
        name="lmms_eval", needs=(("doc_id",), ("filtered_resps", "resps"), ("target",)),
        read=_read_lmms_eval,
    ),
    Format(name="vlmevalkit", needs=(("index",), ("prediction",)), read=_read_vlmevalkit),
    Format(name="medevalkit", needs=(("response",), ("answer",)), read=_read_medevalkit),
)  # fmt: skip
