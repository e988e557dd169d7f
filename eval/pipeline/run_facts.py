"""Records what the answers of a workdir depend on, in run.json, and refuses another evaluation.

{"sample": .., "mode": .., "prompt": .., "shots": .., "perturbation": .., "view": .., "model": ..,
 "adapter": .., "items": SHA-256 of all items, "cards": that of a user's own cards}
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from medmax_jax.config import to_dict
from medmax_jax.eval.config import EvalError, Settings
from medmax_jax.eval.metrics import per_record
from medmax_jax.eval.models import loading
from medmax_jax.eval.records import Item, is_credentialed
from medmax_jax.eval.tasks import own_cards
from medmax_jax.eval.tasks.selection import EvalSet
from medmax_jax.io import journal
from medmax_jax.io.text_files import TextFileError, read_json_object

# The facts that run.json of earlier versions does not have.
SHOWN_BEFORE = {"shots": 0, "perturbation": "", "view": "released"}


def check_workdir(
    workdir: Path, settings: Settings, spec: loading.ModelSpec, eval_set: EvalSet, *, write: bool
) -> dict[str, str]:
    """Record what this workdir evaluates, or raise if it belongs to another evaluation.

    Returns the fingerprints that every record has: of the model, the items, and the settings that
    answers depend on.
    """
    per_record.check_names(workdir.glob("*.json*"))
    items = json.dumps([_digest_fields(item) for item in eval_set.items], sort_keys=True)
    facts = {
        "sample": to_dict(settings.sample),
        "mode": settings.mode,
        "prompt": settings.prompt,
        "shots": settings.shots,
        "perturbation": settings.perturbation,
        "view": spec.view,
        "model": spec.fingerprint,
        "adapter": spec.adapter_digest,
        "items": hashlib.sha256(items.encode()).hexdigest(),
    }
    if eval_set.cards:
        facts["cards"] = own_cards.digest(eval_set.cards)
    path = workdir / "run.json"
    if write and any(map(is_credentialed, eval_set.items)):
        os.chmod(workdir, 0o700)  # it may have existed
    if path.exists():
        for name, value in (SHOWN_BEFORE | _run_facts(path)).items():
            if facts.get(name) != value:
                raise EvalError(
                    f"{workdir} holds an evaluation with another {name}; use a new --workdir"
                )
    elif (workdir / "records.jsonl").exists():
        raise EvalError(
            f"{workdir} has records.jsonl but no run.json, so the model of its answers is unknown; "
            "use a new --workdir"
        )
    elif write:
        journal.write_json(path, facts)
    shown = {name: facts[name] for name in SHOWN_BEFORE if facts[name] != SHOWN_BEFORE[name]}
    answer_settings = json.dumps(
        [facts["sample"], settings.mode, settings.prompt, *([shown] if shown else [])]
    ).encode()
    model = "+".join(part for part in (spec.fingerprint, spec.adapter_digest) if part)
    return {
        "model": model,
        "data": facts["items"][:16],
        "config": hashlib.sha256(answer_settings).hexdigest()[:16],
    }


def _run_facts(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except TextFileError as error:
        raise EvalError(
            f"{error}; the model of the answers is unknown: restore the file, or use a new "
            "--workdir"
        ) from error


def _digest_fields(item: Item) -> dict[str, Any]:
    """Return the fields of an item under the names that digests of items have always used."""
    fields = item.item_fields()
    return fields | {"kind": fields.pop("modality")}
