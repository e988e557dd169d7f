"""Writes an evaluation as lmms-eval writes its own: one JSON of results, one JSONL per task.

    OUT/MODEL/20261129_094300_results.json            scores by task and metric
    OUT/MODEL/20261129_094300_samples_TASK.jsonl      one line per item: target, answer, scores

The fields are those of lmms-eval's evaluation tracker at 75571cf, so its tables print them and its
`--baseline` reads the samples. The standard error is the one over groups, under lmms-eval's name
for it (`stderr_clustered`). Samples of credentialed items are left out; their scores are counted.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.records import EvalRecord, is_credentialed
from medmax_jax.eval.reporting import comparison, tables
from medmax_jax.eval.results import Summary
from medmax_jax.eval.stats import intervals
from medmax_jax.eval.tasks import catalog
from medmax_jax.io import journal

FILTER = "none"  # lmms-eval's name of no filter; a key is METRIC,FILTER
MISSING = "N/A"  # of a standard error that does not exist


def write(
    out: Path,
    summary: Summary,
    records: Sequence[EvalRecord],
    inputs: per_record.ScoringInputs,
) -> tuple[list[Path], list[str]]:
    """Write the files and return them, and what was left out and why.

    Raises OSError where a file cannot be written.
    """
    name = tables.without_folder(summary.model)
    folder = out / re.sub(r"[\"<>:/|\\?*\[\]]+", "__", "/".join(name.split("/")[-2:]))
    folder.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(summary)
    by_task = aggregate.tasks_of(records)
    left_out, files, hashes = [], [], {}
    for task, task_records in by_task.items():
        lines = [_sample(number, r, inputs) for number, r in enumerate(task_records)]
        kept = [
            line
            for line, record in zip(lines, task_records, strict=True)
            if not is_credentialed(record)
        ]
        if len(kept) < len(lines):
            missing = len(lines) - len(kept)
            left_out.append(f"{task}: {missing} samples of credentialed items, which stay here")
        hashes[task] = _hash(
            "".join(f"sample_{number}{line['doc_hash']}" for number, line in enumerate(kept))
        )
        if kept:
            name_of_task = re.sub(r"\W", "_", task)
            files.append(folder / f"{stamp}_samples_{name_of_task}.jsonl")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            journal.write_text(files[-1], text)
    results = _results(summary, by_task, inputs)
    facts = {"task_hashes": hashes, "model_source": summary.kind, "model_name": name}
    facts |= {"model_name_sanitized": folder.name, "git_hash": _environment(summary, "commit")}
    files.append(folder / f"{stamp}_results.json")
    journal.write_json(files[-1], results | facts)
    return files, left_out


def _results(
    summary: Summary,
    by_task: Mapping[str, Sequence[EvalRecord]],
    inputs: per_record.ScoringInputs,
) -> dict[str, Any]:
    """Return the content of the results file, without the facts about the run."""
    results: dict[str, dict[str, Any]] = {task: {"alias": task} for task in by_task}
    higher: dict[str, dict[str, bool]] = {task: {} for task in by_task}
    for row in summary.scores:
        task, metric = row.task, re.sub(r"[\s,]+", "_", row.metric)
        error = _standard_error(by_task[task], row.metric, inputs)
        results[task][f"{metric},{FILTER}"] = row.value
        results[task][f"{metric}_stderr,{FILTER}"] = MISSING
        results[task][f"{metric}_stderr_clustered,{FILTER}"] = error
        higher[task][metric] = row.metric not in comparison.LOWER_IS_BETTER
    settings = summary.settings
    return {
        "results": results,
        "group_subtasks": {task: [] for task in by_task},
        "configs": {task: _config(task, records[0], settings) for task, records in by_task.items()},
        "versions": dict.fromkeys(by_task, _environment(summary, "medmax_jax")),
        "n-shot": dict.fromkeys(by_task, 0),
        "higher_is_better": higher,
        "n-samples": {
            task: {"original": len(records), "effective": len(records)}
            for task, records in by_task.items()
        },
        "config": {
            "model": summary.kind,
            "model_args": f"model={tables.without_folder(summary.model)}",
            "adapter": tables.without_folder(summary.adapter),
            "gen_kwargs": settings.get("sample"),
            "random_seed": settings.get("seed"),
        },
        "date": _environment(summary, "date"),
    }


def _sample(number: int, record: EvalRecord, inputs: per_record.ScoringInputs) -> dict[str, Any]:
    """Return the line of an item; `score`: its headline, which lmms-eval's --baseline reads."""
    values = aggregate.record_values(record, inputs)
    fields = ("id", "prompt", "answer", "image")
    doc = json.dumps([getattr(record, name) for name in fields], ensure_ascii=False)
    line = {
        "doc_id": number,
        "target": str(record.answer),
        "filtered_resps": record.text,
        "doc_hash": _hash(doc),
        "input": record.prompt,
        "id": record.id,
    }
    return line | values | ({"score": next(iter(values.values()))} if values else {})


def _standard_error(
    records: Sequence[EvalRecord], metric: str, inputs: per_record.ScoringInputs
) -> float | str:
    """Return the standard error over groups; MISSING of one group, or of a ratio of means."""
    values = [(r.group, aggregate.record_values(r, inputs)) for r in records]
    scored = [(group, scores[metric]) for group, scores in values if metric in scores]
    if not scored:
        return MISSING
    groups, numbers = zip(*scored, strict=True)
    error = intervals.standard_error(numbers, groups, span=per_record.span(metric))
    return MISSING if intervals.finite(error) is None else error


def _config(task: str, first: EvalRecord, settings: Mapping[str, Any]) -> dict[str, Any]:
    spec = catalog.task_spec(task, first.family)
    return {
        "task": task,
        "dataset_path": spec.source if spec else "",
        "test_split": spec.split if spec else "",
        "num_fewshot": 0,
        "metadata": {"mode": settings.get("mode"), "prompt": settings.get("prompt")},
    }


def _environment(summary: Summary, name: str) -> str:
    return str(summary.environment.get(name, ""))


def _stamp(summary: Summary) -> str:
    """Return the date of the evaluation as lmms-eval writes it in names: 20261129_094300."""
    date = _environment(summary, "date")
    try:
        moment = datetime.datetime.strptime(date, "%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "00000000_000000"  # of an evaluation that states no date
    return f"{moment:%Y%m%d_%H%M%S}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
