"""Decide whether a run may resume from a checkpoint: settings that affect results must be equal.

free     FREE below: speed, devices, amount of logging; a change is logged, not refused
extend   train.steps may grow, and with it the steps of the last stage, only with --extend: the
         schedule is a function of them
bound    every other field of the config, and the fingerprints of BOUND: refused, both shown;
         where stages have records of their own, BY_STAGE in place of the plan of all: a stage whose
         records did not exist when the checkpoint was written, and so had not begun, is free
"""

import re
from typing import Any

from medmax_jax.checkpoints.manager import CheckpointError
from medmax_jax.config import ADDED

# The reason why each may change: the batches and the objective stay the same.
FREE = {
    "mesh": "sums are computed in another order, so losses agree up to rounding",
    "model.remat": "the same values, recomputed or stored",
    "model.attention": "another kernel of the same function; agrees up to rounding",
    "train.init_from": "a path; the fingerprint of the base is checked",
    "train.compile": "options of the TPU compiler; agrees up to rounding",
    "train.log_every": "reports",
    "train.eval_every": "reports",
    "train.samples": "reports",
    "train.checkpoint_every": "how much work a kill loses",
    "train.keep": "number of checkpoints on the disk",
    "data.train": "a path; the fingerprints of the records and of the plan are checked",
    "data.validation": "reports",
    "data.plan": "an assertion; the plan itself is checked",
    "sample": "how samples are generated; training does not use it",
}
BOUND = {
    "base": "config.train.init_from",
    "data": "config.data.train",
    "plan": "config.data, config.mixing and config.stages",
}
BY_STAGE = ("stage_data", "stage_plans")


def check_meta(saved: dict, current: dict, *, extend: bool) -> list[str]:
    """Return descriptions of the harmless differences; raise CheckpointError with all others."""
    harmless, refused = [], []
    configs = [with_added_fields(meta["config"]) for meta in (saved, current)]
    extensible = ("train.steps", f"stages.{len(configs[0]['stages']) - 1}.steps")
    for field, (old, new) in sorted(differences(*configs).items()):
        text = f"config.{field} was {old!r}, is now {new!r}"
        if is_free(field):
            harmless.append(text)
        elif field in extensible and new is not None and new > old:
            if extend:
                harmless.append(f"{text} by --extend: the learning rate follows the longer cosine")
            else:
                refused.append(f"{text} (use --extend for a longer schedule)")
        else:
            refused.append(text)
    by_stage = any(name in saved for name in BY_STAGE)
    for name in BY_STAGE:
        new_values = dict(enumerate(current.get(name, ())))
        for number, old in enumerate(saved.get(name, ())):
            if old != (new := new_values.get(number)):
                text = f"{name} of stage {number} was {_short(old)}, is now {_short(new)}"
                refused.append(f"{text} (see config.stages[{number}].records)")
    for name, field in BOUND.items():
        if name == "plan" and by_stage:
            continue
        if (old := saved.get(name)) != (new := current.get(name)):
            refused.append(f"{name} was {_short(old)}, is now {_short(new)} (see {field})")
    versions = differences(saved.get("versions", {}), current.get("versions", {}))
    harmless += [
        f"{package} was {old}, is now {new}" for package, (old, new) in sorted(versions.items())
    ]
    if refused:
        raise CheckpointError(
            "the checkpoint was written with other settings: "
            + "; ".join(refused)
            + ". Restore these settings or use another --workdir"
        )
    return harmless


def config_sections(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, fields) of the sections of a run's config, as JSON has it; one of each stage.

    Raises ValueError for anything else.
    """
    sections = []
    for name, value in config.items() if isinstance(config, dict) else [("", None)]:
        parts = value if name == "stages" else [value]
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError("not the config of a run")
        sections += [(name, part) for part in parts]
    return sections


def with_added_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, as JSON has them, with the fields that an older one lacks."""
    filled = _filled("run", settings)
    filled = {name: _filled(name, value) for name, value in filled.items()}
    filled["loss"] = _with_sections(filled["loss"], {"weights": "lossweights"})
    views = {"view": filled["vq"]["view"]} if "vq" in filled else {}
    sections = {"mixing": "mixing", "loss_weights": "lossweights"}
    filled["stages"] = [
        _with_sections(_filled("stage", views | stage), sections) for stage in filled["stages"]
    ]
    return filled


def _filled(section: str, value: Any) -> Any:
    """Return a section with the fields that were added to it; anything else unchanged."""
    names = ((name.split("."), added) for name, added in ADDED.items())
    added = {field: meant for (owner, field), meant in names if owner == section}
    return added | value if isinstance(value, dict) else value


def _with_sections(value: dict[str, Any], sections: dict[str, str]) -> dict[str, Any]:
    """Return a section whose own sections, field -> class, are filled too."""
    own = {name: _filled(kind, value[name]) for name, kind in sections.items() if name in value}
    return value | own


def is_free(name: str) -> bool:
    """Return whether a dotted field, or the section that it is in, may change."""
    own_records = bool(re.fullmatch(r"stages\.\d+\.records", name))  # as data.train
    return own_records or name in FREE or name.split(".")[0] in FREE


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old, new) of every difference of two nested configs.

    None represents a field that one of them lacks.
    """
    changed = {}
    for name in old.keys() | new.keys():
        a, b = (_sections(settings.get(name)) for settings in (old, new))
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed[prefix + name] = (a, b)
    return changed


def _sections(value: Any) -> Any:
    """Return a list of sections, such as config.stages, as a section of its numbers."""
    is_list = isinstance(value, list) and value and all(isinstance(x, dict) for x in value)
    return {str(n): section for n, section in enumerate(value)} if is_list else value


def _short(value: Any) -> Any:
    return value[:60] if isinstance(value, str) else value
