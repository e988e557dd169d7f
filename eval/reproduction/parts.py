"""Divides a reproduction into parts, and plans and runs each as an evaluation of its own.

    part          families                         requires
    choices       closed and multiple choice       nothing else
    open          open questions                   a judge
    images        captions, generated images       BiomedCLIP
    chat          visual chat                      a judge
    interleaved   text with images                 a judge or BiomedCLIP
    recorded      all of them, of predictions:     nothing else

WORKDIR/paper/PART and, with --strict, WORKDIR/strict/PART are workdirs of eval.run. So each part
resumes by itself, and one whose judge or scorer is added later does not change the others.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.config import build
from medmax_jax.configs import eval_paper, eval_suite
from medmax_jax.eval.config import EvalError, Settings, pinned
from medmax_jax.eval.models import loading
from medmax_jax.eval.pipeline import cost_estimate, stages
from medmax_jax.eval.reproduction import published, scores
from medmax_jax.eval.reproduction.published import Cell
from medmax_jax.eval.tasks.selection import WHOLE, load_eval_set

PAPER, STRICT = "paper", "strict"
NOT_SELECTED = "not selected by --tables"
ITEMS = "items.jsonl"  # of a folder that data.prepare eval_items wrote
PUBLISHED_JUDGE = "gpt-4o-mini"
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Names the evaluated model as eval.run's flags do."""

    model: str
    adapter: str = ""
    merge: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Describes one evaluation of a reproduction; `reason`: why it is not run, or ""."""

    name: str
    settings: Settings
    reason: str

    @property
    def folder(self) -> str:
        """Return its workdir, below that of the reproduction."""
        return f"{self.settings.mode}/{self.name}"


_FAMILIES = {
    "choices": ("vqa_closed", "vqa_mcq"),
    "open": ("vqa_open",),
    "images": ("captioning", "image_generation"),
    "chat": ("visual_chat",),
    "interleaved": ("multimodal",),
}
RECORDED = "recorded"
NAMES = (*_FAMILIES, RECORDED)


def with_rows(settings: Settings, rows: str, images: str) -> Settings:
    """Return the settings with the items of --rows and the images of --images.

    rows: JSONL files, or folders with items.jsonl, separated by commas; "": those of the config.
    """
    if rows:
        names = [name for name in rows.split(",") if name]
        files = [f"{name}/{ITEMS}" if Path(name).is_dir() else name for name in names]
        settings = dataclasses.replace(settings, questions=tuple(files), images=images)
    elif images:
        settings = dataclasses.replace(settings, images=images)
    if settings.mode != PAPER:
        raise EvalError(
            f"config.mode is {settings.mode!r}; required: paper. --strict adds the strict mode"
        )
    return pinned(settings)


def divide(settings: Settings, model: Model, tables: str, *, strict: bool) -> list[Part]:
    """Return the parts, with those that are not run; tables: names separated by commas, "": all."""
    selected = [name for name in tables.split(",") if name] or list(published.TABLES)
    if unknown := [name for name in selected if name not in published.TABLES]:
        raise EvalError(
            f"--tables has {unknown[0]!r}; use names from {', '.join(published.TABLES)}"
        )
    found = {item.family for item in load_eval_set(settings).items}
    families = {family for name in selected for family in published.families(name)}
    by_part = dict(_FAMILIES)
    if (model.model or settings.model).startswith("predictions:"):  # one file answers all items
        by_part = {RECORDED: tuple(sorted(families))}
    return [
        Part(
            name=name,
            settings=_of_families(mode, own),
            reason=_reason(mode, name, set(own), families, found),
        )
        for mode in [settings, *([strict_settings(settings)] if strict else [])]
        for name, own in by_part.items()
    ]


def strict_settings(settings: Settings) -> Settings:
    """Return the settings with the strict mode's generation and votes; the rest is unchanged."""
    suite = build(Settings, eval_suite.get_config())
    votes = {name: getattr(suite.judge, name) for name in ("repeats", "attempts", "paper")}
    judge = dataclasses.replace(settings.judge, **votes)
    return dataclasses.replace(settings, mode=STRICT, sample=suite.sample, judge=judge)


def plan(
    parts: Sequence[Part], model: Model, workdir: str, *, progress: Progress
) -> list[dict[str, Any]]:
    """Report and return the estimate of each part; raise where all together cost too much."""
    rows = []
    for part in parts:
        if part.reason:
            progress(f"{part.folder}: not run: {part.reason}")
            continue
        settings = part.settings
        spec = loading.parse_model_spec(
            model.model or settings.model,
            model.adapter or ("" if model.model else settings.adapter),
            model.merge,
            settings,
            progress=progress,
        )
        items = load_eval_set(settings)
        with stages.open_workdir(f"{workdir}/{part.folder}", items, dry_run=True) as work:
            estimate = cost_estimate.estimate_cost(settings, items, spec, work.folder, WHOLE)
        cost_estimate.report_estimate(
            estimate, lambda line, part=part: progress(f"{part.folder}: {line}")
        )
        rows.append({"part": part.folder} | estimate)
    _check_total(rows, parts, progress)
    return rows


def run(
    part: Part,
    model: Model,
    workdir: str,
    *,
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    """Run one part to its end, or resume it; a part with a reason is left alone."""
    if part.reason:
        return
    stages.run(
        part.settings,
        f"{workdir}/{part.folder}",
        model=model.model,
        adapter=model.adapter,
        merge=model.merge,
        progress=lambda line: progress(f"{part.folder}: {line}"),
        stopped=stopped,
    )


def differences(cell: Cell, settings: Settings, kind: str, model: str, n: int) -> list[str]:
    """Return in what the settings of a cell's answers differ from the published evaluation.

    kind: of the evaluated model, as in KIND:WHERE. model: whose numbers are reproduced. n: items.
    """
    target, found = build(Settings, eval_paper.get_config()), []
    if kind in loading.LOCAL:
        found += _changed("sample", settings.sample, target.sample)
    else:
        found.append(f"answers of {kind}: the published decoding is not used")
    prompt = published.PROMPTS.get(model)
    if prompt != settings.prompt:
        found.append(f"prompts {settings.prompt}; published {prompt or 'are unknown'}")
    if cell.metric.startswith("judge_") or cell.task == published.AVERAGE:
        judge = settings.judge
        found += _changed("judge", judge, target.judge, ("repeats", "attempts", "paper"))
        name = judge.endpoint.rpartition("@")[0]
        if name and not name.rpartition("/")[2].startswith(PUBLISHED_JUDGE):
            found.append(f"judge {name}; published {PUBLISHED_JUDGE}")
    if n and cell.rows is not None and n != cell.rows:
        found.append(f"{n:,} items; the benchmark has {cell.rows:,}")
    return found


def _changed(section: str, own: Any, target: Any, names: Sequence[str] | None = None) -> list[str]:
    names = names or [field.name for field in dataclasses.fields(target)]
    pairs = [(name, getattr(own, name), getattr(target, name)) for name in names]
    return [f"{section}.{name} {a}; published {b}" for name, a, b in pairs if a != b]


def _of_families(settings: Settings, families: Sequence[str]) -> Settings:
    counts = {
        field.name: getattr(settings.counts, field.name) if field.name in families else 0
        for field in dataclasses.fields(settings.counts)
    }
    return dataclasses.replace(settings, counts=dataclasses.replace(settings.counts, **counts))


def _reason(
    settings: Settings, name: str, own: set[str], selected: set[str], found: set[str]
) -> str:
    judge = bool(settings.judge.endpoint)
    clip = any(scorer.startswith("biomedclip:") for scorer in settings.scorers)
    if not own & selected:
        return NOT_SELECTED
    if not own & found:
        return scores.NO_ROWS
    if name in ("open", "chat") and not judge:
        return scores.NO_JUDGE
    if name == "images" and not clip:
        return scores.NO_SCORER
    either = f"{scores.NO_JUDGE}; or {scores.NO_SCORER}"
    return either if name == "interleaved" and not judge | clip else ""


def reason_of(cell: Cell, parts: Sequence[Part]) -> str:
    """Return why the part of a cell is not run, or ""."""
    reasons = {part.name: part.reason for part in parts if part.settings.mode == PAPER}
    if RECORDED in reasons:
        return reasons[RECORDED]
    return next(reasons[name] for name, families in _FAMILIES.items() if cell.family in families)


def _check_total(rows: Sequence[Mapping[str, Any]], parts: Sequence[Part], progress: Progress):
    settings = parts[0].settings
    limits = {
        "usd": ("config.service.max_usd", settings.service.max_usd),
        "judge_usd": ("config.judge.service.max_usd", settings.judge.service.max_usd),
    }
    calls = sum(row["requests"] for row in rows), sum(row["judge_calls"] for row in rows)
    prices = {name: [row[name] for row in rows if row[name] is not None] for name in limits}
    usd = sum(map(sum, prices.values()))
    priced = f", at most about {usd:.2f} USD" if any(prices.values()) else ""
    progress(f"in total: {calls[0]} requests and {calls[1]} calls to the judge{priced}")
    for name, (field, limit) in limits.items():
        if limit is not None and sum(prices[name]) > limit:
            raise cost_estimate.PlanError(
                f"{field} is {limit:g} but the parts cost at most about {sum(prices[name]):.2f} "
                "USD together; increase it, or select fewer --tables or config.counts"
            )
