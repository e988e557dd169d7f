"""real.jsonl from an evaluation of the shipped tiny model: what it wrote, and the references.

python -m eval.run --config=configs/eval_tiny.py --model=native:medmax_jax/tiny --workdir=D \\
    --config.baselines=False --config.counts.captioning=60 --config.counts.image_generation=0 \\
    --config.counts.multimodal=0
python tests/release/make_real.py D
"""

import json
import sys
from pathlib import Path

KEPT = 240  # of each, distinct, in alphabetical order at even distances
CHARS = 200  # of a text


def main(workdir: str) -> None:
    lines = (Path(workdir) / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wrote = {(r["text"][:CHARS], r["answer"][:CHARS]) for r in records}
    refs = {(r["answer"][:CHARS], r["answer"][:CHARS]) for r in records}
    rows = _some(sorted(wrote)) + _some(sorted(refs))
    text = "".join(json.dumps(dict(text=t, answer=a), ensure_ascii=False) + "\n" for t, a in rows)
    (Path(__file__).parent / "real.jsonl").write_text(text, encoding="utf-8")


def _some(rows: list) -> list:
    return rows[:: max(1, len(rows) // KEPT)][:KEPT]


if __name__ == "__main__":
    main(sys.argv[1])
