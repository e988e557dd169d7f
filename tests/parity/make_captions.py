"""captions.json: BLEU of sacrebleu and CIDEr-D of pycocoevalcap, for eval/metrics/captions.py.

In an environment of its own, since the tests need no pycocoevalcap:

    python -m venv V && V/bin/pip install sacrebleu==2.6.0 numpy
    V/bin/pip install --no-deps pycocoevalcap==1.2
    V/bin/python tests/parity/make_captions.py

The pairs are answers and references of tests/release/real.jsonl, and edges. CIDEr-D is of their
words [a-z0-9]+ in lower case, because the package's own tokenizer is a Java program.
"""

import json
import re
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics import BLEU

HERE = Path(__file__).parent
PAIRS = 60
EDGES = [
    ("", "a lung"),
    ("no effusion is seen", "no pleural effusion is seen"),
    ("The heart is normal.", "the heart is normal"),
    ("a a a b", "a b a"),
    ("T1-weighted MRI, 3.5 cm", "T1-weighted MRI (3.5 cm)"),
    ("one two three four five six seven eight nine ten", "one two"),
    ("one two three four", "four three two one"),
]


def main() -> None:
    """Writes the golden file next to this one."""
    lines = (HERE.parent / "release" / "real.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = sorted({(row["text"], row["answer"]) for row in rows if len(row["answer"]) > 20})
    pairs = EDGES + texts[:: max(1, len(texts) // PAIRS)]
    answers, references = ([pair[side] for pair in pairs] for side in (0, 1))
    words = [
        {n: [" ".join(re.findall(r"[a-z0-9]+", t.lower()))] for n, t in enumerate(side)}
        for side in (references, answers)
    ]
    mean, scores = Cider().compute_score(*words)
    bleu = BLEU(lowercase=True)
    golden = {
        "packages": "sacrebleu 2.6.0, pycocoevalcap 1.2",
        "pairs": pairs,
        "cider": scores.tolist(),
        "cider_mean": float(mean),
        "bleu": bleu.corpus_score(answers, [references]).score,
        "bleu_of_edges": bleu.corpus_score(answers[:7], [references[:7]]).score,
        "signature": str(bleu.get_signature()),
    }
    text = json.dumps(golden, indent=0, ensure_ascii=False)
    (HERE / "captions.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
