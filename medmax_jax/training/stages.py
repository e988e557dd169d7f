"""Divides a run into its stages: which one a step belongs to, its schedule, and what it trains.

    config.stages    steps 3      steps 2
    steps            1  2  3      4  5         as in the log, counted from 1
    stage            0            1
    rows             0 .. 3B-1    0 .. 2B-1    of the stage's own plan, see data/packing/stages.py

A run without stages is treated as one, which is not reported.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from medmax_jax.checkpoints.safetensors_file import dotted_name, flatten_named
from medmax_jax.config import ConditionDropout, ConfigError, LossWeights, Mixing, Run


def ends(run: Run) -> list[int]:
    """Return the number of steps at the end of each stage; a run without stages has one end."""
    return list(itertools.accumulate(stage.steps for stage in run.stages)) or [run.train.steps]


def at(run: Run, done: int) -> int:
    """Return the stage of the step that follows `done` steps; after the last step the last one."""
    return next((n for n, end in enumerate(ends(run)) if done < end), len(ends(run)) - 1)


def reported(run: Run, step: int) -> dict[str, int]:
    """Return the stage of a step, counted from 1, for a row of metrics; empty without stages."""
    return {"stage": at(run, step - 1)} if run.stages else {}


def schedule(run: Run) -> tuple[int, ...]:
    """Return the steps that each warm-up and cosine span, in sequence."""
    if run.stages and run.optim.schedule == "stage":
        return tuple(stage.steps for stage in run.stages)
    return (run.train.steps,)


# ---- what a stage trains ----
#
# `trains` of a stage keeps the values of all other parameters. The moments of AdamW follow the
# gradients of every parameter, so one that trains in a later stage starts there with estimates of
# its gradient: empty moments, of which AdamW's common count no longer corrects the bias, would make
# its first updates several times as large as the learning rate.


def trains(run: Run, number: int) -> str:
    """Return the field `trains` of a stage; empty: everything that config.train.trains selects."""
    return run.stages[number].trains if run.stages else ""


def check_trains(run: Run, trainable: PyTree) -> None:
    """Raise ConfigError where a stage names no parameter of `trainable`, abstract or not."""
    parts = {part for name in flatten_named(trainable) for part in name.split(".")}
    for number, stage in enumerate(run.stages):
        if unknown := _names(stage.trains) - parts:
            raise ConfigError(
                f"config.stages[{number}].trains is {stage.trains!r}: {min(unknown)!r} is no name "
                f"of a parameter that train.trains = {run.train.trains} selects, nor a part of "
                f"one; use parts from {', '.join(sorted(parts))}, or leave it empty for all"
            )


def count_trained(trainable: PyTree, only: str) -> int:
    """Return how many parameters a stage with `trains` = only changes."""
    named = flatten_named(trainable).items()
    return sum(leaf.size for name, leaf in named if _is_trained(name, only))


def keep_others(updated: PyTree, old: PyTree, only: str) -> PyTree:
    """Return `updated` where a stage with `trains` = only trains, and `old` elsewhere."""
    if not only:
        return updated
    return jax.tree_util.tree_map_with_path(
        lambda path, new, kept: new if _is_trained(dotted_name(path), only) else kept, updated, old
    )


def _is_trained(name: str, only: str) -> bool:
    return not only or not _names(only).isdisjoint(name.split("."))


def _names(only: str) -> set[str]:
    return {name.strip() for name in only.split(",")} if only else set()


# ---- descriptions ----


def facts(run: Run, trainable: PyTree) -> list[dict[str, Any]]:
    """Return, for each stage, its steps and tokens, its settings, and what it trains."""
    total, starts = count_trained(trainable, ""), [0, *ends(run)]
    return [
        {
            "stage": number,
            "first_step": start + 1,
            "last_step": start + stage.steps,
            "tokens": stage.steps * run.data.batch_size * run.data.seq_len,  # with padding
            "settings": settings(stage.mixing, stage.condition_dropout, stage.loss_weights),
            "records": stage.records,
            "trains": stage.trains or run.train.trains,
            "trained": count_trained(trainable, stage.trains),
            "trainable": total,
        }
        for number, (stage, start) in enumerate(zip(run.stages, starts, strict=False))
    ]


def describe(stage: dict[str, Any]) -> str:
    """Format the facts of a stage as a line."""
    records = f"records {stage['records']}, " if stage["records"] else ""
    return (
        f"stage {stage['stage']}: steps {stage['first_step']:,} to {stage['last_step']:,}, "
        f"{stage['tokens']:,} tokens with padding; {records}{stage['settings']}; "
        f"trains {stage['trains']}: {stage['trained']:,} of {stage['trainable']:,} parameters"
    )


def settings(mixing: Mixing, dropout: ConditionDropout, weights: LossWeights) -> str:
    """Return what distinguishes stages, in the names of the config."""
    parts = [f"mixing by {mixing.by}: {mixing.weights or 'each document once'}"]
    parts += ["image_centric"] if mixing.image_centric else []
    parts += [f"leave_out {mixing.leave_out}"] if mixing.leave_out else []
    parts += [] if mixing.pseudo else ["pseudo False"]
    parts += [f"fraction {mixing.fraction:g}"] if mixing.fraction != 1 else []
    for name, section in (("condition_dropout", dropout), ("loss_weights", weights)):
        if section != type(section).off():
            values = dataclasses.asdict(section).items()
            unset = (("tasks", ""), ("pseudo", 1.0))
            parts.append(
                f"{name} " + " ".join(f"{n} {v}" for n, v in values if (n, v) not in unset)
            )
    return ", ".join(parts)


def with_steps(run: Run, steps: int) -> Run:
    """Return the run with another number of steps; its stages keep their shares of them.

    Each stage has at least one step, so a run of fewer steps than stages gets one for each.
    """
    lengths = scaled([stage.steps for stage in run.stages], steps)
    scaled_stages = tuple(
        dataclasses.replace(stage, steps=length)
        for stage, length in zip(run.stages, lengths, strict=True)
    )
    train = dataclasses.replace(run.train, steps=sum(lengths) or steps)
    return dataclasses.replace(run, train=train, stages=scaled_stages)


def scaled(lengths: Sequence[int], total: int) -> list[int]:
    """Return stage lengths in the same proportions that add up to `total`, of at least 1 each.

    [3, 2], 10 -> [6, 4]; [85, 120, 70], 11 -> [3, 5, 3]
    """
    whole, bounds = sum(lengths), [0]
    for number, end in enumerate(itertools.accumulate(lengths), start=1):
        rest = len(lengths) - number
        bounds.append(max(bounds[-1] + 1, min(round(end * total / whole), total - rest)))
    return [b - a for a, b in itertools.pairwise(bounds)]
