"""Builds and checks reproduction.json: the numbers of a reproduction with what they depend on.

    {schema, paper, published_model, suite, model, data, scorers, settings, parts, cells,
     unreproduced, environment}

It is for citing: `suite` is the version and commit, `scorers` has digests of the scoring code, the
judge's prompts and the encoder's weights, `parts` a digest of the answers of each. All but
`environment` is a function of the workdir, so an interrupted run that was resumed gives the same
file. `check` computes the numbers again from the workdir's records.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax import __version__
from medmax_jax.config import to_dict
from medmax_jax.environment import environment, git_commit
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.reporting import tables
from medmax_jax.eval.reproduction import parts as reproduction_parts
from medmax_jax.eval.reproduction import published, scores
from medmax_jax.eval.reproduction.parts import PAPER, STRICT, Part
from medmax_jax.eval.reproduction.published import PAPERS
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.storage import hub
from medmax_jax.storage.folder import file_sha256

SCHEMA = "medmax_jax.reproduction/1"
FILE, PAGE = "reproduction.json", "reproduction.html"
_EVAL = Path(__file__).parents[1]
CODE = ("metrics", "stats", "encoders", "reproduction")  # folders of eval/ that numbers depend on
_NUMBERS = ("status", "released", "strict")  # of a cell, compared by `check`
_CELL = ("table", "task", "metric", "published")


def build(
    paper: str, model: str, settings: Settings, parts: Sequence[Part], workdir: Path
) -> dict[str, Any]:
    """Return the content of reproduction.json. model: whose published numbers are reproduced."""
    found = _read(workdir, [part.folder for part in parts if not part.reason])
    answers = {mode: _of_mode(found, mode) for mode in (PAPER, STRICT)}
    everything = [*answers[PAPER], *answers[STRICT]]
    kind = everything[0].summary.kind if everything else ""
    return {
        "schema": SCHEMA,
        "paper": PAPERS[paper].title,
        "published_model": model,
        "suite": {"medmax_jax": __version__, "commit": git_commit()},
        "model": _model(everything),
        "data": [_file(name) for name in settings.questions],
        "scorers": {
            "code": code_digests(),
            "prompts": _digest(_EVAL.glob("prompts/*.txt")),
            "judge": _judge(settings, everything),
            "encoders": _merged(part.summary.scorers for part in everything),
        },
        "settings": _settings(settings),
        "parts": {part.folder: _part(part, found) for part in parts},
        "cells": _cells(model, settings, parts, kind, answers),
        "unreproduced": [vars(one) for one in PAPERS[paper].unreproduced],
        "environment": environment(),
    }


def check(path: Path, workdir: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a citation, and where its model and numbers do not follow from the workdir's records.

    Raises EvalError for a file that is no citation.
    """
    try:
        cited = read_json_object(path)
    except TextFileError as error:
        raise EvalError(f"{path}: not a citation ({error}); name a {FILE}") from error
    _check_form(cited, path)
    found = _read(workdir, [name for name, part in cited["parts"].items() if part.get("answers")])
    problems = []
    for name, part in cited["parts"].items():
        answers = found.get(name)
        digest = answers.digest if answers else None
        if part.get("answers") != digest:
            problems.append(f"{name}: the answers differ: {part.get('answers')} cited, {digest}")
    answers = {mode: _of_mode(found, mode) for mode in (PAPER, STRICT)}
    model = _model([*answers[PAPER], *answers[STRICT]])
    if model and cited.get("model") != model:
        problems.append(f"model is {cited.get('model')} in the file, {model} by the records")
    cells = published.cells(cited["published_model"])
    again = {
        (row["table"], row["task"], row["metric"]): row
        for row in _scored(cells, answers[PAPER], answers[STRICT])
    }
    for cell in cited["cells"]:
        row = again.pop((cell["table"], cell["task"], cell["metric"]), {})
        problems += [
            f"{cell['task']} {cell['metric']}: {name} is {cell.get(name)} in the file, "
            f"{row.get(name)} by the records"
            for name in ("published", *_NUMBERS, "strict_generation")
            if cell.get(name) != row.get(name)
        ]
    problems += [f"{task} {metric}: missing from the file" for _, task, metric in again]
    return cited, problems


def code_changes(cited: Mapping[str, Any]) -> list[str]:
    """Return the folders whose code is not that of the citation."""
    code = cited["scorers"].get("code", {})
    return [name for name, digest in code_digests().items() if code.get(name) != digest]


def code_digests() -> dict[str, str]:
    """Return the SHA-256 of the source files of each folder of CODE."""
    return {name: _digest((_EVAL / name).rglob("*.py")) for name in CODE}


def _check_form(cited: Mapping[str, Any], path: Path) -> None:
    if cited.get("schema") != SCHEMA:
        raise EvalError(
            f"{path}: schema is {str(cited.get('schema'))[:60]!r}; required: {SCHEMA}, of a file "
            "that eval.reproduce wrote"
        )
    forms = {"parts": dict, "cells": list, "scorers": dict, "published_model": str}
    for name, form in forms.items():
        if not isinstance(cited.get(name), form):
            raise EvalError(f"{path}: {name} is not a {form.__name__}; restore the file")
    if not all(isinstance(cell, dict) and set(_CELL) <= set(cell) for cell in cited["cells"]):
        raise EvalError(f"{path}: a cell lacks one of {', '.join(_CELL)}; restore the file")
    if not all(isinstance(part, dict) for part in cited["parts"].values()):
        raise EvalError(f"{path}: a part is not an object; restore the file")
    if odd := [name for name in cited["parts"] if name not in _part_names()]:
        raise EvalError(f"{path}: part {odd[0][:60]!r} is unknown; restore the file")


def _part_names() -> set[str]:
    return {f"{m}/{name}" for m in (PAPER, STRICT) for name in reproduction_parts.NAMES}


def _read(workdir: Path, folders: Iterable[str]) -> dict[str, scores.Answers]:
    found = {name: scores.read_answers(workdir / name) for name in folders}
    return {name: answers for name, answers in found.items() if answers}


def _of_mode(found: Mapping[str, scores.Answers], mode: str) -> list[scores.Answers]:
    return [answers for name, answers in found.items() if name.startswith(f"{mode}/")]


def _scored(cells, paper: Sequence[scores.Answers], strict: Sequence[scores.Answers]) -> list[dict]:
    """Return the scores of the cells; strict_generation: of the answers in strict mode."""
    rows = scores.score_cells(cells, paper)
    others = scores.score_cells(cells, strict)
    return [
        row | {"strict_generation": other["strict"]}
        for row, other in zip(rows, others, strict=True)
    ]


def _cells(
    model: str,
    settings: Settings,
    parts: Sequence[Part],
    kind: str,
    answers: Mapping[str, Sequence[scores.Answers]],
) -> list[dict[str, Any]]:
    cells, rows = published.cells(model), []
    for cell, row in zip(cells, _scored(cells, answers[PAPER], answers[STRICT]), strict=True):
        score = row["released"] or row["strict"] or {}
        differs = []
        if score:
            differs = reproduction_parts.differences(cell, settings, kind, model, score["n"])
        elif cell.task != published.AVERAGE:
            row["reason"] = reproduction_parts.reason_of(cell, parts) or row["reason"]
        others = [{"model": o.model, "value": o.value, "source": o.read} for o in cell.others]
        facts = {"title": cell.title, "rows": cell.rows, "settings_differ": differs}
        rows.append(facts | row | {"others": others})
    return rows


def _model(answers: Sequence[scores.Answers]) -> dict[str, Any]:
    if not answers:
        return {}
    first = answers[0]
    fields = ("kind", "model", "adapter")
    values = (getattr(first.summary, name) for name in fields)
    names = dict(zip(fields, map(tables.without_folder, values), strict=True))
    return names | {"digest": first.run["model"], "adapter_digest": first.run["adapter"]}


def _file(name: str) -> dict[str, str]:
    path = Path(hub.locate(name))
    return {"file": name if name.startswith(hub.SCHEME) else path.name, "sha256": file_sha256(path)}


def _judge(settings: Settings, answers: Sequence[scores.Answers]) -> dict[str, Any] | None:
    judges = [part.summary.judge for part in answers if part.summary.judge]
    if not judges:
        return None
    fingerprints = list(dict.fromkeys(judge["judge"] for judge in judges))
    parameters = settings.judge.service.parameters
    return {"model": judges[0]["model"], "parameters": parameters, "fingerprints": fingerprints}


def _settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that numbers depend on; no path and no address of this machine."""
    names = ("mode", "prompt", "seed", "resamples")
    facts = {name: getattr(settings, name) for name in names}
    judge = {name: getattr(settings.judge, name) for name in ("repeats", "attempts", "paper")}
    sections = {"counts": to_dict(settings.counts), "sample": to_dict(settings.sample)}
    return facts | sections | {"judge": judge}


def _part(part: Part, found: Mapping[str, scores.Answers]) -> dict[str, Any]:
    answers = found.get(part.folder)
    if answers is None:
        return {"reason": part.reason, "answers": None}
    return {
        "reason": "",
        "answers": answers.digest,
        "items": len(answers.records),
        "items_digest": answers.run["items"],
        "errors": answers.summary.errors,
    }


def _digest(files: Iterable[Path]) -> str:
    lines = [[path.relative_to(_EVAL).as_posix(), file_sha256(path)] for path in sorted(files)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _merged(mappings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: value for mapping in mappings for name, value in mapping.items()}
