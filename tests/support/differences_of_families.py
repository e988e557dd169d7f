"""python tests/support/differences_of_families.py: paper and strict on one scripted set of all
families.

The records of eval_setup.py, its judge on a local server, BiomedCLIP at random weights: so the
numbers say how the two scorings differ, and nothing of any model.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]

import biomedclip_cases as cases  # noqa: E402
import eval_setup  # noqa: E402
from llm_server import at, serving  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from test_biomedclip import CONFIG, TINY, tensors  # noqa: E402

from medmax_jax.eval.encoders import biomedclip
from medmax_jax.eval.encoders import scorer as encoders_scorer
from medmax_jax.eval.metrics import aggregate, llm_judge, per_record
from medmax_jax.eval.pipeline import image_scoring, judging
from medmax_jax.eval.stats.intervals import Resampling

HEAD = ("task", "metric", "n", "paper", "of", "strict", "best", "unparsed", "unscored", "why")


def table(folder: Path) -> str:
    """Rows that both scorings have, as Markdown."""
    records = eval_setup.records(folder)
    clip = folder / "clip"
    clip.mkdir()
    (clip / "vocab.txt").write_text("\n".join(cases.WORDS) + "\n", "utf-8")
    (clip / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors("tiny"), clip / biomedclip.SAFE)
    scorer = encoders_scorer.open_scorer(f"biomedclip:{clip}", batch=4, sizes=TINY)
    quiet = lambda line: None  # noqa: E731
    image_scoring.score_images(
        [*records],
        [scorer],
        folder,
        images_folder=folder,
        resampling=Resampling(0, 2_000),
        progress=quiet,
    )
    fixed = dict(repeats=3, attempts=2, concurrency=4, seed=0, max_usd=None, tokens_out=20)
    with serving(eval_setup.judge) as llm:
        judging.judge_records(
            llm_judge.Judge(endpoint=at(llm.url), **fixed),
            records,
            folder,
            released=True,
            stopped=lambda: False,
            progress=quiet,
        )
    rows = aggregate.summary(
        records, per_record.read(folder), mode="strict", resampling=Resampling(0, 2_000)
    )
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [_line(vars(row)) for row in rows if row.paper_n is not None]
    return "\n".join(
        "".join(f"| {' | '.join(line[i] for i in columns)} |\n" for line in lines)
        for columns in ((0, 1, 2, 3, 4), (0, 1, 5, 6), (0, 1, 7, 8, 9))
    )


def _line(row: dict) -> list[str]:
    numbers = ["none" if row["paper"] is None else f"{row['paper']:.3f}", str(row["paper_n"])]
    numbers += [f"{row['value']:.3f}", f"{row['best']:.3f}"]
    counts = [str(row["n_unparsed"]), str(row["n_unscored"])]
    why = row["paper_why"].replace("|", "/")[:60]
    return [row["task"], row["metric"], str(row["n"]), *numbers, *counts, why]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(table(Path(name)), end="")
