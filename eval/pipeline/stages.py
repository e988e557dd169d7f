"""Runs one evaluation in stages; each stage is a plain function of an `EvalRun` and shares files.

lock  -> plan -> answer -> options -> probe -> judge -> image scores -> summarize -> report
         records.jsonl  options.jsonl  probe_NAME.jsonl  judged.jsonl  pictures.jsonl,
                                                         probe_NAME_pictures.jsonl of captions
                                          summary.json  report.html  history.jsonl
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmax_jax import cli
from medmax_jax.config import fingerprint, to_dict
from medmax_jax.data.records.reader import open_records
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.encoders import scorer
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.models import baselines, endpoint, loading
from medmax_jax.eval.pipeline import (
    contamination,
    cost_estimate,
    image_scoring,
    inference,
    judging,
    option_likelihoods,
)
from medmax_jax.eval.reporting import page
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import items as task_items
from medmax_jax.eval.tasks import probes
from medmax_jax.eval.tasks.selection import WHOLE, EvalSet, Shard, check_images, load_eval_set
from medmax_jax.generation import requests
from medmax_jax.io import journal
from medmax_jax.io.atomic_folder import private_umask
from medmax_jax.io.text_files import TextFileError, read_json_object

SWAPPED = "the same model shown a picture of another group: what looking is worth"


@dataclasses.dataclass(kw_only=True)
class EvalRun:
    """Holds what the stages share. `opened`: the model with its generator, if it has one."""

    settings: Settings
    workdir: Path
    eval_set: EvalSet
    opened: loading.LoadedModel
    shard: Shard
    progress: Callable[[str], None]
    stopped: Callable[[], bool]
    facts: dict[str, str]

    @property
    def resampling(self) -> dict[str, int]:
        return dict(seed=self.settings.seed, resamples=self.settings.resamples)

    def supported_items(self, items) -> list:
        """Return the items that require an answer of a kind that the model can write."""
        modes = getattr(self.opened.model, "modes", None)
        return [i for i in items if modes is None or task_items.FAMILIES[i.family].mode in modes]

    def ask(self, items, name: str, *, folder: Path | None = None, **more) -> list[dict[str, Any]]:
        """Return the records of items, in WORKDIR/NAME.jsonl, run with the settings."""
        return inference.run_items(
            self.opened.model,
            items,
            mode=self.settings.mode,
            prompt=self.settings.prompt,
            images_folder=folder or self.eval_set.folder,
            out=self.workdir / f"{name}.jsonl",
            progress=self.progress,
            window=self.settings.window,
            shard=self.shard,
            facts=self.facts,
            **more,
        )


def run(
    settings: Settings,
    workdir: str | Path,
    *,
    model: str,
    adapter: str = "",
    merge: bool = False,
    shard: str = "",
    dry_run: bool = False,
    progress: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Run the complete evaluation and return the content of summary.json.

    Returns None after one shard or a dry run.

    model: KIND:WHERE, as eval/models/loading.py has it. shard: "i/n" of the items, from 0.
    """
    found, part = load_eval_set(settings), Shard.of(shard)
    if not dry_run:  # before a checkpoint is converted or its weights are read
        judging.check_judge(settings.judge, found.items, Path(workdir))
        with _modes(found):
            cli.open_workdir(workdir)  # before minutes of work that could not be stored
    named = loading.parse_model_spec(
        model or settings.model, adapter, merge, settings, progress=progress
    )
    workdir = Path(workdir)
    return run_named(
        settings,
        workdir,
        found=found,
        named=named,
        opened=lambda: loading.load_model(named, settings, found, workdir, part, stopped),
        shard=part,
        dry_run=dry_run,
        progress=progress,
        stopped=stopped,
    )


def run_named(
    settings: Settings,
    workdir: str | Path,
    *,
    found: EvalSet,
    named: loading.ModelSpec,
    opened: Callable[[], loading.LoadedModel],
    shard: Shard = WHOLE,
    dry_run: bool = False,
    progress: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Run an evaluation of given items and a given model; see `run`.

    `opened` is called once everything is checked and reported. With a credentialed item among the
    items only the owner can read the workdir: mode 0700, its files 0600.
    """
    with _modes(found):
        return _run_named(
            settings,
            Path(workdir),
            found=found,
            named=named,
            opened=opened,
            shard=shard,
            dry_run=dry_run,
            progress=progress,
            stopped=stopped,
        )


def _modes(found: EvalSet) -> contextlib.AbstractContextManager[None]:
    return (
        private_umask()
        if any(map(task_items.is_credentialed, found.items))
        else contextlib.nullcontext()
    )


def _run_named(
    settings: Settings,
    workdir: Path,
    *,
    found: EvalSet,
    named: loading.ModelSpec,
    opened: Callable[[], loading.LoadedModel],
    shard: Shard,
    dry_run: bool,
    progress: Callable[[str], None],
    stopped: Callable[[], bool],
) -> dict[str, Any] | None:
    check_images(found)
    check_prompts(found)
    check_later_stages(settings, found, named)
    intervals.check_resamples(settings.resamples)
    asked = (settings, found, named, workdir, shard)
    limited = settings.service.max_usd is not None
    if not dry_run and not limited:
        cost_estimate.check_endpoint(*asked)
    facts = check_workdir(workdir, settings, named, found, write=not dry_run)
    about = cost_estimate.estimate_cost(*asked)
    if not dry_run and limited:  # no connection is opened before the price is known to be allowed
        cost_estimate.check_endpoint(*asked)
    cost_estimate.report_estimate(about, progress)
    if dry_run:
        return None
    now = EvalRun(
        settings=settings,
        workdir=workdir,
        eval_set=found,
        opened=opened(),
        shard=shard,
        progress=progress,
        stopped=stopped,
        facts=facts,
    )
    try:
        return _stages(now)
    finally:
        now.opened.close()


def _stages(now: EvalRun) -> dict[str, Any] | None:
    records = run_inference(now)
    probed = run_probes(now)
    if now.shard.count > 1:
        now.progress(f"part {now.shard} is done; without --shard all parts are scored together")
        return None
    lines = score_options(now)
    judged = run_judge(now, records)
    sets = run_image_scoring(now, records, probed)
    compared = run_contamination_check(now)
    summary = build_summary(now, records, probed, lines, judged, sets, compared)
    write_report(now, summary, records)
    return summary


def check_workdir(
    workdir: Path, settings: Settings, named: loading.ModelSpec, found: EvalSet, *, write: bool
) -> dict[str, str]:
    """Record what this workdir evaluates, or raise if it belongs to another evaluation.

    Returns the fingerprints that every record has: of the model, the items, and the settings that
    answers depend on.
    """
    items = json.dumps([task_items.item_fields(item) for item in found.items], sort_keys=True)
    facts = {
        "sample": to_dict(settings.sample),
        "mode": settings.mode,
        "prompt": settings.prompt,
        "model": named.fingerprint,
        "adapter": named.adapter_digest,
        "items": hashlib.sha256(items.encode()).hexdigest(),
    }
    path = workdir / "run.json"
    if write:
        cli.open_workdir(workdir)
        if any(map(task_items.is_credentialed, found.items)):
            os.chmod(workdir, 0o700)  # it may have existed
    if path.exists():
        for name, value in _run_facts(path).items():
            if facts.get(name) != value:
                raise EvalError(
                    f"{workdir} holds an evaluation with another {name}; name a fresh --workdir"
                )
    elif (workdir / "records.jsonl").exists():
        raise EvalError(
            f"{workdir} has records.jsonl but no run.json, so whose answers they are is unknown; "
            "name a fresh --workdir"
        )
    elif write:
        journal.write_json(path, facts)
    asked = json.dumps([facts["sample"], settings.mode, settings.prompt]).encode()
    model = "+".join(part for part in (named.fingerprint, named.adapter_digest) if part)
    return {
        "model": model,
        "data": facts["items"][:16],
        "config": hashlib.sha256(asked).hexdigest()[:16],
    }


def _run_facts(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except TextFileError as error:
        raise EvalError(
            f"{error}; restore it, or name a fresh --workdir: whose answers these are is unknown"
        ) from error


def check_prompts(found: EvalSet) -> None:
    """Raise EvalError where the prompt of an item is the path of an image, not a question."""
    for number, item in enumerate(found.items, start=1):
        if requests.names_image(item.prompt, Path(found.folder)):
            raise EvalError(
                f"item {task_items.item_name(item, number)}: its prompt is the path of an image, "
                f"not "
                "its pixels; name the file in image_path and write the question in prompt"
            )


def check_later_stages(settings: Settings, found: EvalSet, named: loading.ModelSpec) -> None:
    """Raise before the answers are computed where a later stage could not run."""
    if settings.judge.endpoint:
        judging.check_hosts(judging.make_judge(settings.judge), found.items)
    if not loading.is_recorded(named):
        asked = probes.probe_items(found.items, settings.probes, settings.probe_families)
        for items_of in asked.values():
            items_of(settings.seed, None)
    for name in settings.scorers:
        scorer.parse_scorer(name)
    if settings.train_records:
        if not settings.train_model and named.kind != "native":
            raise EvalError(
                "config.train_model is empty; name the folder that wrote config.train_records"
            )
        open_records(settings.train_records)


def run_inference(now: EvalRun) -> list[dict[str, Any]]:
    """Return the records of every item that the model can answer, each run once."""
    return now.ask(now.supported_items(now.eval_set.items), "records", looks=now.opened.looks())


def run_probes(now: EvalRun) -> dict[str, list[dict[str, Any]]]:
    """Return probe -> records of the same items in modified form.

    Answers that were recorded elsewhere have no probes.
    """
    found, blank = {}, now.workdir / "probe_blank_image"
    if loading.is_recorded(now.opened.named):
        return found
    settings = now.settings
    made = probes.probe_items(
        now.supported_items(now.eval_set.items), settings.probes, settings.probe_families
    )
    for name, items_of in made.items():
        items = items_of(now.settings.seed, blank)
        folder = blank if name == "blank" else None
        found[name] = now.ask(items, f"probe_{name}", folder=folder)
    return found


def score_options(now: EvalRun) -> list[dict[str, Any]] | None:
    """Return likelihoods of the options of closed and multiple choice questions, or None."""
    if not now.settings.options:
        return None
    return option_likelihoods.score(
        now.opened.model,
        now.eval_set.items,
        mode=now.settings.mode,
        prompt=now.settings.prompt,
        images_folder=now.eval_set.folder,
        out=now.workdir / option_likelihoods.OPTIONS,
        progress=now.progress,
        window=now.settings.window,
    )


def run_judge(now: EvalRun, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Write judged.jsonl and return the judge's summary; None without a judge."""
    settings = now.settings.judge
    if not settings.endpoint:
        return None
    return judging.judge_records(
        judging.make_judge(settings),
        records,
        now.workdir,
        released=settings.paper,
        stopped=now.stopped,
        progress=now.progress,
    )


def run_image_scoring(now: EvalRun, records: list[dict[str, Any]], probed) -> list[dict[str, Any]]:
    """Write pictures.jsonl, also for probe captions; return the scores of complete image sets.

    Without scorers nothing is written.
    """
    names = now.settings.scorers
    scorers = [scorer.open_scorer(name, batch=now.settings.rows) for name in names]
    if not scorers:
        return []
    about = dict(images_folder=now.eval_set.folder, progress=now.progress, **now.resampling)
    sets = image_scoring.score_images(records, scorers, now.workdir, **about)
    for name, some in probes.captions_to_score(records, probed).items():
        image_scoring.score_images(
            some, scorers, now.workdir, out=per_record.probe_scores_file(name), **about
        )
    return sets


def run_contamination_check(now: EvalRun) -> dict[str, Any] | None:
    """Compare the items with training records; None where none are configured."""
    settings, named = now.settings, now.opened.named
    if not settings.train_records:
        return None
    return contamination.find(
        now.eval_set.items,
        settings.train_records,
        now.workdir,
        model=settings.train_model or named.where,
        images_folder=now.eval_set.folder,
        progress=now.progress,
    )


def build_summary(now: EvalRun, records, probed, lines, judged, sets, compared) -> dict[str, Any]:
    """Return the content of summary.json: scores, baselines and provenance."""
    named, numbers = now.opened.named, now.resampling
    known = per_record.read(now.workdir, judge=judged["judge"] if judged else None)
    told = dict(mode=now.settings.mode, **numbers)
    scores = aggregate.summary(records, known, **told)
    floors = baselines.baseline_scores(now.settings.baselines, now.eval_set.items, records, **told)
    baselines.attach_baselines(scores, floors)
    summary = {
        "model": named.where,
        "adapter": named.adapter,
        "kind": named.kind,
        "fingerprints": now.facts | {"settings": fingerprint(now.settings)},
        "settings": to_dict(now.settings),
        "scores": scores,
        "floors": floors,
        "baselines": _comparisons(now, records, probed),
        "not_run": not_run(now),
        "judge": judged,
        "not_judged": aggregate.not_judged(records, known),
        "not_scored": aggregate.not_scored(records, known),
        "scorers": known.scorers,
        "picture_sets": sets,
        "probes": probe_summary(now, records, probed, known),
        "calibration": calibration_summary(now, lines),
        "contamination": contamination_summary(now, records, known, compared),
        "errors": sum(bool(record.get("error")) for record in records),
        "modality_ceiling": now.opened.ceiling(numbers),
        "history": inference.totals(now.workdir),
        "spent": now.opened.spent(),
    }
    journal.write_json(now.workdir / "summary.json", summary)
    return summary


def probe_summary(now: EvalRun, records, probed, known) -> dict[str, Any]:
    """Return {reason, rows}: the effect of changed images and options."""
    if now.settings.probes and loading.is_recorded(now.opened.named):
        return dict(reason=loading.RECORDED_REASON, rows=[])
    looked = {
        name: per_record.load_image_scores(now.workdir / per_record.probe_scores_file(name))
        for name in probed
    }
    return dict(reason="", rows=probes.summary(records, probed, known, looked, **now.resampling))


def calibration_summary(now: EvalRun, lines) -> dict[str, Any] | None:
    """Return the calibration of option likelihoods; None if they were not requested."""
    if lines is None:
        return None
    items = [i for i in now.eval_set.items if i.family in ("vqa_closed", "vqa_mcq")]
    reason = option_likelihoods.unsupported_reason(now.opened.model)
    return option_likelihoods.summary(
        lines, n_items=len(items), reason=reason, progress=now.progress, **now.resampling
    )


def contamination_summary(now: EvalRun, records, known, compared) -> dict[str, Any] | None:
    """Return every headline on the clean and on the contaminated part."""
    if compared is None:
        return None
    flags = contamination.read(now.workdir)
    told = dict(mode=now.settings.mode, **now.resampling)
    rows = contamination.summary(records, flags, known, **told)
    return dict(compared=compared, rows=rows)


def not_run(now: EvalRun) -> list[dict[str, str]]:
    """Return the tasks that the model cannot run, and why."""
    able = {item.task for item in now.supported_items(now.eval_set.items)}
    return [
        dict(task=task, why=endpoint.NO_PICTURES)
        for task in dict.fromkeys(item.task for item in now.eval_set.items)
        if task not in able
    ]


def write_report(now: EvalRun, summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write report.html."""
    page.write(now.workdir / "report.html", summary, records, images_folder=now.eval_set.folder)


def _comparisons(now: EvalRun, records, probed) -> list[dict[str, Any]]:
    asked = [r for r in records if r["family"] in ("vqa_closed", "vqa_mcq", "vqa_open")]
    rivals = []
    if now.eval_set.train and asked and "blind" in now.settings.baselines:
        guesses = baselines.blind(now.eval_set.train, now.eval_set.items)
        guessed = aggregate.with_answers(asked, guesses)
        compared = aggregate.scores(guessed, asked, **now.resampling)
        rivals.append(dict(name="blind", says=baselines.BLIND, scores=compared))
    if probed.get("swapped"):
        compared = aggregate.scores(probed["swapped"], asked, **now.resampling)
        rivals.append(dict(name="swapped", says=SWAPPED, scores=compared))
    return rivals
