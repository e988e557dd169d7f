"""python -m eval.run --config=configs/eval_tiny.py --model=native:medmax_jax/tiny --workdir=D

Evaluates one model, with or without an adapter, and writes into the workdir

    records.jsonl  swapped.jsonl   one line an item; the same command goes on after an interruption
    summary.json   report.html     scores with intervals, baselines, settings and fingerprints

Status 0: done. 75: interrupted. 1: an error to mend, in one line.
"""

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from data.sample.documents import eval_items
from data.sample.manifest import read_manifest
from eval import baselines, looks, loop, models, probes, report, scoring, tasks
from medmax_jax import cli, export, generate
from medmax_jax.config import Mesh, Sample, build, to_dict
from medmax_jax.mesh import make_mesh
from medmax_jax.storage import Folder

log = logging.getLogger("medmax_jax.eval")

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
BLIND = "the commonest training answer of each question's template, without looking"
SWAPPED = "the same model shown a picture of another group: what looking is worth"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Items of each family; -1: all, 0: none."""

    vqa_closed: int
    vqa_mcq: int
    vqa_open: int
    captioning: int
    image_generation: int
    multimodal: int
    visual_chat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What configs/eval_*.py say; see configs/eval_tiny.py for each field."""

    items: str
    images: str
    split: str
    counts: Counts
    mode: str
    baselines: bool
    rows: int
    seed: int
    resamples: int
    mesh: Mesh
    sample: Sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Items, training items for the blind baseline, training pictures as (path, modality)."""

    items: list[tasks.Item]
    train: list[tasks.Item]
    pictures: list[tuple[str, str]]
    folder: Path


def suite(settings: Settings) -> Suite:
    """The embedded sample's items, or those of a JSONL file in the released schema."""
    if settings.items != "sample":
        path = Path(settings.items)
        items = tasks.from_rows(_rows(path))
        return Suite(
            items=_chosen(items, settings),
            train=[],
            pictures=[],
            folder=Path(settings.images or path.parent),
        )
    manifest = read_manifest(SAMPLE / "manifest.jsonl")
    held, train = (
        tasks.from_rows(eval_items(manifest, settings.seed, split=split), manifest)
        for split in (settings.split, "train")
    )
    return Suite(
        items=_chosen(held, settings),
        train=train,
        pictures=[(row["file"], row["modality"]) for row in manifest if row["split"] == "train"],
        folder=Path(settings.images or SAMPLE),
    )


def run(
    settings: Settings,
    workdir: str | Path,
    *,
    model: str,
    adapter: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The whole evaluation; returns what summary.json holds. `model`: "native:" and a folder."""
    kind, _, folder = model.partition(":")
    if kind != "native" or not folder:
        raise loop.EvalError(f"--model is {model!r}; write native:FOLDER, a folder of this project")
    workdir = cli.open_workdir(workdir)
    found = suite(settings)
    _claim(workdir, settings, folder, adapter, found)
    g = generate.load(folder, adapter=adapter or None, mesh=make_mesh(settings.mesh))
    fixed = dict(images_folder=found.folder, mode=settings.mode, progress=progress)
    answers = models.Native(
        g, settings.sample, rows=settings.rows, name=folder, stamp=export.identity(folder)
    )
    numbers = dict(seed=settings.seed, resamples=settings.resamples)
    seen, ceiling = None, None
    if found.pictures:
        centroids = looks.centroids(g, found.pictures, images_folder=found.folder)
        ceiling = looks.ceiling(g, found.items, centroids, images_folder=found.folder, **numbers)
        seen = looks.by(g, centroids)
    records = loop.evaluate(
        answers, found.items, out=workdir / "records.jsonl", looks=seen, **fixed
    )
    summary = {
        "model": folder,
        "adapter": adapter,
        "settings": to_dict(settings),
        "scores": scoring.summary(records, mode=settings.mode, **numbers),
        "baselines": [],
        "modality_ceiling": ceiling,
    }
    if settings.baselines:
        closed = [item for item in found.items if item.family == "vqa_closed"]
        swapped = (
            loop.evaluate(
                answers,
                probes.swapped(closed, seed=settings.seed),
                out=workdir / "swapped.jsonl",
                **fixed,
            )
            if closed
            else []
        )
        summary["baselines"] = _baselines(records, swapped, found, numbers)
    _write_json(workdir / "summary.json", summary)
    report.write(workdir / "report.html", summary, records, images_folder=found.folder)
    return summary


def main(config: ConfigDict, workdir: str) -> None:
    """The program: flags to `run`, lines of progress, the table at the end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO)
    settings = build(Settings, config)
    with cli.Stop() as stop:

        def progress(line: str) -> None:
            log.info(line)
            if stop.asked:
                raise cli.Interrupted("interrupted; the same command goes on from here")

        summary = run(
            settings,
            workdir,
            model=flags.FLAGS.model,
            adapter=flags.FLAGS.adapter,
            progress=progress,
        )
    print(report.markdown(summary["scores"]))
    for baseline in summary["baselines"]:
        print(f"{baseline['name']} (before) and the model (after):\n")
        print(report.markdown(baseline["scores"]))
    print(f"report: {Path(workdir) / 'report.html'}")


def _chosen(items: list[tasks.Item], settings: Settings) -> list[tasks.Item]:
    counts = dataclasses.asdict(settings.counts)
    return [
        item
        for family, count in counts.items()
        for item in tasks.choose(
            [item for item in items if item.family == family], count, seed=settings.seed
        )
    ]


def _baselines(records, swapped, found: Suite, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Each as scores with the baseline as `before` and the model as `after`."""
    asked = [r for r in records if r["family"] in ("vqa_closed", "vqa_mcq", "vqa_open")]
    rivals = []
    if found.train and asked:
        guesses = baselines.blind(found.train, found.items)
        guessed = scoring.answered(asked, guesses)
        rivals.append(
            dict(name="blind", says=BLIND, scores=scoring.scores(guessed, asked, **numbers))
        )
    if swapped:
        compared = scoring.scores(swapped, asked, **numbers)
        rivals.append(dict(name="swapped", says=SWAPPED, scores=compared))
    return rivals


def _claim(workdir: Path, settings: Settings, folder: str, adapter: str, found: Suite) -> None:
    """Writes down what this workdir evaluates, or raises if it is something else."""
    items = json.dumps([dataclasses.asdict(item) for item in found.items], sort_keys=True)
    name, tuned = "adapter.safetensors", Folder(adapter) if adapter else None
    facts = {
        "sample": to_dict(settings.sample),
        "mode": settings.mode,
        "model": export.identity(folder) if folder else "",
        "adapter": tuned.file(name).digest("sha256") if tuned and tuned.has(name) else "",
        "items": hashlib.sha256(items.encode()).hexdigest(),
    }
    path = workdir / "run.json"
    if path.exists():
        for name, value in json.loads(path.read_text()).items():
            if facts.get(name) != value:
                raise loop.EvalError(
                    f"{workdir} holds an evaluation with another {name}; name a fresh --workdir"
                )
    _write_json(path, facts)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise loop.EvalError(
            f"config.items is {str(path)!r}: {error}; name a JSONL file, or sample"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "native:FOLDER of the model", required=True)
    flags.DEFINE_string("adapter", "", "adapter folder that training wrote")
    cli.run(main, errors=(ValueError, OSError))
