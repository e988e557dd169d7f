"""python tests/testbed/make_testbed.py CLONE   ->   tests/testbed/gadre_104.csv

CLONE: a checkout of github.com/mlfoundations/scaling (MIT, see NOTICE), the 104 models of Gadre et
al. 2024 (arXiv 2403.08540). One line a model: loss on their C4 evaluation set, and the mean top-1
error over the 17 tasks that stand above chance for a small model (their Table 1).
"""

import csv
import json
import pathlib
import sys

TASKS = (
    "bigbench_operators", "pubmed_qa_labeled", "hellaswag_zeroshot", "boolq", "arc_easy", "coqa",
    "bigbench_dyck_languages", "lambada_openai", "bigbench_novel_concepts", "winograd",
    "bigbench_cs_algorithms", "commonsense_qa", "bigbench_qa_wikidata", "hellaswag", "copa",
    "squad", "piqa",
)  # fmt: skip


def main() -> None:
    """Writes the table next to this file."""
    folder = pathlib.Path(sys.argv[1]) / "exp_data"
    rows = [row(path, folder / "evals") for path in (folder / "models").glob("*.json")]
    rows.sort(key=lambda r: (r["corpus"], r["params"], r["tokens"]))
    with open(pathlib.Path(__file__).parent / "gadre_104.csv", "w", newline="") as file:
        out = csv.DictWriter(file, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def row(path: pathlib.Path, evals: pathlib.Path) -> dict:
    model = json.loads(path.read_text())
    at = "training/eval_data/c4_val/"
    loss = next(r["loss"] for r in model["results"] if r["val_data"][0].startswith(at))
    scored = json.loads((evals / f"evaluation_{path.stem}_heavy.json").read_text())
    accuracy = scored["eval_metrics"]["icl"]
    settings = model["hyperparameters"]
    return {
        "corpus": model["dataset_name"].removesuffix("_original"),
        "params": settings["params"],
        "tokens": settings["tokens"],
        "multiplier": settings["chinchilla_multiplier"],
        "loss": round(loss, 6),
        "error": round(sum(1 - accuracy[task] for task in TASKS) / len(TASKS), 6),
    }


if __name__ == "__main__":
    main()
