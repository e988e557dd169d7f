"""Writes the scores of an evaluation in the two forms that model pages of the Hub read.

    OUT/.eval_results/medmax_jax_TASK.yaml    one score of a benchmark on the Hub
    OUT/README.md                             all headline scores, as `model-index` of a model card

Both are made and checked by huggingface_hub's own classes. The Hub shows a file of `.eval_results`
where the data set is a registered benchmark that has a task of this name. A task whose benchmark
is not on the Hub is in the model card alone. No text of an item is written.
"""

import datetime
import re
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from medmax_jax.eval.benchmarks.card import TaskSpec
from medmax_jax.eval.reporting import tables
from medmax_jax.eval.results import MetricRow, Summary
from medmax_jax.eval.tasks import catalog
from medmax_jax.io import journal

FOLDER, CARD = ".eval_results", "README.md"
_HUB = re.compile(r"huggingface\.co/datasets/([\w.-]+/[\w.-]+)")
_REVISION = re.compile(r"[0-9a-f]{40}")
SAMPLE = "the embedded sample of medmax_jax"
TASK_TYPES = {  # family -> the Hub's name of the task
    **dict.fromkeys(
        ("vqa_closed", "vqa_mcq", "vqa_rationale", "vqa_open", "vqa_numeric"),
        "visual-question-answering",
    ),
    "captioning": "image-to-text",
    "image_generation": "text-to-image",
    "image_editing": "image-to-image",
    **dict.fromkeys(("multimodal", "multimodal_generation"), "any-to-any"),
    "visual_chat": "image-text-to-text",
}


def write(out: Path, summary: Summary, *, source_url: str) -> tuple[list[Path], list[str]]:
    """Write the files and return them, and what is in the card alone and why.

    source_url: link to the complete results, "" for none; the Hub shows it next to each score.
    Raises FileExistsError where another card is there: a model card is also written by people.
    """
    own = tables.own_cards_of(summary)
    specs = {
        row: own.get(row.task) or catalog.task_spec(row.task, row.family)
        for row in tables.headlines(summary.scores)
    }
    card = _card(summary, [_model_index_result(*pair, source_url) for pair in specs.items()])
    path = out / CARD
    if path.exists() and path.read_bytes() != card.encode():
        raise FileExistsError(f"{path} is another model card; move it away, or use another --out")
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    files, left_out = [], []
    for row, spec in specs.items():
        dataset = _HUB.search(spec.source) if spec else None
        if dataset is None:
            where = spec.source if spec else SAMPLE
            left_out.append(f"{row.task}: in {CARD} alone; {where} is no data set of the Hub")
            continue
        entry = EvalResultEntry(
            dataset_id=dataset[1],
            task_id=row.task,
            value=_scaled(row, row.value),
            dataset_revision=spec.revision if _REVISION.fullmatch(spec.revision) else None,
            date=_date(summary),
            source_url=source_url or None,
            source_name="medmax_jax" if source_url else None,
            notes=_notes(row, summary),
        )
        files.append(out / FOLDER / f"medmax_jax_{row.task}.yaml")
        journal.write_text(
            files[-1], yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        )
    journal.write_text(path, card)
    return [*files, path], left_out


def _card(summary: Summary, results: list[EvalResult]) -> str:
    name = tables.without_folder(summary.model)
    data = ModelCardData(model_name=name, eval_results=results)
    text = f"Evaluated by medmax_jax {_version(summary)}; intervals are 95 % intervals over groups."
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _model_index_result(row: MetricRow, spec: TaskSpec | None, source_url: str) -> EvalResult:
    dataset = _HUB.search(spec.source) if spec else None
    return EvalResult(
        task_type=TASK_TYPES[row.family],
        task_name=spec.title if spec else row.task,
        dataset_type=dataset[1] if dataset else spec.source if spec else SAMPLE,
        dataset_name=spec.title if spec else SAMPLE,
        dataset_config=row.task,
        dataset_split=spec.split if spec else None,
        metric_type=row.metric,
        metric_value=_scaled(row, row.value),
        metric_name=f"{row.metric}, {_unit(row)}",
        metric_args={
            "ci_low": _scaled(row, row.ci_low),
            "ci_high": _scaled(row, row.ci_high),
            "items": row.n,
            "groups": row.groups,
        },
        source_name="medmax_jax" if source_url else None,
        source_url=source_url or None,
    )


def _notes(row: MetricRow, summary: Summary) -> str:
    text = f"{row.metric}, {_unit(row)}"
    if row.ci_low is not None:
        text += f", 95 % interval {_scaled(row, row.ci_low)} to {_scaled(row, row.ci_high)}"
    text += f", {row.n} items in {row.groups} groups"
    return f"{text}; medmax_jax {_version(summary)}, mode {summary.settings.get('mode')}"


def _version(summary: Summary) -> str:
    facts = summary.environment
    return " ".join(filter(None, (facts.get("medmax_jax", ""), facts.get("commit", ""))))


def _unit(row: MetricRow) -> str:
    return "dB" if row.metric == "psnr" else "%"


def _scaled(row: MetricRow, value: float | None) -> float | None:
    """Return a value in the unit of its metric."""
    return None if value is None else round(value if row.metric == "psnr" else 100 * value, 2)


def _date(summary: Summary) -> str | None:
    """Return the date of the evaluation in ISO 8601; None where it is not stated."""
    text = summary.environment.get("date", "")
    try:
        return f"{datetime.datetime.strptime(text, '%Y-%m-%d %H:%M UTC'):%Y-%m-%dT%H:%M:%SZ}"
    except ValueError:
        return None
