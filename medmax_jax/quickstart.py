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
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import PIL.Image
from ml_collections import ConfigDict

from medmax_jax import cli, config
from medmax_jax import train as train_program
from medmax_jax.checkpoints import export
from medmax_jax.data import prepare
from medmax_jax.data.image_tokens import encoder
from medmax_jax.data.records import writer
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.environment import environment
from medmax_jax.eval.config import Settings as EvalSettings
from medmax_jax.eval.encoders import modality
from medmax_jax.eval.metrics import aggregate
from medmax_jax.eval.models import base, baselines
from medmax_jax.eval.pipeline import inference
from medmax_jax.eval.records import EvalRecord
from medmax_jax.eval.reporting import definitions, tables
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes, selection
from medmax_jax.generation import model_bundle
from medmax_jax.io import charts, html_page
from medmax_jax.io.progress import report_waiting
from medmax_jax.io.run_files import damage_warning, read_metrics
from medmax_jax.io.text_files import TextFileError, read_json
from medmax_jax.models import images
from medmax_jax.sharding import make_mesh
from medmax_jax.storage.folder import file_sha256

log = logging.getLogger("medmax_jax.quickstart")

HERE = Path(__file__).parent
DEFAULTS = {"config": str(HERE / "configs" / "quickstart.py"), "workdir": "quickstart_run"}
ERRORS = (*prepare.ERRORS, *train_program.ERRORS, ValueError, OSError)
BASELINES = {  # what the primary row is compared with
    "before": "the same model before LoRA",
    "blind": "the most frequent training answer of each question template, without the image",
    "swapped": "the model after LoRA, given an image of another group",
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
        begin, results = time.monotonic(), []
        try:
            yield results.append
        finally:
            before = next((s for s in self.stages if s["stage"] == name), None)
            entry = before or {"stage": name, "what": "", "seconds": 0.0}
            entry["seconds"] += time.monotonic() - begin
            entry["what"] = results[-1] if results else entry["what"]
            if before is None:
                self.stages.append(entry)
            try:
                self._path.write_text(json.dumps(self.stages, indent=1))
            except OSError as error:  # seconds of earlier starts, which only the report shows
                log.warning("WARNING: cannot write %s: %s", self._path, error.strerror)
            log.info("== %s: %s (%.1f s)", name, entry["what"], entry["seconds"])


def main(settings: ConfigDict, workdir: str) -> None:
    """Run the pipeline, with a log for people and report.json for programs."""
    with cli.open_workdir(workdir, own="report.json") as work:
        _run_logged(settings, work.folder)


def _run_logged(settings: ConfigDict, folder: Path) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
    try:
        logging.getLogger().addHandler(logging.FileHandler(folder / "quickstart.log"))
    except OSError as error:
        log.warning("WARNING: cannot write %s: %s", error.filename, error.strerror)
    run(config.build(Quickstart, settings), folder)


def run(settings: Quickstart, workdir: Path) -> dict[str, Any]:
    """Run the pipeline from the current state of `workdir`; return the content of report.json."""
    config.check(settings.run)
    stages = QuickstartRun(workdir)
    tiny = Path(export.locate(settings.run.train.init_from))
    with stages.stage("tokenize") as report_result:
        report_result(_tokenize(settings, workdir, tiny))
    with stages.stage("fine-tune") as report_result:
        data = dataclasses.replace(
            settings.run.data,
            train=str(workdir / "records" / "train"),
            validation=str(workdir / "records" / "validation"),
        )
        last = train_program.run(dataclasses.replace(settings.run, data=data), workdir / "train")
        report_result(f"{last['step']} steps of LoRA on all tasks, loss {last['loss']:.2f}")
    eval_set = selection.load_eval_set(settings.eval)
    answers = _evaluate(settings, stages, workdir, tiny, eval_set)
    report = _report(settings, stages, eval_set, answers)
    with stages.stage("report") as report_result:
        report_result("report.html")
        cases, generated = _cases(settings, tiny, eval_set, answers, workdir)
        curves = plot_curves(*_history(workdir / "train" / "metrics.jsonl"))
        page = build(report, cases, generated, curves)
        (workdir / "report.html").write_text(page, encoding="utf-8")
        (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _log_summary(report, workdir)
    return report


def _tokenize(settings: Quickstart, workdir: Path, tiny: Path) -> str:
    summaries = []
    for split, views in (("train", settings.views), ("validation", 1)):
        folder = workdir / "records" / split
        seed = settings.run.data.seed
        requested = dict(split=split, kind="instruction", views=views, seed=seed)
        if (folder / "dataset.json").exists():
            meta = writer.open_records(folder).meta
            if any(meta["notes"].get(name) != value for name, value in requested.items()):
                raise encoder.PrepareError(
                    f"{folder} was made with {meta['notes']}, but this run requires {requested}; "
                    "use a new --workdir"
                )
        else:
            meta = prepare.prepare_sample(
                folder, model_folder=tiny, split=split, kind="instruction", views=views, seed=seed,
                view=settings.run.vq.view, answer_view=settings.run.vq.answer_view,
            )  # fmt: skip
        summaries.append(f"{split}: {meta['documents']} documents, {meta['tokens']} tokens")
    return "; ".join(summaries)


def _evaluate(
    settings: Quickstart,
    stages: QuickstartRun,
    workdir: Path,
    tiny: Path,
    eval_set: selection.EvalSet,
) -> dict[str, list[EvalRecord]]:
    """Return the answers before and after LoRA, and after LoRA with swapped images."""
    closed_items = [item for item in eval_set.items if item.family == "vqa_closed"]
    swapped = probes.swapped(closed_items, seed=settings.eval.seed)
    answers = {}
    adapter = workdir / "train" / "adapter"
    mesh = make_mesh(settings.eval.mesh)
    centroids = None  # they depend on the VQGAN alone, so they are computed once
    for name, tuned, items in (
        ("before", None, eval_set.items),
        ("after", adapter, eval_set.items),
        ("swapped", adapter, swapped),
    ):
        with stages.stage(f"evaluate {name}") as report_result, cli.Stop() as stop:
            progress = stop.progress(log.info)
            with report_waiting("loading the model, encoding the training images", log.info):
                # merged: the programs that "evaluate before" compiled run this model too
                g = model_bundle.load(
                    tiny, adapter=tuned, mesh=mesh, merge=tuned is not None,
                    view=settings.run.vq.view,
                )  # fmt: skip
                centroids = centroids or modality.centroids(
                    g, eval_set.training_images, images_folder=eval_set.folder
                )
            model = base.NativeModel(
                g, settings.eval.sample, rows=settings.eval.rows, name=name, fingerprint=name
            )
            answers[name] = inference.run_items(
                model,
                items,
                mode=settings.eval.mode,
                images_folder=eval_set.folder,
                out=workdir / f"{name}.jsonl",
                progress=progress,
                classify_modality=modality.make_classifier(g, centroids),
            )
            report_result(f"{len(items)} items")
    return answers


def _report(
    settings: Quickstart,
    stages: QuickstartRun,
    eval_set: selection.EvalSet,
    answers: dict[str, list[EvalRecord]],
) -> dict[str, Any]:
    resampling = intervals.Resampling(settings.eval.seed, settings.eval.resamples)
    scores = aggregate.scores(answers["before"], answers["after"], resampling=resampling)
    closed_records = [r for r in answers["after"] if r.task == aggregate.PRIMARY[0]]
    baseline_answers = {
        "before": answers["before"],
        "blind": aggregate.with_answers(
            closed_records, baselines.blind(eval_set.train, eval_set.items)
        ),
        "swapped": answers["swapped"],
    }
    comparisons = [
        _against(name, aggregate.scores(records, closed_records, resampling=resampling)[0])
        for name, records in baseline_answers.items()
    ]
    unparsed = next(s for s in scores if (s["task"], s["metric"]) == ("vqa_closed", "unparsed"))
    manifest_file = selection.SAMPLE / "manifest.jsonl"
    manifest = read_manifest(manifest_file)
    return {
        "scores": scores,
        "comparisons": comparisons,
        "stages": stages.stages,
        "ran": {
            "seconds": sum(stage["seconds"] for stage in stages.stages),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "environment": environment(devices=jax.devices()),
            "jax": importlib.metadata.version("jax"),
            "model": "medmax_jax/tiny with LoRA",
            "data": "the embedded sample",
            "split": "test",
            "digest": file_sha256(manifest_file)[:16],
            "config": config.fingerprint(settings),
            "seed": settings.eval.seed,
            "train_groups": len({r["group"] for r in manifest if r["split"] == "train"}),
            "test_groups": len({item.group for item in eval_set.items}),
        },
        "notes": (
            "Intervals are 95 % confidence intervals of the paired difference over groups "
            "(eval/stats/intervals.py). "
            f"{tables.FEW_MARK} marks intervals of fewer than {intervals.FEW} groups. "
            "An answer that is neither yes nor no counts as wrong: "
            f"{unparsed['before']:.1%} of the closed answers before LoRA, "
            f"{unparsed['after']:.1%} after. modality_match compares generated images with "
            "centroids of training images; it is not BiomedCLIPScore."
        ),
    }


def _against(name: str, row: dict[str, Any]) -> dict[str, Any]:
    interval_fields = {
        k: row[k] for k in ("n", "groups", "few_groups", "diff", "ci_low", "ci_high")
    }
    return {
        "against": BASELINES[name],
        "theirs": row["before"],
        "ours": row["after"],
        **interval_fields,
    }


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
    """Holds the images that the two models generated from the same text, and a real one."""

    prompt: str
    real: PIL.Image.Image
    before: PIL.Image.Image
    after: PIL.Image.Image


def _cases(
    settings: Quickstart,
    tiny: Path,
    eval_set: selection.EvalSet,
    answers: dict[str, list[EvalRecord]],
    workdir: Path,
) -> tuple[list[Case], list[Generated]]:
    """Select held-out images of different groups, alternating tasks, and the generated images."""
    before = {record.id: record for record in answers["before"]}
    records = [r for r in answers["after"] if task_items.FAMILIES[r.family].shows_image]
    tasks = list(dict.fromkeys(r.task for r in records))
    groups = list(dict.fromkeys(r.group for r in records))
    chosen = []
    for turn, group in enumerate(groups[: settings.cases]):
        group_records = [r for r in records if r.group == group]
        task = tasks[turn % len(tasks)]
        chosen.append(next((r for r in group_records if r.task == task), group_records[0]))
    g = model_bundle.load(tiny)
    codes = model_bundle.encode(g, [eval_set.folder / r.image for r in chosen])
    reconstructions = model_bundle.decode(g, codes)
    cases = [
        Case(
            name=f"{r.group}: {r.modality}",
            image=images.load(eval_set.folder / r.image, max_pixels=images.MAX_PIXELS),
            reconstruction=reconstruction,
            question=r.prompt,
            answer=r.answer,
            before=before[r.id].text,
            after=r.text,
        )
        for r, reconstruction in zip(chosen, reconstructions, strict=True)
    ]
    generated_records = [r for r in answers["after"] if r.family == "image_generation"]
    generated = [
        Generated(
            prompt=r.prompt,
            real=images.load(eval_set.folder / r.image, max_pixels=images.MAX_PIXELS),
            before=images.load(workdir / before[r.id].generated[0], max_pixels=images.MAX_PIXELS),
            after=images.load(workdir / r.generated[0], max_pixels=images.MAX_PIXELS),
        )
        for r in generated_records
    ]
    return cases, generated


def _stages(path: Path) -> list[dict[str, Any]]:
    """Return the stages of an earlier start; none, with a warning, where their file is damaged."""
    if not path.exists():
        return []
    try:
        stages = read_json(path)
        field_types = dict(stage=str, what=str, seconds=float)
        for entry in stages:
            if {name: type(value) for name, value in entry.items()} != field_types:
                raise ValueError(f"{path}: not a file of this program")
        return stages
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("WARNING: %s; starting a new stages.json", error)
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


def _log_summary(report: dict[str, Any], workdir: Path) -> None:
    for row in report["comparisons"]:
        log.info(
            "vqa_closed: %.3f; %s: %.3f; difference %+.3f [%s] over %d held-out groups",
            row["ours"], row["against"], row["theirs"], row["diff"],
            tables.interval(row), row["groups"],
        )  # fmt: skip
    log.info("%s", NOTICE)
    log.info("report: %s", workdir / "report.html")


# ---- The page of the quickstart: what ran, curves, scores before and after, example cases ----
#
# report.json --+
# cases --------+--> report.html    one file, no script, all text escaped (html_page.py)
# curves -------+


COLUMNS = {
    "before": "score of the shipped model",
    "after": "score of the same model with the adapter that this run trained",
    "difference": "after minus before, or the adapter minus the baseline, on the same items; above "
    "0: the adapter is better, except for unparsed",
    "baseline score": "accuracy of the baseline on the same questions; higher is better",
    "after LoRA": "accuracy with the adapter that this run trained; higher is better",
}
NOTICE = (
    "This is a toy-sized research model, trained in minutes on a few hundred embedded images. "
    "It shows that the pipeline works from end to end. It is not for clinical use."
)


def build(
    report: dict[str, Any], cases: Sequence[Case], generated: Sequence[Generated], curves: str
) -> str:
    """Return the complete page as HTML."""
    ran = report["ran"]
    facts = {name: ran[name] for name in ("model", "data", "split", "digest", "config", "seed")}
    body = html_page.provenance(facts | ran["environment"])
    body += html_page.paragraph(NOTICE) + html_page.paragraph(_summary(report), note=True)
    body += html_page.section("Result", html_page.verdicts(_verdicts(report)))
    body += html_page.section("Stages", _stages_table(report))
    body += html_page.section("Scores on held-out groups", _scores(report))
    body += html_page.section(
        "Curves", html_page.chart(curves, "Loss of text and image tokens, and training throughput")
    )
    body += html_page.section("Held-out cases", "".join(map(_case, cases)))
    body += html_page.section("Images generated from text", "".join(map(_generated, generated)))
    return html_page.document("MedMax in JAX: quickstart", body)


@charts.page_style()
def plot_curves(train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> str:
    """Return a chart of the mean text and image token losses by step, and of tokens per second."""
    figure, (left, right) = charts.subplots(1, 2, size=(10.0, 3.4))
    for token_type, color in zip(("text", "image"), charts.SERIES, strict=False):
        for rows, style, name in ((train, "-", "training"), (validation, "o--", "validation")):
            points = [(r["step"], r[f"{token_type}_nll"]) for r in rows if f"{token_type}_nll" in r]
            if points:
                left.plot(
                    *zip(*points, strict=True), style, color=color, label=f"{token_type}, {name}"
                )
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.legend()
    rates = [(r["step"], r["tokens_per_second"]) for r in train if r.get("tokens_per_second")]
    if rates:
        right.plot(*zip(*rates, strict=True), color=charts.SOFT)
    right.set(
        xlabel="step",
        ylabel="tokens per second, without padding",
        title="Throughput",
        ylim=(0, None),
    )
    return charts.svg(figure)


def _summary(report: dict[str, Any]) -> str:
    ran = report["ran"]
    return (
        f"{ran['seconds'] / 60:.1f} minutes, peak memory {ran['peak_gib']:.1f} GiB; jax "
        f"{ran['jax']}. Split by patient, volume or slide: {ran['train_groups']} training groups, "
        f"{ran['test_groups']} held-out groups."
    )


def _stages_table(report: dict[str, Any]) -> str:
    rows = [(s["stage"], s["what"], f"{s['seconds']:.1f}") for s in report["stages"]]
    return html_page.table(["stage", "result", "seconds"], rows)


def _verdicts(report: dict[str, Any]) -> list[html_page.Verdict]:
    """Return whether the adapter is above each baseline, in words, with the paired interval."""
    unparsed = [
        row["after"]
        for row in report["scores"]
        if (row["task"], row["metric"]) == ("vqa_closed", "unparsed")
    ]
    verdicts = []
    for row in report["comparisons"]:
        low, high = row["ci_low"], row["ci_high"]
        if low is None or low <= 0 <= high:
            status, label = "neutral", "Inconclusive"
        else:
            status, label = ("good", "Above") if low > 0 else ("bad", "Below")
            label += " the baseline"
        text = (
            f"vqa_closed after LoRA: accuracy {row['ours']:.3f}, against {row['theirs']:.3f} of "
            f"the baseline “{row['against']}”; difference {row['diff']:.3f}"
            f"{tables.interval_text(row)}, on {row['n']} items of {row['groups']} groups."
        )
        text += "".join(f" {100 * share:.1f}% of the answers are unparsed." for share in unparsed)
        verdicts.append(html_page.Verdict(status, label, text))
    return verdicts


def _scores(report: dict[str, Any]) -> str:
    head = ["task", "metric", "n", "groups", "before", "after", "difference", "95 % interval"]
    terms = definitions.of_table({s["metric"] for s in report["scores"]}) | COLUMNS
    rows = [
        (
            s["task"], s["metric"], s["n"], s["groups"], s["before"], s["after"], s["diff"],
            tables.interval(s),
        )
        for s in report["scores"]
    ]  # fmt: skip
    comparisons = [
        (c["against"], c["n"], c["groups"], c["theirs"], c["ours"], c["diff"], tables.interval(c))
        for c in report["comparisons"]
    ]  # fmt: skip
    return (
        html_page.table(
            head,
            rows,
            caption="Before and after LoRA, with the same items and settings",
            definitions=terms,
        )
        + html_page.table(
            [
                "baseline",
                "n",
                "groups",
                "baseline score",
                "after LoRA",
                "difference",
                "95 % interval",
            ],
            comparisons,
            caption="Accuracy on vqa_closed after LoRA, and that of three baselines",
            definitions=terms,
        )
        + html_page.paragraph(report["notes"], note=True)
    )


def _case(case: Case) -> str:
    image_figures = html_page.figures(
        [
            (html_page.png(case.image), f"real image, {case.name}"),
            (html_page.png(case.reconstruction), "the same, encoded and decoded by the VQGAN"),
        ]
    )
    rows = [
        ("question", case.question), ("answer", case.answer),
        ("before LoRA", case.before), ("after LoRA", case.after),
    ]  # fmt: skip
    return image_figures + html_page.table(["", ""], rows)


def _generated(example: Generated) -> str:
    return html_page.paragraph(example.prompt) + html_page.figures(
        [
            (html_page.png(example.real), "real image of the same prompt"),
            (html_page.png(example.before), "generated before LoRA"),
            (html_page.png(example.after), "generated after LoRA"),
        ]
    )


if __name__ == "__main__":
    cli.run(main, errors=ERRORS, defaults=DEFAULTS)
