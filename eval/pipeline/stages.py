"""Runs one evaluation in stages; each stage is a plain function of an `EvalRun` and shares files.

lock  -> plan -> answer -> probe -> options -> confidence -> judge -> image scores -> summarize
      -> report
         records.jsonl  probe_NAME.jsonl  options.jsonl  confidence.jsonl  judgments.jsonl
         image_scores.jsonl, probe_NAME_image_scores.jsonl of captions
         summary.json  report.html  history.jsonl
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from medmax_jax import cli
from medmax_jax.checkpoints.barriers import SHARE_TIMEOUT, barrier, first_host_first
from medmax_jax.config import fingerprint, to_dict
from medmax_jax.data.records.reader import open_records
from medmax_jax.environment import environment
from medmax_jax.eval.config import EvalError, Settings, pinned
from medmax_jax.eval.encoders import scorer
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.models import baselines, endpoint, loading, predictions
from medmax_jax.eval.models.base import ModalityClassifier
from medmax_jax.eval.pipeline import (
    contamination,
    cost_estimate,
    image_scoring,
    inference,
    judging,
    option_likelihoods,
    perturbation,
    reference_scoring,
    run_facts,
    verbalized_confidence,
)
from medmax_jax.eval.records import EvalRecord, Item, is_credentialed, item_name
from medmax_jax.eval.reporting import page
from medmax_jax.eval.results import Summary, write_summary
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import catalog, probes
from medmax_jax.eval.tasks.families import FAMILIES
from medmax_jax.eval.tasks.selection import WHOLE, EvalSet, Shard, check_images, load_eval_set
from medmax_jax.generation import requests
from medmax_jax.io.progress import report_waiting
from medmax_jax.storage import hub
from medmax_jax.storage.atomic_folder import private_umask
from medmax_jax.storage.workdir import Workdir

SWAPPED = "the same model, shown an image of another group: the effect of the image"


@dataclasses.dataclass(kw_only=True)
class EvalRun:
    """Holds what the stages share. `loaded`: the model with its generator, if it has one."""

    settings: Settings
    work: Workdir
    eval_set: EvalSet
    loaded: loading.LoadedModel
    shard: Shard
    hosts: bool  # the shards are those of the hosts of one run, which its first one merges
    progress: Callable[[str], None]
    stopped: Callable[[], bool]
    facts: dict[str, str]

    @property
    def workdir(self) -> Path:
        """Return the local folder of the results."""
        return self.work.folder

    @property
    def resampling(self) -> intervals.Resampling:
        return intervals.Resampling(self.settings.seed, self.settings.resamples)

    @property
    def perturbed(self) -> Path | None:
        """Return the folder of perturbed images; None where the images are shown as they are."""
        return self.workdir / perturbation.FOLDER if self.settings.perturbation else None

    def supported_items(self, items) -> list:
        """Return the items that require an answer of a kind that the model can write."""
        modes = getattr(self.loaded.model, "modes", None)
        return [i for i in items if modes is None or FAMILIES[i.family].mode in modes]

    def run_items(
        self,
        items: Sequence[Item],
        name: str,
        *,
        folder: Path | None = None,
        classify_modality: ModalityClassifier | None = None,
    ) -> list[EvalRecord]:
        """Return the records of items, in WORKDIR/NAME.jsonl, run with the settings.

        folder: of the images, if not that of the items; these are not perturbed.
        """
        return inference.run_items(
            self.loaded.model,
            items,
            mode=self.settings.mode,
            prompt=self.settings.prompt,
            images_folder=folder or self.eval_set.folder,
            out=self.workdir / f"{name}.jsonl",
            progress=self.progress,
            window=self.settings.window,
            shard=self.shard,
            facts=self.facts,
            classify_modality=classify_modality,
            perturbed=None if folder else self.perturbed,
        )


def run(
    settings: Settings,
    workdir: str | Path,
    *,
    model: str,
    adapter: str = "",
    merge: bool = False,
    shard: str = "",
    cards: str | Path = "",
    dry_run: bool = False,
    progress: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Summary | None:
    """Run the complete evaluation and return its summary.

    Returns None after one shard or a dry run, and on all but the first of several hosts: each runs
    the model on its shard with its own devices, and the first one scores all of them.

    model: KIND:WHERE, as eval/models/loading.py has it. shard: "i/n" of the items, from 0. cards:
    a Python file with those of the user's own tasks.
    """
    settings = pinned(settings)
    eval_set, part = load_eval_set(settings, cards), Shard.of(shard)
    if (hosts := jax.process_count()) > 1:
        if shard:
            raise EvalError(f"--shard is {shard!r}; omit it, {hosts} hosts divide the items")
        part = Shard(index=jax.process_index(), count=hosts)
    # Before a checkpoint is converted or its weights are read: work that could not be stored.
    with open_workdir(workdir, eval_set, part, dry_run=dry_run) as work:
        if not dry_run:
            judging.check_judge(settings.judge, eval_set.items, work.folder)
        if not model:  # config.adapter belongs to config.model
            model, adapter = settings.model, adapter or settings.adapter
        with first_host_first("the model is converted"):
            spec = loading.parse_model_spec(model, adapter, merge, settings, progress=progress)
        return run_named(
            settings,
            work,
            eval_set=eval_set,
            spec=spec,
            load=lambda: loading.load_model(spec, settings, eval_set, work.folder, part, stopped),
            shard=part,
            dry_run=dry_run,
            progress=progress,
            stopped=stopped,
        )


@contextlib.contextmanager
def open_workdir(
    workdir: str | Path, eval_set: EvalSet, shard: Shard = WHOLE, *, dry_run: bool = False
) -> Iterator[Workdir]:
    """Open the folder of an evaluation, local or gs://; a dry run creates no local one."""
    if dry_run and not str(workdir).startswith("gs://"):
        yield Workdir(str(workdir), Path(workdir))
        return
    writer = f"shard-{shard.index}-of-{shard.count}" if shard.count > 1 else ""
    with (
        _file_modes(eval_set),
        cli.open_workdir(workdir, own="records.jsonl", writer=writer, shared=True) as w,
    ):
        yield w


def export_items(settings: Settings, out: str | Path, *, cards: str | Path = "") -> int:
    """Write the items of the settings for programs that answer them; return their number.

    With a credentialed item the file has mode 0600. The answers are read by --model=predictions.
    """
    eval_set = load_eval_set(settings, cards)
    check_images(eval_set)
    check_prompts(eval_set)
    perturbed = Path(out).absolute().parent / perturbation.FOLDER if settings.perturbation else None
    to_request = functools.partial(
        inference.make_request,
        folder=eval_set.folder,
        mode=settings.mode,
        prompt=settings.prompt,
        perturbed=perturbed,
    )
    with _file_modes(eval_set):
        predictions.export_items(eval_set.items, map(to_request, eval_set.items), Path(out))
    return len(eval_set.items)


def run_named(
    settings: Settings,
    work: Workdir,
    *,
    eval_set: EvalSet,
    spec: loading.ModelSpec,
    load: Callable[[], loading.LoadedModel],
    shard: Shard = WHOLE,
    dry_run: bool = False,
    progress: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Summary | None:
    """Run an evaluation of given items and a given model; see `run`.

    `work` is one that `open_workdir` opened. `load` is called once everything is checked and
    reported. With a credentialed item among the
    items only the owner can read the workdir: mode 0700, its files 0600.
    """
    with _file_modes(eval_set):
        return _run_named(
            settings,
            work,
            eval_set=eval_set,
            spec=spec,
            load=load,
            shard=shard,
            dry_run=dry_run,
            progress=progress,
            stopped=stopped,
        )


def _file_modes(eval_set: EvalSet) -> contextlib.AbstractContextManager[None]:
    return (
        private_umask() if any(map(is_credentialed, eval_set.items)) else contextlib.nullcontext()
    )


def _run_named(
    settings: Settings,
    work: Workdir,
    *,
    eval_set: EvalSet,
    spec: loading.ModelSpec,
    load: Callable[[], loading.LoadedModel],
    shard: Shard,
    dry_run: bool,
    progress: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Summary | None:
    check_images(eval_set)
    check_prompts(eval_set)
    check_later_stages(settings, eval_set, spec)
    intervals.Resampling(settings.seed, settings.resamples)  # raises for too few resamples
    plan_inputs = (settings, eval_set, spec, work.folder, shard)
    limited = settings.service.max_usd is not None
    if not dry_run and not limited:
        cost_estimate.check_endpoint(*plan_inputs)
    facts = run_facts.check_workdir(work.folder, settings, spec, eval_set, write=not dry_run)
    estimate = cost_estimate.estimate_cost(*plan_inputs)
    if not dry_run and limited:  # no connection is opened before the price is known to be allowed
        cost_estimate.check_endpoint(*plan_inputs)
    cost_estimate.report_estimate(estimate, progress)
    if dry_run:
        return None
    with report_waiting("loading the model", progress):
        loaded = load()
    run = EvalRun(
        hosts=shard.count > 1 and jax.process_count() == shard.count,
        settings=settings,
        work=work,
        eval_set=eval_set,
        loaded=loaded,
        shard=shard,
        progress=progress,
        stopped=stopped,
        facts=facts,
    )
    try:
        return _stages(run)
    finally:
        run.loaded.close()


def _stages(run: EvalRun) -> Summary | None:
    records = run_inference(run)
    probed = run_probes(run)
    if run.hosts:
        run.work.flush()
        barrier("all shards are complete", SHARE_TIMEOUT)
        with first_host_first("the report is written"):
            if run.shard.index:
                return None
            run.work.refresh()
            return _stages(dataclasses.replace(run, shard=WHOLE, hosts=False))
    if run.shard.count > 1:
        run.progress(
            f"shard {run.shard} is complete; rerun without --shard to score all shards together"
        )
        return None
    option_lines, confidence_lines = score_options(run), ask_confidence(run, records)
    judgment = run_judge(run, records)
    image_sets = run_image_scoring(run, records, probed)
    compared = run_contamination_check(run)
    with report_waiting("computing scores and their intervals", run.progress):
        summary = build_summary(
            run, records, probed, option_lines, confidence_lines, judgment, image_sets, compared
        )
    with report_waiting("writing the report", run.progress):
        write_report(run, summary, records)
    return summary


def check_prompts(eval_set: EvalSet) -> None:
    """Raise EvalError where the prompt of an item is the path of an image, not a question."""
    for number, item in enumerate(eval_set.items, start=1):
        if requests.names_image(item.prompt, Path(eval_set.folder)):
            raise EvalError(
                f"item {item_name(item, number)}: field 'prompt' is the path of an "
                "image; write the path in 'image_path' and the question in 'prompt'"
            )


def check_later_stages(settings: Settings, eval_set: EvalSet, spec: loading.ModelSpec) -> None:
    """Raise before the answers are computed where a later stage could not run."""
    if settings.judge.endpoint:
        judging.check_hosts(judging.make_judge(settings.judge), eval_set.items)
    if not loading.is_recorded(spec):
        makers = probes.probe_items(eval_set.items, settings.probes, settings.probe_families)
        for items_of in makers.values():
            items_of(settings.seed, None)
    for name in settings.scorers:
        scorer.parse_scorer(name)
    if settings.train_records:
        if not settings.train_model and spec.kind != "native":
            raise EvalError(
                "config.train_model is empty; set it to the model folder that wrote "
                "config.train_records"
            )
        open_records(settings.train_records)


def run_inference(run: EvalRun) -> list[EvalRecord]:
    """Return the records of every item that the model can answer, each run once."""
    with report_waiting("encoding the training images, for the modalities", run.progress):
        classify = run.loaded.modality_classifier()
    items = run.supported_items(run.eval_set.items)
    return run.run_items(items, "records", classify_modality=classify)


def run_probes(run: EvalRun) -> dict[str, list[EvalRecord]]:
    """Return probe -> records of the same items in modified form.

    Answers that were recorded elsewhere have no probes.
    """
    probed, blank = {}, run.workdir / "probe_blank_image"
    if loading.is_recorded(run.loaded.spec):
        return probed
    settings = run.settings
    makers = probes.probe_items(
        run.supported_items(run.eval_set.items), settings.probes, settings.probe_families
    )
    for name, items_of in makers.items():
        items = items_of(run.settings.seed, blank)
        folder = blank if name == "blank" else None
        probed[name] = run.run_items(items, f"probe_{name}", folder=folder)
    return probed


def score_options(run: EvalRun) -> list[dict[str, Any]] | None:
    """Return likelihoods of the options of closed and multiple choice questions, or None."""
    if not run.settings.options:
        return None
    return option_likelihoods.score(
        run.loaded.model,
        run.eval_set.items,
        mode=run.settings.mode,
        prompt=run.settings.prompt,
        images_folder=run.eval_set.folder,
        out=run.workdir / option_likelihoods.OPTIONS,
        progress=run.progress,
        window=run.settings.window,
        perturbed=run.perturbed,
    )


def ask_confidence(run: EvalRun, records: list[EvalRecord]) -> list[dict[str, Any]] | None:
    """Return the replies on the confidence in closed and multiple choice answers, or None."""
    settings, model = run.settings, run.loaded.model
    if not settings.verbalized_confidence:
        return None
    if reason := verbalized_confidence.unsupported_reason(run.loaded.spec.kind, model):
        run.progress(f"confidence: {reason}")
        return []
    return verbalized_confidence.ask(
        model,
        records,
        mode=settings.mode,
        prompt=settings.prompt,
        images_folder=run.eval_set.folder,
        out=run.workdir / verbalized_confidence.CONFIDENCE,
        progress=run.progress,
        window=settings.window,
        perturbed=run.perturbed,
    )


def run_judge(run: EvalRun, records: list[EvalRecord]) -> dict[str, Any] | None:
    """Write judgments.jsonl and return the judge's summary; None without a judge."""
    settings = run.settings.judge
    if not settings.endpoint:
        return None
    return judging.judge_records(
        judging.make_judge(settings),
        records,
        run.workdir,
        released=settings.paper,
        stopped=run.stopped,
        progress=run.progress,
    )


def run_image_scoring(run: EvalRun, records: list[EvalRecord], probed) -> list[dict[str, Any]]:
    """Write image_scores.jsonl, also for probe captions; return the scores of complete image sets.

    Without scorers only images that have a reference are compared with it.
    """
    reference_scoring.score_references(
        records, run.workdir, images_folder=run.eval_set.folder, progress=run.progress
    )
    names = run.settings.scorers
    scorers = [scorer.open_scorer(name, batch=run.settings.rows) for name in names]
    if not scorers:
        return []
    score = functools.partial(
        image_scoring.score_images,
        scorers=scorers,
        workdir=run.workdir,
        images_folder=run.eval_set.folder,
        resampling=run.resampling,
        progress=run.progress,
    )
    image_sets = score(records)
    for name, captions in probes.captions_to_score(records, probed).items():
        score(captions, out=per_record.probe_scores_file(name))
    return image_sets


def run_contamination_check(run: EvalRun) -> dict[str, Any] | None:
    """Compare the items with training records; None where none are configured."""
    settings, spec = run.settings, run.loaded.spec
    if not settings.train_records:
        return None
    return contamination.find(
        run.eval_set.items,
        settings.train_records,
        run.workdir,
        model=hub.locate(settings.train_model or spec.where),
        images_folder=run.eval_set.folder,
        progress=run.progress,
    )


def build_summary(
    run: EvalRun, records, probed, option_lines, confidence_lines, judge, image_sets, compared
) -> Summary:
    """Write summary.json: scores, baselines and provenance."""
    spec, mode, resampling = run.loaded.spec, run.settings.mode, run.resampling
    inputs = per_record.read(run.workdir, judge=judge["judge"] if judge else None)
    cards = catalog.TASKS | {card.task: card for card in run.eval_set.cards}
    scores = aggregate.summary(records, inputs, mode=mode, resampling=resampling, cards=cards)
    baseline_scores = baselines.baseline_scores(
        run.settings.baselines, run.eval_set.items, records, mode=mode, resampling=resampling
    )
    summary = Summary(
        model=spec.where,
        adapter=spec.adapter,
        kind=spec.kind,
        view=spec.view,
        trained_view=spec.trained_view,
        fingerprints=run.facts | {"settings": fingerprint(run.settings)},
        environment=environment(devices=jax.devices() if spec.kind in loading.LOCAL else ()),
        settings=to_dict(run.settings),
        scores=tuple(baselines.with_baselines(scores, baseline_scores)),
        floors=tuple(baseline_scores),
        baselines=tuple(_comparisons(run, records, probed)),
        cards=tuple(card.fields() for card in run.eval_set.cards),
        not_run=tuple(not_run(run)),
        recorded=run.loaded.recorded(),
        judge=judge,
        not_judged=tuple(aggregate.not_judged(records, inputs)),
        not_scored=tuple(aggregate.not_scored(records, inputs)),
        scorers=inputs.scorers,
        image_sets=tuple(image_sets),
        probes=probe_summary(run, records, probed, inputs),
        calibration=calibration_summary(run, option_lines),
        verbalized=verbalized_summary(run, records, inputs, confidence_lines, option_lines),
        contamination=contamination_summary(run, records, inputs, compared),
        errors=sum(bool(record.error) for record in records),
        modality_ceiling=run.loaded.real_image_accuracy(resampling),
        history=inference.totals(run.workdir),
        spent=run.loaded.usage(),
    )
    write_summary(run.workdir, summary)
    return summary


def probe_summary(run: EvalRun, records, probed, inputs) -> dict[str, Any]:
    """Return {reason, rows}: the effect of changed images and options."""
    if run.settings.probes and loading.is_recorded(run.loaded.spec):
        return dict(reason=loading.RECORDED_REASON, rows=[])
    probe_inputs = {
        name: per_record.load_image_scores(run.workdir / per_record.probe_scores_file(name))
        for name in probed
    }
    rows = probes.summary(records, probed, inputs, probe_inputs, resampling=run.resampling)
    return dict(reason="", rows=rows)


def calibration_summary(run: EvalRun, option_lines) -> dict[str, Any] | None:
    """Return the calibration of option likelihoods; None if they were not requested."""
    if option_lines is None:
        return None
    items = [i for i in run.eval_set.items if i.family in ("vqa_closed", "vqa_mcq")]
    reason = option_likelihoods.unsupported_reason(run.loaded.model)
    return option_likelihoods.summary(
        option_lines,
        n_items=len(items),
        reason=reason,
        progress=run.progress,
        resampling=run.resampling,
    )


def verbalized_summary(
    run: EvalRun, records, inputs, confidence_lines, option_lines
) -> dict[str, Any] | None:
    """Return the calibration of stated confidences; None if they were not requested."""
    if confidence_lines is None:
        return None
    closed = [r for r in records if r.family in per_record.CLOSED_FAMILIES]
    return verbalized_confidence.summary(
        confidence_lines,
        {record.id: aggregate.record_values(record, inputs)["accuracy"] for record in closed},
        option_lines or (),
        n_items=len(closed),
        reason=verbalized_confidence.unsupported_reason(run.loaded.spec.kind, run.loaded.model),
        progress=run.progress,
        resampling=run.resampling,
    )


def contamination_summary(run: EvalRun, records, inputs, compared) -> dict[str, Any] | None:
    """Return every headline on the clean and on the contaminated part."""
    if compared is None:
        return None
    flags = contamination.read(run.workdir)
    rows = contamination.summary(
        records, flags, inputs, mode=run.settings.mode, resampling=run.resampling
    )
    return dict(compared=compared, rows=rows)


def not_run(run: EvalRun) -> list[dict[str, str]]:
    """Return the tasks that the model cannot run, and why."""
    supported = {item.task for item in run.supported_items(run.eval_set.items)}
    return [
        dict(task=task, why=endpoint.NO_IMAGES)
        for task in dict.fromkeys(item.task for item in run.eval_set.items)
        if task not in supported
    ]


def write_report(run: EvalRun, summary: Summary, records: list[EvalRecord]) -> None:
    """Write report.html."""
    page.write(run.workdir / "report.html", summary, records, images_folder=run.eval_set.folder)


def _comparisons(run: EvalRun, records, probed) -> list[dict[str, Any]]:
    text_records = [r for r in records if r.family in ("vqa_closed", "vqa_mcq", "vqa_open")]
    comparisons = []
    if run.eval_set.train and text_records and "blind" in run.settings.baselines:
        answers = baselines.blind(run.eval_set.train, run.eval_set.items)
        answered = aggregate.with_answers(text_records, answers)
        scores = aggregate.scores(answered, text_records, resampling=run.resampling)
        comparisons.append(dict(name="blind", says=baselines.BLIND, scores=scores))
    if probed.get("swapped"):
        scores = aggregate.scores(probed["swapped"], text_records, resampling=run.resampling)
        comparisons.append(dict(name="swapped", says=SWAPPED, scores=scores))
    return comparisons
