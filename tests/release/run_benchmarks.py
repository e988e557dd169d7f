"""Scores benchmark_outputs.py with the benchmarks' own code; writes benchmark_verdicts.json.

python tests/release/run_benchmarks.py --benchmark NAME --checkout FOLDER [--write]

    NAME           checkout
    medframeqa     github.com/haojinw0027/MedFrameQA at e83fbe3
    kormedmcqa     github.com/baeseongsu/kormedmcqa_v at 9c6c6ce
    medbookvqa     github.com/slyipae1/MedBookVQA at 180c222
    medxpertqa     github.com/TsinghuaC3I/MedXpertQA at f21247d
    gmai_mmbench   github.com/open-compass/VLMEvalKit at e8e78f0
    medthink       github.com/Tang-xiaoxiao/Medthink at d92dd5d

The code is imported as it is. Stubs replace what it would load, request or plot: a model returns
the raw outputs. Without --write it checks that the file agrees with the code. A verdict is one
character: 1 right, 0 wrong, - not counted.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_outputs

VERDICTS = Path(__file__).parent / "benchmark_verdicts.json"
COMMITS = {
    "medframeqa": "e83fbe3",
    "kormedmcqa": "9c6c6ce",
    "medbookvqa": "180c222",
    "medxpertqa": "f21247d",
    "gmai_mmbench": "e8e78f0",
    "medthink": "d92dd5d",
}
Rows = list[dict[str, Any]]


class Anything(types.ModuleType):
    """A module of which nothing is used when the verdicts are computed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stub(*names: str, **members: Any) -> None:
    """Put stubs of modules into sys.modules."""
    for name in names:
        sys.modules[name] = Anything(name)
        for key, value in members.items():
            setattr(sys.modules[name], key, value)


def load(path: Path, name: str) -> types.ModuleType:
    """Import one file of a checkout."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def medframeqa(checkout: Path, rows: Rows) -> list[bool | None]:
    texts = {row["question"]: row["text"] for row in rows}
    saved: list[dict] = []

    class Model:
        def __init__(self, **_):
            pass

        def run(self, system, prompt, **_):
            return texts[prompt]

    stub("tqdm", tqdm=lambda x, **_: x)
    stub("openai_inference", OpenAIInference=Model)
    stub(
        "utils",
        load_config=lambda _: {},
        load_results=lambda _: [],
        save_results=lambda results, _: saved.__setitem__(slice(None), results),
    )
    module = load(checkout / "src" / "eval_process.py", "eval_process")
    data = [
        dict(
            question_id=number, question=row["question"], options=row["options"],
            correct_answer=row["answer"], image_path=[], keyword="",
        )
        for number, row in enumerate(rows)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.json")
        path.write_text(json.dumps(data))
        module.evaluate(str(path), folder, "m", -1, "", "{question}")
    known = {result["question_id"]: result["answer"] for result in saved}
    return [known[n] == row["answer"] if n in known else None for n, row in enumerate(rows)]


def kormedmcqa(checkout: Path, rows: Rows) -> list[bool | None]:
    stub("datasets", "openai", "tqdm")
    stub("tenacity", retry=lambda **_: lambda function: function)
    for name in ("retry_if_exception_type", "stop_after_attempt", "wait_exponential"):
        setattr(sys.modules["tenacity"], name, lambda *_, **__: None)
    sys.path.insert(0, str(checkout))
    from kormedeval.datasets.kormedmcqa_v import KorMedMCQAVDataset
    from kormedeval.evaluation.evaluator import evaluate_sample

    dataset = KorMedMCQAVDataset({})

    def verdict(row: dict) -> bool | None:
        reply = types.SimpleNamespace(message=types.SimpleNamespace(content=row["text"]))
        create = lambda **_: types.SimpleNamespace(choices=[reply])  # noqa: E731
        completions = types.SimpleNamespace(completions=types.SimpleNamespace(create=create))
        sample = dict(zip("ABCDE", row["options"], strict=True), uid="", **row)
        result = evaluate_sample(
            types.SimpleNamespace(chat=completions), "m", sample, dataset, 0, 9, True
        )
        return result["is_correct"] if result["success"] else None

    return [verdict(row) for row in rows]


def medbookvqa(checkout: Path, rows: Rows) -> list[bool | None]:
    stub("torch", "torch.utils", "torch.utils.data", "tqdm", "pandas", "seaborn", "matplotlib")
    stub("matplotlib.pyplot", "IPython", "IPython.display")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("data.json").write_text("[]")
        os.mkdir("evaluation")
        os.chdir("evaluation")
        prompts = load(checkout / "evaluation" / "eval_utils.py", "eval_utils")
        summary = load(checkout / "evaluation" / "summerize_utlis.py", "summerize_utlis")

    def verdict(row: dict) -> bool:
        texts = dict(zip("ABCD", row["options"], strict=True))
        answer = f" {texts.pop(row['answer'])}"  # with the space of the published entry
        item = dict(
            Question=row["question"], Answer=answer, correct_choice=row["answer"],
            Distractors=list(texts.values()), other_choices=list(texts),
        )  # fmt: skip
        prompt = prompts.format_prompt(prompts.format_input(item))
        prompt = prompt.split("<multiple choice question start>")[1]
        prompt = prompt.split("<multiple choice question end>")[0].strip()
        return row["text"] == summary.prompt_to_correctChoice(prompt, answer)  # as its notebook

    return [verdict(row) for row in rows]


def medxpertqa(checkout: Path, rows: Rows) -> list[bool | None]:
    stub("nltk", "nltk.tokenize", "nltk.stem", "setup")
    sys.modules["setup"].__all__ = []
    sys.path.insert(0, str(checkout / "eval"))
    main = load(checkout / "eval" / "main.py", "medxpertqa_main")
    templates = main.PromptTemplates().load_templates("medxpertqa", "m")
    args = types.SimpleNamespace(method="zero_shot", prompting_type="cot", dataset="medxpertqa")

    def verdict(row: dict) -> bool:
        replies = iter(["Some reasoning.", row["text"]])
        agent = types.SimpleNamespace(get_response=lambda _: (next(replies), 0))
        options = [dict(letter=x, content=t) for x, t in zip("ABCDE", row["options"], strict=True)]
        sample = dict(question=row["question"], options=options, label=[row["answer"]])
        output, _, _ = main.complete_item(args, "mm", agent, templates, sample, [], 1)
        return output["correct"]

    return [verdict(row) for row in rows]


def gmai_mmbench(checkout: Path, rows: Rows) -> list[bool | None]:
    stub("pandas", isna=lambda value: value is None)
    logger = lambda *_: logging.getLogger("vlmeval")  # noqa: E731
    stub("vlmeval", "vlmeval.smp.log", "vlmeval.smp", get_logger=logger)
    stub("vlmeval.smp.vlm", build_option_str=str)
    matching = load(checkout / "vlmeval" / "utils" / "matching_util.py", "matching_util")
    stub("vlmeval.utils", can_infer=matching.can_infer)
    sys.modules["vlmeval.smp"].cn_string = lambda _: False  # chooses a judge's prompt, of no judge
    path = checkout / "vlmeval" / "dataset" / "utils" / "multiple_choice.py"
    module = load(path, "multiple_choice")

    def verdict(row: dict) -> bool:
        options = dict(zip("ABCDE", row["options"], strict=True))
        item = dict(question=row["question"], prediction=row["text"], GT=row["answer"], **options)
        return bool(module.eval_vanilla(None, item)["hit"])

    return [verdict(row) for row in rows]


def medthink(checkout: Path, rows: Rows) -> list[bool | None]:
    stub("torch", "torch.utils", "torch.utils.data")
    code = checkout / "Medthink_Code"
    targets = load(code / "dataset.py", "medthink_dataset")
    tree = ast.parse((code / "closed_end_train.py").read_text())
    (function,) = (  # it is inside the training function
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "extract_ans"
    )
    scope: dict[str, Any] = {"re": re}
    exec(compile(ast.Module([function], []), "closed_end_train.py", "exec"), scope)
    extract: Callable[[str], str] = scope["extract_ans"]

    def verdict(row: dict) -> bool:
        answer = "AB".index(row["answer"])
        problem = dict(
            question=row["question"], choices=row["options"], answer=answer,
            solution=row["context"],
        )  # fmt: skip
        target = targets.ClosedInputAndTargetAndImg(problem).get_target("Explanation")
        return extract(row["text"]) == extract(target)

    return [verdict(row) for row in rows]


def digest(rows: Rows) -> str:
    """Return the hash of inputs, by which a test knows that it has the same."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--benchmark", choices=tuple(COMMITS), required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = benchmark_outputs.rows(args.benchmark)
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = globals()[args.benchmark](args.checkout.absolute(), rows)
    shown = "".join("-" if v is None else "01"[bool(v)] for v in verdicts)
    found = dict(commit=COMMITS[args.benchmark], inputs=digest(rows), verdicts=shown)
    known = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    same = known.get(args.benchmark) == found
    if args.write:
        known[args.benchmark] = found
        VERDICTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    right, wrong = shown.count("1"), shown.count("0")
    state = "as committed" if same else "NOT as committed"
    print(f"{len(shown)} verdicts, {right} right and {wrong} wrong: {state}")
    return 0 if same or args.write else 1


if __name__ == "__main__":
    sys.exit(main())
