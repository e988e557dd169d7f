"""Scores score_outputs.py with the benchmarks' own code; writes score_verdicts.json.

python tests/release/run_scores.py --scoring NAME --checkout FOLDER [--write]

    NAME            checkout
    mediconfusion   github.com/MShahabSepehri/MediConfusion at 40a8b419
    smmile_*        github.com/eth-medical-ai-lab/smmile at ab004d2f     (needs pandas)
    deeptumorvqa_*  github.com/Schuture/DeepTumorVQA at 1df7460d
    medgen_bench    github.com/yangjj007/MedGEN-Bench-eval at 3450b8ef   (scikit-image, pillow 12)

The code is imported as it is, with stubs for what it would load or request. A verdict is a number,
or null where the output is not counted. Without --write it checks that the file agrees.
"""

import argparse
import contextlib
import io
import json
import os
import string
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import score_outputs
from run_benchmarks import digest, load, stub

VERDICTS = Path(__file__).parent / "score_verdicts.json"
Rows = list[dict[str, Any]]


def mediconfusion(checkout: Path, rows: Rows, name: str) -> list[Any]:
    """Return the options that are read, and last the table that the code prints."""
    quiet = types.SimpleNamespace(set_verbosity_error=lambda: None)
    stub("torch", "yaml", "PIL", "PIL.Image")
    stub("transformers", logging=quiet, set_seed=None)
    stub("tqdm", tqdm=lambda x, **_: x)
    sys.path.insert(0, str(checkout))
    from utils.answering import DATA, BaseAnsweringModel

    model = BaseAnsweringModel.__new__(BaseAnsweringModel)
    model.tr, model.key, model.mode, model.local_image_address = 3, "m", "mc", True
    model.data_path, texts = "", iter(row["text"] for row in rows)
    model.clean_up = model.clean_up_manual
    model.ask_question = lambda *_: [next(texts), next(texts)]
    model.check_folder = lambda _: None
    DATA.clear()
    for number in range(0, len(rows), 2):
        first, second = rows[number]["answer"], rows[number + 1]["answer"]
        DATA[str(number)] = dict(
            im_1_correct=first, im_2_correct=second, category_1=[], category_2=[]
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        results, score = model.evaluate(None, None)
    read = []
    for pair in results.values():
        for image in ("im1", "im2"):
            answer = pair["answer"][image]
            read.append("".join(letter for letter in "AB" if answer[letter] == 10))
    table = printed.getvalue().strip().splitlines()[-1].split()
    return [*read, [float(cell) for cell in table[1:]]]


def smmile_open(checkout: Path, rows: Rows, name: str) -> list[Any]:
    import pandas

    module = load(checkout / "inference_and_evaluation" / "evaluate_EM.py", "evaluate_EM")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.csv")
        pandas.DataFrame(
            [
                dict(problem_id=f"p{n}", true_answer=row["answer"], generated_answer=row["text"])
                for n, row in enumerate(rows)
            ]
        ).to_csv(path, index=False)
        _, stats = module.calculate_exact_match(str(path))
    return [int(stats["problem_accuracies"][f"p{n}"] == 100) for n in range(len(rows))]


def smmile_mcq(checkout: Path, rows: Rows, name: str) -> list[Any]:
    stub("openai", "utils", "tqdm", "pandas")
    os.environ["HF_TOKEN"] = "none"
    path = checkout / "inference_and_evaluation" / "inference_openai.py"
    extract: Callable = load(path, "inference_openai").extract_mcqa_answer

    def verdict(row: dict[str, Any]) -> int:
        options = dict(zip(string.ascii_uppercase, row["options"], strict=False))
        return int(extract(row["text"], "p", options) == row["answer"])

    return [verdict(row) for row in rows]


def deeptumorvqa(checkout: Path, rows: Rows, name: str) -> list[Any]:
    module = load(checkout / "src" / "deeptumorvqa" / "eval" / "metrics.py", "metrics")
    kind = name.partition("_")[2]
    score = dict(
        mcq=module.score_mc,
        numeric=module.score_numeric,
        closed=module.score_binary,
        open=module.score_categorical,
    )[kind]

    def verdict(row: dict[str, Any]) -> Any:
        found = score([(row["text"], row["answer"])])
        if kind != "numeric":
            return int(found["accuracy"])
        if not found["n_scored"]:
            return None
        return [found["mean_mra"], *(int(value) for value in found["tolerance_acc"].values())]

    return [verdict(row) for row in rows]


def medgen_bench(checkout: Path, rows: Rows, name: str) -> list[Any]:
    module = load(checkout / "util" / "metrics.py", "metrics")

    def verdict(row: dict[str, Any]) -> list[float]:
        pair = score_outputs.images(row)
        return [round(module.FR_IQA(*pair, metric), 6) for metric in ("psnr", "ssim")]

    return [verdict(row) for row in rows]


SCORINGS = {  # -> commit, function
    "mediconfusion": ("40a8b419", mediconfusion),
    "medgen_bench": ("3450b8ef", medgen_bench),
    "smmile_open": ("ab004d2f", smmile_open),
    "smmile_mcq": ("ab004d2f", smmile_mcq),
    **{
        f"deeptumorvqa_{kind}": ("1df7460d", deeptumorvqa)
        for kind in ("mcq", "numeric", "closed", "open")
    },
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scoring", choices=tuple(SCORINGS), required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = score_outputs.rows(args.scoring)
    commit, function = SCORINGS[args.scoring]
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = function(args.checkout.absolute(), rows, args.scoring)
    found = dict(commit=commit, inputs=digest(rows), verdicts=verdicts)
    known = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    same = known.get(args.scoring) == found
    if args.write:
        known[args.scoring] = found
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known.items()))
        VERDICTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(rows)} outputs of {args.scoring}: {'as' if same else 'NOT as'} committed")
    return 0 if same or args.write else 1


if __name__ == "__main__":
    sys.exit(main())
