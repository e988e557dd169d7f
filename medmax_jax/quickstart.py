"""python -m medmax_jax.quickstart [--workdir=quickstart_run] [--config.run.train.steps=100 ...]

Runs the complete pipeline on the embedded real images in minutes on two CPU cores.
It uses the programs that also serve 7B. The same command resumes after a stop. The workdir then
contains:

    report.html  report.json     what ran, curves, scores before and after LoRA, example cases
    records/                     the images and texts as token ids
    train/                       log, curves, checkpoints and train/adapter
    before.jsonl after.jsonl     every answer; swapped.jsonl: given an image of another group
"""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
from ml_collections import ConfigDict

from medmax_jax import cli, config
from medmax_jax import train as train_program
from medmax_jax.data import prepare
from medmax_jax.data.image_tokens import encoder
from medmax_jax.data.records import writer
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.eval.config import Settings as EvalSettings
from medmax_jax.eval.encoders import modality
from medmax_jax.eval.metrics import aggregate
from medmax_jax.eval.models import base, baselines
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.reporting import tables
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes, selection
from medmax_jax.generation import model_bundle
from medmax_jax.io import html_page
from medmax_jax.io.text_files import TextFileError, read_json
from medmax_jax.models import images
from medmax_jax.sharding import make_mesh
from medmax_jax.training.run_files import damage_warning, read_metrics

log = logging.getLogger("medmax_jax.quickstart")

HERE = Path(__file__).parent
DEFAULTS = {"config": str(HERE / "configs" / "quickstart.py"), "workdir": "quickstart_run"}
ERRORS = (*prepare.ERRORS, *train_program.ERRORS, ValueError, OSError)
LINES = {  # what the primary row is compared with
    "before": "the same model before LoRA",
    "blind": "the commonest training answer of each question's template, without looking",
    "swapped": "the model after LoRA, shown a picture of another group",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Holds the typed settings of configs/quickstart.py."""

    views: int
    cases: int
    run: config.Run
    eval: EvalSettings


class QuickstartRun:
    """Records the stages so far, with their seconds and results, in stages.json."""

    def __init__(self, workdir: Path):
        self._path = workdir / "stages.json"
        self.stages: list[dict[str, Any]] = _stages(self._path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; its body reports the result. A repeated stage adds to its seconds."""
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
    """Run the pipeline, with a log for people and report.json for programs."""
    folder = cli.open_workdir(workdir)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
    try:
        logging.getLogger().addHandler(logging.FileHandler(folder / "quickstart.log"))
    except OSError as error:
        log.warning("WARNING: %s: cannot be written (%s)", error.filename, error.strerror)
    run(config.build(Quickstart, settings), folder)


def run(settings: Quickstart, workdir: Path) -> dict[str, Any]:
    """Run the pipeline from the current state of `workdir`; return the content of report.json."""
    config.check(settings.run)
    road = QuickstartRun(workdir)
    tiny = Path(settings.run.train.init_from)
    with road.stage("tokenize") as says:
        says(_tokenize(settings, workdir, tiny))
    with road.stage("fine-tune") as says:
        data = dataclasses.replace(
            settings.run.data,
            train=str(workdir / "records" / "train"),
            validation=str(workdir / "records" / "validation"),
        )
        last = train_program.run(dataclasses.replace(settings.run, data=data), workdir / "train")
        says(f"{last['step']} steps of LoRA on all task kinds, loss {last['loss']:.2f}")
    found = selection.load_eval_set(settings.eval)
    answers = _evaluate(settings, road, workdir, tiny, found)
    report = _report(settings, road, found, answers)
    with road.stage("report") as says:
        says("report.html")
        cases, pictures = _cases(settings, tiny, found, answers, workdir)
        curves = plot_curves(*_history(workdir / "train" / "metrics.jsonl"))
        page = build(report, cases, pictures, curves)
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
            meta = writer.open_records(folder).meta
            if any(meta["notes"].get(name) != value for name, value in asked.items()):
                raise encoder.PrepareError(
                    f"{folder} was made with {meta['notes']}, now asked for {asked}; "
                    "name a fresh --workdir"
                )
        else:
            meta = prepare.prepare_sample(folder, model_folder=tiny, **asked)
        said.append(f"{split}: {meta['documents']} documents, {meta['tokens']} tokens")
    return "; ".join(said)


def _evaluate(
    settings: Quickstart, road: QuickstartRun, workdir: Path, tiny: Path, found: selection.EvalSet
) -> dict[str, list[dict[str, Any]]]:
    """Return the answers before and after LoRA, and after LoRA with swapped images."""
    closed = [item for item in found.items if item.family == "vqa_closed"]
    swapped = probes.swapped(closed, seed=settings.eval.seed)
    answers = {}
    adapter = workdir / "train" / "adapter"
    mesh = make_mesh(settings.eval.mesh)
    centroids = None  # they depend on the VQGAN alone, so they are computed once
    for name, tuned, items in (
        ("before", None, found.items),
        ("after", adapter, found.items),
        ("swapped", adapter, swapped),
    ):
        with road.stage(f"evaluate {name}") as says, cli.Stop() as stop:

            def progress(line: str, stop: cli.Stop = stop) -> None:
                log.info(line)
                if stop.requested:
                    raise cli.Interrupted("interrupted; the same command goes on from here")

            g = model_bundle.load(tiny, adapter=tuned, mesh=mesh)
            centroids = centroids or modality.centroids(
                g, found.training_images, images_folder=found.folder
            )
            model = base.NativeModel(
                g, settings.eval.sample, rows=settings.eval.rows, name=name, fingerprint=name
            )
            answers[name] = inference.run_items(
                model,
                items,
                mode=settings.eval.mode,
                images_folder=found.folder,
                out=workdir / f"{name}.jsonl",
                progress=progress,
                classify_modality=modality.make_classifier(g, centroids),
            )
            says(f"{len(items)} items")
    return answers


def _report(
    settings: Quickstart,
    road: QuickstartRun,
    found: selection.EvalSet,
    answers: dict[str, list[dict]],
) -> dict[str, Any]:
    resampling = intervals.Resampling(settings.eval.seed, settings.eval.resamples)
    scores = aggregate.scores(answers["before"], answers["after"], resampling=resampling)
    closed = [r for r in answers["after"] if r["task"] == aggregate.PRIMARY[0]]
    rivals = {
        "before": answers["before"],
        "blind": aggregate.with_answers(closed, baselines.blind(found.train, found.items)),
        "swapped": answers["swapped"],
    }
    comparisons = [
        _against(name, aggregate.scores(rival, closed, resampling=resampling)[0])
        for name, rival in rivals.items()
    ]
    unparsed = next(s for s in scores if (s["task"], s["metric"]) == ("vqa_closed", "unparsed"))
    manifest = read_manifest(selection.SAMPLE / "manifest.jsonl")
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
            "Intervals are 95% intervals of the paired difference over groups "
            "(eval/stats/intervals.py), "
            f"{tables.FEW_MARK}: of fewer than {intervals.FEW} groups. "
            "An answer that is neither yes nor no counts as wrong: "
            f"{unparsed['before']:.1%} of the closed answers before LoRA, "
            f"{unparsed['after']:.1%} after. modality_match compares generated pictures with "
            "centroids of training pictures; it is not BiomedCLIPScore."
        ),
    }


def _against(name: str, row: dict[str, Any]) -> dict[str, Any]:
    kept = {k: row[k] for k in ("n", "groups", "few_groups", "diff", "ci_low", "ci_high")}
    return {"against": LINES[name], "theirs": row["before"], "ours": row["after"], **kept}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Holds one held-out image with a question and the answers of the two models."""

    name: str
    image: PIL.Image.Image
    reconstruction: PIL.Image.Image  # encoded and decoded by the VQGAN
    question: str
    answer: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """Holds the images that the two models generated from the same text."""

    prompt: str
    before: PIL.Image.Image
    after: PIL.Image.Image


def _cases(
    settings: Quickstart,
    tiny: Path,
    found: selection.EvalSet,
    answers: dict[str, list[dict]],
    workdir: Path,
) -> tuple[list[Case], list[Generated]]:
    """Select held-out images of different groups, alternating tasks, and the generated images."""
    before = {record["id"]: record for record in answers["before"]}
    asked = [r for r in answers["after"] if task_items.FAMILIES[r["family"]].shows_image]
    kinds = list(dict.fromkeys(r["task"] for r in asked))
    groups = list(dict.fromkeys(r["group"] for r in asked))
    chosen = []
    for turn, group in enumerate(groups[: settings.cases]):
        of_group = [r for r in asked if r["group"] == group]
        kind = kinds[turn % len(kinds)]
        chosen.append(next((r for r in of_group if r["task"] == kind), of_group[0]))
    g = model_bundle.load(tiny)
    codes = model_bundle.encode(g, [found.folder / r["image"] for r in chosen])
    rebuilt = model_bundle.decode(g, codes)
    cases = [
        Case(
            name=f"{r['group']}: {r['modality']}",
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
        Generated(
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
    """Return the stages of an earlier start; none, with a warning, where their file is damaged."""
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
            interval(row), row["groups"],
        )  # fmt: skip
    log.info("%s", NOTICE)
    log.info("report: %s", workdir / "report.html")


# ---- The page of the quickstart: what ran, curves, scores before and after, example cases ----
#
# report.json --+
# cases --------+--> report.html    one file, no script, all text escaped (html_page.py)
# curves.png ---+


matplotlib.use("Agg")  # no display is needed to draw into a file

NOTICE = (
    "This is a toy-sized research model, trained in minutes on a few hundred embedded pictures. "
    "It shows that the road works from end to end. It is not for clinical use."
)


def build(
    report: dict[str, Any], cases: Sequence[Case], generated: Sequence[Generated], curves: bytes
) -> str:
    """Return the complete page as HTML."""
    body = html_page.paragraph(NOTICE) + html_page.paragraph(_summary(report), note=True)
    body += html_page.section("What ran", _quickstart_page_stages(report))
    body += html_page.section("Scores on held-out groups", _scores(report))
    body += html_page.section(
        "Curves", html_page.figure(curves, "Training loss by kind of token, and rate")
    )
    body += html_page.section("Held-out cases", "".join(map(_case, cases)))
    body += html_page.section("Pictures from words", "".join(map(_generated, generated)))
    return html_page.document("MedMax in JAX: the quickstart", body)


def plot_curves(train: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of the mean text and image token losses by step, and of tokens per second."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for kind, colour in (("text", "#0b6e69"), ("image", "#b4552d")):
        for rows, style, name in ((train, "-", "training"), (held, "o--", "validation")):
            points = [(r["step"], r[f"{kind}_nll"]) for r in rows if f"{kind}_nll" in r]
            if points:
                left.plot(*zip(*points, strict=True), style, color=colour, label=f"{kind}, {name}")
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.legend(frameon=False)
    rates = [(r["step"], r["tokens_per_second"]) for r in train if r.get("tokens_per_second")]
    if rates:
        right.plot(*zip(*rates, strict=True), color="#444")
    right.set(xlabel="step", ylabel="real tokens per second", title="Rate", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def interval(row: Mapping[str, Any]) -> str:
    """Format an interval: "+0.012 .. +0.340", marked for few groups; a dash for a single group."""
    if row["ci_low"] is None:
        return html_page.NOTHING
    return tables.marked(row, f"{row['ci_low']:+.3f} .. {row['ci_high']:+.3f}")


def _summary(report: dict[str, Any]) -> str:
    ran = report["ran"]
    return (
        f"{ran['device']}, {ran['seconds'] / 60:.1f} minutes, peak memory {ran['peak_gib']:.1f} "
        f"GiB; jax {ran['jax']}, configuration {ran['config']}. Split by patient, volume or "
        f"slide: {ran['train_groups']} groups to learn from, {ran['test_groups']} held out."
    )


def _quickstart_page_stages(report: dict[str, Any]) -> str:
    rows = [(s["stage"], s["what"], round(s["seconds"], 1)) for s in report["stages"]]
    return html_page.table(["stage", "what", "seconds"], rows)


def _scores(report: dict[str, Any]) -> str:
    head = ["task", "metric", "n", "groups", "before", "after", "difference", "95% interval"]
    rows = [
        (
            s["task"], s["metric"], s["n"], s["groups"], s["before"], s["after"], s["diff"],
            interval(s),
        )
        for s in report["scores"]
    ]  # fmt: skip
    against = [
        (c["against"], c["n"], c["groups"], c["theirs"], c["ours"], c["diff"], interval(c))
        for c in report["comparisons"]
    ]  # fmt: skip
    return (
        html_page.table(
            head, rows, caption="Before and after LoRA, the same items, the same settings"
        )
        + html_page.table(
            [
                "the primary row against",
                "n",
                "groups",
                "theirs",
                "ours",
                "difference",
                "95% interval",
            ],
            against,
            caption="vqa_closed after LoRA against three baselines",
        )
        + html_page.paragraph(report["notes"], note=True)
    )


def _case(case: Case) -> str:
    pictures = html_page.figures(
        [
            (html_page.png(case.image), case.name),
            (html_page.png(case.reconstruction), "through the VQGAN and back"),
        ]
    )
    rows = [
        ("question", case.question), ("answer", case.answer),
        ("before LoRA", case.before), ("after LoRA", case.after),
    ]  # fmt: skip
    return pictures + html_page.table(["", ""], rows)


def _generated(made: Generated) -> str:
    return html_page.paragraph(made.prompt) + html_page.figures(
        [(html_page.png(made.before), "before LoRA"), (html_page.png(made.after), "after LoRA")]
    )


if __name__ == "__main__":
    cli.run(main, errors=ERRORS, defaults=DEFAULTS)
