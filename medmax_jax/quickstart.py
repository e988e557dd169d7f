"""python -m medmax_jax.quickstart [--workdir=quickstart_run] [--config.run.train.steps=100 ...]

The whole road on the embedded real images, with the programs that also serve 7B: minutes on two
CPU cores. The same command goes on after a stop. What is in the workdir afterwards:

    report.html  report.json     what ran, curves, scores before and after LoRA, cases to look at
    records/                     the pictures and texts as token ids
    train/                       log, curves, checkpoints and train/adapter
    before.jsonl after.jsonl     every answer; swapped.jsonl: shown a picture of another group
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data import prepare, records
from data.sample.manifest import read_manifest
from eval import (
    baselines,
    looks,
    loop,
    models,
    probes,
    report_tables,
    scoring,
    stats,
    suites,
    tasks,
)
from eval.settings import Settings as EvalSettings
from medmax_jax import cli, config, generate, images, quickstart_page, train
from medmax_jax.io.run_files import damage_warning, read_metrics
from medmax_jax.io.text_files import TextFileError, read_json
from medmax_jax.mesh import make_mesh

log = logging.getLogger("medmax_jax.quickstart")

ROOT = Path(__file__).parent.parent
DEFAULTS = {"config": str(ROOT / "configs" / "quickstart.py"), "workdir": "quickstart_run"}
ERRORS = (*prepare.ERRORS, *train.ERRORS, ValueError, OSError)
LINES = {  # what the primary row is held against
    "before": "the same model before LoRA",
    "blind": "the commonest training answer of each question's template, without looking",
    "swapped": "the model after LoRA, shown a picture of another group",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """configs/quickstart.py, typed."""

    views: int
    cases: int
    run: config.Run
    eval: EvalSettings


class Road:
    """The stages so far: their seconds and what came of them, kept in stages.json."""

    def __init__(self, workdir: Path):
        self._path = workdir / "stages.json"
        self.stages: list[dict[str, Any]] = _stages(self._path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times a stage; its body says what came of it. A repeated stage adds to its seconds."""
        log.info("== %s", name)
        begin, said = time.monotonic(), []
        try:
            yield said.append
        finally:
            before = next((s for s in self.stages if s["stage"] == name), None)
            entry = before or {"stage": name, "what": "", "seconds": 0.0}
            entry["seconds"] += time.monotonic() - begin
            entry["what"] = said[-1] if said else entry["what"]
            if before is None:
                self.stages.append(entry)
            try:
                self._path.write_text(json.dumps(self.stages, indent=1))
            except OSError as error:  # seconds of earlier starts, which only the report shows
                log.warning("WARNING: %s: cannot be written (%s)", self._path, error.strerror)
            log.info("== %s: %s (%.1f s)", name, entry["what"], entry["seconds"])


def main(settings: ConfigDict, workdir: str) -> None:
    """The program: a log for a person, report.json for a program."""
    folder = cli.open_workdir(workdir)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
    try:
        logging.getLogger().addHandler(logging.FileHandler(folder / "quickstart.log"))
    except OSError as error:
        log.warning("WARNING: %s: cannot be written (%s)", error.filename, error.strerror)
    run(config.build(Quickstart, settings), folder)


def run(settings: Quickstart, workdir: Path) -> dict[str, Any]:
    """Walks the road from wherever `workdir` stands; returns what report.json holds."""
    config.check(settings.run)
    road = Road(workdir)
    tiny = Path(settings.run.train.init_from)
    with road.stage("tokenize") as says:
        says(_tokenize(settings, workdir, tiny))
    with road.stage("fine-tune") as says:
        data = dataclasses.replace(
            settings.run.data,
            train=str(workdir / "records" / "train"),
            validation=str(workdir / "records" / "validation"),
        )
        last = train.run(dataclasses.replace(settings.run, data=data), workdir / "train")
        says(f"{last['step']} steps of LoRA on all task kinds, loss {last['loss']:.2f}")
    found = suites.suite(settings.eval)
    answers = _evaluate(settings, road, workdir, tiny, found)
    report = _report(settings, road, found, answers)
    with road.stage("report") as says:
        says("report.html")
        cases, pictures = _cases(settings, tiny, found, answers, workdir)
        curves = quickstart_page.curves(*_history(workdir / "train" / "metrics.jsonl"))
        page = quickstart_page.build(report, cases, pictures, curves)
        (workdir / "report.html").write_text(page, encoding="utf-8")
        (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _say(report, workdir)
    return report


def _tokenize(settings: Quickstart, workdir: Path, tiny: Path) -> str:
    said = []
    for split, views in (("train", settings.views), ("validation", 1)):
        folder = workdir / "records" / split
        asked = dict(split=split, kind="instruction", views=views, seed=settings.run.data.seed)
        if (folder / "dataset.json").exists():
            meta = records.open_records(folder).meta
            if any(meta["notes"].get(name) != value for name, value in asked.items()):
                raise prepare.PrepareError(
                    f"{folder} was made with {meta['notes']}, now asked for {asked}; "
                    "name a fresh --workdir"
                )
        else:
            meta = prepare.prepare_sample(folder, model_folder=tiny, **asked)
        said.append(f"{split}: {meta['documents']} documents, {meta['tokens']} tokens")
    return "; ".join(said)


def _evaluate(
    settings: Quickstart, road: Road, workdir: Path, tiny: Path, found: suites.Suite
) -> dict[str, list[dict[str, Any]]]:
    """Answers before and after LoRA, and after it with pictures swapped."""
    closed = [item for item in found.items if item.family == "vqa_closed"]
    swapped = probes.swapped(closed, seed=settings.eval.seed)
    answers = {}
    adapter = workdir / "train" / "adapter"
    mesh = make_mesh(settings.eval.mesh)
    centroids = None  # of the VQGAN alone, so one time for all
    for name, tuned, items in (
        ("before", None, found.items),
        ("after", adapter, found.items),
        ("swapped", adapter, swapped),
    ):
        with road.stage(f"evaluate {name}") as says, cli.Stop() as stop:

            def progress(line: str, stop: cli.Stop = stop) -> None:
                log.info(line)
                if stop.asked:
                    raise cli.Interrupted("interrupted; the same command goes on from here")

            g = generate.load(tiny, adapter=tuned, mesh=mesh)
            centroids = centroids or looks.centroids(g, found.pictures, images_folder=found.folder)
            model = models.Native(
                g, settings.eval.sample, rows=settings.eval.rows, name=name, stamp=name
            )
            answers[name] = loop.evaluate(
                model,
                items,
                mode=settings.eval.mode,
                images_folder=found.folder,
                out=workdir / f"{name}.jsonl",
                progress=progress,
                looks=looks.by(g, centroids),
            )
            says(f"{len(items)} items")
    return answers


def _report(
    settings: Quickstart, road: Road, found: suites.Suite, answers: dict[str, list[dict]]
) -> dict[str, Any]:
    numbers = dict(seed=settings.eval.seed, resamples=settings.eval.resamples)
    scores = scoring.scores(answers["before"], answers["after"], **numbers)
    closed = [r for r in answers["after"] if r["task"] == scoring.PRIMARY[0]]
    rivals = {
        "before": answers["before"],
        "blind": scoring.answered(closed, baselines.blind(found.train, found.items)),
        "swapped": answers["swapped"],
    }
    comparisons = [
        _against(name, scoring.scores(rival, closed, **numbers)[0])
        for name, rival in rivals.items()
    ]
    unparsed = next(s for s in scores if (s["task"], s["metric"]) == ("vqa_closed", "unparsed"))
    manifest = read_manifest(suites.SAMPLE / "manifest.jsonl")
    return {
        "scores": scores,
        "comparisons": comparisons,
        "stages": road.stages,
        "ran": {
            "seconds": sum(stage["seconds"] for stage in road.stages),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "jax": importlib.metadata.version("jax"),
            "config": config.fingerprint(settings),
            "train_groups": len({r["group"] for r in manifest if r["split"] == "train"}),
            "test_groups": len({item.group for item in found.items}),
        },
        "notes": (
            "Intervals are 95% intervals of the paired difference over groups (eval/stats.py), "
            f"{report_tables.FEW_MARK}: of fewer than {stats.FEW} groups. "
            "An answer that is neither yes nor no counts as wrong: "
            f"{unparsed['before']:.1%} of the closed answers before LoRA, "
            f"{unparsed['after']:.1%} after. modality_match compares generated pictures with "
            "centroids of training pictures; it is not BiomedCLIPScore."
        ),
    }


def _against(name: str, row: dict[str, Any]) -> dict[str, Any]:
    kept = {k: row[k] for k in ("n", "groups", "few_groups", "diff", "ci_low", "ci_high")}
    return {"against": LINES[name], "theirs": row["before"], "ours": row["after"], **kept}


def _cases(
    settings: Quickstart,
    tiny: Path,
    found: suites.Suite,
    answers: dict[str, list[dict]],
    workdir: Path,
) -> tuple[list[quickstart_page.Case], list[quickstart_page.Generated]]:
    """Held-out pictures of different groups, their tasks in turn, and pictures from words."""
    before = {record["id"]: record for record in answers["before"]}
    asked = [r for r in answers["after"] if tasks.FAMILIES[r["family"]].shows_image]
    kinds = list(dict.fromkeys(r["task"] for r in asked))
    groups = list(dict.fromkeys(r["group"] for r in asked))
    chosen = []
    for turn, group in enumerate(groups[: settings.cases]):
        of_group = [r for r in asked if r["group"] == group]
        kind = kinds[turn % len(kinds)]
        chosen.append(next((r for r in of_group if r["task"] == kind), of_group[0]))
    g = generate.load(tiny)
    codes = generate.encode(g, [found.folder / r["image"] for r in chosen])
    rebuilt = generate.decode(g, codes)
    cases = [
        quickstart_page.Case(
            name=f"{r['group']}: {r['kind']}",
            image=images.load(found.folder / r["image"], max_pixels=images.MAX_PIXELS),
            reconstruction=picture,
            question=r["prompt"],
            answer=r["answer"],
            before=before[r["id"]]["text"],
            after=r["text"],
        )
        for r, picture in zip(chosen, rebuilt, strict=True)
    ]
    drawn = [r for r in answers["after"] if r["family"] == "image_generation"]
    pictures = [
        quickstart_page.Generated(
            prompt=r["prompt"],
            before=images.load(
                workdir / before[r["id"]]["images"][0], max_pixels=images.MAX_PIXELS
            ),
            after=images.load(workdir / r["images"][0], max_pixels=images.MAX_PIXELS),
        )
        for r in drawn
    ]
    return cases, pictures


def _stages(path: Path) -> list[dict[str, Any]]:
    """The stages of an earlier start; none, with a warning, where their file is damaged."""
    if not path.exists():
        return []
    try:
        found = read_json(path)
        kinds = dict(stage=str, what=str, seconds=float)
        for entry in found:
            if {name: type(value) for name, value in entry.items()} != kinds:
                raise ValueError(f"{path}: not what this program writes")
        return found
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("WARNING: %s; stages.json is begun anew", error)
        return []


def _history(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        rows, damaged = read_metrics(path)
    except TextFileError as error:
        log.warning("WARNING: %s; the report has no curves", error)
        rows, damaged = [], 0
    if damaged:
        log.warning("%s", damage_warning(path, damaged))
    return tuple([r for r in rows if r["kind"] == kind] for kind in ("train", "validation"))


def _say(report: dict[str, Any], workdir: Path) -> None:
    for row in report["comparisons"]:
        log.info(
            "vqa_closed %.3f, %s %.3f: %+.3f [%s] over %d held-out groups",
            row["ours"], row["against"], row["theirs"], row["diff"],
            quickstart_page.interval(row), row["groups"],
        )  # fmt: skip
    log.info("%s", quickstart_page.NOTICE)
    log.info("report: %s", workdir / "report.html")


if __name__ == "__main__":
    cli.run(main, errors=ERRORS, defaults=DEFAULTS)
