"""Expand a sweep file to the list of its runs, each with a stable name and its estimated cost.

    configs/sweep_x.py --axes--> overrides --> run id, steps, parameters, FLOPs, memory, hours
                                                      money: one line of D/sweep.jsonl each

A run's id is a hash of its config file's name and its overrides, so the same run has the same id in
every expansion. Costs are the arithmetic of medmax_jax.plan --analytic at the sweep's utilization.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from medmax_jax import cli, config, flops
from medmax_jax.config import Run
from medmax_jax.io import text_files
from medmax_jax.io.errors import printable
from medmax_jax.plan import analytic, topology
from medmax_jax.sweep.axes import DERIVED_FIELDS, Overrides, SweepError, expand

FILE = "sweep.jsonl"
ID_LENGTH = 10  # hex digits: 40 bits
NUMBERS = (float, float | None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The settings of a sweep file."""

    name: str
    config: str  # the file that every run starts from
    axes: tuple  # see axes.py
    topology: str  # "v5e:4x4" in the form of medmax_jax.plan; empty: no costs
    slices: int
    utilisation: float  # of the chips' peak, for hours and cost: the user's estimate
    price: float  # USD per chip-hour; 0: no cost in USD
    fill: float  # tokens over positions of a row, see `data.prepare plan`
    said: Mapping[str, str]  # answers for the fit's checklist: tuning, ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep: one line of sweep.jsonl."""

    run_id: str
    sweep: str
    config: str
    overrides: Overrides
    seed: int
    steps: int
    params: int  # matrices of layers and head, by which a token is multiplied
    trainable: int
    tokens: float  # seen, estimated
    flops: float
    topology: str
    slices: int
    chips: int
    fits: bool | None  # on the topology
    hbm_gib: float | None  # of one chip at its peak, estimated
    hours: float | None
    chip_hours: float | None
    usd: float | None

    def arguments(self) -> list[str]:
        """Return the flags of medmax_jax.train, except the workdir."""
        return [f"--config={self.config}", *_flags(self.overrides)]


def load(argv: Sequence[str]) -> Sweep:
    """Return the sweep of `--config=configs/sweep_x.py --config.price=2.0`."""
    values = _parsed(argv)
    names = [f.name for f in dataclasses.fields(Sweep)]
    if set(values) != set(names):
        wrong = sorted(set(values) ^ set(names))[0]
        raise SweepError(
            f"sweep file: field {wrong!r} is unknown or missing; the fields are {', '.join(names)}"
        )
    values = {name: values[name] for name in names}
    for name in ("axes", "said"):
        values[name] = _plain(values[name])
    return Sweep(**values)


def plan_runs(sweep: Sweep, *, limit: int | None = None) -> list[SweepRun]:
    """Return the runs, or the first `limit` of them.

    Raises SweepError on an unknown field, a contradiction, a duplicate.
    """
    if limit is not None and limit < 1:
        raise SweepError(f"--limit is {limit}; it must be at least 1")
    runs, seen = [], {}
    for number, overrides in enumerate(expand(sweep.axes)[:limit], start=1):
        run = _planned(sweep, overrides)
        if run.run_id in seen:
            raise SweepError(
                f"runs {seen[run.run_id]} and {number} are the same: {run.overrides}; remove a "
                "duplicate value, or use different seeds"
            )
        seen[run.run_id] = number
        runs.append(run)
    return runs


def settings(planned: SweepRun) -> Run:
    """Return the typed settings that medmax_jax.train will use."""
    return _settings(planned.config, planned.overrides)


def write(runs: Sequence[SweepRun], folder: Path) -> Path:
    """Write D/sweep.jsonl; raise SweepError if an existing file has other runs that have begun."""
    path = folder / FILE
    if path.exists():
        removed = {r.run_id for r in read(folder)} - {r.run_id for r in runs}
        if started := sorted(run_id for run_id in removed if (folder / run_id).exists()):
            raise SweepError(
                f"{path} has runs that are not in this sweep but have started: {started[0]}; "
                "use another --workdir, or remove their folders"
            )
    text = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)
    return path


def read(folder: Path) -> list[SweepRun]:
    """Return the runs of D/sweep.jsonl."""
    path = folder / FILE
    if not path.exists():
        raise SweepError(
            f"{path}: file not found; create it: python -m medmax_jax.sweep expand --config=... "
            f"--workdir {folder}"
        )
    try:
        rows = text_files.read_objects(path, allow_nonfinite=True)
        return [_read_back(row, location) for location, row in rows]
    except ValueError as error:
        raise SweepError(f"{error}: damaged; expand the sweep again") from error


def _read_back(row: dict[str, Any], location: str) -> SweepRun:
    """Return the run of a line; raise ValueError if a field is not of its type."""
    fields = {field.name: field.type for field in dataclasses.fields(SweepRun)}
    if set(row) != set(fields):
        raise ValueError(f"{location}: does not have exactly the fields of a run")
    for name, annotation in fields.items():
        allowed = (
            dict
            if name == "overrides"
            else annotation | int
            if annotation in NUMBERS
            else annotation
        )
        value = row[name]
        if not isinstance(value, allowed) or isinstance(value, bool) and name != "fits":
            raise ValueError(f"{location}: {name} is {printable(repr(value), 60)}")
        if annotation in NUMBERS and value is not None:
            row[name] = float(value)
    if not re.fullmatch(r"[0-9a-f]{10}", row["run_id"]):  # it becomes the name of a folder
        raise ValueError(f"{location}: run_id is {printable(repr(row['run_id']), 60)}")
    return SweepRun(**row)


def totals(runs: Sequence[SweepRun]) -> dict[str, float | None]:
    """Return sums over runs; None if a cost is not known."""
    sums: dict[str, float | None] = {}
    for name in ("tokens", "flops", "chip_hours", "usd"):
        costs = [getattr(run, name) for run in runs]
        sums[name] = None if None in costs else sum(costs)
    return sums


def table(sweep: Sweep, runs: Sequence[SweepRun]) -> list[str]:
    """Return the dry run: one line per run, and their total cost."""
    varied = sorted({name for run in runs for name in run.overrides})
    varied = [n for n in varied if len({json.dumps(r.overrides.get(n)) for r in runs}) > 1]
    head = f"{'run':10} {'params':>8} {'trained':>8} {'tokens':>8} {'FLOPs':>8} {'steps':>8}"
    lines = [f"{head} {'GiB':>6} {'hours':>8} {'chip-h':>8} {'USD':>9}  {' '.join(varied)}"]
    for r in runs:
        memory = _cell(r.hbm_gib, ".1f") + ("!" if r.fits is False else "")
        cells = " ".join(str(r.overrides.get(name, "-")) for name in varied)
        lines.append(
            f"{r.run_id:10} {r.params:8.2e} {r.trainable:8.1e} {r.tokens:8.1e} {r.flops:8.1e} "
            f"{r.steps:8d} {memory:>6} {_cell(r.hours, '.1f'):>8} {_cell(r.chip_hours, '.1f'):>8} "
            f"{_cell(r.usd, ',.0f'):>9}  {cells}"
        )
    sums = totals(runs)
    costs = (
        f"; on {sweep.slices} x {sweep.topology} at {sweep.utilisation:.0%} of the peak "
        f"{_cell(sums['chip_hours'], ',.0f')} chip-hours, USD {_cell(sums['usd'], ',.0f')}; memory "
        "and hours by arithmetic, ! does not fit"
        if sweep.topology
        else ""
    )
    lines.append(f"{len(runs)} runs, {sums['tokens']:.2e} tokens, {sums['flops']:.2e} FLOPs{costs}")
    return lines


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _planned(sweep: Sweep, overrides: Overrides) -> SweepRun:
    derived = {name: overrides[name] for name in DERIVED_FIELDS if name in overrides}
    fields = {name: v for name, v in overrides.items() if name not in derived}
    if derived:
        if "train.steps" in fields or len(derived) > 1:
            raise SweepError(
                "axes: tokens, flops and train.steps each set the steps; use only one of them"
            )
        fields["train.steps"] = _steps(sweep, _settings(sweep.config, fields), derived)
    run = _settings(sweep.config, fields)
    counts = flops.parameters(run.model, run.vocab, run.lora)
    tokens = run.train.steps * _step_tokens(sweep, run)
    total = tokens * _token_flops(run)
    return SweepRun(
        run_id=run_id(sweep.config, fields), sweep=sweep.name, config=sweep.config,
        overrides=fields, seed=run.train.seed, steps=run.train.steps, params=counts.matmul,
        trainable=counts.base if run.train.trains == "full" else counts.lora,
        tokens=tokens, flops=total, topology=sweep.topology, slices=sweep.slices,
        **_cost(sweep, run),
    )  # fmt: skip


def run_id(name: str, overrides: Overrides) -> str:
    """Return ten hex digits of the canonical overrides."""
    canonical = json.dumps([name, overrides], sort_keys=True)
    return hashlib.sha1(canonical.encode()).hexdigest()[:ID_LENGTH]


def _step_tokens(sweep: Sweep, run: Run) -> float:
    return run.data.batch_size * run.data.seq_len * sweep.fill


def _token_flops(run: Run) -> float:
    """Return FLOPs at the longest allowed documents, so that attention is not underestimated."""
    length = min(run.data.document_limit, run.data.seq_len)
    return flops.train_flops(
        run.model, run.vocab, run.lora, trains=run.train.trains, length=length
    )  # fmt: skip


def _steps(sweep: Sweep, run: Run, derived: Mapping[str, float]) -> int:
    tokens = derived.get("tokens") or derived["flops"] / _token_flops(run)
    return max(1, round(tokens / _step_tokens(sweep, run)))


def _cost(sweep: Sweep, run: Run) -> dict[str, Any]:
    """Return costs by the plan's arithmetic; nothing is compiled."""
    if not sweep.topology:
        return dict(chips=0, fits=None, hbm_gib=None, hours=None, chip_hours=None, usd=None)
    try:
        machine = topology.parse(sweep.topology, slices=sweep.slices)
    except topology.PlanError as error:
        raise SweepError(f"sweep file: {error}") from error
    mesh = run.mesh.data * run.mesh.fsdp * run.mesh.tp
    if mesh != machine.chips:
        raise SweepError(
            f"topology {sweep.topology} x {sweep.slices} has {machine.chips} chips, but "
            f"config.mesh is {run.mesh.data} x {run.mesh.fsdp} x {run.mesh.tp} = {mesh}; set "
            "mesh.data, mesh.fsdp and mesh.tp in the axes"
        )
    estimate = analytic.estimate(run, machine)
    rate = analytic.rates(
        run, machine, estimate, utilisation=sweep.utilisation, price=sweep.price or None
    )
    return dict(
        chips=machine.chips, fits=estimate["fits"], hbm_gib=estimate["peak_hbm_gib"],
        hours=rate["hours"], chip_hours=rate["chip_hours"], usd=rate["cost_usd"],
    )  # fmt: skip


def _settings(path: str, overrides: Overrides) -> Run:
    try:
        return config.from_config_dict(_parsed([f"--config={path}", *_flags(overrides)]))
    except config.ConfigError as error:
        raise SweepError(f"{error} (run {overrides})") from error


def _flags(overrides: Overrides) -> list[str]:
    return [f"--config.{name}={value}" for name, value in sorted(overrides.items())]


def _parsed(argv: Sequence[str]) -> ConfigDict:
    """Parse these arguments with the parser of medmax_jax.train's flags."""
    values = flags.FlagValues()
    line = ["sweep", *cli.with_shipped_config(argv)]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=line)
    try:
        rest = values(line)
        if len(rest) > 1:
            raise SweepError(f"unexpected argument {rest[1]!r}; write flags as --name=value")
        if values.config is None:
            raise SweepError("--config is missing; use a file of configs/")
        return values.config
    except (AttributeError, KeyError) as error:
        raise SweepError(cli.explain_config_error(argv, error)) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        if isinstance(error, SweepError | config.ConfigError):
            raise
        raise SweepError(f"{' '.join(argv)}: {error}") from error


def _plain(value: Any) -> Any:
    """Convert ConfigDicts inside tuples to dicts."""
    if isinstance(value, ConfigDict | Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value
