"""python benchmarks/answer_readers.py [--lmms_eval D] [--vlmevalkit D] [--medevalkit D] [--write]

Compares what four suites read from the labelled answers of tests/answers:

ours         medmax_jax.eval.metrics.strict.parse_answer
lmms-eval    extract_mcq_answer of tasks/_task_utils/mcq_extract.py, parse_pred_ans of tasks/mme
VLMEvalKit   can_infer of vlmeval/utils/matching_util.py, YOrN_Extraction of dataset/utils
MedEvalKit   judge_multi_choice and judge_judgement of utils/utils.py, asked about each answer

precision    the share of its reads that a reader of the answer agrees with
recall       the share of the answers that state something, that it reads so

Each flag is a checkout; a side without one has the reads of tests/answers/reads.json, which --write
makes again. MedEvalKit needs the package mathruler in this environment (pip install mathruler).
The functions are taken out of their files, because these import what is not needed here. The
recorded reads are of lmms-eval 75571cf, VLMEvalKit e8e78f0, MedEvalKit 9b12e3b and mathruler 0.1.0.
The last line is one JSON object.
"""

import argparse
import ast
import contextlib
import copy
import difflib
import importlib.util
import json
import os
import pathlib
import re
import string
import sys
import typing
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments
from medmax_jax.eval.metrics import strict
from medmax_jax.eval.metrics import text as text_metrics

ANSWERS = ROOT / "tests" / "answers"
SETS = ("development", "held_out", "held_out_2")
FAMILIES = {"vqa_mcq": "multiple choice", "vqa_closed": "yes or no"}
Reader = Callable[[str, str, str], str | None]  # (family, question, answer)


def functions(file: pathlib.Path, *names: str) -> Mapping[str, Callable]:
    """Return the functions of a file, with its assignments and without its imports."""
    found: dict[str, typing.Any] = dict(
        re=re, os=os, string=string, cp=copy, difflib=difflib, List=list, Optional=typing.Optional
    )
    for node in ast.parse(file.read_text("utf-8")).body:
        if not isinstance(node, ast.Assign) and getattr(node, "name", "") not in names:
            continue
        with contextlib.suppress(NameError):  # an assignment that needs an import
            exec(compile(ast.Module([node], []), str(file), "exec"), found)  # the user's checkout
    if missing := [name for name in names if name not in found]:
        raise SystemExit(f"{file} has no {missing[0]}; use the commit in the docstring")
    return found


def ours(family: str, question: str, answer: str) -> str | None:
    """Return what this suite reads."""
    return strict.parse_answer(family, answer, question)


def lmms_eval(folder: pathlib.Path) -> Reader:
    """Return lmms-eval's reader."""
    tasks = folder / "lmms_eval" / "tasks"
    choice = functions(tasks / "_task_utils" / "mcq_extract.py", "extract_mcq_answer")
    closed = functions(tasks / "mme" / "utils.py", "parse_pred_ans")

    def read(family: str, question: str, answer: str) -> str | None:
        if family == "vqa_closed":
            value = closed["parse_pred_ans"](answer)
            return value if value in ("yes", "no") else None
        letters = list(text_metrics.options(question)) or None
        return choice["extract_mcq_answer"](answer, letters) or None

    return read


def vlmevalkit(folder: pathlib.Path) -> Reader:
    """Return VLMEvalKit's reader, without a model that reads the rest."""
    root = folder / "vlmeval"
    names = ("can_infer", "can_infer_option", "can_infer_text")
    choice = functions(root / "utils" / "matching_util.py", *names)
    closed = functions(root / "dataset" / "utils" / "yorn.py", "YOrN_Extraction")
    closed |= functions(root / "smp" / "misc.py", "process_punctuation")

    def read(family: str, question: str, answer: str) -> str | None:
        if family == "vqa_closed":
            value = closed["YOrN_Extraction"](answer).lower()
            return value if value in ("yes", "no") else None
        options = text_metrics.options(question) or dict.fromkeys("ABCD", "")
        value = choice["can_infer"](answer, dict(options))
        return value if value in options else None

    return read


def medevalkit(folder: pathlib.Path) -> Reader:
    """Return MedEvalKit's reader: the answer that it would score as right, if there is one."""
    names = ("judge_multi_choice", "judge_judgement", "parse_response", "extract")
    names += ("get_content_between_a_b", "find_most_similar_index", "str_similarity")
    judge = dict(functions(folder / "utils" / "utils.py", *names))
    package = importlib.util.find_spec("mathruler")
    if package is None:
        raise SystemExit("MedEvalKit needs the package mathruler: pip install --no-deps mathruler")
    grader = pathlib.Path(package.submodule_search_locations[0]) / "grader.py"
    boxed = functions(grader, "extract_boxed_content")["extract_boxed_content"]
    for name in names:
        judge[name].__globals__.update(extract_boxed_content=boxed)

    def read(family: str, question: str, answer: str) -> str | None:
        if family == "vqa_closed":
            values = [v for v in ("yes", "no") if judge["judge_judgement"](v, answer.lower())]
        else:
            options = text_metrics.options(question) or dict.fromkeys("ABCD", "")
            choices = list(options.values())
            values = [v for v in options if judge["judge_multi_choice"](choices, v, answer)]
        return values[0] if len(values) == 1 else None

    return read


def load_answers() -> list[dict[str, str | None]]:
    """Return the labelled answers, each with its set and the complete text of its question."""
    questions, rows = json.loads((ANSWERS / "questions.json").read_text("utf-8")), []
    for name in SETS:
        for line in (ANSWERS / f"{name}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            if row["family"] == "vqa_mcq":
                row["question"] = questions[row["question"]]
            rows.append(row | {"set": name})
    return rows


def score(rows: list[dict], reads: list[str | None]) -> dict[str, float | int]:
    """Return the counts, precision and recall of a reader."""
    pairs = [(row["states"], read) for row, read in zip(rows, reads, strict=True)]
    read = sum(value is not None for _, value in pairs)
    right = sum(value is not None and value == states for states, value in pairs)
    stated = sum(states is not None for states, _ in pairs)
    return dict(
        n=len(rows),
        states=stated,
        read=read,
        wrong=read - right,
        precision=round(right / read, 3) if read else None,
        recall=round(right / stated, 3),
    )


def main() -> None:
    """Run the command line."""
    parser = arguments.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    sides = {"lmms-eval": lmms_eval, "VLMEvalKit": vlmevalkit, "MedEvalKit": medevalkit}
    for name in sides:
        parser.add_argument(f"--{name.lower().replace('-', '_')}", type=pathlib.Path)
    parser.add_argument("--write", action="store_true", help="rewrite tests/answers/reads.json")
    args = parser.parse_args()
    file, rows = ANSWERS / "reads.json", load_answers()
    recorded = json.loads(file.read_text("utf-8")) if file.exists() else {}
    readers: dict[str, Reader] = {"ours": ours}
    for name, side in sides.items():
        folder = getattr(args, name.lower().replace("-", "_"))
        if folder is not None:
            readers[name] = side(folder)
        elif name in recorded:
            print(f"{name}: no checkout; its recorded reads are used")
    for name, read in readers.items():
        recorded[name] = [read(row["family"], row["question"], row["answer"]) for row in rows]
    if args.write:
        file.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", "utf-8")
    table = {}
    for name in ("ours", *sides):
        if len(recorded.get(name, ())) != len(rows):
            print(f"{name}: left out; it has no reads of these answers, pass its checkout")
            continue
        for part in (*SETS, "all"):
            for family, label in FAMILIES.items():
                chosen = [
                    n
                    for n, row in enumerate(rows)
                    if row["family"] == family and part in (row["set"], "all")
                ]
                numbers = score([rows[n] for n in chosen], [recorded[name][n] for n in chosen])
                table[f"{name}, {part}, {label}"] = numbers
                print(f"{name:11} {part:12} {label:16} {numbers}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
