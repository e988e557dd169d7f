"""Decide whether a run may resume from a checkpoint: settings that affect results must be equal.

free     FREE below: speed, devices, amount of logging; a change is logged, not refused
extend   train.steps may grow, only with --extend: the schedule is a function of it
bound    every other field of the config, and the fingerprints of BOUND: refused, both shown
"""

from typing import Any

from medmax_jax.checkpoints.manager import CheckpointError

# The reason why each may change: the batches and the objective stay the same.
FREE = {
    "mesh": "sums are taken in another order, so losses agree to rounding",
    "model.remat": "the same numbers, computed again or kept",
    "model.attention": "another kernel of the same function: agrees to rounding",
    "train.init_from": "a path; the fingerprint of the base is bound",
    "train.compile": "options of the TPU's compiler: agrees to rounding",
    "train.log_every": "reports",
    "train.eval_every": "reports",
    "train.samples": "reports",
    "train.checkpoint_every": "how much a kill costs",
    "train.keep": "how many checkpoints lie there",
    "data.train": "a path; the fingerprints of the records and of the plan are bound",
    "data.validation": "reports",
    "data.plan": "a check; the plan itself is bound",
    "sample": "how samples are drawn; training draws none",
}
BOUND = {
    "base": "config.train.init_from",
    "data": "config.data.train",
    "plan": "config.data and config.mixing",
}
EXTENSIBLE = "train.steps"


def check_meta(saved: dict, now: dict, *, extend: bool) -> list[str]:
    """Return descriptions of the harmless differences; raise CheckpointError with all others."""
    harmless, refused = [], []
    for name, (old, new) in sorted(differences(saved["config"], now["config"]).items()):
        text = f"config.{name} was {old!r}, is now {new!r}"
        if is_free(name):
            harmless.append(text)
        elif name == EXTENSIBLE and new is not None and new > old:
            if extend:
                harmless.append(f"{text}, by --extend: the learning rate follows the longer cosine")
            else:
                refused.append(f"{text} (--extend allows a longer schedule)")
        else:
            refused.append(text)
    for name, field in BOUND.items():
        if (old := saved.get(name)) != (new := now.get(name)):
            refused.append(f"{name} was {_short(old)}, is now {_short(new)} (see {field})")
    versions = differences(saved.get("versions", {}), now.get("versions", {}))
    harmless += [f"{name} was {old}, is now {new}" for name, (old, new) in sorted(versions.items())]
    if refused:
        raise CheckpointError(
            "the checkpoint belongs to a run with other numbers: "
            + "; ".join(refused)
            + ". Set it back, or use another --workdir"
        )
    return harmless


def is_free(name: str) -> bool:
    """Return whether a dotted field, or the section that it is in, may change."""
    return name in FREE or name.split(".")[0] in FREE


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted field -> (old, new) of every difference of two nested configs.

    None represents a field that one of them lacks.
    """
    found = {}
    for name in old.keys() | new.keys():
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def _short(value: Any) -> Any:
    return value[:60] if isinstance(value, str) else value
