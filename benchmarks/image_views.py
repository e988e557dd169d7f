"""python benchmarks/image_views.py --workdir D [--seeds 3] [--steps 300]

Trains the tiny model on the embedded images in both views of models/images.py, and asks each about
held-out images in both: four combinations, named trained/asked.

records    data.prepare sample --views 4, with --view released and --view pad
trained    configs/tiny.py, once with each seed; answers keep the released view
asked      closed and multiple-choice questions of the test split, as eval.run asks them

The accuracy of an item is its mean over the seeds. Differences are from released/released and from
the model that is asked as it was trained, paired by item, with 95 % intervals over groups (patients
or volumes) of eval/stats/intervals.py. Run again, the program continues where it was stopped. The
last line is one JSON object.
"""

import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medmax_jax import arguments
from medmax_jax import train as train_program
from medmax_jax.config import VIEWS, build, from_config_dict
from medmax_jax.configs import eval_tiny, tiny
from medmax_jax.data import prepare
from medmax_jax.eval.config import Settings
from medmax_jax.eval.metrics import aggregate
from medmax_jax.eval.models import base
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import selection
from medmax_jax.generation import model_bundle
from medmax_jax.sharding import local_mesh

VARIANTS = 4  # of each training image, as in the quickstart
FAMILIES = ("vqa_closed", "vqa_mcq")  # their accuracy needs no judge
# (before, after) as trained/asked
PAIRS = (
    ("released/released", "pad/pad"),
    ("released/released", "released/pad"),
    ("pad/pad", "pad/released"),
)


def train(workdir: pathlib.Path, view: str, seed: int, steps: int) -> pathlib.Path:
    """Train the tiny model on images of a view; return the folder of its adapter."""
    records = workdir / f"records_{view}"
    if not (records / "dataset.json").exists():
        prepare.prepare_sample(records, views=VARIANTS, view=view)
    config = tiny.get_config()
    config.vq.view = view
    config.data.update(train=str(records), validation="", seed=seed)
    config.train.update(steps=steps, seed=seed, eval_every=0, samples=0, checkpoint_every=steps)
    folder = workdir / f"train_{view}_{seed}"
    if not (folder / "adapter" / "adapter_config.json").exists():
        train_program.run(from_config_dict(config), folder)
    return folder / "adapter"


def ask(
    adapter: pathlib.Path, view: str, eval_set: selection.EvalSet, settings: Settings
) -> list[EvalRecord]:
    """Return the answers of a model that is asked with images of a view."""
    bundle = model_bundle.load(
        prepare.TINY, adapter=adapter, merge=True, view=view, mesh=local_mesh(settings.mesh)
    )
    model = base.NativeModel(
        bundle, settings.sample, rows=settings.rows, name=str(adapter), fingerprint=view
    )
    return inference.run_items(
        model, eval_set.items, mode=settings.mode, images_folder=eval_set.folder,
        out=adapter.parent / f"asked_{view}.jsonl", progress=print,
    )  # fmt: skip


def rows_of(
    answers: dict[str, list[list[EvalRecord]]], resampling: intervals.Resampling
) -> list[dict[str, Any]]:
    """Return a paired row for each of PAIRS and each modality, after one of all of them."""
    scores = {
        cell: np.mean(
            [[aggregate.record_values(r)["accuracy"] for r in records] for records in by_seed],
            axis=0,
        )
        for cell, by_seed in answers.items()
    }
    items = next(iter(answers.values()))[0]
    modalities = np.array([item.modality for item in items])
    groups = np.array([item.group for item in items])
    rows = []
    for before, after in PAIRS:
        for name in ("all", *sorted(set(modalities.tolist()))):
            chosen = np.full(len(items), True) if name == "all" else modalities == name
            row = intervals.paired_row(
                scores[before][chosen], scores[after][chosen], list(groups[chosen]),
                resampling=resampling,
            )  # fmt: skip
            rows.append(dict(pair=f"{after} - {before}", modality=name) | row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Train and ask in all combinations; print the rows, then all as one JSON object."""
    parser = arguments.Parser(prog="benchmarks/image_views.py", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of all files")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each view")
    parser.add_argument("--steps", type=int, default=300, help="training steps of a run")
    args = parser.parse_args(argv)
    config = eval_tiny.get_config()
    for family in config.counts:
        config.counts[family] = -1 if family in FAMILIES else 0
    settings = build(Settings, config)
    eval_set = selection.load_eval_set(settings)
    answers: dict[str, list[list[EvalRecord]]] = {}
    for seed in range(args.seeds):
        for trained in VIEWS:
            adapter = train(args.workdir, trained, seed, args.steps)
            for asked in VIEWS:
                found = ask(adapter, asked, eval_set, settings)
                answers.setdefault(f"{trained}/{asked}", []).append(found)
    rows = rows_of(answers, intervals.Resampling(settings.seed, settings.resamples))
    for row in rows:
        print({k: round(float(v), 3) if isinstance(v, float) else v for k, v in row.items()})
    facts = dict(seeds=args.seeds, steps=args.steps, jax=importlib.metadata.version("jax"))
    print(json.dumps(facts | dict(items=len(eval_set.items), rows=rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
