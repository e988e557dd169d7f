"""A sweep file to the list of its runs, each with a stable name and what it would cost.

    configs/sweep_x.py --axes--> overrides --> run id, steps, parameters, FLOPs, memory, hours, money
                                                      D/sweep.jsonl, one line a run

A run's id is a hash of its config file's name and its overrides, so the same run has the same id in
every expansion. Costs are arithmetic at the sweep's stated utilisation: a plan, no measurement.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from medmax_jax import config, flops
from medmax_jax.config import Run
from medmax_jax.sweep.axes import WANTED, Overrides, SweepError, expand

FILE = "sweep.jsonl"
ID_LENGTH = 10  # hex digits: 40 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The settings of a sweep file."""

    name: str
    config: str  # the file that every run starts from
    axes: tuple  # see axes.py
    topology: str  # "v5e:4x4" as medmax_jax.plan has it; empty: costs are not told
    slices: int
    utilisation: float  # of the chips' peak, for hours and money: a guess that is yours
    price: float  # USD a chip-hour; 0: money is not told
    fill: float  # tokens over places of a row: `data.prepare plan` says it
    said: Mapping[str, str]  # answers for the fit's checklist: tuning, ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep: a line of sweep.jsonl."""

    run_id: str
    sweep: str
    config: str
    overrides: Overrides
    seed: int
    steps: int
    params: int  # matrices of layers and head: what a token is multiplied with
    trainable: int
    tokens: float  # seen, estimated
    flops: float
    topology: str
    slices: int
    chips: int
    hbm_gib: float | None  # of one chip at its peak, estimated
    hours: float | None
    chip_hours: float | None
    usd: float | None

    def arguments(self) -> list[str]:
        """The flags of medmax_jax.train, but for the workdir."""
        return [f"--config={self.config}", *_flags(self.overrides)]


def load(argv: Sequence[str]) -> Sweep:
    """The sweep of `--config=configs/sweep_x.py --config.price=2.0`."""
    given = _parsed(argv)
    names = [f.name for f in dataclasses.fields(Sweep)]
    if set(given) != set(names):
        wrong = sorted(set(given) ^ set(names))[0]
        raise SweepError(f"sweep file: {wrong} is unknown or missing; it has {', '.join(names)}")
    values = {name: given[name] for name in names}
    for name in ("axes", "said"):
        values[name] = _plain(given[name])
    return Sweep(**values)


def planned(sweep: Sweep) -> list[Planned]:
    """The runs; raises SweepError on an unknown field, a setting that contradicts, a duplicate."""
    runs, seen = [], {}
    for number, overrides in enumerate(expand(sweep.axes), start=1):
        run = _planned(sweep, overrides)
        if run.run_id in seen:
            raise SweepError(
                f"runs {seen[run.run_id]} and {number} are the same: {run.overrides}; drop a "
                "value that stands twice, or give a seed to each"
            )
        seen[run.run_id] = number
        runs.append(run)
    return runs


def settings(planned: Planned) -> Run:
    """The typed settings that medmax_jax.train will see."""
    return _settings(planned.config, planned.overrides)


def write(runs: Sequence[Planned], folder: Path) -> Path:
    """D/sweep.jsonl; another sweep's is not overwritten unless it has only runs of this one."""
    path = folder / FILE
    if path.exists():
        gone = {r.run_id for r in read(folder)} - {r.run_id for r in runs}
        if started := sorted(run_id for run_id in gone if (folder / run_id).exists()):
            raise SweepError(
                f"{path} has runs that this sweep lacks and that have begun: {started[0]}; "
                "name another --workdir, or remove their folders"
            )
    text = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)
    return path


def read(folder: Path) -> list[Planned]:
    """The runs of D/sweep.jsonl."""
    path = folder / FILE
    try:
        return [Planned(**json.loads(line)) for line in path.read_text().splitlines()]
    except FileNotFoundError as error:
        raise SweepError(
            f"{path}: no such file; make it: python -m medmax_jax.sweep expand --config=... "
            f"--workdir {folder}"
        ) from error
    except (ValueError, TypeError) as error:
        raise SweepError(f"{path}: damaged ({error}); expand the sweep again") from error


def _planned(sweep: Sweep, overrides: Overrides) -> Planned:
    wanted = {name: overrides[name] for name in WANTED if name in overrides}
    plain = {name: v for name, v in overrides.items() if name not in wanted}
    if wanted:
        if "train.steps" in plain or len(wanted) > 1:
            raise SweepError("axes: tokens, flops and train.steps each set the steps; leave it to one")
        plain["train.steps"] = _steps(sweep, _settings(sweep.config, plain), wanted)
    run = _settings(sweep.config, plain)
    counts = flops.parameters(run.model, run.vocab, run.lora)
    tokens = run.train.steps * _step_tokens(sweep, run)
    total = tokens * _token_flops(run)
    return Planned(
        run_id=run_id(sweep.config, plain), sweep=sweep.name, config=sweep.config, overrides=plain,
        seed=run.train.seed, steps=run.train.steps, params=counts.matmul,
        trainable=counts.base if run.train.trains == "full" else counts.lora,
        tokens=tokens, flops=total, topology=sweep.topology, slices=sweep.slices,
        **_cost(sweep, run, total),
    )  # fmt: skip


def run_id(name: str, overrides: Overrides) -> str:
    """Ten hex digits of the canonical overrides."""
    canonical = json.dumps([name, overrides], sort_keys=True)
    return hashlib.sha1(canonical.encode()).hexdigest()[:ID_LENGTH]


def _step_tokens(sweep: Sweep, run: Run) -> float:
    return run.data.batch_size * run.data.seq_len * sweep.fill


def _token_flops(run: Run) -> float:
    """At documents as long as any may be: attention's share is then not too small."""
    length = run.data.document_limit
    return flops.train_flops(
        run.model, run.vocab, run.lora, trains=run.train.trains, length=length
    )  # fmt: skip


def _steps(sweep: Sweep, run: Run, wanted: Mapping[str, float]) -> int:
    tokens = wanted.get("tokens") or wanted["flops"] / _token_flops(run)
    return max(1, round(tokens / _step_tokens(sweep, run)))


def _cost(sweep: Sweep, run: Run, total: float) -> dict[str, Any]:
    if not sweep.topology:
        return dict(chips=0, hbm_gib=None, hours=None, chip_hours=None, usd=None)
    kind, chips = chips_of(sweep.topology, sweep.slices)
    rows = run.mesh.data * run.mesh.fsdp * run.mesh.tp
    if rows != chips:
        raise SweepError(
            f"topology {sweep.topology} x {sweep.slices} has {chips} chips, but config.mesh is "
            f"{run.mesh.data} x {run.mesh.fsdp} x {run.mesh.tp} = {rows}; fix mesh.* in the axes"
        )
    hours = total / (chips * flops.CHIPS[kind].flops * sweep.utilisation) / 3_600
    return dict(
        chips=chips, hbm_gib=None, hours=hours, chip_hours=hours * chips,
        usd=hours * chips * sweep.price if sweep.price else None,
    )  # fmt: skip


def chips_of(topology: str, slices: int) -> tuple[str, int]:
    """("v5e", 16) of "v5e:4x4"."""
    kind, _, shape = topology.partition(":")
    sides = shape.split("x")
    if kind not in flops.CHIPS or not all(s.isdigit() and int(s) > 0 for s in sides):
        raise SweepError(
            f"topology is {topology!r}; write KIND:AxB with a kind of {', '.join(flops.CHIPS)}"
        )
    count = slices
    for side in sides:
        count *= int(side)
    return kind, count


def _settings(path: str, overrides: Overrides) -> Run:
    try:
        return config.from_config_dict(_parsed([f"--config={path}", *_flags(overrides)]))
    except config.ConfigError as error:
        raise SweepError(f"{error} (run {overrides})") from error


def _flags(overrides: Overrides) -> list[str]:
    return [f"--config.{name}={value}" for name, value in sorted(overrides.items())]


def _parsed(argv: Sequence[str]) -> ConfigDict:
    """What train's flags make of these, by the same parser."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    try:
        rest = values(["sweep", *argv])
        if len(rest) > 1:
            raise SweepError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        if values.config is None:
            raise SweepError("--config is missing; name a file of configs/")
        return values.config
    except (AttributeError, KeyError) as error:
        raise SweepError(
            f"{_blamed(argv, error)} names no field of {argv[0].removeprefix('--config=')}; "
            "configs/base.py has every field of a run"
        ) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        if isinstance(error, SweepError | config.ConfigError):
            raise
        raise SweepError(f"{' '.join(argv)}: {error}") from error


def _blamed(argv: Sequence[str], error: Exception) -> str:
    """The override whose name is in the error, for the error names only a part of it."""
    words = str(error).replace("'", " ").replace('"', " ").replace(".", " ").split()
    for flag in argv:
        name = flag.split("=")[0].removeprefix("--config.")
        if "." in name and set(name.split(".")) & set(words):
            return name
    return " ".join(argv[1:]) or "the config"


def _plain(value: Any) -> Any:
    """ConfigDicts inside tuples as dicts."""
    if isinstance(value, ConfigDict | Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value
