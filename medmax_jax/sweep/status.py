"""Read the folders of a sweep's runs: the state of each run, and the table for a fit.

D/sweep.jsonl      the runs
D/<run id>/        the workdir of medmax_jax.train; run.log: the output seen by the local runner
D/table.csv        collect: one row per run   D/table.json: answers for the fit's checklist

pending     nothing yet         running     a process holds its lock, or is starting
finished    last step, exported stopped     has a checkpoint, no process
crashed     began, no checkpoint            diverged    its loss was not finite
"""

import csv
import fcntl
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmax_jax import config, flops
from medmax_jax.checkpoints.resume import config_sections
from medmax_jax.io.run_files import damage_warning, read_metrics
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.storage import lease
from medmax_jax.sweep.axes import SweepError
from medmax_jax.sweep.expand import SweepRun, settings

TABLE = "table.csv"
LOCK, STARTED = ".lock", ".started"  # of medmax_jax.train; of a process that the runner started
UNFINISHED = ("pending", "stopped", "crashed")


def state(run: SweepRun, folder: Path) -> str:
    """Return one of the states above; raise SweepError if the folder belongs to another run."""
    home = folder / run.run_id
    if not (home / "config.json").exists():
        began = (home / LOCK).exists() or (home / STARTED).exists()
        return "running" if _locked(home) else "crashed" if began else "pending"
    _check_same(run, home)
    if _finished(run, home):
        return "finished"
    if _locked(home):
        return "running"
    if _diverged(home):
        return "diverged"
    return "stopped" if any((home / "checkpoints").glob("[0-9]*")) else "crashed"


def states(runs: Sequence[SweepRun], folder: Path) -> dict[str, str]:
    """Return run id -> state."""
    return {run.run_id: state(run, folder) for run in runs}


def collect(runs: Sequence[SweepRun], folder: Path, *, partial: bool) -> list[dict[str, Any]]:
    """Return a row of each run that has ended; a diverged one has nan for its losses.

    Raises SweepError naming the runs that have not ended, unless `partial`, and, in any case, a run
    without held-out losses.
    """
    run_states = states(runs, folder)
    unfinished = [
        f"{run_id} ({run_state})"
        for run_id, run_state in run_states.items()
        if run_state in (*UNFINISHED, "running")
    ]
    if unfinished and not partial:
        raise SweepError(
            f"{len(unfinished)} of {len(runs)} runs have not ended: {', '.join(unfinished[:5])}"
            f"{', ...' * (len(unfinished) > 5)}; continue with `sweep run`, or collect with "
            "--partial"
        )
    return [
        _row(run, folder / run.run_id, run_states[run.run_id])
        for run in runs
        if run_states[run.run_id] in ("finished", "diverged")
    ]


def write(rows: Sequence[Mapping[str, Any]], statements: Mapping[str, str], folder: Path) -> Path:
    """Write table.csv, and table.json next to it."""
    if not rows:
        raise SweepError(f"{folder}: no run has ended, so there is no table")
    path = folder / TABLE
    fields = dict.fromkeys(name for row in rows for name in row)  # runs may set different fields
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(fields), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps({"said": dict(statements)}, indent=1) + "\n")
    return path


def sweep_notes(runs: Sequence[SweepRun], statements: Mapping[str, str]) -> dict[str, str]:
    """Return checklist answers that hold for every sweep; the sweep file's take precedence."""
    with_adapters = any(settings(run).train.trains == "lora" for run in runs[:1])
    rate = "4 (LoRA: frozen matrices have no gradient)" if with_adapters else "6"
    return {
        "params": "matrices of layers and head; no embedding, no adapters",
        "tokens": "tokens: seen, no padding; unique_tokens: each once; text and image together",
        "flops": f"about {rate} per parameter and token; attention is counted separately",
        "schedule": "yes: warm-up and cosine are shares of train.steps, which follow the data",
        "checkpoints": "the last step only",
        "split": "all held-out documents of config.data.validation",
        **statements,
    }


def _row(run: SweepRun, home: Path, run_state: str) -> dict[str, Any]:
    rows = _metrics(home)
    train = [r for r in rows if r["kind"] == "train"]
    validation = [r for r in rows if r["kind"] == "validation" and r["step"] == run.steps]
    run_settings, facts = settings(run), _config(home)
    if run_state == "finished" and not validation:
        raise SweepError(
            f"{home}: no held-out loss at step {run.steps}; set data.validation and a "
            "train.eval_every above 0, and repeat the run"
        )
    losses = validation[0] if run_state == "finished" else {}
    seen = _seen(train, home)
    counts = flops.parameters(run_settings.model, run_settings.vocab, run_settings.lora)
    return {
        "run": run.run_id,
        "state": run_state,
        **{name: run.overrides[name] for name in sorted(run.overrides)},
        "seed": run.seed,
        "steps": run.steps,
        "params": counts.matmul,
        "params_layers": counts.layers,
        "trainable": run.trainable,
        "rank": run_settings.lora.rank,
        "tokens": seen,
        "unique_tokens": min(seen, _epoch_tokens(facts, home)),
        "flops": seen * run.flops / run.tokens,
        "loss": _number(losses.get("loss")),
        "loss_text": _number(losses.get("text_nll")),
        "loss_image": _number(losses.get("image_nll")),
        "train_loss": _number(train[-1].get("loss")) if train else math.nan,
    }


def _seen(train: Sequence[Mapping[str, Any]], home: Path) -> int:
    """Return tokens of all steps: each report has the mean over the steps since the last one."""
    total, before = 0.0, 0
    for row in train:
        if row.get("tokens") is None:
            raise SweepError(
                f"{home / 'metrics.jsonl'}: the row of step {row['step']} has no tokens; restore "
                "the file, or remove the folder and repeat the run"
            )
        total += row["tokens"] * (row["step"] - before)
        before = row["step"]
    return round(total)


def _metrics(home: Path) -> list[dict[str, Any]]:
    path = home / "metrics.jsonl"
    try:
        rows, damaged = read_metrics(path)
    except TextFileError as error:
        raise SweepError(f"{error}; restore it, or remove the folder and repeat the run") from error
    if damaged:
        print(damage_warning(path, damaged), file=sys.stderr, flush=True)
    return rows


def _config(home: Path) -> dict[str, Any]:
    try:
        return read_json_object(home / "config.json")
    except TextFileError as error:
        raise SweepError(f"{error}; restore it, or remove the folder and repeat the run") from error


def _epoch_tokens(facts: Mapping[str, Any], home: Path) -> int:
    if type(facts.get("epoch_tokens")) is not int:
        raise SweepError(
            f"{home / 'config.json'}: epoch_tokens is not an integer; remove the folder and "
            "repeat the run"
        )
    return facts["epoch_tokens"]


def _finished(run: SweepRun, home: Path) -> bool:
    files = ("model/config.json", "adapter/adapter_config.json")  # written last
    if not any((home / name).exists() for name in files):
        return False
    return any(r["kind"] == "train" and r["step"] == run.steps for r in _metrics(home))


def _diverged(home: Path) -> bool:
    """Return whether the last step was not finite.

    medmax_jax.train leaves a file with the number of that step.
    """
    ends = [path.stem.rpartition("_")[2] for path in home.glob("not_finite_*.json")]
    reached = max((r["step"] for r in _metrics(home)), default=0)
    return any(step.isdecimal() and int(step) > reached for step in ends)


def _locked(home: Path) -> bool:
    """Return whether a process holds the lock of medmax_jax.train, or that of the local runner.

    The runner's lock covers the seconds before medmax_jax.train takes its own. `home` may be a copy
    of a folder on gs://, which has the lease of its run instead.
    """
    if (home / lease.LEASE_OBJECT).exists() and lease.is_live(
        (home / lease.LEASE_OBJECT).read_bytes()
    ):
        return True
    for path in (home / LOCK, home / STARTED):
        if path.exists():
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
    return False


def _check_same(run: SweepRun, home: Path) -> None:
    stored, expected = _config(home).get("config"), config.to_dict(settings(run))
    try:
        config_sections(stored)
    except ValueError as error:
        raise SweepError(f"{home / 'config.json'}: {error}; remove the folder") from None
    if difference := _first_difference(expected, stored):
        raise SweepError(
            f"{home} contains another run: config.{difference}; use another --workdir, or remove it"
        )


def _first_difference(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Return the first difference in fields of both: an older run may lack the newest ones."""
    for section in sorted(set(expected) & set(stored)):
        left, right = expected[section], stored[section]
        if isinstance(left, list):  # stages
            if left != right:
                return f"{section} is {right!r}, not {left!r}"
            continue
        for name in sorted(set(left) & set(right)):
            if left[name] != right[name]:
                return f"{section}.{name} is {right[name]!r}, not {left[name]!r}"
    return ""


def _number(value: float | None) -> float:
    return math.nan if value is None else value
