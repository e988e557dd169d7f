"""Prediction files in the form of those that the authors of SMMILE publish, with invented content.

eth-medical-ai-lab/smmile at ab004d2f: results/result_MODEL_MODE[_mcqa].csv, with
result_*_evaluation.json, result_*_evaluationllm.json and accuracy_summary_*.txt next to it.
"""

import csv
import json
import pathlib
import uuid

PROBLEMS = 111
RIGHT = {"qwen72B": 58, "qwen7B": 45, "majority": 30}  # answers
OTHER_REFERENCES = 18  # problems to which the file of the smaller model has another reference
READABLE = 7  # of LLaVA-Med: letters that are no option, and reasoning without an end
OPTIONS = {"A": "Pleural effusion, right", "B": "No", "C": "Fracture, ulna", "D": "Black."}


def write_smmile(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write four CSV files, three of multiple choice, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    other = [_choice(n, RIGHT["qwen7B"], moved=n < OTHER_REFERENCES) for n in range(PROBLEMS)]
    tables = {
        "qwen72B_0-shot_mcqa": [_choice(n, RIGHT["qwen72B"]) for n in range(PROBLEMS)],
        "qwen7B_0-shot_mcqa": other,
        "llavamed_ICL_mcqa": list(map(_unread, range(PROBLEMS))),
        "majority_ICL": list(map(_open, range(PROBLEMS))),
    }
    for name, rows in tables.items():
        with open(folder / f"result_{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    verdicts = {row["problem_id"]: 100.0 * (n < RIGHT["majority"])
                for n, row in enumerate(tables["majority_ICL"])}  # fmt: skip
    evaluation = dict(
        model="majority (baseline)", inference_mode="ICL", total_examples=PROBLEMS,
        correct_examples=RIGHT["majority"], accuracy=100 * RIGHT["majority"] / PROBLEMS,
        problem_accuracies=verdicts,
    )  # fmt: skip
    for ending in ("_evaluation", "_evaluationllm"):
        (folder / f"result_majority_ICL{ending}.json").write_text(json.dumps(evaluation))
    (folder / "accuracy_summary_llavamed_ICL_mcqa.txt").write_text(
        f"Model: LLaVA-Med\nInference Mode: ICL\nTask Format: mcqa\nAccuracy: 0.0000 (0/{PROBLEMS})"
        f"\nTotal Examples: {PROBLEMS}\nTimestamp: 2025-05-13 05:49:11\n"
    )
    return [folder / f"result_{name}.csv" for name in tables]


def _problem(number: int) -> dict[str, str]:
    return dict(
        problem_id=str(uuid.UUID(int=number)), final_question=f"What is the diagnosis of {number}?"
    )


def _choice(number: int, right: int, *, moved: bool = False) -> dict[str, str]:
    letters = list(OPTIONS)
    correct = letters[(number + moved) % len(letters)]
    selected = correct if number < right else letters[(number + 2) % len(letters)]
    return _problem(number) | dict(
        true_answer=OPTIONS[correct], correct_option=correct, selected_option=selected,
        is_correct=str(selected == correct), generated_answer=OPTIONS[selected],
    )  # fmt: skip


def _unread(number: int) -> dict[str, str]:
    """Return a row of a model that never states an option."""
    selected, text = "EXTRACTION_FAILED", ""
    if number < READABLE:
        selected = "XRL"[number % 3]
        text = "<think>The image shows a fracture." if selected == "X" else f"{selected}."
    row = _choice(number, PROBLEMS)
    changes = dict(selected_option=selected, is_correct="False", full_response=text)
    return row | changes | {"generated_answer": f"INVALID_OPTION:{selected}"}


def _open(number: int) -> dict[str, str]:
    reference = OPTIONS["ABCD"[number % 4]]
    answer = reference if number < RIGHT["majority"] else "White."
    return _problem(number) | dict(
        true_answer=reference, generated_answer=answer, full_response=answer
    )
