"""rouge.json: ROUGE-L of the package rouge-score on pairs of texts, for eval/metrics/text.py.

In an environment of its own, since the tests need neither the package nor nltk:

    python -m venv V && V/bin/pip install rouge-score==0.1.2
    V/bin/python tests/parity/make_rouge.py

The pairs are answers and references of tests/release/real.jsonl, and edges.
"""

import json
from pathlib import Path

from rouge_score import rouge_scorer

HERE = Path(__file__).parent
PAIRS = 60
EDGES = [
    ("", ""),
    ("", "a lung"),
    ("a lung", ""),
    ("the lung", "the heart"),
    ("a CT of the chest", "the MRI of a brain"),
    ("y x", "x y"),
    ("X-ray, 3.5 cm", "x ray 3 5 cm"),
    ("T1-weighted", "t1 weighted"),
    ("Größe", "gr e"),
    ("胸腔积液", "胸腔积液"),
    ("it's", "its"),
    ("lung_base", "lung base"),
    ("İstanbul", "istanbul"),
    ("opacities", "opacity"),
    ("one two three four", "four three two one"),
    ("a a a b", "a b a"),
]


def main() -> None:
    """Writes the golden file next to this one."""
    lines = (HERE.parent / "release" / "real.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = sorted({(row["text"], row["answer"]) for row in rows if len(row["answer"]) > 20})
    pairs = EDGES + texts[:: max(1, len(texts) // PAIRS)]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    found = [
        {"answer": answer, "reference": reference, "rouge_l": score["rougeL"].fmeasure}
        for answer, reference in pairs
        for score in [scorer.score(reference, answer)]
    ]
    text = json.dumps(
        {"package": "rouge-score 0.1.2", "pairs": found}, indent=0, ensure_ascii=False
    )
    (HERE / "rouge.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
